"""Checkpoints: a thin layer over Orbax that checks what it reads."""

import errno
import hashlib
import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger(__name__)

_OVERHEAD = 2**18
"""Bytes of a checkpoint beside its arrays: more than Orbax's metadata."""


class Damaged(ValueError):
    """Checkpoints are there, and none can be read."""


def digest(tree) -> str:
    """sha256 of the bits of a pytree of arrays: paths, types, shapes and bytes."""
    hasher = hashlib.sha256()
    for path, array in _flat(tree).items():
        hasher.update(f"{path} {array.dtype} {array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


class OtherTree(ValueError):
    """A checkpoint is whole, and of another structure than the one asked for."""


class Checkpoints:
    """The checkpoints of one run: `directory/<step>`, each a pytree with a sha256 of its bits and the run's configuration.

    A save appears under its name only when it is complete (Orbax renames it), so a kill during a save leaves the one before
    untouched. Leaves are stored by path: what is read is put into the structure of the template that is given.

    Args:
      keep: how many of the newest are kept.

    Raises:
      OSError: on a save that the disk refuses, naming the directory; earlier checkpoints stay.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._manager: Any = None
        self._damaged: set[int] = set()
        self._swept = False

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        names = [p.name for p in self.directory.iterdir()] if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, tree, config: Mapping[str, Any]) -> None:
        """Save a pytree under `step`, once: a step that is there already is left as it is, unless it was found damaged."""
        import orbax.checkpoint as ocp

        if step in set(self.steps()) - self._damaged:
            return
        flat = _flat(tree)
        meta = {"sha256": digest(tree), "config": dict(config), "leaves": _kinds(flat)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(meta))
        try:
            self._sweep()
            self._check_room(sum(x.nbytes for x in flat.values()) + _OVERHEAD)
            self._open().save(step, args=args, force=True)
        except (OSError, ValueError) as e:  # the storage library says ValueError for a full disk
            left = f"those of steps {self.steps()} stay" if self.steps() else "none was saved before"
            raise OSError(f"could not save step {step} in {self.directory}: {e}; {left}") from e

    def config(self) -> Mapping[str, Any] | None:
        """The configuration that the newest readable checkpoint was saved with, or None without checkpoints."""
        return next((config for _, config in self._configs()), None)

    def configs(self) -> dict[int, Mapping[str, Any]]:
        """Of every readable checkpoint: step -> the configuration that it was saved with, newest first."""
        return dict(self._configs())

    def _configs(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for step in reversed(self.steps()):
            try:
                yield step, self._read(step, "meta")["config"]
            except Exception as e:
                log.warning("checkpoint %s is damaged, skipped: %s", self.directory / str(step), _line(e))

    def restore(self, template) -> tuple[int, Any] | None:
        """The newest readable checkpoint as (step, tree shaped as `template`), or None where there is none.

        A damaged one is named in a warning and skipped.

        Raises:
          Damaged: when there are checkpoints and none can be read.
          OtherTree: when the newest readable one has other leaves than the template; names them.
        """
        for step in reversed(self.steps()):
            if (tree := self._restore_if_whole(step, template)) is not None:
                return step, tree
        if self.steps():
            raise Damaged(f"no checkpoint in {self.directory} can be read: delete it to start anew")
        return None

    def restore_all(self, template, steps: Collection[int] | None = None) -> dict[int, Any]:
        """Every readable checkpoint, or those of `steps`, oldest first: step -> tree shaped as `template`. Damaged ones are
        named in a warning.

        Raises:
          OtherTree: when one has other leaves than the template; names them.
        """
        there = [step for step in self.steps() if steps is None or step in steps]
        found = {step: self._restore_if_whole(step, template) for step in there}
        return {step: tree for step, tree in found.items() if tree is not None}

    def _restore_if_whole(self, step: int, template) -> Any:
        """The tree, or None and a warning where it is damaged."""
        try:
            return self._restore(step, template)
        except OtherTree:
            raise
        except Exception as e:
            self._damaged.add(step)
            log.warning("checkpoint %s is damaged, skipped: %s", self.directory / str(step), _line(e))
            return None

    def close(self) -> None:
        """Wait for what is being written, and let the directory go."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _sweep(self) -> None:
        """Before the first save: remove the halves that a kill left, and what was found damaged and is now made again."""
        if not self._swept:
            self.close()  # Orbax remembers what it saw
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path)
            for step in self._damaged:
                shutil.rmtree(self.directory / str(step))
            self._damaged, self._swept = set(), True

    def _check_room(self, size: int) -> None:
        """See a full disk coming: once a write has failed, the storage library prints tracebacks from its threads."""
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if free < size:
            raise OSError(errno.ENOSPC, f"No space left on device ({free} bytes are free, {size} are needed)")

    def _restore(self, step: int, template):
        flat = _flat(template)
        meta = self._read(step, "meta")
        if differ := sorted(set(meta["leaves"].items()) ^ set(_kinds(flat).items())):
            raise OtherTree(f"{self.directory / str(step)} holds another state; leaves that differ: {dict(differ)}")
        read = self._read(step, "state", {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flat.items()})
        leaves, structure = jax.tree.flatten(template)
        tree = structure.unflatten([_like(x, read[k]) for x, k in zip(leaves, flat, strict=True)])
        if digest(tree) != meta["sha256"]:
            raise ValueError("its bits are not those that were saved (sha256)")
        return tree

    def _read(self, step: int, item: str, template=None):
        import orbax.checkpoint as ocp

        arg = ocp.args.JsonRestore() if item == "meta" else ocp.args.StandardRestore(template)
        return self._open().restore(step, args=ocp.args.Composite(**{item: arg}))[item]

    def _open(self):
        import orbax.checkpoint as ocp

        if self._manager is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, enable_async_checkpointing=False)
            directory = self.directory
            if re.search(r"[\[*?]", str(directory)):  # Orbax takes it for a pattern, and saves what it cannot read
                directory = Path(tempfile.mkdtemp(prefix="maml-")) / "checkpoints"
                directory.symlink_to(self.directory, target_is_directory=True)
                weakref.finalize(self, shutil.rmtree, directory.parent, ignore_errors=True)
            self._manager = ocp.CheckpointManager(directory, options=options)
        return self._manager


def _flat(tree) -> dict[str, np.ndarray]:
    """Path -> array on the host; a typed key is its bits."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {p: np.asarray(jax.device_get(_bits(x))) for p, (_, x) in zip(paths, leaves, strict=True)}


def _kinds(flat: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in flat.items()}


def _bits(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _like(x, array):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(x))
    return jnp.asarray(array)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

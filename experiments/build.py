"""Where configuration meets code: the one place that turns a composed config into the library's values."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from hydra.utils import instantiate
from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from experiments.schema import Config
from maml import train
from maml.evaluate import Evaluator, Protocol, check_sizes, ensemble_adapt, ensemble_apply, evaluator
from maml.inner_loop import with_prototypes
from maml.models import functional
from maml.objectives import switched
from maml.random import key_for
from maml.tasks import splits
from maml.tasks.images import folder_digest
from maml.types import Adapt, Apply, Loss, Objective, Padded, Params, Sampler, as_argument, initial, whole


@dataclass(frozen=True)
class Learner:
    """The parts that a config names: what is meta-trained, on what, and how."""

    apply: Apply
    loss: Loss
    sampler: Sampler
    step: train.MetaStep
    state: train.MetaState


def learner(cfg: DictConfig) -> Learner:
    """Build everything that meta-training needs.

    Raises:
      ValueError: for sizes and names that do not fit, naming argument, value and remedy.
    """
    check(cfg)
    root = jax.random.key(cfg.seed)
    sampler = build_sampler(cfg, "meta_train")
    apply, params = build_model(cfg, sampler, root)
    loss = _make("task", instantiate(cfg.task.loss), apply)
    objective = build_objective(cfg, loss)
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    how = {name: cfg.trainer[name] for name in ("meta_batch", "task_chunk", "devices")}
    step = train.meta_step(objective, optimizer, **how)
    with _fitting(cfg):
        adapt = inner_loop(cfg)
        if hasattr(adapt, "carried") and OmegaConf.select(cfg, "optimizer._target_") != "optax.partition":
            raise ValueError("its inner optimizer's state needs an outer step of its own: give optimizer=reptile")
        state = train.init(initial(adapt, params, key_for(root, "init/inner")), optimizer, root)
        jax.eval_shape(step, state, as_argument(sampler))
    return Learner(apply, loss, sampler, step, state)


@contextmanager
def _fitting(cfg: DictConfig) -> Iterator[None]:
    """Name the parts where one asks for what another has not."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError):
            if not re.search(r"missing \d+ required keyword.*'(value|grad|value_fn)'", str(error)):
                raise
            error = ValueError(
                f"an optimizer asks for the value of the loss (a line search?), which no loop gives; take another ({error})"
            )
        parts = f"model {_model(cfg)} and optimizer {OmegaConf.select(cfg, 'optimizer._target_', default='?')}"
        hint = f"; {cfg.algorithm.needs}" if "needs" in cfg.algorithm else ""
        raise ValueError(f"algorithm {cfg.algorithm.name} does not fit {parts}: {error}{hint}") from error


def _model(cfg: DictConfig) -> str:
    return OmegaConf.select(cfg, "model._target_", default="?").removeprefix("maml.models.")


def build_objective(cfg: DictConfig, loss: Loss) -> Objective:
    """The algorithm's objective of a loss: that of the task, or one made from it; first order before `first_order_until`."""
    make = instantiate(cfg.algorithm.objective, _convert_="all")
    objective = _make("algorithm", make, loss, inner_loop(cfg))
    if not (until := cfg.algorithm.get("first_order_until")):
        return objective
    early = _make("algorithm", make, loss, inner_loop(with_derivative(cfg, "first_order")))
    return switched(until, early, objective)


def inner_loop(cfg: DictConfig) -> Adapt:
    return instantiate(cfg.algorithm.adapt, _convert_="all")


def with_derivative(cfg: DictConfig, name: str) -> DictConfig:
    """The config with its inner loop differentiated in another way of `maml.derivatives`; as it is where there is none."""
    if "derivative" not in cfg.algorithm:
        return cfg
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    cfg.algorithm.derivative = {"_target_": f"maml.derivatives.{name}", "_partial_": True}
    if "first_order_until" in cfg.algorithm:  # which would have another before that meta-step
        cfg.algorithm.first_order_until = 0
    return cfg


def kernel_codes(cfg: DictConfig) -> tuple[Any, Callable[[str], bool]] | None:
    """The quantizer of kernels that the model has, or else the inner loop, and which paths are theirs; None without."""
    if "kernels" in cfg.model and (kernels := instantiate(cfg.model.kernels)) is not None:
        layers = re.compile(cfg.model.layers)
        return kernels, lambda name: name.endswith("kernel") and layers.search(name) is not None
    return (instantiate(cfg.algorithm.grid), lambda name: name.endswith("kernel")) if "grid" in cfg.algorithm else None


def build_sampler(cfg: DictConfig, split: str, **sizes: Any) -> Sampler:
    """The sampler of a split; `sizes` (ways, shots, queries, rotations, least_ways) replace the task's where it has them."""
    node = {k: v for k, v in cfg.task.items() if k != "loss"}
    factory = instantiate(node, _convert_="all")
    sizes = {k: v for k, v in sizes.items() if k in cfg.task}
    # Called without Hydra's wrapper, which refuses results of type jax.tree_util.Partial.
    return _make("task", factory.func, *factory.args, **{**factory.keywords, **sizes, "split": split})


def build_model(cfg: DictConfig, sampler: Sampler, root: jax.Array) -> tuple[Apply, Params]:
    """The model as a pure function and its parameters."""
    return functional(build_module(cfg, sampler, root))


def build_module(cfg: DictConfig, sampler: Sampler, root: jax.Array) -> nnx.Module:
    """The model for the shapes that the sampler draws: `outputs` is the ways, symbols or actions, or the features of targets."""
    task = jax.eval_shape(sampler, jax.random.split(root, 1))
    inputs, targets = task.query  # a support set of transitions has no targets
    inputs = inputs.inputs if isinstance(inputs, Padded) else inputs
    if "dynamics" in cfg.task.loss and "actions" not in cfg.task and targets.ndim != 3:
        raise ValueError(
            "task: a policy has as many outputs as there are actions; let the task have a number of `actions`"
        )
    named = ("ways", "symbols", "actions")
    outputs = next((cfg.task[name] for name in named if name in cfg.task), targets.shape[-1])
    factory = instantiate(cfg.model, _convert_="all")
    rngs = nnx.Rngs(params=key_for(root, "init"))
    return _make("model", factory, tuple(inputs.shape[2:]), outputs, rngs=rngs)


def _make(group: str, factory: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a factory of the config; an argument that it has not, or of a wrong type, is the config's fault."""
    try:
        return factory(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{group}: {error}; see conf/{group}/ for the arguments") from error


def build_protocol(cfg: DictConfig, **changes: Any) -> Protocol:
    """The evaluation protocol of the config, with `changes` (split, tasks, ...)."""
    values: dict[str, Any] = {
        f.name: cfg.evaluation[f.name] for f in dataclasses.fields(Protocol) if f.name in cfg.evaluation
    }
    own = ("_partial_", "loss", "ways", "shots", "queries", "data_dir", "cache_dir")
    task = evaluated_task(cfg) | data_read(cfg)
    settings = [f"{k}={v}" for k, v in sorted(task.items()) if k not in own and v is not None]
    if (loss := cfg.task.loss).get("dynamics"):  # its episodes are what is measured
        episode = {k: v for k, v in loss.items() if k in ("horizon", "discount")}
        drawn = episode | {k: v for k, v in loss.dynamics.items() if k not in ("_partial_", *episode)}
        settings += [f"{k}={v}" for k, v in drawn.items()]
    if not reads(cfg, "step_size"):
        values["step_size"] = None  # learned, or none: a number that an experiment has for other algorithms is not used
    elif isinstance(size := values["step_size"], ListConfig):
        values["step_size"] = tuple(map(float, size))
    elif size is not None:
        values["step_size"] = float(size)
    if not reads(cfg, "steps"):
        values["steps"] = cfg.algorithm.get("steps", values["steps"])  # fixed: an evaluation's number is for others
    values["task"] = " ".join(settings).replace("_target_=", "")
    return Protocol(**values | changes)


def data_read(cfg: DictConfig) -> dict[str, Any]:
    """What the data are where the task's settings say only where they lie: digests of a folder's images, of a list of classes."""
    task = cfg.task
    where = task.get("class_split")
    if str(task.get("_target_")) in ("maml.tasks.image_folder", "maml.tasks.images.image_folder"):
        return {"class_split": None, "data": folder_digest(task.data_dir, where)}
    if where and where not in (*splits.SHA256, *splits.WIDER):
        return {"class_split": splits.digest(splits.read_split(where))[:16]}
    return {}


def protocol_sampler(cfg: DictConfig, protocol: Protocol) -> Sampler:
    sizes = {name: getattr(protocol, name) for name in ("ways", "shots", "queries")}
    task = evaluated_task(cfg)
    return build_sampler(
        cfg, protocol.split, **sizes, rotations=task.get("rotations"), least_ways=task.get("least_ways")
    )


def evaluated_task(cfg: DictConfig) -> dict[str, Any]:
    """The task's settings, with the rotations and the least ways of the evaluation where it has others."""
    task: dict[str, Any] = {str(k): v for k, v in cfg.task.items()}
    for name, lack in (("rotations", "turns no images"), ("least_ways", "has no ways that could vary")):
        if (value := cfg.evaluation.get(name)) is None:
            continue
        if name not in task and value == "none":  # what turns no images turns none
            continue
        if name not in task:
            raise ValueError(f"evaluation.{name}={value}: this task {lack}; leave it out")
        task[name] = value or None
    return task


def build_adapt(cfg: DictConfig, protocol: Protocol) -> Adapt:
    """The algorithm's inner loop at the protocol's steps and the evaluation's step size, from prototypes if it says so."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    step_size = cfg.evaluation.step_size
    cfg.algorithm.steps = protocol.steps
    if "step_size" in cfg.algorithm:
        cfg.algorithm.step_size = _scheduled(step_size) if isinstance(step_size, ListConfig) else step_size
    if protocol.batch is not None:
        if "${algorithm.batch}" not in OmegaConf.to_yaml(cfg.algorithm):
            raise ValueError(
                f"evaluation.batch={protocol.batch}: algorithm {cfg.algorithm.name} takes the whole support set at each step; "
                "give evaluation.batch=null"
            )
        cfg.algorithm.batch = protocol.batch
    adapt = inner_loop(cfg)
    if hasattr(adapt, "carried") and isinstance(step_size, ListConfig):
        raise ValueError(
            f"evaluation.step_size={list(step_size)}: the inner optimizer of algorithm {cfg.algorithm.name} is that of training; "
            "give a number"
        )
    if protocol.prototypes and getattr(adapt, "fewer_ways", False):
        raise ValueError(
            f"evaluation.prototypes={protocol.prototypes}: algorithm {cfg.algorithm.name} makes a head of prototypes itself; "
            "leave it out"
        )
    return with_prototypes(adapt, protocol.prototypes) if protocol.prototypes else adapt


def _scheduled(sizes: Sequence[float]) -> dict[str, Any]:
    """The node of a schedule of one step size for each inner step."""
    constants = [{"_target_": "optax.constant_schedule", "value": size} for size in sizes]
    return {"_target_": "optax.join_schedules", "schedules": constants, "boundaries": list(range(1, len(sizes)))}


def evaluation(
    cfg: DictConfig, learner: Learner, *, ensemble: str | None = None, **changes: Any
) -> tuple[Protocol, Evaluator]:
    """The config's protocol, with `changes` (split, tasks, ...), and what measures parameters under it.

    ensemble: the name of several checkpoints; what is measured are their parameters, stacked.

    Built before training, so that what does not fit the data is refused before hours of it.

    Raises:
      ValueError: for sizes that a split has not, and for an inner loop of other steps than the protocol's.
    """
    protocol, params = build_protocol(cfg, **changes, ensemble=ensemble), learner.state.params
    adapt, ways = build_adapt(cfg, protocol), cfg.task.get("ways")
    fewer = getattr(adapt, "fewer_ways", False) or evaluated_task(cfg).get("least_ways") is not None
    if protocol.ways != ways and not fewer:
        raise ValueError(f"evaluation.ways={protocol.ways}: training has task.ways={ways}; make them equal")
    sampler = protocol_sampler(cfg, protocol)
    try:
        check_sizes(params, sampler, learner.loss, adapt, protocol)
    except ValueError as error:
        raise ValueError(f"evaluation, algorithm {cfg.algorithm.name} and model {_model(cfg)}: {error}") from error
    chunk, loss = train.chunk_size("auto", protocol.tasks, params), learner.loss
    if ensemble is not None:
        adapt = ensemble_adapt(adapt, loss)
        loss = _make("task", instantiate(cfg.task.loss), ensemble_apply(learner.apply))
    return protocol, evaluator(sampler, loss, adapt, protocol, chunk, cfg.evaluation.get("after"))


_WHOLE = {
    **{f"task.{name}": 1 for name in ("ways", "shots", "queries")},
    **{f"trainer.{name}": 0 for name in ("steps", "validate_every")},
    **{f"trainer.{name}": 1 for name in ("meta_batch", "log_every", "checkpoint_every", "keep_checkpoints")},
    **{"trainer.validation_tasks": 1, "algorithm.steps": 0, "algorithm.first_order_until": 0},
    **{"diagnostics.per_example.every": 0, "diagnostics.per_example.tasks": 2, "diagnostics.per_example.outliers": 0},
    **{"diagnostics.curvature.every": 0, "diagnostics.curvature.tasks": 1, "diagnostics.curvature.lanczos": 1},
    **{"diagnostics.learned.every": 0, "gradcheck.tasks": 1, "gradcheck.directions": 1},
}
"""The least value of every whole number."""

_POSITIVE = (
    *("algorithm.step_size", "evaluation.step_size", "optimizer.learning_rate"),
    *("gradcheck.epsilon", "gradcheck.tolerance"),
)

_SPLITS = ("meta_train", "meta_valid", "meta_test")


def check(cfg: DictConfig) -> None:
    """Refuse values under the names that they have in the config, and parts that do not fit each other.

    Raises:
      ValueError: with argument, value and remedy.
    """
    for name, least in _WHOLE.items():
        value = _value(cfg, name, least)
        if not whole(value, least):
            raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")
    for name in _POSITIVE:
        value = _value(cfg, name, 1)
        if isinstance(value, DictConfig):  # a schedule
            if name == "evaluation.step_size" and reads(cfg, "step_size"):
                raise ValueError(
                    f"{name}: a schedule; give a number, or a list of one for each of the {cfg.evaluation.steps} steps"
                )
            continue
        if name == "evaluation.step_size" and value is None and "step_size" not in cfg.algorithm:  # learned
            continue
        if name == "evaluation.step_size" and isinstance(value, ListConfig):
            sizes, steps = list(value), cfg.evaluation.steps
            if not sizes or len(sizes) != steps or not all(map(_positive, sizes)):
                raise ValueError(f"{name}={sizes}: give a positive number, or one for each of the {steps} steps")
            continue
        if not _positive(value):
            raise ValueError(f"{name}={value!r}: give a positive number")
    for name in ("seed", "evaluation.seed"):
        if not 0 <= (value := OmegaConf.select(cfg, name)) < 2**32:
            raise ValueError(f"{name}={value}: give 0 to {2**32 - 1}; JAX takes others for one of these")
    budget = _value(cfg, "trainer.memory_gb", None)
    if budget is not None and not budget > 0:
        raise ValueError(f"trainer.memory_gb={budget}: give a positive number of GB, or null for no limit")
    for name in sorted(OmegaConf.missing_keys(cfg)):  # after the numbers: it follows interpolations
        raise ValueError(f"{name} has no value: give {name}=...")
    if (most := cfg.algorithm.get("most_steps")) is not None and cfg.algorithm.steps > most:
        raise ValueError(
            f"algorithm.steps={cfg.algorithm.steps}: algorithm {cfg.algorithm.name} takes at most {most} in training; give "
            f"algorithm.steps={most} (an experiment may have set it; evaluation.steps are those at test)"
        )
    if isinstance(derivative := cfg.algorithm.get("derivative"), str):
        raise ValueError(
            f"algorithm.derivative={derivative}: give algorithm.derivative._target_=maml.derivatives.{derivative.split('.')[-1]}"
        )
    build_protocol(cfg)
    if cfg.evaluation.split not in _SPLITS:
        raise ValueError(f"evaluation.split={cfg.evaluation.split}: give one of {', '.join(_SPLITS)}")
    ways = cfg.task.get("ways")
    if ways is None and cfg.evaluation.ways is not None:
        raise ValueError(
            f"evaluation.ways={cfg.evaluation.ways}: this task has no classes; give a task that has, such as task=omniglot, or "
            "another evaluation"
        )
    if (cfg.evaluation.ways is None) != (ways is None) or (ways and cfg.evaluation.ways > ways):
        raise ValueError(f"evaluation.ways={cfg.evaluation.ways}: training has task.ways={ways}; make them equal")


def _schemas(schema: type, name: str = "") -> Iterator[tuple[str, type]]:
    """The typed groups of the config by dotted name, the whole of it first."""
    yield name, schema
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.default_factory):
            yield from _schemas(f.default_factory, f"{name}.{f.name}".removeprefix("."))


def check_keys(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Refuse keys that nothing reads: `+` puts a key anywhere, and Hydra's own messages recommend it; and such a step size.

    Of the algorithm those alone that an override added: an experiment may set what other algorithms read.

    Raises:
      ValueError: with the key, and those that there are.
    """
    for group, schema in _schemas(Config):
        known = [f.name for f in dataclasses.fields(schema)]
        for key in (OmegaConf.select(cfg, group) or ()) if group else cfg:
            if key not in known:
                raise ValueError(f"{group}.{key}: no such key; there are {', '.join(known)}".removeprefix("."))
    if split := [text for text in overrides if re.match(r"\+{1,2}task\.split=", text)]:
        raise ValueError(f"{split[-1]}: training is on meta_train; give evaluation.split=...")
    asked = [text for text in overrides if re.match(r"(\+{0,2}evaluation|algorithm)\.step_size=(?!null)", text)]
    if asked and not reads(cfg, "step_size"):
        raise ValueError(f"{asked[-1]}: {no_step_size(cfg)}")
    asked = [text for text in overrides if re.match(r"(\+{0,2}evaluation|algorithm)\.steps=", text)]
    if asked and not asked[-1].endswith("=0") and not reads(cfg, "steps"):
        raise ValueError(f"{asked[-1]}: {no_steps(cfg)}")
    for key in (found[1] for found in (re.match(r"\+{0,2}quantization\.(\w+)", text) for text in overrides) if found):
        if not any(
            re.search(rf"\bquantization\.{key}\b", OmegaConf.to_yaml(cfg[part])) for part in ("model", "algorithm")
        ):
            raise ValueError(
                f"quantization.{key}: neither model {cfg.model.get('_target_', '?')} nor algorithm "
                f"{cfg.algorithm.get('name', '?')} reads it; leave it out, or give another, such as model=mlp_quantized"
            )
    added = [found[1] for found in (re.match(r"\+{1,2}algorithm\.(\w+)", text) for text in overrides) if found]
    others = [cfg[part] for part in cfg if part not in ("algorithm", "evaluation")]  # evaluation takes what there is
    for key in added:
        if key in ("name", "steps", "needs", "objective", "adapt") or reads(cfg, key):
            continue
        if key == "first_order_until" and "derivative" in cfg.algorithm:
            continue
        if not any(
            re.search(rf"\balgorithm\.{key}\b", OmegaConf.to_yaml(x)) for x in others if isinstance(x, Container)
        ):
            known = [str(k) for k in cfg.algorithm if k != key]
            name = cfg.algorithm.get("name", "?")
            raise ValueError(f"algorithm.{key}: nothing in algorithm {name} reads it; there are {', '.join(known)}")


def no_step_size(cfg: DictConfig) -> str:
    return f"algorithm {cfg.algorithm.get('name', '?')} has no step size of its own to change; leave it out"


def no_steps(cfg: DictConfig) -> str:
    return f"the inner steps of algorithm {cfg.algorithm.get('name', '?')} are written in its file; leave it out"


def reads(cfg: DictConfig, key: str) -> bool:
    """Whether a part of the algorithm refers to algorithm.KEY."""
    return re.search(rf"(\balgorithm\.|\$\{{\.+){re.escape(key)}\b", OmegaConf.to_yaml(cfg.algorithm)) is not None


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _value(cfg: DictConfig, name: str, default: Any) -> Any:
    """The value of a dotted key, also if that is null; the default where the part does without it, or it is not set."""
    part, _, key = name.rpartition(".")
    node = OmegaConf.select(cfg, part)
    return node[key] if isinstance(node, DictConfig) and key in node else default

"""Where metrics go: the terminal, `metrics.jsonl`, TensorBoard.

A logger is any callable `logger(step, metrics)` with a `close()`; metrics are host floats by path,
such as `meta_train/query/loss`. All are made by `Logger(directory, steps, resume_step)`: the
directory of the run, its last step, and the step it goes on from. With resume_step 0 a run starts
afresh and nothing older is kept; otherwise what was written up to and including `resume_step` is
kept and everything later is dropped, so that an interrupted run leaves the same record as another.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Metrics = Mapping[str, float]


class Console:
    """A progress bar on stderr where that is a terminal, and one line per call in any case."""

    def __init__(self, directory: str | Path, steps: int, resume_step: int = 0):
        """Opens the bar at `resume_step` of `steps`."""
        del directory
        from tqdm import tqdm

        silent = not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=resume_step, unit="step", dynamic_ncols=True, disable=silent)
        self._since = None  # the first line has no rate: it would be that of compilation

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Prints the metrics, of those per inner step (`step_3/loss`) only the last step's, and none per layer."""
        metrics = {name: value for name, value in metrics.items() if "/layer/" not in name}
        parts = [f"step {step}"]
        parts += [f"{name} {value:.4g}" for name, value in _last_inner_steps(metrics).items()]
        if self._since is None or step > self._since[0]:  # not when a second set of metrics is logged at the same step
            now = time.perf_counter()
            if self._since:
                rate = (step - self._since[0]) / (now - self._since[1])
                parts.append(f"({rate:.0f} steps/s)" if rate >= 100 else f"({rate:.3g} steps/s)")
            self._since = step, now
        self._bar.write("  ".join(parts), file=sys.stderr)
        loss = metrics.get("meta_train/query/loss")
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self.progress(step)

    def progress(self, step: int) -> None:
        """Moves the bar to `step`, at any rate of calls."""
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class JsonLines:
    """One JSON object a line, `{"step": 1000, "meta_train/query/loss": 1.2}`, to make reports from.

    It holds nothing but the run's own numbers, exact to the bit (no times), and null for NaN and
    infinities, which JSON has not.
    """

    def __init__(
        self,
        directory: str | Path,
        steps: int,
        resume_step: int = 0,
        filename: str = "metrics.jsonl",
    ):
        """Opens the file, less what is later than `resume_step`; OSError names it."""
        del steps
        self.path = Path(directory) / filename
        with _naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Appends a line and flushes it, so that killing the run cannot lose it."""
        self.record(step, metrics)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line that may hold lists and mappings of numbers too: histograms, tables."""
        with _naming(self.path):
            self._file.write(json.dumps({"step": step, **_finite(dict(values))}, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with _naming(self.path):
            self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects that `JsonLines` wrote, in order; a torn last line is left out.

    Raises ValueError, with the line, if any other line is no object with a step.
    """
    return [record for _, record in _complete_lines(Path(path))]


class TensorBoard:
    """TensorBoard event files: scalars, pictures, histograms and texts.

    The events are written here and now: tensorboardX's SummaryWriter leaves them to a thread, where
    a full disk hangs the run without a word and a kill loses up to two minutes.
    """

    def __init__(
        self,
        directory: str | Path,
        steps: int,
        resume_step: int = 0,
        subdirectory: str = "tensorboard",
    ):
        """Makes `directory/subdirectory`; OSError names it."""
        del steps
        self.path = Path(directory) / subdirectory
        self._resume_step = resume_step
        self._writer = None  # opened by the first event: the import takes seconds
        self.path.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Writes one scalar per metric; NaN and infinities are left out (tensorboardX would print a line for each)."""
        from tensorboardX import summary

        for name, value in metrics.items():
            if math.isfinite(value):
                self._write(step, summary=summary.scalar(name, value))
        self._flush()

    def image(self, tag: str, picture: Any, step: int) -> None:
        """Writes a picture: an array [height, width, channels] of uint8, or a matplotlib Figure."""
        import numpy as np
        from tensorboardX import summary

        if hasattr(picture, "savefig"):
            picture = _pixels(picture)
        picture = np.asarray(picture)
        if picture.ndim != 3 or picture.dtype != np.uint8:
            raise ValueError(f"picture: {picture.dtype} {picture.shape}; give uint8 [height, width, channels]")
        self._write(step, summary=summary.image(tag, picture, dataformats="HWC"))
        self._flush()

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """Writes a histogram of the finite `values`, of any shape; nothing if there are none."""
        import numpy as np
        from tensorboardX import summary

        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            self._write(step, summary=summary.histogram(tag, values, bins=64))
            self._flush()

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Writes a text, such as a table, in Markdown."""
        from tensorboardX import summary

        self._write(step, summary=summary.text(tag, markdown))
        self._flush()

    def close(self) -> None:
        """Closes the event file, if any event was written."""
        if self._writer is not None:
            with _naming(self.path):
                self._writer.close()
            self._writer = None

    def _write(self, step: int, **fields: Any) -> None:
        with _naming(self.path):
            if self._writer is None:
                self._writer = self._open()
            self._writer.write_event(_event(step, **fields))

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter

        # File names have whole seconds: the step tells the files of a quick restart apart.
        writer = EventsWriter(str(self.path / "events"), f".{self._resume_step:012d}")
        # This event makes a viewer forget what older files hold from its step on.
        purge_step = self._resume_step + 1 if self._resume_step else 0
        writer.write_event(_event(purge_step, session_log={"status": 1}))  # SessionLog.START
        return writer

    def _flush(self) -> None:
        if self._writer is not None:
            with _naming(self.path):
                self._writer.flush()


def _event(step: int, **fields: Any) -> Any:
    from tensorboardX.proto import event_pb2

    make: Any = vars(event_pb2)["Event"]  # generated, so a type checker cannot see it
    return make(step=step, wall_time=time.time(), **fields)


def _last_inner_steps(metrics: Metrics) -> dict[str, float]:
    def inner_step(name):
        found = re.search(r"/step_(\d+)/", name)
        return int(found[1]) if found else 0

    ordered = sorted(metrics, key=inner_step)
    last = {re.sub(r"/step_\d+/", "/step/", name): name for name in ordered}
    return {name: metrics[name] for name in last.values()}


def _pixels(figure: Any) -> Any:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return  # killed in the middle of a write
        record = _parsed(line)
        if record is None:
            raise ValueError(f"{path}, line {number}: no JSON object with a step; mend or remove it")
        yield line, record


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _drop_after(path: Path, resume_step: int) -> None:
    if resume_step == 0:
        path.unlink(missing_ok=True)
    elif path.exists():
        kept = [line for line, record in _complete_lines(path) if record["step"] <= resume_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts `path` into an OSError raised within: a full disk's own message names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error

"""What every program does around its work: one clear line for bad input, and a stop that loses nothing."""

import fnmatch
import functools
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import build
from maml.tasks.decode import cache_folder, digest
from maml.train import NonFinite

BAD_INPUT = 2
INTERRUPTED = 75
"""Exit codes: 2, the input was refused; 75 (EX_TEMPFAIL), stopped by a signal after saving: the same command continues."""

REFUSALS = (ValueError, OSError, NonFinite, HydraException, OmegaConfBaseException)

CONF = Path(__file__).parents[1] / "conf"

Job = Callable[[DictConfig], Any]


class Refused(Exception):
    """A job of a multirun was refused, and said so."""


def keep_compiled() -> None:
    """Compiled programs are kept on disk (`xla` in the folder of decoded images), so that a second start compiles nothing.

    Each kind of processor has a folder of its own: code compiled for one may not run on another that shares the disk. What JAX is
    told otherwise (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=false) stands.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        folder = cache_folder(None) / "xla" / digest(platform.machine(), _processor(), jax.__version__)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # A start has many programs below JAX's own threshold of a second.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def run_program(job: Job) -> None:
    """Run a job as Hydra's program; a refusal is one line on stderr. HYDRA_FULL_ERROR=1 shows the traceback instead."""
    keep_compiled()
    try:
        sys.argv[1:] = map(expanded, sys.argv[1:])
    except ValueError as error:
        refuse(error)
    main = hydra.main(version_base="1.3", config_path="../conf", config_name="config")
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return main(job)()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, and the line below is ours
    try:
        return main(_refusing(job))()
    except Refused:
        sys.exit(BAD_INPUT)
    except (HydraException, OmegaConfBaseException) as error:
        refuse(error)
    except BrokenPipeError:  # nobody reads what is printed, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BAD_INPUT)
    except (OSError, ValueError) as error:  # outside of any job: Hydra makes its directory and its log there
        cause = error.__cause__ or error
        if not isinstance(cause, OSError):
            raise
        refuse(OSError(f"hydra.run.dir (with -m hydra.sweep.dir): {cause}; give a directory that can be written"))
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def expanded(argument: str) -> str:
    """`experiment=glob(finn2017/omniglot*)` as the comma list that it stands for: Hydra's own glob lists one folder alone.

    Raises:
      ValueError: for a pattern that finds nothing, and for more than one pattern.
    """
    found = re.fullmatch(r"(\w+)=glob\((.*)\)", argument)
    if not found or not any(path.is_dir() for path in (CONF / found[1]).glob("*")):
        return argument
    group, pattern = found.groups()
    if re.search(r"[,=]", pattern):  # a list, or what it leaves out
        raise ValueError(
            f"{argument}: give one pattern, such as {group}=glob(FOLDER/NAME*), or names with commas between"
        )
    names = [name for name in _names(group) if fnmatch.fnmatch(name, pattern)]
    if not names:
        raise ValueError(f"{argument}: finds no file of conf/{group}; there are {', '.join(_names(group))}")
    return f"{group}={','.join(names)}"


def _names(group: str) -> list[str]:
    """All files of a group, those in its folders too."""
    return sorted(path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).rglob("*.yaml"))


def of_experiment(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The numbers that an experiment has set for its own algorithm, where another was chosen whose file has others."""
    chosen, experiment = choices.get("algorithm"), choices.get("experiment")
    files = [CONF / f"{name}.yaml" for name in ("config", f"experiment/{experiment}", f"algorithm/{chosen}")]
    if not any(text.startswith("algorithm=") for text in overrides) or not all(file.exists() for file in files):
        return {}
    contents: list[Any] = [OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files]
    main, own, values = contents
    defaults: dict[str, Any] = {}
    for entry in (*main["defaults"], *own.get("defaults", ())):
        defaults |= entry if isinstance(entry, dict) else {}
    if chosen == defaults.get("override /algorithm", defaults["algorithm"]):
        return {}
    typed = {found[1] for found in (re.match(r"\+{0,2}algorithm\.(\w+)=", text) for text in overrides) if found}
    return {
        str(key): cfg.algorithm[key]
        for key, value in values.items()
        if isinstance(value, int | float) and key not in typed and cfg.algorithm.get(key) != value
    }


def of_experiment_at_test(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values that an experiment has set for its own evaluation, where another protocol or step size was asked for."""
    typed = {text.lstrip("+").partition("=")[0] for text in overrides}
    files = [CONF / f"{name}/{choices.get(name)}.yaml" for name in ("experiment", "evaluation")]
    if not all(file.exists() for file in files):
        return {}
    contents: list[Any] = [OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files]
    own, protocol = contents[0].get("evaluation") or {}, contents[1]
    taken = {key for key in own if key != "step_size" and isinstance(protocol.get(key, 0), int | float)}
    taken = {key for key in taken if "evaluation" in typed and own[key] != protocol.get(key)}
    if own.get("step_size") is not None and typed & {"algorithm", "algorithm.step_size"}:
        taken |= {"step_size"} if cfg.evaluation.step_size != cfg.algorithm.get("step_size") else set()
    return {key: cfg.evaluation[key] for key in own if key in taken and f"evaluation.{key}" not in typed}


def check_schedule(choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a learning rate that would replace the schedule of the chosen optimizer, whose name the run would still bear.

    Raises:
      ValueError: with the override, and the keys of the schedule.
    """
    name = "optimizer.learning_rate"
    rates = [text for text in overrides if re.fullmatch(rf"{name}=[-+.\deE]+", text)]
    file = CONF / "optimizer" / f"{choices.get('optimizer')}.yaml"
    if not rates or not file.exists():
        return
    schedule = OmegaConf.select(OmegaConf.load(file), "learning_rate")
    if isinstance(schedule, DictConfig):
        keys = ", ".join(f"{name}.{key}" for key in schedule if key != "_target_")
        raise ValueError(f"{rates[-1]}: optimizer={choices['optimizer']} has a schedule there; give one of {keys}")


def on_run(usage: str | None, act: Callable[[Path, Sequence[str]], str]) -> None:
    """A program on a run directory: print act(directory, other arguments), or one line of refusal; without any the usage."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage)
        sys.exit(0 if len(sys.argv) > 1 else BAD_INPUT)
    try:
        with _memory("ask for less: fewer tasks, examples or Lanczos steps"):
            text = act(Path(sys.argv[1].removeprefix("run=")).expanduser(), sys.argv[2:])
    except REFUSALS as error:
        refuse(error)
    print(text)


def _refusing(job: Job) -> Job:
    """The job, with refusals said where they happen: Hydra would add a line of its own, and tell only the first of a multirun."""

    @functools.wraps(job)
    def wrapped(cfg: DictConfig) -> None:
        try:
            build.check_keys(cfg, HydraConfig.get().overrides.task)
            check_schedule(HydraConfig.get().runtime.choices, HydraConfig.get().overrides.task)
            with _memory(
                "give trainer.memory_gb=GB, or trainer.task_chunk=1 and algorithm.remat=1; plan=true says what they take"
            ):
                job(cfg)
        except REFUSALS as error:
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                refuse(error)
            complain(error)
            raise Refused from error  # the other jobs go on

    return wrapped


@contextmanager
def _memory(remedy: str) -> Iterator[None]:
    """What the device says where memory ends, in the words of the rest."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"out of memory: {str(error).splitlines()[0]}; {remedy}") from error


def refuse(error: BaseException) -> NoReturn:
    """Print the error as one line and exit with code 2."""
    complain(error)
    sys.exit(BAD_INPUT)


def complain(error: BaseException) -> None:
    """Print the error as one line: what a factory raises without Hydra's words around it, what Hydra says with its reason."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, REFUSALS):
        error = error.__cause__
    text = str(error)
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        text += f": {str(error.__cause__).splitlines()[0]}"
    # Hydra lists the options of one folder.
    if options := re.search(r"Available options in '(\w+)':\s[^:]*?(?=\s*Config search path|$)", text):
        text = text.replace(options[0], f"Available options in '{options[1]}': {' '.join(_names(options[1]))} ")
    print(f"error: {' '.join(text.split())}", file=sys.stderr)


class Interrupt:
    """Whether SIGTERM or SIGINT came. The first asks the loop to save and stop; a second SIGINT stops at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __enter__(self):
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *unused):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.signal is not None

    def _note(self, number, frame):
        del frame
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that nobody reads a half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)

"""What every program does around its work: one clear line for bad input, and a stop that loses nothing."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from maml.train import NonFinite

BAD_INPUT = 2
INTERRUPTED = 75
"""Exit codes: 2, the input was refused; 75 (EX_TEMPFAIL), stopped by a signal after saving: the same command continues."""

REFUSALS = (ValueError, OSError, NonFinite, HydraException, OmegaConfBaseException)


def run_program(hydra_main: Callable[[], None]) -> None:
    """Run a Hydra entry point; a refusal is one line on stderr. HYDRA_FULL_ERROR=1 shows the traceback instead."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return hydra_main()
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra then raises what it would print, and the line below is ours
    )
    try:
        return hydra_main()
    except REFUSALS as error:
        refuse(error)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def refuse(error: BaseException) -> NoReturn:
    """Print the error as one line and exit with code 2."""
    while isinstance(error, InstantiationException) and error.__cause__:
        error = error.__cause__  # Hydra wraps what a factory raises
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)


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

"""The other end of `benchmarks.torch_peers`: a worker process, and its peers as sides of the comparison."""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import EPSILON, Case, flat
from maml.types import Task

PEERS = ("torch.func", "higher", "torchopt", "learn2learn")


class PeerError(RuntimeError):
    """What a peer's process says went wrong, in one line."""


class Worker:
    """A process with torch, asked one thing at a time: it rests while we compute, and we rest while it does."""

    def __init__(self, python: str, directory: Path, threads: int):
        root, self.directory, self.threads = Path(__file__).parent.parent, directory, threads
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.torch_peers"],
            cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True,
        )  # fmt: skip

    def ask(self, do: str, **arguments) -> Any:
        """The worker's answer to a request.

        Raises:
          PeerError: with the worker's error, or the end of its stderr where it is dead.
        """
        try:
            self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.stderr.seek(0)
            raise PeerError((self.stderr.read().strip() or "the worker died").splitlines()[-1])
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class PeerSide:
    """One peer on one case; its gradient is computed at the start.

    `threads` is how many it runs with: `choose` takes one where that is faster, as it is for the small products of a sinusoid.
    """

    def __init__(self, worker: Worker, peer: str, case: Case, tasks: Task, steps: int, order: str):
        self.worker, self.peer, self.threads = worker, peer, worker.threads
        arrays, gradient = worker.directory / "case.npz", worker.directory / "gradient.npz"
        np.savez(arrays, **_arrays(case, tasks))
        worker.ask("begin", peer=peer, spec=_spec(case, steps, order), arrays=str(arrays), gradient=str(gradient))
        with np.load(gradient) as file:
            self._gradient = dict(file)

    def gradient(self) -> dict[str, np.ndarray]:
        return self._gradient

    def run(self, steps: int) -> float:
        """Seconds per outer step, of `steps`."""
        return self.worker.ask("run", peer=self.peer, steps=steps, threads=self.threads)

    def choose(self) -> None:
        """One thread or all, whichever is faster; all where a step takes more than a second."""
        if self.run(1) > 1:
            return
        times = {}
        for count in (1, self.worker.threads):
            self.threads = count
            times[count] = min(self.run(1) for _ in range(3))
        self.threads = min(times, key=times.__getitem__)


def _spec(case: Case, steps: int, order: str) -> Mapping[str, Any]:
    spatial = case.spatial() if case.network == "conv" else []
    return dataclasses.asdict(case) | {"steps": steps, "order": order, "spatial": spatial, "epsilon": EPSILON}


def _arrays(case: Case, tasks: Task) -> Mapping[str, np.ndarray]:
    """Parameters and data, in the precision of the inputs."""
    weights = {f"params:{k}": x.astype(tasks.support[0].dtype) for k, x in flat(case.functional()[1]).items()}
    for side in ("support", "query"):
        inputs, targets = getattr(tasks, side)
        weights |= {f"{side}:inputs": inputs, f"{side}:targets": targets}
    return weights

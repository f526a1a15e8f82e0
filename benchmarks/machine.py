"""What the numbers were measured on: processor, threads, versions, and the peak of a float32 matrix product."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import PeerError, Worker


def pin(threads: int) -> None:
    """Confine this process and its children to `threads` processors; before JAX starts, which makes a thread for each."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def describe(threads: int) -> dict[str, Any]:
    """Processor, threads, versions, and the load (mean number of running programs in the last minute)."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    backend = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else "cpu"
    return {
        "processor": _processor(), "processors": os.cpu_count() or 0, "threads": threads, "device": backend,
        "system": platform.system(), "python": platform.python_version(), "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
    } | versions  # fmt: skip


def peaks(worker: Worker | None, size: int = 2048, repeats: int = 9) -> dict[str, float]:
    """GFLOP/s of a float32 product of square matrices by NumPy, XLA and torch: of each the best of `repeats`."""
    a, b = (np.random.default_rng(i).normal(size=(size, size)).astype(np.float32) for i in (0, 1))
    product, x, y = jax.jit(jnp.matmul), jnp.asarray(a), jnp.asarray(b)
    product(x, y).block_until_ready()
    flops = 2e-9 * size**3
    found = {
        "numpy": flops / _best(lambda: a @ b, repeats),
        "xla": flops / _best(lambda: product(x, y).block_until_ready(), repeats),
    }
    try:
        return found | (
            {"torch": worker.ask("sgemm", size=size, repeats=repeats, threads=worker.threads)} if worker else {}
        )
    except PeerError:
        return found


def _best(work: Callable[[], object], repeats: int) -> float:
    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(timed() for _ in range(repeats))


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit at hand, with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

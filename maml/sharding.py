"""Tasks over devices: each draws its share of the meta-batch and differentiates it, and all of them have the mean."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from maml.types import whole

TASKS = "tasks"
"""The name of the mesh's axis."""


def tasks_mesh(devices: int | str) -> Mesh | None:
    """The first so many devices, or "all" of them, in a line along the axis of the tasks; None for one.

    Raises:
      ValueError: for more devices than there are, or none.
    """
    there = jax.devices()
    count = len(there) if devices == "all" else devices
    if not whole(count, 1) or count > len(there):
        raise ValueError(
            f"devices={devices!r}: there are {len(there)} of kind {there[0].device_kind}; give 1 to that, or all"
        )
    return None if count == 1 else Mesh(np.asarray(there[:count]), (TASKS,))


def tasks_each(meta_batch: int, devices: int | str) -> int:
    """The tasks of a meta-batch for each of these devices.

    Raises:
      ValueError: as `tasks_mesh`, and for devices that do not divide the meta-batch.
    """
    mesh = tasks_mesh(devices)
    count = mesh.size if mesh else 1
    if meta_batch % count:
        raise ValueError(f"meta_batch={meta_batch}, devices={devices!r}: give a multiple of the {count} devices")
    return meta_batch // count


def mean_over_devices(f: Callable, mesh: Mesh) -> Callable:
    """f(shared, *of_tasks) -> arrays that are means over tasks, with the axis of tasks of `of_tasks` spread over the mesh.

    Every device calls f on all of `shared` and its part of `of_tasks` [tasks, ...]; the mean of what they give is theirs. Parts
    are equal, so that it is the mean over all tasks.
    """
    every, part = PartitionSpec(), PartitionSpec(TASKS)

    def share(shared: Any, *of_tasks: Any) -> Any:
        return lax.pmean(f(shared, *of_tasks), TASKS)

    def spread(shared: Any, *of_tasks: Any) -> Any:
        specs = (every, *(part for _ in of_tasks))
        # Without check_vma a gradient inside is that of the device alone, and pmean the one thing that is summed.
        return jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=every, check_vma=False)(shared, *of_tasks)

    return spread

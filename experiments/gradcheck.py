"""Whether the meta-gradient of a config is the derivative of its program: autodiff against central differences, in float64.

    python -m experiments.gradcheck [gradcheck.directions=N] [experiment=NAME] [key=value ...]

Exit code 0: every direction agrees within `gradcheck.tolerance`; 1: one does not. First-order algorithms do not, as they drop a
part of the derivative. The parameters are those of the initialisation, moved by a hundredth: zero biases sit on kinks of ReLU.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from omegaconf import DictConfig, OmegaConf

from experiments import build
from experiments.program import run_program
from maml.derivatives import reverse
from maml.gradcheck import Gradcheck, asymmetry, frozen, meta_gradcheck
from maml.random import key_for, keys_for
from maml.types import Objective, Params, Task

ESTIMATORS = ("straight_through", "score_function")
"""The scopes of quantisers and policy gradients: what they stop is constant for the differences (`maml.gradcheck.frozen`)."""

DISAGREES = 1


def check(cfg: DictConfig) -> Gradcheck:
    """The mean objective of some tasks of meta-training, near the initial parameters, and the inner gradient of the first task.

    Raises:
      ValueError: for an inner loop in bfloat16, whose roundings have no derivative, and an update that is by definition none.
    """
    if cfg.algorithm.get("precision", "float32") == "bfloat16":
        raise ValueError(
            "algorithm.precision=bfloat16: its roundings have no derivative; give algorithm.precision=float32"
        )
    learner, sizes = build.learner(cfg), cfg.gradcheck
    objective = build.build_objective(cfg, learner.loss)
    if getattr(objective, "defines_update", False):
        raise ValueError(
            f"algorithm {cfg.algorithm.name}: parameter_distance defines an update, and is no program to be differentiated; "
            "give an algorithm with a query loss"
        )
    root = learner.state.key
    tasks = learner.sampler(keys_for(root, "gradcheck/tasks", 0, sizes.tasks))
    with jax.enable_x64(True):
        params, tasks = _wide((learner.state.params, tasks))
        params = _off(params, key_for(root, "gradcheck/point"))
        keys, key = keys_for(root, "gradcheck/objective", 0, sizes.tasks), key_for(root, "gradcheck/directions")
        f = _mean_over(tasks, keys, objective)
        program = frozen(f, params, scope=ESTIMATORS)
        found = meta_gradcheck(f, params, key, directions=sizes.directions, epsilon=sizes.epsilon, program=program)
        return found._replace(asymmetry=_asymmetry(cfg, learner, params, jax.tree.map(lambda x: x[0], tasks), key))


def _mean_over(tasks: Task, keys: Any, objective: Objective) -> Callable[[Params], jax.Array]:
    return lambda params: jax.vmap(objective, (None, 0, 0, None))(params, tasks, keys, jnp.int32(0))[0].mean()


def _asymmetry(cfg: DictConfig, learner: build.Learner, params: Params, task: Task, key: Any) -> float:
    """Of the inner gradient, at the model's parameters where the inner loop starts."""
    path = build.inner_loop(cfg)(learner.loss, params, task.support, key).trace.params
    start = jax.tree.map(lambda x: x[0], path)
    return asymmetry(lambda p: reverse(learner.loss)(p, task.support, key)[0], start, key)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _off(params: Params, key: Any) -> Params:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [x + 0.01 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def table(found: Gradcheck) -> str:
    """Markdown, one row for each direction."""
    lines = ["| direction | autodiff | central difference | relative error | spread |", "|--:|--:|--:|--:|--:|"]
    for i, d in enumerate(found.directions):
        lines.append(f"| {i} | {d.autodiff:.9g} | {d.difference:.9g} | {d.error:.1e} | {d.spread:.1e} |")
    return "\n".join(lines)


def verdict(found: Gradcheck, tolerance: float, *, implicit: bool = False) -> str:
    """One line, and what to do where the meta-gradient does not agree."""
    beside = (
        f"asymmetry of the inner field {found.asymmetry:.1e} (0: a gradient; TD(0)'s is none, which is no error)"
        if found.asymmetry is not None
        else ""
    )
    if found.worst <= tolerance:
        return f"agrees: worst relative error {found.worst:.1e}, tolerance {tolerance:g}; {beside}"
    if any(d.error > tolerance and d.spread > tolerance for d in found.directions):
        hint = (
            "the differences at epsilon and epsilon/2 disagree (a kink, strong curvature, or rounding): give a smaller or larger "
            "gradcheck.epsilon"
        )
    elif implicit:
        hint = (
            "an implicit derivative is that of the optimum, and the program's of where its steps end: raise algorithm.steps, "
            "strength or cg_steps until support/stationarity is small"
        )
    else:
        hint = "autodiff gives the derivative of another program (first order? a stop_gradient or custom derivative inside?)"
    return f"DISAGREES: worst relative error {found.worst:.1e}, tolerance {tolerance:g}; {hint}; {beside}"


def show(cfg: DictConfig) -> None:
    found = check(cfg)
    print(table(found))
    implicit = "maml.implicit" in OmegaConf.to_yaml(cfg.algorithm)
    print(verdict(found, cfg.gradcheck.tolerance, implicit=implicit), flush=True)
    if not found.worst <= cfg.gradcheck.tolerance:
        sys.exit(DISAGREES)


def main() -> None:
    run_program(show)


if __name__ == "__main__":
    main()

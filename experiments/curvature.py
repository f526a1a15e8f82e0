"""The curvature that the inner loop meets, on a few tasks: during training, and for the report of a run.

`diagnostics.curvature.every=500` logs, on tasks drawn for it (the same in a resumed run):

    diagnostics/curvature/stable_step_size_...    2/λmax of the support loss before adaptation, over what the inner loop moves
    diagnostics/curvature/step_i/...              along the path: curvature, predicted and actual decrease of the support loss;
                                                  of kernels with codes the share that the step changes, those clipped, the SQNR
    diagnostics/curvature/first_order_...         cosine and norm ratio of the first-order to the full meta-gradient
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import build
from maml import train
from maml.curvature import (
    Comparison,
    Path,
    Spectrum,
    StableStep,
    adaptation_path,
    first_order_comparison,
    hvp,
    lanczos,
    largest_update_singular_values,
    of_loss,
    paths,
    restricted,
    stable_step_size,
)
from maml.implicit import residual
from maml.objectives import with_norm
from maml.quantization import code_metrics
from maml.random import key_for, keys_for
from maml.types import Adapt, Loss, MetaParams, Params, Task, as_argument


class Curvatures(NamedTuple):
    """Of each task [tasks, ...], and the comparison of their mean meta-gradients. `codes` [tasks, steps] of quantized kernels.

    No comparison where the algorithm has no derivative to exchange.
    """

    path: Path
    stable: StableStep
    comparison: Comparison | None
    codes: Mapping[str, jax.Array]


def callback(cfg: DictConfig, learner: build.Learner, loggers: Sequence[Any]) -> Callable[[train.Progress], None]:
    """A callback of `train.fit` that measures at the parameters of the moment, and logs.

    Raises:
      ValueError: for an algorithm without an inner loop, or one that moves nothing, for a semi-gradient, and for more Lanczos
        steps than parameters.
    """
    measure = measurement(cfg, learner)
    jax.eval_shape(measure, learner.state.params, as_argument(learner.sampler), learner.state.key, learner.state.step)

    def call(progress: train.Progress) -> None:
        state = progress.state
        seen = jax.device_get(measure(state.params, as_argument(learner.sampler), state.key, state.step))
        for logger in loggers:
            logger(int(state.step), {f"diagnostics/curvature/{k}": v for k, v in scalars(cfg, seen).items()})

    return call


def measurement(cfg: DictConfig, learner: build.Learner) -> Callable[..., Curvatures]:
    """Compiled: (params, sampler, root key, meta-step) -> Curvatures."""
    adapt, settings = inner_loop(cfg), cfg.diagnostics.curvature
    of_loss(learner.loss, (), jax.random.key(0))
    quantized = build.kernel_codes(cfg)

    @jax.jit
    def sampled(sampler, params, root):  # one program: operations on their own would each be compiled
        samples = sampler(keys_for(root, "diagnostics/curvature", 0, settings.tasks))
        return _moved(adapt, learner.loss, params, samples, root)

    moved = _names(sampled(as_argument(learner.sampler), learner.state.params, learner.state.key))
    full, cut = (
        build.build_objective(build.with_derivative(cfg, name), learner.loss) for name in ("reverse", "first_order")
    )

    @jax.jit
    def measure(params, sampler, root, step) -> Curvatures:
        tasks = sampler(keys_for(root, "diagnostics/curvature", step, settings.tasks))
        keys = keys_for(root, "diagnostics/curvature/keys", step, settings.tasks)

        def one(pair):
            task, key = pair
            path = adaptation_path(adapt, learner.loss, params, task.support, key)
            product, at = moved_hessian(adapt, learner.loss, params, task, key, moved, after=False)
            codes = {}
            if quantized:
                codes = code_metrics(adapt(learner.loss, params, task.support, key).trace.params, *quantized)
            return path, stable_step_size(product, at, lanczos_steps(settings.lanczos, at, params), key), codes

        def mean(objective):
            return lambda p: jax.lax.map(lambda pair: objective(p, *pair, step)[0], (tasks, keys)).mean()

        path, stable, codes = jax.lax.map(one, (tasks, keys))
        comparison = first_order_comparison(mean(full), mean(cut), params) if "derivative" in cfg.algorithm else None
        return Curvatures(path, stable, comparison, codes)

    return measure


def inner_loop(cfg: DictConfig) -> Adapt:
    """The algorithm's own.

    Raises:
      ValueError: where it has none.
    """
    if not cfg.algorithm.steps:
        raise ValueError(
            f"diagnostics.curvature: algorithm {cfg.algorithm.name} takes no inner steps; set every=0, or steps"
        )
    return build.inner_loop(build.with_derivative(cfg, "reverse"))


def moved_names(adapt: Adapt, loss: Loss, params: Params, tasks: Task, root: Any) -> tuple[str, ...]:
    """Paths of the parameters that the inner loop moves on any of these tasks, near `params`: exact zeros there hide none.

    Raises:
      ValueError: where none moves.
    """
    return _names(jax.jit(lambda: _moved(adapt, loss, params, tasks, root))())


def _moved(adapt: Adapt, loss: Loss, params: Params, tasks: Task, root: Any) -> Params:
    keys = keys_for(root, "diagnose/moved", 0, len(jax.tree.leaves(tasks)[0]))
    leaves, structure = jax.tree.flatten(params)
    noise = jax.random.split(key_for(root, "diagnose/noise"), len(leaves))
    near = structure.unflatten([
        x + 1e-3 * jax.random.normal(key, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        for x, key in zip(leaves, noise, strict=True)
    ])  # fmt: skip

    def moved(pair):
        task, key = pair
        adapted, (path, _) = adapt(loss, near, task.support, key)
        return jax.tree.map(lambda x, y: jnp.any(x[0] != y), path, adapted)

    return jax.lax.map(moved, (tasks, keys))


def _names(moved: Params) -> tuple[str, ...]:
    names = tuple(name for name, x in paths(moved).items() if x.any())
    if not names:
        raise ValueError("curvature: the inner loop moves no parameter on these tasks: is its step size 0?")
    return names


def moved_hessian(
    adapt: Adapt, loss: Loss, params: Params, task: Task, key: Any, moved: Sequence[str], *, after: bool,
    side: str = "support",
) -> tuple[Callable[[Params], Params], Params]:  # fmt: skip
    """Products with the Hessian of the loss before or after adaptation, over the `moved` parameters alone; and these."""
    adapted, (path, _) = adapt(loss, params, task.support, key)
    at = adapted if after else jax.tree.map(lambda x: x[0], path)
    f, part = _over(of_loss(loss, getattr(task, side), key), at, moved)
    return hvp(f, part), part


def _over(f: Callable[[Params], Any], params: Params, names: Sequence[str]) -> tuple[Callable, Params]:
    """f of these parameters alone, and they."""
    return restricted(f, params, f"^({'|'.join(map(re.escape, names))})$")


def layer_step_sizes(
    adapt: Adapt, loss: Loss, params: Params, tasks: Task, root: Any, moved: Sequence[str], k: int
) -> dict[str, StableStep]:
    """2/λmax [tasks] of the support loss before adaptation over each layer alone, of those that the inner loop moves."""
    keys = keys_for(root, "diagnose/layers", 0, len(jax.tree.leaves(tasks)[0]))
    layers: dict[str, list[str]] = {}
    for name in moved:
        layers.setdefault(name.rpartition("/")[0] or name, []).append(name)

    def one(pair):
        task, key = pair
        found = {}
        for layer, names in layers.items():
            product, at = moved_hessian(adapt, loss, params, task, key, names, after=False)
            found[layer] = stable_step_size(product, at, lanczos_steps(k, at, params), key)
        return found

    return jax.jit(lambda: jax.lax.map(one, (tasks, keys)))()


def meta_spectrum(cfg: DictConfig, loss: Loss, params: Params, tasks: Task, root: Any, step: Any, k: int) -> Spectrum:
    """Of the mean objective of these tasks, over the meta-parameters, without vectors: products through the inner loop.

    Raises:
      ValueError: for an objective that is no function of the meta-parameters but defines an update.
    """
    objective = build.build_objective(build.with_derivative(cfg, "reverse"), loss)
    if getattr(objective, "defines_update", False):
        raise ValueError(
            f"meta-objective: that of algorithm {cfg.algorithm.name} defines an update, and has no Hessian"
        )
    keys = keys_for(root, "diagnose/meta", 0, len(jax.tree.leaves(tasks)[0]))

    def mean(p):
        return jax.lax.map(jax.checkpoint(lambda pair: objective(p, pair[0], pair[1], step)[0]), (tasks, keys)).mean()

    def spectrum():
        product = hvp(mean, params)
        return lanczos(product, params, lanczos_steps(k, params, params), key_for(root, "diagnose/start"))

    return jax.jit(spectrum)()._replace(vectors=())


def update_values(cfg: DictConfig, loss: Loss, params: Params, tasks: Task, root: Any, k: int) -> jax.Array:
    """The largest singular values [tasks, k] of ∂θ_K/∂θ₀ for each task, over the model's parameters.

    Raises:
      ValueError: for an algorithm whose outer loop takes no derivative of its inner one.
    """
    if getattr(build.build_objective(cfg, loss), "defines_update", False):
        raise ValueError(f"update: the outer loop of algorithm {cfg.algorithm.name} differentiates no inner step")
    adapt = build.inner_loop(build.with_derivative(cfg, "reverse"))
    keys = keys_for(root, "diagnose/update", 0, len(jax.tree.leaves(tasks)[0]))
    start = params.params if isinstance(params, MetaParams) else params

    def one(pair):
        task, key = pair
        parts = loss, params, task.support, key, lanczos_steps(k, start, params), key_for(root, "diagnose/start")
        return largest_update_singular_values(adapt, *parts)

    return jax.jit(lambda: jax.lax.map(one, (tasks, keys)))()


def solve_residuals(
    cfg: DictConfig, loss: Loss, params: Params, tasks: Task, root: Any, moved: Sequence[str]
) -> jax.Array | None:
    """|A w - v| / |v| [tasks, cg_steps + 1] of iMAML's solve after each conjugate-gradient step; None without `implicit`."""
    if (how := _node(OmegaConf.to_container(cfg.algorithm, resolve=True), "maml.implicit.implicit")) is None:
        return None
    adapt, norm = inner_loop(cfg), cfg.algorithm.objective.get("norm", "batch")
    shift = sum(instantiate({k: how.get(k, default) for k, default in (("strength", 1.0), ("damping", 0.0))}).values())
    keys = keys_for(root, "diagnose/solve", 0, len(jax.tree.leaves(tasks)[0]))

    def one(pair):
        task, key = pair
        product, at = moved_hessian(adapt, loss, params, task, key, moved, after=True)
        adapted = jax.lax.stop_gradient(adapt(loss, params, task.support, key).params)
        query, _ = _over(lambda p: of_loss(loss, task.query, key)(with_norm(p, task.support, norm)), adapted, moved)
        return residual(
            lambda u: jax.tree.map(lambda h, x: h + shift * x, product(u), u),
            jax.grad(query)(at),
            how.get("cg_steps", 5),
        )

    return jax.jit(lambda: jax.lax.map(one, (tasks, keys)))()


def _node(tree: Any, target: str) -> Mapping[str, Any] | None:
    """The first part of a config that builds `target`."""
    if isinstance(tree, Mapping) and tree.get("_target_") == target:
        return tree
    inner = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    return next((found for x in inner if (found := _node(x, target)) is not None), None)


def lanczos_steps(k: int, part: Params, params: Params) -> int:
    """k, or all that a part of the parameters has room for. More than there are parameters at all is left to be refused."""
    there, everywhere = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (part, params))
    return k if k > everywhere else min(k, there)


def moved_spectra(
    adapt: Adapt, loss: Loss, params: Params, tasks: Task, root: Any, moved: Sequence[str], k: int
) -> dict[str, Spectrum]:
    """Spectra [tasks, k] of support and query loss before and after adaptation over what it moves, without vectors."""
    keys = keys_for(root, "diagnose/spectra", 0, len(jax.tree.leaves(tasks)[0]))

    def one(pair):
        task, key = pair
        found = {}
        for side in ("support", "query"):
            for when in ("before", "after"):
                product, at = moved_hessian(adapt, loss, params, task, key, moved, after=when == "after", side=side)
                spectrum = lanczos(product, at, lanczos_steps(k, at, params), key_for(root, "diagnose/start"))
                found[f"{side}/{when}"] = spectrum._replace(vectors=())
        return found

    return jax.jit(lambda: jax.lax.map(one, (tasks, keys)))()


def scalars(cfg: DictConfig, seen: Curvatures) -> dict[str, float]:
    """The numbers that every logger gets: means over tasks."""
    stable, values = np.asarray(seen.stable.step_size), {}
    values |= {"stable_step_size_min": stable.min(), "stable_step_size_median": np.median(stable)}
    if (size := sgd_step_size(cfg)) is not None:
        values["beyond_stable"] = (stable < size).mean()
    for row in path_rows(seen):
        values |= {f"step_{row['step']}/{name}": x for name, x in row.items() if name != "step"}
    if seen.comparison is not None:
        values |= {f"first_order_{name}": x for name, x in seen.comparison._asdict().items()}
    return {name: float(value) for name, value in values.items()}


def sgd_step_size(cfg: DictConfig) -> float | None:
    """The inner step size that 2/λmax bounds: that of plain SGD, where it is one number; None under other optimizers.

    Momentum moves the bound, and so does the proximal term of an implicit loop; low-rank factors move in another space.
    """
    size, text = cfg.algorithm.get("step_size"), OmegaConf.to_yaml(cfg.algorithm)
    optimizers = set(re.findall(r"_target_: (optax\.\w+)", text))
    plain = "optax.sgd" in optimizers <= {"optax.sgd", "optax.chain"} and not re.search(r"momentum: (?!null)", text)
    if not (plain and build.reads(cfg, "step_size") and isinstance(size, int | float)) or re.search(
        r"maml\.implicit|low_rank", text
    ):
        return None
    return float(size)


def path_rows(seen: Curvatures) -> list[Mapping[str, Any]]:
    """A row for each inner step, means over tasks."""
    columns = {**seen.path._asdict(), **seen.codes}
    return [
        {"step": i + 1, **{name: float(np.mean(x[:, i])) for name, x in columns.items()}}
        for i in range(seen.path.loss.shape[1])
    ]

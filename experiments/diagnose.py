"""A report on what a run has learned: spectra, stable step sizes, noise scales, influence, first against second order.

    python -m experiments.diagnose RUN_DIRECTORY [diagnostics.curvature.tasks=N] [diagnostics.curvature.lanczos=K]
                                   [diagnostics.per_example.tasks=N] [diagnostics.per_example.outliers=N] [task.data_dir=DIR]

Writes RUN_DIRECTORY/diagnosis/report.md with its figures as PNG, and report.json with its numbers. The tasks are of
meta-training; the inner loop is the algorithm's own. What a loss or an algorithm does not have is left out, and said.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments import build, curvature, diagnostics, results, schema
from experiments.collect import records
from experiments.program import CONF, on_run, write
from maml import plots, train
from maml.checkpoint import Checkpoints
from maml.random import keys_for
from maml.types import as_argument

ALLOWED = ("diagnostics.", "task.data_dir")


def load(
    directory: Path, overrides: Sequence[str]
) -> tuple[DictConfig, build.Learner, dict[int, train.Progress], list[dict[str, Any]]]:
    """Config, learner, the progress at every checkpoint of a run, oldest first, and what it logged.

    Raises:
      ValueError: for a directory without checkpoints, and keys that are not of the diagnostics.
    """
    checkpoints = Checkpoints(directory / "checkpoints")
    config = results.saved_config(checkpoints)
    defaults = OmegaConf.load(CONF / "config.yaml")
    cfg = OmegaConf.merge({"diagnostics": defaults.diagnostics}, dict(config))  # also of runs that had none
    cfg.diagnostics = OmegaConf.merge(OmegaConf.structured(schema.Diagnostics), cfg.diagnostics)
    for override in overrides:
        key, separator, value = override.partition("=")
        if (
            not separator
            or not key.startswith(ALLOWED)
            or key.endswith(".every")
            or OmegaConf.select(cfg, key, default=cfg) is cfg
        ):
            raise ValueError(f"{override}: give diagnostics.{{curvature,per_example}}.KEY=VALUE, or task.data_dir=DIR")
        OmegaConf.update(cfg, key, yaml.safe_load(value))
    assert isinstance(cfg, DictConfig)
    learner = build.learner(cfg)
    template = train.begin(learner.state, learner.step, learner.sampler)
    if not (kept := checkpoints.restore_all(template)):
        raise ValueError(f"{directory}: no checkpoint in {directory / 'checkpoints'} can be read; run it anew")
    return cfg, learner, kept, records(directory)


def diagnose(
    cfg: DictConfig,
    learner: build.Learner,
    kept: Mapping[int, train.Progress],
    logged: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The numbers of the report, of the newest checkpoint where nothing else is said; and its figures under "figures"."""
    report: dict[str, Any] = {"algorithm": cfg.algorithm.name, "meta_step": max(kept), "left_out": []}
    figures: dict[str, plots.Figure] = {}
    for part in (_curvature, _meta, _update, _learned, _per_example):
        try:
            numbers, drawn = part(cfg, learner, kept, logged)
        except ValueError as error:
            if (reason := str(error)) not in report["left_out"]:
                report["left_out"].append(reason)
            continue
        report["left_out"] += numbers.pop("left_out", [])
        report |= numbers
        figures |= drawn
    return report | {"figures": figures}


def _curvature(cfg, learner, kept, logged):
    measure, adapt = curvature.measurement(cfg, learner), curvature.inner_loop(cfg)
    sampler = as_argument(learner.sampler)
    seen = {
        step: jax.device_get(measure(p.state.params, sampler, p.state.key, p.state.step)) for step, p in kept.items()
    }
    state, last, k = kept[max(kept)].state, seen[max(kept)], cfg.diagnostics.curvature.lanczos
    at = adapt, *_at(cfg, learner, state)[1:]
    moved = curvature.moved_names(*at)
    spectra = jax.device_get(curvature.moved_spectra(*at, moved, k))
    layers = jax.device_get(curvature.layer_step_sizes(*at, moved, k))
    comparisons = _first_order(logged) | {
        step: {name: float(x) for name, x in s.comparison._asdict().items()}
        for step, s in seen.items()
        if s.comparison is not None
    }
    numbers = {
        "path": curvature.path_rows(last),
        "stable_step_size": {
            "inner_step_size": curvature.sgd_step_size(cfg),
            **{name: np.asarray(x).tolist() for name, x in last.stable._asdict().items()},
        },
        "stable_step_size_of_layers": [
            {"layer": layer, **{name: float(np.median(x)) for name, x in one._asdict().items()}}
            for layer, one in layers.items()
        ],
        "spectra": [{"loss": name, **_ends(s)} for name, s in spectra.items()],
    }
    if (left := curvature.solve_residuals(cfg, *at[1:], moved)) is not None:
        numbers["solve"] = [
            {"step": i, "median over tasks": float(np.median(x)), "largest": float(x.max())}
            for i, x in enumerate(jax.device_get(left).T)
        ]
    steps = sorted(comparisons)
    figures = {
        "spectra": plots.spectra({name: (s.values.ravel(), s.weights.ravel() / len(s.values)) for name, s in spectra.items()}),
        "path": plots.step_curve(
            {name: _mean_ci(getattr(last.path, name)) for name in ("predicted", "actual")},
            "decrease of the support loss", "inner step (from 0)",
        ),
    }  # fmt: skip
    if steps:
        numbers["first_order"] = [{"meta_step": step, **comparisons[step]} for step in steps]
        cosines = [comparisons[step]["cosine"] for step in steps]
        figures["first_order"] = plots.learning_curves({"cosine to the full meta-gradient": (steps, cosines)}, "cosine")
    else:
        numbers["left_out"] = [f"first order: algorithm {cfg.algorithm.name} has a derivative of its own, and no other"]
    return numbers, figures


def _first_order(logged: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """What `diagnostics.curvature.every` logged of first order, by meta-step."""
    prefix = "diagnostics/curvature/first_order_"
    rows = [row for row in logged if f"{prefix}cosine" in row]
    return {
        row["step"]: {
            name.removeprefix(prefix): float("nan") if x is None else x  # JSON has no NaN
            for name, x in row.items()
            if name.startswith(prefix)
        }
        for row in rows
    }


def _ends(spectra: Any) -> dict[str, float]:
    """Both ends of spectra [tasks, k] or [k], means over tasks, each with its largest residual."""
    values, residuals = np.atleast_2d(spectra.values), np.atleast_2d(spectra.residuals)
    return {
        "largest": float(values[:, -1].mean()),
        "largest_residual": float(residuals[:, -1].max()),
        "smallest": float(values[:, 0].mean()),
        "smallest_residual": float(residuals[:, 0].max()),
    }


def _meta(cfg, learner, kept, logged):
    del logged
    state, settings = kept[max(kept)].state, cfg.diagnostics.curvature
    meta = curvature.meta_spectrum(*_at(cfg, learner, state), state.step, settings.lanczos)
    return {"meta_objective": _ends(jax.device_get(meta)) | {"tasks": settings.tasks}}, {}


def _update(cfg, learner, kept, logged):
    del logged
    state, settings = kept[max(kept)].state, cfg.diagnostics.curvature
    curvature.inner_loop(cfg)
    values = jax.device_get(curvature.update_values(*_at(cfg, learner, state), settings.lanczos))
    rows = [
        {"singular value": i + 1, "median over tasks": float(np.median(x)), "largest": float(x.max())}
        for i, x in enumerate(values.T[:SINGULAR_VALUES])
    ]
    return {"update": rows}, {}


def _learned(cfg, learner, kept, logged):
    """What the inner loop has among the meta-parameters beside the model: learned step sizes, low-rank factors."""
    del learner, logged
    rows = []
    for name, x in diagnostics.learned(cfg, kept[max(kept)].state.params).items():
        few = x.ravel().tolist() if x.ndim < 2 and x.size <= VALUES else []
        rows.append({"name": name, **diagnostics.ends(x), "values": ", ".join(f"{v:.4g}" for v in few)})
    return ({"learned": rows} if rows else {}), {}


def _at(cfg, learner, state):
    """What curvature is measured at: the tasks of the logged diagnostics."""
    tasks = learner.sampler(keys_for(state.key, "diagnostics/curvature", state.step, cfg.diagnostics.curvature.tasks))
    return cfg, learner.loss, state.params, tasks, state.key


def _mean_ci(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over tasks and their standard errors."""
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.full(
        values.shape[1], np.nan
    )


def _per_example(cfg, learner, kept, logged):
    del logged
    state = kept[max(kept)].state
    measure = diagnostics.measurement(cfg, learner)
    seen = jax.device_get(measure(state.params, as_argument(learner.sampler), state.key, state.step))
    numbers: dict[str, Any] = {"gradients": diagnostics.scalars(seen)}
    figures: dict[str, plots.Figure] = {}
    count = cfg.diagnostics.per_example.outliers
    if seen.queries is not None and count:
        for side, find in (("query", diagnostics.worst_queries), ("support", diagnostics.worst_support)):
            numbers[f"worst_{side}"] = rows = find(seen, count)
            for figure in diagnostics.pictures(seen.tasks, side, rows):
                figures[f"worst_{side}"] = figure
    if seen.queries is None:
        numbers["left_out"] = [
            "gradients of single examples: they need a loss with per_example that is a gradient, tasks of one size, and an outer "
            "loop that differentiates the query loss"
        ]
    return numbers, figures


SINGULAR_VALUES = 5
"""How many of the largest the report has."""

VALUES = 16
"""Up to how many values a learned vector is written out: one for each inner step."""

SECTIONS: Mapping[str, tuple[str, str]] = {
    "spectra": (
        "Spectra of the Hessian before and after adaptation",
        "Largest and smallest Ritz value (means over tasks) with the largest residual: an eigenvalue lies within it. Over the "
        "parameters that the inner loop moves.",
    ),
    "stable_step_size": (
        "Largest stable inner step size",
        "2/λmax of the support loss before adaptation, for each task; low and high from the residual.",
    ),
    "stable_step_size_of_layers": (
        "Largest stable inner step size of each layer alone",
        "The same over the parameters of one layer, the others at rest; medians over tasks.",
    ),
    "path": (
        "Along the inner loop",
        "Means over tasks. curvature: κ along the step; predicted: decrease of the quadratic at hand; actual: decrease of the "
        "support loss.",
    ),
    "first_order": (
        "First-order against full meta-gradient",
        "Over training: where `diagnostics.curvature.every` logged it, and at each checkpoint that was kept.",
    ),
    "meta_objective": (
        "Spectrum of the meta-objective's Hessian",
        "Ends of the spectrum of the mean objective of these tasks, through the inner loop, over all meta-parameters.",
    ),
    "update": (
        "Singular values of the update Jacobian",
        "Largest of ∂θ_K/∂θ₀ over the model's parameters: far above 1 meta-gradients explode.",
    ),
    "solve": (
        "Conjugate gradients of the implicit derivative",
        "|A w - v| / |v| after each step: A = ∇²L(φ) + (λ + damping) I at the adapted parameters, v the gradient of the query "
        "loss.",
    ),
    "learned": (
        "Learned by the inner loop",
        "Meta-parameters beside the model's own, as they are stored (positive step sizes: their logarithms). values: all of a "
        "short vector, such as one step size for each inner step.",
    ),
    "gradients": (
        "Meta-gradients of tasks, query examples and support examples",
        "task/: over tasks; query/, support/: over the examples of a task. cosine: of each gradient to the mean of the others; "
        "coherence: over pairs; noise_signal: |G|², the squared norm of the true gradient, estimated without bias, so that it "
        "falls below 0 where noise hides it; noise_resolved: 1 where it does not; noise_scale: tr Σ / |G|², the batch, in tasks "
        "or examples, at which noise and signal are equal, NaN where not resolved; gsnr: |ḡ|² / tr Σ of a layer.",
    ),
    "worst_query": ("Query examples with the largest meta-gradients", ""),
    "worst_support": (
        "Support examples that hurt the query loss most",
        "influence: derivative in the example's weight.",
    ),
}


def markdown(report: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The report: a section for each part that there is."""
    lines = [f"# Diagnosis: {report['algorithm']} at meta-step {report['meta_step']}", ""]
    lines += [f"Left out: {reason}" for reason in report["left_out"]]
    for name, (title, note) in SECTIONS.items():
        if name in report:
            lines += ["", f"## {title}", "", *([note, ""] if note else []), _table(report[name])]
            lines += ["", f"![{name}]({name}.png)"] if name in figures else []
    return "\n".join(lines) + "\n"


def _table(content: Any) -> str:
    if isinstance(content, Mapping):
        content = [{"": name, "value": _text(value)} for name, value in content.items()]
    return diagnostics.markdown(content)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(x) for x in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save(directory: Path, report: dict[str, Any]) -> Path:
    """Write report.md, report.json and the figures; returns the path of the first."""
    figures: dict[str, Any] = report.pop("figures")
    directory.mkdir(exist_ok=True)
    for name, figure in figures.items():
        plots.save(figure, directory / f"{name}.png")
    write(directory / "report.json", json.dumps(report, indent=1, default=str) + "\n")
    write(directory / "report.md", markdown(report, list(figures)))
    return directory / "report.md"


def written(directory: Path, overrides: Sequence[str]) -> str:
    path = save(directory / "diagnosis", diagnose(*load(directory, overrides)))
    return f"{path.read_text()}\n{path}"


def main() -> None:
    on_run(__doc__, written)


if __name__ == "__main__":
    main()

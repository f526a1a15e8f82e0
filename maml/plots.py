"""Pictures of adaptation: each function returns a matplotlib Figure; `save` writes it.

Figures are made without pyplot, so that nothing here keeps state or needs a screen. matplotlib is
imported by the first figure, so that importing this module costs nothing.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int, Shaped

Figure = Any
"""A `matplotlib.figure.Figure`."""

Points = Float[np.ndarray | Array, " points"]
Shots = Float[np.ndarray | Array, " shots"]
Steps = Float[np.ndarray | Array, " inner_steps"]
Images = Shaped[np.ndarray | Array, "_ height width channels"]


class Fit(NamedTuple):
    """A regression task with the functions predicted after so many inner steps."""

    inputs: Points
    truth: Points
    predictions: Mapping[int, Points]
    support: tuple[Shots, Shots]


class Paths(NamedTuple):
    """A task in the plane: paths of some episodes after so many inner steps, NaN from their end on, and the goal."""

    paths: Mapping[int, Float[np.ndarray | Array, "episodes times 2"]]
    goal: Float[np.ndarray | Array, "2"]


def adaptation_fits(
    inputs: Points,
    truth: Points,
    predictions: Mapping[int, Points],
    support: tuple[Shots, Shots],
) -> Figure:
    """The true function, the support (x, y), and the predictions by number of inner steps."""
    return adaptation_grid([Fit(inputs, truth, predictions, support)], columns=1)


def adaptation_grid(fits: Sequence[Fit], columns: int = 2) -> Figure:
    """`adaptation_fits` of several tasks (as Finn et al. 2017, arXiv 1703.03400, figure 2)."""
    return _grid(fits, _draw_fit, columns)


def paths_grid(tasks: Sequence[Paths], columns: int = 2) -> Figure:
    """The paths of several tasks before and after adaptation, a panel each (as Finn et al. 2017, arXiv 1703.03400, figure 4)."""
    return _grid(tasks, _draw_paths, columns)


def episode(
    support: Images,
    query: Images,
    ways: int,
    shots: int,
    queries: int,
    predictions: Int[np.ndarray | Array, " examples"] | None = None,
) -> Figure:
    """A classification task: a row per class, its shots to the left and its queries to the right.

    Images are in the order of their classes: `ways` times `shots`, and `ways` times `queries`.
    `predictions` [ways*queries] are the classes predicted for the queries; the right are framed in
    green, the wrong in red. ValueError if there are more or fewer images.
    """
    for name, images, each in (("support", support, shots), ("query", query, queries)):
        if len(images) != ways * each:
            raise ValueError(f"{name}: {len(images)} images; give {ways} ways x {each}, by class")
    span = _span(support, query)
    width = 0.6 * (shots + queries) + 0.6
    figure, (left, right) = _panels(1, 2, width=max(width, 2.4), height=0.6 * ways + 0.5, width_ratios=(shots, queries))
    _draw_mosaic(left, support, ways, span, "support")
    _draw_mosaic(right, query, ways, span, "query")
    if predictions is not None:
        right_ones = np.asarray(predictions).reshape(ways, queries) == np.arange(ways)[:, None]
        _draw_frames(right, right_ones, query.shape[1:3])
    return figure


def examples(images: Images, captions: Sequence[str], columns: int = 5) -> Figure:
    """Single images [examples, height, width, channels] with a caption above each."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, panels = _panels(rows, columns, width=max(1.3 * columns, 2.6), height=1.6 * rows)
    span = _span(images, images)
    for i, panel in enumerate(panels):
        panel.set_axis_off()
        if i < len(images):
            _draw_mosaic(panel, images[i : i + 1], 1, span, captions[i])
    return figure


def step_curve(curves: Mapping[str, tuple[Steps, Steps]], ylabel: str, xlabel: str = "inner steps") -> Figure:
    """A metric after 0, 1, ... inner steps: (means, half-widths of intervals) by label.

    A NaN mean is left out (not measured after so many steps), a NaN half-width draws no bar.
    """
    figure, (panel,) = _panels(1, 1, width=5.0, height=3.5)
    for label, (means, ci95) in curves.items():
        means, ci95 = np.asarray(means), np.nan_to_num(np.asarray(ci95))
        there = np.flatnonzero(np.isfinite(means))
        panel.errorbar(there, means[there], ci95[there], label=label, marker="o", capsize=3)
    panel.xaxis.get_major_locator().set_params(integer=True)
    return _labelled(figure, panel, xlabel, ylabel)


def learning_curves(
    curves: Mapping[str, tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]],
    ylabel: str,
    logy: bool = False,
) -> Figure:
    """A metric during meta-training: (steps, values) by label; NaN leaves a gap."""
    figure, (panel,) = _panels(1, 1, width=6.0, height=3.5)
    for label, (steps, values) in curves.items():
        marker = "o" if len(steps) == 1 else None
        panel.plot(np.asarray(steps), np.asarray(values, np.float64), label=label, marker=marker)
    if logy:
        panel.set_yscale("log")
    return _labelled(figure, panel, "meta-steps", ylabel)


def spectra(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], width: float = 0.01) -> Figure:
    """Spectral densities from (nodes, weights) by label, on a logarithmic axis.

    Each node is a Gaussian bell whose width is this share of the range of all nodes.
    """
    low = min(float(np.min(nodes)) for nodes, _ in curves.values())
    high = max(float(np.max(nodes)) for nodes, _ in curves.values())
    sigma = max(high - low, 1e-12) * width
    grid = np.linspace(low - 5 * sigma, high + 5 * sigma, 500)
    figure, (panel,) = _panels(1, 1, width=6.0, height=3.5)
    for label, (nodes, weights) in curves.items():
        bells = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        panel.plot(grid, np.maximum(bells @ weights, 1e-12), label=label)
    panel.set_yscale("log")
    panel.set_ylim(bottom=1e-5 / sigma)
    return _labelled(figure, panel, f"eigenvalue (bandwidth {sigma:.2g})", "density")


def by_layer(
    curves: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]],
    layers: Sequence[str],
    ylabel: str,
) -> Figure:
    """A measure of each layer, from the input on: (means, half-widths of intervals) by label; a NaN mean is left out."""
    figure, (panel,) = _panels(1, 1, width=max(4.0, 0.9 * len(layers) + 1.5), height=3.5)
    for label, (means, ci95) in curves.items():
        means, ci95 = np.asarray(means, np.float64), np.nan_to_num(np.asarray(ci95, np.float64))
        there = np.flatnonzero(np.isfinite(means))
        panel.errorbar(there, means[there], ci95[there], label=label, marker="o", capsize=3)
    panel.set_xticks(range(len(layers)), list(layers))
    return _labelled(figure, panel, "layer", ylabel)


def accuracy_against_bits(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]],
    ylabel: str = "accuracy",
) -> Figure:
    """A metric of quantized models: (bits, means, half-widths of intervals) by label; bits stand evenly spaced, 32 is none."""
    figure, (panel,) = _panels(1, 1, width=5.0, height=3.5)
    places = sorted({bits for curve in curves.values() for bits in curve[0]})
    for label, (bits, means, ci95) in curves.items():
        order = np.argsort(bits)
        at = [places.index(bits[i]) for i in order]
        means, ci95 = np.asarray(means, np.float64)[order], np.nan_to_num(np.asarray(ci95, np.float64))[order]
        panel.errorbar(at, means, ci95, label=label, marker="o", capsize=3)
    panel.set_xticks(range(len(places)), [str(bits) for bits in places])
    return _labelled(figure, panel, "bits", ylabel)


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG, whole or not at all, in a directory it makes; OSError if it cannot."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, path)


def _panels(rows: int, columns: int, width: float, height: float, width_ratios=None):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)
    return figure, list(panels.flat)


def _labelled(figure: Figure, panel: Any, xlabel: str, ylabel: str) -> Figure:
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", frameon=False, fontsize="small")
    return figure


def _grid(tasks: Sequence[Any], draw: Callable[[Any, Any], None], columns: int) -> Figure:
    """A panel for each task, and one legend."""
    columns = min(columns, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = _panels(rows, columns, width=4.0 * columns, height=2.8 * rows + 0.4)
    for panel, task in zip(panels, tasks, strict=False):
        draw(panel, task)
    for panel in panels[len(tasks) :]:
        panel.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_fit(panel: Any, fit: Fit) -> None:
    panel.plot(fit.inputs, fit.truth, color="black", linewidth=2, label="truth")
    for step, prediction, style in _by_step(fit.predictions):
        panel.plot(fit.inputs, prediction, ":" if step == 0 else "--", **style)
    panel.plot(*fit.support, "^", color="tab:red", markersize=7, label="support")
    panel.grid(alpha=0.3)


def _draw_paths(panel: Any, task: Paths) -> None:
    for _, paths, style in _by_step(task.paths):
        for path in np.asarray(paths):
            panel.plot(*path.T, linewidth=1, **style)
            style = {**style, "label": None}  # one for all episodes
    panel.plot(*np.asarray(task.goal), "*", color="tab:red", markersize=12, label="goal")
    panel.set_aspect("equal", adjustable="datalim")
    panel.grid(alpha=0.3)


def _by_step(found: Mapping[int, Any]) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """In the order of the inner steps, darker with every one."""
    from matplotlib import colormaps

    for (step, what), shade in zip(sorted(found.items()), np.linspace(0.85, 0.2, len(found)), strict=True):
        yield step, what, {"color": colormaps["viridis"](shade), "label": f"{step} step" + "s" * (step != 1)}


def _span(support: Images, query: Images) -> tuple[float, float]:
    images = (np.asarray(support, np.float64), np.asarray(query, np.float64))
    low, high = min(i.min() for i in images), max(i.max() for i in images)
    return (low, high) if high > low else (low, low + 1.0)


def _draw_mosaic(panel: Any, images: Images, ways: int, span: tuple[float, float], title: str) -> None:
    """Draws images [ways*each, h, w, c] as one of [ways*(h+gap), each*(w+gap), c]."""
    low, high = span
    scaled = (np.asarray(images, np.float64) - low) / (high - low)
    if scaled.shape[-1] == 1:
        scaled = 1.0 - scaled.repeat(3, axis=-1)  # one channel is ink: dark on white
    gap = (0, _gap(scaled.shape[1]))
    padded = np.pad(scaled, ((0, 0), gap, gap, (0, 0)), constant_values=1.0)
    _, height, width, channels = padded.shape
    rows = padded.reshape(ways, -1, height, width, channels).transpose(0, 2, 1, 3, 4)
    panel.imshow(rows.reshape(ways * height, -1, channels), interpolation="nearest")
    panel.set_title(title, fontsize="small")
    panel.set_axis_off()


def _gap(height: int) -> int:
    return 1 + height // 10  # pixels between images, so that their frames do not overlap


def _draw_frames(panel: Any, correct: np.ndarray, size: tuple[int, ...]) -> None:
    from matplotlib.patches import Rectangle

    height, width = size
    gap = _gap(height)
    for (row, column), right in np.ndenumerate(correct):
        corner = (column * (width + gap) - 0.5, row * (height + gap) - 0.5)
        colour = "tab:green" if right else "tab:red"
        panel.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=2))

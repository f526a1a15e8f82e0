"""Pictures: they open, have the size and the content they should, and leave no state behind."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maml import plots


def drawn(figure, path):
    plots.save(figure, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def near(pixels, colour):
    """How many pixels are of a colour."""
    return int((np.abs(pixels - np.array(colour)).max(axis=-1) < 12).sum())


GREEN, RED, BLUE = (44, 160, 44), (214, 39, 40), (31, 119, 180)


def fit(shift=0.0):
    x = np.linspace(-5, 5, 50)
    predictions = {10: np.sin(x), 0: 0 * x + shift, 1: 0.5 * np.sin(x)}
    return plots.Fit(x, np.sin(x), predictions, (x[::10], np.sin(x[::10])))


def test_adaptation_fits_draws_truth_support_and_every_prediction(tmp_path):
    figure = plots.adaptation_fits(*fit())
    (panel,) = figure.axes
    labels = [line.get_label() for line in panel.lines]
    assert labels == ["truth", "0 steps", "1 step", "10 steps", "support"]
    np.testing.assert_array_equal(panel.lines[3].get_ydata(), fit().predictions[10])
    np.testing.assert_array_equal(panel.lines[4].get_xdata(), fit().support[0])
    pixels = drawn(figure, tmp_path / "a.png")
    assert pixels.shape == (480, 600, 3)
    assert near(pixels, RED) > 100


def test_adaptation_grid_has_a_panel_per_task(tmp_path):
    figure = plots.adaptation_grid([fit(0.0), fit(1.0), fit(2.0)], columns=2)
    assert [panel.lines[1].get_ydata()[0] for panel in figure.axes] == [0.0, 1.0, 2.0]
    assert drawn(figure, tmp_path / "a.png").shape == (900, 1200, 3)


def images(ways, each, channels=1):
    """Class k has the value k/ways everywhere, with the number of the example in a corner."""
    pictures = np.zeros((ways * each, 6, 4, channels), np.float32)
    pictures += (np.arange(ways * each) // each / ways)[:, None, None, None]
    pictures[:, 0, 0] = np.arange(ways * each)[:, None] % each
    return pictures


def test_episode_has_a_row_per_class_and_a_column_per_example():
    figure = plots.episode(images(3, 2), images(3, 4), ways=3, shots=2, queries=4)
    left, right = (panel.images[0].get_array() for panel in figure.axes)
    assert left.shape == (3 * 7, 2 * 5, 3)
    assert right.shape == (3 * 7, 4 * 5, 3)
    # Ink is dark: row k is 1 - k/3 of the span 0..3, the corner 1 - example/3.
    for way in range(3):
        for example in range(4):
            image = right[7 * way : 7 * way + 6, 5 * example : 5 * example + 4, 0]
            np.testing.assert_allclose(image[1:, 1:], 1 - way / 3 / 3, rtol=1e-6)
            np.testing.assert_allclose(image[0, 0], 1 - example / 3, atol=1e-6)


def test_episode_in_colour_is_not_inverted():
    red = np.zeros((2, 5, 5, 3), np.uint8)
    red[..., 0] = 255
    figure = plots.episode(red, red, ways=2, shots=1, queries=1)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array()[0, 0], [1, 0, 0])


def test_episode_frames_right_green_and_wrong_red(tmp_path):
    support, query = jnp.asarray(images(2, 1)), jnp.asarray(images(2, 2))

    def counts(predictions, name):
        figure = plots.episode(support, query, 2, 1, 2, predictions)
        pixels = drawn(figure, tmp_path / name / "e.png")
        return near(pixels, GREEN), near(pixels, RED)

    assert counts(None, "none") == (0, 0)
    assert counts(jnp.array([0, 0, 1, 1]), "right")[1] == 0
    green, red = counts(np.array([0, 1, 1, 1]), "mixed")
    assert 1.5 * red < green  # three to one, where frames touch
    assert red > 100
    figure = plots.episode(support, query, 2, 1, 2, np.array([0, 1, 1, 1]))
    frames = [(p.get_xy(), p.get_edgecolor()[1] > 0.5) for p in figure.axes[1].patches]
    assert [correct for _, correct in frames] == [True, False, True, True]
    assert frames[1][0] == (4.5, -0.5)  # row 0, column 1


def test_episode_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="query: 6 images; give 2 ways x 2"):
        plots.episode(images(2, 1), images(2, 3), ways=2, shots=1, queries=2)


def test_step_curve_has_bars_where_there_are_intervals(tmp_path):
    means, ci95 = np.array([3.0, np.nan, 1.0]), np.array([0.5, np.nan, np.nan])
    figure = plots.step_curve({"maml": (means, ci95), "other": (means + 1, 0 * means)}, "loss")
    container = figure.axes[0].containers[0]
    np.testing.assert_array_equal(container.lines[0].get_xydata(), [[0, 3], [2, 1]])
    (bars,) = container.lines[2]
    first, last = bars.get_segments()
    np.testing.assert_array_equal(first, [[0, 2.5], [0, 3.5]])
    np.testing.assert_array_equal(last, [[2, 1], [2, 1]])
    assert [text.get_text() for text in figure.legends[0].texts] == ["maml", "other"]
    pixels = drawn(figure, tmp_path / "s.png")
    assert pixels.shape == (525, 750, 3)
    assert near(pixels, BLUE) > 100


def test_learning_curves(tmp_path):
    curves = {"a": ([1, 2, 3], [1.0, np.nan, 0.1]), "b": (np.array([1]), np.array([0.5]))}
    figure = plots.learning_curves(curves, "loss", logy=True)
    panel = figure.axes[0]
    assert (panel.get_yscale(), panel.get_xlabel(), panel.get_ylabel()) == (
        "log",
        "meta-steps",
        "loss",
    )
    np.testing.assert_array_equal(panel.lines[0].get_ydata(), [1.0, np.nan, 0.1])
    pixels = drawn(figure, tmp_path / "new" / "l.png")
    assert pixels.shape == (525, 900, 3)
    assert near(pixels, (255, 127, 14)) > 10  # the one point of b has a marker
    assert plots.learning_curves({}, "loss").axes[0].get_yscale() == "linear"


def test_failed_save_keeps_the_old_picture(tmp_path):
    path = tmp_path / "p.png"
    plots.save(plots.learning_curves({}, "loss"), path)
    before = path.read_bytes()

    class Broken:
        def savefig(self, file, **unused):
            del unused
            file.write_bytes(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        plots.save(Broken(), path)
    assert path.read_bytes() == before


def test_figures_need_no_pyplot():
    program = (
        "import sys; from maml import plots\n"
        "plots.learning_curves({'a': ([1, 2], [1.0, 2.0])}, 'loss')\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


def test_accuracy_against_bits_has_the_bits_in_order_and_evenly_spaced(tmp_path):
    figure = plots.accuracy_against_bits(
        {"a": ([32, 2, 8], [0.9, 0.3, 0.8], [0.01, np.nan, 0.02]), "b": ([8], [0.7], [0.1])}
    )
    (panel,) = figure.axes
    assert [t.get_text() for t in panel.get_xticklabels()] == ["2", "8", "32"]
    np.testing.assert_array_equal(panel.lines[0].get_xydata(), [[0, 0.3], [1, 0.8], [2, 0.9]])
    drawn(figure, tmp_path / "bits.png")


def test_by_layer_names_the_layers_and_leaves_out_what_there_is_not(tmp_path):
    figure = plots.by_layer({"CCA": ([0.9, np.nan, 0.5], [0.01, np.nan, np.nan])}, ["a", "b/0", "c"], "similarity")
    (panel,) = figure.axes
    assert [t.get_text() for t in panel.get_xticklabels()] == ["a", "b/0", "c"]
    np.testing.assert_array_equal(panel.lines[0].get_xydata(), [[0, 0.9], [2, 0.5]])
    drawn(figure, tmp_path / "layers.png")


def test_paths_have_a_panel_per_task_and_one_label_per_step(tmp_path):
    one = np.cumsum(np.full((3, 5, 2), 0.1), 1)
    one[1, 3:] = np.nan  # it has ended
    tasks = [plots.Paths({0: -one, 3: one}, np.array([0.4, goal])) for goal in (0.4, -0.2, 0.1)]
    figure = plots.paths_grid(tasks)
    assert len(figure.axes) == 3
    lines = figure.axes[1].lines
    np.testing.assert_array_equal(lines[4].get_xdata(), one[1, :, 0])
    assert [x.item() for x in (lines[-1].get_xdata(), lines[-1].get_ydata())] == [0.4, -0.2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0 steps", "3 steps", "goal"]
    assert near(drawn(figure, tmp_path / "a.png"), RED) > 100

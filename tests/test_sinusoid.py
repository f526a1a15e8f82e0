"""The task distribution of Finn et al. 2017, section 5.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maml.tasks import sinusoid


def draw(count=2000, **kwargs):
    return jax.device_get(jax.jit(sinusoid(**kwargs))(jax.random.split(jax.random.key(0), count)))


def test_amplitude_phase_and_inputs_are_uniform_in_the_papers_ranges():
    """The oracle's inputs tell A and φ: amplitudes 0.1 to 5.0, not the 0.1 to 0.5 of several tutorials."""
    x = draw(oracle=True).support[0][:, 0]
    for values, low, high in zip(x.T, (-5, 0.1, 0), (5, 5.0, np.pi), strict=True):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_targets_are_the_sine_of_the_task():
    tasks = draw(oracle=True, shots=7, queries=3)
    for inputs, targets in tasks:
        x, a, p = np.moveaxis(inputs.astype(np.float64), -1, 0)
        np.testing.assert_allclose(targets[..., 0], a * np.sin(x - p), atol=1e-5)
        assert (a == a[:, :1]).all()
        assert (p == p[:, :1]).all()
    np.testing.assert_array_equal(tasks.support[0][:, 0, 1:], tasks.query[0][:, 0, 1:])
    assert tasks.support[0].shape == (2000, 7, 3)
    assert tasks.query[0].shape == (2000, 3, 3)


def test_support_and_query_points_differ_and_tasks_are_a_function_of_the_key():
    one, again = draw(count=50), draw(count=50)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.isin(one.support[0], one.query[0]).any()
    assert one.support[0].shape == (50, 10, 1)


def literal(key):
    """One task of Finn et al. 2017, section 5.1: all its points."""
    key_a, key_p, key_x = jax.random.split(key, 3)
    a = jax.random.uniform(key_a, (), minval=0.1, maxval=5.0)
    p = jax.random.uniform(key_p, (), minval=0.0, maxval=np.pi)
    x = jax.random.uniform(key_x, (20, 1), minval=-5.0, maxval=5.0)
    return x, a * jnp.sin(x - p)


@pytest.mark.parametrize("kwargs", [{}, {"frequency": None}, {"frequency": (1.0, 1.0)}])
def test_without_a_frequency_or_at_one_tasks_are_those_of_the_formula_bit_for_bit(kwargs):
    keys = jax.random.split(jax.random.key(1), 50)
    tasks = sinusoid(**kwargs)(keys)
    both = (np.concatenate(sides, axis=1) for sides in zip(tasks.support, tasks.query, strict=True))
    for got, wanted in zip(both, jax.vmap(literal)(keys), strict=True):
        np.testing.assert_array_equal(got, wanted)


META_SGD = {"frequency": (0.8, 1.2), "phase": (-np.pi, 0.0)}


def test_with_a_frequency_targets_are_those_of_meta_sgd():
    """y = A·sin(ωx + b), Li et al. 2017: our phase is -b."""
    for inputs, targets in draw(oracle=True, shots=7, queries=3, **META_SGD):
        x, a, p, w = np.moveaxis(inputs.astype(np.float64), -1, 0)
        b = -p
        assert (b >= 0).all()
        np.testing.assert_allclose(targets[..., 0], a * np.sin(w * x + b), atol=1e-5)
        assert (w == w[:, :1]).all()


def test_frequencies_are_uniform_and_change_no_other_draw():
    x = draw(oracle=True, frequency=(0.8, 1.2)).support[0]
    np.testing.assert_array_equal(x[..., :3], draw(oracle=True).support[0])
    w = x[:, 0, 3]
    assert stats.kstest(w, stats.uniform(0.8, 0.4).cdf).pvalue > 1e-3
    for other in x[:, 0, :3].T:
        assert stats.spearmanr(w, other).pvalue > 1e-3
    assert draw(count=3, frequency=(0.8, 1.2)).support[0].shape == (3, 10, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shots": 0},
        {"queries": -1},
        {"amplitude": (5.0, 0.1)},
        {"frequency": (1.2, 0.8)},
        {"frequency": (1.0,)},
    ],
)
def test_wrong_sizes_and_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sinusoid(**wrong)

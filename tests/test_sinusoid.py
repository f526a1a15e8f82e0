"""The task distribution of Finn et al. 2017, section 5.1."""

import jax
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


@pytest.mark.parametrize("wrong", [{"shots": 0}, {"queries": -1}, {"amplitude": (5.0, 0.1)}])
def test_wrong_sizes_and_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sinusoid(**wrong)

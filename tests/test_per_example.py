"""Per-example, per-task and per-query gradients against loops, closed forms and central differences."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maml.derivatives import first_order, mixed, reverse
from maml.inner_loop import unroll, with_prototypes
from maml.losses import cross_entropy, mse, partitioned, semi_gradient, td0
from maml.models import MLP, Conv4, functional, quantize
from maml.objectives import query_loss
from maml.per_example import (
    COSINE_BINS,
    LOG_NORM_BINS,
    coherence,
    histogram,
    influence,
    moments,
    noise_scale,
    outliers,
    per_example_gradients,
    per_query_gradients,
    per_task_gradients,
    statistics,
    weighted,
)
from maml.quantization import uniform
from maml.types import Task, Transitions
from tests.helpers import Quadratic, closed_form, gradient_descent, quadratic_loss, quadratics

KEY = jax.random.key(0)
offset = partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def images(seed: int, count: int, ways: int = 3):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(count, 16, 16, 1)))
    return x, jnp.arange(count) % ways


def conv4():
    """A small Conv-4 with batch norm, in float64."""
    apply, params = functional(Conv4((16, 16, 1), 3, filters=4, norm=offset, rngs=nnx.Rngs(0)))
    return cross_entropy(apply), wide(params)


def line(norm=None):
    """A small MLP for regression, in float64, and a task."""
    kernels = nnx.initializers.normal(0.7)
    apply, params = functional(MLP((2,), 1, hidden=(5,), norm=norm, kernel_init=kernels, rngs=nnx.Rngs(1)))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(13, 2)))
    y = jnp.sin(x.sum(1, keepdims=True))
    return mse(apply), wide(params), Task((x[:6], y[:6]), (x[6:], y[6:]))


def rows_of(gradients) -> np.ndarray:
    leaves = jax.tree.leaves(gradients)
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in leaves], 1)


def vector(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def stacked(seed: int, count: int = 6):
    """Gradients with a mean: a layer of two parameters and one of one."""
    generator = np.random.default_rng(seed)
    shapes = {"a": {"kernel": (3, 2), "bias": (2,)}, "b": {"kernel": (4,)}}
    draw = lambda s: jnp.asarray(0.5 + generator.normal(size=(count, *s)))  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))


# --- the gradients of one loss ---


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [mse, cross_entropy])
def test_the_mean_of_the_losses_of_examples_is_the_loss(make):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    batch = (x, 0.5 * x) if make is mse else (x, jnp.array([0, 2, 1, 1, 0]))
    loss = make(lambda p, x: p * x)
    each = loss.per_example(jnp.float64(1.5), batch, KEY)
    assert each.shape == (5,)
    np.testing.assert_allclose(each.mean(), loss(jnp.float64(1.5), batch, KEY)[0], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_with_batch_norm_the_rows_average_to_the_gradient_of_the_batch():
    loss, params = conv4()
    batch = images(0, 6)
    losses, gradients = jax.jit(partial(per_example_gradients, loss))(params, batch, KEY)
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, KEY)
    np.testing.assert_allclose(losses.mean(), value, rtol=1e-12)
    np.testing.assert_allclose(rows_of(gradients).mean(0), vector(gradient), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_examples_alone_are_wrong_with_batch_norm_and_are_refused():
    loss, params, (batch, _) = line(offset)
    for call in (partial(per_example_gradients, way="vmap"), moments):
        with pytest.raises(ValueError, match=r"batch statistics.*way='jacobian'"):
            call(loss, params, batch, KEY)
    alone = lambda params, batch, key: loss(params, batch, key)  # noqa: E731  not known to have them
    naive = rows_of(jax.jit(partial(per_example_gradients, alone))(params, batch, KEY)[1]).mean(0)
    exact = vector(jax.jit(jax.grad(loss, has_aux=True))(params, batch, KEY)[0])
    assert np.linalg.norm(naive - exact) > 0.5 * np.linalg.norm(exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("target", ["full", "stop"])
def test_td0_of_a_model_with_batch_norm_is_no_exception(target):
    apply, params = functional(MLP((2,), 1, hidden=(4,), norm=offset, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(float), params)
    draw = np.random.default_rng(0).normal
    batch = Transitions(draw(size=(6, 2)), draw(size=(6, 1)), draw(size=(6, 2)), np.full((6, 1), 0.9))
    loss = td0(apply, target=target)
    for whole in (loss, partitioned({"": loss})):
        with pytest.raises(ValueError, match="batch statistics"):
            per_example_gradients(whole, params, batch, KEY, way="vmap")
        with pytest.raises(ValueError, match="batch statistics"):
            moments(whole, params, batch, KEY)
    losses, gradients = jax.jit(partial(per_example_gradients, loss))(params, batch, KEY)
    (value, _), field = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, KEY)
    np.testing.assert_allclose(losses.mean(), value, rtol=1e-12)
    np.testing.assert_allclose(rows_of(gradients).mean(0), vector(field), atol=1e-12)
    values = (draw(size=(6, 2)), draw(size=(6, 1)))  # the query set of a task knows the true values
    np.testing.assert_allclose(loss.per_example(params, values, KEY), mse(apply).per_example(params, values, KEY))


def test_a_model_says_whether_it_has_batch_statistics():
    for norm, expected in ((None, False), (nnx.LayerNorm, False), (offset, True)):
        apply, _ = functional(MLP((2,), 1, hidden=(3,), norm=norm, rngs=nnx.Rngs(0)))
        assert apply.batch_statistics is expected
        assert mse(apply).batch_statistics is expected
        assert weighted(mse(apply)).batch_statistics is expected
        assert partitioned({"head": mse(apply), "": mse(lambda p, x: p * x)}).batch_statistics is expected
    assert mse(lambda p, x: p * x).batch_statistics is False


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("microbatch", [None, 2])
def test_all_ways_give_the_gradient_of_each_example(microbatch):
    loss, params, task = line()
    gradient = jax.jit(jax.value_and_grad(lambda p, x, y: loss(p, (x[None], y[None]), KEY)[0]))
    by_hand = [gradient(params, *pair) for pair in zip(*task.support, strict=True)]
    for way in ("auto", "vmap", "jacobian"):
        of = jax.jit(partial(per_example_gradients, loss, way=way, microbatch=microbatch))
        losses, gradients = of(params, task.support, KEY)
        np.testing.assert_allclose(losses, [v for v, _ in by_hand], rtol=1e-12)
        np.testing.assert_allclose(rows_of(gradients), [vector(g) for _, g in by_hand], atol=1e-12)
    found = jax.jit(partial(moments, loss, microbatch=microbatch))(params, task.support, KEY)
    rows = np.stack([vector(g) for _, g in by_hand])
    np.testing.assert_allclose(vector(found.mean), rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(vector(found.second), (rows**2).mean(0), atol=1e-12)
    np.testing.assert_allclose(found.norms, np.linalg.norm(rows, axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.losses, [v for v, _ in by_hand], rtol=1e-12)


def test_what_does_not_fit_is_refused():
    loss, params, task = mse(lambda w, x: w * x), jnp.ones(()), (jnp.ones((6, 1)), jnp.ones((6, 1)))
    with pytest.raises(ValueError, match="microbatch=4.*divisor of the 6 examples"):
        per_example_gradients(loss, params, task, KEY, microbatch=4)
    with pytest.raises(ValueError, match="way='ghost'.*auto, jacobian or vmap"):
        per_example_gradients(loss, params, task, KEY, way="ghost")
    with pytest.raises(ValueError, match="per_example"):
        per_example_gradients(quadratic_loss, params, task, KEY, way="jacobian")
    with pytest.raises(ValueError, match="1 is too few.*2 or more"):
        statistics({"w": jnp.ones((1, 3))})


@pytest.mark.usefixtures("x64")
def test_the_semi_gradients_of_td0_are_those_of_the_tutorial():
    def td(params, target, batch, key):
        del key
        state, reward, following = batch
        delta = reward + following @ target - state @ params
        return -0.5 * jnp.square(delta).mean(), {}

    states = jnp.array([[1.0, 2, -1], [1, 3, 3], [1, 2, -1]])
    batch = states, jnp.array([1.0, -1, 1]), jnp.array([[2.0, 1, 0]] * 3)
    losses, gradients = per_example_gradients(semi_gradient(td), jnp.array([0.1, -0.1, 0]), batch, KEY)
    np.testing.assert_allclose(gradients, [[1.2, 2.4, -1.2], [-0.7, -2.1, -2.1], [1.2, 2.4, -1.2]], rtol=1e-12)
    np.testing.assert_allclose(losses, [-0.72, -0.245, -0.72], rtol=1e-12)


def test_per_sample_gradients_are_those_of_torch():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(3)
    w, b = generator.normal(size=(4, 3)).astype(np.float32), np.zeros(3, np.float32)
    x, y = generator.normal(size=(5, 4)).astype(np.float32), np.array([0, 2, 1, 0, 1])

    def of(w, b, x, y):
        return torch.nn.functional.cross_entropy((x @ w + b)[None], y[None])

    each = torch.func.vmap(torch.func.grad(of, (0, 1)), (None, None, 0, 0))
    expected = each(*(torch.from_numpy(v) for v in (w, b, x, y)))
    loss = cross_entropy(lambda p, x: x @ p["w"] + p["b"][None])
    _, found = per_example_gradients(loss, {"w": jnp.array(w), "b": jnp.array(b)}, (x, y), KEY)
    np.testing.assert_allclose(found["w"], expected[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(found["b"], expected[1].numpy(), atol=1e-6)


# --- statistics ---


@pytest.mark.usefixtures("x64")
def test_the_noise_scale_is_mccandlishs_with_batches_of_one_and_of_all():
    gradients = stacked(0)
    rows = rows_of(gradients)
    n, small, big = len(rows), (rows**2).sum(1).mean(), (rows.mean(0) ** 2).sum()
    signal, trace = (n * big - small) / (n - 1), (small - big) / (1 - 1 / n)  # arXiv 1812.06162, A.2 and A.3
    for noise in (noise_scale(gradients), statistics(gradients).noise):
        np.testing.assert_allclose(
            [noise.signal, noise.trace, noise.scale], [signal, trace, trace / signal], rtol=1e-12
        )
        assert noise.resolved


@pytest.mark.usefixtures("x64")
def test_a_noise_scale_is_never_negative():
    opposite = {"w": jnp.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])}
    noise = noise_scale(opposite)
    assert float(noise.signal) < 0
    assert not noise.resolved
    assert np.isnan(noise.scale)


@pytest.mark.usefixtures("x64")
def test_the_noise_scale_is_unbiased():
    """Over many draws of 4 gradients with true mean μ and covariance I: tr Σ = 3, |G|² = |μ|² = 0.5."""
    draws = np.random.default_rng(1).normal(size=(20_000, 4, 3)) + np.array([0.5, 0.5, 0.0])
    noise = jax.vmap(noise_scale)({"w": jnp.asarray(draws)})
    np.testing.assert_allclose(noise.trace.mean(), 3, rtol=0.02)
    np.testing.assert_allclose(noise.signal.mean(), 0.5, atol=0.03)


@pytest.mark.usefixtures("x64")
def test_statistics_are_those_of_a_loop():
    gradients = stacked(1)
    rows, found = rows_of(gradients), statistics(gradients)
    cosines = []
    for i, row in enumerate(rows):
        others = np.delete(rows, i, 0).mean(0)
        cosines.append(row @ others / np.linalg.norm(row) / np.linalg.norm(others))
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-12)
    np.testing.assert_allclose(found.norms, np.linalg.norm(rows, axis=1), rtol=1e-12)
    np.testing.assert_allclose(vector(found.mean), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(vector(found.second), (rows**2).mean(0), rtol=1e-12)
    assert set(found.gsnr) == set(found.layer_norms) == {"a", "b"}
    for name, part in (("a", rows_of(gradients["a"])), ("b", rows_of(gradients["b"]))):
        np.testing.assert_allclose(found.layer_norms[name], np.linalg.norm(part, axis=1), rtol=1e-12)
        expected = (part.mean(0) ** 2).sum() / part.var(0, ddof=1).sum()
        np.testing.assert_allclose(found.gsnr[name], expected, rtol=1e-12)
    pairs = itertools.combinations(rows / np.linalg.norm(rows, axis=1, keepdims=True), 2)
    np.testing.assert_allclose(coherence(gradients), np.mean([a @ b for a, b in pairs]), rtol=1e-12)


def test_gradients_that_are_zero_give_no_nan():
    with jax.debug_nans(True):
        found = jax.jit(statistics)({"dead": jnp.zeros((3, 2)), "same": {"w": jnp.ones((3, 2))}})
        assert found.gsnr == {"dead": 0, "same": np.inf}
        zero = {"w": jnp.zeros((3, 2))}
        assert not np.asarray(jax.jit(statistics)(zero).cosines).any()
        assert float(coherence(zero)) == 0


def test_layers_are_named_as_in_the_model():
    with jax.enable_x64(True):
        loss, params, task = line(offset)
        _, gradients = per_example_gradients(loss, params, task.support, KEY)
        assert set(statistics(gradients).gsnr) == {"head", "layers/0", "norms/0"}
        assert set(statistics(jnp.ones((2, 3))).gsnr) == {"params"}


def test_outliers_and_histograms():
    rows = outliers([1.0, 3.0, 2.0], [0.1, 0.2, 0.3], [4.0, 5.0, 6.0], 2)
    assert [tuple(r) for r in rows] == [(1, 3.0, 0.2, 5.0), (2, 2.0, 0.3, 6.0)]
    assert histogram([-9.0, -7.9, 3.9, 50.0, np.nan], LOG_NORM_BINS) == [2, *[0] * 22, 2]
    assert histogram([-1.0, 0.0, 1.0], COSINE_BINS) == [1, *[0] * 9, 1, *[0] * 8, 1]


# --- meta-gradients ---


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("chunk", "derivative"), [(None, reverse), (2, reverse), (1, first_order)])
def test_per_task_gradients_are_the_closed_form_of_each_task(chunk, derivative):
    tasks, params = quadratics(0), np.array([0.3, -0.2, 0.1, 0.5])
    objective = query_loss(quadratic_loss, unroll(optax.sgd(0.1), 3, derivative))
    values, gradients = per_task_gradients(objective, jnp.asarray(params), tasks, jax.random.split(KEY, 3), chunk=chunk)
    for i in range(3):
        task = jax.tree.map(lambda x, i=i: x[i : i + 1], tasks)
        expected = closed_form(task, params, 0.1, 3, first_order=derivative is first_order)
        np.testing.assert_allclose(gradients[i], expected, rtol=1e-10)
        adapted, _ = gradient_descent(Quadratic(*(np.asarray(x[i]) for x in tasks.support)), params, 0.1, 3)
        away = adapted - np.asarray(tasks.query[1][i])
        np.testing.assert_allclose(values[i], 0.5 * away @ np.asarray(tasks.query[0][i]) @ away, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("derivative", "norm", "steps"), [(reverse, "batch", 2), (mixed, "batch", 2), (reverse, "support", 1)]
)
def test_the_meta_gradients_of_queries_average_to_that_of_the_task(derivative, norm, steps):
    loss, params, task = line(offset)
    adapt = unroll(optax.sgd(0.1), steps, derivative)
    objective = query_loss(weighted(loss), adapt, norm)
    losses, gradients = jax.jit(partial(per_query_gradients, objective))(params, task, KEY)
    plain = query_loss(loss, adapt, norm)
    (value, _), expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(params, task, KEY, jnp.int32(0))
    assert losses.shape == (7,)
    np.testing.assert_allclose(losses.mean(), value, rtol=1e-10)
    np.testing.assert_allclose(rows_of(gradients).mean(0), vector(expected), atol=1e-10)
    if derivative is reverse and norm == "batch":
        one = lambda p: loss.per_example(adapt(loss, p, task.support, KEY).params, task.query, KEY)[3]  # noqa: E731
        np.testing.assert_allclose(rows_of(gradients)[3], vector(jax.jit(jax.grad(one))(params)), atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm", [None, offset])
def test_influence_is_the_derivative_of_the_reweighted_program(norm):
    loss, params, task = line(norm)
    objective = query_loss(weighted(loss), unroll(optax.sgd(0.2), 2))

    @jax.jit
    def program(weights):  # by hand, with no part of what is tested
        def support(p):
            return (weights * loss.per_example(p, task.support, KEY)).mean()

        p = params
        for _ in range(2):
            p = jax.tree.map(lambda x, g: x - 0.2 * g, p, jax.grad(support)(p))
        return loss(p, task.query, KEY)[0]

    ones, epsilon = np.ones(6), 1e-5
    expected = [(program(ones + epsilon * e) - program(ones - epsilon * e)) / (2 * epsilon) for e in np.eye(6)]
    found = jax.jit(partial(influence, objective))(params, task, KEY)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert np.abs(found).min() > 1e-6
    if norm is None:
        blind = query_loss(weighted(loss), unroll(optax.sgd(0.2), 2, first_order))
        assert not np.asarray(jax.jit(partial(influence, blind))(params, task, KEY)).any()


@pytest.mark.usefixtures("x64")
def test_influence_through_prototypes_is_that_of_the_weighted_class_means():
    apply, params = functional(MLP((2,), 2, hidden=(5,), kernel_init=nnx.initializers.normal(0.7), rngs=nnx.Rngs(1)))
    params, x = wide(params), jnp.asarray(np.random.default_rng(2).normal(size=(11, 2)))
    labels = jnp.array([0, 1, 1, 0, 1, 0])
    task = Task((x[:6], labels), (x[6:], labels[:5]))
    objective = query_loss(weighted(cross_entropy(apply)), with_prototypes(unroll(optax.sgd(0.1), 0)))
    features, query = (np.asarray(apply.features(params, side[0])) for side in task)

    def program(weights):
        means = np.stack([np.average(features[labels == k], 0, weights[labels == k]) for k in (0, 1)])
        logits = -((query[:, None] - means[None]) ** 2).sum(-1)
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(5), labels[:5]])

    expected = [(program(1 + 1e-5 * e) - program(1 - 1e-5 * e)) / 2e-5 for e in np.eye(6)]
    found = jax.jit(partial(influence, objective))(params, task, KEY)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert np.abs(found).max() > 1e-4


def test_only_means_over_examples_can_be_weighted():
    with pytest.raises(ValueError, match="weighted.*per_example"):
        weighted(quadratic_loss)
    with pytest.raises(ValueError, match="no semi-gradient"):
        weighted(semi_gradient(lambda p, t, b, k: (p, {})))  # noqa: ARG005


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("axis", "alone"), [(None, False), (0, True)])
def test_inputs_that_are_quantized_by_the_range_of_the_batch_are_its_statistics(axis, alone):
    model = MLP((2,), 1, hidden=(5,), rngs=nnx.Rngs(1))
    apply, params = functional(quantize(model, inputs=uniform(3, symmetric=False, axis=axis)))
    assert apply.batch_statistics is not alone
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)))
    loss, params, batch = mse(apply), wide(params), (x, x.sum(1, keepdims=True))
    _, rows = per_example_gradients(loss, params, batch, KEY)
    whole = jax.grad(lambda p: loss(p, batch, KEY)[0])(params)
    jax.tree.map(lambda r, w: np.testing.assert_allclose(r.mean(0), w, atol=1e-12), rows, whole)

"""Quantizers: values, derivatives of every order against the frozen-residual program, what they did, integers."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml import quantization as q
from maml.derivatives import first_order, mixed, reverse
from maml.inner_loop import only, unroll
from maml.objectives import query_loss
from maml.types import Task
from tests.helpers import central_difference, random_like, twins

KEY = jax.random.key(0)
QUARTER = q.uniform(4, scale=0.25)  # sixteen points, -2 to 1.75

GRIDS = {
    "symmetric": q.uniform(4),
    "asymmetric": q.uniform(3, symmetric=False),
    "channel": q.uniform(2, axis=-1),
    "asymmetric_channel": q.uniform(8, symmetric=False, axis=0),
    "fixed": QUARTER,
    "clip": q.uniform(4, scale=0.25, clip=True),
    "zero_point": q.uniform(4, scale=0.25, zero_point=3, clip=True),
    "binary": q.binary(),
    "binary_clip": q.binary(0, clip=True),
    "ternary": q.ternary(-1),
}


def normal(seed: int, *shape: int, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# --- values ---


@pytest.mark.parametrize("scale", [0.25, 0.1])
def test_no_value_is_off_the_grid_also_under_jit(scale):
    """Where the grid clips, x + stop(q - x) is not on it."""
    x, quantizer = normal(0, 200_000, dtype=np.float32) * 3, q.uniform(4, scale=scale, clip=True)
    step = np.float32(scale)
    levels = np.arange(-8, 8).astype(np.float32) * step
    expected = levels[np.clip(np.round(np.asarray(x) / step), -8, 7).astype(int) + 8]
    for f in (quantizer, jax.jit(quantizer), jax.jit(lambda x: q.lsq(x, scale, 4))):
        np.testing.assert_array_equal(f(x), expected)
    _, value = jax.jit(jax.grad(lambda x: (jnp.sum(y := quantizer(x)), y), has_aux=True))(x)
    np.testing.assert_array_equal(value, expected)
    usual = np.asarray(jax.jit(lambda x: x + jax.lax.stop_gradient(quantizer(x) - x))(x))
    assert (len(np.unique(usual)) > 16) == (scale == 0.1)


@pytest.mark.parametrize(("bits", "axis"), [(2, None), (4, 0), (8, -1)])
def test_grids_found_from_x_are_those_of_numpy(bits, axis):
    x = np.random.default_rng(1).normal(size=(5, 7, 3)).astype(np.float32) + np.float32(0.5)
    over = tuple(i for i in range(3) if axis is None or i != axis % 3)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    scale = np.abs(x).max(over, keepdims=True) / np.float32(high)
    codes = np.round(x / scale)
    encoded = q.uniform(bits, axis=axis).encode(jnp.asarray(x))
    np.testing.assert_array_equal(encoded.codes, codes)
    assert encoded.codes.dtype == jnp.int8
    np.testing.assert_allclose(q.uniform(bits, axis=axis)(jnp.asarray(x)), codes * scale, rtol=1e-6)

    most, least = np.maximum(x.max(over, keepdims=True), 0), np.minimum(x.min(over, keepdims=True), 0)
    scale = (most - least) / np.float32(high - low)
    zero = np.round(low - least / scale)
    codes = np.clip(np.round(x / scale) + zero, low, high)
    quantizer = q.uniform(bits, symmetric=False, axis=axis)
    encoded = quantizer.encode(jnp.asarray(x))
    np.testing.assert_array_equal(encoded.codes, codes)
    np.testing.assert_array_equal(encoded.zero_point, zero)
    np.testing.assert_allclose(quantizer(jnp.asarray(x)), (codes - zero) * scale, rtol=1e-6)
    assert (
        np.abs(np.asarray(quantizer(jnp.asarray(x))) - x).max() <= 0.5001 * scale.max() * 2
    )  # the ends: one more half step


@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "channel", "binary", "ternary"])
def test_zeros_stay_zeros_and_types_stay(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        zeros = GRIDS[name](jnp.zeros((2, 3), dtype))
        assert zeros.dtype == dtype
        np.testing.assert_array_equal(zeros, 0)


def test_binary_and_ternary_by_hand():
    x = jnp.array([[1.0, -3.0, 0.0], [0.5, 0.5, -2.0]])
    np.testing.assert_allclose(q.binary(0)(x), [[4 / 3, -4 / 3, 4 / 3], [1, 1, -1]], rtol=1e-6)
    np.testing.assert_array_equal(q.binary().encode(x).codes, [[1, -1, 1], [1, 1, -1]])
    np.testing.assert_allclose(q.ternary(0)(x), [[2, -2, 0], [0, 0, -2]], rtol=1e-6)  # over 0.7 of 4/3, and of 1


def test_stochastic_rounding_is_unbiased_and_the_keys():
    quantizer = q.uniform(4, scale=0.25, stochastic=True)
    x = jnp.array([0.7, -0.05, 1.0, 0.3125])
    draws = jax.jit(jax.vmap(lambda key: quantizer(x, key)))(jax.random.split(KEY, 20_000))
    assert set(np.unique(draws[:, 0])) == {0.5, 0.75}
    np.testing.assert_array_equal(draws[:, 2], 1.0)
    up = np.array([0.8, 0.8, 0.0, 0.25])  # the fractional parts of x / 0.25
    deviation = 0.25 * np.sqrt(up * (1 - up) / 20_000)
    assert np.all(np.abs(draws.mean(0) - x) <= 4 * deviation + 1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: (quantizer(x, KEY) ** 2).sum())(x), 2 * quantizer(x, KEY))


# --- derivatives ---


def surrogate(name: str, x):
    """y(x) of the frozen-residual model, and its derivative."""
    bounds = {"clip": (-2, 1.75), "zero_point": (-2.75, 1.0), "binary_clip": (-1, 1)}.get(name)
    if bounds is None:
        return x, jnp.ones_like(x)
    return jnp.clip(x, *bounds), ((x >= bounds[0]) & (x <= bounds[1])).astype(x.dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", GRIDS)
def test_derivatives_are_those_of_the_frozen_residual_program(name):
    """L(q) = (w·q)³/6 + Σq⁴/24 has gradient (w·q)²/2 w + q³/6 and Hessian (w·q) w wᵀ + diag(q²/2)."""
    quantizer, x, w, along = GRIDS[name], normal(2, 3, 4) * 1.2, normal(3, 3, 4), normal(4, 3, 4)

    def loss(x):
        y = quantizer(x)
        return jnp.sum(w * y) ** 3 / 6 + jnp.sum(y**4) / 24

    second = (jax.jacfwd, jax.jacrev) if name in ("clip", "asymmetric") else (jax.jacfwd,)

    @jax.jit
    def derivatives(x):
        return jax.grad(loss)(x), jax.jvp(loss, (x,), (along,))[1], [mode(jax.grad(loss))(x) for mode in second]

    gradient, forward, hessians = derivatives(x)
    y, w, along, slope = (np.asarray(a).reshape(12) for a in (quantizer(x), w, along, surrogate(name, x)[1]))
    expected = slope * ((w @ y) ** 2 / 2 * w + y**3 / 6)
    np.testing.assert_allclose(gradient.reshape(12), expected, atol=1e-8)
    assert float(forward) == pytest.approx(expected @ along, abs=1e-8)
    dense = slope[:, None] * ((w @ y) * np.outer(w, w) + np.diag(y**2 / 2)) * slope
    for found in hessians:
        np.testing.assert_allclose(found.reshape(12, 12), dense, atol=1e-8)
        np.testing.assert_allclose(found.reshape(12, 12), found.reshape(12, 12).T, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_minimal_case():
    """L(q) = (q³ - 1)²/2 at w = 0.7, q = 0.75, worked by hand; custom rules that call the bare quantizer have 0 here."""

    def loss(w):
        return (QUARTER(w) ** 3 - 1) ** 2 / 2

    w, one = jnp.float64(0.7), jnp.float64(1)
    assert QUARTER(w) == 0.75
    assert jax.grad(loss)(w) == pytest.approx(-0.9755859375, abs=1e-12)
    assert jax.jvp(loss, (w,), (one,))[1] == pytest.approx(-0.9755859375, abs=1e-12)
    for second in (jax.grad(jax.grad(loss)), jax.jacfwd(jax.grad(loss)), jax.grad(jax.jacfwd(loss))):
        assert jax.jit(second)(w) == pytest.approx(0.24609375, abs=1e-12)
    assert jax.jit(jax.grad(jax.grad(jax.grad(loss))))(w) == pytest.approx(19.3125, abs=1e-12)


def parabola(params, batch, key):
    del batch, key
    value = jnp.sum((QUARTER(params) ** 2 - 2) ** 2) / 2
    return value, {"loss": value}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", [reverse, mixed, first_order])
def test_two_inner_steps_by_hand(derivative):
    adapt, theta = unroll(optax.sgd(0.1), 2, derivative), jnp.float64(0.7)
    objective = query_loss(parabola, adapt)

    def outer(theta):
        return objective(theta, Task(0.0, 0.0), KEY, 0)[0]

    path = jax.jit(lambda t: adapt(parabola, t, 0.0, KEY).trace.params)(theta)
    np.testing.assert_allclose(path, [0.7, 0.915625, 1.115625], atol=1e-12)
    np.testing.assert_array_equal(QUARTER(path), [0.75, 1, 1])
    value, gradient = jax.jit(jax.value_and_grad(outer))(theta)
    exact = 1 if derivative is first_order else 1.0625 * 0.8
    assert (float(value), float(gradient)) == pytest.approx((0.5, -2 * exact), abs=1e-12)
    if derivative is reverse:
        assert jax.jit(jax.grad(jax.grad(outer)))(theta) == pytest.approx(5.594375, abs=1e-10)
        assert jax.jit(jax.jacfwd(outer))(theta) == pytest.approx(-1.7, abs=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["symmetric", "clip"])
def test_the_meta_gradient_is_the_central_difference_of_the_frozen_program(name):
    """Three inner steps of a tanh network with quantized kernels; the real program's central differences are useless."""
    quantizer, x = GRIDS[name], normal(5, 6, 3)
    params = {"a": normal(6, 3, 4) * 1.3, "b": normal(7, 4, 2) * 1.3}
    target, alpha, steps = normal(8, 6, 2), 0.1, 3

    def network(kernels):
        return jnp.mean((jnp.tanh(x @ kernels["a"]) @ kernels["b"] - target) ** 2)

    def loss(params, batch, key):
        del batch, key
        value = network({k: quantizer(v) for k, v in params.items()})
        return value, {"loss": value}

    def objective(derivative):
        whole = query_loss(loss, unroll(optax.sgd(alpha), steps, derivative))
        return jax.jit(lambda p: whole(p, Task(0.0, 0.0), KEY, 0)[0])

    path = jax.jit(lambda p: unroll(optax.sgd(alpha), steps)(loss, p, 0.0, KEY).trace.params)(params)
    residuals = jax.jit(jax.vmap(partial(jax.tree.map, lambda x: quantizer(x) - surrogate(name, x)[0])))(path)

    @jax.jit
    def frozen(params):
        def at(params, residual):
            return network(jax.tree.map(lambda p, c: surrogate(name, p)[0] + c, params, residual))

        def step(params, residual):
            return jax.tree.map(lambda p, g: p - alpha * g, params, jax.grad(at)(params, residual)), None

        params, _ = jax.lax.scan(step, params, jax.tree.map(lambda c: c[:-1], residuals))
        return at(params, jax.tree.map(lambda c: c[-1], residuals))

    along = random_like(9, params)
    expected = central_difference(frozen, params, along)
    for derivative in (reverse, mixed) if name == "clip" else (mixed,):
        gradient = jax.jit(jax.grad(objective(derivative)))(params)
        found = sum(float(jnp.vdot(a, b)) for a, b in zip(gradient.values(), along.values(), strict=True))
        assert found == pytest.approx(expected, abs=1e-8)
    if name != "clip":
        return
    assert float(objective(reverse)(params)) == pytest.approx(float(frozen(params)), rel=1e-12)
    forward = jax.jit(lambda p: jax.jvp(objective(reverse), (p,), (along,))[1])(params)
    assert float(forward) == pytest.approx(expected, abs=1e-8)


# --- learned scales ---

W = [0.7, -0.3, 2.5, -3.0]


@pytest.mark.usefixtures("x64")
def test_lsq_by_hand():
    """s = 0.25, four bits: arXiv 1902.08153, Eq. 1 to 3."""
    w, s = jnp.array(W), jnp.float64(0.25)
    np.testing.assert_allclose(q.lsq(w, s, 4), [0.75, -0.25, 1.75, -2])
    of_w, of_s = jax.jit(jax.jacrev(lambda w, s: q.lsq(w, s, 4), (0, 1)))(w, s)
    np.testing.assert_allclose(of_w, np.diag([1.0, 1, 0, 0]), atol=1e-15)
    np.testing.assert_allclose(of_s, [0.2, 0.2, 7, -8], atol=1e-14)
    together = jnp.append(w, s)

    def loss(z):
        return jnp.sum((q.lsq(z[:4], z[4], 4) - jnp.array([1.0, 0, 1, -1])) ** 2) / 2

    assert loss(together) == pytest.approx(0.84375)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(together), [-0.25, -0.25, 0, 0, 13.15], atol=1e-13)
    jacobian = np.column_stack([np.diag([1.0, 1, 0, 0]), [0.2, 0.2, 7, -8]])
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(mode(jax.grad(loss)))(together), jacobian.T @ jacobian, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_lsq_at_the_ends_of_its_range_and_unsigned():
    ends = jnp.array([1.75, -2.0])
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda w: q.lsq(w, 0.25, 4).sum()))(ends), 0)
    of_s = jax.jit(jax.jacfwd(lambda s: q.lsq(ends, s, 4)))(jnp.float64(0.25))
    np.testing.assert_allclose(of_s, [7, -8])
    np.testing.assert_array_equal(q.lsq(jnp.array([-1.0, 0.3, 9.0]), 0.25, 2, signed=False), [0, 0.25, 0.75])
    np.testing.assert_array_equal(q.lsq(jnp.array(W), 0.25, 4), QUARTER(jnp.array(W)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("parametrization", ["softplus", "log"])
def test_a_learned_step_starts_as_in_the_paper_and_stays_positive(parametrization):
    quantizer, w = q.learned(4, parametrization=parametrization), jnp.array(W)
    parameter = quantizer.init(w)
    assert quantizer.scale(parameter) == pytest.approx(2 * np.mean(np.abs(W)) / np.sqrt(7), rel=1e-12)
    assert quantizer.scale(parameter - 30) > 0
    np.testing.assert_allclose(quantizer(w, parameter), q.lsq(w, quantizer.scale(parameter), 4))
    assert np.isfinite(quantizer.init(jnp.zeros(3)))


def valley(s, batch, key):
    del batch, key
    value = (s**2 - 3) ** 2 / 2
    return value, {"loss": value}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("signed", "parametrization"),
    twins([(True, "softplus"), (False, "log")], itertools.product((True, False), ("softplus", "log"))),
)
def test_second_derivatives_of_a_learned_step_by_hand(signed, parametrization):
    """Inside of the range y = x + s(p) c for the residual c in steps, outside y = s(p) · end: then L of y by the chain rule."""
    quantizer, x, w = q.learned(3, signed, parametrization), normal(21, 12), normal(22, 12)
    p, x = quantizer.init(x) + 0.1, x.at[:2].set([9.0, -9.0])

    def loss(z):
        y = quantizer(z[:12], z[12])
        return jnp.sum(w * y) ** 3 / 6 + jnp.sum(y**4) / 24

    z = jnp.append(x, p)
    found = jax.jit(lambda z: (jax.grad(loss)(z), jax.jacfwd(jax.grad(loss))(z), jax.jacrev(jax.grad(loss))(z)))(z)
    x, w, p, s = (np.asarray(a) for a in (x, w, p, quantizer.scale(p)))
    sigma = 1 / (1 + np.exp(-p))
    first, second = (sigma, sigma * (1 - sigma)) if parametrization == "softplus" else (s, s)
    low, high = q.lsq_range(3, signed)
    inside = (x / s > low) & (x / s < high)
    assert 0 < inside.sum() < 12
    c = np.where(inside, np.round(x / s) - x / s, np.where(x > 0, high, low))
    y = np.where(inside, x, 0) + s * c
    slope = (w @ y) ** 2 / 2 * w + y**3 / 6
    bend = (w @ y) * np.outer(w, w) + np.diag(y**2 / 2)
    jacobian = np.column_stack([np.diag(inside.astype(float)), c * first])
    hessian = jacobian.T @ bend @ jacobian
    hessian[12, 12] += slope @ c * second
    np.testing.assert_allclose(found[0], jacobian.T @ slope, atol=1e-8)
    for each in found[1:]:
        np.testing.assert_allclose(each, hessian, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_of_stochastic_rounding_are_those_at_what_was_drawn():
    quantizer, x, w, key = q.uniform(4, scale=0.25, stochastic=True), normal(23, 12), normal(24, 12), jax.random.key(3)

    def loss(x):
        y = quantizer(x, key)
        return jnp.sum(w * y) ** 3 / 6 + jnp.sum(y**4) / 24

    dense = jax.jit(jax.jacfwd(jax.grad(loss)))(x)
    y, w = np.asarray(quantizer(x, key)), np.asarray(w)
    assert np.any(y != np.asarray(q.uniform(4, scale=0.25)(x)))  # other points than rounding to nearest
    np.testing.assert_allclose(dense, (w @ y) * np.outer(w, w) + np.diag(y**2 / 2), atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_a_gradient_scale_belongs_to_the_optimizer():
    """One inner step from 1.3: in the graph g = 0.1 enters the meta-gradient twice, in the optimizer once."""
    g, s = 0.1, jnp.float64(1.3)

    def in_graph(s, batch, key):
        return valley(s * g + jax.lax.stop_gradient(s - s * g), batch, key)

    def meta_gradient(inner, optimizer):
        adapt = unroll(optimizer, 1)
        return jax.jit(jax.grad(lambda s: valley(adapt(inner, s, 0.0, KEY).params, 0.0, KEY)[0]))(s)

    program = query_loss(valley, unroll(optax.chain(optax.scale(g), optax.sgd(0.05)), 1))
    true = central_difference(jax.jit(lambda s: program(s, Task(0.0, 0.0), KEY, 0)[0]), s, jnp.float64(1))
    assert true == pytest.approx(-3.2642260271, abs=1e-8)
    assert meta_gradient(valley, optax.chain(optax.scale(g), optax.sgd(0.05))) == pytest.approx(-3.2642260271, abs=1e-9)
    assert meta_gradient(in_graph, optax.sgd(0.05)) == pytest.approx(-3.3263239857, abs=1e-9)
    assert q.lsq_gradient_scale(4, 4) == pytest.approx(0.1889822365, abs=1e-9)


# --- storage ---


def bowl(params, batch, key):
    del key
    value = sum(jnp.sum((x - batch) ** 2) for x in jax.tree.leaves(params)) / 2
    return value, {"loss": value}


@pytest.mark.usefixtures("x64")
def test_stored_parameters_are_on_the_grid_after_every_step_and_pass_derivatives_through():
    params = {"kernel": normal(10, 3, 2), "bias": normal(11, 2)}
    optimizer = optax.chain(optax.sgd(0.3), q.on_grid(QUARTER))
    path = jax.jit(lambda p: unroll(optimizer, 3)(bowl, p, 0.4, KEY).trace.params)(params)
    x, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    for t in range(3):
        x, bias = np.clip(np.round((x - 0.3 * (x - 0.4)) * 4), -8, 7) / 4, bias - 0.3 * (bias - 0.4)
        np.testing.assert_allclose(path["kernel"][t + 1], x, atol=1e-15)
        np.testing.assert_allclose(path["bias"][t + 1], bias, atol=1e-15)

    def outer(params):
        return bowl(unroll(optimizer, 3)(bowl, params, 0.4, KEY).params, -0.2, KEY)[0]

    gradient = jax.jit(jax.grad(outer))(params)  # θ₃ = 0.7³ θ + constants
    np.testing.assert_allclose(gradient["kernel"], 0.7**3 * (x + 0.2), atol=1e-12)
    np.testing.assert_allclose(gradient["bias"], 0.7**3 * (bias + 0.2), atol=1e-12)


def test_stochastic_storage_draws_at_each_step():
    """Steps of a hundredth of the grid are lost when rounded to nearest, and not on average with a key."""
    params, gradient = jnp.zeros((100, 100)), jnp.full((100, 100), -0.0025)

    def walk(optimizer, steps=20):
        def step(_, carry):
            x, state = carry
            updates, state = optimizer.update(gradient, state, x)
            return optax.apply_updates(x, updates), state

        return np.asarray(jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0])

    down = optax.scale(-1.0)
    np.testing.assert_array_equal(walk(optax.chain(down, q.on_grid(QUARTER))), 0)
    moved = walk(optax.chain(down, q.on_grid(q.uniform(4, scale=0.25, stochastic=True), key=KEY)))
    assert set(np.unique(moved)) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert moved.mean() == pytest.approx(0.05, abs=4 * 0.25 * np.sqrt(0.2) / 100)


# --- what it did ---


def test_flips_clipped_and_noise_by_hand():
    before = {"kernel": jnp.array([[0.1, 0.7, -3.0, 1.75]]), "bias": jnp.array([0.3])}
    after = {"kernel": jnp.array([[0.1, 0.9, -9.0, 1.5]]), "bias": jnp.array([9.0])}

    @jax.jit
    def found(before, after, x):
        flips = q.code_flips(before, after, QUARTER, "kernel"), q.code_flips(before, after, QUARTER)
        clipped = q.clipped_fraction(before, QUARTER, "kernel"), q.clipped_fraction(x, q.uniform(3))
        return *flips, *clipped, *(q.sqnr(tree, QUARTER, "") for tree in (before["kernel"], 0 * x, 0 * x + 1))

    of_kernels, of_all, clipped, never, noise_of_kernels, *others = found(
        before, after, normal(0, 9, 9, dtype=np.float32)
    )
    assert of_kernels == 0.5  # codes 0, 3, -8, 7 and 0, 4, -8, 6
    assert of_all == pytest.approx(0.6)
    assert (clipped, never) == (0.25, 0)
    signal, noise = 0.01 + 0.49 + 9 + 1.75**2, 0.01 + 0.0025 + 1
    assert noise_of_kernels == pytest.approx(10 * np.log10(signal / noise), rel=1e-5)
    assert np.all(np.isfinite(others))


@pytest.mark.parametrize(
    ("make", "x", "clipped"),
    [  # ends of the grid and half a step: 2 mean|x|; 1.5 times the mean of the large; -8.5/4 and 7.5/4
        (lambda: q.binary(), [0.01, 0.2, -0.3, 0.5], 0),
        (lambda: q.binary(), [0.1, -0.1, 0.1, 2.0], 0.25),
        (lambda: q.ternary(), [0.35, 0.34, 1.0, -1.0, 0.9, 0.4], 0),
        (lambda: q.ternary(), [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -3.0], 0.125),
        (lambda: q.uniform(4, scale=0.25), [-2.12, -2.13, 1.87, 1.88], 0.5),
        (lambda: q.uniform(4, scale=0.25, zero_point=-2), [-1.62, -1.63, 2.37, 2.38], 0.5),
    ],
)
def test_clipped_is_what_lies_beyond_the_ends_of_the_grid(make, x, clipped):
    assert float(q.clipped_fraction({"kernel": jnp.array(x)}, make())) == clipped


@pytest.mark.parametrize(("signed", "inside"), [(True, (-1.12, 0.87)), (False, (-0.12, 3.87))])
def test_clipped_of_a_learned_step(signed, inside):
    quantizer = q.learned(3 if signed else 4, signed=signed, parametrization="log")
    low, high = inside
    x = jnp.array([low, low - 0.01, high, high + 0.01])
    params = {"layer": {"kernel": x, "dot_general": {"scale": jnp.log(0.25)}}}
    assert float(q.clipped_fraction(params, quantizer, "kernel")) == 0.5


def test_metrics_of_the_codes_in_the_trace():
    params = {"kernel": jnp.array([[0.0, 1.0], [0.5, -0.5]]), "bias": jnp.ones(2)}

    def slope(params, batch, key):
        del key
        value = batch * params["kernel"][0, 0] + 0.0 * params["bias"].sum()
        return value, {"loss": value}

    adapt = only(lambda path, _: "kernel" in path, unroll(optax.sgd(0.1), 4))
    plain, watched = jax.jit(lambda p: [a(slope, p, 1.0, KEY) for a in (adapt, q.with_code_metrics(adapt, QUARTER))])(
        params
    )
    np.testing.assert_array_equal(watched.params["kernel"], plain.params["kernel"])
    assert set(watched.trace.metrics) == {"loss", "code_flips", "clipped", "sqnr"}
    # 0, -0.1, -0.2, -0.3, -0.4: codes 0, 0, -1, -1, -2
    np.testing.assert_array_equal(watched.trace.metrics["code_flips"], [0, 0.25, 0, 0.25])
    np.testing.assert_array_equal(watched.trace.metrics["clipped"], 0)
    objective = query_loss(slope, q.with_code_metrics(adapt, QUARTER))
    (_, metrics), _ = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, Task(1.0, 1.0), KEY, 0)
    assert metrics["support/code_flips"] == 0
    none = q.with_code_metrics(unroll(optax.sgd(0.1), 0), QUARTER)(slope, params, 1.0, KEY)
    assert none.trace.metrics["code_flips"].shape == (0,)


# --- integers ---


@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_products_are_those_of_the_fake_quantized(symmetric):
    x, kernel = jax.nn.relu(normal(12, 9, 33, dtype=np.float32)), normal(13, 33, 5, dtype=np.float32)
    of_x, of_kernel = q.uniform(8, symmetric=False, axis=0), q.uniform(8, symmetric=symmetric, axis=-1)

    @jax.jit
    def everything(x, kernel):
        codes, exported = of_x.encode(x), q.export({"kernel": kernel, "bias": jnp.ones(5)}, of_kernel)
        one_scale = q.integer_matmul(q.uniform(8).encode(x), q.uniform(4).encode(kernel))
        products = q.integer_matmul(codes, exported["kernel"]), one_scale, q.uniform(8)(x) @ q.uniform(4)(kernel)
        return dict(exported), of_x(x), of_kernel(kernel), q.decode(exported["kernel"]), products

    exported, fake_x, fake_kernel, decoded, (found, one_scale, expected) = everything(x, kernel)
    assert exported["kernel"].codes.dtype == jnp.int8
    assert exported["kernel"].scale.shape == (1, 5)
    np.testing.assert_array_equal(exported["bias"], 1)
    np.testing.assert_array_equal(decoded, fake_kernel)
    exact = np.asarray(fake_x, np.float64) @ np.asarray(fake_kernel, np.float64)
    assert np.abs(found - exact).max() <= 1e-6 * np.abs(exact).max()
    np.testing.assert_allclose(one_scale, expected, atol=1e-5)


def test_integer_products_with_powers_of_two_are_exact():
    of_x, of_kernel = q.uniform(8, scale=2**-6, zero_point=-100), q.uniform(8, scale=2**-7)
    x, kernel = jax.nn.relu(normal(14, 9, 33, dtype=np.float32)), normal(15, 33, 5, dtype=np.float32)
    found = q.integer_matmul(of_x.encode(x), of_kernel.encode(kernel))
    np.testing.assert_array_equal(found, of_x(x) @ of_kernel(kernel))


# --- errors ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: q.uniform(9), "bits=9: give a whole number from 2 to 8"),
        (lambda: q.uniform(1), r"bits=1: .* \(one bit is `binary`\)"),
        (lambda: q.uniform(0), "bits=0"),
        (lambda: q.uniform(True), "bits=True"),
        (lambda: q.uniform(4, scale=0.0), "scale=0.0: give positive steps"),
        (lambda: q.uniform(4, scale=np.array([1.0, -1.0])), "give positive steps"),
        (lambda: q.uniform(4, scale=float("nan")), "scale=nan: give positive steps"),
        (lambda: q.uniform(4, scale=1.0, zero_point=8), "zero_point=8: give a code of 4 bits, -8 to 7"),
        (lambda: q.uniform(4, zero_point=1), "need a fixed scale"),
        (lambda: q.uniform(4, clip=True), "need a fixed scale"),
        (lambda: q.uniform(4, axis=2)(jnp.ones((3, 2))), r"axis=2: an array of shape \(3, 2\) has no such axis"),
        (lambda: q.binary(-3)(jnp.ones((3, 2))), "axis=-3"),
        (lambda: q.uniform(4, stochastic=True)(jnp.ones(3)), r"give quantizer\(x, key\)"),
        (lambda: q.lsq(jnp.ones(3), 0.0, 4), "scale=0.0: give positive steps"),
        (lambda: q.lsq(jnp.ones(3), 1.0, 9, signed=False), "bits=9: give a whole number from 1 to 8"),
        (lambda: q.learned(1), "bits=1"),
        (lambda: q.learned(4, parametrization="relu"), "parametrization='relu': give one of softplus, log"),
        (lambda: q.kernel_quantizer(4, "row"), "scale='row': give channel, tensor or learned"),
        (lambda: q.kernel_quantizer(16), "bits=16"),
        (lambda: q.input_quantizer(1), "bits=1"),
        (lambda: q.on_grid(QUARTER).update(jnp.ones(3), 0), "params=None: on_grid needs them"),
        (lambda: q.code_flips(*[{"a": jnp.ones(2)}] * 2, QUARTER, "kernel"), "where='kernel': .* the paths are a"),
        (lambda: q.export({"a": jnp.ones(2)}, QUARTER), "the paths are a"),
        (
            lambda: q.integer_matmul(*(q.uniform(4, axis=-1).encode(jnp.ones((3, 3))) for _ in range(2))),
            r"x: codes \(3, 3\), scale \(1, 3\); give matrices with one scale",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

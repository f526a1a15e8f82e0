"""Curvature against closed forms, dense matrices and SciPy; reference values in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
from flax import nnx

from maml import curvature
from maml.curvature import (
    adaptation_path,
    diagonal,
    efvp,
    filter_normalised,
    first_order_comparison,
    ggnvp,
    hvp,
    lanczos,
    largest_update_singular_values,
    matvec_over_batches,
    of_loss,
    over_batches,
    restricted,
    sharpness,
    slice_1d,
    slice_2d,
    spectra,
    spectral_density,
    stable_step_size,
    trace,
    update_singular_values,
)
from maml.derivatives import first_order, mixed, reverse
from maml.inner_loop import learned_step_sizes, only, per_step, unroll
from maml.losses import cross_entropy, mse, semi_gradient, td0
from maml.models import MLP, functional
from maml.objectives import query_loss
from maml.types import Task, initial
from tests.helpers import Quadratic, gradient_descent, quadratic_loss, quadratics, random_like, twins

KEY = jax.random.key(0)


def hessian(f, params, **options):
    return jax.jit(lambda p: curvature.hessian(f, p, **options))(params)


R3 = np.array([[2, 0.5, 0], [0.5, 1, 0.25], [0, 0.25, 3]])
R3_EIGENVALUES = [0.768914001995, 2.196233508129, 3.034852489876]


def times(matrix):
    return lambda v: jnp.asarray(matrix, v.dtype) @ v


def symmetric(seed: int, size: int) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(size, size))
    return (a + a.T) / 2


def classifier(dtype=jnp.float64, hidden=(6,)):
    apply, params = functional(MLP((3,), 4, hidden=hidden, kernel_init=nnx.initializers.normal(0.7), rngs=nnx.Rngs(0)))
    labels = jnp.arange(5) % 4
    batch = (random_like(1, jnp.zeros((5, 3), dtype)), labels)
    return apply, jax.tree.map(lambda x: x.astype(dtype), params), batch


def dense(matvec, like):
    """The matrix of a product, column by column."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    columns = jax.jit(jax.vmap(lambda e: jax.flatten_util.ravel_pytree(matvec(unravel(e)))[0]))
    return np.asarray(columns(jnp.eye(flat.size, dtype=flat.dtype))).T


# Dense matrices.


@pytest.mark.usefixtures("x64")
def test_the_hessian_of_logistic_linear_and_softmax_regression():
    x = np.random.default_rng(0).normal(size=(7, 3))
    w = np.array([0.3, -1.0, 0.5])
    p = 1 / (1 + np.exp(-x @ w))
    logistic = hessian(lambda w: jnp.mean(jax.nn.softplus(x @ w) - jnp.arange(7) % 2 * (x @ w)), jnp.asarray(w))
    np.testing.assert_allclose(logistic.values, x.T @ np.diag(p * (1 - p)) @ x / 7, atol=1e-15)
    linear = hessian(lambda w: jnp.mean((x @ w - 1.0) ** 2), jnp.asarray(w))
    np.testing.assert_allclose(linear.values, 2 / 7 * x.T @ x, atol=1e-14)
    weights = np.random.default_rng(1).normal(size=(3, 4))
    softmax = hessian(lambda w: jax.nn.logsumexp(x[0] @ w), jnp.asarray(weights))
    q = np.exp(x[0] @ weights) / np.exp(x[0] @ weights).sum()
    np.testing.assert_allclose(softmax.values, np.kron(np.outer(x[0], x[0]), np.diag(q) - np.outer(q, q)), atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_rows_and_blocks_have_names():
    _, params, _ = classifier()
    leaves = curvature.paths(params)

    def f(params):
        return sum((i + 1) * jnp.sum(x**2) for i, x in enumerate(curvature.paths(params).values())) / 2

    matrix = hessian(f, params)
    assert list(leaves) == ["head/bias", "head/kernel", "layers/0/bias", "layers/0/kernel"]
    assert matrix.labels[:2] == ["head/bias[0]", "head/bias[1]"]
    assert len(matrix.labels) == len(matrix.values) == 6 + 18 + 4 + 24
    np.testing.assert_array_equal(matrix.block("0/kernel"), 4 * np.eye(18))
    np.testing.assert_array_equal(matrix.block("head"), np.diag([1.0] * 4 + [2.0] * 24))
    assert matrix.block("0/kernel", "bias").shape == (18, 10)
    assert curvature.hessian(f, params).labels == matrix.labels
    with pytest.raises(ValueError, match="'conv' matches no parameter; the paths are head/bias, "):
        matrix.block("conv")


def test_a_hessian_too_large_to_be_dense_is_refused():
    with pytest.raises(ValueError, match=r"100000 parameters make a matrix of 40 GB, over limit=2 GB: use lanczos"):
        hessian(lambda x: jnp.sum(x**2), jnp.zeros(100_000))


@pytest.mark.usefixtures("x64")
def test_a_part_of_the_parameters():
    apply, params, batch = classifier()
    f = of_loss(cross_entropy(apply), batch, KEY)
    whole = hessian(f, params)
    np.testing.assert_allclose(hessian(*restricted(f, params, "0/")).values, whole.block("0/"), atol=1e-13)
    np.testing.assert_allclose(dense(hvp(*restricted(f, params, "bias")), restricted(f, params, "bias")[1]),
                               whole.block("bias"), atol=1e-13)  # fmt: skip
    with pytest.raises(ValueError, match="'norms' matches no parameter"):
        restricted(f, params, "norms")


# Products.


@pytest.mark.usefixtures("x64")
def test_products_are_those_of_the_dense_matrices():
    apply, params, (inputs, labels) = classifier()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    f = of_loss(cross_entropy(apply), (inputs, labels), KEY)
    expected = jax.jacfwd(jax.grad(lambda x: f(unravel(x))))(flat)
    for mode in ("fwd_over_rev", "rev_over_rev", "rev_over_fwd"):
        np.testing.assert_allclose(dense(hvp(f, params, mode), params), expected, atol=1e-13)
    jacobian = jax.jacrev(lambda x: apply(unravel(x), inputs))(flat).reshape(20, -1)

    def judge(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    inner = jax.hessian(judge)(apply(params, inputs)).reshape(20, 20)
    ours = dense(ggnvp(lambda p: apply(p, inputs), judge, params), params)
    np.testing.assert_allclose(ours, jacobian.T @ inner @ jacobian, atol=1e-13)

    def each(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs), labels)

    rows = jax.jacrev(lambda x: each(unravel(x)))(flat)
    np.testing.assert_allclose(dense(efvp(each, params), params), rows.T @ rows / 5, atol=1e-13)
    with pytest.raises(ValueError, match="mode='reverse'"):
        hvp(f, params, "reverse")


@pytest.mark.usefixtures("x64")
def test_batches_of_data_are_one_mean():
    apply, params, _ = classifier()
    batches = (random_like(3, jnp.zeros((3, 4, 3))), jnp.asarray(np.arange(12).reshape(3, 4) % 4))
    loss = cross_entropy(apply)
    together = of_loss(loss, jax.tree.map(lambda x: x.reshape(12, *x.shape[2:]), batches), KEY)
    v = random_like(4, params)
    a, b = hvp(over_batches(loss, batches, KEY), params)(v), hvp(together, params)(v)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-13), a, b)
    inputs, labels = (x.reshape(12, *x.shape[2:]) for x in batches)

    def each(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def gauss_newton(batch):
        return ggnvp(lambda p: apply(p, batch[0]), lambda logits: each(logits, batch[1]).mean(), params)

    def fisher(batch):
        return efvp(lambda p: each(apply(p, batch[0]), batch[1]), params)

    for product in (gauss_newton, fisher):
        a, b = jax.jit(matvec_over_batches(product, batches))(v), product((inputs, labels))(v)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-13), a, b)
    uneven = matvec_over_batches(fisher, batches, jnp.asarray([0.0, 4.0, 0.0]))(v)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-13), uneven, fisher(jax.tree.map(lambda x: x[1], batches))(v)
    )
    weights = jnp.asarray([1.0, 2.0, 5.0])  # a mean over examples, not the sum, and not the last batch
    values = [of_loss(loss, jax.tree.map(lambda x, i=i: x[i], batches), KEY)(params) for i in range(3)]
    assert over_batches(loss, batches, KEY, weights)(params) == pytest.approx(float(weights @ jnp.stack(values)) / 8)


@semi_gradient
def bootstrapped(params, target, batch, key):
    del key
    value = jnp.mean((batch @ params - 0.9 * batch @ target) ** 2)
    return value, {"loss": value}


@pytest.mark.parametrize("wrong", [{"probes": 0}, {"bandwidth": 0.0}, {"bandwidth": -1.0}])
def test_a_density_without_probes_or_width_is_refused(wrong):
    with pytest.raises(ValueError, match="give a probe or more, and a positive bandwidth"):
        spectral_density(times(np.eye(3)), jnp.zeros(3), 2, **{"probes": 2, "key": KEY} | wrong)


def test_a_semi_gradient_has_no_hessian():
    for refused in (of_loss, over_batches):
        with pytest.raises(ValueError, match="semi-gradient: its Jacobian is not symmetric"):
            refused(bootstrapped, jnp.ones((2, 3)), KEY)
        with pytest.raises(ValueError, match="semi-gradient: its Jacobian is not symmetric"):
            refused(td0(lambda p, x: x @ p, target="stop"), jnp.ones((2, 3)), KEY)  # its steps are TD(0)'s too
    with pytest.raises(ValueError, match="semi-gradient"):
        adaptation_path(unroll(optax.sgd(0.1), 1), bootstrapped, jnp.ones(3), jnp.ones((2, 3)), KEY)

    def penalized(params, batch, key):
        value, metrics = bootstrapped(params, batch, key)
        return value + params @ params, metrics

    with pytest.raises(ValueError, match="semi-gradient: its Jacobian is not symmetric"):
        hvp(of_loss(penalized, jnp.ones((2, 3)), KEY), jnp.ones(3))


# Lanczos.


@pytest.mark.usefixtures("x64")
def test_reference_eigenvalues_and_the_stable_step():
    found = lanczos(times(R3), jnp.zeros(3), 3, KEY)
    np.testing.assert_allclose(found.values, R3_EIGENVALUES, atol=1e-11)
    step = stable_step_size(times(R3), jnp.zeros(3), 3, KEY)
    assert step.step_size == pytest.approx(0.659010613093, abs=1e-11)
    assert step.low <= step.step_size <= step.high
    with_momentum = stable_step_size(times(R3), jnp.zeros(3), 3, KEY, momentum=0.5)
    assert with_momentum.step_size == pytest.approx(1.5 * 0.659010613093, abs=1e-11)
    assert stable_step_size(times(-R3), jnp.zeros(3), 3, KEY).step_size == np.inf  # nothing curves upwards
    with pytest.raises(ValueError, match=r"momentum=1.0: give 0 or more"):
        stable_step_size(times(R3), jnp.zeros(3), 3, KEY, momentum=1.0)


@pytest.mark.parametrize(
    ("diagonal_of", "k", "largest", "breakdown"),
    [
        ([3, 2, 1] + [0] * 60, 30, [1, 2, 3], 4),
        ([3, 3, 3, 2, 1] + [0] * 58, 20, [1, 2, 3, 3, 3], 4),
        ([0] * 10, 5, [0], 1),
        ([1] * 10, 10, [1] * 10, 1),
        ([5, -7] + [1e-3] * 8, 10, [5], 3),
    ],
)
def test_lanczos_beyond_the_krylov_space(diagonal_of, k, largest, breakdown):
    diagonal_of = np.asarray(diagonal_of, np.float32)
    found = jax.jit(lambda key: lanczos(times(np.diag(diagonal_of)), jnp.zeros(len(diagonal_of)), k, key))(KEY)
    np.testing.assert_allclose(found.values[-len(largest) :], largest, atol=2e-5)
    assert diagonal_of.min() - 2e-5 <= found.values[0]
    assert found.values[-1] <= diagonal_of.max() + 2e-5
    assert int(found.breakdown) == breakdown
    assert found.residuals.max() <= 1e-5
    assert found.weights.sum() == pytest.approx(1, abs=1e-5)
    gram = found.vectors @ found.vectors.T
    np.testing.assert_allclose(gram, np.eye(k), atol=1e-5)


@pytest.mark.parametrize("k", twins((100,), (20, 40, 100)))
def test_a_few_shot_gauss_newton_matrix_far_beyond_its_rank(k):
    """5-way 1-shot: rank 20 of 533 parameters, in float32."""
    apply, params = functional(
        MLP((16,), 5, hidden=(24,), kernel_init=nnx.initializers.glorot_normal(), rngs=nnx.Rngs(1))
    )
    inputs, labels = random_like(2, jnp.zeros((5, 16))), jnp.arange(5)

    def judge(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    product = ggnvp(lambda p: apply(p, inputs), judge, params)
    matrix = np.asarray(dense(product, params), np.float64)
    exact = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert (exact > 1e-5 * exact[-1]).sum() <= 20
    found = lanczos(product, params, k, KEY)
    assert len(matrix) == 533
    assert found.values[-1] <= exact[-1] * (1 + 1e-5)
    assert found.values[0] >= -1e-5 * exact[-1]
    if k > 20:
        np.testing.assert_allclose(found.values[-10:], exact[-10:], rtol=1e-4)
        assert 20 <= int(found.breakdown) <= 24


@pytest.mark.usefixtures("x64")
def test_eigenvalues_are_those_of_dense_matrices_and_of_scipy():
    apply, params, batch = classifier()
    f = of_loss(cross_entropy(apply), batch, KEY)
    exact = np.linalg.eigvalsh(hessian(f, params).values)  # of low rank: 5 examples
    found = jax.jit(lambda k: lanczos(hvp(f, params), params, 52, k))(KEY)
    np.testing.assert_allclose(found.values, exact, atol=1e-10 * np.abs(exact).max())
    assert found.values[0] < 0 < found.values[-1]  # both ends of an indefinite matrix
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = jax.jit(lambda v: jax.flatten_util.ravel_pytree(hvp(f, params)(unravel(v)))[0])
    operator = scipy.sparse.linalg.LinearOperator((flat.size,) * 2, matvec=product, dtype=np.float64)
    theirs = scipy.sparse.linalg.eigsh(operator, k=4, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(found.values[-4:], np.sort(theirs), rtol=1e-9)
    vectors = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(v)[0])(found.vectors)
    np.testing.assert_allclose(hessian(f, params).values @ vectors[-1], found.values[-1] * vectors[-1], atol=1e-10)


def test_residuals_bound_the_error_before_convergence():
    matrix = symmetric(3, 80)
    exact = np.linalg.eigvalsh(matrix)
    found = lanczos(times(matrix), jnp.zeros(80), 12, KEY)
    distance = np.abs(np.asarray(found.values)[:, None] - exact[None]).min(1)
    assert (distance <= found.residuals + 1e-5).all()
    assert found.residuals.max() > 0.1  # not converged, and it says so
    assert int(found.breakdown) == 12


def test_under_a_map_over_tasks_each_has_its_own_spectrum():
    matrices = jnp.stack([jnp.asarray(symmetric(i, 12), jnp.float32) for i in range(3)])
    mapped = jax.jit(jax.vmap(lambda m: lanczos(times(m), jnp.zeros(12), 12, KEY).values))(matrices)
    np.testing.assert_allclose(mapped, np.linalg.eigvalsh(np.asarray(matrices)), atol=2e-5)


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_that_is_no_number_of_steps_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k}: there are 3 parameters; give 1 to 3 steps"):
        lanczos(times(R3), jnp.zeros(3), k, KEY)


@pytest.mark.usefixtures("x64")
def test_the_quadrature_is_exact_for_the_moments_that_it_should_be_and_no_more():
    """From each basis vector, Σ w θᵖ is (Aᵖ)ᵢᵢ, so that their sum is tr Aᵖ, for p up to 2k - 1."""
    matrix = symmetric(5, 12)
    runs = jax.jit(jax.vmap(lambda e: lanczos(times(matrix), e, 4, KEY, start=e)))(jnp.eye(12))
    for p in range(9):
        ours = float((runs.weights * runs.values**p).sum())
        exact = np.trace(np.linalg.matrix_power(matrix, p))
        assert (ours == pytest.approx(exact, rel=1e-9, abs=1e-9)) == (p <= 7), p


@pytest.mark.usefixtures("x64")
def test_the_density_has_the_moments_of_the_spectrum():
    values = np.concatenate([np.full(40, -1.0), np.full(60, 2.0)])
    found = spectral_density(times(np.diag(values)), jnp.zeros(100), 5, 30, KEY, bandwidth=0.05)
    step = found.grid[1] - found.grid[0]
    assert float(found.density.sum() * step) == pytest.approx(1, abs=1e-3)
    assert float((found.density * found.grid).sum() * step) == pytest.approx(values.mean(), abs=0.1)
    assert found.nodes.shape == found.weights.shape == (30, 5)
    assert float(found.grid[jnp.argmax(found.density)]) == pytest.approx(2, abs=0.05)
    assert found.nodes.min() >= -1 - 1e-10
    assert found.nodes.max() <= 2 + 1e-10


@pytest.mark.usefixtures("x64")
def test_trace_and_diagonal_come_with_their_errors():
    matrix = symmetric(7, 20)
    off = matrix - np.diag(np.diag(matrix))
    found = trace(times(matrix), jnp.zeros(20), 4000, KEY)
    deviation = np.sqrt(2 * (off**2).sum() / 4000)  # the variance of Hutchinson's estimate in closed form
    assert found.standard_error == pytest.approx(deviation, rel=0.05)
    assert abs(found.mean - np.trace(matrix)) < 4 * deviation
    entries = diagonal(times(matrix), jnp.zeros(20), 4000, KEY)
    np.testing.assert_allclose(entries.standard_error, np.sqrt((off**2).sum(1) / 4000), rtol=0.1)
    assert (np.abs(entries.mean - np.diag(matrix)) < 5 * entries.standard_error).all()
    exact = diagonal(times(np.diag(np.arange(20.0))), jnp.zeros(20), 2, KEY)
    np.testing.assert_array_equal(exact.mean, np.arange(20.0))
    with pytest.raises(ValueError, match="probes=1: give 2 or more"):
        trace(times(matrix), jnp.zeros(20), 1, KEY)


# The meta-objective and the inner loop.


@pytest.mark.usefixtures("x64")
def test_the_meta_objective_of_a_quartic_is_concave_where_both_losses_are_convex():
    """t⁴/4, one step of 0.1, t²/2 at t = 1: F = 0.405, F' = 0.63, F'' = -0.05 through the third derivative."""

    def loss(t, side, key):
        del key
        value = jnp.where(side == 0, t**4 / 4, t**2 / 2)
        return value, {"loss": value}

    for derivative, mode in ((reverse, "fwd_over_rev"), (mixed, "rev_over_rev"), (first_order, "fwd_over_rev")):
        objective = query_loss(loss, unroll(optax.sgd(0.1), 1, derivative))

        def f(t, objective=objective):
            return objective(t, Task(jnp.int32(0), jnp.int32(1)), KEY, 0)[0]

        t = jnp.float64(1)
        assert f(t) == pytest.approx(0.405)
        assert jax.grad(f)(t) == pytest.approx(0.9 if derivative is first_order else 0.63)
        if derivative is not first_order:
            assert hvp(f, t, mode)(jnp.float64(1)) == pytest.approx(-0.05)


A, B = np.diag([1.0, 2.0, 4.0]), np.diag([3.0, 1.0, 2.0])
R2_TASK = Task((A, np.array([1, -1, 0.5])), (B, np.array([0, 0.5, -0.5])))
R2_START = np.array([0.2, 0.4, -0.6])


def r2(derivative, start=R2_START):
    adapt = unroll(optax.sgd(0.1), 3, derivative)
    task = jax.tree.map(jnp.asarray, R2_TASK)
    return lambda p: query_loss(quadratic_loss, adapt)(p, task, KEY, 0)[0], jnp.asarray(start)


@pytest.mark.usefixtures("x64")
def test_the_meta_hessian_of_a_quadratic_is_its_closed_form():
    f, start = r2(reverse)
    assert f(start) == pytest.approx(1.14853824)
    np.testing.assert_allclose(jax.grad(f)(start), [0.9115416, -0.4009984, 0.3293568], atol=1e-12)
    np.testing.assert_allclose(jax.grad(r2(first_order)[0])(start), [1.2504, -0.7832, 1.5248], atol=1e-12)
    adapted = unroll(optax.sgd(0.1), 3)(quadratic_loss, start, jax.tree.map(jnp.asarray, R2_TASK.support), KEY).params
    np.testing.assert_allclose(adapted, [0.4168, -0.2832, 0.2624], atol=1e-12)
    np.testing.assert_allclose(hessian(f, start).values, np.diag([1.594323, 0.262144, 0.093312]), atol=1e-12)
    np.testing.assert_allclose(dense(hvp(r2(mixed)[0], start, "rev_over_rev"), start),
                               np.diag([1.594323, 0.262144, 0.093312]), atol=1e-12)  # fmt: skip
    move = np.linalg.matrix_power(np.eye(3) - 0.1 * R3, 3)
    task = Task((jnp.asarray(R3), jnp.zeros(3)), (jnp.asarray(B), jnp.zeros(3)))
    objective = query_loss(quadratic_loss, unroll(optax.sgd(0.1), 3))
    found = lanczos(hvp(lambda p: objective(p, task, KEY, 0)[0], start), start, 3, KEY)
    np.testing.assert_allclose(found.values, [0.22295080308, 0.438619293862, 0.978991147931], atol=1e-11)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(move @ B @ move), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_first_order_beside_the_full_meta_gradient():
    start = jnp.asarray(R2_START)
    found = first_order_comparison(r2(reverse)[0], r2(first_order)[0], start)
    full, cut = np.array([0.9115416, -0.4009984, 0.3293568]), np.array([1.2504, -0.7832, 1.5248])
    assert found.cosine == pytest.approx(full @ cut / np.linalg.norm(full) / np.linalg.norm(cut))
    assert found.norm_ratio == pytest.approx(np.linalg.norm(cut) / np.linalg.norm(full))


def test_small_gradients_have_a_cosine_too():
    """In float32 the product of their squares is 0."""
    found = first_order_comparison(lambda p: 1e-12 * p @ p, lambda p: 2e-12 * p @ p, jnp.array([1.0, 2.0]))
    assert (float(found.cosine), float(found.norm_ratio)) == pytest.approx((1.0, 2.0), rel=1e-5)


@pytest.mark.usefixtures("x64")
def test_two_over_the_largest_eigenvalue_is_where_gradient_descent_begins_to_diverge():
    support = jax.tree.map(jnp.asarray, R2_TASK.support)
    f = of_loss(quadratic_loss, support, KEY)
    start = jnp.asarray(R2_START)
    assert stable_step_size(hvp(f, start), start, 3, KEY).step_size == pytest.approx(0.5, abs=1e-12)
    for rate, distance in ((0.49, 3.13068443e-4), (0.50, 1.1), (0.51, 2805.82477)):
        end = unroll(optax.sgd(rate), 200)(quadratic_loss, start, support, KEY).params
        assert np.abs(end - R2_TASK.support[1]).max() == pytest.approx(distance, rel=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_quadratic_does_what_its_path_predicts(name):
    optimizer = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.3)}[name]
    task = jax.tree.map(lambda x: x[0], quadratics(3))
    params = jnp.linspace(-1, 2, 4)
    path = adaptation_path(unroll(optimizer, 5), quadratic_loss, params, task.support, KEY)
    np.testing.assert_allclose(path.predicted, path.actual, rtol=1e-10)
    curve, center = (np.asarray(x) for x in task.support)
    gradient = curve @ (params - center)
    assert path.gradient_norm[0] == pytest.approx(np.linalg.norm(gradient))
    assert path.loss[0] == pytest.approx(0.5 * (params - center) @ gradient)
    if name == "sgd":
        squared = float(gradient @ gradient)
        kappa = gradient @ curve @ gradient / squared
        assert path.curvature[0] == pytest.approx(kappa)
        assert path.predicted[0] == pytest.approx(0.1 * squared * (1 - 0.1 * kappa / 2))


@pytest.mark.usefixtures("x64")
def test_the_path_of_a_loop_with_rows_is_at_the_row_of_each_step():
    """A loss a·w²/2, a of the rows: before step i it is aᵢwᵢ²/2, after it aᵢ((1 - αaᵢ)wᵢ)²/2, and its curvature aᵢ."""
    rows, alpha = np.array([1.0, 2.0, 3.0]), 0.1
    adapt = per_step(nnx.PathContains("a"), 3, only(nnx.PathContains("w"), unroll(optax.sgd(alpha), 3)))
    loss = lambda p, b, k: (p["a"] * p["w"] ** 2 / 2 + 0 * b, {})  # noqa: E731, ARG005
    path = adaptation_path(adapt, loss, {"a": jnp.asarray(rows), "w": jnp.float64(2.0)}, jnp.float64(0), KEY)
    w = 2.0 * np.cumprod([1, *(1 - alpha * rows)])
    np.testing.assert_allclose(path.loss, rows * w[:-1] ** 2 / 2)
    np.testing.assert_allclose(path.actual, rows * (w[:-1] ** 2 - w[1:] ** 2) / 2)
    np.testing.assert_allclose(path.predicted, path.actual)
    np.testing.assert_allclose(path.step_norm, w[:-1] - w[1:])
    np.testing.assert_allclose(path.curvature, rows)


@pytest.mark.usefixtures("x64")
def test_the_update_jacobian_of_a_quadratic_is_its_closed_form():
    task = jax.tree.map(lambda x: x[0], quadratics(4))
    params = jnp.linspace(-1, 2, 4)
    curve, center = (np.asarray(x) for x in task.support)
    _, jacobian = gradient_descent(Quadratic(curve, center), np.asarray(params), 0.3, 4)
    exact = np.linalg.svd(jacobian, compute_uv=False)
    arguments = (quadratic_loss, params, task.support, KEY)
    for derivative in (reverse, mixed):
        ours = update_singular_values(unroll(optax.sgd(0.3), 4, derivative), *arguments)
        np.testing.assert_allclose(ours, exact, atol=1e-12)
        few = largest_update_singular_values(unroll(optax.sgd(0.3), 4, derivative), *arguments, k=4, key_start=KEY)
        np.testing.assert_allclose(few, exact, atol=1e-7)
    learning = learned_step_sizes(4, 0.3)  # its own parameters are not θ₀
    ours = update_singular_values(learning, quadratic_loss, initial(learning, params, KEY), task.support, KEY)
    np.testing.assert_allclose(ours, exact, atol=1e-12)
    with pytest.raises(ValueError, match="Jacobian of 4 parameters takes 1.28e-07 GB, over limit=1e-08 GB"):
        update_singular_values(unroll(optax.sgd(0.3), 4), *arguments, limit=10.0)


@pytest.mark.usefixtures("x64")
def test_spectra_before_and_after_adaptation_over_tasks():
    tasks, params = quadratics(5), jnp.linspace(-1, 2, 4)
    adapt = unroll(optax.sgd(0.1), 2)
    found = jax.vmap(lambda t: spectra(adapt, quadratic_loss, params, t, KEY, 4))(tasks)
    assert set(found) == {"support/before", "support/after", "query/before", "query/after"}
    for name, spectrum in found.items():
        side = getattr(tasks, name.split("/")[0])
        np.testing.assert_allclose(spectrum.values, np.linalg.eigvalsh(np.asarray(side[0])), atol=1e-10)


# Sharpness and slices.


@pytest.mark.usefixtures("x64")
def test_sharpness_of_a_quadratic():
    start = jnp.asarray([1.0, -2.0, 0.5])

    def f(x):
        return 0.5 * x @ R3 @ x

    found = sharpness(f, start, 3, KEY, rho=0.1)
    gradient = R3 @ start
    ahead = start + 0.1 * gradient / np.linalg.norm(gradient)
    assert found.largest == pytest.approx(R3_EIGENVALUES[-1], abs=1e-11)
    assert found.residual < 1e-10
    assert found.rise == pytest.approx(float(f(ahead) - f(start)))
    with pytest.raises(ValueError, match="rho=0"):
        sharpness(f, start, 3, KEY, rho=0.0)


@pytest.mark.usefixtures("x64")
def test_filter_normalised_directions_have_the_norms_of_the_last_axis():
    params = {
        "conv": random_like(0, jnp.zeros((3, 3, 2, 5))),
        "dense": random_like(1, jnp.zeros((4, 6))),
        "bias": jnp.ones(6),
    }
    direction = filter_normalised(KEY, params)
    for name in ("conv", "dense"):
        axes = tuple(range(params[name].ndim - 1))
        np.testing.assert_allclose(jnp.linalg.norm(direction[name].reshape(-1, params[name].shape[-1]), axis=0),
                                   np.sqrt((np.asarray(params[name]) ** 2).sum(axes)))  # fmt: skip
    np.testing.assert_array_equal(direction["bias"], 0)


@pytest.mark.usefixtures("x64")
def test_slices_are_the_function_along_the_directions():
    def f(x):
        return jnp.sum(x**3)

    x, a, b = jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])
    s, t = jnp.asarray([-1.0, 0.0, 0.5]), jnp.asarray([0.0, 2.0])
    np.testing.assert_allclose(slice_1d(f, x, a, s), (1 + s) ** 3 + 8)
    np.testing.assert_allclose(slice_2d(f, x, (a, b), (s, t)), (1 + s[:, None]) ** 3 + (2 + t[None]) ** 3)


def test_regression_losses_of_models_have_spectra_under_jit():
    apply, params = functional(MLP((1,), 1, hidden=(8,), kernel_init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0)))
    support = (jnp.linspace(-1, 1, 5)[:, None], jnp.ones((5, 1)))
    task = Task(support, support)
    found = jax.jit(lambda p: spectra(unroll(optax.sgd(0.1), 1), mse(apply), p, task, KEY, 12))(params)
    exact = np.linalg.eigvalsh(hessian(of_loss(mse(apply), support, KEY), params).values)
    assert found["support/before"].values[-1] == pytest.approx(exact[-1], rel=1e-4)

"""Losses against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml.derivatives import first_order, mixed, reverse, truncated
from maml.implicit import implicit
from maml.inner_loop import low_rank, only, unroll
from maml.losses import cross_entropy, mse, partitioned, semi_gradient, td0
from maml.types import Transitions, initial
from tests.helpers import central_difference, dot, random_like

KEY = jax.random.key(0)


def jit(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # compilation is the time of these tests


def identity(params, inputs):
    return params * inputs


def test_mse_is_the_mean_of_squares():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    value, metrics = mse(identity)(jnp.array(2.0), (x, y), KEY)
    assert float(value) == pytest.approx(((2 * x - y) ** 2).mean(), rel=1e-6)
    assert metrics["loss"] == value


def test_mse_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(5, 1\).*\(5,\)"):
        mse(identity)(jnp.array(1.0), (jnp.ones((5, 1)), jnp.ones(5)), KEY)


def test_cross_entropy_is_the_mean_negative_log_probability():
    logits = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    labels = np.array([0, 3, 2, 1, 1, 0])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    value, metrics = cross_entropy(identity)(jnp.array(1.0), (logits, labels), KEY)
    assert float(value) == pytest.approx(-log_p[np.arange(6), labels].mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(1) == labels).mean())


def test_cross_entropy_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match="do not fit labels"):
        cross_entropy(identity)(jnp.array(1.0), (jnp.ones((5, 2)), jnp.zeros((5, 1), int)), KEY)


def test_losses_of_one_array_refuse_a_policy_s_two():
    def policy(params, x):
        return x * params, x

    x = jnp.ones((5, 2))
    for loss, batch in (
        (mse, (x, x)),
        (cross_entropy, (x, jnp.zeros(5, int))),
        (td0, Transitions(x, x, x)),
    ):
        with pytest.raises(ValueError, match="returns a tuple"):
            loss(policy)(jnp.array(1.0), batch, KEY)


def test_the_second_derivative_of_cross_entropy_is_the_softmax_covariance():
    """log_softmax holds a stop_gradient; the Hessian must be diag(p) - ppᵀ all the same."""
    logits, label = jnp.array([0.3, -1.0, 2.0]), jnp.array([1])

    def loss(z):
        return cross_entropy(lambda p, x: p[None] + 0 * x)(z, (jnp.zeros((1, 3)), label), KEY)[0]

    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(jax.hessian(loss)(logits), np.diag(p) - np.outer(p, p), atol=1e-6)


def test_a_semi_gradient_is_the_partial_derivative_and_its_value_stops_the_target():
    def two(params, target, batch, key):
        del key
        value = (batch * params**2 + 3.0 * params * target + target**2).sum()
        return value, {"loss": value}

    loss, point = semi_gradient(two), jnp.array([1.0, -2.0])
    grads = jax.grad(loss, has_aux=True)(point, jnp.float32(0.5), KEY)[0]
    np.testing.assert_allclose(grads, point + 3.0 * point, rtol=1e-6)  # 2 batch θ + 3 target
    adapted = unroll(optax.sgd(0.1), 1)(loss, point, jnp.float32(0.5), KEY).params
    np.testing.assert_allclose(adapted, 0.6 * point, rtol=1e-6)
    for derivative in (
        reverse,
        mixed,
    ):  # the Jacobian of the step is 1 - 0.1 (2 batch + 3), with both arguments differentiated
        adapt = unroll(optax.sgd(0.1), 1, derivative)
        moved = jax.jacrev(lambda p, adapt=adapt: adapt(loss, p, jnp.float32(0.5), KEY).params)(point)
        np.testing.assert_allclose(moved, 0.6 * np.eye(2), atol=1e-6)


@pytest.mark.parametrize("make", [mse, cross_entropy])
def test_the_loss_of_bfloat16_outputs_is_float32(make):
    inputs = jnp.linspace(-1, 1, 6).reshape(3, 2)
    targets = jnp.array([0, 1, 1]) if make is cross_entropy else 2 * inputs
    value, _ = make(lambda p, x: (p * x).astype(jnp.bfloat16))(jnp.float32(3.0), (inputs, targets), KEY)
    assert value.dtype == jnp.float32


# TD(0): one transition of a linear value, worked by hand. The library descends: its gradient is minus the ascent of textbooks.

THETA = np.array([0.1, -0.1, 0.0])
STEP = Transitions(np.array([[1.0, 2.0, -1.0]]), np.array([1.0]), np.array([[2.0, 1.0, 0.0]]))
JACOBIAN = np.array([[1, -1, 1], [2, -2, 2], [-1, 1, -1]])  # of the ascent δ ∂v: s (s' - s)ᵀ
STOPPED = np.array([[-1, -2, 1], [-2, -4, 2], [1, 2, -1]])  # -s sᵀ


def linear(theta, features):
    return jnp.dot(features, theta)


def ascent(loss, batch=STEP, derivative=reverse):
    return lambda theta: -derivative(loss)(theta, batch, KEY)[0]


def judged(adapted):
    return 0.5 * (adapted @ np.array([0.5, -1.0, 2.0]) - 0.7) ** 2


def after(loss, steps, derivative=reverse, batch=STEP):
    """The outer loss of the parameters after that many steps of 0.1."""
    adapt = unroll(optax.sgd(0.1), steps, derivative)
    return lambda theta: judged(adapt(loss, theta, batch, KEY).params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("target", ["full", "stop"])
def test_a_step_of_td0_is_delta_times_the_gradient_of_the_value(target):
    value, metrics = td0(linear, target=target)(THETA, STEP, KEY)
    assert float(value) == pytest.approx(0.72)  # ½ 1.2²
    assert metrics["loss"] == value
    for derivative in (reverse, mixed):
        np.testing.assert_allclose(ascent(td0(linear, target=target), derivative=derivative)(THETA), [1.2, 2.4, -1.2])
    residual = jax.grad(lambda p: -0.5 * (1 + STEP.inputs_t[0] @ p - STEP.inputs_tm1[0] @ p) ** 2)(jnp.array(THETA))
    np.testing.assert_allclose(residual, [-1.2, 1.2, -1.2])  # the gradient of the whole is another direction


@pytest.mark.usefixtures("x64")
def test_the_jacobian_of_td0_holds_the_target_and_is_not_symmetric():
    full, stop = ascent(td0(linear)), ascent(td0(linear, target="stop"))
    e1, e2 = np.eye(3)[:2]
    np.testing.assert_allclose(jax.jacfwd(full)(THETA), JACOBIAN, atol=1e-12)
    np.testing.assert_allclose(jax.jacrev(full)(THETA), JACOBIAN, atol=1e-12)
    np.testing.assert_allclose(jax.jacrev(ascent(td0(linear), derivative=mixed))(THETA), JACOBIAN, atol=1e-12)
    np.testing.assert_allclose(jax.jvp(full, (THETA,), (e1,))[1], [1, 2, -1], atol=1e-12)
    np.testing.assert_allclose(jax.vjp(full, THETA)[1](e1)[0], [1, -1, 1], atol=1e-12)
    differences = [(full(THETA + 1e-5 * e) - full(THETA - 1e-5 * e)) / 2e-5 for e in np.eye(3)]
    np.testing.assert_allclose(np.stack(differences, 1), JACOBIAN, atol=1e-9)
    np.testing.assert_allclose(jax.jacrev(stop)(THETA), STOPPED, atol=1e-12)  # symmetric, and another program's
    assert (e2 @ JACOBIAN @ e1, e1 @ JACOBIAN @ e2) == (2, -1)


TABLE = {  # steps: value, central differences, stopped target, first order
    1: (0.47045, [-0.1455, 0.6305, -1.6005], [-0.8245, 0.2910, -1.6005], [-0.485, 0.97, -1.94]),
    3: (
        1.23999752,
        [0.5574792, 0.2299208, -1.8047208],
        [-1.6472408, -0.1448816, -2.2897592],
        [-0.7874, 1.5748, -3.1496],
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", TABLE)
def test_the_meta_gradient_of_td0_is_that_of_the_program(steps):
    value, exact, stopped, first = TABLE[steps]
    program = after(td0(linear), steps)
    assert float(program(THETA)) == pytest.approx(value, abs=1e-8)
    slopes = [central_difference(program, THETA, e) for e in np.eye(3)]
    np.testing.assert_allclose(slopes, exact, atol=1e-7)
    for derivative in (reverse, mixed, truncated(steps)):
        np.testing.assert_allclose(jax.grad(after(td0(linear), steps, derivative))(THETA), exact, atol=1e-7)
        ours = jax.grad(after(td0(linear, target="stop"), steps, derivative))(THETA)
        np.testing.assert_allclose(ours, stopped, atol=1e-7)
    np.testing.assert_allclose(jax.grad(after(td0(linear), steps, first_order))(THETA), first, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("remat", [None, 2])
def test_a_loss_that_is_made_of_td0_has_its_meta_gradient(remat):
    """A penalty more, by a function that knows nothing of semi-gradients."""
    of_td = td0(linear)

    def loss(theta, batch, key):
        value, metrics = of_td(theta, batch, key)
        return value + 0.1 * theta @ theta, metrics

    def program(theta):
        return judged(unroll(optax.sgd(0.1), 3, remat=remat)(loss, theta, STEP, KEY).params)

    slopes = [central_difference(program, THETA, e) for e in np.eye(3)]
    np.testing.assert_allclose(jax.grad(program)(THETA), slopes, atol=1e-7)
    with pytest.raises(ValueError, match="mixed: this loss is made of a semi-gradient, .* take derivative=reverse"):
        unroll(optax.sgd(0.1), 3, mixed)(loss, THETA, STEP, KEY)
    with pytest.raises(ValueError, match="implicit: a semi-gradient is the gradient of no loss"):
        implicit(unroll(optax.sgd(0.1), 3))(loss, THETA, STEP, KEY)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("moving", ["only", "low_rank", "partitioned"])
def test_a_loss_that_is_made_of_td0_has_its_meta_gradient_where_a_part_moves(moving):
    """What stays is traced by the outer derivative alone, and the target depends on it all the same."""

    def values(params, states):
        return jnp.tanh(states @ params["w"]) @ params["v"] + params["b"]

    of_td = td0(values, 0.9)
    params = {"w": jnp.cos(jnp.arange(12.0)).reshape(3, 4), "v": jnp.sin(jnp.arange(4.0)), "b": jnp.array(0.5)}

    def wrapped(params, batch, key):
        return of_td(params, batch, key)

    loss, loop = wrapped, unroll(optax.sgd(0.1), 2)
    if moving == "only":
        loop = only(lambda path, _: path[0] == "w", loop)
    if moving == "low_rank":
        loop = low_rank(4, loop, where="w")
    if moving == "partitioned":
        loss = partitioned({"w|b": wrapped, "v": wrapped})
    fixed = initial(loop, params, KEY)
    states, targets = jnp.cos(jnp.arange(6.0)).reshape(2, 3), jnp.array([0.3, -0.2])

    def program(params):
        start = fixed._replace(params=params) if moving == "low_rank" else params
        return mse(values)(loop(loss, start, STEP, KEY).params, (states, targets), KEY)[0]

    found, direction = jax.grad(program)(params), random_like(1, params)
    assert dot(found, direction) == pytest.approx(central_difference(program, params, direction), rel=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", [reverse, mixed])
def test_a_discount_is_learned_through_the_target(derivative):
    def of(discount, target="full", steps=1):
        return after(td0(linear, discount, target), steps, derivative)(THETA)

    assert float(jax.grad(of)(1.0)) == pytest.approx(0.03395)
    assert float(jax.grad(of)(1.0, "stop")) == pytest.approx(0.03395)  # of one step: only v(s') is stopped
    slope = central_difference(lambda g: of(g, steps=3), jnp.array(0.9), jnp.array(1.0))
    assert float(jax.grad(of)(0.9, steps=3)) == pytest.approx(slope, rel=1e-8)
    assert abs(float(jax.grad(of)(0.9, "stop", 3)) - slope) > 1e-2 * abs(slope)

    def by_transition(discount):  # a discount in the batch is differentiated as well
        return after(td0(linear), 1, derivative, STEP._replace(discount_t=discount[None]))(THETA)

    assert float(jax.grad(by_transition)(jnp.array(1.0))) == pytest.approx(0.03395)

    def constant_target(discount):
        def loss(theta, batch, key):
            del key
            target = jax.lax.stop_gradient(batch.reward_t + discount * linear(theta, batch.inputs_t))
            value = 0.5 * jnp.mean((target - linear(theta, batch.inputs_tm1)) ** 2)
            return value, {"loss": value}

        return after(loss, 1, derivative)(THETA)

    assert float(jax.grad(constant_target)(1.0)) == 0  # what `td0` avoids


def test_td0_multiplies_discounts_and_averages_transitions():
    now, then, reward, end = np.random.default_rng(3).normal(size=(4, 6, 1)).astype(np.float32)
    end = (end > 0).astype(np.float32)
    value, _ = td0(identity, 0.5)(jnp.float32(2.0), Transitions(now, reward, then, end), KEY)
    assert float(value) == pytest.approx(0.5 * ((reward + 0.5 * end * 2 * then - 2 * now) ** 2).mean(), rel=1e-6)


def test_td0_of_inputs_and_values_is_the_value_error():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 1)).astype(np.float32)
    for target in ("full", "stop"):
        ours, expected = (
            loss(jnp.float32(2.0), (x, y), KEY)[0] for loss in (td0(identity, 0.9, target), mse(identity))
        )
        assert float(ours) == float(expected)


def test_td0_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="target='half': give one of full, stop"):
        td0(linear, target="half")
    for wrong in (1.5, -0.1, np.ones(3)):
        with pytest.raises(ValueError, match="discount"):
            td0(linear, wrong)
    for batch in (STEP._replace(reward_t=np.ones((1, 1))), STEP._replace(discount_t=np.ones(()))):
        with pytest.raises(ValueError, match=r"td0: .* differ in shape"):
            td0(linear)(THETA, batch, KEY)


def network(params, inputs):
    return (jnp.tanh(inputs @ params["body"]["kernel"] + params["body"]["bias"][None]) @ params["head"])[:, 0]


def network_problem():
    shapes = {"body": {"kernel": jnp.zeros((3, 6)), "bias": jnp.zeros(6)}, "head": jnp.zeros((6, 1))}
    batch = random_like(1, Transitions(jnp.zeros((8, 3)), jnp.zeros(8), jnp.zeros((8, 3))))
    features, values = random_like(2, (jnp.zeros((7, 3)), jnp.zeros(7)))
    return random_like(0, shapes), batch, lambda params: jnp.mean((network(params, features) - values) ** 2)


def checked(loss, by_hand, derivatives, where=None):
    """For each derivative the relative error of the meta-gradient along a direction of parameters and transitions."""
    params, batch, outer = network_problem()
    directions = random_like(3, (params, batch))

    program = jit(lambda both: outer(by_hand(*both)))
    slope = central_difference(program, (params, batch), directions)
    errors = {}
    for derivative in derivatives:

        def value(params, batch, derivative=derivative):
            adapt = unroll(optax.sgd(0.2), 5, derivative)
            return outer((only(where, adapt) if where else adapt)(loss, params, batch, KEY).params)

        end, grads = jit(jax.value_and_grad(value, (0, 1)))(params, batch)
        assert float(end) == pytest.approx(float(program((params, batch))), rel=1e-12)
        errors[derivative] = abs(dot(grads, directions) - slope) / abs(slope)
    return errors


def td_ascent(params, batch):
    """δ ∂v written out, for a mean over transitions."""
    values, pull = jax.vjp(lambda p: network(p, batch.inputs_tm1), params)
    delta = batch.reward_t + 0.9 * network(params, batch.inputs_t) - values
    return pull(delta / len(delta))[0]


def walk(field, steps=5):
    def step(params, batch):
        return jax.tree.map(lambda p, u: p + 0.2 * u, params, field(params, batch))

    return lambda params, batch: jax.lax.fori_loop(0, steps, lambda _, p: step(p, batch), params)


@pytest.mark.usefixtures("x64")
def test_the_meta_gradient_of_a_network_that_learns_by_td0():
    modes = (reverse, mixed)
    assert max(checked(td0(network, 0.9), walk(td_ascent), modes).values()) <= 1e-6
    assert min(checked(td0(network, 0.9, "stop"), walk(td_ascent), modes).values()) > 1e-2


# A loss for each part of the parameters.


def distance(params, batch, key):
    """A loss of all parameters, for the body to follow."""
    del key
    value = jnp.mean((network(params, batch.inputs_t) - batch.reward_t) ** 2)
    return value, {"loss": value, "extra": 2 * value}


def parts_ascent(params, batch):
    body = jax.grad(lambda body: distance(params | {"body": body}, batch, KEY)[0])(params["body"])
    return {"body": jax.tree.map(jnp.negative, body), "head": td_ascent(params, batch)["head"]}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "only the head"])
def test_each_part_follows_its_own_loss_and_the_meta_gradient_is_that_of_the_program(whole):
    loss = partitioned({"^body/": distance, "^head$": td0(network, 0.9)})

    def field(params, batch):
        up = parts_ascent(params, batch)
        return up if whole else up | {"body": jax.tree.map(jnp.zeros_like, up["body"])}

    where = None if whole else (lambda path, leaf: path[0] == "head")  # noqa: ARG005
    assert max(checked(loss, walk(field), (reverse, mixed), where).values()) <= 1e-6


def test_one_loss_for_all_parts_is_that_loss():
    params, batch, _ = network_problem()
    ours, metrics = reverse(partitioned({".": distance}))(params, batch, KEY)
    expected, _ = reverse(distance)(params, batch, KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)
    assert sorted(metrics) == ["./extra", "./loss", "loss"]
    assert float(metrics["loss"]) == pytest.approx(float(metrics["./loss"]))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((), "give one loss"),
        (("body",), r"head fits \[\] of"),
        (("body", "head", "kernel"), "kernel fits .*exactly one"),
        (("body|head", "tail"), "no parameter fits .*tail"),
    ],
)
def test_parts_that_leave_out_or_share_a_parameter_are_refused(patterns, message):
    params, batch, _ = network_problem()
    with pytest.raises(ValueError, match=message):
        partitioned(dict.fromkeys(patterns, distance))(params, batch, KEY)

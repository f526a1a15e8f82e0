"""The inner loop against optax run by hand, closed forms, and central differences in float64."""

import itertools
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

from maml.derivatives import first_order, mixed, reverse
from maml.inner_loop import minibatches, only, per_step, target_network, unroll
from maml.losses import cross_entropy, mse, semi_gradient, td0
from maml.models import MLP, Conv4, functional
from maml.objectives import query_loss
from maml.tasks import boyan_chain
from maml.types import Task, Transitions
from tests.helpers import (
    Quadratic,
    central_difference,
    closed_form,
    dot,
    gradient_descent,
    quadratic_loss,
    quadratics,
    random_like,
    twins,
)

KEY = jax.random.key(0)


def meta_gradient(adapt, loss, params, tasks):
    objective = query_loss(loss, adapt)
    keys = jax.random.split(KEY, len(jax.tree.leaves(tasks)[0]))

    def mean(params):
        return jax.vmap(objective, (None, 0, 0, None))(params, tasks, keys, 0)[0].mean()

    return jax.jit(jax.grad(mean))(params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_gradient_descent_on_a_quadratic_is_its_closed_form(steps):
    tasks = quadratics(seed=0)
    support = jax.tree.map(lambda x: x[0], tasks.support)
    start = jnp.arange(4.0)
    adapted = unroll(optax.sgd(0.3), steps)(quadratic_loss, start, support, KEY)
    expected = [
        gradient_descent(Quadratic(*map(np.asarray, support)), np.arange(4.0), 0.3, k)[0] for k in range(steps + 1)
    ]
    np.testing.assert_allclose(adapted.params, expected[-1], atol=1e-12)
    np.testing.assert_allclose(adapted.trace.params, np.array(expected), atol=1e-12)
    losses = [quadratic_loss(jnp.asarray(p), support, KEY)[0] for p in expected[:-1]]
    np.testing.assert_allclose(adapted.trace.metrics["loss"], np.array(losses), atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("derivative", [reverse, first_order])
def test_meta_gradient_on_quadratics_is_its_closed_form(steps, derivative):
    tasks, start = quadratics(seed=1), np.linspace(-1, 2, 4)
    ours = meta_gradient(unroll(optax.sgd(0.3), steps, derivative), quadratic_loss, jnp.asarray(start), tasks)
    expected = closed_form(tasks, start, 0.3, steps, derivative is first_order)
    np.testing.assert_allclose(ours, expected, atol=1e-10)
    other = closed_form(tasks, start, 0.3, steps, derivative is not first_order)
    assert np.abs(ours - other).max() > 1e-2  # the choice is not inert


@pytest.mark.usefixtures("x64")
def test_taylor_coefficients_of_maml_and_fomaml():
    """Two inner steps: in (average gradient, inner-product gradient) MAML is (1, -2α), FOMAML (1, -α).

    Nichol et al. 2018 (arXiv 1803.02999), section 5.1, with the same batch thrice: g - ...αHg is exact to first order.
    """
    curvature, center = quadratics(seed=2).support
    batch = (curvature[0], center[0])
    tasks = jax.tree.map(lambda x: x[None], Task(batch, batch))
    start, alpha = jnp.linspace(-1.0, 1.0, 4), 1e-5
    gradient = np.asarray(curvature[0] @ (start - center[0]))
    product = np.asarray(curvature[0]) @ gradient  # gradient of ½ g·g
    for derivative, coefficient in ((reverse, -4.0), (first_order, -2.0)):
        ours = meta_gradient(unroll(optax.sgd(alpha), 2, derivative), quadratic_loss, start, tasks)
        # The gradient of g·g is 2Hg: MAML -2α·2Hg, FOMAML -α·2Hg.
        np.testing.assert_allclose((ours - gradient) / alpha, coefficient * product, rtol=1e-3)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trajectory_is_that_of_optax(name):
    optimizer = OPTIMIZERS[name]()
    apply, params = functional(MLP((1,), 1, hidden=(8,), kernel_init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0)))
    loss = mse(apply)
    batch = (jnp.linspace(-1, 1, 5)[:, None], jnp.linspace(1, 2, 5)[:, None])
    adapted = unroll(optimizer, 4)(loss, params, batch, KEY)
    state = optimizer.init(params)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for i in range(4):
        grads = gradient(params, batch, KEY)[0]
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        at = jax.tree.map(lambda x, i=i: x[i + 1], adapted.trace.params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7), at, params)


# Not usable in the inner loop: lbfgs, polyak_sgd, contrib.momo and momo_adam (their update takes the value of the loss), sophia
# (the loss), sam (another gradient). Without a derivative in optax, at any gradient: radam (the root of a negative number in the
# branch that `where` does not take), contrib.dog (a norm of θ₀ - θ₀) and galore (an SVD); at zero: contrib.adopt, dadapt_adamw.
UNUSABLE = {"lbfgs", "polyak_sgd", "radam", "optimistic_adam"}  # the last is deprecated
ALIASES = sorted(
    {"nadam", "nadamw"}.union(
        name
        for name, f in vars(optax).items()
        if getattr(f, "__module__", "") == "optax._src.alias" and not isinstance(f, type)
    )
    - UNUSABLE
)
CONTRIB = (
    *("acprop", "ademamix", "cocob", "dowg", "madgrad", "muon"),
    *("prodigy", "schedule_free_adamw", "schedule_free_sgd", "simplified_ademamix"),
)


def test_the_list_of_aliases_is_not_empty():
    assert {"adafactor", "adam", "lamb", "lion", "nadam", "noisy_sgd", "sgd", "sm3", "yogi"} <= {*ALIASES}
    assert len(ALIASES) >= 27


def make(name: str) -> optax.GradientTransformation:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]()
    alias = getattr(optax, name, None) or getattr(optax.contrib, name)
    return alias(0.1, key=0) if name == "noisy_sgd" else alias(0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", [*dict.fromkeys((*OPTIMIZERS, *ALIASES)), *(pytest.param(n, marks=pytest.mark.slow) for n in CONTRIB)]
)
def test_every_optimizer_moves_as_in_optax_and_has_a_finite_meta_gradient_at_zero_gradient(name):
    """The gradient of "a" is zero, and so is an element of that of "b"; the curvature is not, so that both count."""
    if name == "lamb" and "fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
        pytest.skip(
            "its norms multiply roundings by 1e13 here, and XLA's older generator of code has others: XLA_FLAGS= pytest"
        )
    optimizer, params = make(name), {"a": jnp.ones((2, 3)), "b": jnp.array([0.5, 0.0, -1.0])}

    def loss(params, batch, key):
        del key
        value = ((params["a"] - 1) ** 2).sum() / 2 + ((params["b"] + batch) ** 2).sum() / 2
        return value, {"loss": value}

    def adapted(params, derivative):
        params = unroll(optimizer, 3, derivative)(loss, params, jnp.ones(3), KEY).params
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params)), params

    def both(params):
        return [jax.grad(adapted, has_aux=True)(params, derivative) for derivative in (reverse, mixed)]

    both, update = (
        jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}) for f in (both, optimizer.update)
    )
    (grads, after), (other, _) = both(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), other, grads)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = update({"a": params["a"] - 1, "b": params["b"] + 1}, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-12), after, params)


@pytest.mark.parametrize(
    "name", [n if n in ("adam", "adafactor", "rmsprop") else pytest.param(n, marks=pytest.mark.slow) for n in ALIASES]
)
def test_in_float32_too_the_meta_gradient_at_zero_gradient_is_finite(name):
    """Adafactor's default eps of 1e-30 is too small for float32: the derivative overflows below gradients of 2e-13."""
    optimizer = optax.adafactor(0.1, eps=1e-20) if name == "adafactor" else make(name)
    params = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.array([0.5, 0.0, -1.0], jnp.float32)}

    def loss(params, batch, key):
        del key
        return ((params["a"] - 1) ** 2).sum() / 2 + ((params["b"] + batch) ** 2).sum() / 2, {}

    def adapted(params):
        params = unroll(optimizer, 3)(loss, params, jnp.ones(3, jnp.float32), KEY).params
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params))

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(jax.grad(adapted))(params)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["lars", "trust ratio", "lamb"])
def test_trust_ratios_of_biases_that_are_zero_are_differentiated_as_they_are(name):
    """At zero the ratio is 1; 1e-15 beside it would be 1e-15. Along the data, which leave the biases at zero."""
    optimizer = {
        "lars": optax.lars(0.1),
        "trust ratio": optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.1)),
        "lamb": optax.lamb(0.02, eps=1e-2),
    }[name]
    params = {"kernel": random_like(0, jnp.zeros((2, 3))), "bias": jnp.zeros((1, 3))}
    loss = mse(lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"]))
    x, y = random_like(1, (jnp.zeros((4, 2)), jnp.zeros((4, 3))))

    def query(y):
        return loss(unroll(optimizer, 1)(loss, params, (x, y), KEY).params, (x, 0 * y), KEY)[0]

    direction = random_like(2, y)
    expected = central_difference(query, y, direction)
    assert abs(expected) > 1e-4
    assert dot(jax.grad(query)(y), direction) == pytest.approx(expected, rel=1e-6)


def image_task(seed: int, ways: int = 3, size: int = 16):
    generator = np.random.default_rng(seed)
    inputs = generator.uniform(size=(1, 2 * ways, size, size, 1))
    labels = np.tile(np.arange(ways), 2)[None]
    side = (jnp.asarray(inputs), jnp.asarray(labels))
    return Task(side, jax.tree.map(lambda x: x[:, ::-1], (side[0] ** 2, side[1])))


def batch_norm(**kwargs):
    return partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3, **kwargs)


def small():
    return {"kernel_init": nnx.initializers.glorot_uniform(), "rngs": nnx.Rngs(3)}


MODELS = {
    "mlp": lambda: MLP((16, 16, 1), 3, hidden=(6, 5), norm=batch_norm(), **small()),
    "conv_stride_mean": lambda: Conv4((16, 16, 1), 3, filters=4, norm=batch_norm(), **small()),
    "conv_max_flatten": lambda: Conv4(
        (16, 16, 1),
        3,
        filters=4,
        pool="max",
        spatial="flatten",
        norm=partial(nnx.BatchNorm, epsilon=1e-3),
        **small(),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("model", "optimizer"),
    twins(
        (("mlp", "adam"), ("conv_max_flatten", "sgd")),
        (
            ("conv_max_flatten", "sgd"),
            *itertools.product(("mlp", "conv_stride_mean"), ("sgd", "momentum", "adam")),
        ),
    ),
)
def test_meta_gradient_of_networks_is_the_central_difference(model, optimizer):
    """A difference of 1e-7 crosses no kink of ReLU or max at these seeds, or the test would fail."""
    apply, params = functional(MODELS[model]())
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    optimizers = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(
            0.01, eps=0.1
        ),  # eps is the scale at which the update bends: the difference must be small against it
    }
    adapt = unroll(optimizers[optimizer], 2)
    task = image_task(seed=5)
    loss = cross_entropy(apply)
    grads = meta_gradient(adapt, loss, params, task)
    direction = random_like(6, params)
    one = jax.tree.map(lambda x: x[0], task)

    def value(params):
        return query_loss(loss, adapt)(params, one, jax.random.split(KEY, 1)[0], 0)[0]

    slope = central_difference(jax.jit(value), params, direction, epsilon=1e-7)
    assert dot(grads, direction) == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.usefixtures("x64")
def test_first_order_differs_from_second_order_on_a_network():
    apply, params = functional(MODELS["mlp"]())
    params, loss = jax.tree.map(lambda x: x.astype(jnp.float64), params), cross_entropy(apply)
    grads = [meta_gradient(unroll(optax.sgd(0.5), 1, d), loss, params, image_task(7)) for d in (reverse, first_order)]
    differences = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, grads), strict=True)]
    assert max(differences) > 1e-3


def test_filters_by_type_or_tag_are_refused():
    """They see arrays, so that one selects nothing, and its opposite everything."""
    for where in (nnx.Param, nnx.Not(nnx.Param), nnx.Any("tag", nnx.PathContains("head")), nnx.Not(nnx.All(nnx.Param))):
        for make in (only, lambda where, loop: per_step(where, 2, loop)):
            with pytest.raises(ValueError, match="filters by type or tag see arrays, which have none; give paths"):
                make(where, unroll(optax.sgd(0.1), 1))


def test_only_moves_what_it_selects_and_differentiates_the_rest():
    params = {"body": {"w": jnp.array([1.0, 2.0])}, "head": [jnp.array([3.0])]}

    def loss(params, batch, key):
        del key
        value = (params["body"]["w"] ** 2).sum() * params["head"][0].sum() * batch
        return value, {"loss": value}

    seen = []

    def where(path, value):
        del value
        seen.append(path)
        return "head" in path

    adapt = only(where, unroll(optax.sgd(0.1), 3))
    adapted = adapt(loss, params, jnp.float32(1.0), KEY)
    np.testing.assert_array_equal(adapted.params["body"]["w"], params["body"]["w"])
    np.testing.assert_array_equal(adapted.trace.params["body"]["w"], np.tile([1.0, 2.0], (4, 1)))
    np.testing.assert_allclose(adapted.params["head"][0], 3.0 - 3 * 0.1 * 5.0, rtol=1e-6)
    assert seen == [("body", "w"), ("head", 0)]
    grads = jax.grad(lambda p: adapt(loss, p, jnp.float32(1.0), KEY).params["head"][0].sum())(params)
    np.testing.assert_allclose(grads["body"]["w"], -3 * 0.1 * 2 * params["body"]["w"], rtol=1e-6)


def test_only_everything_is_the_plain_loop_and_nothing_is_refused():
    tasks = quadratics(seed=3)
    support = jax.tree.map(lambda x: x[0].astype(jnp.float32), tasks.support)
    params, adapt = {"x": jnp.arange(4.0)}, unroll(optax.sgd(0.1), 2)

    def loss(params, batch, key):
        return quadratic_loss(params["x"], batch, key)

    whole = only(lambda path, value: True, adapt)(loss, params, support, KEY)  # noqa: ARG005
    jax.tree.map(np.testing.assert_array_equal, whole, adapt(loss, params, support, KEY))
    with pytest.raises(ValueError, match="selects no parameter.*'x'"):
        only(nnx.PathContains("head"), adapt)(loss, params, support, KEY)
    body = nnx.Not(nnx.PathContains("head"))  # BOIL, of a model without a head
    jax.tree.map(np.testing.assert_array_equal, only(body, adapt)(loss, params, support, KEY), whole)
    with pytest.raises(ValueError, match="selects every parameter.*'x'"):
        only(body, adapt, strict=True)(loss, params, support, KEY)


@pytest.mark.parametrize("steps", [-1, True])
def test_a_wrong_number_of_steps_is_refused_at_the_factory(steps):
    with pytest.raises(ValueError, match="steps="):
        unroll(optax.sgd(0.1), steps)


# A target network: a slower copy of the parameters, which the inner loop carries.


QUICK = {"xla_backend_optimization_level": 0}


def curved(theta, features):
    return jnp.tanh(features @ theta)


def with_target_by_hand(theta, batch, rate, period, steps=6):
    """θ ← θ + 0.3 mean(δ ∂v(s; θ)) with δ = r + 0.9 v(s'; φ) - v(s; θ), and φ ← φ + rate (θ - φ) in every `period`-th step."""
    target, path = theta, []
    for step in range(1, steps + 1):
        values, pull = jax.vjp(lambda p: curved(p, batch.inputs_tm1), theta)
        delta = batch.reward_t + 0.9 * curved(target, batch.inputs_t) - values
        theta = theta + 0.3 * pull(delta / len(delta))[0]
        path.append(theta)
        if step % period == 0:
            target = target + rate * (theta - target)
    return jnp.stack(path)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("rate", "period"), [(1.0, 1), (0.3, 1), (0.5, 4)])
def test_a_target_network_is_state_and_its_meta_gradient_is_that_of_the_program(rate, period):
    theta = random_like(0, jnp.zeros(4))
    batch = random_like(1, Transitions(jnp.zeros((8, 4)), jnp.zeros(8), jnp.zeros((8, 4))))
    along = random_like(2, (theta, batch, jnp.zeros(())))

    def ours(derivative, remat=None):
        def value(theta, batch, rate):
            adapt = target_network(optax.sgd(0.3), 6, rate, period, derivative, remat)
            adapted = adapt(td0(curved, 0.9), theta, batch, KEY)
            return jnp.sum(adapted.params**2), adapted.trace.params

        return value

    arguments = (theta, batch, jnp.array(rate))
    program = jax.jit(lambda x: with_target_by_hand(*x, period), compiler_options=QUICK)
    slope = central_difference(lambda x: jnp.sum(program(x)[-1] ** 2), arguments, along)
    for mode in ((reverse,), (mixed,), (mixed, 2)):
        of = jax.jit(jax.grad(ours(*mode), (0, 1, 2), has_aux=True), compiler_options=QUICK)
        grads, path = of(*arguments)
        np.testing.assert_allclose(path[1:], program(arguments), rtol=1e-12)
        assert dot(grads, along) == pytest.approx(slope, rel=1e-7)
    if rate == period == 1:
        plain = unroll(optax.sgd(0.3), 6)(td0(curved, 0.9), theta, batch, KEY)
        np.testing.assert_allclose(path, plain.trace.params, rtol=1e-12)


def test_a_target_network_keeps_the_optimizers_state_and_the_type_of_the_parameters():
    @semi_gradient
    def toy(params, target, batch, key):
        del key
        value = jnp.sum((params["a"] - 0.5 * target["a"] - batch) ** 2)
        return value, {"loss": value}

    optimizer, params = optax.adam(0.1), {"a": jnp.ones(2)}
    adapted = target_network(optimizer, 4, period=10)(toy, params, jnp.float32(0.0), KEY)
    state, by_hand = optimizer.init(params), params
    for _ in range(4):
        updates, state = optimizer.update({"a": 2 * (by_hand["a"] - 0.5)}, state, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
    np.testing.assert_allclose(adapted.params["a"], by_hand["a"], rtol=1e-5)
    assert adapted.trace.params["a"].shape == (5, 2)


@pytest.mark.usefixtures("x64")
def test_a_target_network_sees_minibatches_as_the_plain_loop_does():
    """With the target at hand in each step it is `unroll`, whose minibatches tests/test_learned.py has by hand."""
    task = jax.tree.map(lambda x: x[0], boyan_chain(shots=10)(jax.random.split(KEY, 1)))
    loss, params = td0(lambda p, x: x @ p["w"]), {"w": jnp.zeros((4, 1))}

    @jax.jit
    def ends(params):
        target, delayed = (target_network(optax.sgd(0.1), 3, period=n) for n in (1, 2))
        return [
            minibatches(5, loop)(loss, params, task.support, KEY).params["w"]
            for loop in (target, unroll(optax.sgd(0.1), 3), delayed)
        ]

    ends = ends(params)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)
    assert np.abs(ends[2] - ends[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"period": 0}, "period=0"),
        ({"period": -1}, "period=-1"),
        ({"rate": 0.0}, "rate=0"),
        ({"rate": 2.0}, "rate=2"),
    ],
)
def test_a_target_network_refuses_wrong_rates_periods_and_losses(wrong, message):
    with pytest.raises(ValueError, match=message):
        target_network(optax.sgd(0.1), 3, **wrong)
    with pytest.raises(ValueError, match="has no target"):
        target_network(optax.sgd(0.1), 3)(mse(curved), jnp.ones(2), (jnp.ones((3, 2)), jnp.ones(3)), KEY)

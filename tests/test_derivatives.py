"""The modes of the outer derivative against each other, closed forms, and central differences in float64."""

import inspect
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maml.derivatives import Truncated, first_order, mixed, pieces, reverse, truncated
from maml.evaluate import Protocol, _curve
from maml.inner_loop import only, unroll
from maml.losses import cross_entropy, mse, semi_gradient
from maml.models import MLP, Conv4, functional
from maml.objectives import query_loss
from maml.types import Task
from tests.helpers import Quadratic, central_difference, dot, quadratic_loss, quadratics, random_like

KEY = jax.random.key(0)
MODES = {"reverse": (reverse, None), "remat": (reverse, 2), "mixed": (mixed, None), "mixed, remat": (mixed, 1)}
FEW = {m: MODES[m] for m in ("reverse", "mixed, remat")}


def jit(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # compilation is the time of these tests


def error(a, b) -> float:
    """The largest difference, relative to the largest value."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    assert np.abs(b).max() > 1e-6  # a cotangent that is lost would agree with another
    return np.abs(a - b).max() / np.abs(b).max()


def check(value, arguments, modes=MODES, slope=1e-6, epsilon=1e-6, modes_agree=1e-10):
    """d value(mode)/d each argument: all modes agree, and with the central difference of the value."""
    every, steps = tuple(range(len(arguments))), np.broadcast_to(epsilon, len(arguments))
    grads = jit(lambda *a: {m: jax.grad(partial(value, *modes[m]), every)(*a) for m in modes})(*arguments)
    expected = grads["reverse"]
    for mode in modes:
        for i in every:
            assert error(grads[mode][i], expected[i]) <= modes_agree, (mode, i)
    f = jit(partial(value, *modes["reverse"]))
    for i, argument in enumerate(arguments):
        along = random_like(6 + i, argument)
        difference = central_difference(
            lambda x, i=i: f(*arguments[:i], x, *arguments[i + 1 :]), argument, along, steps[i]
        )
        assert dot(expected[i], along) == pytest.approx(difference, rel=slope, abs=slope * 1e-2), i


# The matrix: models, optimizers, steps.


def attend(query, key, value, **unused):
    """[batch, tokens, heads, features]; JAX's own takes its softmax in float32, also here."""
    del unused
    weights = jax.nn.softmax(jnp.einsum("bthf,bshf->bhts", query, key) / query.shape[-1] ** 0.5)
    return jnp.einsum("bhts,bshf->bthf", weights, value)


class Block(nnx.Module):
    """A transformer block on [batch, tokens, features] and a linear head on the mean token."""

    def __init__(self, features: int, outputs: int, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(features, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(2, features, decode=False, attention_fn=attend, rngs=rngs)
        self.inner, self.outer = nnx.Linear(features, 6, rngs=rngs), nnx.Linear(6, features, rngs=rngs)
        self.head = nnx.Linear(features, outputs, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        x = x + self.outer(nnx.gelu(self.inner(self.norms[1](x))))
        return self.head(x.mean(1))


def supervised(seed: int, *shape: int, ways: int = 2) -> Task:
    labels = jnp.asarray(np.arange(shape[0]) % ways)
    return Task((random_like(seed, jnp.zeros(shape)), labels), (random_like(seed + 1, jnp.zeros(shape)), labels))


def some(kind, *arguments, **kwargs):
    return functional(kind(*arguments, rngs=nnx.Rngs(3), **kwargs))


def conv4():
    norm, init = partial(nnx.BatchNorm, epsilon=1e-3), nnx.initializers.glorot_uniform()
    return some(Conv4, (16, 16, 1), 2, filters=2, pool="max", spatial="flatten", norm=norm, kernel_init=init)


MODELS = {
    "mlp": lambda: (some(MLP, (3,), 2, hidden=(5,), kernel_init=nnx.initializers.normal(0.7)), (4, 3)),
    "conv4": lambda: (conv4(), (4, 16, 16, 1)),
    "transformer": lambda: (some(Block, 4, 2), (3, 3, 4)),
}
OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": lambda rate: optax.adam(rate, eps=0.1),  # the scale at which its update bends, large against the difference
}
FAST = {("mlp", "momentum", 3)}  # the others take minutes to compile


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("model", "optimizer", "steps"),
    [
        pytest.param(m, o, n, marks=() if (m, o, n) in FAST else pytest.mark.slow)
        for m in MODELS
        for o in OPTIMIZERS
        for n in (1, 3, 10)
    ],
)
def test_modes_agree_and_are_the_central_difference(model, optimizer, steps):
    """For the cotangents of parameters, step size and support inputs."""
    (apply, params), shape = MODELS[model]()
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    task, loss = supervised(5, *shape), cross_entropy(apply)

    def value(derivative, remat, params, rate, inputs):
        adapt = unroll(OPTIMIZERS[optimizer](rate), steps, derivative, remat)
        return query_loss(loss, adapt)(params, Task((inputs, task.support[1]), task.query), KEY, 0)[0]

    small = 1e-7 if model == "conv4" else 1e-6  # less than the way to the next kink of ReLU or max-pool
    check(value, (params, jnp.float64(0.05), task.support[0]), epsilon=(small, 1e-5, small))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_mixed_mode_of_a_convolution_with_max_pool_is_reverse_under_a_map():
    apply, params = conv4()
    params, loss = jax.tree.map(lambda x: x.astype(jnp.float64), params), cross_entropy(apply)
    tasks = jax.tree.map(lambda *x: jnp.stack(x), supervised(5, 4, 16, 16, 1), supervised(8, 4, 16, 16, 1))

    def value(params, derivative):
        objective = query_loss(loss, unroll(optax.sgd(0.05), 2, derivative))
        return jax.vmap(lambda t: objective(params, t, KEY, 0)[0])(tasks).mean()

    a, b = jit(lambda p: [jax.grad(value)(p, d) for d in (mixed, reverse)])(params)
    assert error(a, b) <= 1e-10


# A small regression whose every input is differentiated.


def tanh_loss(params, batch, key):
    del key
    inputs, targets = batch
    value = jnp.mean((jnp.tanh(inputs @ params["w"]) @ params["v"] - targets) ** 2)
    return value, {"loss": value}


def regression():
    params = random_like(0, {"w": jnp.zeros((3, 4)), "v": jnp.zeros(4)})
    support, query = (random_like(i, (jnp.zeros((5, 3)), jnp.zeros(5))) for i in (1, 2))
    return params, Task(support, query)


def per_step(rates):
    return optax.scale_by_schedule(lambda count: -rates[count])


def per_parameter(rates):
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u, r: -r * u, updates, rates))  # noqa: ARG005


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["per step", "per parameter", "both, after Adam"])
def test_learned_step_sizes(kind):
    params, task = regression()
    steps, tensors = jnp.linspace(0.05, 0.2, 5), jax.tree.map(lambda x: 0.1 + 0.02 * jnp.cos(x), params)
    make, rates = {
        "per step": (per_step, steps),
        "per parameter": (per_parameter, tensors),
        "both, after Adam": (
            lambda r: optax.chain(optax.scale_by_adam(eps=0.1), per_step(-r[0]), per_parameter(r[1])),
            (steps, tensors),
        ),
    }[kind]

    def value(derivative, remat, params, rates):
        return query_loss(tanh_loss, unroll(make(rates), 5, derivative, remat))(params, task, KEY, 0)[0]

    check(value, (params, rates), FEW)


@pytest.mark.usefixtures("x64")
def test_support_query_and_what_the_loss_closes_over_get_cotangents():
    params, task = regression()

    def value(derivative, remat, params, support, outer):
        def loss(params, batch, key):
            value, metrics = tanh_loss(params, batch, key)
            regulariser = sum(jnp.sum(outer["decay"] * x**2) for x in jax.tree.leaves(params))
            return outer["scale"] * value + regulariser, metrics

        def where(path, leaf):
            del leaf
            return "w" in path

        whole = unroll(optax.sgd(0.1), 2, derivative, remat)
        part = only(where, unroll(optax.sgd(0.1), 3, derivative, remat))
        values = [query_loss(loss, adapt)(params, Task(support, task.query), KEY, 0)[0] for adapt in (whole, part)]
        return values[0] + 2 * values[1]

    check(value, (params, task.support, {"scale": jnp.float64(1.3), "decay": jnp.float64(0.1)}), FEW)


@pytest.mark.usefixtures("x64")
def test_a_loss_that_draws_and_has_integers():
    """Dropout with the loss's key and a key it closes over, labels, and a table read by integers; under jit, scan and a map."""
    params = random_like(0, {"w": jnp.zeros((4, 6)), "v": jnp.zeros((6, 3))})
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 4, size=(2, 5)))
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 3, size=(2, 5)))
    other = jax.random.key(7, impl="rbg")

    def loss(params, batch, key):
        tokens, labels, sizes = batch
        keep = jax.random.bernoulli(key, 0.7, (5, 6)) & jax.random.bernoulli(other, 0.9, (5, 6))
        hidden = jnp.tanh(params["w"][tokens] * sizes[:, None]) * keep
        value = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["v"], labels).mean()
        return value, {"loss": value, "kept": keep.sum()}

    def value(derivative, remat, params, sizes):
        objective = query_loss(loss, unroll(optax.sgd(0.3), 4, derivative, remat))
        support = (tokens, labels, sizes)
        tasks = Task(support, jax.tree.map(lambda x: x[:, ::-1], support))
        return jax.vmap(lambda t, k: objective(params, t, k, 0)[0])(tasks, jax.random.split(KEY, 2)).mean()

    check(value, (params, 1 + 0.1 * random_like(3, jnp.zeros((2, 5)))), FEW)


@pytest.mark.usefixtures("x64")
def test_the_hessian_of_the_meta_objective():
    params, task = regression()
    flat, unflat = jax.flatten_util.ravel_pytree(params)

    def hessian(derivative, remat=None):
        adapt = unroll(optax.sgd(0.2), 3, derivative, remat)
        return jax.jacfwd(jax.grad(lambda p: query_loss(tanh_loss, adapt)(unflat(p), task, KEY, 0)[0]))

    ours, again, expected = jit(lambda p: [hessian(*m)(p) for m in ((mixed,), (mixed, 1), (reverse,))])(flat)
    assert error(ours, expected) <= 1e-10
    assert error(again, expected) <= 1e-10
    np.testing.assert_allclose(ours, ours.T, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", [mixed, partial(truncated, 1)], ids=["mixed", "truncated"])
def test_a_map_over_tasks_is_each_task(derivative):
    params, task = regression()
    tasks = jax.tree.map(lambda x: jnp.stack([x, jnp.cos(x), x**2]), task)
    of = derivative if derivative is mixed else derivative()
    gradient = jax.grad(lambda p, t: query_loss(tanh_loss, unroll(optax.adam(0.1), 3, of))(p, t, KEY, 0)[0])
    mapped = jit(jax.vmap(gradient, (None, 0)))(params, tasks)
    one = jit(gradient)
    for i in range(3):
        at = jax.tree.map(lambda x, i=i: x[i], (mapped, tasks))
        assert error(at[0], one(params, at[1])) <= 1e-10


def test_the_gradient_and_the_metrics_are_those_of_reverse():
    params, task = regression()
    for derivative in (mixed, first_order):
        ours, expected = (jit(d(tanh_loss))(params, task.support, KEY) for d in (derivative, reverse))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), ours, expected)


# Truncation.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("last", [0, 1, 3, 5, 9])
def test_a_truncated_derivative_on_a_quadratic_is_its_closed_form(last):
    """J = (I - αA)ᵏ of the last k of 5 steps, at the parameters after 5."""
    tasks, start, rate = quadratics(seed=1, tasks=1), np.linspace(-1, 2, 4), 0.3
    support, query = (Quadratic(*(np.asarray(x[0]) for x in side)) for side in tasks)
    move = np.eye(4) - rate * support.curvature
    end = support.center + np.linalg.matrix_power(move, 5) @ (start - support.center)
    outer = query.curvature @ (end - query.center)
    expected = np.linalg.matrix_power(move, min(last, 5)).T @ outer
    task = jax.tree.map(lambda x: x[0], tasks)

    def gradient(derivative, remat=None):
        adapt = unroll(optax.sgd(rate), 5, derivative, remat)
        return jax.grad(lambda p: query_loss(quadratic_loss, adapt)(p, task, KEY, 0)[0])

    of = truncated(last)
    ways = [(of,), (of, 2), (truncated(last, reverse),)]
    if last in (0, 9):
        ways.append((first_order if last == 0 else mixed,))
    for ours in jit(lambda p: [gradient(*way)(p) for way in ways])(jnp.asarray(start)):
        np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_the_trace_of_a_truncated_loop_is_whole():
    params, task = regression()
    whole, cut = (
        jit(partial(unroll(optax.adam(0.1), 5, d), tanh_loss))(params, task.support, KEY)
        for d in (reverse, truncated(2))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6), cut, whole)


def test_pieces_of_an_inner_loop():
    assert pieces(reverse, 5) == [(5, reverse)]
    assert pieces(truncated(2), 5) == [(3, first_order), (2, mixed)]
    assert pieces(truncated(0), 5) == [(5, first_order)]
    assert pieces(truncated(5, reverse), 5) == pieces(truncated(7, reverse), 5) == [(5, reverse)]
    assert isinstance(truncated(3), Truncated)


@pytest.mark.parametrize("last", [-1, 1.5, 2.0, True])
def test_a_wrong_truncation_is_refused(last):
    with pytest.raises(ValueError, match="whole number of inner steps"):
        inspect.unwrap(truncated)(last)  # in tests jaxtyping refuses a float first


@pytest.mark.parametrize("derivative", [reverse, mixed, truncated(0), truncated(2)])
def test_no_steps_give_the_parameters_back(derivative):
    params, task = regression()
    adapted = unroll(optax.sgd(0.1), 0, derivative, remat=2)(tanh_loss, params, task.support, KEY)
    jax.tree.map(np.testing.assert_array_equal, adapted.params, params)
    assert {x.shape[0] for x in jax.tree.leaves(adapted.trace.metrics)} == {0}
    jax.tree.map(lambda x, start: np.testing.assert_array_equal(x, start[None]), adapted.trace.params, params)


# Rematerialisation.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", [reverse, mixed])
def test_rematerialised_blocks_of_any_size_agree(derivative):
    params, task = regression()

    def run(params, support, remat):
        adapted = unroll(optax.sgd(0.1, momentum=0.9), 7, derivative, remat)(tanh_loss, params, support, KEY)
        return tanh_loss(adapted.params, task.query, KEY)[0], adapted

    def everything(params, support):
        return {n: jax.grad(run, (0, 1), has_aux=True)(params, support, n or None) for n in (0, 1, 2, 3, 50)}

    results = jit(everything)(params, task.support)
    for grads, adapted in results.values():
        assert error(grads, results[0][0]) <= 1e-10
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), adapted, results[0][1])
    assert results[2][1].trace.metrics["loss"].shape == (7,)


@pytest.mark.parametrize("remat", [0, -1, True, 1.5])
def test_a_wrong_block_is_refused(remat):
    with pytest.raises(ValueError, match="the steps of a block"):
        inspect.unwrap(unroll)(optax.sgd(0.1), 3, remat=remat)


# Where forward mode is impossible.


@jax.custom_vjp
def cosine(x):
    return jnp.cos(x)


cosine.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (-g * jnp.sin(x),))


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), cosine(x)), lambda c, g: (g * c,))


def host(f):
    return lambda x: jax.pure_callback(f, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="broadcast_all")


@jax.custom_vjp
def host_cosine(x):
    return host(np.cos)(x)


host_cosine.defvjp(lambda x: (host(np.cos)(x), x), lambda x, g: (-g * jnp.sin(x),))


@jax.custom_vjp
def host_sine(x):
    return host(np.sin)(x)


host_sine.defvjp(lambda x: (host_sine(x), x), lambda x, g: (g * host_cosine(x),))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("operation", "name"), [(sine, "cosine"), (host_sine, "host_cosine")])
def test_an_operation_without_forward_mode_falls_back_with_one_warning(operation, name):
    params, task = regression()

    def loss(params, batch, key):
        del key
        value = jnp.mean((operation(batch[0] @ params["w"]) @ params["v"] - batch[1]) ** 2)
        return value, {"loss": value}

    def gradient(derivative):
        adapt = unroll(optax.sgd(0.1), 4, derivative)
        return jax.grad(lambda p, s: query_loss(loss, adapt)(p, Task(s, task.query), KEY, 0)[0], (0, 1))

    with pytest.warns(UserWarning, match=f"derivative=mixed: .*{name}.* cannot be differentiated forwards") as seen:
        ours = jit(gradient(mixed))(params, task.support)
    assert len(seen) == 1
    assert error(ours, jit(gradient(reverse))(params, task.support)) <= 1e-10


@pytest.mark.usefixtures("x64")
def test_a_custom_vjp_whose_rule_can_be_differentiated_forwards_needs_no_fallback():
    params, task = regression()

    def loss(params, batch, key):
        del key
        value = jnp.mean((cosine(batch[0] @ params["w"]) @ params["v"] - batch[1]) ** 2)
        return value, {"loss": value}

    def gradient(derivative):
        return jax.grad(lambda p: query_loss(loss, unroll(optax.sgd(0.1), 3, derivative, 1))(p, task, KEY, 0)[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, expected = jit(lambda p: [gradient(d)(p) for d in (mixed, reverse)])(params)
    assert error(ours, expected) <= 1e-10


# Semi-gradients: TD(0) with a linear value of features, ten steps.


def td_error(value, params, target, batch):
    now, then, reward = batch
    return 0.5 * jnp.mean((reward + 0.9 * value(target, then) - value(params, now)) ** 2)


def linear(params, features):
    return features @ params["w"] + params["b"]


@semi_gradient
def td(params, target, batch, key):
    del key
    value = td_error(linear, params, target, batch)
    return value, {"loss": value}


def stopped(params, batch, key):
    del key
    value = td_error(linear, params, jax.lax.stop_gradient(params), batch)
    return value, {"loss": value}


def by_hand(params, batch, rate, moving=("w", "b"), steps=10):
    """θ ← θ + α mean(δ ∂v/∂θ), δ = r + 0.9 v(s') - v(s)."""
    now, then, reward = batch
    for _ in range(steps):
        delta = reward + 0.9 * linear(params, then) - linear(params, now)
        up = {"w": now.T @ delta / len(delta), "b": delta.mean()}
        params = {k: params[k] + rate * up[k] if k in moving else params[k] for k in params}
    return params


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("moving", [("w", "b"), ("w",)], ids=["whole", "only"])
def test_the_meta_gradient_of_a_semi_gradient_is_that_of_the_program(moving):
    params = random_like(0, {"w": jnp.zeros(4), "b": jnp.zeros(())})
    batch = random_like(1, (jnp.zeros((6, 4)), jnp.zeros((6, 4)), jnp.zeros(6)))
    features, truth = random_like(2, (jnp.zeros((7, 4)), jnp.zeros(7)))

    def judged(params):
        return jnp.mean((linear(params, features) - truth) ** 2)

    def value(loss, derivative, remat, params, batch, rate):
        adapt = unroll(optax.sgd(rate), 10, derivative, remat)
        if moving == ("w",):
            adapt = only(lambda path, leaf: "w" in path, adapt)  # noqa: ARG005
        return judged(adapt(loss, params, batch, KEY).params)

    @jit
    def program(params, batch, rate):
        return judged(by_hand(params, batch, rate, moving))

    arguments = (params, batch, jnp.float64(0.2))
    grads = jit(
        lambda *a: {
            (name_of_loss, name): jax.value_and_grad(partial(value, loss, *mode), (0, 1, 2))(*a)
            for name_of_loss, loss in (("td", td), ("stopped", stopped))
            for name, mode in (MODES if loss is td else FEW).items()
        }
    )(*arguments)
    directions = [random_like(3 + i, a) for i, a in enumerate(arguments)]
    slopes = [
        central_difference(lambda x, i=i: program(*arguments[:i], x, *arguments[i + 1 :]), arguments[i], along, 1e-5)
        for i, along in enumerate(directions)
    ]
    for (loss, _), (end, grad) in grads.items():
        assert end == pytest.approx(float(program(*arguments)), rel=1e-12)  # the update is the same, stopped or not
        ours = [dot(*pair) for pair in zip(grad, directions, strict=True)]
        if loss == "td":
            assert ours == pytest.approx(slopes, rel=1e-6)
        else:
            assert abs(ours[0] - slopes[0]) > 1e-2 * abs(slopes[0])


# Memory: temporaries of the compiled program, in bytes, float32.


def temporaries(f, *arguments) -> int:
    return jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def of_one_task(loss, derivative, steps, remat=None):
    objective = query_loss(loss, unroll(optax.sgd(0.4), steps, derivative, remat))
    return jax.grad(lambda p, task: objective(p, task, KEY, 0)[0])


def test_rematerialised_steps_keep_the_parameters_alone():
    """A wide batch: the activations of a step, (32 + 128 + 32) x 400 numbers, are nine times the parameters."""
    apply, params = some(MLP, (32,), 1, hidden=(128, 32), kernel_init=nnx.initializers.normal(0.1))
    side = (jnp.zeros((400, 32)), jnp.zeros((400, 1)))
    used = {
        (d, steps, remat): temporaries(of_one_task(mse(apply), d, steps, remat), params, Task(side, side))
        for d, steps, remat in ((reverse, 40, None), (mixed, 40, 1), (mixed, 10, 1))
    }
    assert used[mixed, 40, 1] <= 0.25 * used[reverse, 40, None], used
    assert used[mixed, 40, 1] - used[mixed, 10, 1] <= 1.2 * 30 * size(params), used


def case_b(queries: int = 75):
    norm = partial(nnx.BatchNorm, use_scale=False)
    apply, params = some(Conv4, (28, 28, 1), 5, norm=norm)
    sides = [(jnp.zeros((n, 28, 28, 1)), jnp.zeros(n, jnp.int32)) for n in (5, queries)]
    return cross_entropy(apply), params, Task(*sides)


@pytest.mark.slow
def test_memory_of_mixed_mode_with_rematerialised_steps():
    """The query set takes the same in both modes (with 75 images half of all): what counts is the growth with the steps."""
    loss, params, task = case_b()
    used = {n: temporaries(of_one_task(loss, mixed, n, 1), params, task) for n in (5, 20, 50)}
    plain = {n: temporaries(of_one_task(loss, reverse, n), params, task) for n in (5, 20)}
    assert used[20] - used[5] <= 0.2 * (plain[20] - plain[5]), (used, plain)
    assert used[20] <= 0.5 * plain[20], (used, plain)
    assert used[50] - used[5] <= 1.2 * 45 * size(params), (used, size(params))


@pytest.mark.slow
def test_evaluation_needs_the_memory_of_first_order():
    loss, params, task = case_b()
    adapt = unroll(optax.sgd(0.4), 10)
    protocol = Protocol(ways=5, shots=1, queries=15, steps=10)
    many = jax.tree.map(lambda x: x[None], task)

    def evaluation(params, task):
        return _curve(params, lambda keys: task, loss, adapt, protocol, KEY, range(protocol.steps + 1))  # noqa: ARG005

    ours = temporaries(evaluation, params, many)
    training = temporaries(of_one_task(loss, first_order, 10), params, task)
    assert ours <= training, (ours, training)

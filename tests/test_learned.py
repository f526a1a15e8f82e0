"""Inner loops with parameters of their own: step sizes, factors, rows, a carried state, prototypes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maml.derivatives import first_order, mixed, reverse
from maml.inner_loop import (
    carried_state,
    from_zero,
    learned,
    learned_hyperparameters,
    learned_step_sizes,
    low_rank,
    minibatches,
    only,
    per_step,
    unroll,
    with_prototypes,
)
from maml.inner_loop.parts import first_row
from maml.losses import cross_entropy, mse
from maml.models import MLP, functional
from maml.objectives import parameter_distance, query_loss
from maml.types import MetaParams, Task, equations, initial, roles
from tests.helpers import Quadratic, central_difference, closed_form, dot, quadratic_loss, quadratics, random_like

KEY = jax.random.key(0)


def mean_gradient(objective, meta_params, tasks):
    def mean(meta_params):
        return jax.vmap(lambda task: objective(meta_params, task, KEY, 0)[0])(tasks).mean()

    return jax.jit(jax.grad(mean))(meta_params)


def network(*, norm=None, context=0, outputs=1, hidden=(5,)):
    """A tanh-free small network with all parameters away from zero, in float64."""
    init = nnx.initializers.normal(0.7)
    model = MLP((2,), outputs, hidden=hidden, norm=norm, kernel_init=init, context=context, rngs=nnx.Rngs(3))
    apply, params = functional(model)
    return apply, jax.tree.map(lambda x: x.astype(jnp.float64), params)


def regression(seed=0, examples=6):
    x, y = random_like(seed, jnp.zeros((2, examples, 2))), random_like(seed + 1, jnp.zeros((2, examples, 1)))
    return Task((x[0], y[0]), (x[1], y[1]))


def check_gradient(objective, meta_params, task, rel=1e-6):
    def value(meta):
        return objective(meta, task, KEY, 0)[0]

    along = random_like(9, meta_params)
    grads = jax.jit(jax.grad(value))(meta_params)
    expected = central_difference(jax.jit(value), meta_params, along, 1e-6)
    assert dot(grads, along) == pytest.approx(expected, rel=rel, abs=1e-9)
    return grads


# --- learned step sizes ---


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("per", "per_step"), [("loop", False), ("tensor", True), ("parameter", False)])
def test_constant_step_sizes_are_maml_and_have_their_own_gradient(per, per_step):
    """On a quadratic with one step: ∂/∂α of the query loss at θ - α g is -gᵀC(θ' - c), and for each number -gᵢ [C(θ' - c)]ᵢ."""
    tasks, theta = quadratics(seed=1), jnp.arange(4.0)
    adapt = learned_step_sizes(1, 0.3, per=per, per_step=per_step)
    meta = initial(adapt, theta, KEY)
    grads = mean_gradient(query_loss(quadratic_loss, adapt), meta, tasks)
    np.testing.assert_allclose(grads.params, closed_form(tasks, np.arange(4.0), 0.3, 1, False), rtol=1e-12)
    numbers = []
    for i in range(3):
        support, query = (Quadratic(*(np.asarray(x[i]) for x in side)) for side in tasks)
        slope = support.curvature @ (np.arange(4.0) - support.center)
        numbers.append(-slope * (query.curvature @ (np.arange(4.0) - 0.3 * slope - query.center)))
    expected = np.mean(numbers, 0) if per == "parameter" else np.mean(numbers, 0).sum()
    np.testing.assert_allclose(np.squeeze(grads.inner), expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", [reverse, mixed])
@pytest.mark.parametrize("optimizer", [None, optax.adam(1.0, eps=0.1)], ids=["sgd", "adam"])
def test_step_sizes_per_tensor_and_step_agree_with_central_differences(derivative, optimizer):
    apply, params = network()
    adapt = learned_step_sizes(
        3, (0.05, 0.2), optimizer, per="tensor", per_step=True, positive=True, derivative=derivative
    )
    meta = initial(only(nnx.PathContains("layers"), adapt), params, KEY)
    assert {x.shape for x in jax.tree.leaves(meta.inner)} == {(3,)}
    assert len(jax.tree.leaves(meta.inner)) == 2  # kernel and bias of the one layer that moves
    sizes = np.exp(np.concatenate(jax.tree.leaves(meta.inner)))
    assert sizes.min() > 0.05
    assert sizes.max() < 0.2
    assert np.unique(sizes).size == 6
    check_gradient(query_loss(mse(apply), only(nnx.PathContains("layers"), adapt)), meta, regression())


@pytest.mark.usefixtures("x64")
def test_anything_that_an_inner_loop_closes_over_can_be_learned():
    """Step size and momentum together: the derivative is that of the program."""
    apply, params = network()
    adapt = learned(
        lambda h: unroll(optax.sgd(h["step_size"], h["momentum"]), 3),
        lambda params, key: {"step_size": jnp.float64(0.1), "momentum": jnp.float64(0.5)},  # noqa: ARG005
    )
    grads = check_gradient(query_loss(mse(apply), adapt), initial(adapt, params, KEY), regression())
    assert all(float(abs(x)) > 1e-6 for x in grads.inner.values())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", [reverse, mixed])
@pytest.mark.parametrize(
    ("optimizer", "initial_values", "how"),
    [
        (optax.sgd, {"learning_rate": 0.1, "momentum": 0.5}, {}),
        (
            partial(optax.adamw, eps=0.1),
            {"learning_rate": 0.1, "b1": 0.5, "weight_decay": 0.2},
            {"per_step": True, "positive": True},
        ),
    ],
    ids=["momentum", "adamw"],
)
def test_hyperparameters_of_an_optimizer_are_learned(optimizer, initial_values, how, derivative):
    apply, params = network()
    adapt = learned_hyperparameters(3, optimizer, initial_values, derivative=derivative, **how)
    meta = initial(adapt, params, KEY)
    values = jax.tree.map(jnp.exp, meta.inner) if how else meta.inner
    assert {k: x.shape for k, x in values.items()} == dict.fromkeys(initial_values, (3,) if how else ())
    for name, x in values.items():
        np.testing.assert_allclose(x, initial_values[name], rtol=1e-12)
    task = regression()
    plain = unroll(optimizer(**initial_values), 3)(mse(apply), params, task.support, KEY).params
    ours = adapt(mse(apply), meta, task.support, KEY).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, plain)
    grads = check_gradient(query_loss(mse(apply), adapt), meta, task)
    assert all(np.abs(x).min() > 1e-7 for x in grads.inner.values())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("per", ["tensor", "parameter"])
def test_each_tensor_or_parameter_has_its_own_hyperparameters(per, per_step):
    """SGD with momentum by hand: m ← g + μ m, θ ← θ - α m, with other α and μ for each tensor or number, and step."""
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5], [3.0]])}

    def loss(p, batch, key):
        del key
        return (batch * p["a"] ** 2).sum() / 2 + (p["a"] @ p["b"]).sum() ** 2, {}

    adapt = learned_hyperparameters(3, optax.sgd, {"learning_rate": 0.1, "momentum": 0.5}, per=per, per_step=per_step)
    inner = initial(adapt, params, KEY).inner
    shapes = {k: (3,) * per_step + (x.shape if per == "parameter" else ()) for k, x in params.items()}
    assert {h: {k: x.shape for k, x in tree.items()} for h, tree in inner.items()} == dict.fromkeys(inner, shapes)
    rng = np.random.default_rng(0)
    inner = jax.tree.map(lambda x: jnp.asarray(x * rng.uniform(0.5, 1.5, x.shape)), inner)
    theta, moment = dict(params), jax.tree.map(jnp.zeros_like, params)
    for step in range(3):
        grads = jax.grad(lambda p: loss(p, 2.0, KEY)[0])(theta)
        for k in theta:
            alpha, mu = (inner[h][k][step] if per_step else inner[h][k] for h in ("learning_rate", "momentum"))
            moment[k] = grads[k] + mu * moment[k]
            theta[k] = theta[k] - alpha * moment[k]
    adapted = adapt(loss, MetaParams(params, inner), 2.0, KEY).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), adapted, theta)
    check_gradient(query_loss(loss, adapt), MetaParams(params, inner), Task(2.0, 3.0))


@pytest.mark.usefixtures("x64")
def test_a_loop_around_tensors_of_their_own_optimizer_moves_a_part():
    apply, params = network()
    adapt = only(nnx.PathContains("head"), learned_hyperparameters(1, optax.adam, {"learning_rate": 0.1}, per="tensor"))
    meta = initial(adapt, params, KEY)
    assert len(jax.tree.leaves(meta.inner)) == 2
    adapted = adapt(mse(apply), meta, regression().support, KEY).params
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), adapted, params)
    assert sum(jax.tree.leaves(moved)) == 2
    with pytest.raises(ValueError, match="per='step': give one of loop, tensor, parameter"):
        learned_hyperparameters(1, optax.sgd, {"learning_rate": 0.1}, per="step")


@pytest.mark.usefixtures("x64")
def test_each_step_has_its_own_hyperparameters():
    """θ ← θ - αₜ A (θ - c), by hand, with other numbers in every row; fewer steps take the first ones, more are refused."""
    support = jax.tree.map(lambda x: x[0], quadratics(seed=4).support)
    rows = {"learning_rate": jnp.array([0.3, 0.1, 0.02])}
    expected = [np.arange(4.0)]
    for alpha in np.asarray(rows["learning_rate"]):
        expected.append(expected[-1] - alpha * np.asarray(support[0]) @ (expected[-1] - np.asarray(support[1])))
    for steps in (2, 3):
        adapt = learned_hyperparameters(steps, optax.sgd, {"learning_rate": 0.1}, per_step=True)
        adapted = adapt(quadratic_loss, MetaParams(jnp.arange(4.0), rows), support, KEY)
        np.testing.assert_allclose(adapted.trace.params, expected[: steps + 1], rtol=1e-12)
    four = learned_hyperparameters(4, optax.sgd, {"learning_rate": 0.1}, per_step=True)
    with pytest.raises(ValueError, match="steps=4: these were learned for 3 inner steps; take at most 3"):
        four(quadratic_loss, MetaParams(jnp.arange(4.0), rows), support, KEY)
    with pytest.raises(ValueError, match="give one hyperparameter or more"):
        learned_hyperparameters(1, optax.sgd, {})
    with pytest.raises(ValueError, match="above 0"):
        learned_hyperparameters(1, optax.sgd, {"learning_rate": 0.1, "momentum": 0.0}, positive=True)
    with pytest.raises(ValueError, match="momentun"):
        learned_hyperparameters(1, optax.sgd, {"learning_rate": 0.1, "momentun": 0.5})


@pytest.mark.usefixtures("x64")
def test_first_order_leaves_the_first_derivative_of_the_step_sizes():
    """θ' = θ - α g with g constant: ∂/∂α is the same as with the whole derivative for one step, ∂/∂θ is FOMAML's."""
    tasks = quadratics(seed=2)
    parts = {}
    for name, derivative in (("first", first_order), ("full", reverse)):
        adapt = learned_step_sizes(1, 0.2, per="parameter", per_step=False, derivative=derivative)
        meta = initial(adapt, jnp.arange(4.0), KEY)
        parts[name] = mean_gradient(query_loss(quadratic_loss, adapt), meta, tasks)
    np.testing.assert_allclose(parts["first"].inner, parts["full"].inner, rtol=1e-12)
    np.testing.assert_allclose(parts["first"].params, closed_form(tasks, np.arange(4.0), 0.2, 1, True), rtol=1e-12)


def test_step_sizes_that_cannot_be_are_refused():
    for wrong, message in (
        ({"per": "layer"}, "per='layer'"),
        ({"initial": (0.2, 0.1)}, "initial="),
        ({"initial": 0.0, "positive": True}, "above 0"),
        ({"steps": -1}, "steps=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            learned_step_sizes(**({"steps": 1, "initial": 0.1} | wrong))
    two, three = (learned_step_sizes(n, 0.1) for n in (2, 3))
    support = jax.tree.map(lambda x: x[0].astype(jnp.float32), quadratics(seed=0).support)
    with pytest.raises(ValueError, match="learned for 2 inner steps"):
        three(quadratic_loss, initial(two, jnp.ones(4), KEY), support, KEY)
    with pytest.raises(ValueError, match="MetaParams"):
        two(quadratic_loss, jnp.ones(4), support, KEY)


def test_roles_separate_the_model_from_what_an_inner_loop_adds():
    labels = roles(MetaParams({"w": jnp.ones(2)}, {"a": jnp.ones(()), "b": jnp.ones(3)}))
    assert labels == MetaParams({"w": "params"}, {"a": "inner", "b": "inner"})
    assert roles({"w": jnp.ones(2)}) == {"w": "params"}


# --- low-rank factors ---


@pytest.mark.usefixtures("x64")
def test_factors_of_full_rank_reach_what_the_kernel_reaches():
    """A one-layer least-squares problem: descent in the factors goes to the optimum that W has."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(20, 3))), jnp.asarray(rng.normal(size=(20, 2)))
    loss = mse(lambda p, x: x @ p["kernel"])
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)))}
    best = np.linalg.lstsq(np.asarray(x), np.asarray(y), rcond=None)[0]
    adapt = low_rank(3, unroll(optax.adam(0.05), 2000))
    meta = initial(adapt, params, KEY)
    assert {k: v.shape for k, v in meta.inner["kernel"].items()} == {"a": (3, 2), "b": (2, 2)}
    adapted = jax.jit(adapt, static_argnums=0)(loss, meta, (x, y), KEY)
    np.testing.assert_allclose(adapted.params["kernel"], best, atol=1e-4)
    np.testing.assert_array_equal(adapted.trace.params["kernel"][0], params["kernel"])  # B starts at zero


@pytest.mark.usefixtures("x64")
def test_factors_move_alone_keep_their_rank_and_have_the_right_meta_gradient():
    apply, params = network(hidden=(5, 4))
    adapt = low_rank(1, unroll(optax.sgd(0.1), 3), where="layers/[01]/kernel$", scale=2.0)
    meta, task = initial(adapt, params, KEY), regression()
    moved = jax.tree.map(jnp.subtract, adapt(mse(apply), meta, task.support, KEY).params, params)
    assert np.linalg.matrix_rank(moved["layers"][1]["kernel"][...], tol=1e-9) == 1
    for still in (moved["head"]["kernel"], moved["head"]["bias"], moved["layers"][0]["bias"]):
        assert not np.asarray(still[...]).any()
    check_gradient(query_loss(mse(apply), adapt), meta, task)


@pytest.mark.usefixtures("x64")
def test_factors_inside_of_learned_step_sizes():
    apply, params = network(hidden=(5, 4))
    adapt = learned(lambda size: low_rank(1, unroll(optax.sgd(size), 2)), lambda *_: jnp.asarray(0.1))
    meta = initial(adapt, params, KEY)
    fixed = low_rank(1, unroll(optax.sgd(0.1), 2))
    found = adapt(mse(apply), meta, regression().support, KEY).params
    expected = fixed(mse(apply), meta.params, regression().support, KEY).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    grads = check_gradient(query_loss(mse(apply), adapt), meta, regression())
    assert float(grads.inner) != 0


def test_factors_refuse_ranks_patterns_and_plain_parameters():
    with pytest.raises(ValueError, match="takes MetaParams, and got dict"):
        low_rank(1, unroll(optax.sgd(0.1), 1))(mse(lambda p, x: x @ p["kernel"]), {"kernel": jnp.ones((2, 2))}, (), KEY)
    with pytest.raises(ValueError, match="rank=0"):
        low_rank(0, unroll(optax.sgd(0.1), 1))
    with pytest.raises(ValueError, match="where='conv' finds no matrix; the paths are"):
        initial(low_rank(1, unroll(optax.sgd(0.1), 1), where="conv"), {"kernel": jnp.ones((2, 2))}, KEY)
    with pytest.raises(ValueError, match="learned inner loop outside"):
        initial(low_rank(1, learned_step_sizes(1, 0.1)), {"kernel": jnp.ones((2, 2))}, KEY)


# --- rows per step ---


@pytest.mark.usefixtures("x64")
def test_step_i_and_predictions_after_it_use_row_i():
    """A loss a·w²/2 with a from the rows: steps multiply w by (1 - α aᵢ), and the query loss after step k is that of row k."""

    def loss(params, batch, key):
        del key
        value = params["norms"] * (params["w"] - batch) ** 2 / 2
        return value, {"loss": value}

    inner = only(lambda path, _: path[0] == "w", unroll(optax.sgd(0.1), 3))
    adapt = per_step(nnx.PathContains("norms"), 3, inner)
    params = initial(adapt, {"norms": jnp.float64(1.0), "w": jnp.float64(2.0)}, KEY)
    assert params["norms"].tolist() == [1, 1, 1]
    params = {"norms": jnp.array([1.0, 2.0, 3.0]), "w": jnp.float64(2.0)}
    adapted = adapt(loss, params, jnp.float64(0.0), KEY)
    path = 2.0 * np.cumprod([1, 0.9, 0.8, 0.7])
    np.testing.assert_allclose(adapted.trace.params["w"], path)
    np.testing.assert_allclose(adapted.trace.params["norms"], [1, 1, 2, 3])
    assert (float(adapted.params["norms"]), float(adapted.params["w"])) == pytest.approx((3, path[-1]))
    objective = query_loss(loss, adapt)
    value = objective(params, Task(jnp.float64(0.0), jnp.float64(0.5)), KEY, 0)[0]
    assert float(value) == pytest.approx(3 * (path[-1] - 0.5) ** 2 / 2)
    check_gradient(objective, params, Task(jnp.float64(0.0), jnp.float64(0.5)))


def test_rows_refuse_more_steps_than_there_are_and_models_without():
    inner = only(lambda path, _: path[0] == "w", unroll(optax.sgd(0.1), 3))
    params = {"norms": jnp.ones(()), "w": jnp.ones(())}
    two = initial(per_step(nnx.PathContains("norms"), 2, inner), params, KEY)
    loss = lambda p, b, k: (p["norms"] * p["w"] ** 2 + 0 * b, {})  # noqa: E731, ARG005
    with pytest.raises(ValueError, match="3 inner steps and 2 rows"):
        per_step(nnx.PathContains("norms"), 3, inner)(loss, two, jnp.ones(()), KEY)
    with pytest.raises(ValueError, match="selects no parameter"):
        initial(per_step(nnx.PathContains("scale"), 3, inner), params, KEY)
    with pytest.raises(ValueError, match="rows=-1"):
        per_step(nnx.PathContains("norms"), -1, inner)


@pytest.mark.usefixtures("x64")
def test_without_steps_the_first_row_predicts():
    """Nearest centroids of a MAML++ run: an evaluation of no steps, which has rows from training."""
    params = {"norms": jnp.array([5.0, 7.0]), "w": jnp.float64(2.0)}
    none = per_step(nnx.PathContains("norms"), 0, only(lambda path, _: path[0] == "w", unroll(optax.sgd(0.1), 0)))
    loss = lambda p, b, k: (p["norms"] * p["w"] ** 2 + 0 * b, {})  # noqa: E731, ARG005
    adapted = none(loss, params, jnp.ones(()), KEY)
    assert float(adapted.params["norms"]) == 5
    np.testing.assert_array_equal(adapted.trace.params["norms"], [5])
    assert initial(none, {"norms": jnp.ones(()), "w": jnp.ones(())}, KEY)["norms"].shape == (1,)


# --- contexts, minibatches, a carried state ---


@pytest.mark.usefixtures("x64")
def test_a_context_starts_at_zero_and_alone_moves():
    apply, params = network(context=3)
    params["context"].set_value(jnp.ones(3))
    adapt = only(nnx.PathContains("context"), from_zero(unroll(optax.sgd(0.5), 2)))
    adapted = adapt(mse(apply), params, regression().support, KEY)
    np.testing.assert_array_equal(adapted.trace.params["context"][...][0], 0)
    assert np.abs(adapted.params["context"][...]).min() > 1e-4
    np.testing.assert_array_equal(adapted.params["layers"][0]["kernel"][...], params["layers"][0]["kernel"][...])
    grads = check_gradient(query_loss(mse(apply), adapt), params, regression())
    np.testing.assert_array_equal(grads["context"][...], 0)
    with pytest.raises(ValueError, match="from_zero: around only.*the whole model would start at zero"):
        from_zero(only(nnx.PathContains("context"), unroll(optax.sgd(0.5), 2)))


def test_minibatches_go_through_the_support_set_once_before_any_example_comes_again():
    """Parameters count how often each example was seen: the gradient of -Σ over the batch of θ[example] is minus a count."""

    def loss(params, batch, key):
        del key
        value = -jnp.sum(params[batch])
        return value, {"loss": value}

    def seen(size, steps, examples=7, key=KEY):
        adapt = minibatches(size, unroll(optax.sgd(1.0), steps))
        return np.asarray(adapt(loss, jnp.zeros(examples), jnp.arange(examples), key).trace.params)

    counts = seen(3, 14)
    assert counts[7].tolist() == [3] * 7
    assert counts[14].tolist() == [6] * 7
    assert counts[2].max() == 1  # 6 of 7, none twice
    assert set(np.diff(counts, axis=0).sum(1)) == {3}
    assert seen(7, 2)[-1].tolist() == [2] * 7
    other = seen(3, 14, key=jax.random.key(1))
    assert (other[1] != counts[1]).any()
    large = seen(5, 7, examples=6)  # a batch holds parts of two shuffles
    assert large[6].tolist() == [5] * 6
    with pytest.raises(ValueError, match="size=0"):
        minibatches(0, unroll(optax.sgd(1.0), 1))


def test_the_keys_of_shuffles_are_not_those_of_the_loss():
    """The child i of a split key is the key folded with i: an example would depend on what the loss draws."""
    drawn, shuffled = [], []

    def loss(params, batch, key):
        drawn.append(jax.random.key_data(key).tolist())
        return jnp.sum(params * batch), {}

    permutation = jax.random.permutation

    def watched(key, count):
        jax.debug.callback(lambda data: shuffled.append(data.tolist()), jax.random.key_data(key))
        return permutation(key, count)

    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "permutation", watched)
        minibatches(2, unroll(optax.sgd(0.1), 3))(loss, jnp.zeros(2), jnp.ones(5), KEY)
    jax.effects_barrier()
    assert shuffled
    assert [key for key in shuffled if key in drawn] == []


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("outside", ["minibatches", "per_step", "two of per_step", "only"])
def test_rows_and_minibatches_go_together_in_any_order(outside):
    """One step of each minibatch by hand, with the rows of its step; the examples of a batch are those without rows."""
    data = jnp.arange(1.0, 6.0)

    def loss(params, batch, key):
        del key
        value = jnp.mean(params["a"] * params["b"] * (params["w"] - batch) ** 2) / 2
        return value, {"loss": value}

    base = only(lambda path, _: path[0] == "w", unroll(optax.sgd(0.1), 3))
    a, b = (lambda adapt, name=name: per_step(nnx.PathContains(name), 3, adapt) for name in "ab")
    adapt = {
        "minibatches": lambda: minibatches(2, a(b(base))),
        "per_step": lambda: a(b(minibatches(2, base))),
        "two of per_step": lambda: a(minibatches(2, b(base))),
        "only": lambda: only(lambda path, _: path[0] != "c", a(b(minibatches(2, base)))),
    }[outside]()
    params = {
        "a": jnp.array([1.0, 2.0, 3.0]),
        "b": jnp.array([0.5, 1.5, 1.0]),
        "c": jnp.float64(7.0),
        "w": jnp.float64(2.0),
    }
    made = initial(adapt, dict.fromkeys("abcw", jnp.float64(1.0)), KEY)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(float, first_row(adapt)(params)) == {"a": 1.0, "b": 0.5, "c": 7.0, "w": 2.0}
    path = adapt(loss, params, data, KEY).trace.params["w"]
    plain = minibatches(2, unroll(optax.sgd(1.0), 3))
    counts = plain(lambda p, i, k: (-jnp.sum(p[i]), {}), jnp.zeros(5), jnp.arange(5), KEY).trace.params  # noqa: ARG005
    w = 2.0
    for step, seen in enumerate(np.diff(np.asarray(counts), axis=0)):
        w -= 0.1 * float(params["a"][step] * params["b"][step]) * np.average(w - np.asarray(data), weights=seen)
        assert path[step + 1] == pytest.approx(w)


@pytest.mark.usefixtures("x64")
def test_reptile_moves_by_the_mean_displacement_and_carries_adams_state():
    """Three tasks on quadratics, outer SGD of step size ε on parameters and 1 on the state: by hand in NumPy."""
    tasks, theta, epsilon = quadratics(seed=4), np.arange(4.0), 0.25
    adapt = carried_state(optax.adam(0.01, b1=0.0), 3)
    meta = initial(adapt, jnp.asarray(theta), KEY)
    outer = optax.partition({"params": optax.sgd(epsilon), "inner": optax.sgd(1.0)}, roles)
    state, second, count = outer.init(meta), np.zeros(4), 0

    @jax.jit
    def step(meta, state):
        updates, state = outer.update(
            mean_gradient(parameter_distance(quadratic_loss, adapt), meta, tasks), state, meta
        )
        return optax.apply_updates(meta, updates), state

    for _ in range(2):
        meta, state = step(meta, state)
        ends, moments = [], []
        for i in range(3):
            support = Quadratic(*(np.asarray(x[i]) for x in tasks.support))
            x, v = theta.copy(), second.copy()
            for t in range(count + 1, count + 4):
                g = support.curvature @ (x - support.center)
                v = 0.999 * v + 0.001 * g**2
                x = x - 0.01 * g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            ends.append(x)
            moments.append(v)
        theta, second, count = theta + epsilon * (np.mean(ends, 0) - theta), np.mean(moments, 0), count + 3
        np.testing.assert_allclose(meta.params, theta, rtol=1e-10)
        np.testing.assert_allclose(meta.inner[0].nu, second, rtol=1e-10)
        assert float(meta.inner[0].count) == count


def test_reptile_runs_its_inner_loop_once():
    """The end that it moves to and the metrics that it reports are of one run: two loops would cost twice the time."""
    adapt = carried_state(optax.adam(0.01), 20)
    task = jax.tree.map(lambda x: x[0].astype(jnp.float32), quadratics(seed=4))
    meta = initial(adapt, jnp.arange(4.0), KEY)
    made = jax.make_jaxpr(lambda m: parameter_distance(quadratic_loss, adapt)(m, task, KEY, 0))(meta)
    assert [eqn.params["length"] for eqn, _ in equations(made.jaxpr) if eqn.primitive.name == "scan"] == [19]


@pytest.mark.usefixtures("x64")
def test_the_distance_is_reptiles_update_and_refuses_what_it_cannot_move():
    tasks = quadratics(seed=5)
    adapt = unroll(optax.sgd(0.1), 4)
    grads = mean_gradient(parameter_distance(quadratic_loss, adapt), jnp.arange(4.0), tasks)
    ends = [
        adapt(quadratic_loss, jnp.arange(4.0), jax.tree.map(lambda x, i=i: x[i], tasks.support), KEY).params
        for i in range(3)
    ]
    np.testing.assert_allclose(grads, np.arange(4.0) - np.mean(ends, 0), rtol=1e-12)
    learned_loop = learned_step_sizes(2, 0.1)
    with pytest.raises(ValueError, match="parameters of its own"):
        mean_gradient(
            parameter_distance(quadratic_loss, learned_loop), initial(learned_loop, jnp.arange(4.0), KEY), tasks
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("last", [1, 2, 4])
def test_the_last_steps_alone_are_sums_of_the_last_gradients(last):
    """Four steps on a quadratic by hand: the gradients of the last ones times the step size; all four are Reptile."""
    task = jax.tree.map(lambda x: x[0], quadratics(seed=5))
    support = Quadratic(*map(np.asarray, task.support))
    theta, gradients = np.arange(4.0), []
    for _ in range(4):
        gradients.append(support.curvature @ (theta - support.center))
        theta = theta - 0.1 * gradients[-1]
    objective = parameter_distance(quadratic_loss, unroll(optax.sgd(0.1), 4), last=last)
    got = jax.grad(lambda p: objective(p, task, KEY, 0)[0])(jnp.arange(4.0))
    np.testing.assert_allclose(got, 0.1 * np.sum(gradients[-last:], 0), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_with_a_carried_state_the_last_step_moves_parameters_and_all_steps_the_state():
    task = jax.tree.map(lambda x: x[0], quadratics(seed=5))
    adapt = carried_state(optax.adam(0.01, b1=0.0), 3)
    meta = initial(adapt, jnp.arange(4.0), KEY)
    grads = [
        jax.grad(lambda m, n=n: parameter_distance(quadratic_loss, adapt, last=n)(m, task, KEY, 0)[0])(meta)
        for n in (1, None)
    ]
    path = adapt(quadratic_loss, meta, task.support, KEY).trace.params
    np.testing.assert_allclose(grads[0].params, path[2] - path[3], rtol=1e-10)
    np.testing.assert_allclose(grads[1].params, path[0] - path[3], rtol=1e-10)
    np.testing.assert_array_equal(grads[0].inner[0].nu, grads[1].inner[0].nu)


@pytest.mark.parametrize(
    ("last", "message"), [(0, "last=0: give inner steps"), (5, "last=5: the inner loop takes 4 steps")]
)
def test_steps_that_there_are_not_are_refused(last, message):
    task = jax.tree.map(lambda x: x[0].astype(jnp.float32), quadratics(seed=5))
    with pytest.raises(ValueError, match=message):
        parameter_distance(quadratic_loss, unroll(optax.sgd(0.1), 4), last=last)(jnp.arange(4.0), task, KEY, 0)


# --- prototypes ---


def blobs(ways=3, shots=2):
    labels = jnp.repeat(jnp.arange(ways), shots)
    x = random_like(0, jnp.zeros((2, ways * shots, 2))) + 2.0 * labels[None, :, None]
    return Task((x[0], labels), (x[1], labels))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ways", [3, 2])
def test_a_head_of_prototypes_is_the_nearest_class_mean(ways):
    """Probabilities are softmax(-|f(x) - c|²) over the classes of the task, also where the head is wider than the task."""
    apply, params = network(outputs=3)
    task = blobs(ways)
    adapted = with_prototypes(unroll(optax.sgd(0.1), 0))(cross_entropy(apply), params, task.support, KEY)
    features, query = (np.asarray(apply.features(params, side[0])) for side in task)
    means = np.stack([features[np.asarray(task.support[1]) == k].mean(0) for k in range(ways)])
    distances = ((query[:, None] - means[None]) ** 2).sum(-1)
    expected = np.exp(-distances) / np.exp(-distances).sum(1, keepdims=True)
    found = np.asarray(jax.nn.softmax(apply(adapted.params, task.query[0])))
    np.testing.assert_allclose(found[:, :ways], expected, rtol=1e-8)
    assert not found[:, ways:].any()
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[0], adapted.trace.params), adapted.params)


@pytest.mark.usefixtures("x64")
def test_nil_predicts_the_labels_that_cosine_similarity_weighs_most():
    apply, params = network(outputs=3)
    task = blobs()
    adapted = with_prototypes(unroll(optax.sgd(0.1), 0), "cosine")(cross_entropy(apply), params, task.support, KEY)
    features, query = (np.asarray(apply.features(params, side[0])) for side in task)
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (features, query)]
    votes = unit[1] @ unit[0].T @ np.eye(3)[np.asarray(task.support[1])]
    seen = np.linalg.norm(query, axis=1) > 0
    assert seen.any()
    np.testing.assert_array_equal(
        np.asarray(apply(adapted.params, task.query[0])).argmax(1)[seen], votes.argmax(1)[seen]
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "steps"), [("euclidean", 2), ("cosine", 0)])
def test_derivatives_go_through_the_prototypes(kind, steps):
    apply, params = network(outputs=3)
    adapt = with_prototypes(unroll(optax.sgd(0.05), steps), kind)
    grads = check_gradient(query_loss(cross_entropy(apply), adapt), params, blobs())
    assert not np.asarray(grads["head"]["kernel"][...]).any()
    assert np.asarray(grads["layers"][0]["kernel"][...]).any()


def test_prototypes_ask_for_features_and_a_head():
    adapt = with_prototypes(unroll(optax.sgd(0.1), 0))
    task = jax.tree.map(jnp.asarray, blobs())
    with pytest.raises(ValueError, match="the loss has no `features`.*loss.features = apply.features"):
        adapt(
            cross_entropy(lambda p, x: x @ p["head"]["kernel"]),
            {"head": {"kernel": jnp.ones((2, 3))}},
            task.support,
            KEY,
        )
    apply, params = functional(MLP((2,), 3, hidden=(4,), rngs=nnx.Rngs(0)))
    headless = jax.tree.map(lambda x: x, params)
    del headless["head"]["bias"]  # without it the classes are not at their distances
    with pytest.raises(ValueError, match=r"with kernel and bias; this model has of 'head' \['kernel'\]"):
        adapt(cross_entropy(apply), headless, task.support, KEY)
    with pytest.raises(ValueError, match="prototypes: 'l1'"):
        with_prototypes(adapt, "l1")


# --- together ---


@pytest.mark.usefixtures("x64")
def test_loops_of_maml_pp_agree_with_central_differences():
    """Rows of norms, step sizes per tensor and step, everything but the norms moving."""
    apply, params = network(norm=partial(nnx.BatchNorm, epsilon=1e-2), outputs=1)
    norms = nnx.PathContains("norms")
    adapt = per_step(norms, 2, only(nnx.Not(norms), learned_step_sizes(2, (0.05, 0.1), per="tensor")))
    meta = initial(adapt, params, KEY)
    meta = jax.tree.map(jnp.add, meta, jax.tree.map(lambda x: 0.1 * x, random_like(2, meta)))  # rows that differ
    check_gradient(query_loss(mse(apply), adapt), meta, regression())


def test_a_state_that_keeps_the_hyperparameters_of_the_first_step_is_refused():
    """Later rows would not be read; of one row for all steps, and of states without hyperparameters, there is no such thing."""
    params, keeping = {"w": jnp.ones(3)}, optax.inject_hyperparams(optax.sgd)
    with pytest.raises(
        ValueError, match="per_step: the state of this optimizer keeps the hyperparameters of the first step"
    ):
        initial(learned_hyperparameters(2, keeping, {"learning_rate": 0.1}, per_step=True), params, KEY)
    initial(learned_hyperparameters(2, keeping, {"learning_rate": 0.1}), params, KEY)
    for optimizer in (optax.adam, optax.adamw, optax.rmsprop, partial(optax.sgd, momentum=0.9)):
        initial(learned_hyperparameters(2, optimizer, {"learning_rate": 0.1}, per_step=True), params, KEY)

"""Tasks of varied ways and shots: Meta-Dataset's sizes, and that what is absent changes nothing."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.stats import chisquare

from maml.evaluate import Protocol, evaluate
from maml.inner_loop import minibatches, only, unroll, with_prototypes
from maml.losses import cross_entropy, mse
from maml.models import MLP, functional
from maml.objectives import query_loss
from maml.per_example import influence, per_example_gradients, weighted
from maml.random import keys_for
from maml.tasks.episodes import episodes, varied_shots
from maml.types import Padded, Task
from tests.test_episodes import coded

KEY = jax.random.key(0)
COUNTS = [6, 20, 9, 30, 12, 7, 25, 40, 3, 5, 50]
WAYS, SHOTS, QUERIES = 6, 8, 2


def tasks_of(sampler, count, seed=0):
    return jax.jit(lambda s, keys: s(keys))(sampler, jax.random.split(jax.random.key(seed), count))


@pytest.fixture(scope="module")
def drawn() -> Task:
    return tasks_of(episodes(coded(COUNTS), WAYS, SHOTS, QUERIES, least_ways=3), 3000)


# --- what is drawn ---


def test_ways_are_uniform_and_every_class_has_its_examples(drawn):
    for batch, of_class in ((drawn.support, SHOTS), (drawn.query, QUERIES)):
        inputs, labels = batch
        present = np.asarray(inputs.present).reshape(-1, WAYS, of_class)
        assert ((labels >= 0) == inputs.present).all()
        assert (labels.reshape(present.shape) == np.where(present, np.arange(WAYS)[:, None], -1)).all()
        assert (present.any(2).sum(1) == inputs.ways[:, 0]).all()
        assert (inputs.ways == inputs.ways[:, :1]).all()
        assert (present == np.sort(present, -1)[..., ::-1]).all()  # the present ones first
        assert (np.asarray(inputs.inputs)[~np.asarray(inputs.present)] == 0).all()
    assert (np.asarray(drawn.query[0].present).sum(1) == QUERIES * drawn.query[0].ways[:, 0]).all()
    ways = np.bincount(np.asarray(drawn.support[0].ways[:, 0]), minlength=WAYS + 1)
    assert (ways[:3] == 0).all()
    assert chisquare(ways[3:]).pvalue > 1e-3


def test_images_of_a_class_are_its_own_and_no_two_alike(drawn):
    """Also of classes with fewer examples than shots and queries together."""
    sides = [(np.asarray(b[0].inputs), np.asarray(b[0].present), np.asarray(b[1])) for b in drawn]
    for task in range(300):
        seen: dict[int, list] = {}
        for inputs, present, labels in sides:
            pixels = np.round(inputs[task][present[task]][:, 0, 0, :2] * 255).astype(int)
            for label, (of_class, example) in zip(labels[task][present[task]], pixels, strict=True):
                seen.setdefault(label, []).append((of_class, example))
        classes = [{of_class for of_class, _ in pairs} for pairs in seen.values()]
        assert all(len(one) == 1 for one in classes)
        assert len(set.union(*classes)) == len(seen)
        assert all(len(set(pairs)) == len(pairs) for pairs in seen.values())
        assert all(example < COUNTS[of_class] for pairs in seen.values() for of_class, example in pairs)


def by_hand(counts, beta, spread, shots, queries, most):
    """Section 3.2 of Meta-Dataset, step by step."""
    room = [min(shots, c - queries) for c in counts]
    total = min(sum(int(np.floor(beta * n)) + 1 for n in room), most)
    share = [c * np.exp(a) for c, a in zip(counts, spread, strict=True)]
    wanted = [int(np.floor(s / sum(share) * (total - len(counts)))) + 1 for s in share]
    return [min(w, n) for w, n in zip(wanted, room, strict=True)]


@pytest.mark.parametrize("most", [500, 40])
def test_shots_are_those_of_the_paper_step_by_step(monkeypatch, most):
    monkeypatch.setattr(sys.modules["maml.tasks.episodes"], "MOST_SUPPORT", most)
    counts, exists = np.array([30, 100, 12, 60, 5, 9]), np.arange(6) < 5
    several = []
    for seed in range(40):
        key = jax.random.key(seed)
        key_total, key_shares = jax.random.split(key)
        beta = float(jax.random.uniform(key_total, dtype=jnp.float32))
        two = np.float32(np.log(2))
        spread = np.asarray(jax.random.uniform(key_shares, (6,), jnp.float32, -two, two), np.float64)
        got = varied_shots(jnp.asarray(counts), jnp.asarray(exists), 50, 2, key)
        assert list(got[:5]) == by_hand(counts[:5], beta, spread[:5], 50, 2, most)
        assert got[5] == 0
        several.append(int(got.sum()))
    assert max(several) <= most
    assert (max(several) > 40) == (most == 500)
    assert len(set(several)) > (15 if most == 500 else 5)  # 40 cuts most of them off


def test_tasks_of_one_shot_and_fixed_ways_are_a_special_case():
    task = tasks_of(episodes(coded(COUNTS), 5, 1, 2, least_ways=5), 20)
    assert task.support[0].present.all()
    assert task.query[0].present.all()
    assert (task.support[1] == np.arange(5)[None]).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"least_ways": 0}, "least_ways=0: give a whole number"),
        ({"least_ways": 7}, "least_ways=7, ways=6: give no more"),
        ({"least_ways": True}, "least_ways=True"),
        ({"least_ways": 3, "queries": 3}, "the smallest of the 11 classes has 3 examples"),
        ({"least_ways": 3, "shots": 0}, "shots=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        episodes(coded(COUNTS), **{"ways": WAYS, "shots": SHOTS, "queries": QUERIES} | sizes)


# --- what is absent changes nothing ---


def model(outputs, norm=True, seed=0):
    norms = (lambda n, rngs: nnx.BatchNorm(n, rngs=rngs, epsilon=1e-3)) if norm else None
    init = nnx.initializers.lecun_normal()
    net = MLP((2, 2, 3), outputs, hidden=(8,), norm=norms, kernel_init=init, rngs=nnx.Rngs(seed))
    return functional(net)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def cut(task: Task) -> Task:
    """One task without what is absent, as plain arrays."""

    def of(batch):
        inputs, labels = batch
        present = np.asarray(inputs.present)
        return jnp.asarray(np.asarray(inputs.inputs)[present]), jnp.asarray(np.asarray(labels)[present])

    return Task(of(task.support), of(task.query))


def narrow(params, ways):
    """The parameters with a head of `ways` outputs."""

    def one(path, x):
        return x[..., :ways] if "head" in jax.tree_util.keystr(path) else x

    return jax.tree.map_with_path(one, params)


LOOPS = {
    "maml": lambda: unroll(optax.sgd(0.3), 3),
    "anil": lambda: only(nnx.PathContains("head"), unroll(optax.sgd(0.3), 2)),
    # The gradient of a bias before a norm is rounding, which an eps of 1e-8 would make a step of.
    "adam": lambda: unroll(optax.adam(0.01, eps=1e-3), 2),
    "protonet": lambda: with_prototypes(unroll(optax.sgd(0.0), 0)),
    "proto_maml": lambda: with_prototypes(unroll(optax.sgd(0.1), 2)),
    "cosine": lambda: with_prototypes(unroll(optax.sgd(0.1), 1), "cosine"),
}


@pytest.mark.parametrize(
    ("loop", "norm"),
    [
        ("maml", "batch"),
        ("maml", "support"),
        ("maml", "joint"),
        ("maml", None),
        ("anil", "support"),
        ("adam", "support"),
    ]
    + [("protonet", "batch"), ("proto_maml", "batch"), ("cosine", None)],
)
def test_loss_and_meta_gradient_are_those_of_the_task_alone(drawn, loop, norm):
    """In float64 against the same task with nothing absent, and a head of as many outputs as it has ways."""
    with jax.enable_x64(True):
        apply, params = model(WAYS, norm is not None)
        params = wide(params)
        objective = query_loss(cross_entropy(apply), LOOPS[loop](), norm or "batch")
        of = jax.jit(jax.value_and_grad(objective, has_aux=True))
        for i in (np.argmin(drawn.support[0].ways[:, 0]), np.argmax(drawn.support[0].present.sum(1))):
            task = wide(jax.tree.map(lambda x, i=i: x[i], drawn))
            ways = int(task.support[0].ways[0])
            (value, metrics), gradient = of(params, task, KEY, 0)
            alone = query_loss(cross_entropy(model(ways, norm is not None)[0]), LOOPS[loop](), norm or "batch")
            of_alone = jax.jit(jax.value_and_grad(alone, has_aux=True))
            (expected, told), wanted = of_alone(narrow(params, ways), cut(task), KEY, 0)
            np.testing.assert_allclose(value, expected, rtol=1e-9)
            np.testing.assert_allclose(metrics["query/accuracy"], told["query/accuracy"], rtol=1e-6)
            for (path, got), want in zip(
                jax.tree.leaves_with_path(narrow(gradient, ways)), jax.tree.leaves(wanted), strict=True
            ):
                np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-12, err_msg=str(path))
            for path, got in jax.tree.leaves_with_path(gradient):
                if "head" in jax.tree_util.keystr(path) and "protonet" not in loop:
                    assert (got[..., ways:] == 0).all()


def test_what_stands_in_the_absent_places_does_not_matter(drawn):
    apply, params = model(WAYS)
    loss, task = cross_entropy(apply), jax.tree.map(lambda x: x[1], drawn)
    inputs, labels = task.support
    assert not inputs.present.all()
    noise = jax.random.normal(KEY, inputs.inputs.shape)
    where = inputs.present.reshape(-1, 1, 1, 1)
    other = inputs._replace(inputs=jnp.where(where, inputs.inputs, noise))
    for of in (jax.value_and_grad(lambda p, b: loss(p, b, KEY)[0]), lambda p, b: loss.per_example(p, b, KEY)):
        for x, y in zip(
            jax.tree.leaves(of(params, (inputs, labels))), jax.tree.leaves(of(params, (other, labels))), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    each = loss.per_example(params, task.support, KEY)
    np.testing.assert_allclose(each.mean(), loss(params, task.support, KEY)[0], rtol=1e-6)
    assert (each[~np.asarray(inputs.present)] == 0).all()


def test_batch_norm_is_as_it_was_afterwards(drawn):
    """The mask goes with the inputs: a call with plain ones right after it takes them all."""
    apply, params = model(WAYS)
    task = jax.tree.map(lambda x: x[1], drawn)
    plain = task.support[0].inputs
    before = apply(params, plain)
    apply(params, task.support[0])
    np.testing.assert_array_equal(apply(params, plain), before)
    everything = Padded(plain, jnp.ones(len(plain), bool), task.support[0].ways)
    np.testing.assert_allclose(apply(params, everything), before, rtol=1e-5, atol=1e-6)


def test_evaluation_of_varied_tasks_is_the_mean_over_tasks_alone():
    sampler = episodes(coded(COUNTS), WAYS, SHOTS, QUERIES, least_ways=3)
    protocol = Protocol(tasks=3, ways=WAYS, shots=SHOTS, queries=QUERIES, steps=1)
    apply, params = model(WAYS, norm=False)
    found = evaluate(params, sampler, cross_entropy(apply), unroll(optax.sgd(0.3), 1), protocol)
    drawn = keys_for(jax.random.key(0), "meta_test", 0, 3, 0)
    tasks = sampler(jax.vmap(lambda key: jax.random.split(key, 3)[0])(drawn))
    values = []
    for i in range(3):
        task = cut(jax.tree.map(lambda x, i=i: x[i], tasks))
        ways = int(task.support[1].max()) + 1
        loss, narrowed = cross_entropy(model(ways, norm=False)[0]), narrow(params, ways)
        gradient = jax.jit(jax.grad(lambda p, loss=loss, task=task: loss(p, task.support, KEY)[0]))(narrowed)
        moved = jax.tree.map(lambda p, g: p - 0.3 * g, narrowed, gradient)
        values.append(float(loss(moved, task.query, KEY)[0]))
    assert found["step_1/loss"].n == 3
    np.testing.assert_allclose(found["step_1/loss"].mean, np.mean(values), rtol=1e-5)


# --- what takes no such tasks says so ---


def test_minibatches_and_gradients_of_examples_refuse_them(drawn):
    apply, params = model(WAYS, norm=False)
    loss, task = cross_entropy(apply), jax.tree.map(lambda x: x[0], drawn)
    with pytest.raises(ValueError, match="cross_entropy alone leaves out absent examples"):
        mse(apply)(params, task.support, KEY)
    with pytest.raises(ValueError, match="minibatches: inputs are Padded"):
        minibatches(4, unroll(optax.sgd(0.1), 1))(loss, params, task.support, KEY)
    for way in ("vmap", "jacobian"):
        with pytest.raises(ValueError, match="inputs are Padded"):
            per_example_gradients(loss, params, task.support, KEY, way=way)
    with pytest.raises(ValueError, match="inputs are Padded"):
        influence(query_loss(weighted(loss), unroll(optax.sgd(0.1), 1)), params, task, KEY)

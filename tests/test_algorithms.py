"""The whole family as the configuration has it: every algorithm trains, is differentiated right, and is evaluated."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hydra.utils import instantiate
from PIL import Image

from experiments import build, evaluate
from experiments import run as program
from experiments.program import of_experiment, of_experiment_at_test
from maml import train
from maml.derivatives import first_order
from maml.inner_loop import learned_step_sizes, only, per_step, unroll, with_prototypes
from maml.losses import cross_entropy
from maml.models import MLP, functional
from maml.objectives import annealed, annealed_weights, multi_step_loss, parameter_distance, query_loss, switched
from maml.types import Task, equations, initial
from tests.helpers import quadratic_loss, quadratics, twins
from tests.programs import ROOT, SMALL, config, main, summary

KEY = jax.random.key(0)
ALGORITHMS = sorted(path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml"))
CLASSIFIERS = {"protonet", "proto_maml"}
NEEDS = {"cavia": "model.context=2", "maml_pp": "model=mlp_batch_norm"}
REPTILE = {"reptile", "reptile_sgd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of noise for each split, 16x16."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        names = [f"{split}{i}" for i in range(3)]
        (root / f"meta_{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (root / name).mkdir()
            mean = rng.uniform(size=(16, 16))
            for i in range(4):
                pixels = np.clip(mean + 0.1 * rng.normal(size=(16, 16)), 0, 1) * 255
                Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def choice(algorithm: str, *, folder: Path | None = None, conv: bool = False) -> list[str]:
    """A config of the algorithm with two inner steps on sine waves, or on images."""
    of = [
        f"algorithm={algorithm}",
        "evaluation.steps=2",
        "evaluation.tasks=20",
        "trainer.meta_batch=4",
        "trainer.log_every=1",
    ]
    of += ["algorithm.steps=2"] if algorithm not in ("protonet", "joint", "linear_probe") else []
    of += ["optimizer=reptile"] if algorithm in REPTILE else []
    if folder is not None:
        sizes = ["task.ways=3", "task.shots=2", "task.queries=2", "task.image_size=16", "task.channels=1"]
        of += ["task=image_folder", f"task.data_dir={folder}", f"+task.cache_dir={folder / 'cache'}", *sizes]
        of += ["evaluation=finn2017", "model=conv4" if conv else "model=mlp_batch_norm"]
        of += ["evaluation.queries=2", "evaluation.split=meta_test"]
        if algorithm == "cavia":
            of += ["model.context=2"]
    else:
        of += [NEEDS[algorithm]] if algorithm in NEEDS else []
    of += [] if algorithm in REPTILE else ["optimizer.learning_rate=0.01"]
    return of + (["model.filters=2"] if conv else ["model.hidden=[8,8]", "model.kernel_init.stddev=0.3"])


def learner_of(algorithm: str, *overrides: str, **how):
    cfg = config(*choice(algorithm, **how), *overrides)
    return cfg, build.learner(cfg)


# --- every algorithm ---


TWINS = {"anil", "boil", "linear_probe", "lora", "maml_on_grid", "meta_sgd", "proto_maml", "reptile_sgd"}
"""Made of the parts of others."""


@pytest.mark.parametrize("algorithm", twins(set(ALGORITHMS) - TWINS, ALGORITHMS))
def test_training_lowers_the_loss_on_other_tasks(algorithm, folder):
    where = {"folder": folder} if algorithm in CLASSIFIERS else {}
    own = ["evaluation.split=meta_train"] if where else []  # three classes teach nothing about others
    if algorithm == "imaml":  # its derivative is that of an optimum, which two steps do not come near
        own = ["algorithm.steps=16", "algorithm.step_size=0.02", "evaluation.steps=16", "evaluation.tasks=100"]
    until = 600 if algorithm == "imaml" else 300
    cfg, learner = learner_of(algorithm, "trainer.meta_batch=10", f"trainer.steps={until}", *own, **where)
    protocol, measure = build.evaluation(cfg, learner)
    progress = train.begin(learner.state, learner.step, learner.sampler)
    progress = train.fit(progress, learner.step, learner.sampler, steps=until, log_every=until, log=lambda *_: None)
    before, after = measure(learner.state.params), measure(progress.state.params)
    steps = protocol.steps
    names = ("loss", "accuracy") if where else ("loss",)
    assert set(after) == {f"step_{k}/{name}" for k in range(steps + 1) for name in names}
    assert all(np.isfinite(x.mean) for x in after.values())
    assert after[f"step_{steps}/loss"].mean < 0.99 * before[f"step_{steps}/loss"].mean
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        learner.state.params,
        progress.state.params,
    )


DIFFERENTIATED = [
    a for a in ALGORITHMS if "derivative:" in (ROOT / f"conf/algorithm/{a}.yaml").read_text() and a not in REPTILE
]


QUICK = {"cavia", "meta_sgd"}  # the others take a minute to compile together; their parts are tested one by one


@pytest.mark.parametrize(
    "algorithm", [pytest.param(a, marks=() if a in QUICK else pytest.mark.slow) for a in DIFFERENTIATED]
)
@pytest.mark.parametrize("kind", ["mlp", pytest.param("conv", marks=pytest.mark.slow)])
def test_derivatives_agree_and_first_order_is_another_one(algorithm, kind, folder):
    if kind == "mlp" and algorithm in CLASSIFIERS:
        pytest.skip("on images alone: conv")
    how = {"folder": folder, "conv": True} if kind == "conv" else {}
    grads = {}
    for name in ("reverse", "mixed", "first_order"):
        cfg, learner = learner_of(algorithm, f"algorithm.derivative._target_=maml.derivatives.{name}", **how)
        objective = build.build_objective(cfg, learner.loss)
        task = jax.tree.map(lambda x: x[0], learner.sampler(jax.random.split(KEY, 1)))
        with jax.enable_x64(True):
            meta, task = jax.tree.map(
                lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, (learner.state.params, task)
            )
            grads[name] = jax.jit(jax.grad(lambda p, t: objective(p, t, KEY, 0)[0]))(meta, task)  # noqa: B023
    flat = {n: np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(g))]) for n, g in grads.items()}
    size = np.linalg.norm(flat["reverse"])
    apart = {n: np.linalg.norm(x - flat["reverse"]) / size for n, x in flat.items()}
    assert np.isfinite(size)
    assert size > 0
    assert apart["mixed"] < 1e-9
    takes_steps = algorithm not in ("joint", "linear_probe")
    assert (apart["first_order"] > 1e-6) == takes_steps, apart


DIFFERENTIATED = [
    name for name in ALGORITHMS if "${algorithm.derivative}" in (ROOT / f"conf/algorithm/{name}.yaml").read_text()
]


@pytest.mark.parametrize("algorithm", sorted(set(DIFFERENTIATED) - {"joint", "linear_probe"}))  # those take no steps
def test_every_file_hands_its_derivative_to_its_inner_loop(algorithm, folder):
    """By the size of the program of the meta-gradient: that of first order is the smallest, that of mixed another one."""
    cfg, learner = learner_of(algorithm, **({"folder": folder} if algorithm in CLASSIFIERS else {}))
    task = jax.tree.map(lambda x: x[0], learner.sampler(KEY[None]))
    sizes = {}
    for order in ("reverse", "mixed", "first_order"):
        objective = build.build_objective(build.with_derivative(cfg, order), learner.loss)
        program = jax.make_jaxpr(jax.grad(lambda p, of=objective: of(p, task, KEY, 0)[0]))(learner.state.params)
        sizes[order] = sum(1 for _ in equations(program.jaxpr))
    assert sizes["first_order"] < sizes["reverse"]
    assert sizes["mixed"] not in (sizes["first_order"], sizes["reverse"])


@pytest.mark.slow
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_meta_steps_on_images(algorithm, conv, folder):
    cfg, learner = learner_of(algorithm, folder=folder, conv=conv)
    progress = train.begin(learner.state, learner.step, learner.sampler)
    logged = {}
    progress = train.fit(progress, learner.step, learner.sampler, steps=2, log_every=1, log=logged.__setitem__)
    assert all(np.isfinite(list(metrics.values())).all() for metrics in logged.values())
    moved = [
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (learner.state.params, progress.state.params)), strict=True)
    ]
    assert any(moved)
    _, measure = build.evaluation(cfg, learner)
    assert all(0 <= v.mean <= 1 for k, v in measure(progress.state.params).items() if k.endswith("accuracy"))


ADAPT_NORMS = {"boil", *REPTILE}
"""As in their authors' code; the others leave the norms to the outer loop, as Finn's code does."""


@pytest.mark.parametrize("model", ["mlp_batch_norm", pytest.param("conv4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"protonet"}))
def test_what_the_inner_loop_moves(algorithm, model):
    """cbfinn/maml: the inner loop moves weights and biases alone; with `where` gone, or `norms` renamed, this fails."""
    steps = 1 if algorithm in ("maml_pp", "meta_sgd") else 2
    needs = ["model.context=2"] if algorithm == "cavia" else []
    cfg = config(f"algorithm={algorithm}", f"model={model}", f"algorithm.steps={steps}", *needs)
    apply, params = functional(instantiate(cfg.model, _convert_="all")((16, 16, 1), 3, rngs=nnx.Rngs(0)))
    images = jnp.tile(jax.random.uniform(jax.random.key(1), (3, 16, 16, 1)), (2, 1, 1, 1))
    adapt = instantiate(cfg.algorithm.adapt, _convert_="all")
    support = images, np.array([0, 1, 2, 1, 2, 0])  # no head can be right, so that every layer has a gradient
    adapted = jax.jit(lambda p: adapt(cross_entropy(apply), p, support, KEY))(initial(adapt, params, KEY))
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool((before != after).any())
        for (path, before), after in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(adapted.params), strict=True
        )
    }
    parts = {
        **dict.fromkeys(("anil", "linear_probe"), lambda n: "head" in n),
        "boil": lambda n: "head" not in n,
        "cavia": lambda n: "context" in n,
        "lora": lambda n: "kernel" in n,
    }
    part = parts.get(algorithm, lambda n: "norms" not in n)
    assert any("norms" in name for name in moved)
    assert not [
        n for n, changed in moved.items() if changed and not (part(n) or ("norms" in n and algorithm in ADAPT_NORMS))
    ]
    assert all(changed for n, changed in moved.items() if part(n) and "kernel" in n)


class Headless(nnx.Module):
    """A model whose last layer has another name."""

    def __init__(self, input_shape, outputs, *, rngs, **_):
        self.last = nnx.Linear(input_shape[0], outputs, rngs=rngs)

    def __call__(self, inputs):
        return self.last(inputs)


@pytest.mark.parametrize("algorithm", ["anil", "linear_probe"])
def test_a_model_without_a_head_is_refused_by_name(algorithm):
    cfg = config(f"algorithm={algorithm}", "model._target_=tests.test_algorithms.Headless")
    with pytest.raises(
        ValueError, match=rf"algorithm {algorithm} .*model tests.test_algorithms.Headless.*: .*no parameter"
    ):
        build.evaluation(cfg, build.learner(cfg))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm=cavia"],
            "algorithm cavia does not fit model MLP and .*: .*selects no parameter.*; give a model that has contexts",
        ),
        (
            ["algorithm=maml_pp", "evaluation.steps=5"],
            "algorithm maml_pp does not fit model MLP and .*: .*selects no parameter",
        ),
        (["algorithm=protonet"], "algorithm protonet does not fit model MLP and .*: .*labels"),
        (
            ["algorithm=lora", "algorithm.where=convs"],
            "algorithm lora does not fit model MLP and .*: where='convs' finds no matrix",
        ),
        (["algorithm=reptile", "optimizer=reptile", "algorithm.batch=0"], "size=0"),
        (["algorithm=reptile"], "algorithm reptile does not fit .*optimizer optax.adam: .*give optimizer=reptile"),
        (["algorithm=imaml", "algorithm.strength=0.0"], "strength=0"),
        (["algorithm=joint", "algorithm.steps=1"], "algorithm.steps=1: algorithm joint takes at most 0 in training"),
        (["algorithm.derivative=mixed"], "give algorithm.derivative._target_=maml.derivatives.mixed"),
        (["algorithm.adapt.adapt.optimizer._target_=optax.lbfgs"], "an optimizer asks for the value of the loss"),
        (["optimizer._target_=optax.lbfgs"], "an optimizer asks for the value of the loss"),
        (["+algorithm.objective.last=1"], "algorithm: .*unexpected keyword argument 'last'; see conf/algorithm/"),
        (
            ["algorithm=learned_hyperparameters", "+algorithm.hyperparameters.nesterov=1"],
            "nesterov is a flag or a count",
        ),
        (["algorithm=meta_sgd", "algorithm.initial_step_size=[0.2,0.1]"], "initial="),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides, message):
    with pytest.raises(Exception, match=message):
        build.learner(config(*overrides))


def test_more_steps_in_evaluation_than_were_learned_are_refused_before_training():
    cfg = config(
        "algorithm=maml_pp", "model=mlp_batch_norm", "model.hidden=[8]", "algorithm.steps=2", "evaluation.steps=3"
    )
    learner = build.learner(cfg)
    with pytest.raises(ValueError, match="algorithm maml_pp and model MLP: .*learned for 2 inner steps"):
        build.evaluation(cfg, learner)


def test_prototypes_of_a_run_that_has_rows_are_those_of_its_first_row():
    """NIL of MAML++, by hand: class means of the features under the first row, and no step."""
    rows = per_step(nnx.PathContains("norms"), 3, only(nnx.Not(nnx.PathContains("norms")), unroll(optax.sgd(0.1), 0)))
    apply, params = functional(MLP((2,), 3, hidden=(4,), norm=nnx.BatchNorm, rngs=nnx.Rngs(1)))
    x, labels = jax.random.normal(KEY, (6, 2)), jnp.arange(6) % 3
    stacked = initial(rows, params, KEY)
    scale = jnp.array([2.0, 5.0, 9.0])
    stacked["norms"][0]["scale"].set_value(jnp.broadcast_to(scale[:, None], (3, 4)))
    params["norms"][0]["scale"].set_value(jnp.full(4, 2.0))
    adapted = with_prototypes(rows, "euclidean")(cross_entropy(apply), stacked, (x, labels), KEY).params
    features = apply.features(params, x)
    means = jnp.stack([features[labels == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(adapted["head"]["kernel"][...], 2 * means.T, rtol=1e-5)


def test_what_makes_a_head_of_prototypes_takes_no_other():
    cfg = config(
        "algorithm=protonet",
        "task=omniglot",
        "model=mlp_batch_norm",
        "evaluation=protonet",
        "evaluation.prototypes=cosine",
    )
    with pytest.raises(ValueError, match="protonet makes a head of prototypes itself"):
        build.build_adapt(cfg, build.build_protocol(cfg))


@pytest.mark.parametrize("evaluation", ["finn2017", "strict", "protonet"])
def test_prototypical_networks_are_measured_before_the_first_step_alone(evaluation):
    protocol = build.build_protocol(config("algorithm=protonet", "task=omniglot", f"evaluation={evaluation}"))
    assert (protocol.steps, protocol.step_size) == (0, None)
    with pytest.raises(ValueError, match="evaluation.steps=3: the inner steps of algorithm protonet are written"):
        evaluate.changed(config("algorithm=protonet", "task=omniglot"), ["evaluation.steps=3"])


def test_an_experiments_numbers_for_another_algorithm_are_told(tmp_path, monkeypatch):
    """The sinusoid of 10 shots sets a step size of 0.01; that of Reptile's file is another, and what is typed is nobody's."""
    run = ["experiment=finn2017/sinusoid_10shot", "algorithm=reptile", "optimizer=reptile"]
    monkeypatch.setattr(program, "run", lambda *_: None)  # nothing needs to be trained
    told = main(*run, f"hydra.run.dir={tmp_path}").out
    assert "algorithm.step_size=0.01: from the experiment, for its own algorithm; conf/algorithm/reptile.yaml" in told

    def of(algorithm, *typed, experiment="finn2017/sinusoid_10shot"):
        overrides = [f"experiment={experiment}", f"algorithm={algorithm}", *typed]
        choices = {"experiment": experiment, "algorithm": algorithm}
        return of_experiment(config(*(text.removeprefix("++") for text in overrides)), choices, overrides)

    assert of("reptile") == {"step_size": 0.01}
    assert of("reptile", "algorithm.step_size=0.01") == of("reptile", "++algorithm.step_size=0.01") == {}
    assert of("maml") == {}  # its own
    assert of("imaml", experiment="rajeswaran2019/omniglot_5way_1shot") == {}
    assert of("maml", experiment="rajeswaran2019/omniglot_5way_1shot") == {"steps": 16, "step_size": 0.1}
    assert of_experiment(config(run[0]), {"experiment": "finn2017/sinusoid_10shot", "algorithm": "maml"}, run[:1]) == {}


def test_an_experiments_evaluation_that_stays_is_told(tmp_path, monkeypatch):
    """CAVIA's sinusoid has 1,000 tasks and 100 queries of its own, under any protocol that is asked for by name."""
    monkeypatch.setattr(program, "run", lambda *_: None)  # nothing needs to be trained
    told = main("experiment=zintgraf2019/sinusoid", "evaluation=strict", f"hydra.run.dir={tmp_path}").out
    assert "evaluation.tasks=1000, evaluation.queries=100" in told
    assert "from the experiment, for its own evaluation" in told

    def of(experiment, *overrides):
        choices = {"experiment": experiment, "evaluation": "finn2017_sinusoid"}
        choices |= dict(text.split("=") for text in overrides if text.startswith("evaluation="))
        overrides = [f"experiment={experiment}", *overrides]
        return of_experiment_at_test(config(*overrides), choices, overrides)

    assert of("zintgraf2019/sinusoid") == {}
    assert of("zintgraf2019/sinusoid", "evaluation=strict", "evaluation.tasks=6000")["queries"] == 100
    assert "tasks" not in of("zintgraf2019/sinusoid", "evaluation=strict", "evaluation.tasks=6000")
    assert of("finn2017/sinusoid_pretrained", "algorithm=maml") == {"step_size": 0.005}
    assert of("finn2017/sinusoid_pretrained", "algorithm=maml", "evaluation.step_size=0.1") == {}
    assert of("finn2017/navigation", "algorithm.step_size=0.02") == {"step_size": [0.1, 0.05, 0.05]}


def test_a_new_algorithm_is_one_file(tmp_path):
    """Meta-SGD with sign updates: one YAML file outside of the repository, and no Python."""
    text = (ROOT / "conf/algorithm/meta_sgd.yaml").read_text().replace("name: meta_sgd", "name: meta_sign")
    text = text.replace(
        "    per: parameter\n", "    per: parameter\n    optimizer: {_target_: optax.sign_sgd, learning_rate: 1.0}\n"
    )
    (tmp_path / "conf/algorithm").mkdir(parents=True)
    (tmp_path / "conf/algorithm/meta_sign.yaml").write_text(text)
    arguments = [
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
        "algorithm=meta_sign",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    ended = main(*SMALL, *arguments, "logger=quiet")
    assert ended.code == 0, ended.err
    assert summary(tmp_path / "run")["config"]["algorithm"]["name"] == "meta_sign"


# --- special cases coincide ---


def small():
    model = MLP((2,), 3, hidden=(4,), kernel_init=nnx.initializers.normal(0.7), rngs=nnx.Rngs(1))
    apply, params = functional(model)
    x = jax.random.normal(KEY, (2, 6, 2))
    labels = jnp.arange(6) % 3
    return cross_entropy(apply), params, Task((x[0], labels), (x[1], labels))


def gradient(objective, params, task, step=0):
    return jax.jit(jax.grad(lambda p: objective(p, task, KEY, step)[0]))(params)


SAME = {
    "ANIL with all layers": lambda loss, loop: query_loss(loss, only(lambda *_: True, loop)),
    "the last step alone counts": lambda loss, loop: multi_step_loss(loss, loop, lambda _: jnp.array([0.0, 0.0, 1.0])),
    "multi-step loss after its end": lambda loss, loop: multi_step_loss(loss, loop, annealed_weights(3, 0)),
    "switched before it switches": lambda loss, loop: switched(
        5, query_loss(loss, loop), parameter_distance(loss, loop)
    ),
    "annealed before its end": lambda loss, loop: annealed(
        loss, loop, until=5, before=query_loss, after=parameter_distance
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_special_cases_are_maml(name):
    loss, params, task = small()
    loop = unroll(optax.sgd(0.1), 3)
    expected = gradient(query_loss(loss, loop), params, task)
    found = gradient(SAME[name](loss, loop), params, task)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), found, expected)


def test_equal_learned_step_sizes_are_maml():
    loss, params, task = small()
    expected = gradient(query_loss(loss, unroll(optax.sgd(0.1), 3)), params, task)
    adapt = learned_step_sizes(3, 0.1)
    found = gradient(query_loss(loss, adapt), initial(adapt, params, KEY), task).params
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), found, expected)


@pytest.mark.parametrize(
    ("name", "key"), [("maml", "+algorithm"), pytest.param("maml_pp", "algorithm", marks=pytest.mark.slow)]
)
def test_order_annealing_is_first_order_before_its_meta_step_and_exact_from_it_on(name, key):
    tiny = [f"algorithm={name}", "algorithm.steps=2", "evaluation.steps=2", "model=mlp_batch_norm", "model.hidden=[6]"]
    cfg = config(*tiny, f"{key}.first_order_until=5")
    learner = build.learner(cfg)
    task = jax.tree.map(lambda x: x[0], learner.sampler(KEY[None]))
    orders = [build.with_derivative(config(*tiny), order) for order in ("first_order", "reverse")]
    exact, first = [], []
    for step in (4, 5):
        found = gradient(build.build_objective(cfg, learner.loss), learner.state.params, task, step)
        for kind, order in zip((first, exact), orders, strict=True):
            other = gradient(build.build_objective(order, learner.loss), learner.state.params, task, step)
            kind.append(optax.tree.norm(jax.tree.map(jnp.subtract, found, other)) / optax.tree.norm(other))
    assert first[0] < 1e-5 < 1e-2 < exact[0]
    assert exact[1] < 1e-5 < 1e-2 < first[1]


def test_the_multi_step_loss_is_the_weighted_sum_of_the_losses_after_each_step():
    loss, params, task = small()
    weights = jnp.array([0.5, 0.3, 0.2])
    value, metrics = multi_step_loss(loss, unroll(optax.sgd(0.1), 3), lambda _: weights)(params, task, KEY, 0)
    after = [query_loss(loss, unroll(optax.sgd(0.1), k))(params, task, KEY, 0)[0] for k in (1, 2, 3)]
    assert float(value) == pytest.approx(float(jnp.dot(weights, jnp.stack(after))), rel=1e-5)
    assert float(metrics["query/loss"]) == pytest.approx(float(after[-1]), rel=1e-5)
    with pytest.raises(ValueError, match="one for each of the 2 inner steps"):
        multi_step_loss(loss, unroll(optax.sgd(0.1), 2), lambda _: weights)(params, task, KEY, 0)


def test_annealed_weights_are_those_of_the_authors_code():
    """Epoch e of E, N steps: max(1/N - e/(NE), 0.03/N) before the last, min(1/N + e(N-1)/(NE), 1 - (N-1)0.03/N) at the last."""
    steps, until = 5, 10
    weights = annealed_weights(steps, until)
    for step in range(until):
        decay = step / (steps * until)
        early = max(1 / steps - decay, 0.03 / steps)
        last = min(1 / steps + decay * (steps - 1), 1 - (steps - 1) * 0.03 / steps)
        np.testing.assert_allclose(weights(step), [early] * 4 + [last], rtol=1e-6)
        assert float(weights(step).sum()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(weights(until), [0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="until=-1"):
        annealed_weights(5, -1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "average", "inner"), [("maml", 1, -2), ("fomaml", 1, -1), ("reptile", 2, -1)])
def test_taylor_coefficients(name, average, inner):
    """Nichol et al. 2018, section 5.1: two steps on losses L₁, L₂, to first order in α, the expectation over their order.

    Reptile's update over α is g₁ + g₂ with g₂ at the parameters after step 1; MAML's and FOMAML's inner step is on L₁ and their
    outer loss L₂. AvgGrad = (a + b)/2 for gradients a, b at θ; AvgGradInner = (A b + B a)/2.
    """
    support = quadratics(seed=7, tasks=2).support
    one, two = (jax.tree.map(lambda x, i=i: x[i], support) for i in (0, 1))
    theta = jnp.arange(4.0)
    (a, matrix_a), (b, matrix_b) = (((q[0] @ (theta - q[1])), q[0]) for q in (one, two))

    def update(alpha, first, second):
        if name == "reptile":  # minibatches: step 1 sees the first loss, step 2 the second
            after = theta
            for batch in (first, second):
                after = unroll(optax.sgd(alpha), 1)(quadratic_loss, after, batch, KEY).params
            return (theta - after) / alpha
        loop = unroll(optax.sgd(alpha), 1, *((first_order,) if name == "fomaml" else ()))
        return jax.grad(lambda p: query_loss(quadratic_loss, loop)(p, Task(first, second), KEY, 0)[0])(theta)

    def expected_update(alpha):
        return (update(alpha, one, two) + update(alpha, two, one)) / 2

    low, high = expected_update(1e-5), expected_update(2e-5)
    slope = (high - low) / 1e-5
    np.testing.assert_allclose(2 * low - high, average * (a + b) / 2, rtol=1e-6)
    np.testing.assert_allclose(slope, inner * (matrix_a @ b + matrix_b @ a) / 2, rtol=1e-3)

"""What the planner counts is what a hand counts, and what it chooses fits and runs."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from omegaconf import OmegaConf

from experiments import build, pictures, run
from experiments import plan as program
from experiments.plan import Candidate, candidates
from maml import plan, train
from maml.models.convolution import convolution
from maml.types import as_argument
from tests.programs import SMALL, config, main, summary

pytestmark = pytest.mark.usefixtures("compiled_once")

JOB = (*SMALL, "logger=quiet")
FEW = (*JOB, "algorithm=fomaml", "trainer.meta_batch=16")  # has only the chunk to choose: 16, 4, 1


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})


# --- operations, counted by hand ---


def of(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


MATMUL = 2 * 3 * 5 * 7


def test_a_product_of_matrices():
    assert plan.flops(jnp.matmul, of(3, 5), of(5, 7)) == MATMUL
    assert plan.flops(jax.vmap(jnp.matmul, (0, None)), of(11, 3, 5), of(5, 7)) == 11 * MATMUL
    assert plan.flops(jax.jit(jax.jit(jnp.matmul)), of(3, 5), of(5, 7)) == MATMUL


def test_a_scan_counts_its_length_and_a_while_its_body_once():
    def product(x, k):
        return x @ k, None

    assert plan.flops(lambda x, k: lax.scan(product, x, k), of(3, 5), of(13, 5, 5)) == 13 * 2 * 3 * 5 * 5
    assert plan.flops(lambda x, k: lax.while_loop(lambda x: x.max() < 1, lambda x: x @ k, x), of(3, 5), of(5, 5)) == (
        2 * 3 * 5 * 5 + 14  # the condition takes the largest of 15
    )


def test_a_cond_counts_the_dearest_branch():
    def either(p, x, k):
        return lax.cond(p, lambda: jnp.sin(x), lambda: jnp.sin(x @ k))

    assert plan.flops(either, jax.ShapeDtypeStruct((), bool), of(3, 5), of(5, 5)) == 2 * 3 * 5 * 5 + 15


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (jnp.sin, 15),
        (lambda x: x.T.reshape(-1)[2:], 0),
        (lambda x: x.sum(0), 10),
        (lambda x: jnp.where(x > 0, x, 2 * x), 15),
        (lambda x: x.at[jnp.array([0, 2])].add(x[:2]), 10),
        (lambda x: x.at[jnp.array([0, 2])].set(x[:2]), 0),
        (lambda x: jnp.argsort(x.astype(jnp.int32) + 1), 0),
        (lambda x: lax.reduce_window(x, -math.inf, lax.max, (3, 1), (1, 1), "VALID"), 2 * 5),
        (jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))), 30),
        (jax.nn.relu, 15),
    ],
)
def test_other_operations(function, count):
    assert plan.flops(function, of(3, 5)) == count


# 2 images of 8 x 8 x 3, a kernel of 3 x 3 x 3 to 4 features.
@pytest.mark.parametrize(("stride", "side"), [(1, 8), (2, 4)])
def test_a_convolution_and_its_transposes(stride, side):
    forward = 2 * (2 * side * side * 4) * (3 * 3 * 3)
    x, k = of(2, 8, 8, 3), of(3, 3, 3, 4)

    def ours(x, k):
        return convolution(x, k, stride)

    def xla(x, k):
        return lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    for conv in (ours, xla):
        assert plan.flops(conv, x, k) == forward
        pull = plan.flops(lambda x, k, conv=conv: jax.vjp(conv, x, k)[1](jnp.ones((2, side, side, 4))), x, k)
        assert pull == pytest.approx(3 * forward, rel=0.2)  # the three differ in what they do on the padding
    assert plan.flops(lambda x, k: jax.vjp(ours, x, k)[1](jnp.ones((2, side, side, 4))), x, k) == 3 * forward


def test_a_dilated_input_has_no_products_on_its_holes():
    """A transposed convolution in one dimension: 4 inputs with a hole between them meet 3 taps each, but for the ends."""
    count = plan.flops(
        lambda x, k: lax.conv_general_dilated(x, k, (1,), [(2, 2)], (2,), (1,), ("NWC", "WIO", "NWC")),
        of(1, 4, 1),
        of(3, 1, 1),
    )
    outputs = range(9)  # positions -2 .. 8 of a window of 3; the padding is counted, odd positions are holes
    assert count == 2 * sum((o + tap - 2) % 2 == 0 for o in outputs for tap in range(3))


def mlp(params, x):
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return x.sum()


def test_the_gradient_of_a_network():
    """Two products for each layer in the backward pass but for the first, whose input takes no derivative."""
    params, x = [of(5, 7), of(7, 11)], of(3, 5)
    products = 2 * 3 * (5 * 7) * 2 + 2 * 3 * (7 * 11) * 3
    count = plan.flops(jax.grad(mlp), params, x)
    # Forward: tanh and the sum. Backward: a few operations for each element of the layers, none for the kernels.
    elements = 3 * (7 + 11)
    assert products + 2 * elements <= count <= products + 6 * elements


def test_keys_and_what_they_draw_cost_no_more_than_their_elements():
    assert plan.flops(lambda key: jax.random.bits(key, (100,)), jax.random.key(0)) == 0
    assert 100 <= plan.flops(lambda key: jax.random.normal(key, (100,)), jax.random.key(0)) < 1000


def test_what_the_compiler_says():
    """The account is XLA's: arguments and outputs have the sizes of their arrays."""
    x = jnp.ones((100, 100))
    cost = plan.cost(jax.jit(lambda x: (x @ x) @ x).trace(x), 3)
    assert (cost.arguments, cost.outputs, cost.chunk, cost.flops) == (40_000, 40_000, 3, 4 * 100**3)
    assert cost.temporaries >= 40_000
    assert cost.peak == 80_000 + cost.temporaries


# --- the choice ---


def made_up(chunk: int, flops: int, peak: int) -> plan.Cost:
    return plan.Cost(chunk, flops, arguments=10, outputs=10, temporaries=peak - 10, aliased=10)


COSTS = {
    "mixed": made_up(8, 100, 8_000_000_123),
    "reverse": made_up(8, 110, 7_000_000_000),
    "remat": made_up(8, 150, 4_000_000_000),
    "remat, halves": made_up(4, 150, 2_000_000_000),
    "halves": made_up(4, 100, 5_000_000_000),
    "one by one": made_up(1, 100, 1_234_567_891),
    "the same, with more memory": made_up(1, 100, 1_300_000_000),
}


@pytest.mark.parametrize(
    ("budget", "auto", "choice"),
    [
        (None, 8, "mixed"),
        (8.1, 8, "mixed"),
        (8.0, 8, "reverse"),
        (7.0, 8, "reverse"),
        (6.9, 8, "remat"),
        (3.9, 8, "remat, halves"),
        (1.9, 8, "one by one"),
        (math.inf, 1, "one by one"),
        (1.3, 1, "one by one"),
    ],
)
def test_the_fastest_that_fits(budget, auto, choice):
    assert plan.choose(COSTS, budget, auto=auto) == choice


def test_small_chunks_are_faster_where_auto_is_one():
    costs = {chunk: made_up(chunk, 100, 100) for chunk in (8, 2, 4)}
    assert plan.choose(costs, None, auto=1) == 2
    assert plan.choose(costs, None, auto=8) == 8


@pytest.mark.parametrize("peak", [1, 999, 1000, 9_999, 10_001, 1_234_567_891, 78_999_999_999])
def test_the_budget_that_is_named_is_the_smallest(peak):
    costs = {"only": made_up(1, 1, peak)}
    with pytest.raises(ValueError, match=r"memory_gb=1e-10.*\(only\)") as error:
        plan.choose(costs, 1e-10, auto=1)
    smallest = float(re.search(r"give (\S+) or more", str(error.value))[1])
    assert plan.choose(costs, smallest, auto=1) == "only"
    with pytest.raises(ValueError, match="or more"):
        plan.choose(costs, smallest * 0.999, auto=1)


# --- candidates ---


def ways(*overrides: str, auto: int = 25) -> list[Candidate]:
    return candidates(config(*overrides), auto)


REVERSE, MIXED, FIRST = (f"maml.derivatives.{name}" for name in ("reverse", "mixed", "first_order"))


def test_candidates():
    assert set(ways()) == {Candidate(d, r, c) for d in (REVERSE, MIXED) for r in (None, 1) for c in (25, 5, 1)}
    assert len(ways("algorithm.steps=9")) == 18
    assert {c.remat for c in ways("algorithm.steps=9")} == {None, 1, 3}
    assert ways(f"algorithm.derivative._target_={MIXED}")[0].derivative == MIXED
    assert set(ways("algorithm=fomaml", "trainer.meta_batch=7", auto=1)) == {Candidate(FIRST, None, c) for c in (1, 7)}
    assert ways("trainer.task_chunk=5", "algorithm.remat=1") == [Candidate(d, 1, 5) for d in (REVERSE, MIXED)]
    assert {c.chunk for c in ways("trainer.task_chunk=all")} == {25}


@pytest.mark.parametrize("name", ["maml", "fomaml", "joint"])
def test_a_candidate_reaches_the_inner_loop(name):
    cfg = config(f"algorithm={name}", "seed=3")
    applied = Candidate(MIXED, 2, 5).applied(cfg)
    inner = applied.algorithm.adapt.adapt
    assert (inner.derivative._target_, inner.derivative._partial_, inner.remat) == (MIXED, True, 2)
    assert (applied.trainer.task_chunk, applied.seed) == (5, 3)
    assert cfg == config(f"algorithm={name}", "seed=3")
    assert cfg.algorithm.adapt.adapt.derivative._target_ == (FIRST if name == "fomaml" else REVERSE)


def test_another_derivative_from_the_command_line():
    cfg = config(
        "algorithm.derivative._target_=maml.derivatives.truncated",
        "algorithm.derivative._partial_=false",
        "+algorithm.derivative.last=1",
    )
    assert OmegaConf.to_container(cfg.algorithm.adapt.adapt, resolve=True)["derivative"]["last"] == 1
    assert {c.derivative for c in candidates(cfg, 1)} == {"maml.derivatives.truncated"}


# --- the programs ---


def cells(out: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("module", "job", "ways"),
    [
        pytest.param(program, FEW, [("first_order", "null", n) for n in ("16", "4", "1")], marks=pytest.mark.slow),
        (
            run,
            [*JOB, "trainer.task_chunk=all", "plan=true"],
            [(d, r, "4") for d in ("reverse", "mixed") for r in ("null", "1")],
        ),
    ],
)
def test_the_table(tmp_path, module, job, ways):
    """Without a budget what is marked is the first row, and nothing is left but Hydra's own files."""
    ended = main(*job, f"hydra.run.dir={tmp_path}", program=module)
    assert ended.code == 0, ended.err
    head, _, *rows = cells(ended.out)
    assert head[:4] == ["derivative", "remat", "chunk", "GFLOP"]
    assert sorted(tuple(r[:3]) for r in rows) == sorted(ways)
    assert [r[-1] for r in rows] == ["<-"] + [""] * (len(rows) - 1)
    numbers = [[float(x) for x in r[3:7]] for r in rows]
    assert all(flops > 0 and peak > arguments + temporaries > 0 for flops, arguments, temporaries, peak in numbers)
    if module is program:
        assert [r[2] for r in rows] == ["16", "4", "1"]  # a small network: all at once is the fastest
        assert numbers[0][2] > numbers[1][2] > numbers[2][2]
    else:
        assert numbers == sorted(numbers, key=lambda r: r[0])
    assert {p.name for p in tmp_path.iterdir()} <= {".hydra", f"{module.__name__.rpartition('.')[-1]}.log"}


def program_of(step: train.MetaStep | None, *overrides: str) -> str:
    """A meta-step as a jaxpr: the same text, the same bits."""
    learner = build.learner(config(*overrides))
    return str(jax.make_jaxpr(step or learner.step)(learner.state, as_argument(learner.sampler)))


def test_a_budget_that_nothing_fits_and_the_smallest_that_does(tmp_path, monkeypatch):
    ended = main(*FEW, "trainer.memory_gb=1e-9", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert ended.err.startswith("error: memory_gb=1e-09: ")
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    named = re.search(r"give (\S+) or more \(.*task_chunk 1\)", ended.err)
    assert named, ended.err
    smallest = named[1]

    less = f"trainer.memory_gb={0.999 * float(smallest)}"
    ended = main(*FEW, "plan=true", less, f"hydra.run.dir={tmp_path / 'plan'}")
    assert ended.code == 2
    assert [r[-1] for r in cells(ended.out)[2:]] == ["", "", ""]

    job, steps, fit = [*FEW, f"trainer.memory_gb={smallest}", f"hydra.run.dir={tmp_path / 'run'}"], [], train.fit
    monkeypatch.setattr(
        train, "fit", lambda progress, step, *a, **k: steps.append(step) or fit(progress, step, *a, **k)
    )
    ended = main(*job)
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("trainer.memory_gb=")]
    assert "derivative first_order, remat null, task_chunk 1;" in line
    assert program_of(steps[0], *FEW) == program_of(None, *FEW, "trainer.task_chunk=1") != program_of(None, *FEW)
    assert summary(tmp_path / "run")["config"]["trainer"]["task_chunk"] == "auto"  # what was asked for
    assert "nothing to do" in main(*job).out


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_budget_that_is_none(tmp_path, value):
    ended = main(*FEW, f"trainer.memory_gb={value}", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert ended.err == f"error: trainer.memory_gb={float(value)}: give a positive number of GB, or null for no limit\n"

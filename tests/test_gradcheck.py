"""The check of meta-gradients finds what is wrong although its values are right, and passes what is right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from experiments import gradcheck as program
from maml.derivatives import first_order, mixed, reverse
from maml.gradcheck import Direction, Gradcheck, asymmetry, frozen, meta_gradcheck
from maml.inner_loop import unroll
from maml.losses import cross_entropy, semi_gradient
from maml.models import functional
from maml.models.conv import _max_pool
from maml.models.convolution import convolution
from maml.objectives import query_loss
from maml.types import Task
from tests.programs import SMALL, main

pytestmark = pytest.mark.usefixtures("compiled_once")

KEY = jax.random.key(0)


# --- TD(0): the semi-gradient by stop_gradient has the right values and another meta-gradient ---


def value_of(params, states):
    return jnp.tanh(states @ params["w"]) @ params["v"]


def td(params, target, batch, key):
    del key
    states, rewards, following = batch
    delta = rewards + 0.9 * value_of(target, following) - value_of(params, states)
    return 0.5 * jnp.square(delta).mean(), {}


def stopped(params, batch, key):
    return td(params, jax.tree.map(lax.stop_gradient, params), batch, key)


def plain(params, batch, key):
    return td(params, params, batch, key)


def transitions():
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape))  # noqa: E731
    return {"w": 0.5 * draw(3, 4), "v": draw(4)}, (draw(5, 3), draw(5), draw(5, 3)), draw(2, 3)


def td_check(loss, **options):
    params, batch, states = transitions()
    adapt = unroll(optax.sgd(0.3), 4)

    def f(params):
        return jnp.square(value_of(adapt(loss, params, batch, KEY).params, states) - 0.7).mean()

    options = {k: v(f, params) if callable(v) else v for k, v in options.items()}
    return meta_gradcheck(f, params, KEY, field=lambda p: reverse(loss)(p, batch, KEY)[0], **options)


@pytest.mark.usefixtures("x64")
def test_a_semi_gradient_by_stop_gradient_is_caught():
    found = td_check(stopped)
    assert found.worst > 1e-2
    assert found.asymmetry < 1e-12  # it looks perfect
    assert max(d.spread for d in found.directions) < 1e-7


@pytest.mark.usefixtures("x64")
def test_a_semi_gradient_of_two_arguments_passes():
    found = td_check(semi_gradient(td))
    assert found.worst < 1e-7
    assert found.asymmetry > 0.05  # and is right


@pytest.mark.usefixtures("x64")
def test_a_plain_gradient_passes():
    found = td_check(plain)
    assert found.worst < 1e-7
    assert found.asymmetry < 1e-12


# --- the check itself ---


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("derivative", "error"), [(reverse, 0), (mixed, 0), (first_order, 0.3)])
def test_the_quartic(derivative, error):
    """Inner θ⁴/4 at step size 0.1, query θ²/2, at 1: the meta-gradient is 0.9 (1 - 0.3) = 0.63, first order 0.9."""
    adapt = unroll(optax.sgd(0.1), 1, derivative)

    def f(theta):
        moved = adapt(lambda p, batch, key: (p[0] ** 4 / 4, {}), theta, (), KEY).params  # noqa: ARG005
        return moved[0] ** 2 / 2

    found = meta_gradcheck(f, jnp.ones(1), KEY, directions=2)
    assert len(found.directions) == 2
    for direction in found.directions:  # of one parameter they are 1 and -1
        assert abs(direction.difference) == pytest.approx(0.63, abs=1e-9)
        assert direction.error == pytest.approx(error, abs=1e-8)
    assert found.asymmetry is None


@pytest.mark.usefixtures("x64")
def test_directions_have_length_one_and_are_those_of_the_key():
    center = np.array([3.0, 4.0])
    found = meta_gradcheck(lambda p: p["a"] @ center, {"a": jnp.zeros(2)}, KEY, directions=50)
    slopes = np.array([d.autodiff for d in found.directions])
    assert 4.9 < np.abs(slopes).max() <= 5
    assert found == meta_gradcheck(lambda p: p["a"] @ center, {"a": jnp.zeros(2)}, KEY, directions=50)


@pytest.mark.usefixtures("x64")
def test_a_kink_between_the_points_shows_in_the_spread():
    found = meta_gradcheck(lambda p: jax.nn.relu(p + 3e-6).sum(), jnp.zeros(1), KEY, directions=1)
    assert found.worst > 0.1
    assert found.directions[0].spread > 0.1
    assert meta_gradcheck(lambda p: jax.nn.relu(p + 3e-6).sum(), jnp.zeros(1), KEY, epsilon=1e-6).worst < 1e-8


@pytest.mark.usefixtures("x64")
def test_what_is_not_finite_fails_and_what_is_constant_passes():
    assert meta_gradcheck(lambda p: jnp.log(p).sum(), -jnp.ones(1), KEY).worst == np.inf
    assert meta_gradcheck(lambda p: 0 * p.sum(), jnp.ones(1), KEY).worst == 0


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match=r"float32; cast them to float64 under jax.enable_x64"):
        meta_gradcheck(lambda p: p.sum(), jnp.ones(1), KEY)
    with jax.enable_x64(True), pytest.raises(ValueError, match="directions=0.*1 or more"):
        meta_gradcheck(lambda p: p.sum(), jnp.ones(1), KEY, directions=0)


@pytest.mark.usefixtures("x64")
def test_asymmetry_is_the_frobenius_ratio():
    matrix = np.random.default_rng(1).normal(size=(5, 5))
    expected = np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix)
    found = asymmetry(lambda p: jnp.asarray(matrix) @ p, jnp.ones(5), KEY, probes=4000)
    assert found == pytest.approx(expected, rel=0.05)
    assert asymmetry(lambda p: jnp.asarray(matrix + matrix.T) @ p, jnp.ones(5), KEY) < 1e-15
    assert asymmetry(lambda p: 0 * p, jnp.ones(5), KEY) == 0


class Convolutional(nnx.Module):
    """One block of Conv4."""

    def __init__(self, norm, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), conv_general_dilated=convolution, rngs=rngs)
        self.norm = norm(2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(_max_pool(self.norm(self.conv(x)))).mean((1, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_convolutional_network_with_batch_norm_and_max_pool_passes():
    norm = partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3)
    apply, params = functional(Convolutional(norm, nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 1))), jnp.arange(8) % 2
    loss, task = cross_entropy(apply), Task((x[:4], y[:4]), (x[4:], y[4:]))
    objective = query_loss(loss, unroll(optax.sgd(0.1), 1))
    found = meta_gradcheck(
        lambda p: objective(p, task, KEY, jnp.int32(0))[0],
        params,
        KEY,
        directions=2,
        epsilon=1e-6,
        field=lambda p: reverse(loss)(p, task.support, KEY)[0],
    )
    assert found.worst < 1e-6
    assert found.asymmetry < 1e-10


# --- straight-through estimators ---


def rounded(x):
    return jnp.round(x / 0.25) * 0.25


def straight_through(x):
    with jax.named_scope("straight_through"):
        return lax.stop_gradient(rounded(x)) + (x - lax.stop_gradient(x))


@jax.custom_jvp
def raw(x):
    """Its rule calls what has no derivative: the first derivative is right, and the second 0."""
    return rounded(x)


@raw.defjvp
def _raw_jvp(primals, tangents):
    return rounded(*primals), tangents[0]


def quantised(quantise, steps=2):
    """Two steps of 0.1 on (q² - 2)²/2 from 0.7, and the loss after them."""

    def loss(params, batch, key):
        del batch, key
        return jnp.square(jnp.square(quantise(params)) - 2).sum() / 2, {}

    adapt = unroll(optax.sgd(0.1), steps)
    return lambda theta: loss(adapt(loss, theta, (), KEY).params, (), KEY)[0]


THETA = np.array([0.7])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_the_frozen_program_has_the_derivative_of_the_surrogate(wrap):
    f, theta = wrap(quantised(straight_through)), jnp.asarray(THETA)
    assert float(f(theta)) == pytest.approx(0.5)
    assert float(jax.grad(f)(theta)[0]) == pytest.approx(-1.7)  # -2 · 1.0625 · 0.8
    real = meta_gradcheck(f, theta, KEY, directions=1)
    assert (real.worst, real.directions[0].difference) == (1, 0)  # the quantised program is constant here
    for scope in (None, "straight_through"):
        smooth = frozen(f, theta, scope=scope)
        assert float(smooth(theta)) == pytest.approx(0.5)
        assert meta_gradcheck(f, theta, KEY, program=smooth).worst < 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 3])
def test_frozen_goes_through_scans_and_maps(steps):
    """The first step of an inner loop stands outside of its scan; one step leaves an empty scan."""
    one = quantised(straight_through, steps)
    f = lambda theta: jax.vmap(one)(theta[:, None]).sum()  # noqa: E731
    theta = jnp.array([0.7, 1.1, -0.9])
    assert meta_gradcheck(f, theta, KEY, program=frozen(f, theta)).worst < 1e-7


@pytest.mark.usefixtures("x64")
def test_a_quantiser_whose_second_derivative_is_lost_is_caught():
    f, theta = quantised(raw), jnp.asarray(THETA)
    assert float(jax.grad(f)(theta)[0]) != pytest.approx(-1.7)
    assert meta_gradcheck(f, theta, KEY, program=frozen(f, theta)).worst == 1


@pytest.mark.usefixtures("x64")
def test_only_the_stops_of_the_scope_are_frozen():
    """With all of them frozen every semi-gradient would be right."""
    scoped = lambda f, p: frozen(f, p, scope="straight_through")  # noqa: E731
    assert td_check(stopped, program=scoped).worst > 1e-2
    assert td_check(stopped, program=frozen).worst < 1e-7


@pytest.mark.usefixtures("x64")
def test_a_stop_in_a_while_loop_is_refused():
    def f(theta):
        return lax.while_loop(lambda x: x.sum() < 3, lambda x: x + lax.stop_gradient(x), theta).sum()

    with pytest.raises(ValueError, match="stands in a while.*scan"):
        frozen(f, jnp.ones(2))(jnp.ones(2))


# --- the program ---


def test_the_program_passes_maml(tmp_path):
    ended = main(*SMALL, "algorithm.steps=2", f"hydra.run.dir={tmp_path}", program=program)
    assert ended.code == 0, ended.out + ended.err
    lines = ended.out.splitlines()
    assert [line.split()[1] for line in lines[2:5]] == ["0", "1", "2"]
    assert lines[5].startswith("agrees: worst relative error")
    assert "asymmetry of the inner field" in lines[5]
    assert jnp.ones(1).dtype == jnp.float32  # float64 is put back


@pytest.mark.parametrize(
    "overrides",
    [
        "algorithm=meta_sgd",
        "model=mlp_batch_norm algorithm.step_size=0.1 algorithm.objective.norm=support",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (
                "model=mlp_quantized quantization.scale=learned quantization.bits=2 quantization.activations=8",
                "algorithm=maml_pp model=mlp_batch_norm optimizer=adam_cosine algorithm.steps=2 algorithm.initial_step_size=0.01",
                "algorithm=lora model=mlp_quantized quantization.bits=4 algorithm.steps=2 algorithm.step_size=0.01",
                "algorithm=maml_on_grid quantization.bits=3 algorithm.steps=2",
            )
        ),
    ],
    ids=lambda overrides: overrides.split()[0],
)
def test_the_program_passes_inner_loops_with_parameters_of_their_own_and_quantized_models(tmp_path, overrides):
    ended = main(*SMALL, *overrides.split(), "gradcheck.directions=2", f"hydra.run.dir={tmp_path}", program=program)
    assert ended.code == 0, ended.out + ended.err
    assert "asymmetry of the inner field" in ended.out


def test_an_implicit_derivative_away_from_the_optimum_says_what_to_raise():
    """Differences that agree with each other and not with autodiff: of an implicit loop the search may have stopped early."""
    found = Gradcheck((Direction(autodiff=1.0, difference=1.1, error=0.1, spread=1e-9),))
    assert "until support/stationarity is small" in program.verdict(found, 1e-5, implicit=True)
    assert "first order?" in program.verdict(found, 1e-5)


def test_the_program_fails_first_order(tmp_path):
    ended = main(*SMALL, "algorithm=fomaml", f"hydra.run.dir={tmp_path}", "gradcheck.directions=1", program=program)
    assert ended.code == program.DISAGREES == 1
    assert "DISAGREES" in ended.out
    assert "first order?" in ended.out


def test_the_program_refuses_what_it_cannot_tell(tmp_path):
    reptile = main(*SMALL, "algorithm=reptile_sgd", "optimizer=reptile", f"hydra.run.dir={tmp_path}", program=program)
    assert reptile.code == 2
    assert "algorithm reptile_sgd: parameter_distance defines an update" in reptile.err
    for override, words in (("algorithm.precision=bfloat16", "precision=float32"), ("gradcheck.epsilon=0", "positive")):
        ended = main(*SMALL, override, f"hydra.run.dir={tmp_path}", program=program)
        assert ended.code == 2
        assert ended.err.startswith(f"error: {override.partition('=')[0]}=")
        assert words in ended.err

"""The README and docs/ are true: its example runs, its commands compose, its files exist."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hydra import compose, initialize_config_dir

import experiments.build  # noqa: F401  registers the schema
from experiments.program import expanded
from maml import derivatives, implicit, inner_loop, objectives, quantization
from maml.losses import cross_entropy
from maml.models import MLP, functional
from maml.types import Task, initial

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
TEXTS = [TEXT, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.usefixtures("full_compiler")
def test_the_example_runs_and_learns(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in example.splitlines() if line and not line.startswith(("import", "from"))]) <= 20
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    protocol = scope["protocol"]
    result = scope["evaluate"](
        scope["progress"].state.params,
        scope["sampler"],
        scope["loss"],
        scope["unroll"](scope["optax"].sgd(0.01), 10),
        protocol,
    )
    assert result["step_10/loss"].mean < 0.5 * result["step_0/loss"].mean
    assert "step_10/loss" in capsys.readouterr().out


def commands() -> list[str]:
    blocks = [block for text in TEXTS for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m experiments.run") and "FOLDER" not in line]


@pytest.mark.parametrize("command", commands())
def test_the_commands_compose(command):
    words = [expanded(w) for w in shlex.split(command)[3:] if not w.startswith("-") and w != "job"]
    overrides = [w if "[" in w else w.split(",")[0] for w in words]  # the first of a sweep
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("config", overrides=overrides).trainer.steps > 0


def one_liners() -> dict[str, str]:
    """The first piece of code of each row of the table of algorithms, by the name of the file."""
    rows = re.findall(r"^\| `(\w+)`.*? \| `((?:query|multi_step|parameter)_\w+\(.*?\))`", TEXT, re.MULTILINE)
    return dict(rows)


def test_every_algorithm_has_a_line_in_python():
    told = {
        name
        for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+).*\| `(?:query|multi|param)", TEXT, re.MULTILINE)
        for name in re.findall(r"\w+", row)
    }
    assert told == {path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml")}


@pytest.mark.parametrize("name", one_liners())
def test_the_line_in_python_is_an_algorithm(name):
    """Its meta-gradient on a network that has all that they ask for: norms, a context, a head with features."""
    adapts = []

    def made_of(objective):
        return lambda loss, adapt, *more: adapts.append(adapt) or objective(loss, adapt, *more)

    parts = {k: v for module in (inner_loop, implicit, derivatives, quantization) for k, v in vars(module).items()}
    parts |= {k: made_of(getattr(objectives, k)) for k in ("query_loss", "multi_step_loss", "parameter_distance")}
    parts |= {
        "annealed_weights": objectives.annealed_weights,
        "optax": optax,
        "PathContains": nnx.PathContains,
        "Not": nnx.Not,
    }
    apply, params = functional(MLP((2,), 3, hidden=(4,), norm=nnx.BatchNorm, context=2, rngs=nnx.Rngs(0)))
    parts |= {"loss": cross_entropy(apply), "norms": nnx.PathContains("norms"), "quantizer": quantization.uniform(8)}
    objective = eval(one_liners()[name].replace("unroll(...)", "unroll(optax.sgd(0.01), 5)"), parts)  # noqa: S307
    side = jnp.ones((6, 2)), jnp.arange(6) % 3
    meta_params = initial(adapts[0], params, jax.random.key(0))
    of = jax.eval_shape(
        jax.grad(lambda p: objective(p, Task(side, side), jax.random.key(0), jnp.int32(0))[0]), meta_params
    )
    assert jax.tree.map(jnp.shape, of) == jax.tree.map(jnp.shape, meta_params)


def test_the_paths_it_names_exist():
    named = [
        path
        for text in TEXTS
        for path in re.findall(r"`((?:maml|conf|experiments|benchmarks|docker|tests)/[\w/.*]*)`", text)
    ]
    linked = re.findall(r"\]\(([\w/.]+)\)", TEXT)
    for page in (ROOT / "docs").glob("*.md"):
        assert all((page.parent / link).exists() for link in re.findall(r"\]\(([\w/.]+)\)", page.read_text())), page
    assert {"docs/results.md", "docs/own_parts.md", "RESULTS.md"} <= set(linked)
    for path in [*named, *linked]:
        assert list(ROOT.glob(path.rstrip("/") or ".")), path


def test_its_contents_are_its_sections():
    sections = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) == sections

"""The README and docs/ are true: its example runs, its commands compose, its files exist."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import experiments.build  # noqa: F401  registers the schema
from experiments.program import expanded

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
TEXTS = [TEXT, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]


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
    overrides = [w if "," not in w else w.split(",")[0] for w in words]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("config", overrides=overrides).trainer.steps > 0


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

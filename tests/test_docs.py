"""The pages of docs/ are true: their code runs, and the assertions in it hold."""

import re
import shlex
from pathlib import Path

import jax
import pytest

from experiments import pictures
from tests.programs import main, summary

PAGES = [p for p in sorted((Path(__file__).parents[1] / "docs").glob("*.md")) if "```python" in p.read_text()]


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and text of each block of Python."""
    text = page.read_text()
    found = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_in_order(page):
    scope = {"__name__": page.stem}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, page.name, "exec"), scope)


def test_the_parts_of_the_page_on_own_parts_run_in_a_program(tmp_path, monkeypatch):
    """Its code as an importable package, its YAML as files, its command."""
    (page,) = (p for p in PAGES if p.name == "own_parts.md")
    parts = ("import jax", "class Network", "def planes", "def huber")
    (tmp_path / "my_package.py").write_text("".join(code for _, code in blocks(page) if code.startswith(parts)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pictures, "draw", lambda *_: {})  # which take most of the time
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})
    _, task, model = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    for name, text in (("task/planes", task), ("model/network", model)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(text)
    (command,) = re.findall(r"python -m experiments.run (.*FOLDER.*)", page.read_text())
    words = shlex.split(command.replace("/FOLDER", str(tmp_path)))
    ended = main(
        *words, "debug=short", "trainer.steps=1", "logger=quiet", "paper=null", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert ended.code == 0, ended.err
    assert summary(tmp_path / "run")["config"]["task"]["_target_"] == "my_package.planes"
    (code,) = re.findall(r"## A run in Python\n\n```\n(.*?)```", page.read_text(), re.DOTALL)
    scope = {"jax": jax, "key": jax.random.key(0)}
    exec(code.replace("outputs/DATE/TIME", str(tmp_path / "run")), scope)
    assert scope["predictions"].shape == scope["task"].query[1].shape


def test_the_autodiff_page_asserts_its_numbers():
    """A page whose assertions were lost would pass as well."""
    (page,) = (p for p in PAGES if p.name == "advanced_autodiff.md")
    code = "".join(block for _, block in blocks(page))
    numbers = (
        "[4.0, 10.0, 6.0, 0.0]",
        "2 * np.eye(3)",
        "np.diag([2.0, 2.0, 6.0])",
        "0.24609375",
        "[-1.2, 1.2, -1.2]",
        "[1.2, 2.4, -1.2]",
        "(3.0, 1.0)",
        "[-0.7, -2.1, -2.1]",
    )
    asserted = "\n".join(line for line in code.splitlines() if line.startswith(("assert", "close(")))
    assert [number for number in numbers if number not in asserted] == []

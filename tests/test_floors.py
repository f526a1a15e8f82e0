"""The architecture: a module imports only from floors below it, and the library knows no Hydra."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"types": 0, "inner_loop": 2, "implicit": 2, "train": 3, "evaluate": 3, "plan": 3}  # all others: 1
FILES = sorted((ROOT / "maml").rglob("*.py"))


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{a.name}" if node.module == "maml" else node.module for a in node.names]
    return names


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_come_from_below(path):
    own = path.relative_to(ROOT / "maml").parts[0].removesuffix(".py")
    for name in imports(path):
        assert not name.startswith(("hydra", "omegaconf", "experiments")), name
        if name.startswith("maml.") and part(name) != own:
            assert FLOORS.get(part(name), 1) < FLOORS.get(own, 1), f"{own} imports {name}"

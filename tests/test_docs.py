"""The pages of docs/ are true: their code runs, and the assertions in it hold."""

import re
from pathlib import Path

import pytest

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

"""The guides run, those of a host where it is installed."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
HOSTS = ("horizon", "llm_compressor", "nvidia", "onnxruntime", "torch_ao", "torchao")
TASKS = ("training",)
EXAMPLES = [
    pytest.param(page.stem, example, id=f"{page.stem}-{i}")
    for page in sorted(GUIDES.glob("*.md"))
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def imported(example: str) -> list[str]:
    """The modules that an example imports, also those that it imports from a package."""
    names = []
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "pyobserver":
            names += [f"pyobserver.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
    return names


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_example_runs(
    page: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [name for name in imported(example) if not name.startswith("pyobserver.compat")]
    for name in hosts:
        pytest.importorskip(name, reason=f"{name} is not here", exc_type=ModuleNotFoundError)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, f"{page}.md", "exec"), names)
    assert "quantized" in names


def test_each_host_and_task_has_a_guide() -> None:
    assert {page for page, _ in (each.values for each in EXAMPLES)} == {*HOSTS, *TASKS}


def test_files_that_the_guides_name_are_there() -> None:
    root = GUIDES.parents[1]
    text = "".join(page.read_text() for page in GUIDES.glob("*.md"))
    paths = re.findall(r"`((?:examples|docs)/\S+?)`", text)
    assert paths
    assert all((root / path).exists() for path in paths), paths

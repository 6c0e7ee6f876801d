"""No file and no function grows beyond what is read at one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("lora_core", "nodes", "tests", "web", "benchmarks")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / "__init__.py", ROOT / "dev.py"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")),
    )
    if path.suffix in (".py", ".js", ".css")
)
#: Being split elsewhere.
WAITING = {
    "tests/fuzz/test_adapters.py",
    "tests/lora_core/jobs/test_store.py",
}


def is_schema(name: str) -> bool:
    """A node's inputs and outputs are data: long, but without a branch."""
    return name == "define_schema" or (name.startswith("list_") and name.endswith("_inputs"))


def find_long_functions(source: str) -> list[str]:
    return [
        f"{node.name}: {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
        and not is_schema(node.name)
    ]


@pytest.mark.parametrize("file", [file for file in SOURCES if file not in WAITING])
def test_a_file_and_its_functions_are_short_enough_to_be_read_at_once(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    if file.endswith(".py"):
        assert find_long_functions(source) == []


@pytest.mark.parametrize(
    ("name", "num_lines", "is_long"),
    [
        ("execute", MAX_FUNCTION_LINES, False),
        ("execute", MAX_FUNCTION_LINES + 1, True),
        ("define_schema", MAX_FUNCTION_LINES + 1, False),
        ("list_advanced_inputs", MAX_FUNCTION_LINES + 1, False),
        ("list_inputs_of", MAX_FUNCTION_LINES + 1, True),
    ],
)
def test_only_a_schema_may_be_long(name, num_lines, is_long):
    source = f"class Node:\n    async def {name}():\n" + "        pass\n" * (num_lines - 1)
    assert bool(find_long_functions(source)) is is_long

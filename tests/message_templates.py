"""The templates of messages that stand in the source, found without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Not of this repository, or no text for users.
OTHER_ERRORS = {"AssertionError", "DevError", "OSError", "RuntimeError", "ValueError"}


def find_templates() -> dict[str, str]:
    """Template -> the first place of it, in the order of the files."""
    found: dict[str, str] = {}
    for path in sorted((*ROOT.glob("lora_core/**/*.py"), *ROOT.glob("nodes/**/*.py"))):
        for template, line in list_templates(path.read_text(encoding="utf-8")):
            found.setdefault(template, f"{path.relative_to(ROOT).as_posix()}:{line}")
    return found


def list_templates(source: str) -> Iterator[tuple[str, int]]:
    """Of `message`, of errors, and of `format_count`, which counts in the plural too."""
    tree = ast.parse(source)
    names = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        texts = [
            arg.value
            for arg in call.args
            if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
        if name == "format_count" and texts:
            plural = texts[1] if len(texts) > 1 else f"{texts[0]}s"
            yield f"{{n:,}} {texts[0]}", call.lineno
            yield f"{{n:,}} {plural}", call.lineno
        elif call.args and (name in ("message", "kind") or is_error(name)):
            first = call.args[0]
            if isinstance(first, ast.Name) and isinstance(names.get(first.id), ast.Constant):
                first = names[first.id]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, call.lineno


def find_format_strings() -> list[str]:
    """Places of f-strings in the place of a template: their text is in no table of translations."""
    paths = sorted((*ROOT.glob("lora_core/**/*.py"), *ROOT.glob("nodes/**/*.py")))
    return [
        f"{path.relative_to(ROOT).as_posix()}:{line}"
        for path in paths
        for line in list_format_strings(path.read_text(encoding="utf-8"))
    ]


def list_format_strings(source: str) -> Iterator[int]:
    """Lines of calls of `message` and of errors with one."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name == "message" or is_error(name):
            first = node.args[0]
            choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
            if any(isinstance(one, ast.JoinedStr) for one in choices):
                yield node.lineno


def is_error(name: str) -> bool:
    return name.endswith("Error") and name not in OTHER_ERRORS

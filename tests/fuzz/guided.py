"""Coverage-guided fuzzing of one surface by hand: `python tests/fuzz/guided.py header`.

Needs atheris (`pip install atheris`), which no test needs. Any error but our own ends the run and
leaves the input that caused it in a file `crash-...` of the working folder.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_MESSAGE = 400


def import_core() -> None:
    """Imports our package under its own name, like tests/conftest.py."""
    spec = importlib.util.spec_from_file_location(
        "qwen_edit_lora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["qwen_edit_lora"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def build_surfaces() -> dict[str, Callable[[bytes], object]]:
    from qwen_edit_lora.lora_core import read_adapter
    from qwen_edit_lora.lora_core.base_model.module_paths import parse_block_ranges
    from qwen_edit_lora.lora_core.disk.json_reader import parse_json
    from qwen_edit_lora.lora_core.sweep.cells import parse_label

    path = Path(tempfile.mkdtemp(), "fuzzed.safetensors")

    def read_header(data: bytes) -> object:
        """`data` as the JSON header of a file whose tensors are zeros."""
        path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4096))
        return read_adapter(path)

    def on_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
        return lambda data: parse(data.decode(errors="surrogateescape"))

    return {
        "header": read_header,
        "json": lambda data: parse_json(data, "the input"),
        "block_ranges": on_text(parse_block_ranges),
        "label": on_text(parse_label),
    }


def check(surface: Callable[[bytes], object], data: bytes) -> None:
    from qwen_edit_lora.lora_core import LoraError

    try:
        surface(data)
    except LoraError as e:
        if not 0 < len(str(e)) <= MAX_MESSAGE:
            raise AssertionError(f"a message of {len(str(e))} characters") from e


def main(arguments: list[str]) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("guided.py needs atheris: run `pip install atheris` in the tests' environment.")
    with atheris.instrument_imports(include=["qwen_edit_lora"]):
        import_core()
        surfaces = build_surfaces()
    name = arguments[0] if arguments else ""
    if name not in surfaces:
        sys.exit(f"expected one of {', '.join(surfaces)}, got {name!r}")
    atheris.Setup([sys.argv[0], *arguments[1:]], lambda data: check(surfaces[name], data))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])

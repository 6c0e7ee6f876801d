"""Who may import whom: only nodes/host/ and nodes/routes.py know ComfyUI, the core nothing.

The ruff rule TID251 sees absolute imports only; this walks the syntax trees, relative ones
included, and then imports the package where the host does not exist.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qwen_edit_lora"
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "__init__.py", *ROOT.glob("lora_core/**/*.py"), *ROOT.glob("nodes/**/*.py"))
)

BORDER = tuple(file for file in SOURCES if file.startswith("nodes/host/"))
#: Host module -> files that may import it.
HOST = {
    **dict.fromkeys(
        (
            *("comfy", "comfy_extras", "comfy_execution", "folder_paths", "nodes"),
            *("node_helpers", "execution"),
        ),
        BORDER,
    ),
    **dict.fromkeys(("server", "aiohttp"), ("nodes/routes.py",)),
}
#: Modules of the core by tier: each may import its own tier and those before it.
TIERS = (
    ("errors",),
    ("text", "findings", "regular_files", "json_reader"),
    ("delta", "stored", "report", "targets", "strengths", "weights", "adapter"),
    ("formats", "files"),
    ("progress", "factors", "products", "truncation", "file_size"),
    ("initialization", "lora_layers", "injection_plan", "injection"),
)
EXTRAS = (
    *("diffusers", "peft", "matplotlib", "accelerate", "transformers", "kornia"),
    *("bitsandbytes", "prodigyopt", "schedulefree"),
)


def list_imports(source: str, file: str) -> Iterator[str]:
    """Dotted names a file imports, at any depth; those of this repository under PACKAGE."""
    package = [PACKAGE, *Path(file).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def find_tier(name: str) -> int:
    """Tier of a module of the core, by its first name; later modules may import every tier."""
    return next((i for i, names in enumerate(TIERS) if name in names), len(TIERS))


def find_violations(source: str, file: str) -> list[str]:
    """Imports of `source` that a file at this place must not have."""
    in_core, in_nodes = file.startswith("lora_core/"), file.startswith("nodes/")
    violations = []
    for name in list_imports(source, file):
        top, *rest = name.split(".")
        if top == PACKAGE and in_core:
            if rest[:1] != ["lora_core"]:
                violations.append(name)
            elif file not in ("lora_core/__init__.py", "lora_core/__main__.py"):
                own = Path(file).with_suffix("").parts[1]
                # `from . import X`: a name that is no module of the core is one of its __init__
                if find_tier(rest[1] if len(rest) > 1 else "") > find_tier(own):
                    violations.append(name)
        elif top == "comfy_api":
            if not (in_nodes and rest[:1] == ["latest"]):
                violations.append(name)
        elif file not in HOST.get(top, (file,)):
            violations.append(name)
    return violations


@pytest.mark.parametrize("file", SOURCES)
def test_a_file_imports_only_what_its_place_allows(file):
    assert find_violations((ROOT / file).read_text(encoding="utf-8"), file) == []


FORBIDDEN = [
    ("lora_core/delta.py", "import comfy"),
    ("lora_core/delta.py", "import torch, comfy.sd"),
    ("lora_core/delta.py", "from comfy import sd"),
    ("lora_core/delta.py", "def f():\n    from comfy.utils import load_torch_file"),
    ("lora_core/delta.py", "from comfy_api.latest import io"),
    ("lora_core/delta.py", "import folder_paths"),
    ("lora_core/delta.py", "import server"),
    ("lora_core/delta.py", "from nodes import NODE_CLASS_MAPPINGS"),
    ("lora_core/delta.py", "from ..nodes import host"),
    ("lora_core/delta.py", "from ..nodes.host import lora_path"),
    ("lora_core/delta.py", "from ..nodes.host.files import find_lora"),
    ("lora_core/delta.py", "from .. import nodes"),
    ("lora_core/formats/alpha.py", "from ...nodes import host"),
    ("lora_core/formats/alpha.py", "from ... import WEB_DIRECTORY"),
    ("lora_core/delta.py", "import importlib\nimportlib.import_module('comfy.sd')"),
    ("lora_core/delta.py", "__import__('comfy')"),
    ("lora_core/__init__.py", "from ..nodes import host"),
    ("lora_core/__main__.py", "import comfy"),
    ("lora_core/delta.py", "from qwen_edit_lora.nodes import host"),
    ("lora_core/errors.py", "from .targets import NUM_BLOCKS"),
    ("lora_core/targets.py", "from .formats import reading"),
    ("lora_core/targets.py", "from . import files"),
    ("lora_core/adapter.py", "from .files import read_adapter"),
    ("lora_core/truncation.py", "from .injection import inject"),
    ("lora_core/injection.py", "from .training import trainer"),
    ("lora_core/formats/alpha.py", "from ..training import train"),
    ("lora_core/stored.py", "from . import read_adapter"),
    ("nodes/load.py", "import comfy.utils"),
    ("nodes/load.py", "import folder_paths"),
    ("nodes/load.py", "from aiohttp import web"),
    ("nodes/load.py", "from comfy_api.v0_0_2 import io"),
    ("nodes/load.py", "from comfy_execution.graph_utils import is_link"),
    ("nodes/host_files.py", "import folder_paths"),
    ("nodes/host/files.py", "from server import PromptServer"),
    ("nodes/routes.py", "import comfy.model_management"),
    ("__init__.py", "import comfy"),
    ("__init__.py", "from comfy_api.latest import ComfyExtension"),
]
ALLOWED = [
    ("lora_core/delta.py", "import torch\nfrom .errors import ConfigError"),
    ("lora_core/adapter.py", "from . import delta\nfrom .stored import load"),
    ("lora_core/formats/alpha.py", "from .. import targets\nfrom ..adapter import Adapter"),
    ("lora_core/formats/alpha.py", "from .parsed_key import parse_key"),
    ("lora_core/training.py", "from .files import read_adapter\nfrom .jobs import x"),
    ("lora_core/__init__.py", "from .files import read_adapter"),
    ("nodes/host/files.py", "import comfy.sd, folder_paths\nfrom ...lora_core import Adapter"),
    ("nodes/host/__init__.py", "from .files import find_lora"),
    ("nodes/routes.py", "from aiohttp import web\nfrom server import PromptServer"),
    ("nodes/load.py", "from comfy_api.latest import io, ui\nfrom . import host"),
    ("nodes/load.py", "from ..lora_core.errors import LoraError"),
    ("__init__.py", "def f():\n    from .nodes import QwenEditLoraExtension"),
]


@pytest.mark.parametrize(("file", "source"), FORBIDDEN)
def test_the_walk_sees_every_forbidden_form(file, source):
    assert len(find_violations(source, file)) == 1


@pytest.mark.parametrize(("file", "source"), ALLOWED)
def test_the_walk_lets_allowed_imports_pass(file, source):
    assert find_violations(source, file) == []


IMPORT_ALONE = """
import importlib.util, sys
from pathlib import Path

root, forbidden = Path(sys.argv[1]), sys.argv[2].split(",")

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in forbidden:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Forbid())
spec = importlib.util.spec_from_file_location(
    "qwen_edit_lora", root / "__init__.py", submodule_search_locations=[str(root)]
)
sys.modules["qwen_edit_lora"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name in sys.argv[3:]:
    importlib.import_module(f"qwen_edit_lora.{name}")
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def import_alone(folder: Path, *modules: str) -> set[str]:
    """Imports the package in a fresh process, without the host; returns what it loaded."""
    forbidden = [*HOST, "comfy_api", *EXTRAS]
    forbidden.remove("nodes")  # not the host's here: nothing on sys.path has that name
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE, ROOT, ",".join(forbidden), *modules],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def list_core_modules() -> list[str]:
    """Every module of the core but its command line, dotted and without the package."""
    files = (Path(file).with_suffix("") for file in SOURCES if file.startswith("lora_core/"))
    dotted = (".".join(part for part in file.parts if part != "__init__") for file in files)
    return [name for name in dotted if not name.endswith("__main__")]


def test_the_core_imports_without_comfyui_and_without_extras(tmp_path):
    loaded = import_alone(tmp_path, *list_core_modules())
    assert "torch" in loaded
    assert loaded.isdisjoint(EXTRAS)


def test_importing_the_extension_alone_loads_nothing_heavy(tmp_path):
    assert import_alone(tmp_path).isdisjoint({"torch", "numpy", "PIL", *EXTRAS})


def test_every_public_name_of_the_core_exists_and_is_listed_once():
    core = importlib.import_module(f"{PACKAGE}.lora_core")
    assert len(set(core.__all__)) == len(core.__all__)
    assert [name for name in core.__all__ if not hasattr(core, name)] == []


def test_every_name_the_core_imports_for_others_is_public():
    core = importlib.import_module(f"{PACKAGE}.lora_core")
    tree = ast.parse((ROOT / "lora_core" / "__init__.py").read_text(encoding="utf-8"))
    imported = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(imported) == sorted(core.__all__)


def test_every_error_of_the_core_is_a_lora_error():
    core = importlib.import_module(f"{PACKAGE}.lora_core")
    errors = [getattr(core, name) for name in core.__all__ if name.endswith("Error")]
    assert len(errors) > 1
    assert all(issubclass(error, core.LoraError) for error in errors)

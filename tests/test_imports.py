"""Who may import whom: only nodes/host/ and the routes know ComfyUI, the core nothing of it.

The ruff rule TID251 sees absolute imports only; this walks the syntax trees, relative ones
included, and then imports the package in a process without the host.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
    "server": ("nodes/server/routes.py",),
    "aiohttp": tuple(
        f"nodes/server/{name}.py"
        for name in ("routes", "pair_routes", "download_routes", "answers")
    ),
}
#: Modules of the core that every package may use; they import only each other.
GROUND = (
    *("checks", "errors", "findings", "messages", "progress", "subprocesses", "text", "threads"),
    "translation",
)
#: Files that may import all of the core.
ABOVE = ("__init__.py", "lora_core/__init__.py", "lora_core/__main__.py")
#: Package -> packages it may import beside itself and GROUND; those of `nodes` also all of the
#: core.
PACKAGES = {
    "disk": (),
    "base_model": ("disk",),
    "adapter": ("disk", "base_model"),
    "formats": ("disk", "base_model", "adapter"),
    "algebra": ("disk", "adapter"),
    "drawing": (),
    "sweep": ("disk", "drawing"),
    "inspection": ("disk", "base_model", "adapter", "algebra", "drawing"),
    "toolbox": ("disk", "base_model", "adapter", "formats", "algebra"),
    "library": ("disk", "base_model", "adapter", "formats", "inspection"),
    "injection": ("disk", "base_model", "adapter", "formats", "algebra"),
    "training.machine": (),
    "training.data": ("disk",),
    "training.optimizer": (),
    "training.objective": ("training.data",),
    "training.model": ("disk", "base_model", "injection", "training.machine", "training.data"),
    "training.config": (
        *("disk", "injection", "training.data", "training.model", "training.objective"),
        "training.optimizer",
    ),
    "training.sampling": (
        *("disk", "adapter", "training.data", "training.model", "training.objective"),
    ),
    "training.run": (
        *("disk", "base_model", "adapter", "formats", "algebra", "injection", "training.machine"),
        *("training.data", "training.model", "training.objective", "training.optimizer"),
        *("training.config", "training.sampling"),
    ),
    "training.estimate": (
        *("base_model", "injection", "training.machine", "training.data", "training.model"),
        *("training.objective", "training.optimizer", "training.config", "training.sampling"),
        "training.run",
    ),
    "training": (
        *("disk", "formats", "training.data", "training.model", "training.config"),
        *("training.sampling", "training.run", "training.estimate"),
    ),
    "pairs": ("disk", "drawing", "training.data"),
    "jobs": (
        *("disk", "drawing", "inspection", "training.machine", "training.data"),
        *("training.model", "training.objective", "training.config", "training.sampling"),
        *("training.run", "training.estimate"),
    ),
    "nodes.host": (),
    "nodes.patching": ("nodes.host",),
    "nodes.sweeping": ("nodes.host", "nodes.patching"),
    "nodes.datasets": ("nodes.host",),
    "nodes.server": ("nodes.host", "nodes.datasets"),
    "nodes": ("nodes.host", "nodes.patching", "nodes.sweeping", "nodes.datasets", "nodes.server"),
}
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


def find_package(name: str) -> str:
    """Row of PACKAGES that a module belongs to, or "ground", or "" if there is none."""
    parts = name.split(".")
    if parts[0] == "lora_core":
        parts = parts[1:]
        if parts[:1] and parts[0] in GROUND:
            return "ground"
    rows = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((row for row in rows if row in PACKAGES), "")


def find_violations(source: str, file: str) -> list[str]:
    """Imports of `source` that a file at this path must not have."""
    in_core, in_nodes = file.startswith("lora_core/"), file.startswith("nodes/")
    own = find_package(".".join(Path(file).with_suffix("").parts))
    violations = []
    for name in list_imports(source, file):
        top, *rest = name.split(".")
        if top == PACKAGE:
            is_of_core = rest[:1] == ["lora_core"]
            other = find_package(".".join(rest))
            if in_core and not is_of_core:
                violations.append(name)
            elif file not in ABOVE and not (in_nodes and is_of_core):
                if other not in (own, "ground", *PACKAGES.get(own, ())):
                    violations.append(name)
        elif top == "comfy_api":
            if not (in_nodes and rest[:1] == ["latest"]):
                violations.append(name)
        elif file not in HOST.get(top, (file,)):
            violations.append(name)
    return violations


@pytest.mark.parametrize("file", SOURCES)
def test_a_file_imports_only_what_its_package_allows(file):
    assert find_violations((ROOT / file).read_text(encoding="utf-8"), file) == []


FORBIDDEN = [
    ("lora_core/adapter/delta.py", "import comfy"),
    ("lora_core/adapter/delta.py", "import torch, comfy.sd"),
    ("lora_core/adapter/delta.py", "from comfy import sd"),
    ("lora_core/adapter/delta.py", "def f():\n    from comfy.utils import load_torch_file"),
    ("lora_core/adapter/delta.py", "from comfy_api.latest import io"),
    ("lora_core/adapter/delta.py", "import folder_paths"),
    ("lora_core/adapter/delta.py", "import server"),
    ("lora_core/adapter/delta.py", "from nodes import NODE_CLASS_MAPPINGS"),
    ("lora_core/errors.py", "from ..nodes import host"),
    ("lora_core/errors.py", "from ..nodes.host import lora_path"),
    ("lora_core/errors.py", "from .. import nodes"),
    ("lora_core/formats/alpha.py", "from ...nodes.host.files import find_lora"),
    ("lora_core/formats/alpha.py", "from ...nodes import host"),
    ("lora_core/formats/alpha.py", "from ... import WEB_DIRECTORY"),
    ("lora_core/adapter/delta.py", "import importlib\nimportlib.import_module('comfy.sd')"),
    ("lora_core/adapter/delta.py", "__import__('comfy')"),
    ("lora_core/__init__.py", "from ..nodes import host"),
    ("lora_core/__main__.py", "import comfy"),
    ("lora_core/adapter/delta.py", "from qwen_edit_lora.nodes import host"),
    ("lora_core/errors.py", "from .base_model.module_paths import split_path"),
    ("lora_core/base_model/module_paths.py", "from ..formats import reading"),
    ("lora_core/base_model/module_paths.py", "from .. import formats"),
    ("lora_core/adapter/adapter.py", "from ..formats.files import read_adapter"),
    ("lora_core/algebra/truncation.py", "from ..injection.inject import inject"),
    ("lora_core/injection/inject.py", "from ..training.run import trainer"),
    ("lora_core/formats/alpha.py", "from ..training import train"),
    ("lora_core/disk/safetensors_file.py", "from .. import read_adapter"),
    ("lora_core/training/run/run.py", "def f():\n    from ...jobs.job import JobState"),
    ("lora_core/jobs/training_job.py", "from ..training.command_line import run_train"),
    ("lora_core/training/run/run.py", "from ..estimate.probe import measure_blocks"),
    ("lora_core/training/run/run.py", "from .. import command_line"),
    ("lora_core/training/model/rope.py", "from ..config.config import ModelConfig"),
    ("lora_core/training/data/dataset.py", "from ...pairs import pair"),
    ("lora_core/inspection/verdict.py", "from ..library import health"),
    ("lora_core/no_package/module.py", "from ..jobs import job"),
    ("nodes/load.py", "import comfy.utils"),
    ("nodes/load.py", "import folder_paths"),
    ("nodes/load.py", "from aiohttp import web"),
    ("nodes/load.py", "from comfy_api.v0_0_2 import io"),
    ("nodes/load.py", "from comfy_execution.graph_utils import is_link"),
    ("nodes/host_files.py", "import folder_paths"),
    ("nodes/host/files.py", "from server import PromptServer"),
    ("nodes/host/files.py", "from ..patching import bank"),
    ("nodes/patching/bank.py", "from ..sockets import CATEGORY"),
    ("nodes/server/routes.py", "import comfy.model_management"),
    ("nodes/server/routes.py", "from ..hold import NODES"),
    ("__init__.py", "import comfy"),
    ("__init__.py", "from comfy_api.latest import ComfyExtension"),
]
ALLOWED = [
    ("lora_core/adapter/delta.py", "import torch\nfrom ..errors import ConfigError"),
    ("lora_core/adapter/delta.py", "from .. import errors, text"),
    ("lora_core/adapter/adapter.py", "from . import delta\nfrom ..disk.writing import explain"),
    ("lora_core/formats/alpha.py", "from ..base_model import module_paths"),
    ("lora_core/formats/alpha.py", "from ..adapter.adapter import Adapter"),
    ("lora_core/formats/alpha.py", "from .parsed_key import parse_key"),
    ("lora_core/jobs/job.py", "from ..training.config import config\nfrom . import folder"),
    ("lora_core/training/command_line.py", "from .run.trainer import train"),
    ("lora_core/__init__.py", "from .formats.files import read_adapter"),
    ("lora_core/__main__.py", "from .training.command_line import run_train"),
    ("nodes/host/files.py", "import comfy.sd, folder_paths\nfrom ...lora_core import Adapter"),
    ("nodes/host/__init__.py", "from .files import find_lora"),
    ("nodes/server/routes.py", "from aiohttp import web\nfrom server import PromptServer"),
    ("nodes/load.py", "from comfy_api.latest import io, ui\nfrom . import host"),
    ("nodes/load.py", "from ..lora_core.errors import LoraError"),
    ("nodes/load.py", "from ..lora_core.jobs.store import JobStore\nfrom .server import routes"),
    ("__init__.py", "def f():\n    from .nodes import QwenEditLoraExtension"),
]


def test_the_table_holds_every_package_once_and_no_cycle():
    folders = {".".join(Path(file).parts[:-1]).removeprefix("lora_core.") for file in SOURCES}
    assert folders - {"", "lora_core"} == set(PACKAGES)
    TopologicalSorter(PACKAGES).prepare()  # raises CycleError if there is a cycle


def test_only_the_ground_floor_is_outside_the_packages_of_the_core():
    beside = {Path(file).stem for file in SOURCES if Path(file).parent.as_posix() == "lora_core"}
    assert beside == {*GROUND, "__init__", "__main__"}


def test_every_package_is_on_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = {Path(file).parent.as_posix() for file in SOURCES} - {"."}
    assert [folder for folder in sorted(folders) if f"`{folder}/`" not in text] == []


@pytest.mark.parametrize(("file", "source"), FORBIDDEN)
def test_the_walk_detects_every_forbidden_form(file, source):
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
    """Every module of the core except its command line, dotted and without the package."""
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


#: Names that scripts import from `lora_core`: a name once here stays.
PROMISED = {
    *("Adapter", "Comparison", "Composition", "DroppedKey", "Finding", "Inspection"),
    *("LoadReport", "ModuleComparison", "ModuleInspection", "TARGET_PRESETS"),
    *("DiffWeights", "DoraWeights", "LohaWeights", "LokrWeights", "LoraWeights"),
    *("ModuleWeights", "OftWeights"),
    *("ConfigError", "FileError", "KeyFormatError", "LoraError", "NonFiniteLossError"),
    *("NonFiniteWeightsError", "OutOfMemoryError", "ShapeError", "TargetError"),
    *("build_state_dict", "compare_adapters", "compute_delta", "count_parameters"),
    *("extract_adapter", "inspect_adapter", "merge_adapters", "parse_block_ranges"),
    *("read_adapter", "read_state_dict", "resize_adapter", "write_adapter"),
}


def test_every_name_promised_to_scripts_is_public():
    core = importlib.import_module(f"{PACKAGE}.lora_core")
    assert PROMISED <= set(core.__all__)


def test_the_training_set_api_for_scripts_is_public():
    training = importlib.import_module(f"{PACKAGE}.lora_core.training")
    assert training.__all__ == ["CachedItem", "DatasetWriter", "read_dataset"]


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

"""Imports the extension as ComfyUI would; provides a tiny base, a server and a browser.

Three are importable in every test: `qwen_edit_lora` (this checkout), `demo_base` and `fake_cuda`.
None needs the checkout on sys.path, where our `nodes` would shadow ComfyUI's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE_GPU = os.environ.get("QWEN_EDIT_LORA_GPU") == "1"  # ComfyUI's device; one per process
#: Without it cuBLAS sums in arbitrary order and refuses tests that require determinism; read once
#: per process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
#: On a GPU ComfyUI computes and merges LoRAs in 16 bits, so results would differ by rounding.
FULL_PRECISION = ("--force-fp32", "--fp32-text-enc")
#: Those of tests/web that take more than half a minute, the longest first.
LONG_FILES = (
    *("test_panel.py", "test_training_templates.py", "test_templates.py"),
    *("test_sweep_templates.py", "test_pairs.py"),
)
BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def import_package(name: str, folder: Path) -> ModuleType:
    """Imports a package by its folder under a given name, as ComfyUI imports extensions."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


import_package("qwen_edit_lora", ROOT)
import_package("demo_base", ROOT / "tests" / "demo_base")
import_package("fake_cuda", ROOT / "tests" / "fake_cuda")


def find_comfyui() -> Path | None:
    """The ComfyUI that dev.py chose or fetched."""
    candidates = (os.environ.get("COMFYUI_PATH"), ROOT / ".comfyui")
    for folder in (Path(candidate) for candidate in candidates if candidate):
        if (folder / "main.py").is_file():
            return folder.resolve()
    return None


def pytest_configure() -> None:
    """Makes a terminated pytest stop its server, like an interrupted one."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest of the last files first: no process is left alone with one of them at the end."""
    places = {name: place for place, name in enumerate(LONG_FILES)}

    def choose_place(item: pytest.Item) -> int:
        is_last = item.path.parent.name == "web"
        return places.get(item.path.name, len(places)) if is_last else -1

    items.sort(key=choose_place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a marked test whose host is missing, before any fixture looks for it."""
    needs_comfyui = item.get_closest_marker("comfy") or item.get_closest_marker("web")
    if needs_comfyui and find_comfyui() is None:
        pytest.skip("needs ComfyUI: run `python dev.py setup` or set COMFYUI_PATH")
    if item.get_closest_marker("nightly") and os.environ.get("QWEN_EDIT_LORA_FUZZ") != "all":
        pytest.skip("takes long: run `python dev.py test --all`")
    if item.get_closest_marker("web"):
        find_browser()
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@dataclass(frozen=True)
class DemoModels:
    """Paths of the demo base's files."""

    root: Path
    """ComfyUI's models folder; a LoRA written into root / "loras" is seen by the server."""
    dit: dict[str, Path]
    """2509_fp32, 2511_fp32, 2509_bf16, 2511_bf16, 2509_fp8, 2511_fp8_scaled."""
    text_encoder: Path
    vae: Path
    lora: Path


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI checkout; skips if there is none."""
    path = find_comfyui()
    if path is None:
        pytest.skip("needs ComfyUI: run `python dev.py setup` or set COMFYUI_PATH")
    return path


@pytest.fixture(scope="session")
def base_directory(
    comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Path:
    """A fresh --base-directory with our extension, the shim, the photograph and the demo base."""
    from demo_base import frontend, layout

    # Takes 7 s to make, so kept between runs; one for each of several test processes.
    name = "demo_models" + os.environ.get("PYTEST_XDIST_WORKER", "")
    cache = Path(pytestconfig.cache.mkdir(name))
    models = layout.make_models(cache, sys.executable, comfyui_path)
    base = layout.make_base_directory(tmp_path_factory.mktemp("comfyui"), ROOT)
    shutil.copytree(models, base / "models", dirs_exist_ok=True)
    frontend.write_user_settings(base / "user")
    return base


@pytest.fixture(scope="session")
def demo_models(base_directory: Path) -> DemoModels:
    """The demo base inside `base_directory`."""
    from demo_base import generate

    root = base_directory / "models"
    return DemoModels(
        root=root,
        dit={
            f"{variant}_{storage}": root / "diffusion_models" / name
            for name, (variant, storage) in generate.DIT_FILES.items()
        },
        text_encoder=root / "text_encoders" / generate.TEXT_ENCODER_FILE,
        vae=root / "vae" / generate.VAE_FILE,
        lora=root / "loras" / generate.LORA_FILE,
    )


@pytest.fixture(scope="session")
def comfyui(comfyui_path: Path, base_directory: Path) -> SimpleNamespace:
    """ComfyUI imported into this process, on the CPU, with `base_directory` as its folders.

    With QWEN_EDIT_LORA_GPU=1 on the GPU, in the dtypes that it uses on a CPU.

    Fields: path, device, sd, model_management, model_patcher, lora, ops, utils, folder_paths,
    nodes. Other modules can be imported by name from then on.
    """
    sys.path.insert(0, str(comfyui_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of ComfyUI and its dependencies are not ours
        from comfy.cli_args import args  # reads no command line: comfy.options leaves that off

        args.cpu = not USE_GPU
        for flag in FULL_PRECISION if USE_GPU else ():
            setattr(args, flag.removeprefix("--").replace("-", "_"), True)
        args.use_pytorch_cross_attention = True
        args.base_directory = str(base_directory)
        import comfy.lora
        import comfy.model_management
        import comfy.model_patcher
        import comfy.ops
        import comfy.sd
        import comfy.utils
        import folder_paths

        import nodes

        for name in ("shim", "shim_21"):
            import_package(f"demo_base.{name}", ROOT / "tests" / "demo_base" / name)
        if USE_GPU:
            multiply_in_full_precision(comfy.model_management)
    return SimpleNamespace(
        path=comfyui_path,
        device=comfy.model_management.get_torch_device(),
        sd=comfy.sd,
        model_management=comfy.model_management,
        model_patcher=comfy.model_patcher,
        lora=comfy.lora,
        ops=comfy.ops,
        utils=comfy.utils,
        folder_paths=folder_paths,
        nodes=nodes,
    )


def multiply_in_full_precision(management: ModuleType) -> None:
    """What ComfyUI has no flag for: disables 8-bit and TensorFloat-32 products."""
    import torch

    for kind in ("fp8", "mxfp8", "nvfp4"):
        name = f"supports_{kind}_compute"
        assert hasattr(management, name)
        setattr(management, name, lambda device=None: False)
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def server(comfyui_path: Path, base_directory: Path) -> Iterator[Any]:
    """A running demo_base.server.ComfyServer with our extension and the shim installed."""
    from demo_base.server import ComfyServer

    extra = FULL_PRECISION if USE_GPU else ()
    options = {"extra_args": extra, "cpu": not USE_GPU}
    with ComfyServer.start(base_directory, sys.executable, comfyui_path, **options) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def routes(
    comfyui: SimpleNamespace, demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A demo_base.route_server.RouteServer: our HTTP routes in this process, without workers."""
    from demo_base.route_server import serve_routes

    with serve_routes(tmp_path_factory.mktemp("routes"), demo_models.root / "loras") as routes:
        yield routes


def find_browser() -> str:
    """Path of a Chromium; skips if there is none, fails if one is required."""
    candidates = [os.environ.get("CHROMIUM_PATH"), *map(shutil.which, BROWSER_NAMES)]
    for path in filter(None, candidates):
        return path
    if os.environ.get("QWEN_EDIT_LORA_REQUIRE_BROWSER") == "1":
        pytest.fail("needs Chromium, and QWEN_EDIT_LORA_REQUIRE_BROWSER=1 forbids to skip")
    pytest.skip("needs Chromium on PATH, or its path in CHROMIUM_PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium (playwright's sync Browser).

    Lives for one test module: while it does, its event loop forbids asyncio.run in this thread.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=list(BROWSER_ARGS)
        )
        yield browser
        browser.close()

"""The tiny base in this process, sampled through ComfyUI's own KSampler code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def ours(comfyui: SimpleNamespace) -> SimpleNamespace:
    """Our own modules that need the host."""
    from qwen_edit_lora.nodes import host
    from qwen_edit_lora.nodes.patching import application, matching, side_path

    return SimpleNamespace(
        application=application, host=host, matching=matching, side_path=side_path
    )


@pytest.fixture(scope="module")
def executor(comfyui: SimpleNamespace) -> Iterator[Any]:
    """ComfyUI's PromptExecutor with our nodes beside the stock ones."""
    import execution
    import server
    from comfy_extras import nodes_custom_sampler
    from qwen_edit_lora.nodes import QwenEditLoraExtension

    async def register() -> None:
        custom_sampling = await nodes_custom_sampler.comfy_entrypoint()
        for extension in (QwenEditLoraExtension(), custom_sampling):
            for node in await extension.get_node_list():
                node.GET_SCHEMA()
                comfyui.nodes.NODE_CLASS_MAPPINGS[node.SCHEMA.node_id] = node

    asyncio.run(register())
    cache_args = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    loop = asyncio.new_event_loop()
    yield execution.PromptExecutor(
        server.PromptServer(loop), execution.CacheType.CLASSIC, cache_args
    )
    loop.close()


@pytest.fixture
def load_base(comfyui: SimpleNamespace, demo_models: Any) -> Callable[[str], Any]:
    """Loads one of the demo DiTs like the stock UNETLoader: "2509_fp32", "2509_fp8", ..."""

    # Without a GPU ComfyUI widens bf16 and plain fp8 files to float32 by default.
    kept = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

    def load(name: str) -> Any:
        dtype = kept.get(name.partition("_")[2])
        options = {} if dtype is None else {"dtype": dtype}
        with torch.inference_mode():
            return comfyui.sd.load_diffusion_model(str(demo_models.dit[name]), options)

    return load


@pytest.fixture(scope="session")
def paged_memory(comfyui: SimpleNamespace) -> None:
    """comfy_aimdo as started by ComfyUI's main.py before it imports anything else."""
    from comfy_aimdo import control

    if comfyui.device.type == "cpu":
        pytest.skip("ComfyUI is on the CPU; set QWEN_EDIT_LORA_GPU=1")
    devices = [device.index for device in comfyui.model_management.get_all_torch_devices()]
    if not (control.init() and control.init_devices(devices)):
        pytest.skip("comfy_aimdo does not start here, so that ComfyUI uses its other patcher")


@pytest.fixture
def dynamic_patcher(
    paged_memory: None, comfyui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Dynamic VRAM itself: models loaded from now on are paged (end of main.py)."""
    comfyui.model_management.unload_all_models()
    dynamic = comfyui.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(comfyui.model_patcher, "CoreModelPatcher", dynamic)
    monkeypatch.setattr(comfyui.model_management.comfy.memory_management, "aimdo_enabled", True)
    yield
    comfyui.model_management.unload_all_models()


@pytest.fixture(params=["legacy", pytest.param("dynamic", marks=pytest.mark.gpu)])
def patcher(request: pytest.FixtureRequest) -> str:
    """Each of the two ways in which ComfyUI keeps a model's weights."""
    if request.param == "dynamic":
        request.getfixturevalue("dynamic_patcher")
    return request.param


@pytest.fixture
def base(load_base: Callable[[str], Any]) -> Any:
    return load_base("2509_fp32")


@pytest.fixture
def sample(comfyui: SimpleNamespace) -> Callable[..., torch.Tensor]:
    """Two Euler steps with one reference: MODEL -> latent (1, 16, 1, 8, 8)."""

    def run(model: Any, seed: int = 3, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        reference = torch.randn(1, 16, 1, 8, 8, generator=generator)
        tokens = torch.randn(1, 12, 64, generator=generator)
        conditioning = [[tokens, {"reference_latents": [reference]}]]
        with torch.inference_mode():
            latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
            (result,) = comfyui.nodes.common_ksampler(
                model, seed, 2, 1.0, "euler", "simple", conditioning, conditioning, latent
            )
        return result["samples"].clone()

    return run


@pytest.fixture
def make_lora(demo_models: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA for the demo base: make_lora("a", seed=1, rank=4, delta_std=0.02)."""
    from demo_base.adapters import make_adapter

    def make(name: str, **options: Any) -> Path:
        options.setdefault("delta_std", 0.02)
        path = tmp_path / f"{name}.safetensors"
        return make_adapter(path, demo_models.dit["2509_fp32"], **options)

    return make


@pytest.fixture
def apply_native(comfyui: SimpleNamespace) -> Callable[[Any, Path, float], Any]:
    """ComfyUI's own LoraLoader on a MODEL."""

    def apply(model: Any, path: Path, strength: float) -> Any:
        state_dict = comfyui.utils.load_torch_file(str(path), safe_load=True)
        return comfyui.sd.load_lora_for_models(model, None, state_dict, strength, 0)[0]

    return apply


@pytest.fixture
def apply_ours(ours: SimpleNamespace) -> Callable[..., Any]:
    """Our Apply on a MODEL: apply_ours(model, path, 0.7, mode="side path", blocks=...)."""
    from qwen_edit_lora.lora_core import Adapter, read_adapter
    from qwen_edit_lora.lora_core.adapter.strengths import Strengths

    def apply(
        model: Any, adapter: Adapter | Path, strength: float, mode="auto", **more: Any
    ) -> Any:
        adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        layers = [(adapter, Strengths(strength, **more))]
        with torch.inference_mode():
            return ours.application.apply_adapters(model, layers, mode).model

    return apply


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()

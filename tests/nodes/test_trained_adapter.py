"""A training run's file in ComfyUI's stock loader, in ours, in diffusers and in PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen_edit_lora.lora_core import compute_delta, read_adapter, write_adapter
from qwen_edit_lora.lora_core.injection.inject import inject
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, DatasetWriter, read_dataset
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.run.trainer import train
from qwen_edit_lora.lora_core.training.sampling.sampling import applied
from safetensors import safe_open

from .conftest import worst

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5  # float32 base
TEXT_WIDTH = 64
#: What is trained -> settings. Each must give a file that every loader reads.
SETTINGS: dict[str, dict[str, Any]] = {
    "alpha unlike rank": {"rank": 4, "alpha": 10},
    "rsLoRA": {"rank": 4, "alpha": 3, "use_rslora": True},
    "PiSSA": {"rank": 4, "init": "pissa"},
    "ranks differ": {"rank": 4, "alpha": 2, "rank_pattern": {"attn.to_q": 7}},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On busy cores, threads that wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_dataset(folder: Path):
    writer = DatasetWriter(folder)
    for i in range(2):
        references = (draw(16, 8, 8, seed=10 + i),)
        writer.add(
            f"item_{i}",
            CachedItem(draw(16, 8, 8, seed=i), references, draw(5 + i, TEXT_WIDTH, seed=20 + i)),
        )
    return read_dataset(writer.finish())


def run_training(folder: Path, source: Path, lora: dict[str, Any], dtype: str) -> SimpleNamespace:
    """A few large steps; the model is left with its LoRAs in it."""
    config = config_from_dict(
        {
            "name": "trained",
            "output": str(folder / "run"),
            "steps": 3,
            "model": {"source": str(source), "storage": "fp32", "compute_dtype": "fp32"},
            "data": {"folder": str(folder / "data")},
            "lora": {"targets": ["full + modulation"], **lora},
            "optimizer": {"learning_rate": 2e-2, "ema_decay": 0.6},
            "saving": {"dtype": dtype},
        }
    )
    model = load_transformer(source, "fp32", compute_dtype=torch.float32)
    injection = inject(model.transformer, config.lora, seed=config.seed)
    list(train(config, model, injection, make_dataset(folder / "data"), variant="2511"))
    run = folder / "run"
    files = {"raw": run / "trained.safetensors", "EMA": run / "trained_ema.safetensors"}
    return SimpleNamespace(model=model.eval(), injection=injection, files=files)


def make_inputs() -> tuple:
    references = [draw(1, 16, 10, 6, seed=1)]
    return draw(1, 16, 8, 8), references, draw(1, 11, TEXT_WIDTH, seed=9), torch.tensor([0.6])


def run_ours(model: torch.nn.Module) -> torch.Tensor:
    latents, references, text, sigma = make_inputs()
    with torch.no_grad():
        return model(latents, references, text, None, sigma)


def run_comfyui(comfyui: SimpleNamespace, model: Any) -> torch.Tensor:
    latents, references, text, sigma = make_inputs()
    with torch.inference_mode():
        comfyui.model_management.load_models_gpu([model])
        out = model.model.diffusion_model(
            *(latents[:, :, None], sigma, text),
            ref_latents=[reference[:, :, None] for reference in references],
        )
    return out[:, :, 0].clone()


@pytest.mark.parametrize("name", SETTINGS)
def test_comfyui_computes_the_trained_result_from_the_file(
    name, comfyui, load_base, demo_models, apply_native, tmp_path
):
    source = demo_models.dit["2511_fp32"]
    run = run_training(tmp_path, source, SETTINGS[name], "fp32")
    base = load_base("2511_fp32")
    trained = run_ours(run.model)
    found = run_comfyui(comfyui, apply_native(base, run.files["raw"], 1.0))
    assert worst(found, trained) < ROUNDING
    assert worst(run_comfyui(comfyui, base), trained) > 100 * ROUNDING

    untouched = load_transformer(source, "fp32", compute_dtype=torch.float32)
    with applied(untouched.transformer, read_adapter(run.files["EMA"])):
        averaged = run_ours(untouched)
    found = run_comfyui(comfyui, apply_native(base, run.files["EMA"], 1.0))
    assert worst(found, averaged) < ROUNDING
    assert worst(averaged, trained) > 100 * ROUNDING


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_stock_loader_and_ours_give_the_same_image(
    dtype, base, sample, demo_models, apply_native, apply_ours, tmp_path
):
    run = run_training(tmp_path, demo_models.dit["2509_fp32"], SETTINGS["rsLoRA"], dtype)
    pictures = {}
    for kind, path in run.files.items():
        native = sample(apply_native(base, path, 0.8))
        assert worst(sample(apply_ours(base, path, 0.8, "side path")), native) < ROUNDING
        assert torch.equal(sample(apply_ours(base, path, 0.8, "merge")), native)
        pictures[kind] = native
    assert worst(pictures["raw"], pictures["EMA"]) > 100 * ROUNDING
    assert worst(pictures["raw"], sample(base)) > 100 * ROUNDING


def test_every_module_has_its_alpha_and_the_header_describes_the_file(demo_models, tmp_path):
    lora = SETTINGS["ranks differ"]
    run = run_training(tmp_path, demo_models.dit["2511_bf16"], lora, "bf16")
    for kind, path in run.files.items():
        with safe_open(path, "pt") as file:
            metadata, keys = file.metadata(), set(file.keys())
            alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha")}
        assert alphas == {2.0}
        assert len(keys) == 3 * len(run.injection.layers)
        assert metadata["modelspec.architecture"] == "Qwen-Image-Edit-2511/lora"
        assert metadata["modelspec.title"] == ("trained" if kind == "raw" else "trained (EMA)")
        assert metadata["ss_base_model_version"].startswith("qwen_image")
        assert (metadata["ss_steps"], metadata["ss_network_alpha"]) == ("3", "2")
        assert '"learning_rate": 0.02' in metadata["qwen_edit_lora.config"]
        assert str(tmp_path) not in str(metadata)


@pytest.mark.parametrize("name", ["rsLoRA", "PiSSA"])
def test_diffusers_loads_the_file_to_the_same_weights(name, demo_models, tmp_path):
    pytest.importorskip("peft")
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
    from qwen_edit_lora.lora_core.training.model.architecture import read_architecture
    from safetensors.torch import load_file

    source = demo_models.dit["2509_fp32"]
    run = run_training(tmp_path, source, SETTINGS[name], "fp32")
    state = {key: tensor for key, tensor in load_file(source).items() if tensor.numel()}
    shapes = {key: tensor.shape for key, tensor in state.items()}
    model = read_architecture(shapes, source.name).build_empty().to_empty(device="cpu")
    model.load_state_dict(state)
    loaded, metadata = QwenImageLoraLoaderMixin.lora_state_dict(
        str(run.files["raw"]), return_lora_metadata=True
    )
    QwenImageLoraLoaderMixin.load_lora_into_transformer(loaded, model, metadata=metadata)
    model.fuse_lora()
    model.unload_lora()
    assert_same_change(read_adapter(run.files["raw"]), state, model)


@pytest.mark.parametrize("name", ["rsLoRA", "ranks differ"])
def test_peft_loads_the_converted_file_to_the_same_weights(name, demo_models, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    source = demo_models.dit["2509_fp32"]
    run = run_training(tmp_path, source, SETTINGS[name], "fp32")
    adapter = read_adapter(run.files["raw"])
    folder = write_adapter(adapter, tmp_path / "peft", "peft").parent
    run.injection.eject()
    model = peft.PeftModel.from_pretrained(run.model.transformer, folder)
    merged = model.merge_and_unload()
    assert_same_change(adapter, load_file(source), merged)


def assert_same_change(adapter, state: dict[str, torch.Tensor], merged: torch.nn.Module) -> None:
    for path, weights in adapter.modules.items():
        change = merged.get_submodule(path).weight.detach() - state[f"{path}.weight"]
        delta = compute_delta(weights)
        assert delta.norm() > 0
        torch.testing.assert_close(change, delta, atol=1e-6, rtol=1e-4)

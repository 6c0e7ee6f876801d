"""The nodes in a running ComfyUI server, used through its HTTP API as by a script."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base.prompts import load_tiny_base, node
from demo_base.server import PromptError
from qwen_edit_lora.lora_core import read_adapter
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

LORA = "strong.safetensors"


def build_graph(model: list, **more: Any) -> dict[str, Any]:
    """A small image from `model`: 64 x 64, two steps, no reference."""
    return {
        **load_tiny_base(),
        "prompt": node("TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt="red"),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "KSampler",
            model=model,
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "picture": node("SaveImage", images=["decoded", 0], filename_prefix="test"),
        **more,
    }


def apply_graph(lora_name: str = LORA, **options: Any) -> dict[str, Any]:
    options = {"strength": 1.0, "mode": "auto", **options}
    return build_graph(
        ["apply", 0],
        load=node("QwenEditLoraLoad", lora_name=lora_name),
        apply=node("QwenEditLoraApply", model=["unet", 0], adapter=["load", 0], **options),
    )


def native_graph(strength: float) -> dict[str, Any]:
    return build_graph(
        ["apply", 0],
        apply=node(
            "LoraLoaderModelOnly", model=["unet", 0], lora_name=LORA, strength_model=strength
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def strong_lora(demo_models: Any) -> None:
    """A LoRA whose effect is visible in a 64 x 64 image without a reference."""
    from demo_base.adapters import make_adapter

    path = demo_models.root / "loras" / LORA
    make_adapter(path, demo_models.dit["2509_fp32"], rank=8, delta_std=0.3)


@pytest.fixture
def loras(demo_models: Any) -> Iterator[Path]:
    """The server's loras folder; files a test adds are removed after it."""
    folder = demo_models.root / "loras"
    before = set(folder.rglob("*"))
    yield folder
    for path in set(folder.rglob("*")) - before:
        path.unlink()


@pytest.fixture
def run(server: Any) -> Callable[[dict[str, Any]], tuple[bytes, dict[str, str]]]:
    """Runs a graph; returns its image as PNG bytes, and the reports by node."""

    def run(graph: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        entry = server.run_prompt(graph)
        reports = {
            name: output["qwen_edit_lora_report"][0]
            for name, output in entry["outputs"].items()
            if "qwen_edit_lora_report" in output
        }
        return server.images(entry)[0], reports

    return run


def read_pixels(picture: bytes) -> torch.Tensor:
    import io

    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(picture)), dtype=np.float32).copy())


def test_the_reports_say_what_was_matched_and_how_it_was_applied(run):
    _, reports = run(apply_graph(strength=0.8))
    assert f"{LORA}: matched 24 modules, 48 of 48 keys" in reports["load"]
    assert "targets full" in reports["load"]
    assert "24 of 24 modules matched, strength 0.8" in reports["apply"]
    assert "side path: 24 modules, no weight is touched (auto" in reports["apply"]


def test_the_image_equals_the_native_loaders(run):
    ours = read_pixels(run(apply_graph(strength=0.7))[0])
    native = read_pixels(run(native_graph(0.7))[0])
    base = read_pixels(run(build_graph(["unet", 0]))[0])
    assert (ours - native).abs().max() <= 1  # one step of 8-bit rounding
    assert (ours - base).abs().max() > 10
    assert torch.equal(read_pixels(run(apply_graph(strength=0.0))[0]), base)


def test_files_and_adapters_of_a_stack_add_up(run, loras):
    second = loras / "second.safetensors"
    tensors = {k: v.flip(0) if "lora_B" in k else v for k, v in load_file(loras / LORA).items()}
    save_file(tensors, second)
    stack = node(
        "QwenEditLoraStack",
        **{
            "model": ["unet", 0],
            "mode": "auto",
            "files": "1 file",
            "files.lora_1": LORA,
            "files.strength_1": 0.5,
            "strengths": "-0.4",
            "adapters.adapter_0": ["load", 0],
        },
    )
    load = node("QwenEditLoraLoad", lora_name="second.safetensors")
    stacked, reports = run(build_graph(["stack", 0], stack=stack, load=load))
    chain = build_graph(
        ["b", 0],
        a=node("LoraLoaderModelOnly", model=["unet", 0], lora_name=LORA, strength_model=0.5),
        b=node(
            "LoraLoaderModelOnly",
            model=["a", 0],
            lora_name="second.safetensors",
            strength_model=-0.4,
        ),
    )
    assert (read_pixels(stacked) - read_pixels(run(chain)[0])).abs().max() <= 1
    assert reports["stack"].count("side path: 24 modules") == 2


def test_a_row_of_a_stack_without_a_file_is_left_out(run):
    files = ROWS_AS_THEY_START | {"files.lora_2": LORA}
    stack = node("QwenEditLoraStack", model=["unet", 0], mode="auto", strengths="1", **files)
    stacked, reports = run(build_graph(["stack", 0], stack=stack))
    assert torch.equal(read_pixels(stacked), read_pixels(run(apply_graph())[0]))
    assert reports["stack"].count("modules matched") == 1


def test_a_row_of_a_stack_that_is_off_is_not_read(run, loras):
    (loras / "damaged.safetensors").write_bytes(b"")
    try:
        files = ROWS_AS_THEY_START | {"files.lora_1": "damaged.safetensors", "files.lora_2": LORA}
        stack = node("QwenEditLoraStack", model=["unet", 0], mode="auto", strengths="1", **files)
        graph = build_graph(["stack", 0], stack=stack)
        with pytest.raises(PromptError, match=r"damaged\.safetensors is empty"):
            run(graph)
        stack["inputs"]["switched_off"] = "1, 7"  # 7: of a time with more rows
        stacked, reports = run(graph)
    finally:
        (loras / "damaged.safetensors").unlink()
    assert torch.equal(read_pixels(stacked), read_pixels(run(apply_graph())[0]))
    assert reports["stack"].count("modules matched") == 1
    stack["inputs"] |= {"files.lora_1": LORA, "switched_off": "1, 2"}
    with pytest.raises(PromptError, match="the stack is empty; choose a file in a row that is on"):
        run(graph)


def test_a_new_stack_starts_with_no_file_in_its_rows(server):
    schema = server.get("/object_info/QwenEditLoraStack")["QwenEditLoraStack"]["input"]
    first = schema["optional"]["files"][1]["options"][0]
    assert first["key"] == "2 files"
    assert first["inputs"]["required"]["lora_1"][1]["options"][0] == "none"


def test_a_script_needs_only_the_fixed_inputs(run, server):
    apply = node("QwenEditLoraApply", model=["unet", 0], adapter=["load", 0], strength=0.7)
    load = node("QwenEditLoraLoad", lora_name=LORA)
    short, _ = run(build_graph(["apply", 0], load=load, apply=apply))
    assert torch.equal(read_pixels(short), read_pixels(run(apply_graph(strength=0.7))[0]))
    stack = node("QwenEditLoraStack", **{"model": ["unet", 0], "adapters.adapter_0": ["load", 0]})
    stacked, _ = run(build_graph(["stack", 0], load=load, stack=stack))
    assert torch.equal(read_pixels(stacked), read_pixels(run(apply_graph())[0]))
    entry = server.run_prompt({"load": load, "save": node("QwenEditLoraSave", adapter=["load", 0])})
    assert "Wrote loras/edit_lora_" in entry["outputs"]["save"]["qwen_edit_lora_report"][0]


ROWS_AS_THEY_START = {
    **{"files": "2 files", "files.lora_1": "none", "files.lora_2": "none"},
    **{"files.strength_1": 1.0, "files.strength_2": 1.0},
}


@pytest.mark.parametrize("files", [{"files": "0 files"}, ROWS_AS_THEY_START], ids=["0", "none"])
def test_an_empty_stack_is_reported(run, files):
    stack = node("QwenEditLoraStack", model=["unet", 0], mode="auto", strengths="1", **files)
    with pytest.raises(PromptError, match="the stack is empty; choose a file"):
        run(build_graph(["stack", 0], stack=stack))


@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
def test_a_saved_file_gives_the_same_image_in_the_native_loader(
    key_format, server, run, loras, base_directory
):
    save = node(
        "QwenEditLoraSave",
        adapter=["load", 0],
        filename_prefix=f"loras/saved_{key_format}",
        key_format=key_format,
    )
    load = node("QwenEditLoraLoad", lora_name=LORA)
    entry = server.run_prompt({"load": load, "save": save})
    report = entry["outputs"]["save"]["qwen_edit_lora_report"][0]
    assert f"Wrote loras/saved_{key_format}_00001_.safetensors: 24 modules" in report
    written = base_directory / "output" / "loras" / f"saved_{key_format}_00001_.safetensors"
    shutil.copy(written, loras / "copy.safetensors")
    graph = native_graph(0.7)
    graph["apply"]["inputs"]["lora_name"] = "copy.safetensors"
    assert torch.equal(read_pixels(run(graph)[0]), read_pixels(run(native_graph(0.7))[0]))
    assert read_adapter(written).report.unmatched == ()


def test_a_native_lora_model_passes_through_load_and_apply(run):
    graph = build_graph(
        ["apply", 0],
        load=node("QwenEditLoraLoad", lora_name=LORA),
        again=node("QwenEditLoraLoad", lora_name="", lora_model=["load", 1]),
        apply=node(
            "QwenEditLoraApply", model=["unet", 0], adapter=["load", 1], strength=0.7, mode="auto"
        ),
        native=node(
            "LoraModelLoader",
            model=["apply", 0],
            lora=["again", 1],
            strength_model=0.0,
            bypass=False,
        ),
    )
    assert (read_pixels(run(graph)[0]) - read_pixels(run(native_graph(0.7))[0])).abs().max() <= 1


def test_a_replaced_file_is_read_again_without_a_restart(run, loras):
    shutil.copy(loras / LORA, loras / "changing.safetensors")
    first, _ = run(apply_graph("changing.safetensors"))
    weaker = {k: v * 0.1 if "lora_B" in k else v for k, v in load_file(loras / LORA).items()}
    save_file(weaker, loras / "new.safetensors")
    (loras / "new.safetensors").replace(loras / "changing.safetensors")
    second, _ = run(apply_graph("changing.safetensors"))
    assert (read_pixels(first) - read_pixels(second)).abs().max() > 10


def sdxl(path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(4, 8), f"{stem}.lora_up.weight": torch.ones(8, 4)},
        path,
    )


def rewrite(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Writes the demo LoRA, modified by `change`, to a path."""

    def write(path: Path) -> None:
        tensors = load_file(path.with_name(LORA))
        save_file(change(tensors), path)

    return write


def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = next(key for key in tensors if "lora_B" in key)
    return {**tensors, key: torch.full_like(tensors[key], float("nan"))}


def drop_a_partner(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t for i, (key, t) in enumerate(sorted(tensors.items())) if i != 1}


def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([t, t], dim=1 if "lora_A" in k else 0) for k, t in tensors.items()}


def cut_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = next(key for key in tensors if "lora_A" in key)
    return {**tensors, key: tensors[key][:3].contiguous()}


BAD_FILES = {
    "truncated": (
        lambda path: path.write_bytes(path.with_name(LORA).read_bytes()[:5000]),
        "is damaged|ends early",
    ),
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "lying header": (
        lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
        "ends early",
    ),
    "pickle": (lambda path: torch.save({"a": torch.ones(1)}, path), "is a PyTorch pickle"),
    "sdxl": (sdxl, "matches 0 modules .*SDXL UNet"),
    "nan": (rewrite(poison), "holds NaN or Inf in transformer_blocks.*use an earlier checkpoint"),
    "no partner": (rewrite(drop_a_partner), "is incomplete: .* without the partner keys"),
    "wrong width": (rewrite(widen), r"does not fit this MODEL in 24 of 24 modules: .*\(160, 160\)"),
    "wrong rank": (rewrite(cut_rank), "do not fit; expected .* with one rank"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_fails_its_node_with_one_sentence(name, server, run, loras):
    write, sentence = BAD_FILES[name]
    write(loras / "bad.safetensors")
    before = run(build_graph(["unet", 0]))[0]
    with pytest.raises(PromptError, match=sentence):
        run(apply_graph("bad.safetensors"))
    graph = build_graph(["unet", 0])
    graph["sampler"]["inputs"]["seed"] = 1
    assert run(graph)[0] == before


@pytest.mark.parametrize(
    ("lora_name", "sentence"),
    [
        ("../../../etc/passwd.safetensors", "is not a name inside the loras folders"),
        ("/etc/passwd.safetensors", "is not a name inside the loras folders"),
        ("..\\..\\secret.safetensors", "is not a name inside the loras folders"),
        ("gone.safetensors", "is not in the loras folders"),
        ("x" * 300 + ".safetensors", "is not in the loras folders|File name too long"),
        ("", "is not a name inside the loras folders"),
    ],
)
def test_a_bad_name_is_refused_before_anything_runs(lora_name, sentence, run):
    with pytest.raises(PromptError, match=sentence):
        run(apply_graph(lora_name))


@pytest.mark.parametrize("name", ["Ä ä-画像-✨.safetensors", "n" * 200 + ".safetensors"])
def test_unusual_names_work(name, run, loras):
    shutil.copy(loras / LORA, loras / name)
    _, reports = run(apply_graph(name))
    assert "matched 24 modules" in reports["load"]


def test_a_partial_match_warns_and_applies_the_rest(run, loras):
    extra = {
        key.replace("transformer_blocks.0.", "transformer_blocks.7."): tensor
        for key, tensor in load_file(loras / LORA).items()
        if "transformer_blocks.0." in key
    }
    save_file({**load_file(loras / LORA), **extra}, loras / "partial.safetensors")
    _, reports = run(apply_graph("partial.safetensors"))
    assert "Warning: 12 of 36 modules are not in this MODEL" in reports["apply"]
    assert "side path: 24 modules" in reports["apply"]


def test_a_lora_for_another_variant_warns(run, loras):
    tensors = load_file(loras / LORA)
    metadata = {"modelspec.architecture": "Qwen-Image-Edit-2511/lora"}
    save_file(tensors, loras / "for2511.safetensors", metadata)
    _, reports = run(apply_graph("for2511.safetensors"))
    assert "made for 2511" in reports["load"]
    assert "Warning: for2511.safetensors says it was made for 2511" in reports["apply"]


def test_blocks_that_select_nothing_are_an_error(run):
    with pytest.raises(PromptError, match="selects none of the 24 modules"):
        run(apply_graph(blocks="40-50"))
    with pytest.raises(PromptError, match="is not a block range; expected numbers and ranges"):
        run(apply_graph(blocks="first"))


def test_side_path_mode_refuses_what_it_cannot_serve_and_auto_merges_it(run, loras):
    tensors = load_file(loras / LORA)
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    tensors[f"{stem}.dora_scale"] = torch.ones(len(tensors[f"{stem}.lora_B.weight"]), 1)
    save_file(tensors, loras / "dora.safetensors")
    with pytest.raises(PromptError, match=r"cannot serve 1 module .*DoRA depends on the base"):
        run(apply_graph("dora.safetensors", mode="side path"))
    _, reports = run(apply_graph("dora.safetensors"))
    assert "merged into the weights: 1 module (DoRA depends on the base" in reports["apply"]
    assert "side path: 23 modules" in reports["apply"]

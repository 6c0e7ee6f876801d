"""Overhead of an 8-point sweep beyond sampling, compared with eight runs of ComfyUI's LoraLoader.

usage: .venv/bin/python benchmarks/sweep.py [--blocks 1] [--rank 32] [--points 8] [--rounds 3]

One process and ComfyUI's own executor: Qwen-Image's DiT at full layer width (3072) with `--blocks`
blocks and random weights, 1 step on a 64 x 64 image. The model call itself is trivial: its blocks
are skipped, everything around them is real (loading, patching, wrappers, swapped forwards), so that
a difference is overhead and not the noise of long products. `--real-calls` runs the blocks too.
The side path's overhead inside a call is measured by apply.py. Three graphs are run alternately per
storage (bf16, plain fp8):

    base    the same number of KSamplers without a LoRA, on other seeds
    ours    Sweep Qwen Edit LoRA over the strengths
    native  LoraLoaderModelOnly and KSampler per strength

Overhead is a graph's time minus that of `base`. Both ours and native have the LoRA file in memory
from an untimed first run. Medians over the rounds, each with its own strengths.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from apply import ROOT, build_adapter, import_extension, import_host

LORA = "benchmark_sweep.safetensors"
SAMPLING = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=3072, help="a multiple of 128")
    parser.add_argument("--storage", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--real-calls", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def list_shapes(num_blocks: int, width: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the DiT, derived from the demo base at another width."""
    path = ROOT / "tests" / "demo_base" / "dit.py"
    spec = importlib.util.spec_from_file_location("benchmark_dit", path)
    dit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dit)
    dit.NUM_BLOCKS, dit.NUM_HEADS, dit.HEAD_WIDTH = num_blocks, width // 128, 128
    dit.TEXT_WIDTH = 3584
    return dict(dit.list_shapes())


def build_model(storage: str, options: argparse.Namespace) -> Any:
    import comfy.sd
    import torch

    state_dict = {
        key: (torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape)).bfloat16()
        for key, shape in list_shapes(options.blocks, options.width).items()
    }
    dtype = getattr(torch, DTYPES[storage])
    model = comfy.sd.load_diffusion_model_state_dict(state_dict, {"dtype": dtype})
    if not options.real_calls:
        # Inside the DIFFUSION_MODEL wrappers, where the side path runs.
        model.model.diffusion_model._forward = lambda x, *args, **kwargs: torch.zeros_like(x)
    return model


def register_nodes(models: dict[str, Any]) -> None:
    """Registers stock nodes, our nodes, and three helper nodes: a MODEL, a prompt, an end."""
    import torch
    from comfy_extras import nodes_custom_sampler  # noqa: F401 - loaded by a regular start
    from qwen_edit_lora.nodes import QwenEditLoraExtension

    import nodes

    class Model:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", ""

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"storage": ("STRING", {})}}

        def run(self, storage: str) -> tuple:
            return (models[storage],)

    class Prompt:
        RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", ""

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {}}

        def run(self) -> tuple:
            return ([[torch.zeros(1, 12, 3584), {}]],)

    class End:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "", True

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"latent": ("LATENT",)}}

        def run(self, latent: dict) -> dict:
            assert latent["samples"].shape[1] == 16
            return {}

    async def register() -> None:
        for node in await QwenEditLoraExtension().get_node_list():
            node.GET_SCHEMA()
            nodes.NODE_CLASS_MAPPINGS[node.SCHEMA.node_id] = node

    asyncio.run(register())
    nodes.NODE_CLASS_MAPPINGS |= {"BenchModel": Model, "BenchPrompt": Prompt, "BenchEnd": End}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def start_graph(storage: str) -> dict[str, Any]:
    return {
        "unet": node("BenchModel", storage=storage),
        "prompt": node("BenchPrompt"),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }


LINKS = {"positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["latent", 0]}


def sampler_chains(storage: str, models: list[list], seeds: list[int]) -> dict[str, Any]:
    graph = start_graph(storage)
    for index, (model, seed) in enumerate(zip(models, seeds, strict=True)):
        graph[f"sample{index}"] = node("KSampler", model=model, seed=seed, **SAMPLING, **LINKS)
        graph[f"end{index}"] = node("BenchEnd", latent=[f"sample{index}", 0])
    return graph


def base_graph(storage: str, strengths: list[float], seed: int) -> dict[str, Any]:
    seeds = [1000 * seed + index for index in range(len(strengths))]
    return sampler_chains(storage, [["unet", 0]] * len(strengths), seeds)


def native_graph(storage: str, strengths: list[float], seed: int) -> dict[str, Any]:
    models = [[f"lora{index}", 0] for index in range(len(strengths))]
    graph = sampler_chains(storage, models, [seed] * len(strengths))
    for index, strength in enumerate(strengths):
        inputs = {"model": ["unet", 0], "lora_name": LORA, "strength_model": strength}
        graph[f"lora{index}"] = node("LoraLoaderModelOnly", **inputs)
    return graph


def our_graph(storage: str, strengths: list[float], seed: int) -> dict[str, Any]:
    sweep = node(
        "QwenEditLoraSweep",
        model=["unet", 0],
        adapter=["load", 0],
        strengths=", ".join(map(str, strengths)),
        seed=seed,
        **SAMPLING,
        **LINKS,
    )
    load = node("QwenEditLoraLoad", lora_name=LORA)
    end = node("BenchEnd", latent=["sweep", 1])
    return {**start_graph(storage), "load": load, "sweep": sweep, "end": end}


def measure(executor: Any, storage: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    def take(graph: dict[str, Any]) -> float:
        ends = [name for name in graph if name.startswith("end")]
        start = time.perf_counter()
        executor.execute(graph, "benchmark", {}, ends)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        assert executor.success, executor.status_messages[-1]
        return time.perf_counter() - start

    graphs = {"base": base_graph, "ours": our_graph, "native": native_graph}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_ in range(options.rounds):
        # Both include 0, where the native loader does nothing either.
        strengths = [0.0, *(index / 4 + round_ / 100 for index in range(1, options.points))]
        for name, build in graphs.items():
            # Untimed: restores the weights after native patches, and loads the LoRA into memory.
            take(base_graph(storage, [0.0], 500 + 3 * round_ + len(name)))
            if name != "base" and round_ == 0:
                take(build(storage, [0.0, 0.123 + round_ / 100], 900 + round_))
                take(base_graph(storage, [0.0], 700 + 3 * round_ + len(name)))
            times[name].append(take(build(storage, strengths, round_ + 1)))
    middle = {name: statistics.median(values) for name, values in times.items()}
    pairs = zip(times["ours"], times["native"], times["base"], strict=True)
    overheads = [(ours - base, native - base) for ours, native, base in pairs]
    ours, native = (statistics.median(values) for values in zip(*overheads, strict=True))
    return {
        "storage": storage,
        "points": options.points,
        **{f"{name}_s": round(value, 3) for name, value in middle.items()},
        "overhead_ours_s": round(ours, 4),
        "overhead_native_s": round(native, 3),
        # An overhead below the noise of the base's own times, 1 ms, has no meaningful ratio.
        "native / ours": round(native / max(ours, 1e-3), 1),
        "base_spread_s": round(max(times["base"]) - min(times["base"]), 4),
    }


def main() -> None:
    options = parse_options()
    sys.argv = sys.argv[:1]
    import_host(options.device)
    import_extension()
    import execution
    import folder_paths
    import server
    import torch
    from qwen_edit_lora.lora_core import write_adapter

    logging.getLogger().setLevel(logging.ERROR)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if options.width == 3072:
            adapter = build_adapter(options.blocks, options.rank)
        else:
            adapter = build_small_adapter(options)
        write_adapter(adapter, Path(folder) / LORA)
        folder_paths.add_model_folder_path("loras", folder)
        loop = asyncio.new_event_loop()
        cache_args = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        for storage in options.storage:
            models = {storage: build_model(storage, options)}
            register_nodes(models)
            prompt_server = server.PromptServer(loop)
            executor = execution.PromptExecutor(
                prompt_server, execution.CacheType.CLASSIC, cache_args
            )
            print(json.dumps(measure(executor, storage, options)), flush=True)


def build_small_adapter(options: argparse.Namespace) -> Any:
    """For a quick test at another width."""
    import torch
    from qwen_edit_lora.lora_core import Adapter, LoraWeights
    from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

    shapes = list_shapes(options.blocks, options.width)
    modules = {}
    for block in range(options.blocks):
        for name in QWEN_IMAGE.block_linears:
            path = f"transformer_blocks.{block}.{name}"
            out, in_ = shapes[f"{path}.weight"]
            down, up = torch.randn(options.rank, in_), torch.randn(out, options.rank)
            modules[path] = LoraWeights(down.bfloat16() * 0.02, up.bfloat16() * 0.02)
    return Adapter(modules, name="benchmark")


if __name__ == "__main__":
    main()

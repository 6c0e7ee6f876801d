"""Cost of applying a LoRA beside ComfyUI's own LoraLoader: per strength change and model call.

usage: .venv/bin/python benchmarks/apply.py [--blocks 1] [--rank 32] [--tokens 256] [--rounds 3]
       .venv/bin/python benchmarks/apply.py --count [--rank 16]

`--count` computes no products: it counts the memory traffic the side path would cause on a GPU, and
its cost in Python. Without it:

One process, full layer width (3072), the 14 Linears of a Qwen-Image block times `--blocks`, under
ComfyUI's own ModelPatcher and ops, per storage: bf16, plain fp8, scaled fp8. Pairs are measured
alternately; the medians of their ratios are reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--count", action="store_true", help="only the counts, which need no GPU")
    return parser.parse_args()


def import_package(name: str, folder: Path) -> None:
    """Imports by path, as ComfyUI imports extensions: our `nodes` must not shadow ComfyUI's."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def import_extension() -> None:
    """Makes `qwen_edit_lora` importable."""
    import_package("qwen_edit_lora", ROOT)


def import_host(device: str) -> None:
    comfyui = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui"))
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = device == "cpu"


def build_model(storage: str, num_blocks: int, device: str) -> Any:
    """Blocks of bare Linears with Qwen-Image's names and shapes, run one after the other."""
    import comfy.model_patcher
    import comfy.ops
    import torch
    from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

    dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}.get(storage)
    ops = {"bf16": comfy.ops.disable_weight_init, "fp8": comfy.ops.manual_cast}.get(storage)
    ops = ops or comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.bfloat16)
    root, state_dict = torch.nn.Module(), {}
    for block in range(num_blocks):
        for name in QWEN_IMAGE.block_linears:
            out, in_ = QWEN_IMAGE.compute_shape(name)
            path = f"transformer_blocks.{block}.{name}"
            put(root, path, ops.Linear(in_, out, bias=False, device="cpu", dtype=dtype))
            weight = torch.randn(out, in_) * 0.02
            if dtype is not None:
                state_dict[f"{path}.weight"] = weight.to(dtype)
                continue
            scale = weight.abs().max() / 448
            state_dict[f"{path}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
            state_dict[f"{path}.weight_scale"] = scale
            config = json.dumps({"format": "float8_e4m3fn"}).encode()
            state_dict[f"{path}.comfy_quant"] = torch.tensor(list(config), dtype=torch.uint8)
    root.load_state_dict(state_dict)

    class Model(torch.nn.Module):
        manual_cast_dtype = torch.bfloat16

        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = root

        def get_dtype(self) -> torch.dtype:
            return dtype or torch.bfloat16

    where = torch.device(device)
    return comfy.model_patcher.CoreModelPatcher(Model(), where, torch.device("cpu"))


def put(root: Any, path: str, module: Any) -> None:
    import torch

    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            setattr(root, parent, torch.nn.Module())
        root = getattr(root, parent)
    setattr(root, name, module)


def build_adapter(num_blocks: int, rank: int) -> Any:
    import torch
    from qwen_edit_lora.lora_core import Adapter, LoraWeights
    from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

    modules = {}
    for block in range(num_blocks):
        for name in QWEN_IMAGE.block_linears:
            out, in_ = QWEN_IMAGE.compute_shape(name)
            modules[f"transformer_blocks.{block}.{name}"] = LoraWeights(
                (torch.randn(rank, in_) * 0.02).bfloat16(),
                (torch.randn(out, rank) * 0.02).bfloat16(),
            )
    return Adapter(modules, name="benchmark")


def run_model(model: Any, inputs: dict[int, Any]) -> None:
    """Runs every Linear once, through the wrappers of a model call."""
    import comfy.patcher_extension as extension
    import torch

    linears = [m for m in model.model.diffusion_model.modules() if hasattr(m, "in_features")]

    def forward(x: Any, transformer_options: dict) -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    wrappers = model.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL)
    executor = extension.WrapperExecutor.new_class_executor(
        forward, model.model.diffusion_model, wrappers
    )
    executor.execute(None, transformer_options=model.model_options["transformer_options"])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def load(patched: Any) -> None:
    """Loads a MODEL as a sampler does before its first step."""
    import comfy.model_management as mm
    from qwen_edit_lora.nodes.patching import side_path

    side_path.prepare_side_path(
        lambda model: mm.load_models_gpu([model, *model.get_nested_additional_models()]), patched
    )


def measure(storage: str, options: argparse.Namespace) -> dict[str, Any]:
    import comfy.lora
    import torch
    from qwen_edit_lora.lora_core import build_state_dict
    from qwen_edit_lora.lora_core.adapter.strengths import Strengths
    from qwen_edit_lora.nodes.patching import application

    model = build_model(storage, options.blocks, options.device)
    adapter = build_adapter(options.blocks, options.rank)
    keys = {f"diffusion_model.{path}": f"diffusion_model.{path}.weight" for path in adapter}
    inputs = {
        width: torch.randn(1, options.tokens, width, device=options.device).bfloat16()
        for width in (3072, 12288)
    }

    def change_ours(strength: float) -> Any:
        patched = application.apply_adapters(model, [(adapter, Strengths(strength))]).model
        load(patched)
        return patched

    state_dict = build_state_dict(adapter)

    def change_native(strength: float) -> Any:
        patched = model.clone()
        patched.add_patches(comfy.lora.load_lora(state_dict, keys, log_missing=False), strength)
        load(patched)
        return patched

    load(model)
    change_ours(1.0)  # builds the bank once
    pairs = {"node": [], "ours": [], "native": []}
    for round_ in range(options.rounds):
        strength = 0.5 + round_ / 100
        pairs["node"].append(
            take(lambda s=strength: application.apply_adapters(model, [(adapter, Strengths(s))]))
        )
        load(model)  # untimed: removes the native patches of the previous round
        change_ours(1.0)
        pairs["ours"].append(take(lambda s=strength: change_ours(s)))
        pairs["native"].append(take(lambda s=strength: change_native(s)))
    load(model)
    calls = {"base": [], "ours": []}
    patched = change_ours(0.7)
    for _ in range(options.rounds):
        calls["base"].append(take(lambda: run_model(model, inputs)))
        calls["ours"].append(take(lambda: run_model(patched, inputs)))
    middle = {name: statistics.median(times) for name, times in pairs.items()}
    ratios = [ours / base for ours, base in zip(calls["ours"], calls["base"], strict=True)]
    return {
        "storage": storage,
        "modules": len(adapter),
        "apply_ms": middle["node"] * 1e3,
        "strength_change_ms": middle["ours"] * 1e3,
        "native_strength_change_ms": middle["native"] * 1e3,
        "native / ours": middle["native"] / middle["ours"],
        "call_with_side_path / base_call": statistics.median(ratios),
    }


def measure_840_modules() -> dict[str, float]:
    """Time of Apply for a whole model's module list (60 blocks), and the overhead per call."""
    import comfy.model_patcher
    import torch
    from qwen_edit_lora.lora_core import Adapter, LoraWeights
    from qwen_edit_lora.lora_core.adapter.strengths import Strengths
    from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
    from qwen_edit_lora.nodes.patching import application, side_path

    root, modules = torch.nn.Module(), {}
    for block in range(60):
        for name in QWEN_IMAGE.block_linears:
            path = f"transformer_blocks.{block}.{name}"
            put(root, path, torch.nn.Linear(16, 16, bias=False))
            modules[path] = LoraWeights(torch.randn(4, 16), torch.randn(16, 4))
    model = torch.nn.Module()
    model.diffusion_model, model.get_dtype = root, lambda: torch.float32
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    adapter = Adapter(modules, name="840")
    apply = lambda s: application.apply_adapters(patcher, [(adapter, Strengths(s))]).model  # noqa: E731
    patched = apply(1.0)
    changes = [take(lambda s=s: apply(s / 100)) for s in range(1, 51)]
    path = side_path.get_side_path(patched)
    path.get_plan(root)

    def swap() -> None:
        with side_path.swapped_forwards(root, path):
            pass

    swaps = [take(swap) for _ in range(50)]
    others = [side_path.get_side_path(apply(s)) for s in (0.3, 0.4, 0.5)]
    plans = [take(lambda p=other: p.get_plan(root)) for other in others]
    return {
        "modules": len(modules),
        "apply_ms": statistics.median(changes) * 1e3,
        "first_call_plan_ms": statistics.median(plans) * 1e3,
        "swap_and_restore_per_call_ms": statistics.median(swaps) * 1e3,
    }


#: Tokens of a 1024 x 1024 image, one reference of that size and 256 text tokens.
NUM_TOKENS = 2 * 4096 + 256


def get_host() -> Any:
    """The ComfyUI modules whose functions the stand-in for paged memory replaces."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops

    return SimpleNamespace(
        model_management=comfy.model_management,
        model_patcher=comfy.model_patcher,
        ops=comfy.ops,
    )


def run_sites(bank: Any, shapes: dict[str, Any], stream: Any, shares: bool) -> None:
    """Every site of a block once; the attention's read the stream itself."""
    for path, (out, in_) in shapes.items():
        x = stream
        if not path.endswith(("to_q", "to_k", "to_v")):
            x = stream.new_empty(1, NUM_TOKENS, in_)
        bank.sites[path].add(stream.new_empty(1, NUM_TOKENS, out), x, (0.7,))
        if not shares:
            bank.forget_inputs()


def count_traffic(placement: str, rank: int, shares: bool) -> dict[str, Any]:
    """The side path's memory traffic per block, in tensors of NUM_TOKENS x 3072.

    The image stream's modules represent both streams, which together have NUM_TOKENS tokens.

    Args:
        placement: "resident" or "paged" (dynamic VRAM).
        shares: whether k and v reuse q's down-products.
    """
    import pytest
    import torch
    from demo_base.fake_gpu import PagedMemory, Traffic
    from qwen_edit_lora.lora_core import Adapter, LoraWeights
    from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
    from qwen_edit_lora.nodes.patching.bank import Bank
    from qwen_edit_lora.nodes.patching.layouts import PLAIN
    from torch._subclasses.fake_tensor import FakeTensorMode

    cuda, dtype = torch.device("cuda:0"), torch.bfloat16
    shapes = {
        f"transformer_blocks.0.{name}": QWEN_IMAGE.compute_shape(name)
        for name in QWEN_IMAGE.presets["image-stream"]
    }
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        modules = {
            path: LoraWeights(torch.randn(rank, in_), torch.randn(out, rank))
            for path, (out, in_) in shapes.items()
        }
        adapter = Adapter(modules, name="counted")
        host = get_host()
        if placement == "paged":
            PagedMemory(has_room=True).install(patch, host)
            patch.setattr(host.ops.args, "disable_pinned_memory", True)
        bank = Bank([(adapter, frozenset(adapter), PLAIN)], dtype)
        if placement == "paged":
            host.model_patcher.CoreModelPatcher(bank, cuda, torch.device("cpu")).load(cuda)
        else:
            for pack in bank.packs:
                pack.weight = torch.nn.Parameter(pack.weight.to(cuda), requires_grad=False)
        stream = torch.empty(1, NUM_TOKENS, QWEN_IMAGE.width, dtype=dtype, device=cuda)

        run_sites(bank, shapes, stream, shares)
        with Traffic(NUM_TOKENS) as traffic:
            run_sites(bank, shapes, stream, shares)
    width = QWEN_IMAGE.width
    full, every = traffic.count(width), traffic.count(1) / width
    return {
        "weights": placement,
        "x of q, k and v is read": "once" if shares else "three times",
        "stream tensors per block": full,
        "and of the ranks' width": round(every - full, 3),
    }


def measure_python(placement: str, rounds: int) -> dict[str, Any]:
    """Microseconds of Python overhead per site, over 840 sites at 4 tokens; process time.

    Includes the products, which at width 128 cost some 4 us per site on one core.
    """
    import pytest
    import torch
    from demo_base.fake_gpu import PagedMemory, page_on_the_cpu
    from qwen_edit_lora.lora_core import Adapter, LoraWeights
    from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
    from qwen_edit_lora.nodes.patching.bank import Bank
    from qwen_edit_lora.nodes.patching.layouts import PLAIN

    cpu, width = torch.device("cpu"), 128
    paths = [
        f"transformer_blocks.{block}.{name}"
        for block in range(60)
        for name in QWEN_IMAGE.block_linears
    ]
    modules = {p: LoraWeights(torch.randn(32, width), torch.randn(width, 32)) for p in paths}
    adapter = Adapter(modules, name="840")
    host = get_host()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if placement == "paged":
            PagedMemory(has_room=True).install(patch, host)
            page_on_the_cpu(patch, host.ops)
            patch.setattr(host.ops.args, "disable_pinned_memory", True)
        bank = Bank([(adapter, frozenset(adapter), PLAIN)], torch.float32)
        host.model_patcher.CoreModelPatcher(bank, cpu, cpu).load(cpu)
        sites, y = [bank.sites[path] for path in paths], torch.zeros(1, 4, width)

        def run() -> None:
            for start in range(0, len(sites), len(QWEN_IMAGE.block_linears)):
                x = torch.randn(1, 4, width)
                for site in sites[start : start + len(QWEN_IMAGE.block_linears)]:
                    site.add(y, x, (0.7,))

        run()
        times = []
        for _ in range(rounds):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
    return {"weights": placement, "sites": len(sites), "us a site": min(times) / len(sites) * 1e6}


def main() -> None:
    options = parse_options()
    sys.argv = sys.argv[:1]
    import_host(options.device)
    import_extension()
    import torch

    torch.manual_seed(0)
    if options.count:
        import_package("demo_base", ROOT / "tests" / "demo_base")
        for placement in ("resident", "paged"):
            for shares in (True, False):
                print(json.dumps(count_traffic(placement, options.rank, shares)), flush=True)
            print(json.dumps(measure_python(placement, 30)), flush=True)
        return
    with torch.inference_mode():
        print(json.dumps(measure_840_modules()))
        for storage in ("bf16", "fp8", "fp8_scaled"):
            print(json.dumps(measure(storage, options)), flush=True)


if __name__ == "__main__":
    main()

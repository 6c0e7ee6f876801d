"""Part E: the side path under ComfyUI's dynamic VRAM, beside its older patcher and the merge.

Each patcher has its own process, as both replace parts of ComfyUI; they start in parallel and
measure one after the other.
"""

from __future__ import annotations

from typing import Any

from .children import start_piece
from .comfyui_models import (
    apply,
    call_model,
    count_swapped_forwards,
    load_model,
    measure_difference,
    start_comfyui,
)
from .settings import Context

STORAGES = ("bf16", "fp8", "fp8_scaled")
FEW_STORAGES = ("bf16", "fp8_scaled")  # of a dry run
LEGACY, DYNAMIC = "legacy", "dynamic"
#: Allowed relative difference of predictions between the ways to apply, in bf16.
CLOSE = "<= 0.02"
OVERHEAD = "<= 8"
GIB = 2**30


def run(context: Context) -> None:
    if context.is_dry:  # both patchers are the same one, in one process
        run_legacy(context)
        run_dynamic(context)
        compare(context)
        return
    pieces = [start_piece(context, f"E:run_{name}") for name in (LEGACY, DYNAMIC)]
    for name, piece in zip((LEGACY, DYNAMIC), pieces, strict=True):
        if status := piece.wait():
            context.record.must(f"{name} ends well", False, status)
    with context.record.item("comparing"):
        compare(context)


def list_storages(context: Context) -> tuple[str, ...]:
    return FEW_STORAGES if context.is_dry else STORAGES


def run_legacy(context: Context) -> None:
    measure_all(context, LEGACY)


def run_dynamic(context: Context) -> None:
    measure_all(context, DYNAMIC)


def measure_all(context: Context, name: str) -> None:
    """Calls for every storage and way; predictions are written to files for `compare`."""
    reason = start_comfyui(context.device, dynamic=name == DYNAMIC)
    import torch

    from .bases import build_adapter, draw_state_dict
    from .devices import exclusive, free

    if reason:
        context.record.skip("dynamic VRAM", reason)
    sizes, device, blocks = context.sizes, context.device, context.sizes.few_blocks
    with torch.inference_mode(), exclusive(context.folder / "card.lock"):
        low, high = sizes.ranks
        adapters = {
            f"r{low}": build_adapter(sizes, blocks, low, device, 1),
            f"r{high}": build_adapter(sizes, blocks, high, device, 2),
            "second": build_adapter(sizes, blocks, high, device, 3),
        }
        for storage in list_storages(context):
            with context.record.item(f"{name}, {storage}"):
                state_dict = draw_state_dict(sizes, blocks, storage, device)
                free(device)
                model = load_model(state_dict, storage)
                del state_dict
                predictions = Measured(context, name, storage, model, adapters).measure()
                path = context.folder / f"{name} {storage}.pt"
                torch.save(predictions, path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
            model = None
            unload()
            free(device)


def unload() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


class Measured:
    """One storage under one patcher."""

    def __init__(
        self, context: Context, name: str, storage: str, model: Any, adapters: dict[str, Any]
    ):
        self.context, self.model, self.adapters = context, model, adapters
        self.label = f"{name}, {storage}"
        #: The older patcher is only a reference; one storage represents the others.
        self.is_whole = name == DYNAMIC or storage == "bf16"
        self.low, self.high, second = adapters
        self.ways: dict[str, tuple[tuple[Any, float], ...]] = {
            self.low: ((adapters[self.low], 0.7),),
            self.high: ((adapters[self.high], 0.7),),
            f"2 x {self.high}": ((adapters[self.high], 0.7), (adapters[second], -0.4)),
        }

    def measure(self) -> dict[str, list[Any]]:
        """Way -> predictions, with room; then what changes where half of the model's room is."""
        record, found = self.context.record, {}
        base = self.call("base", self.model)
        found["base"] = base.predictions
        for way, layers in self.ways.items():
            patched = apply(self.model, *layers)
            found[way] = self.call(way, patched, base.median_s).predictions
            self.measure_resident_share(f"{way}, room", patched)
        if self.is_whole:
            self.profile()
        again = self.call("base again", self.model)
        equal = measure_difference(again.predictions, base.predictions) == 0
        record.must(f"{self.label}, the base is bit-equal afterwards", equal)
        left = count_swapped_forwards(self.model)
        record.must(f"{self.label}, no forward is left behind", left == 0, left)
        if self.is_whole and not self.context.is_dry:
            self.measure_with_little_room()
        merged = apply(self.model, *self.ways[self.low], mode="merge")
        found["merge"] = self.call("merge", merged, base.median_s).predictions
        return found

    def call(self, way: str, model: Any, base_s: float | None = None) -> Any:
        context = self.context
        calls = call_model(model, context, context.sizes.side, context.sizes.calls)
        context.record.figure(f"{self.label}, {way}", calls.median_s * 1e3, "ms")
        if base_s is not None:
            percent = (calls.median_s / base_s - 1) * 100
            name = f"{self.label}, {way}, overhead"
            if way == self.low:
                context.record.goal(name, percent, "%", OVERHEAD)
            else:
                context.record.figure(name, percent, "%")
        return calls

    def measure_with_little_room(self) -> None:
        """The same with a filler that leaves room on the GPU for half of the model's weights."""
        import torch

        unload()
        free_bytes, _ = torch.cuda.mem_get_info()
        size = self.model.model_size()
        leave = size // 2 + 3 * GIB  # besides weights: activations, and ComfyUI's own reserve
        if free_bytes <= leave:
            self.context.record.skip(f"{self.label}, little room", "the card is full already")
            return
        filler = torch.empty(free_bytes - leave, dtype=torch.uint8, device="cuda")
        base = self.call("base, little room", self.model)
        for way in (self.low, self.high):
            patched = apply(self.model, *self.ways[way])
            self.call(f"{way}, little room", patched, base.median_s)
            share = self.measure_resident_share(f"{way}, little room", patched)
            if share is not None:
                name = f"{self.label}, {way}, little room, bank on the card"
                self.context.record.goal(name, share, "", ">= 0.99")
        del filler
        torch.cuda.empty_cache()

    def measure_resident_share(self, way: str, patched: Any) -> float | None:
        """Share of the LoRAs' pages that are on the GPU after a call; None without pages."""
        from qwen_edit_lora.nodes.patching import side_path

        try:
            bank = side_path.get_side_path(patched).get_bank().patcher.model
            pages = [v.get_residency() for v in bank.dynamic_vbars.values() if v is not None]
        except AttributeError:
            return None
        flags = [flag & 1 for some in pages for flag in some]
        used = sum(flags)
        size = sum(p.numel() * p.dtype.itemsize for p in bank.parameters())
        needed = max(1, -(-size // (32 << 20)))  # of comfy-aimdo's pages, 32 MiB each
        share = min(1.0, used / needed)
        text = f"{used} of about {needed} pages of 32 MiB"
        self.context.record.figure(f"{self.label}, {way}, bank on the card", share, "", text)
        return share

    def profile(self) -> None:
        """Kernels and copies of one call."""
        from .traces import trace

        context = self.context
        for way in ("base", self.low):
            model = self.model if way == "base" else apply(self.model, *self.ways[way])
            call_model(model, context, context.sizes.side, 1, keep=False)
            found = trace(
                lambda m=model: call_model(m, context, context.sizes.side, 1, keep=False),
                context.device,
            )
            label = f"{self.label}, {way}, two calls"
            context.record.figure(f"{label}, kernels", found.num_kernels)
            context.record.figure(f"{label}, copies to the card", found.copies["HtoD"])


def compare(context: Context) -> None:
    """Compares the predictions of both patchers and the merge."""
    import torch

    record = context.record
    for storage in list_storages(context):
        files = {n: context.folder / f"{n} {storage}.pt" for n in (LEGACY, DYNAMIC)}
        if not all(file.is_file() for file in files.values()):
            record.skip(f"{storage}, compared", "a process did not come so far")
            continue
        legacy, dynamic = (torch.load(files[name]) for name in (LEGACY, DYNAMIC))
        for way in legacy:
            difference = measure_difference(dynamic[way], legacy[way])
            record.limit(f"{storage}, {way}, dynamic - legacy", difference, "", CLOSE)
        low = next(way for way in legacy if way != "base")
        difference = measure_difference(dynamic[low], legacy["merge"])
        effect = measure_difference(legacy["merge"], legacy["base"])
        text = f"the LoRA itself changes {effect:.3g}"
        # Merging rounds the sum to the storage's low precision, which the side path does not.
        name = f"{storage}, side path - merge"
        if storage == "bf16":
            record.limit(name, difference, "", CLOSE, text)
        else:
            record.figure(name, difference, "", text)

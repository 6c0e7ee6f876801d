"""How much of a forward pass is kept for the backward pass, where "auto" leaves the choice to us.

What is kept need not be recomputed: "false" keeps all of it, "selective" what is expensive, "true"
each block's input only. All three give bit-identical results, so the choice is only one of memory
and time. It is based on one block's forward pass on the largest sample, by counting the bytes that
stay alive after it; no allocator is queried, so a CPU's count is as exact as a GPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .edit_block import SELECTIVE
from .model_config import AUTO

if TYPE_CHECKING:
    from ..data.batches import Batch
    from .model_config import ModelConfig
    from .transformer import EditTransformer

#: From the one that computes least to the one that keeps least.
KINDS: tuple[bool | str, ...] = (False, SELECTIVE, True)
#: Of the free memory, what a run may take for what it keeps. A GPU's is also for sample images and
#: the gaps of an allocator, a CPU's for everything else that runs.
USABLE = {"cuda": 0.9, "cpu": 0.5}
#: Of a GPU on which ComfyUI computes too, leaving room for its prompts.
USABLE_SHARED = 0.6
#: Besides what is kept: one block's recomputed activations, and as much of gradients.
TRANSIENT_BLOCKS = 2
#: Of a trainable parameter in float32: gradient, two moments of Adam, average.
BYTES_PER_PARAMETER = 16


def is_free_to_choose(config: ModelConfig) -> bool:
    """Whether there is a choice: offloaded blocks are always recomputed."""
    return config.gradient_checkpointing == AUTO and not config.offload_blocks


def get_first_kind(config: ModelConfig) -> bool | str:
    """What a model starts with: the least kept, until `adapt_to_memory` knows better."""
    return True if config.gradient_checkpointing == AUTO else config.gradient_checkpointing


def adapt_to_memory(
    model: EditTransformer,
    batch: Batch,
    *,
    num_blocks: int,
    num_parameters: int,
    free_bytes: int | None,
    is_shared: bool = False,
) -> None:
    """Sets what `choose_kind` finds for the largest batch of a run, and allows lowering it.

    Args:
        is_shared: whether ComfyUI computes on the same GPU.
    """
    kind: bool | str = True
    if free_bytes is not None:
        kept = measure_saved_bytes(model, batch)
        share = choose_share(batch.x_0.device.type, is_shared)
        kind = choose_kind(kept, num_blocks, num_parameters, share * free_bytes)
    model.enable_gradient_checkpointing(kind)
    model.is_adaptive = True


def choose_share(device_type: str, is_shared: bool) -> float:
    """Of a device's free memory, what a run may fill with what it keeps."""
    if device_type == "cuda" and is_shared:
        return USABLE_SHARED
    return USABLE.get(device_type, USABLE["cpu"])


def choose_kind(
    saved_bytes: Mapping[bool | str, int],
    num_blocks: int,
    num_parameters: int,
    usable_bytes: float,
) -> bool | str:
    """The fastest kind that fits into memory.

    Args:
        saved_bytes: of one block, for False and "selective"; see `measure_saved_bytes`.
        num_parameters: trainable ones of the whole model.
        usable_bytes: of what is free on the device once the base and the LoRAs are loaded.
    """
    beside = TRANSIENT_BLOCKS * saved_bytes[False] + BYTES_PER_PARAMETER * num_parameters
    for kind in KINDS[:-1]:
        if num_blocks * saved_bytes[kind] + beside <= usable_bytes:
            return kind
    return True


def measure_saved_bytes(model: EditTransformer, batch: Batch) -> dict[bool | str, int]:
    """Bytes that one block keeps of this batch until its backward pass, by kind.

    Runs the model with only its first block; leaves the model unchanged.
    """
    return {kind: count_saved_bytes(model, batch, kind) for kind in KINDS[:-1]}


def count_saved_bytes(model: EditTransformer, batch: Batch, kind: bool | str) -> int:
    counts: list[int] = []
    counter = LiveBytes()

    def note(*_: Any) -> None:
        counts.append(counter.live)

    with only_first_block(model) as block, torch.enable_grad():
        before = model.gradient_checkpointing
        model.enable_gradient_checkpointing(kind)
        hooks = block.register_forward_pre_hook(note), block.register_forward_hook(note)
        try:
            with counter:
                model(batch.x_0, batch.references, batch.text, batch.text_mask, batch.u.float())
        finally:
            for hook in hooks:
                hook.remove()
            model.enable_gradient_checkpointing(before)
    return counts[1] - counts[0]


@contextmanager
def only_first_block(model: EditTransformer) -> Iterator[nn.Module]:
    blocks = model.blocks
    model.transformer.transformer_blocks = nn.ModuleList([blocks[0]])
    try:
        yield blocks[0]
    finally:
        model.transformer.transformer_blocks = blocks


class LiveBytes(TorchDispatchMode):
    """Counts what tensors made inside hold, each storage once.

    Attributes:
        live: bytes of those that are still alive.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_dense(leaf)}
        for leaf in tree_leaves(out):
            if is_dense(leaf) and id_of(leaf) not in self.known | given:
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def is_dense(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata

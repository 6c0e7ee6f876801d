"""Settings to start from: how much to train, and how to keep the base in the memory there is."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...messages import join_messages, message
from ...text import format_bytes
from ..model.offload import MAX_COPIED_BLOCKS

GIB = 2**30

#: Bytes a weight takes, the most exact storage first. nf4 with its modulation in 8 bits, which are
#: a third of Qwen-Image's weights; see `quantization`.
BYTES_PER_WEIGHT = {"bf16": 2.0, "fp8": 1.0, "nf4": 0.68}
#: For the few weights outside the blocks, and for activations.
BYTES_PER_VALUE = 2
#: Tensors of the sample's size, besides each block's input, that a step needs at most with
#: gradient_checkpointing true. 30 were counted on blocks of full width; the rest is for weights
#: decoded from 8 or 4 bits and for what attention's kernels sum up in float32.
TRANSIENT_TENSORS = 36
#: Of a LoRA's parameter in float32: itself, its gradient, two moments of AdamW; an average more.
BYTES_PER_PARAMETER, BYTES_PER_AVERAGE = 16, 4
#: Of a GPU, what a run cannot have: a CUDA context each for ComfyUI and the worker, a desktop, and
#: what `estimate` leaves alone.
RESERVE = 3 * GIB // 2
#: Of the free main memory, what blocks that wait there cannot have: it is for the worker itself.
HOST_RESERVE = 4 * GIB
#: Storages for blocks offloaded to main memory: bf16 would fill it, and double the copying.
OFFLOADED = ("fp8", "nf4")
BLOCKS = "transformer_blocks."


@dataclass(frozen=True)
class Preset:
    """A start: settings as `config_files.config_from_dict` takes them, and what they are for."""

    about: str
    settings: Mapping[str, Mapping[str, Any]]


PRESETS: dict[str, Preset] = {
    "standard": Preset(
        "Rank 16 on attention and MLP of both streams: styles, grades, a kind of edit.",
        {
            "lora": {"rank": 16, "targets": ("full",)},
            "optimizer": {"learning_rate": 1e-4, "schedule": "cosine", "final_factor": 0.1},
        },
    ),
    "light": Preset(
        "Rank 8 on attention only, twice the learning rate: does this idea work at all?",
        {
            "lora": {"rank": 8, "targets": ("attention",)},
            "optimizer": {"learning_rate": 2e-4, "schedule": "constant"},
        },
    ),
    "detailed": Preset(
        "Rank 64, averaged weights in addition to the raw ones: a person, a product, fine texture.",
        {
            "lora": {"rank": 64, "targets": ("full",)},
            "optimizer": {
                "learning_rate": 5e-5,
                "schedule": "cosine",
                "final_factor": 0.1,
                "ema_decay": 0.99,
            },
        },
    ),
}


def apply_preset(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's settings with those given on top, table by table.

    Args:
        settings: as for `config_files.config_from_dict`; these win.

    Raises:
        ConfigError: an unknown preset.
    """
    if name not in PRESETS:
        raise ConfigError(
            "unknown preset {name!r}; expected one of {presets}",
            name=name,
            presets=", ".join(PRESETS),
        )
    return merge_tables(copy.deepcopy(dict(PRESETS[name].settings)), settings)


def merge_tables(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the changes on top, setting by setting inside a table."""
    merged = dict(values)
    for key, value in changes.items():
        is_table = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if is_table else value
    return merged


@dataclass(frozen=True)
class BaseSize:
    """Numbers of a base model's weights."""

    num_blocks: int
    block_weights: int
    """Of one block."""
    other_weights: int
    """Outside the blocks."""
    width: int
    """Of the stream of tokens."""

    def count_block_bytes(self, storage: str) -> float:
        return self.block_weights * BYTES_PER_WEIGHT[storage]

    def count_resident(self, storage: str, num_offloaded: int = 0) -> float:
        """Bytes on the device: all but the blocks that wait, and copies of a few of these."""
        num_copies = min(MAX_COPIED_BLOCKS, num_offloaded)
        num_blocks = self.num_blocks - num_offloaded + num_copies
        others = self.other_weights * BYTES_PER_VALUE
        return others + num_blocks * self.count_block_bytes(storage)

    def count_headroom(self, num_tokens: int, num_parameters: int, averaged: bool = False) -> int:
        """Bytes that training takes in addition to the base.

        Args:
            num_tokens: of a batch of the largest sample: targets, references and text.
            num_parameters: trainable ones.
            averaged: whether an average of them is kept too.
        """
        values = num_tokens * self.width * (self.num_blocks + TRANSIENT_TENSORS)
        per_parameter = BYTES_PER_PARAMETER + BYTES_PER_AVERAGE * averaged
        return values * BYTES_PER_VALUE + num_parameters * per_parameter


def measure_base(shapes: Mapping[str, Sequence[int]]) -> BaseSize:
    """The size of a model whose file has these shapes, by `base_files.BaseFile`'s keys."""
    blocks = [key.split(".")[1] for key in shapes if key.startswith(BLOCKS)]
    in_blocks = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(BLOCKS))
    num_blocks = len(set(blocks))
    return BaseSize(
        num_blocks=num_blocks,
        block_weights=in_blocks // max(1, num_blocks),
        other_weights=sum(map(math.prod, shapes.values())) - in_blocks,
        width=shapes["img_in.weight"][0],
    )


@dataclass(frozen=True)
class BaseChoice:
    """How a base is kept: values of `ModelConfig`, and what they come to."""

    storage: str
    compute_dtype: str
    offload_blocks: int = 0
    host_bytes: int = 0
    """Of the blocks offloaded to main memory."""
    problem: str = ""
    """What prevents training this way."""

    def describe(self, size: BaseSize) -> str:
        text = message("storage auto is {storage}", storage=self.storage)
        if self.offload_blocks:
            text += message(
                " with {offload_blocks} of {num_blocks} blocks offloaded to main memory, "
                "{host_bytes}",
                offload_blocks=self.offload_blocks,
                num_blocks=size.num_blocks,
                host_bytes=format_bytes(self.host_bytes, 1024),
            )
        return join_messages("; ", [text, self.problem]) if self.problem else text


def choose_storage(
    size: BaseSize,
    gpu_bytes: int | None,
    headroom: int,
    *,
    host_bytes: int | None = None,
    offload_blocks: int | None = None,
    has_nf4: bool = True,
) -> BaseChoice:
    """The most exact storage that leaves room to train; where none does, with offloaded blocks.

    Args:
        gpu_bytes: of the whole GPU; None for a CPU, where float32 is both exact and fast.
        headroom: bytes that training takes besides the base; see `BaseSize.count_headroom`.
        host_bytes: of free main memory; None where the system does not report it.
        offload_blocks: the user's own number of offloaded blocks; None leaves it open.
        has_nf4: whether bitsandbytes is installed.

    Returns:
        Where nothing leaves room, the closest choice, and the problem; an estimate then tells what
        to lower.
    """
    if gpu_bytes is None:
        return BaseChoice("fp32", "fp32", offload_blocks or 0)
    room = gpu_bytes - RESERVE - headroom
    storages = [name for name in BYTES_PER_WEIGHT if has_nf4 or name != "nf4"]
    ways = [(storage, offload_blocks or 0) for storage in storages]
    if offload_blocks is None:
        most_exact = [name for name in OFFLOADED if name in storages]
        ways += [(storage, count_offloaded(size, storage, room)) for storage in most_exact]
    choices = []
    for storage, num_offloaded in ways:
        waiting = round(num_offloaded * size.count_block_bytes(storage))
        problem = ""
        if size.count_resident(storage, num_offloaded) > room:
            problem = message(
                "{gpu_bytes} of GPU memory leaves no room to train",
                gpu_bytes=format_bytes(gpu_bytes, 1024),
            )
        elif waiting and host_bytes is not None and waiting + HOST_RESERVE > host_bytes:
            problem = message(
                "{waiting} of main memory are needed, and {host_bytes} are free",
                waiting=format_bytes(waiting + HOST_RESERVE, 1024),
                host_bytes=format_bytes(host_bytes, 1024),
            )
        choices.append(BaseChoice(storage, "bf16", num_offloaded, waiting, problem))
    return next((choice for choice in choices if not choice.problem), choices[-1])


def count_offloaded(size: BaseSize, storage: str, room: float) -> int:
    """The fewest blocks that have to wait; all where even that is not enough."""
    numbers = range(size.num_blocks + 1)
    return next((n for n in numbers if size.count_resident(storage, n) <= room), size.num_blocks)

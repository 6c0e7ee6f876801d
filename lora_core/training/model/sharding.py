"""A base sharded over several GPUs: PyTorch's FSDP2 under Hugging Face Accelerate.

Each process keeps a share of every block's frozen weights; a block's whole weights are gathered
right before it runs, forwards and again backwards, and dropped after. Blocks are sharded one by one
while the model is loaded and before LoRAs are injected, for two reasons: no process ever holds the
whole base, and FSDP manages only what a block holds by then, its base. LoRAs, their gradients and
the optimizer stay whole on each process, so that checkpoints, clipping and EMA are those of a
single process; gradients are averaged by Accelerate (`processes.Processes.average_gradients`).

What is outside the blocks is 0.3 % of the weights and stays whole, as do the quantisation's scales,
which are buffers. Codes are gathered unchanged: int8 travels as int8.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ...errors import ConfigError
from .model_config import ModelConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .edit_block import EditBlock
    from .transformer import EditTransformer

#: Accelerate's other ways to shard a model over several devices.
OTHERS = ("DEEPSPEED", "MEGATRON_LM")


class Sharding:
    """Shards the blocks of one model over the processes of a group.

    Args:
        device: of this process.
        reshard_after_forward: drop a block's whole weights between its forward and backward pass.
    """

    def __init__(self, device: torch.device, reshard_after_forward: bool = True):
        from torch.distributed import get_world_size
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(device.type, (get_world_size(),))
        self.reshard_after_forward = reshard_after_forward

    def shard_block(self, block: EditBlock) -> EditBlock:
        """Keeps this process's share of every parameter the block holds, in place."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(block, mesh=self.mesh, reshard_after_forward=self.reshard_after_forward)
        return block

    def finish(self, model: EditTransformer) -> EditTransformer:
        """Joins the sharded blocks, so that each is gathered while the one before computes."""
        from torch.distributed.fsdp import fully_shard

        outside = {p for p in model.parameters() if not is_sharded(p)}
        fully_shard(model, mesh=self.mesh, ignored_params=outside)
        return model


def is_sharded(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def choose_sharding(config: ModelConfig, accelerator: Accelerator | None) -> Sharding | None:
    """What `accelerate launch --use_fsdp` asked for; None without it.

    Raises:
        ConfigError: a setting that sharding does not go with.
    """
    if accelerator is None or not is_asked_for(os.environ):
        return None
    if config.offload_blocks:
        raise ConfigError(
            "offload_blocks is {offload_blocks}, but FSDP already shards the blocks across the "
            "GPUs; set offload_blocks to 0, or launch with --multi_gpu instead of --use_fsdp",
            offload_blocks=config.offload_blocks,
        )
    # Not the plugin of Accelerate's state, which on CPUs has none.
    reshard = read_flag(os.environ, "FSDP_RESHARD_AFTER_FORWARD", "true")
    return Sharding(accelerator.device, reshard)


def is_asked_for(environment: Mapping[str, str]) -> bool:
    return read_flag(environment, "ACCELERATE_USE_FSDP")


def read_flag(environment: Mapping[str, str], name: str, default: str = "false") -> bool:
    return environment.get(name, default).lower() in ("true", "1")


def check_launch(environment: Mapping[str, str]) -> None:
    """Checks the settings of `accelerate launch`.

    Raises:
        ConfigError: a way of sharding the model that training does not support.
    """
    for name in OTHERS:
        if read_flag(environment, f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                "{name} would shard the LoRAs, which checkpoints need complete; launch with "
                "--use_fsdp --fsdp_version 2, which shards only the base, or with --multi_gpu",
                name=name,
            )
    if not is_asked_for(environment):
        return
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            "FSDP version {version} would shard the LoRAs, which checkpoints need complete; "
            "launch with --fsdp_version 2, which shards only the base",
            version=version,
        )
    if read_flag(environment, "FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            "fsdp_offload_params is true, which training does not support; launch with "
            "--fsdp_offload_params false, and use a smaller model.storage or more GPUs"
        )

"""The base model as the training loop calls it: latents in, velocity out, as ComfyUI computes it.

The modules are those of diffusers' `QwenImageTransformer2DModel`, whose names are the keys of
ComfyUI's files. Four things are ComfyUI's (comfy/ldm/qwen_image/model.py, `_forward`): the
positions (see `rope`), sides that are no multiple of the patch, the noise level in float32
(diffusers rounds it to the activations' type, up to 2/1000 in bf16), and references at noise level
0 where the model is a 2511.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ...errors import ConfigError
from .edit_block import SELECTIVE, EditBlock, recompute
from .head_rotation import normalize
from .host_blocks import HostBlocks
from .offload import BlockOffload
from .rope import Grid, compute_rotation

if TYPE_CHECKING:
    from typing import Self

PATCH = 2


class EditTransformer(nn.Module):
    """Qwen-Image-Edit's diffusion transformer.

    Args:
        transformer: diffusers' QwenImageTransformer2DModel. Its blocks are replaced by `EditBlock`s
            of the same submodules, so that it cannot be called directly from then on.
        compute_dtype: of the activations.

    Attributes:
        transformer: the modules by their paths, such as `transformer_blocks.0.attn.to_q`.
        zero_cond_t: whether references are shown at noise level 0, as 2511 does.
        offload: None, or what keeps some blocks' weights in host memory.
        is_adaptive: whether `recompute_more` may do so.
        notes: sentences on what differs from the request, or has a cost.
    """

    transformer: Any  # diffusers does not declare what its modules hold

    def __init__(self, transformer: Any, compute_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        config = transformer.config
        self.transformer = transformer
        self.compute_dtype = compute_dtype
        self.axes = tuple(config.axes_dims_rope)
        self.zero_cond_t = bool(getattr(config, "zero_cond_t", False))
        for index, block in enumerate(transformer.transformer_blocks):
            if not isinstance(block, EditBlock):  # sharded ones already are
                transformer.transformer_blocks[index] = EditBlock(block)
        self.offload: BlockOffload | None = None
        self.is_adaptive = False
        self.notes: list[str] = []
        transformer.pos_embed = nn.Identity()  # its tables are of no use here
        # For what wraps or compiles a model block by block (Accelerate's FSDP, diffusers).
        transformer._no_split_modules = transformer._repeated_blocks = [EditBlock.__name__]

    @property
    def _no_split_modules(self) -> list[str]:
        return self.transformer._no_split_modules

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.transformer_blocks

    @property
    def gradient_checkpointing(self) -> bool | str:
        return self.transformer.gradient_checkpointing

    def enable_gradient_checkpointing(self, enabled: bool | str = True) -> None:
        """Keep only each block's input for the backward pass, and recompute the rest there.

        Args:
            enabled: "selective" keeps what is expensive to compute too; see `edit_block`.

        Raises:
            ConfigError: blocks are offloaded, and `enabled` is False or "selective".
        """
        if self.offload is not None and enabled is not True:
            raise ConfigError(
                "offload_blocks needs gradient_checkpointing: without it every block's weights "
                "stay on the device for the backward pass; set gradient_checkpointing to true"
            )
        self.transformer.gradient_checkpointing = enabled

    @property
    def can_recompute_more(self) -> bool:
        """Whether it keeps more than each block's input, and was free to choose that."""
        return self.is_adaptive and self.gradient_checkpointing is not True

    def recompute_more(self) -> bool:
        """Keeps less from now on; False where it already keeps least, or must not.

        One kind at a time: true after "selective" costs speed for the rest of the run.
        """
        if not self.can_recompute_more:
            return False
        self.enable_gradient_checkpointing(True if self.gradient_checkpointing else SELECTIVE)
        return True

    def offload_blocks(
        self, indices: Sequence[int], device: torch.device, host: HostBlocks | None = None
    ) -> None:
        """Keeps these blocks' weights, which are in host memory, there; see `offload`.

        Call it before LoRAs are injected.
        """
        self.offload = BlockOffload(self.blocks, indices, device, host)
        sentence = self.offload.host.describe()
        if sentence is not None:
            self.notes.append(sentence)
        self.enable_gradient_checkpointing()

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        if self.offload is not None:
            raise ConfigError(
                "a model with offload_blocks cannot be moved to another device or type, as it "
                "would be for several processes; set offload_blocks to 0"
            )
        return super()._apply(*arguments, **options)

    def forward(
        self,
        latents: torch.Tensor,
        references: list[torch.Tensor],
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted velocity (noise - x_0) of the target, (B, 16, H, W) in the compute dtype.

        Items of a batch do not see each other: each gets the result it would get alone, if its
        text is padded at the end.

        Args:
            latents: noisy target, normalised, (B, 16, H, W); any H and W.
            references: one tensor (B, 16, h, w) a slot, normalised; sizes may differ by slot.
            text: text embeddings (B, T, D).
            text_mask: (B, T), True or 1 for tokens that count; None where all do, which is faster.
            sigma: noise levels in [0, 1], (B,); kept in float32.
        """
        model, dtype = self.transformer, self.compute_dtype
        packed = [pack(image.to(dtype)) for image in (latents, *references)]
        grids = tuple(get_grid(image) for image in (latents, *references))
        num_target_tokens = packed[0].shape[1]
        image = model.img_in(torch.cat(packed, dim=1))
        norm = model.txt_norm
        text = model.txt_in(normalize(text.to(dtype), norm.weight, norm.eps))

        # Noise levels are drawn on the CPU; callers need not know where the model computes.
        sigma = sigma.to(latents.device, torch.float32)
        split = num_target_tokens if self.zero_cond_t and references else None
        levels = sigma if split is None else torch.cat([sigma, torch.zeros_like(sigma)])
        time = model.time_text_embed(levels, image)
        rotation = compute_rotation(self.axes, grids, text.shape[1], dtype, image.device)
        mask = build_mask(text_mask, image.shape[1])
        checkpointed = torch.is_grad_enabled() and model.gradient_checkpointing
        for index, block in enumerate(self.blocks):
            inputs = (image, text, time, rotation, mask, split)
            if self.offload is None:
                image, text = block(*inputs, checkpointed)
                continue
            run = partial(self.offload.run, index)
            # The whole block: what is outside a checkpoint would keep its weights on the device.
            image, text = (
                recompute(run, *inputs, is_random=bool(block.is_random))
                if checkpointed
                else run(*inputs)
            )
        time = time if split is None else time.chunk(2)[0]
        out = model.proj_out(model.norm_out(image[:, :num_target_tokens], time))
        out = unpack(out, grids[0])
        if out.shape == latents.shape:
            return out
        # A copy: FSDP has no hold on views.
        return out[..., : latents.shape[-2], : latents.shape[-1]].contiguous()


def get_grid(image: torch.Tensor) -> Grid:
    height, width = image.shape[-2:]
    return -(-height // PATCH), -(-width // PATCH)


def pack(image: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, patches, 4 C), each patch channel by channel.

    An odd side gets its first line once more at the end (comfy/ldm/common_dit.py,
    `pad_to_patch_size`).
    """
    height, width = image.shape[-2:]
    if height % PATCH or width % PATCH:
        image = functional.pad(image, (0, width % PATCH, 0, height % PATCH), mode="circular")
    return functional.pixel_unshuffle(image, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The inverse of `pack`, for sides that are multiples of the patch."""
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def build_mask(text_mask: torch.Tensor | None, num_image_tokens: int) -> torch.Tensor | None:
    """(B, 1, 1, text and image tokens), True where attention may look; None where it may anywhere.

    A mask of text tokens is for texts that are padded: even an all-true one makes attention take a
    slower kernel, and checking it here would synchronise with the device.
    """
    if text_mask is None:
        return None
    text_mask = text_mask.bool()
    image_mask = text_mask.new_ones(len(text_mask), num_image_tokens)
    return torch.cat([text_mask, image_mask], dim=1)[:, None, None]

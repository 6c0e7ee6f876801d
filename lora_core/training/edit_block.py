"""One block of the transformer, computed as ComfyUI computes it.

Holds the submodules of diffusers' block under their own names, so that every module path stays
what it is in the files, and computes them itself. diffusers' own forward was changed in most of its
releases (0.35 to 0.42) and gives each token its own modulation, three tensors of the image's size;
here the target's tokens and the references' are two parts, as in ComfyUI.

Under gradient checkpointing the last product of each stream's MLP is not computed again: a backward
pass needs nothing of its result. That is a third of the work of doing a block twice, and keeps only
a LoRA's down-product, (tokens, rank), beside the block's input. Nor is the modulation, a third of
the weights.

Selective checkpointing keeps what costs most to compute again for its size: q, k and v as they
leave their products, the attention's result and the stream after it, six tensors of the stream's
size instead of one. What is computed again is the norms, the rotation and the MLP's first product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..lora_layers import LoraLinear
from .rope import rotate

SELECTIVE = "selective"

Rotation = tuple[torch.Tensor, torch.Tensor]
Begun = tuple[torch.Tensor, torch.Tensor | None]
"""Of a Linear: its input and its LoRA's down-product; or its result and None."""
Unfinished = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of one stream: itself, its gate, and the MLP's last product, begun."""

ATTENTION_KERNELS = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)
]


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """Keeps the inputs only, and computes the rest again in the backward pass."""
    return checkpoint(function, *inputs, use_reentrant=False)


def recompute_around_attention(function: Callable[..., Any], *inputs: Any) -> Any:
    """The same, but keeps the attention's result too."""
    contexts = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def call(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


class EditBlock(nn.Module):
    """Image and text stream with one joint attention.

    Legend: B = batch, L = image tokens (the target's, then the references'), T = text tokens,
    D = width.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        time: torch.Tensor,
        rotation: Rotation,
        mask: torch.Tensor | None,
        split: int | None,
        checkpointed: bool | str = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One block further: (B, L, D) and (B, T, D).

        Args:
            time: embedded noise levels (B, D); where `split` is given (2 B, D), the second half
                of level 0.
            rotation: of the text's tokens, then the image's; see `rope.compute_rotation`.
            mask: (B, 1, 1, T + L), True for tokens that may be attended to.
            split: number of the target's tokens; those after it take the second half of `time`.
            checkpointed: keep only the inputs for the backward pass, and compute the rest again;
                "selective": keep what is dear too.
        """
        # A third of all weights for one token's worth of products: not to be read twice.
        text_time = time if split is None else time.chunk(2)[0]
        modulation = self.img_mod(time).unsqueeze(1), self.txt_mod(text_time).unsqueeze(1)
        inputs = (image, text, *modulation, rotation, mask, split)
        if checkpointed == SELECTIVE:
            streams = self.begin_selectively(*inputs)
        elif checkpointed:
            streams = recompute(self.begin, *inputs)
        else:
            streams = self.begin(*inputs)
        return self.finish(*streams, split)

    def compile(self, **options: object) -> None:
        """Compiles what is computed again and what is not each on its own."""
        for name in ("begin", "finish", "enter", "begin_mlps"):
            setattr(self, name, torch.compile(getattr(self, name), **options))

    def begin(self, *inputs: Any) -> tuple[Unfinished, Unfinished]:
        """Everything between the modulation, (B or 2 B, 1, 6 D), and the last products."""
        return self.run_parts(call, call, *inputs)

    def begin_selectively(self, *inputs: Any) -> tuple[Unfinished, Unfinished]:
        """The same, its cheap parts computed again in the backward pass."""
        return self.run_parts(recompute, recompute_around_attention, *inputs)

    def run_parts(
        self,
        run: Callable[..., Any],
        run_attention: Callable[..., Any],
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        rotation: Rotation,
        mask: torch.Tensor | None,
        split: int | None,
    ) -> tuple[Unfinished, Unfinished]:
        attn, num_text_tokens = self.attn, text.shape[1]
        image_first, image_second = image_modulation.chunk(2, dim=-1)
        text_first, text_second = text_modulation.chunk(2, dim=-1)
        begun, image_gate, text_gate = run(self.enter, image, text, image_first, text_first, split)
        parts = [
            finish_product(project, *one)
            for project, one in zip(self.projections, begun, strict=True)
        ]
        joint = run_attention(self.attend, *parts, rotation, mask)
        image_out = attn.to_out[0](joint[:, num_text_tokens:])
        text_out = attn.to_add_out(joint[:, :num_text_tokens])
        image = add_gated(image, image_out, image_gate, split)
        text = add_gated(text, text_out, text_gate, None)
        return run(self.begin_mlps, image, text, image_second, text_second, split)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """q, k and v of the image, then of the text."""
        attn = self.attn
        image = attn.to_q, attn.to_k, attn.to_v
        return *image, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj

    def enter(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        split: int | None,
    ) -> tuple[list[Begun], torch.Tensor, torch.Tensor]:
        """The attention's projections, begun, and the streams' gates; modulation (…, 1, 3 D)."""
        image, image_gate = modulate(self.img_norm1(image), image_modulation, split)
        text, text_gate = modulate(self.txt_norm1(text), text_modulation, None)
        # One input after the other: LoRAs that read the same tensor share its down-product.
        inputs = (image,) * 3 + (text,) * 3
        begun = [begin_product(*one) for one in zip(self.projections, inputs, strict=True)]
        return begun, image_gate, text_gate

    def begin_mlps(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        split: int | None,
    ) -> tuple[Unfinished, Unfinished]:
        image_in, image_gate = modulate(self.img_norm2(image), image_modulation, split)
        text_in, text_gate = modulate(self.txt_norm2(text), text_modulation, None)
        return (
            (image, image_gate, *begin_mlp(self.img_mlp, image_in)),
            (text, text_gate, *begin_mlp(self.txt_mlp, text_in)),
        )

    def finish(
        self, image: Unfinished, text: Unfinished, split: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last product of either stream's MLP, and its residual sum."""
        image, image_gate, *rest = image
        change = finish_product(self.img_mlp.net[-1], *rest)
        image = add_gated(image, change, image_gate, split)
        text, text_gate, *rest = text
        return image, add_gated(text, finish_product(self.txt_mlp.net[-1], *rest), text_gate, None)

    def attend(self, *inputs: Any) -> torch.Tensor:
        """(B, T + L, D) of q, k and v of the image, then of the text, the rotation and the mask."""
        *parts, rotation, mask = inputs
        attn = self.attn
        head_width = attn.norm_q.weight.shape[0]
        image_q, image_k, image_v, text_q, text_k, text_v = (
            x.unflatten(-1, (-1, head_width)) for x in parts
        )
        query = torch.cat([attn.norm_added_q(text_q), attn.norm_q(image_q)], dim=1)
        key = torch.cat([attn.norm_added_k(text_k), attn.norm_k(image_k)], dim=1)
        value = torch.cat([text_v, image_v], dim=1)

        query, key = rotate(query, rotation), rotate(key, rotation)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        joint = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        return joint.transpose(1, 2).flatten(2)


def modulate(
    x: torch.Tensor, parameters: torch.Tensor, split: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * (1 + scale) + shift, and the gate for what is made of it."""
    shift, scale, gate = parameters.chunk(3, dim=-1)
    if split is None:
        return torch.addcmul(shift, x, 1 + scale), gate
    shifts, scales = shift.chunk(2), (1 + scale).chunk(2)
    parts = zip(shifts, (x[:, :split], x[:, split:]), scales, strict=True)
    return torch.cat([torch.addcmul(*part) for part in parts], dim=1), gate


def add_gated(
    x: torch.Tensor, change: torch.Tensor, gate: torch.Tensor, split: int | None
) -> torch.Tensor:
    """x + gate * change."""
    if split is None:
        return torch.addcmul(x, gate, change)
    target, rest = gate.chunk(2)
    parts = [
        torch.addcmul(x[:, :split], target, change[:, :split]),
        torch.addcmul(x[:, split:], rest, change[:, split:]),
    ]
    return torch.cat(parts, dim=1)


def begin_mlp(mlp: nn.Module, x: torch.Tensor) -> Begun:
    """All but the last product, which is begun."""
    *layers, last = mlp.net
    for layer in layers:
        x = layer(x)
    return begin_product(last, x)


def begin_product(linear: nn.Module, x: torch.Tensor) -> Begun:
    """What can be computed again apart from the product itself, which needs not be.

    Only a LoRA that is a plain sum; a DoRA keeps more than that for its gradients, and is done.
    """
    if isinstance(linear, LoraLinear):
        return (x, linear.project(x)) if linear.is_sum else (linear(x), None)
    return x, None


def finish_product(linear: nn.Module, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    if isinstance(linear, LoraLinear):
        return x if hidden is None else linear.add_to_base(x, hidden)
    return linear(x)

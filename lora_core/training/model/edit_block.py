"""One block of the transformer, computed as ComfyUI computes it.

Holds the submodules of diffusers' block under their own names, so that every module path stays
as in the files, and computes them itself. diffusers' own forward was changed in most of its
releases (0.35 to 0.42) and gives each token its own modulation, three tensors of the image's size;
here the target's tokens and the references' are two parts, as in ComfyUI.

Under gradient checkpointing the last product of each stream's MLP is not recomputed: a backward
pass needs nothing of its result. That is a third of the work of computing a block twice, and keeps
only a LoRA's down-product, (tokens, rank), besides the block's input. Nor is the modulation, a
third of the weights.

Selective checkpointing keeps what is most expensive to recompute for its size: q, k and v as they
leave their products, the attention's result and the stream after it, six tensors of the stream's
size instead of one. The norms, the rotation and the MLP's first product are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...injection.layers import LoraLinear
from .attention import Heads, attend, attend_keeping_result, choose_kernels
from .head_rotation import normalize_and_rotate
from .lora_products import (
    Begun,
    begin_products,
    compute_products,
    finish_products,
    is_random,
)
from .modulation import add_gated, modulate
from .rope import Rotation

SELECTIVE = "selective"

Unfinished = tuple[torch.Tensor, torch.Tensor, Begun]
"""Of one stream: itself, its gate, and the MLP's last product, begun."""


def recompute(function: Callable[..., Any], *inputs: Any, is_random: bool) -> Any:
    """Keeps only the inputs, and recomputes the rest in the backward pass.

    Args:
        is_random: random numbers are drawn inside, so that their state has to be kept.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=is_random)


class EditBlock(nn.Module):
    """Image and text stream with one joint attention.

    Legend: B = batch, L = image tokens (the target's, then the references'), T = text tokens,
    D = width.
    """

    # diffusers' modules under its names; nothing declares what they hold.
    attn: Any
    img_mod: nn.Module
    txt_mod: nn.Module
    img_norm1: nn.Module
    txt_norm1: nn.Module
    img_norm2: nn.Module
    txt_norm2: nn.Module
    img_mlp: Any
    txt_mlp: Any

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
            checkpointed: keep only the inputs for the backward pass, and recompute the rest;
                "selective": keep what is expensive too.
        """
        # A third of all weights for products of one token: must not be read twice.
        text_time = time if split is None else time.chunk(2)[0]
        modulation = self.img_mod(time).unsqueeze(1), self.txt_mod(text_time).unsqueeze(1)
        inputs = (image, text, *modulation, rotation, mask, split)
        if checkpointed == SELECTIVE:
            streams = self.begin_selectively(*inputs)
        elif checkpointed:
            streams = recompute(self.begin_in_order, *inputs, is_random=self.is_random)
        else:
            streams = self.begin_in_order(*inputs)
        return self.finish(*streams, split)

    def compile(self, **options: Any) -> None:
        """Compiles the recomputed part and the rest separately.

        Under "selective" all but the products and the attention, which are not compiled.
        """
        for name in ("begin", "enter", "prepare", "begin_mlps", "finish"):
            setattr(self, name, torch.compile(getattr(self, name), **options))

    @property
    def is_random(self) -> bool:
        """Whether a LoRA drops entries of its input."""
        return is_random([x for x in self.list_linears() if isinstance(x, LoraLinear)])

    def list_linears(self) -> Iterator[nn.Module]:
        """Those of the two streams."""
        attn = self.attn
        yield from (*self.image_projections, *self.text_projections, attn.to_out[0])
        yield attn.to_add_out
        for mlp in (self.img_mlp, self.txt_mlp):
            yield from (mlp.net[0].proj, mlp.net[-1])

    def begin_in_order(self, *inputs: Any) -> tuple[Unfinished, Unfinished]:
        with choose_kernels(inputs[0].device):
            return self.begin(*inputs)

    def begin(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        rotation: Rotation,
        mask: torch.Tensor | None,
        split: int | None,
    ) -> tuple[Unfinished, Unfinished]:
        """Everything between the modulation, (B or 2 B, 1, 6 D), and the last products."""
        image_first, image_second = image_modulation.chunk(2, dim=-1)
        text_first, text_second = text_modulation.chunk(2, dim=-1)
        image_in, text_in, gates = self.modulate_first(image, text, image_first, text_first, split)
        parts = [
            *compute_products(self.image_projections, image_in),
            *compute_products(self.text_projections, text_in),
        ]
        joint = attend(*self.prepare(*parts, rotation), mask)
        streams = self.leave(joint, image, text, gates, split)
        return self.begin_mlps(*streams, image_second, text_second, split)

    def begin_selectively(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        rotation: Rotation,
        mask: torch.Tensor | None,
        split: int | None,
    ) -> tuple[Unfinished, Unfinished]:
        """The same, with its cheap parts recomputed in the backward pass."""
        is_random = self.is_random
        image_first, image_second = image_modulation.chunk(2, dim=-1)
        text_first, text_second = text_modulation.chunk(2, dim=-1)
        first = image, text, image_first, text_first, split
        *begun, gates = recompute(self.enter, *first, is_random=is_random)
        parts = self.finish_projections(*begun)
        with choose_kernels(image.device):
            joint = attend_keeping_result(
                lambda *parts: self.prepare(*parts, rotation), parts, mask
            )
        streams = self.leave(joint, image, text, gates, split)
        second = *streams, image_second, text_second, split
        return recompute(self.begin_mlps, *second, is_random=is_random)

    @property
    def image_projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.attn.to_q, self.attn.to_k, self.attn.to_v

    @property
    def text_projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.attn.add_q_proj, self.attn.add_k_proj, self.attn.add_v_proj

    def enter(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        split: int | None,
    ) -> tuple[Begun, Begun, tuple[torch.Tensor, torch.Tensor]]:
        """The attention's projections, begun, and the streams' gates; modulation (…, 1, 3 D)."""
        image, text, gates = self.modulate_first(
            image, text, image_modulation, text_modulation, split
        )
        begun = begin_products(self.image_projections, image)
        return begun, begin_products(self.text_projections, text), gates

    def modulate_first(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        split: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """What the attention's projections read, and the streams' gates."""
        image, image_gate = modulate(self.img_norm1(image), image_modulation, split)
        text, text_gate = modulate(self.txt_norm1(text), text_modulation, None)
        return image, text, (image_gate, text_gate)

    def finish_projections(self, image: Begun, text: Begun) -> list[torch.Tensor]:
        """q, k and v of the image, then of the text."""
        parts = finish_products(self.image_projections, image)
        return parts + finish_products(self.text_projections, text)

    def prepare(self, *inputs: Any) -> Heads:
        """What attention takes, of `finish_projections` and the rotation."""
        *parts, rotation = inputs
        attn = self.attn
        head_width = attn.norm_q.weight.shape[0]
        image_q, image_k, image_v, text_q, text_k, text_v = (
            x.unflatten(-1, (-1, head_width)) for x in parts
        )
        weights = attn.norm_added_q.weight, attn.norm_q.weight
        query = normalize_and_rotate(text_q, image_q, *weights, rotation, attn.norm_q.eps)
        weights = attn.norm_added_k.weight, attn.norm_k.weight
        key = normalize_and_rotate(text_k, image_k, *weights, rotation, attn.norm_k.eps)
        return query, key, torch.cat([text_v, image_v], dim=1)

    def leave(
        self,
        joint: torch.Tensor,
        image: torch.Tensor,
        text: torch.Tensor,
        gates: tuple[torch.Tensor, torch.Tensor],
        split: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The streams after the attention, whose result is (B, T + L, D)."""
        # Not two slices: the gradient of each would be a tensor of the whole size.
        text_part, image_part = joint.split((text.shape[1], image.shape[1]), dim=1)
        (image_change,) = compute_products([self.attn.to_out[0]], image_part)
        (text_change,) = compute_products([self.attn.to_add_out], text_part)
        image = add_gated(image, image_change, gates[0], split)
        return image, add_gated(text, text_change, gates[1], None)

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
            (image, image_gate, begin_mlp(self.img_mlp, image_in)),
            (text, text_gate, begin_mlp(self.txt_mlp, text_in)),
        )

    def finish(
        self, image: Unfinished, text: Unfinished, split: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last product of either stream's MLP, and its residual sum."""
        image_before, image_gate, image_begun = image
        (change,) = finish_products([self.img_mlp.net[-1]], image_begun)
        image_after = add_gated(image_before, change, image_gate, split)
        text_before, text_gate, text_begun = text
        (change,) = finish_products([self.txt_mlp.net[-1]], text_begun)
        return image_after, add_gated(text_before, change, text_gate, None)


def begin_mlp(mlp: Any, x: torch.Tensor) -> Begun:
    """All but the last product, which is begun."""
    activation, *between, last = mlp.net
    (x,) = compute_products([activation.proj], x)
    x = functional.gelu(x, approximate=activation.approximate)
    for layer in between:
        x = layer(x)
    return begin_products([last], x)

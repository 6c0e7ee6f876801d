"""One block of the transformer, computed as ComfyUI computes it.

Holds the submodules of diffusers' block under their own names, so that every module path stays
what it is in the files, and computes them itself. diffusers' own forward was changed in most of its
releases (0.35 to 0.42) and gives each token its own modulation, three tensors of the image's size;
here the target's tokens and the references' are two parts, as in ComfyUI.

Under gradient checkpointing the last product of each stream's MLP is not computed again: a backward
pass needs nothing of its result. That is a third of the work of doing a block twice, and keeps only
a LoRA's down-product, (tokens, rank), beside the block's input. Nor is the modulation, a third of
the weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..lora_layers import LoraLinear
from .rope import rotate

Rotation = tuple[torch.Tensor, torch.Tensor]
Unfinished = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of one stream: itself, its gate, the input of the MLP's last product and that one's LoRA."""


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
        checkpointed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One block further: (B, L, D) and (B, T, D).

        Args:
            time: embedded noise levels (B, D); where `split` is given (2 B, D), the second half
                of level 0.
            rotation: of the text's tokens, then the image's; see `rope.compute_rotation`.
            mask: (B, 1, 1, T + L), True for tokens that may be attended to.
            split: number of the target's tokens; those after it take the second half of `time`.
            checkpointed: keep only the inputs for the backward pass, and compute the rest again.
        """
        # A third of all weights for one token's worth of products: not to be read twice.
        text_time = time if split is None else time.chunk(2)[0]
        modulation = self.img_mod(time).unsqueeze(1), self.txt_mod(text_time).unsqueeze(1)
        inputs = (image, text, *modulation, rotation, mask, split)
        if checkpointed:
            streams = checkpoint(self.begin, *inputs, use_reentrant=False)
        else:
            streams = self.begin(*inputs)
        return self.finish(*streams, split)

    def compile(self, **options: object) -> None:
        """Compiles what is computed again and what is not each on its own."""
        self.begin = torch.compile(self.begin, **options)
        self.finish = torch.compile(self.finish, **options)

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

        image_in, image_gate = modulate(self.img_norm1(image), image_first, split)
        text_in, text_gate = modulate(self.txt_norm1(text), text_first, None)
        image_out, text_out = self.attend(image_in, text_in, rotation, mask)
        image = add_gated(image, image_out, image_gate, split)
        text = add_gated(text, text_out, text_gate, None)

        image_in, image_gate = modulate(self.img_norm2(image), image_second, split)
        text_in, text_gate = modulate(self.txt_norm2(text), text_second, None)
        return (
            (image, image_gate, *begin_mlp(self.img_mlp, image_in)),
            (text, text_gate, *begin_mlp(self.txt_mlp, text_in)),
        )

    def finish(
        self, image: Unfinished, text: Unfinished, split: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last product of either stream's MLP, and its residual sum."""
        image, image_gate, *rest = image
        image = add_gated(image, finish_mlp(self.img_mlp, *rest), image_gate, split)
        text, text_gate, *rest = text
        return image, add_gated(text, finish_mlp(self.txt_mlp, *rest), text_gate, None)

    def attend(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        rotation: Rotation,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attn, num_text_tokens = self.attn, text.shape[1]
        head_width = attn.norm_q.weight.shape[0]

        def split_heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, head_width))

        # One input after the other: LoRAs that read the same tensor share its down-product.
        image_parts = [split_heads(project(image)) for project in (attn.to_q, attn.to_k, attn.to_v)]
        text_projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_parts = [split_heads(project(text)) for project in text_projections]
        query = torch.cat([attn.norm_added_q(text_parts[0]), attn.norm_q(image_parts[0])], dim=1)
        key = torch.cat([attn.norm_added_k(text_parts[1]), attn.norm_k(image_parts[1])], dim=1)
        value = torch.cat([text_parts[2], image_parts[2]], dim=1)

        query, key = rotate(query, rotation), rotate(key, rotation)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        joint = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        joint = joint.transpose(1, 2).flatten(2)
        image_out = attn.to_out[0](joint[:, num_text_tokens:])
        return image_out, attn.to_add_out(joint[:, :num_text_tokens])


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


def begin_mlp(mlp: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the last Linear takes: its input and its LoRA's down-product, where it has one.

    Only a LoRA that is a plain sum; a DoRA keeps more than that for its gradients.
    """
    *layers, last = mlp.net
    for layer in layers:
        x = layer(x)
    if isinstance(last, LoraLinear):
        return (x, last.project(x)) if last.is_sum else (last(x), None)
    return x, None


def finish_mlp(mlp: nn.Module, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    last = mlp.net[-1]
    if isinstance(last, LoraLinear):
        return x if hidden is None else last.add_to_base(x, hidden)
    return last(x)

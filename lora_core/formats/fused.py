"""Several modules in one, as diffusers' fuse_qkv_projections and ComfyUI's files join them.

The fused weight stacks its members, so an adapter of it can be split exactly: rows of what is on
the output side, the rest shared.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..adapter.weights import (
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
)
from ..base_model import module_paths
from ..base_model.families import FUSED, is_fused, list_members
from ..base_model.family import Fusion
from ..disk.safetensors_file import AnyTensor, StoredTensor


def get_fusion(module_path: str) -> Fusion:
    """What the module at this path, which is a fused one, joins."""
    return FUSED[module_paths.split_path(module_path)[1]]


def find_member(module_path: str) -> str | None:
    """The first module that a fused one holds; None for other modules."""
    return list_members(module_path)[0] if is_fused(module_path) else None


def split_weights(weights: ModuleWeights, count: int) -> list[ModuleWeights] | None:
    """`count` modules whose deltas, below each other, are that of `weights`.

    None where the kind has no exact parts: a rotation across its members, a magnitude per column,
    whose norms are those of whole columns, or Kronecker factors that do not fall into that many.
    """
    direction = weights.direction if isinstance(weights, DoraWeights) else weights
    names = find_row_parts(direction, count)
    if names is None:
        return None
    if isinstance(weights, DoraWeights):
        if weights.parts["magnitude"].shape[0] != weights.out_features:
            return None
        names = [*names, "magnitude"]
    names += [name for name in ("bias_delta",) if name in weights.parts]
    if any(weights.parts[name].shape[0] % count for name in names):
        return None
    return [
        rebuild(
            weights, {**weights.parts, **{n: take_chunk(weights.parts[n], i, count) for n in names}}
        )
        for i in range(count)
    ]


def find_row_parts(weights: ModuleWeights, count: int) -> list[str] | None:
    """Names of the parts whose rows are the output's."""
    if isinstance(weights, LoraWeights):
        names = ["lora_B"]
    elif isinstance(weights, LohaWeights):
        names = ["hada_w1_a", "hada_w2_a"]
    elif isinstance(weights, DiffWeights):
        names = [name for name in ("diff",) if name in weights.parts]
    elif isinstance(weights, LokrWeights):
        # kron(w1, w2): the rows of w1 are the coarse order of the rows.
        factor = next(n for n in ("lokr_w1", "lokr_w1_a") if n in weights.parts)
        if weights.parts[factor].shape[0] == 1:
            factor = next(n for n in ("lokr_w2", "lokr_w2_a") if n in weights.parts)
        names = [factor]
    elif isinstance(weights, OftWeights) and not weights.alpha:  # which limits all blocks together
        names = [name for name in ("blocks", "rescale") if name in weights.parts]
    else:
        return None
    return names


def take_chunk(tensor: AnyTensor, index: int, count: int) -> AnyTensor:
    rows = tensor.shape[0] // count
    if isinstance(tensor, StoredTensor):
        return tensor.take_rows(index * rows, rows)
    return tensor[index * rows : (index + 1) * rows]


def rebuild(weights: ModuleWeights, parts: Mapping[str, AnyTensor]) -> ModuleWeights:
    """Weights of other shapes; `with_parts` keeps what was computed from the old ones."""
    if isinstance(weights, DoraWeights):
        direction = {name: t for name, t in parts.items() if name != "magnitude"}
        return DoraWeights(rebuild(weights.direction, direction), parts["magnitude"])
    other = weights.with_parts(parts)
    other._check_parts()
    return other

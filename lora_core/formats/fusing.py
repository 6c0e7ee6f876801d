"""Fused modules from their members and back, exactly: the other direction of `fused.py`.

Two LoRAs of one input become one of the sum of their ranks: lora_A stacked, lora_B block-diagonal.
What a kind of weights cannot express is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from ..adapter.weights import (
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
)
from ..errors import ConfigError
from .fused import rebuild

Member = ModuleWeights | None
"""None where an adapter does not change a member."""
#: Class -> its parts with the rank as rows, and those with the rank as columns. The scale can go
#: into the first of the latter.
_SIDES: Mapping[type[ModuleWeights], tuple[tuple[str, ...], tuple[str, ...]]] = {
    LoraWeights: (("lora_A",), ("lora_B",)),
    LohaWeights: (("hada_w1_b", "hada_w2_b"), ("hada_w1_a", "hada_w2_a")),
}


def fuse_weights(members: Sequence[Member]) -> ModuleWeights:
    """One module whose delta is that of the members, below each other.

    Args:
        members: of equal numbers of rows; at least one is not None.

    Raises:
        ConfigError: these kinds have no exact common form; the text is a clause.
    """
    present = [weights for weights in members if weights is not None]
    kinds = sorted({weights.kind for weights in present})
    if len(kinds) > 1:
        raise ConfigError("its parts hold {kinds} weights", kinds=" and ".join(kinds))
    first = present[0]
    if isinstance(first, DoraWeights):
        return fuse_doras(members)
    if isinstance(first, OftWeights):
        return fuse_rotations(members)
    if isinstance(first, LokrWeights):
        fused: ModuleWeights = fuse_kroneckers(members)
    elif isinstance(first, DiffWeights):
        fused = fuse_diffs(members)
    else:
        fused = fuse_low_ranks(members)
    bias = stack_or_none(members, "bias_delta")
    return fused if bias is None else rebuild(fused, {**fused.parts, "bias_delta": bias})


def fuse_low_ranks(members: Sequence[Member]) -> ModuleWeights:
    """LoRA and LoHa. Members that share their inputs' factor keep the rank."""
    present = [weights for weights in members if weights is not None]
    downs, ups = _SIDES[type(present[0])]
    scales = {weights.scale for weights in present}
    if len(scales) == 1 and all(have_equal(present, name) for name in downs):
        parts = {name: present[0].need_part(name) for name in downs}
        parts |= {name: stack(members, name) for name in ups}
        return rebuild(drop_bias(present[0]), parts)
    parts = {name: torch.cat(unify([w.need_part(name) for w in present])) for name in downs}
    for name in ups:
        factors = [weights.need_part(name) for weights in present]
        if len(scales) > 1 and name == ups[0]:
            factors = [f.double() * w.scale for f, w in zip(factors, present, strict=True)]
            factors = narrow(factors, present[0].need_part(name).dtype)
        blocks = iter(unify(factors))
        parts[name] = build_block_diagonal([None if w is None else next(blocks) for w in members])
    scale = scales.pop() if len(scales) == 1 else 1.0
    fused = rebuild(drop_bias(present[0]), parts)
    return fused.with_alpha(scale * fused.rank)


def fuse_doras(members: Sequence[Member]) -> ModuleWeights:
    doras = [weights for weights in members if isinstance(weights, DoraWeights)]
    if len(doras) < len(members):
        raise ConfigError("only one of its parts holds a DoRA magnitude")
    magnitudes = [weights.magnitude for weights in doras]
    if any(m.numel() != w.out_features for m, w in zip(magnitudes, doras, strict=True)):
        raise ConfigError("its DoRA magnitudes are per input column")
    magnitude = torch.cat(unify([magnitude.flatten() for magnitude in magnitudes]))
    return DoraWeights(fuse_weights([weights.direction for weights in doras]), magnitude)


def fuse_diffs(members: Sequence[Member]) -> DiffWeights:
    diff = stack_or_none(members, "diff")
    return DiffWeights(diff, stack_or_none(members, "bias_delta"))


def fuse_kroneckers(members: Sequence[Member]) -> ModuleWeights:
    """kron(w1, w2) below kron(w1', w2) is kron of w1 below w1' and w2."""
    present = [weights for weights in members if weights is not None]
    names = {frozenset(weights.parts) - {"bias_delta"} for weights in present}
    if len(names) == 1 and len({weights.scale for weights in present}) == 1:
        parts = present[0].parts
        for factor, other in (("lokr_w1", "lokr_w2"), ("lokr_w2", "lokr_w1")):
            name = factor if factor in parts else f"{factor}_a"
            rest = [part for part in parts if part not in (name, "bias_delta")]
            is_outer = factor == "lokr_w1" or count_rows(parts, other) == 1
            if is_outer and all(have_equal(present, part) for part in rest):
                kept = {part: present[0].need_part(part) for part in rest}
                return rebuild(drop_bias(present[0]), {**kept, name: stack(members, name)})
    raise ConfigError("its parts are LoKr with different factors, which make no LoKr together")


def count_rows(parts: Mapping[str, object], factor: str) -> int:
    tensor = parts.get(factor, parts.get(f"{factor}_a"))
    assert isinstance(tensor, torch.Tensor) or hasattr(tensor, "shape")
    return tensor.shape[0]


def fuse_rotations(members: Sequence[Member]) -> OftWeights:
    found = [weights for weights in members if isinstance(weights, OftWeights)]
    if len(found) < len(members):
        raise ConfigError("only one of its parts holds a rotation")
    if any(weights.alpha for weights in found):
        raise ConfigError("its rotations have limits of their own")
    if len({weights.rank for weights in found}) > 1:
        raise ConfigError("its rotations have blocks of different sizes")
    blocks = torch.cat(unify([weights.need_part("blocks") for weights in found]))
    rescales = [weights.part("rescale") for weights in found]
    given = [rescale for rescale in rescales if rescale is not None]
    if given and len(given) < len(found):
        raise ConfigError("only one of its rotations has gains")
    rescale = torch.cat(unify([gain.reshape(-1, 1) for gain in given])) if given else None
    return OftWeights(blocks, rescale, bias_delta=stack_or_none(members, "bias_delta"))


def separate_ranks(members: Sequence[ModuleWeights]) -> list[ModuleWeights] | None:
    """The members without the columns that only others use, as before they were fused.

    Returns:
        None where they share their columns, as members that were trained fused do.
    """
    directions = [w.direction if isinstance(w, DoraWeights) else w for w in members]
    first = directions[0]
    if type(first) not in _SIDES or any(type(one) is not type(first) for one in directions):
        return None
    downs, ups = _SIDES[type(first)]
    if any(one.parts[name] is not first.parts[name] for one in directions for name in downs):
        return None
    used = [find_used_columns([one.need_part(name) for name in ups]) for one in directions]
    ranges = divide_columns(used)
    if ranges is None:
        return None
    return [
        take_columns(weights, columns, downs, ups)
        for weights, columns in zip(members, ranges, strict=True)
    ]


def find_used_columns(ups: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which columns of any of these factors are not zero throughout."""
    return torch.stack([(up.float() != 0).any(dim=0) for up in ups]).any(dim=0)


def divide_columns(used: Sequence[torch.Tensor]) -> list[slice] | None:
    """One range of columns for each member, below which the others have none; None without such.

    The ranges are equal where that fits: a column that was never trained is of no member.
    """
    rank = len(used[0])
    equal = [rank * i // len(used) for i in range(len(used) + 1)]
    last = [int(mask.nonzero().max()) + 1 if mask.any() else 0 for mask in used]
    for borders in (equal, [0, *last[:-1], rank]):
        ranges = [slice(a, b) for a, b in pairwise(borders)]
        if all(
            part.start < part.stop and mask.sum() == mask[part].sum() > 0
            for part, mask in zip(ranges, used, strict=True)
        ):
            return ranges
    return None


def take_columns(
    weights: ModuleWeights, columns: slice, downs: Sequence[str], ups: Sequence[str]
) -> ModuleWeights:
    parts = dict(weights.parts)
    parts.update({name: weights.need_part(name)[columns].contiguous() for name in downs})
    parts.update({name: weights.need_part(name)[:, columns].contiguous() for name in ups})
    taken = rebuild(weights, parts)
    return taken.with_alpha(weights.scale * taken.rank)


def drop_bias(weights: ModuleWeights) -> ModuleWeights:
    if "bias_delta" not in weights.parts:
        return weights
    return weights.with_parts({n: t for n, t in weights.parts.items() if n != "bias_delta"})


def have_equal(members: Sequence[ModuleWeights], name: str) -> bool:
    """Whether a part is the same tensor, or one of the same numbers, in all of them."""
    first = members[0].parts[name]
    return all(
        weights.parts[name] is first
        or (
            weights.parts[name].shape == first.shape
            and torch.equal(weights.need_part(name), members[0].need_part(name))
        )
        for weights in members[1:]
    )


def stack(members: Sequence[Member], name: str) -> torch.Tensor:
    """A part of all members below each other, zeros where there is no member."""
    stacked = stack_or_none(members, name)
    assert stacked is not None  # the callers' kinds have such a part
    return stacked


def stack_or_none(members: Sequence[Member], name: str) -> torch.Tensor | None:
    """The same for a part that some members, or all, may lack."""
    found = [None if weights is None else weights.part(name) for weights in members]
    present = [tensor for tensor in found if tensor is not None]
    if not present:
        return None
    tensors = iter(unify(present))
    zeros = torch.zeros_like(unify(present)[0])
    return torch.cat([zeros if tensor is None else next(tensors) for tensor in found])


def build_block_diagonal(blocks: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Zero rows for what is None; all blocks have one number of rows."""
    present = [block for block in blocks if block is not None]
    rows, columns = present[0].shape[0], sum(block.shape[1] for block in present)
    whole = torch.zeros(len(blocks) * rows, columns, dtype=present[0].dtype)
    column = 0
    for i, block in enumerate(blocks):
        if block is not None:
            whole[i * rows : (i + 1) * rows, column : column + block.shape[1]] = block
            column += block.shape[1]
    return whole


def unify(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All in one dtype: their own, or one that holds the numbers of every one."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    return [tensor.to(widest) for tensor in tensors]


def narrow(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """float64 numbers in `dtype` where that is exact, else in float32."""
    if all(torch.equal(tensor.to(dtype).double(), tensor) for tensor in tensors):
        return [tensor.to(dtype) for tensor in tensors]
    return [tensor.float() for tensor in tensors]

"""What a side path adds to one module's output, one class per kind of weights.

Legend: x (..., in) is the module's input, out (S, out) the part of its output that a term adds
to, in place; S is the number of rows of both. `tensors` are the site's fetched weights, in the
dtype of x; a term knows which are its own. `gains` has the strength of each member of the site.
Each kind adds with one fused scale-multiply-add kernel where the dtypes allow it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ...lora_core import DiffWeights, LohaWeights, LokrWeights, ModuleWeights


class Inputs(NamedTuple):
    """What a module's terms are computed from."""

    x: torch.Tensor
    hidden: torch.Tensor | None
    tensors: list[torch.Tensor]
    gains: tuple[float, ...]


class Term:
    """One summand of a site.

    Attributes:
        part, num_parts: which of the equal parts of the module's output it adds to.
        slots: indices of its tensors among those of the site.
    """

    part, num_parts = 0, 1
    slots: slice

    def add(self, out: torch.Tensor, inputs: Inputs) -> None:
        raise NotImplementedError


class MemberTerm(Term):
    """One of the kinds that run adapter by adapter."""

    def __init__(self, member: int, weights: Any):
        self.member = member

    @staticmethod
    def list_tensors(weights: Any) -> list[torch.Tensor]:
        raise NotImplementedError


class LowRankTerm(Term):
    """All plain LoRAs of a module: out += (hidden * gain) @ up.T with up (out, r).

    `hidden` (S, columns) is the down-product of all sites that share it; r columns from `start`
    are those of this term.

    Args:
        segments: (member, rank, scale) of each LoRA, in the order of its columns.
    """

    def __init__(self, start: int, segments: list[tuple[int, int, float]]):
        self.segments = segments
        self.start, self.rank = start, sum(rank for _, rank, _ in segments)
        self._gain: tuple[Any, float | torch.Tensor] | None = None

    def add(self, out: torch.Tensor, inputs: Inputs) -> None:
        assert inputs.hidden is not None  # a site with plain LoRAs has a down-product
        gain = self._get_gain(inputs.gains, inputs.hidden)
        (up,) = inputs.tensors[self.slots]
        hidden = inputs.hidden.narrow(1, self.start, self.rank)
        if isinstance(gain, float):
            if gain:
                accumulate(out, hidden, up, gain)
        else:
            accumulate(out, hidden * gain, up, 1.0)

    def _get_gain(self, gains: tuple[float, ...], like: torch.Tensor) -> float | torch.Tensor:
        """strength * scale: one number where all adapters agree, else one per rank, (r,)."""
        key = (gains, like.device, like.dtype)
        if self._gain is None or self._gain[0] != key:
            values = [gains[member] * scale for member, _, scale in self.segments]
            gain: float | torch.Tensor
            if len(set(values)) == 1:
                gain = float(values[0])
            else:
                ranks = [rank for _, rank, _ in self.segments]
                by_rank = [v for v, rank in zip(values, ranks, strict=True) for _ in range(rank)]
                gain = torch.tensor(by_rank, dtype=torch.float32).to(like.device, like.dtype)
            self._gain = (key, gain)
        return self._gain[1]


class KroneckerTerm(MemberTerm):
    """LoKr without building kron(w1, w2): w2 on groups of x, then w1 across the groups.

    w1 (a, m), w2 (b, n) with in = m * n, out = a * b.
    """

    def __init__(self, member: int, weights: LokrWeights):
        self.member, self.scale = member, weights.scale

    @staticmethod
    def list_tensors(weights: LokrWeights) -> list[torch.Tensor]:
        return [weights.factor("lokr_w1"), weights.factor("lokr_w2")]

    def add(self, out: torch.Tensor, inputs: Inputs) -> None:
        w1, w2 = inputs.tensors[self.slots]
        groups = inputs.x.reshape(len(out), w1.shape[1], -1)  # (S, m, n)
        h = F.linear(groups, w2).transpose(-1, -2)  # (S, m, b) -> (S, b, m)
        h = F.linear(h, w1).transpose(-1, -2).flatten(-2)  # (S, b, a) -> (S, a * b)
        out.add_(h, alpha=inputs.gains[self.member] * self.scale)


class HadamardTerm(MemberTerm):
    """LoHa: the product is not low-rank, so the delta is built for each call and then dropped."""

    def __init__(self, member: int, weights: LohaWeights):
        self.member, self.scale = member, weights.scale

    @staticmethod
    def list_tensors(weights: LohaWeights) -> list[torch.Tensor]:
        return [weights.need_part(name) for name in LohaWeights.NAMES]

    def add(self, out: torch.Tensor, inputs: Inputs) -> None:
        w1_a, w1_b, w2_a, w2_b = inputs.tensors[self.slots]
        gain = inputs.gains[self.member] * self.scale
        accumulate(out, inputs.x, (w1_a @ w1_b) * (w2_a @ w2_b), gain)


class DenseTerm(MemberTerm):
    """A whole delta, as ComfyUI's trainer stores some: (out, in)."""

    @staticmethod
    def list_tensors(weights: DiffWeights) -> list[torch.Tensor]:
        return [weights.need_part("diff")]

    def add(self, out: torch.Tensor, inputs: Inputs) -> None:
        (diff,) = inputs.tensors[self.slots]
        accumulate(out, inputs.x, diff, inputs.gains[self.member])


class BiasTerm(MemberTerm):
    """A change of the module's bias: (out,)."""

    @staticmethod
    def list_tensors(weights: ModuleWeights) -> list[torch.Tensor]:
        return [weights.need_part("bias_delta")]

    def add(self, out: torch.Tensor, inputs: Inputs) -> None:
        (diff,) = inputs.tensors[self.slots]
        out.add_(diff, alpha=inputs.gains[self.member])


def list_term_types(weights: ModuleWeights) -> list[type[MemberTerm]]:
    """The terms of one member, except plain LoRAs, which run together."""
    types: list[type[MemberTerm]] = []
    if isinstance(weights, LokrWeights):
        types.append(KroneckerTerm)
    elif isinstance(weights, LohaWeights):
        types.append(HadamardTerm)
    elif isinstance(weights, DiffWeights) and weights.shape is not None:
        types.append(DenseTerm)
    if "bias_delta" in weights.parts:
        types.append(BiasTerm)
    return types


def accumulate(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, alpha: float) -> None:
    """out += alpha * x @ weight.T with x (..., in) and out (S, out)."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if out.dtype == x.dtype:
        out.addmm_(x, weight.t(), alpha=alpha)
    else:
        out.add_(F.linear(x, weight), alpha=alpha)

"""The weights of a side path, one site per module of the base.

Legend: x (..., in) is what the module got, y (..., out) what it gave; r = sum of the ranks of all
plain LoRAs on the module, which run as one down and one up product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.nn import functional as F

from ..lora_core import (
    Adapter,
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
)
from . import host


class Bank(torch.nn.Module):
    """Sites of all modules that any of the adapters touches."""

    def __init__(self, contents: Iterable[tuple[Adapter, frozenset[str]]], dtype: torch.dtype):
        super().__init__()
        by_path: dict[str, list[tuple[int, ModuleWeights]]] = defaultdict(list)
        contents = tuple(contents)
        for index, (adapter, paths) in enumerate(contents):
            for path in paths:
                by_path[path].append((index, adapter.modules[path]))
        # Nodes run in inference mode; weights made there could not take part in a backward pass.
        with torch.inference_mode(False):
            self.sites = {path: Site(members, dtype) for path, members in by_path.items()}
        self.registered = torch.nn.ModuleList(self.sites.values())
        for adapter, _ in contents:
            adapter.release()


class Site(torch.nn.Module):
    """Everything that is added to one module's output."""

    def __init__(self, members: list[tuple[int, ModuleWeights]], dtype: torch.dtype):
        super().__init__()
        plain = [(i, w) for i, w in members if isinstance(w, LoraWeights)]
        terms: list[torch.nn.Module] = [LowRankTerm(plain, dtype)] if plain else []
        for index, weights in members:
            if isinstance(weights, LokrWeights):
                terms.append(KroneckerTerm(index, weights, dtype))
            elif isinstance(weights, LohaWeights):
                terms.append(HadamardTerm(index, weights, dtype))
            elif isinstance(weights, DiffWeights) and weights.shape is not None:
                terms.append(DenseTerm(index, weights, dtype))
            if "bias_delta" in weights.parts:
                terms.append(BiasTerm(index, weights, dtype))
        self.terms = torch.nn.ModuleList(terms)

    def add(self, y: torch.Tensor, x: torch.Tensor, gains: tuple[float, ...]) -> torch.Tensor:
        for term in self.terms:
            y = term.add(y, x, gains)
        return y


class LowRankTerm(torch.nn.Module):
    """All plain LoRAs of a module: y + (x @ down.T * gain) @ up.T, down (r, in), up (out, r)."""

    def __init__(self, members: list[tuple[int, LoraWeights]], dtype: torch.dtype):
        super().__init__()
        self.down = host.build_linear(torch.cat([w.lora_A.to(dtype) for _, w in members]))
        self.up = host.build_linear(torch.cat([w.lora_B.to(dtype) for _, w in members], dim=1))
        self.segments = [(index, weights.rank, weights.scale) for index, weights in members]
        self._gain: tuple | None = None

    def add(self, y: torch.Tensor, x: torch.Tensor, gains: tuple[float, ...]) -> torch.Tensor:
        gain = self._get_gain(gains, x)
        down, up = host.get_resident_weight(self.down, x), host.get_resident_weight(self.up, y)
        if down is None or up is None or x.dtype != y.dtype:
            return y + self.up(self.down(x) * gain).to(y.dtype)
        h = F.linear(x, down)  # (..., in) with (r, in) -> (..., r)
        scalar = 1.0
        if isinstance(gain, float):
            scalar = gain
        else:
            h = h * gain
        # One kernel scales, multiplies and adds; in place, as the base has just made y for us.
        y_2d, h_2d = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
        if torch.is_grad_enabled() and (y.requires_grad or h.requires_grad):
            return torch.addmm(y_2d, h_2d, up.t(), alpha=scalar).reshape(y.shape)
        return y_2d.addmm_(h_2d, up.t(), alpha=scalar).reshape(y.shape)

    def _get_gain(self, gains: tuple[float, ...], x: torch.Tensor) -> float | torch.Tensor:
        """strength * scale: one number where all adapters agree, else one per rank, (r,)."""
        key = (gains, x.device, x.dtype)
        if self._gain is None or self._gain[0] != key:
            values = [gains[index] * scale for index, _, scale in self.segments]
            if len(set(values)) == 1:
                gain = float(values[0])
            else:
                ranks = torch.tensor([rank for _, rank, _ in self.segments])
                gain = torch.tensor(values, dtype=torch.float32).repeat_interleave(ranks)
                gain = gain.to(x.device, x.dtype)
            self._gain = (key, gain)
        return self._gain[1]


class KroneckerTerm(torch.nn.Module):
    """LoKr without building kron(w1, w2): w2 on groups of x, then w1 across the groups.

    w1 (a, m), w2 (b, n) with in = m * n, out = a * b.
    """

    def __init__(self, index: int, weights: LokrWeights, dtype: torch.dtype):
        super().__init__()
        self.index, self.scale = index, weights.scale
        self.w1 = host.build_linear(weights.factor("lokr_w1").to(dtype, copy=True))
        self.w2 = host.build_linear(weights.factor("lokr_w2").to(dtype, copy=True))

    def add(self, y: torch.Tensor, x: torch.Tensor, gains: tuple[float, ...]) -> torch.Tensor:
        groups = x.unflatten(-1, (self.w1.weight.shape[1], -1))  # (..., m, n)
        h = self.w2(groups).transpose(-1, -2)  # (..., m, b) -> (..., b, m)
        h = self.w1(h).transpose(-1, -2).flatten(-2)  # (..., b, a) -> (..., a * b)
        return y + (h * (gains[self.index] * self.scale)).to(y.dtype)


class HadamardTerm(torch.nn.Module):
    """LoHa: the product is not low-rank, so the delta is built for the call and dropped again."""

    def __init__(self, index: int, weights: LohaWeights, dtype: torch.dtype):
        super().__init__()
        self.index, self.scale = index, weights.scale
        for name in weights.NAMES:
            setattr(self, name, host.build_linear(weights.part(name).to(dtype, copy=True)))

    def add(self, y: torch.Tensor, x: torch.Tensor, gains: tuple[float, ...]) -> torch.Tensor:
        w1_a, w1_b, w2_a, w2_b = (
            getattr(self, name).weight.to(x.device, x.dtype) for name in LohaWeights.NAMES
        )
        h = F.linear(x, (w1_a @ w1_b) * (w2_a @ w2_b))
        return y + (h * (gains[self.index] * self.scale)).to(y.dtype)


class DenseTerm(torch.nn.Module):
    """A whole delta, as ComfyUI's trainer stores some: (out, in)."""

    def __init__(self, index: int, weights: DiffWeights, dtype: torch.dtype):
        super().__init__()
        self.index = index
        self.diff = host.build_linear(weights.part("diff").to(dtype, copy=True))

    def add(self, y: torch.Tensor, x: torch.Tensor, gains: tuple[float, ...]) -> torch.Tensor:
        return y + (self.diff(x) * gains[self.index]).to(y.dtype)


class BiasTerm(torch.nn.Module):
    """A change of the module's bias: (out,)."""

    def __init__(self, index: int, weights: ModuleWeights, dtype: torch.dtype):
        super().__init__()
        self.index = index
        self.diff = torch.nn.Parameter(weights.bias_delta.to(dtype, copy=True), requires_grad=False)

    def add(self, y: torch.Tensor, x: torch.Tensor, gains: tuple[float, ...]) -> torch.Tensor:
        return y + self.diff.to(y.device, y.dtype) * gains[self.index]

"""A whole adapter: module paths and their weights, and what is known of the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch

from ..base_model.families import detect_family
from ..base_model.family import Family
from ..disk.safetensors_file import SafetensorsFile, load
from ..errors import NonFiniteWeightsError
from ..messages import message
from ..text import shorten
from .load_report import LoadReport
from .weights import ModuleWeights


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter: what `read_adapter` returns and `write_adapter` takes."""

    modules: Mapping[str, ModuleWeights]
    """Module path such as `transformer_blocks.12.attn.to_q` -> its weights."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    key_format: str = "comfyui"
    """Scheme of the keys it was read from, e.g. "kohya"; see `lora_core.formats`."""
    report: LoadReport = field(default_factory=LoadReport)
    name: str = "adapter"
    file: SafetensorsFile | None = None
    """The file that still holds the tensors, if they come from one."""

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(weights.kind for weights in self.modules.values())

    @property
    def family(self) -> str | None:
        """Name of the base models it fits, e.g. "qwen-image-2.1"; None where nothing tells."""
        return None if self.base_family is None else self.base_family.name

    @cached_property
    def base_family(self) -> Family | None:
        return detect_family_of(self.modules)

    def release(self) -> None:
        """Releases the mapping of the file; it is mapped again when needed."""
        if self.file is not None:
            self.file.release()

    def check_finite(self) -> None:
        """Reads every tensor once; NonFiniteWeightsError names the first ones with NaN or Inf,
        or the first module whose delta would have some.

        The result is cached, since an adapter never changes.
        """
        if self.__dict__.get("_finite"):
            return
        bad, beyond = [], None
        for path, weights in self.modules.items():
            exponents = read_exponents(weights)
            bad += [f"{path} ({part})" for part, found in exponents.items() if found is None]
            if beyond is None and not (bad or has_finite_delta(weights, exponents)):
                beyond = path
        if bad:
            more = (
                message(" and {num_bad} more tensors", num_bad=len(bad) - 1) if len(bad) > 1 else ""
            )
            raise NonFiniteWeightsError(
                "{name} holds NaN or Inf in {first}{more}; expected finite numbers. Its "
                "training diverged or the file is damaged: use an earlier checkpoint.",
                name=shorten(self.name),
                first=bad[0],
                more=more,
            )
        if beyond is not None:
            raise NonFiniteWeightsError(
                "{name}: the delta of {beyond} exceeds the range of float32, at alpha "
                "{alpha:g}; expected finite numbers. The file is damaged or its alpha is wrong: "
                "use an earlier checkpoint.",
                name=shorten(self.name),
                beyond=beyond,
                alpha=self.modules[beyond].alpha,
            )
        self.__dict__["_finite"] = True


def detect_family_of(modules: Mapping[str, ModuleWeights]) -> Family | None:
    """The family whose modules these are; see `families.detect_family`."""
    shapes = {path: weights.shape or (weights.out_features,) for path, weights in modules.items()}
    return detect_family(shapes)


#: dtype -> integer of its size, bits that are all set exactly in Inf and NaN (in NaN alone for
#: e4m3fn, which has no Inf), bits of the mantissa, bias of the exponent.
_BITS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 52, 1023),
    torch.float32: (torch.int32, 0x7F80_0000, 23, 127),
    torch.bfloat16: (torch.int16, 0x7F80, 7, 127),
    torch.float16: (torch.int16, 0x7C00, 10, 15),
    torch.float8_e4m3fn: (torch.int8, 0x7F, 3, 7),
    torch.float8_e5m2: (torch.int8, 0x7C, 2, 15),
}
#: Of an empty tensor, and of integers that are all 0.
_ZERO_EXPONENT = -1100
#: The largest number of float32 is below 2^128.
_MAX_EXPONENT = 128
#: Four entries below 2^8, three sums over the rank and the scale: below 2^(32 + 48 + 40).
_USUAL_EXPONENT, _USUAL_RANK, _USUAL_SCALE = 8, 1 << 16, float(1 << 40)


def is_finite(tensor: torch.Tensor) -> bool:
    return read_exponent(tensor) is not None


def read_exponent(tensor: torch.Tensor) -> int | None:
    """e such that every |entry| is below 2^e, about as small as possible; None for NaN or Inf.

    Looks at exponent bits through numpy: 0.1 s for an 849 MB file, torch.isfinite takes 20 s.
    """
    if tensor.numel() == 0:
        return _ZERO_EXPONENT
    if not tensor.dtype.is_floating_point:
        values = tensor.detach().cpu().numpy()
        largest = max(abs(int(values.max())), abs(int(values.min())))
        return largest.bit_length() if largest else _ZERO_EXPONENT
    if tensor.dtype not in _BITS:  # the other 8-bit ones, such as e8m0, are exact in float32
        tensor = tensor.float()
    integer, mask, mantissa, bias = _BITS[tensor.dtype]
    bits = tensor.detach().cpu().contiguous().view(integer).numpy()
    largest = int((bits & mask).max())
    return None if largest == mask else (largest >> mantissa) - bias + 1


def read_exponents(weights: ModuleWeights) -> dict[str, int | None]:
    return {part: read_exponent(load(tensor)) for part, tensor in weights.parts.items()}


def is_computable(weights: ModuleWeights) -> bool:
    """Whether the parts and, where it depends on them alone, the delta are finite in float32."""
    exponents = read_exponents(weights)
    return None not in exponents.values() and has_finite_delta(weights, exponents)


def has_finite_delta(weights: ModuleWeights, exponents: Mapping[str, int | None]) -> bool:
    """By an upper bound: |scale| times the largest entry of every factor times every rank."""
    if None in exponents.values():
        return False
    finite = cast("Mapping[str, int]", exponents)
    scale, largest = weights.scale, max(finite.values(), default=0)
    if largest <= _USUAL_EXPONENT and abs(scale) < _USUAL_SCALE and weights.rank < _USUAL_RANK:
        return True  # as nearly always: the bound below has at most four factors
    if largest > _MAX_EXPONENT:
        return False
    factors = [e for part, e in finite.items() if part not in ("bias_delta", "magnitude")]
    if not scale or _ZERO_EXPONENT in factors:
        return True
    # A product of n matrices has at most n - 1 sums over the rank.
    sums = max(len(factors) - 1, 0)
    bound = sum(factors) + math.log2(abs(scale)) + sums * math.log2(max(weights.rank, 1))
    return bound < _MAX_EXPONENT

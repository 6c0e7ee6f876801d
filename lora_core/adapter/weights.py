"""The weights of one module, one class per kind of adapter.

Legend: in = in_features, out = out_features of the module's Linear; r = rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from ..disk.safetensors_file import AnyTensor, load
from ..errors import EmptyPartError, ShapeError
from . import delta

if TYPE_CHECKING:
    from typing import Self

#: Of a module's weight. The largest of Qwen-Image has 57 million; a file of some kilobytes could
#: ask for terabytes.
MAX_ENTRIES = 1 << 28


class ModuleWeights(ABC):
    """One module's share of an adapter. Frozen; tensors are read from disk when asked for."""

    kind: ClassVar[str]
    #: The delta does not depend on the base weight, so it can run as a side path.
    is_additive: ClassVar[bool] = True

    def __init__(
        self,
        parts: Mapping[str, AnyTensor | None],
        alpha: float | None = None,
        bias_delta: AnyTensor | None = None,
    ):
        self._parts = {name: tensor for name, tensor in parts.items() if tensor is not None}
        if bias_delta is not None:
            self._parts["bias_delta"] = bias_delta
        self._alpha = alpha
        self._check_parts()

    def _check_parts(self) -> None:
        """Raises ShapeError if the parts do not fit each other, or no model has such a module."""
        for name, tensor in self._parts.items():
            if tensor.numel() == 0:
                raise EmptyPartError(
                    "{name} {tensor_shape} is empty. Sharded training (DeepSpeed ZeRO-3, FSDP) "
                    "saves such parts if they are not gathered: save the whole adapter",
                    name=name,
                    tensor_shape=tuple(tensor.shape),
                )
        self._check()
        self._check_bias()
        shape = self.shape
        if shape is not None and math.prod(shape) > MAX_ENTRIES:
            raise ShapeError(
                "its module would have {shape} entries; expected at most {max_entries:,}, several "
                "times the largest of Qwen-Image",
                shape=" x ".join(map(str, shape)),
                max_entries=MAX_ENTRIES,
            )

    @abstractmethod
    def _check(self) -> None:
        """Raises ShapeError if the parts do not fit each other."""

    def _check_bias(self) -> None:
        """Raises ShapeError for what would broadcast, or only fail while sampling.

        (1, out) and (out, 1) are refused too: ComfyUI adds a bias of exactly the module's shape
        and no other (comfy/lora.py, calculate_weight).
        """
        bias = self._parts.get("bias_delta")
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ShapeError(
                "its change of the bias is {bias_shape}; expected ({out_features},), one number "
                "for each output",
                bias_shape=tuple(bias.shape),
                out_features=self.out_features,
            )

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """(out, in) of the module's weight; None where the parts do not determine it."""

    @property
    def out_features(self) -> int:
        """out of the module; of a norm its length."""
        shape = self.shape
        assert shape is not None  # kinds without a shape say it themselves
        return shape[0]

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @abstractmethod
    def delta(self, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        """float32 (out, in); see `compute_delta`."""

    @property
    def alpha(self) -> float:
        """The scale's numerator; the rank where the file names none."""
        return float(self.rank) if self._alpha is None else self._alpha

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def parts(self) -> Mapping[str, AnyTensor]:
        """The tensors as stored, by their names in this package; may still be on disk."""
        return self._parts

    def part(self, name: str) -> torch.Tensor | None:
        tensor = self._parts.get(name)
        return None if tensor is None else load(tensor)

    def need_part(self, name: str) -> torch.Tensor:
        """A part without which these weights could not have been made."""
        return load(self._parts[name])

    @property
    def bias_delta(self) -> torch.Tensor | None:
        """(out,), added to the module's bias at strength 1."""
        return self.part("bias_delta")

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._parts.values())).dtype

    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self._parts.values())

    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in self._parts.values())

    def to(self, device: torch.device) -> Self:
        """The same weights with every tensor read and on `device`."""
        return self.with_parts({name: load(t).to(device) for name, t in self._parts.items()})

    def with_parts(self, parts: Mapping[str, AnyTensor]) -> Self:
        """The same weights in other tensors of the same names and shapes."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _parts=dict(parts))
        return other

    def with_alpha(self, alpha: float) -> Self:
        """The same tensors under another alpha."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _alpha=alpha)
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, rank={self.rank}, alpha={self.alpha:g})"


class LoraWeights(ModuleWeights):
    """delta = alpha / rank * lora_B @ lora_A, with lora_A (r, in) and lora_B (out, r)."""

    kind = "LoRA"

    def __init__(
        self,
        lora_A: AnyTensor,
        lora_B: AnyTensor,
        alpha: float | None = None,
        bias_delta: AnyTensor | None = None,
    ):
        super().__init__({"lora_A": lora_A, "lora_B": lora_B}, alpha, bias_delta)

    def _check(self) -> None:
        down, up = self._parts["lora_A"].shape, self._parts["lora_B"].shape
        check_product("lora_B", up, "lora_A", down)

    @property
    def lora_A(self) -> torch.Tensor:
        return self.need_part("lora_A")

    @property
    def lora_B(self) -> torch.Tensor:
        return self.need_part("lora_B")

    @property
    def rank(self) -> int:
        return self._parts["lora_A"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._parts["lora_B"].shape[0], self._parts["lora_A"].shape[1]

    def delta(self, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        return delta.low_rank(self.lora_A, self.lora_B, self.scale)


class LohaWeights(ModuleWeights):
    """delta = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b); w?_a (out, r), w?_b (r, in)."""

    kind = "LoHa"
    NAMES: ClassVar = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def __init__(
        self,
        hada_w1_a: AnyTensor,
        hada_w1_b: AnyTensor,
        hada_w2_a: AnyTensor,
        hada_w2_b: AnyTensor,
        alpha: float | None = None,
        bias_delta: AnyTensor | None = None,
    ):
        factors = (hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b)
        super().__init__(dict(zip(self.NAMES, factors, strict=True)), alpha, bias_delta)

    def _check(self) -> None:
        shapes = [self._parts[name].shape for name in self.NAMES]
        first = check_product("hada_w1_a", shapes[0], "hada_w1_b", shapes[1])
        second = check_product("hada_w2_a", shapes[2], "hada_w2_b", shapes[3])
        if first != second:
            raise ShapeError(
                "the two LoHa factors differ: {first} and {second}", first=first, second=second
            )

    @property
    def rank(self) -> int:
        return self._parts["hada_w1_b"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._parts["hada_w1_a"].shape[0], self._parts["hada_w1_b"].shape[1]

    def delta(self, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        w1_a, w1_b, w2_a, w2_b = map(self.need_part, self.NAMES)
        return delta.hadamard(w1_a, w1_b, w2_a, w2_b, self.scale)


class LokrWeights(ModuleWeights):
    """delta = scale * kron(w1, w2); each factor is whole, or a product such as w1_a @ w1_b.

    A whole factor takes precedence over its product, as in ComfyUI; the product is not kept.
    The scale is alpha over the inner dimension of the factorised factor, and 1 where both factors
    are whole: then LyCORIS and ai-toolkit write a meaningless alpha (1e10, or inf in fp16).
    """

    kind = "LoKr"

    def __init__(
        self,
        *,
        w1: AnyTensor | None = None,
        w1_a: AnyTensor | None = None,
        w1_b: AnyTensor | None = None,
        w2: AnyTensor | None = None,
        w2_a: AnyTensor | None = None,
        w2_b: AnyTensor | None = None,
        alpha: float | None = None,
        bias_delta: AnyTensor | None = None,
    ):
        factors = {"w1": w1, "w1_a": w1_a, "w1_b": w1_b, "w2": w2, "w2_a": w2_a, "w2_b": w2_b}
        for whole in ("w1", "w2"):
            if factors[whole] is not None:
                factors[f"{whole}_a"] = factors[f"{whole}_b"] = None
        parts = {f"lokr_{name}": tensor for name, tensor in factors.items()}
        super().__init__(parts, alpha, bias_delta)

    def _check(self) -> None:
        self._left, self._right = self._factor_shape("lokr_w1"), self._factor_shape("lokr_w2")

    def _factor_shape(self, name: str) -> tuple[int, int]:
        if name in self._parts:
            shape = self._parts[name].shape
            if len(shape) != 2:
                raise ShapeError(
                    "{name} is {shape}; expected two dimensions", name=name, shape=tuple(shape)
                )
            return shape[0], shape[1]
        a, b = self._parts.get(f"{name}_a"), self._parts.get(f"{name}_b")
        if a is None or b is None:
            raise ShapeError("{name} is missing, and so is one of its factors _a and _b", name=name)
        return check_product(f"{name}_a", a.shape, f"{name}_b", b.shape)

    @property
    def is_full(self) -> bool:
        return "lokr_w1" in self._parts and "lokr_w2" in self._parts

    @property
    def rank(self) -> int:
        """Inner dimension of the factorised factor; of w2 where both are (as LyCORIS scales)."""
        for name in ("lokr_w2_b", "lokr_w1_b"):
            if name in self._parts:
                return self._parts[name].shape[0]
        return min(self._right)

    @property
    def scale(self) -> float:
        return 1.0 if self.is_full else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self._left[0] * self._right[0], self._left[1] * self._right[1]

    def factor(self, name: str) -> torch.Tensor:
        """lokr_w1 or lokr_w2, multiplied out in float32 where it is stored as a product."""
        whole = self.part(name)
        if whole is not None:
            return whole
        a, b = delta.upcast_together(self.need_part(f"{name}_a"), self.need_part(f"{name}_b"))
        return a @ b

    def delta(self, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        return delta.kronecker(self.factor("lokr_w1"), self.factor("lokr_w2"), self.scale)


class DoraWeights(ModuleWeights):
    """A direction (LoRA, LoHa or LoKr) under a learned magnitude per output row or input column."""

    kind = "DoRA"
    is_additive = False

    def __init__(self, direction: ModuleWeights, magnitude: AnyTensor):
        self.direction = direction
        super().__init__({**direction.parts, "magnitude": magnitude}, direction._alpha)

    def _check(self) -> None:
        shape = self.direction.shape
        assert shape is not None  # a direction is a LoRA, LoHa or LoKr
        rows, columns = shape
        found = tuple(self._parts["magnitude"].shape)
        if found not in ((rows,), (rows, 1), (1, columns)):
            raise ShapeError(
                "the DoRA magnitude is {found}; expected ({rows},), ({rows}, 1) or (1, {columns})",
                found=found,
                rows=rows,
                columns=columns,
            )

    @property
    def magnitude(self) -> torch.Tensor:
        return self.need_part("magnitude")

    @property
    def rank(self) -> int:
        return self.direction.rank

    @property
    def scale(self) -> float:
        return self.direction.scale

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.direction.shape

    def with_parts(self, parts: Mapping[str, AnyTensor]) -> DoraWeights:
        direction = {name: tensor for name, tensor in parts.items() if name != "magnitude"}
        return DoraWeights(self.direction.with_parts(direction), parts["magnitude"])

    def with_alpha(self, alpha: float) -> DoraWeights:
        return DoraWeights(self.direction.with_alpha(alpha), self._parts["magnitude"])

    def delta(self, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        base_weight = delta.need_base_weight(base_weight, self.kind)
        return delta.apply_magnitude(self.direction.delta(), self.magnitude, base_weight)


class OftWeights(ModuleWeights):
    """delta = R^T W - W, with R made of blocks (num_blocks, size, size); alpha is a constraint."""

    kind = "OFT"
    is_additive = False

    def __init__(
        self,
        blocks: AnyTensor,
        rescale: AnyTensor | None = None,
        alpha: float | None = None,
        bias_delta: AnyTensor | None = None,
    ):
        super().__init__({"blocks": blocks, "rescale": rescale}, alpha, bias_delta)

    def _check(self) -> None:
        shape = self._parts["blocks"].shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ShapeError(
                "oft_blocks is {shape}; expected (blocks, size, size)", shape=tuple(shape)
            )
        rescale = self._parts.get("rescale")
        if rescale is not None and rescale.numel() != self.out_features:
            raise ShapeError(
                "rescale is {rescale_shape}; expected one gain for each of {out_features} rows",
                rescale_shape=tuple(rescale.shape),
                out_features=self.out_features,
            )

    @property
    def rank(self) -> int:
        return self._parts["blocks"].shape[1]

    @property
    def alpha(self) -> float:
        return self._alpha or 0.0

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def shape(self) -> None:
        return None

    @property
    def out_features(self) -> int:
        return self._parts["blocks"].shape[0] * self._parts["blocks"].shape[1]

    def delta(self, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        base_weight = delta.need_base_weight(base_weight, self.kind)
        return delta.rotate(self.need_part("blocks"), base_weight, self.alpha, self.part("rescale"))


class DiffWeights(ModuleWeights):
    """A whole delta, as ComfyUI's trainer stores it for norms (`.diff`) and biases (`.diff_b`)."""

    kind = "diff"

    def __init__(self, diff: AnyTensor | None = None, bias_delta: AnyTensor | None = None):
        super().__init__({"diff": diff}, None, bias_delta)

    def _check(self) -> None:
        for name, tensor in self._parts.items():
            if tensor.ndim == 0:
                raise ShapeError(
                    "{name} is a single number; expected a weight or a bias", name=name
                )

    @property
    def rank(self) -> int:
        return min(self._parts["diff"].shape) if "diff" in self._parts else 0

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def shape(self) -> tuple[int, ...] | None:
        return tuple(self._parts["diff"].shape) if "diff" in self._parts else None

    @property
    def out_features(self) -> int:
        return next(iter(self._parts.values())).shape[0]

    def delta(self, base_weight: torch.Tensor | None = None) -> torch.Tensor:
        diff = self.part("diff")
        if diff is not None:
            return delta.upcast(diff)
        return torch.zeros_like(delta.upcast(delta.need_base_weight(base_weight, "bias-only")))


def compute_delta(weights: ModuleWeights, base_weight: torch.Tensor | None = None) -> torch.Tensor:
    """What `weights` add to the base weight at strength 1.

    Args:
        base_weight: (out_features, in_features), any float dtype. Needed by the kinds whose delta
            depends on it (DoRA, OFT), ignored by the others.

    Returns:
        float32 (out_features, in_features).

    Raises:
        ConfigError: `base_weight` is missing where the kind needs it.
        ShapeError: `base_weight` has another shape than the delta.
    """
    if base_weight is not None and weights.shape not in (None, tuple(base_weight.shape)):
        raise ShapeError(
            "the weights are made for a module of {weights_shape}, but the model's is "
            "{base_weight_shape}; choose an adapter that was trained for this model",
            weights_shape=weights.shape,
            base_weight_shape=tuple(base_weight.shape),
        )
    return weights.delta(base_weight)


def check_product(
    left_name: str, left: torch.Size, right_name: str, right: torch.Size
) -> tuple[int, int]:
    """Shape of left @ right; a ShapeError if there is none."""
    if len(left) != 2 or len(right) != 2 or left[1] != right[0] or left[1] == 0:
        raise ShapeError(
            "{left_name} {left} and {right_name} {right} do not fit; expected (out_features, "
            "rank) and (rank, in_features) with one rank of at least 1",
            left_name=left_name,
            left=tuple(left),
            right_name=right_name,
            right=tuple(right),
        )
    return left[0], right[1]

"""From the keys of a module to its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import KeyFormatError, ShapeError
from ..report import shorten_list
from ..stored import AnyTensor, load
from ..weights import (
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
)
from .alpha import AlphaRules
from .parsed_key import ParsedKey
from .sources import ModuleParts

Get = Callable[[str], AnyTensor | None]


@dataclass(frozen=True)
class Kind:
    """What a kind of weights is made of."""

    build: Callable[[Get], ModuleWeights]
    needs: tuple[tuple[frozenset[str], ...], ...]
    """Each entry must be met; it lists alternatives, each a set of parts."""
    optional: frozenset[str] = frozenset()

    @property
    def parts(self) -> frozenset[str]:
        """The parts by which the kind is recognised."""
        return frozenset().union(*(parts for entry in self.needs for parts in entry))

    def is_complete(self, present: frozenset[str]) -> bool:
        return all(any(parts <= present for parts in entry) for entry in self.needs)


def needs_all(*parts: str) -> tuple[tuple[frozenset[str], ...], ...]:
    return tuple((frozenset({part}),) for part in parts)


def build_lora(get: Get) -> LoraWeights:
    return LoraWeights(get("lora_A"), get("lora_B"), bias_delta=get("diff_b"))


def build_loha(get: Get) -> LohaWeights:
    return LohaWeights(*(get(name) for name in LohaWeights.NAMES), bias_delta=get("diff_b"))


def build_lokr(get: Get) -> LokrWeights:
    names = [f"{factor}{part}" for factor in ("w1", "w2") for part in ("", "_a", "_b")]
    factors = {name: get(f"lokr_{name}") for name in names}
    return LokrWeights(**factors, bias_delta=get("diff_b"))


def build_oft(get: Get) -> OftWeights:
    return OftWeights(get("oft_blocks"), get("oft_rescale"), bias_delta=get("diff_b"))


def build_diff(get: Get) -> DiffWeights:
    return DiffWeights(get("diff"), get("diff_b"))


_DIRECTION = frozenset({"alpha", "magnitude", "diff_b"})
#: A module that has parts of several kinds is the first of them; the rest is reported as unused.
KINDS = (
    Kind(build_lora, needs_all("lora_A", "lora_B"), _DIRECTION | {"lora_B_bias"}),
    Kind(build_loha, needs_all(*LohaWeights.NAMES), _DIRECTION),
    Kind(
        build_lokr,
        tuple(
            (frozenset({f"lokr_{w}"}), frozenset({f"lokr_{w}_a", f"lokr_{w}_b"}))
            for w in ("w1", "w2")
        ),
        _DIRECTION,
    ),
    Kind(build_oft, needs_all("oft_blocks"), frozenset({"oft_rescale", "alpha", "diff_b"})),
    Kind(build_diff, ((frozenset({"diff"}), frozenset({"diff_b"})),)),
)


class ModuleBuilder:
    """Makes weights out of parts, and keeps what the report wants to know on the way."""

    def __init__(self, tensors: Mapping[str, AnyTensor], alpha_rules: AlphaRules, name: str):
        self._tensors = tensors
        self._alpha_rules = alpha_rules
        self._name = name
        self.rules: Counter[str] = Counter()
        self.unused: list[ParsedKey] = []
        self.non_finite: list[str] = []
        self._incomplete: list[str] = []

    def build_all(self, chosen: Mapping[str, ModuleParts]) -> dict[str, ModuleWeights]:
        """Every module that can be built.

        Raises:
            KeyFormatError: some module lacks a partner key. Half a module would be half a LoRA, so
                this is an error, not a warning.
            ShapeError: tensors of a module do not fit each other.
        """
        built = {path: self._build(path, parts) for path, parts in chosen.items()}
        if self._incomplete:
            raise KeyFormatError(
                f"{self._name} is incomplete: {shorten_list(self._incomplete, 2)}, without the "
                "partner keys. It was cut or saved wrongly: download or export it again."
            )
        return {path: weights for path, weights in built.items() if weights is not None}

    def _build(self, module_path: str, parts: ModuleParts) -> ModuleWeights | None:
        """The module's weights; None where its parts are too few, which is noted."""
        present = frozenset(parts.keys)
        kind = next((kind for kind in KINDS if present & kind.parts), None)
        if kind is None:  # an alpha or a magnitude alone changes nothing
            self.unused += parts.keys.values()
            return None
        if not kind.is_complete(present):
            found = ", ".join(key.key for key in parts.keys.values())
            self._incomplete.append(f"{module_path} has only {found}")
            return None
        used = kind.parts | kind.optional
        self.unused += [key for part, key in parts.keys.items() if part not in used]

        def get(part: str) -> AnyTensor | None:
            return parts.get(self._tensors, part) if part in used else None

        try:
            return self._scale(module_path, kind.build(get), get)
        except ShapeError as e:
            raise ShapeError(f"{self._name}, {module_path}: {e}. The file is damaged.") from None

    def _scale(self, module_path: str, weights: ModuleWeights, get: Get) -> ModuleWeights:
        """Adds what depends on alpha, and the DoRA magnitude around it."""
        if isinstance(weights, DiffWeights):
            return weights
        weights = self._with_alpha(module_path, weights, get("alpha"))
        if get("lora_B_bias") is not None:
            # PEFT's lora_bias: scale * (lora_B(h) + bias), see peft/tuners/lora/layer.py.
            bias = weights.scale * load(get("lora_B_bias")).float()
            weights = LoraWeights(get("lora_A"), get("lora_B"), weights.alpha, bias)
        magnitude = get("magnitude")
        return weights if magnitude is None else DoraWeights(weights, magnitude)

    def _with_alpha(
        self, module_path: str, weights: ModuleWeights, tensor: AnyTensor | None
    ) -> ModuleWeights:
        if isinstance(weights, LokrWeights) and weights.is_full:
            self.rules["fixed (both LoKr factors whole)"] += 1
            return weights
        stored = None
        if tensor is not None:
            if tensor.numel() != 1:
                raise ShapeError(f"alpha is {tuple(tensor.shape)}; expected a single number")
            stored = float(load(tensor).item())
        if isinstance(weights, OftWeights) and stored is None:
            self.rules["none (OFT without constraint)"] += 1
            return weights
        alpha, rule, replaced = self._alpha_rules.resolve(module_path, weights.rank, stored)
        self.rules[rule] += 1
        if replaced:
            self.non_finite.append(module_path)
        return weights if alpha is None else weights.with_alpha(alpha)

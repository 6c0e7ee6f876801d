"""From the keys of a module to its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..adapter.delta import upcast
from ..adapter.weights import (
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
)
from ..base_model import families
from ..base_model.family import Fusion
from ..disk.safetensors_file import AnyTensor, load
from ..errors import EmptyPartError, KeyFormatError, ShapeError
from ..messages import message
from ..text import shorten, shorten_list
from .alpha import AlphaRules
from .fused import get_fusion, split_weights
from .parsed_key import ParsedKey, name_scheme
from .sources import ModuleParts

Parts = Mapping[str, AnyTensor]
"""A module's tensors by part, of those its kind has a use for."""


NO_PARTS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Kind:
    """What a kind of weights is made of."""

    build: Callable[[Parts], ModuleWeights]
    needs: tuple[tuple[frozenset[str], ...], ...]
    """Each entry must be met; it lists alternatives, each a set of parts, and the first that is
    complete is used."""
    optional: frozenset[str] = frozenset()

    @cached_property
    def parts(self) -> frozenset[str]:
        """The parts by which the kind is recognised."""
        return frozenset().union(*(parts for entry in self.needs for parts in entry))

    @cached_property
    def has_alternatives(self) -> bool:
        return any(len(entry) > 1 for entry in self.needs)

    def is_complete(self, present: frozenset[str]) -> bool:
        return all(any(parts <= present for parts in entry) for entry in self.needs)

    def list_surplus(self, present: frozenset[str]) -> frozenset[str]:
        """Parts of a complete module that are not used, since an earlier alternative is there."""
        if not self.has_alternatives:
            return NO_PARTS
        used = (next(parts for parts in entry if parts <= present) for entry in self.needs)
        return (self.parts & present) - self.optional.union(*used)


def needs_all(*parts: str) -> tuple[tuple[frozenset[str], ...], ...]:
    return tuple((frozenset({part}),) for part in parts)


def build_lora(parts: Parts) -> LoraWeights:
    return LoraWeights(parts["lora_A"], parts["lora_B"], bias_delta=parts.get("diff_b"))


def build_loha(parts: Parts) -> LohaWeights:
    w1_a, w1_b, w2_a, w2_b = (parts[name] for name in LohaWeights.NAMES)
    return LohaWeights(w1_a, w1_b, w2_a, w2_b, bias_delta=parts.get("diff_b"))


def build_lokr(parts: Parts) -> LokrWeights:
    return LokrWeights(
        w1=parts.get("lokr_w1"),
        w1_a=parts.get("lokr_w1_a"),
        w1_b=parts.get("lokr_w1_b"),
        w2=parts.get("lokr_w2"),
        w2_a=parts.get("lokr_w2_a"),
        w2_b=parts.get("lokr_w2_b"),
        bias_delta=parts.get("diff_b"),
    )


def build_oft(parts: Parts) -> OftWeights:
    return OftWeights(parts["oft_blocks"], parts.get("oft_rescale"), bias_delta=parts.get("diff_b"))


def build_diff(parts: Parts) -> DiffWeights:
    return DiffWeights(parts.get("diff"), parts.get("diff_b"))


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
    Kind(build_diff, ((frozenset({"diff"}), frozenset({"diff_b"})),), frozenset({"diff_b"})),
)


#: Schemes whose OFT has alpha in units of out_features (LyCORIS' diag_oft.py, kohya's oft.py).
#: Under the others alpha is the limit itself, as ComfyUI's own trainer saves it.
RELATIVE_OFT = ("kohya", "lycoris", "onetrainer")
BOFT = message("BOFT, which is not supported; use ComfyUI's LoraLoader")
#: Of an example in a message that has two.
MAX_EXAMPLE = 130
NO_USE = message("has no use in a module of this kind")
REPLACED = message("is a part of a factor that is also there whole, which is used")
NO_RANK = message("depends on its module's LoRA, which has rank 0")
NO_BIAS = message("changes a bias, and Qwen-Image's norms have none")


class ModuleBuilder:
    """Builds weights from parts, and records what the report needs."""

    def __init__(self, tensors: Mapping[str, AnyTensor], alpha_rules: AlphaRules, name: str):
        self._tensors = tensors
        self._alpha_rules = alpha_rules
        self._name = shorten(name)
        self.rules: Counter[str] = Counter()
        self.unused: list[tuple[ParsedKey, str]] = []
        """Keys without a use, each with the reason."""
        self.non_finite: list[str] = []
        self.empty: list[str] = []
        """Modules whose LoRA has rank 0 and adds nothing."""
        self.num_split: Counter[Fusion] = Counter()
        """How many fused modules of each kind were split."""
        self.repeated: list[str] = []
        """Modules that a fused one holds and that are also present on their own."""
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
            shown = [shorten(text, MAX_EXAMPLE) for text in self._incomplete]
            raise KeyFormatError(
                "{name} is incomplete: {shown}, without the partner keys. It was cut or saved "
                "wrongly: download or export it again.",
                name=self._name,
                shown=shorten_list(shown, 2),
            )
        modules = {path: weights for path, weights in built.items() if weights is not None}
        for path in [path for path in modules if families.is_fused(path)]:
            self._split(path, modules, chosen[path])
        return modules

    def _split(self, path: str, modules: dict[str, ModuleWeights], parts: ModuleParts) -> None:
        """Replaces a fused module by the modules it holds."""
        members = families.list_members(path)
        split = split_weights(modules.pop(path), len(members))
        if split is None:
            title = get_fusion(path).title
            self._leave_out(
                parts, message("fuses {title} in a way that cannot be split", title=title)
            )
            return
        self.num_split[get_fusion(path)] += 1
        for member, weights in zip(members, split, strict=True):
            if member in modules:
                self.repeated.append(member)
            else:
                modules[member] = weights

    def _build(self, module_path: str, parts: ModuleParts) -> ModuleWeights | None:
        """The module's weights; None where parts are missing, which is recorded."""
        if "diff_b" in parts.keys and families.is_norm(module_path):
            self.unused.append((parts.keys["diff_b"], NO_BIAS))
            kept = {part: key for part, key in parts.keys.items() if part != "diff_b"}
            if not kept:
                return None
            parts = replace(parts, keys=kept)
        present = frozenset(parts.keys)
        kind = next((kind for kind in KINDS if present & kind.parts), None)
        if kind is None:  # an alpha or a magnitude alone changes nothing
            self._leave_out(parts, NO_USE)
            return None
        if not kind.is_complete(present) and families.is_fused(module_path):
            title = get_fusion(module_path).title
            self._leave_out(
                parts, message("fuses {title}, and its partner keys are missing", title=title)
            )
            return None
        if not kind.is_complete(present):
            found = ", ".join(shorten(key.key) for key in parts.keys.values())
            self._incomplete.append(
                message("{module_path} has only {found}", module_path=module_path, found=found)
            )
            return None
        used = kind.parts | kind.optional
        tensors = {part: self._tensors[key.key] for part, key in parts.keys.items() if part in used}
        if "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 4:
            self._leave_out(parts, BOFT)
            return None
        surplus = kind.list_surplus(present)
        self.unused += [(key, REPLACED) for part, key in parts.keys.items() if part in surplus]
        self.unused += [(key, NO_USE) for part, key in parts.keys.items() if part not in used]
        tensors = {part: tensor for part, tensor in tensors.items() if part not in surplus}
        try:
            if is_empty(tensors.get("lora_A"), tensors.get("lora_B")):
                return self._build_without_rank(module_path, parts)
            return self._scale(module_path, kind.build(tensors), tensors, parts.keys.get("alpha"))
        except EmptyPartError as e:
            raise EmptyPartError(
                "{name}, {module_path}: {error}.", name=self._name, module_path=module_path, error=e
            ) from None
        except ShapeError as e:
            raise ShapeError(
                "{name}, {module_path}: {error}. The file is damaged.",
                name=self._name,
                module_path=module_path,
                error=e,
            ) from None

    def _build_without_rank(self, module_path: str, parts: ModuleParts) -> DiffWeights | None:
        """What is left where the LoRA has rank 0: the change of the bias, if there is one."""
        self.empty.append(module_path)
        dependent = ("magnitude", "lora_B_bias")
        self.unused += [(key, NO_RANK) for part, key in parts.keys.items() if part in dependent]
        bias = parts.get(self._tensors, "diff_b")
        return None if bias is None else DiffWeights(None, bias)

    def _leave_out(self, parts: ModuleParts, reason: str) -> None:
        self.unused += [(key, reason) for key in parts.keys.values()]

    def _scale(
        self, module_path: str, weights: ModuleWeights, tensors: Parts, alpha: ParsedKey | None
    ) -> ModuleWeights:
        """Adds what depends on alpha, and the DoRA magnitude around it."""
        if isinstance(weights, DiffWeights):
            return weights
        weights = self._with_alpha(module_path, weights, alpha)
        if "lora_B_bias" in tensors:
            # PEFT's lora_bias: scale * (lora_B(h) + bias), see peft/tuners/lora/layer.py.
            bias = weights.scale * load(tensors["lora_B_bias"]).float()
            own = weights.bias_delta  # of the same shape, or the next line raises
            weights = LoraWeights(tensors["lora_A"], tensors["lora_B"], weights.alpha, bias)
            if own is not None:  # both act: ComfyUI adds the one, PEFT the other
                weights = weights.with_parts({**weights.parts, "bias_delta": bias + own.float()})
        magnitude = tensors.get("magnitude")
        return weights if magnitude is None else DoraWeights(weights, magnitude)

    def _with_alpha(
        self, module_path: str, weights: ModuleWeights, key: ParsedKey | None
    ) -> ModuleWeights:
        if isinstance(weights, LokrWeights) and weights.is_full:
            return self._with_whole_factors(module_path, weights)
        stored = None
        if key is not None:
            tensor = self._tensors[key.key]
            if tensor.numel() != 1:
                raise ShapeError(
                    "alpha is {tensor_shape}; expected a single number",
                    tensor_shape=tuple(tensor.shape),
                )
            stored = float(load(tensor).item())
        if isinstance(weights, OftWeights):
            if stored is None:
                self.rules[message("none (OFT without constraint)")] += 1
                return weights
            if key is not None and name_scheme(key.prefix) in RELATIVE_OFT:
                stored *= weights.out_features
        alpha, rule, replaced = self._alpha_rules.resolve(module_path, weights.rank, stored)
        self.rules[rule] += 1
        if replaced:
            self.non_finite.append(module_path)
        return weights if alpha is None else weights.with_alpha(alpha)

    def _with_whole_factors(self, module_path: str, weights: LokrWeights) -> LokrWeights:
        """LyCORIS ignores alpha here; PEFT scales by the config's alpha and rank all the same."""
        config = self._alpha_rules.config
        if config is None or not config.is_lycoris:
            self.rules[message("fixed (both LoKr factors whole)")] += 1
            return weights
        rank = config.resolve_rank(module_path)
        alpha, rule, replaced = self._alpha_rules.resolve(module_path, rank or 1, None)
        self.rules[rule] += 1
        if replaced:
            self.non_finite.append(module_path)
        if alpha is None or not rank or alpha == rank:
            return weights
        scaled = upcast(load(weights.parts["lokr_w1"])) * (alpha / rank)
        return weights.with_parts({**weights.parts, "lokr_w1": scaled})


def is_empty(lora_A: AnyTensor | None, lora_B: AnyTensor | None) -> bool:
    """Whether the two are of rank 0, as pruning leaves them: whole, and without effect."""
    if lora_A is None or lora_B is None or lora_A.ndim != 2 or lora_B.ndim != 2:
        return False
    return lora_A.shape[0] == lora_B.shape[1] == 0 < min(lora_A.shape[1], lora_B.shape[0])

"""From keys to modules: groups a state dict, chooses between duplicates, builds the weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .. import targets
from ..adapter import (
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
)
from ..errors import KeyFormatError, ShapeError
from ..report import DroppedKey, LoadReport, shorten_list
from ..stored import AnyTensor, load
from .alpha import AlphaRules, find_alpha_rules
from .architectures import detect_architecture, detect_variants
from .parsed_key import UNKNOWN_ENDING, ParsedKey, UnknownKey, name_scheme, parse_key

#: Parts that make a module, in the order in which a module's kind is decided.
_KIND_PARTS = (
    ("LoRA", frozenset({"lora_A", "lora_B"})),
    ("LoHa", frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})),
    ("LoKr", frozenset({f"lokr_{f}{p}" for f in ("w1", "w2") for p in ("", "_a", "_b")})),
    ("OFT", frozenset({"oft_blocks"})),
    ("diff", frozenset({"diff", "diff_b"})),
)


@dataclass
class ModuleParts:
    """The keys of one module from one source (prefix and adapter name)."""

    prefix: str
    adapter_name: str | None
    keys: dict[str, ParsedKey] = field(default_factory=dict)

    def get(self, tensors: Mapping[str, AnyTensor], part: str) -> AnyTensor | None:
        key = self.keys.get(part)
        return None if key is None else tensors[key.key]


def read_modules(
    tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str], path: Path | None, name: str
) -> tuple[dict[str, ModuleWeights], str, LoadReport]:
    """Builds the weights of every module found in `tensors`.

    Returns:
        module path -> weights, the name of the key format, and the report.

    Raises:
        KeyFormatError: no key is of a Qwen-Image module, or a module lacks a partner key.
        ShapeError: the tensors of a module do not fit each other.
    """
    parsed, unknown = parse_keys(tensors)
    check_any_known(parsed, unknown, name)
    chosen, duplicates = choose_sources(parsed)
    formats = Counter(name_scheme(key.prefix) for key in parsed)
    alpha_rules = find_alpha_rules(metadata, path, is_peft="peft" in formats)
    builder = ModuleBuilder(tensors, alpha_rules, name)
    modules = builder.build_all(chosen)
    if not modules:
        raise_unrecognised(unknown, len(tensors), name)
    dropped_parts = {key.key for key in builder.unused}
    key_format = formats.most_common(1)[0][0]
    variants, hints = detect_variants(dict(metadata), name)
    report = LoadReport(
        name=name,
        num_keys=len(tensors),
        num_matched_keys=len(parsed) - len(duplicates) - len(dropped_parts),
        num_modules=len(modules),
        size_bytes=sum(t.numel() * t.dtype.itemsize for t in tensors.values()),
        key_format=key_format if len(formats) == 1 else f"mixed: {', '.join(sorted(formats))}",
        prefixes=count(key.prefix for key in parsed),
        kinds=count(weights.kind for weights in modules.values()),
        dtypes=count(str(w.dtype).removeprefix("torch.") for w in modules.values()),
        ranks=count(weights.rank for weights in modules.values() if weights.kind != "diff"),
        scales=count(weights.scale for weights in modules.values()),
        alphas=count(weights.alpha for weights in modules.values() if weights.kind != "diff"),
        alpha_rules=dict(builder.rules),
        preset=targets.detect_preset(modules),
        blocks=targets.format_blocks(
            block for block, _ in map(targets.split_path, modules) if block is not None
        ),
        width=find_width(modules),
        unmatched=tuple(
            [DroppedKey(key.key, key.reason, key.nearest) for key in unknown]
            + [DroppedKey(key.key, "has no use in a module of this kind") for key in builder.unused]
        ),
        duplicates=tuple(DroppedKey(key.key, f"also in {by}") for key, by in duplicates),
        non_finite=tuple(builder.non_finite),
        variants=tuple(variants),
        hints=tuple(hints),
    )
    return modules, key_format, report


def count(values: Iterable[Any]) -> dict[Any, int]:
    """A plain dict, which dataclasses.asdict copies; it breaks a Counter."""
    return dict(Counter(values))


def parse_keys(keys: Iterable[str]) -> tuple[list[ParsedKey], list[UnknownKey]]:
    parsed, unknown = [], []
    for key in keys:
        result = parse_key(key)
        (parsed if isinstance(result, ParsedKey) else unknown).append(result)
    return parsed, unknown


def check_any_known(parsed: list[ParsedKey], unknown: list[UnknownKey], name: str) -> None:
    """Raises unless some key is Qwen-Image's and none betrays another model."""
    total = len(parsed) + len(unknown)
    if total == 0:
        raise KeyFormatError(f"{name} holds no tensors; expected a LoRA for Qwen-Image-Edit.")
    foreign = detect_architecture(key.key for key in unknown)
    if any("_m" in key.module_path for key in parsed):
        foreign = None  # img_mlp, txt_mod and the like exist in Qwen-Image only
    if parsed and not (foreign and "text encoder" not in foreign):
        return
    if foreign:
        matched = f"shares {len(parsed)} of {total} keys with" if parsed else "matches 0 modules of"
        raise KeyFormatError(
            f"{name} {matched} Qwen-Image: its keys are those of {foreign}, such as "
            f"{unknown[0].key!r}. Choose a LoRA trained for Qwen-Image or Qwen-Image-Edit."
        )
    raise_unrecognised(unknown, total, name)


def raise_unrecognised(unknown: list[UnknownKey], total: int, name: str) -> NoReturn:
    near = next((key for key in unknown if key.nearest), None)
    hint = f" The nearest known form is {near.nearest!r}." if near else ""
    full_model = any(key.key.endswith((".weight", ".bias")) for key in unknown) and all(
        key.reason == UNKNOWN_ENDING and "lora" not in key.key.lower() for key in unknown
    )
    if full_model:
        what = "These look like whole model weights, not an adapter."
    elif unknown:
        what = f"{unknown[0].key!r}: {unknown[0].reason}."
    else:
        what = "Only alphas or magnitudes are left of it."
    raise KeyFormatError(
        f"{name} matches 0 modules of Qwen-Image with its {total} keys. {what}{hint} "
        "Expected keys such as 'transformer_blocks.0.attn.to_q.lora_A.weight'."
    )


def choose_sources(
    parsed: list[ParsedKey],
) -> tuple[dict[str, ModuleParts], list[tuple[ParsedKey, str]]]:
    """One source per module; where a file names a module twice, the file's main source wins.

    Returns:
        module path -> parts, and the keys left out, each with the source that was kept.
    """
    grouped: dict[str, dict[tuple[str, str | None], ModuleParts]] = defaultdict(dict)
    unnamed: list[ParsedKey] = []
    # Sorted, a module spelled both ways takes lora_A and lora_B, never one of them and lora_up.
    for key in sorted(parsed, key=lambda key: key.key):
        if key.adapter_name is None and key.part in ("alpha", "magnitude"):
            unnamed.append(key)
            continue
        source = (key.prefix, key.adapter_name)
        parts = grouped[key.module_path].setdefault(source, ModuleParts(*source))
        parts.keys.setdefault(key.part, key)
    for key in unnamed:  # these belong to every adapter name under the same prefix
        same = [p for p in grouped[key.module_path].values() if p.prefix == key.prefix]
        for parts in same or [
            grouped[key.module_path].setdefault((key.prefix, None), ModuleParts(key.prefix, None))
        ]:
            parts.keys.setdefault(key.part, key)
    popularity = Counter(source for sources in grouped.values() for source in sources)
    chosen, duplicates = {}, []
    for module_path, sources in grouped.items():
        order = sorted(sources, key=lambda s: (-popularity[s], s[1] != "default", s[0], s[1] or ""))
        kept = chosen[module_path] = sources[order[0]]
        used = {key.key for key in kept.keys.values()}
        where = f"{kept.prefix or 'keys without prefix'}{module_path}" + (
            f" ({kept.adapter_name})" if kept.adapter_name else ""
        )
        for source in order[1:]:
            for key in sources[source].keys.values():
                if key.key not in used:
                    used.add(key.key)  # an alpha may belong to several sources
                    duplicates.append((key, where))
    placed = {key.key for parts in chosen.values() for key in parts.keys.values()}
    placed.update(key.key for key, _ in duplicates)
    for key in parsed:  # the same part twice under one source, e.g. lora_A beside lora_down
        if key.key not in placed:
            kept_key = chosen[key.module_path].keys.get(key.part)
            duplicates.append((key, kept_key.key if kept_key else "another key"))
    return chosen, duplicates


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
        """
        built = {
            module_path: self.build(module_path, parts) for module_path, parts in chosen.items()
        }
        if self._incomplete:
            raise KeyFormatError(
                f"{self._name} is incomplete: {shorten_list(self._incomplete, 2)}, without the "
                "partner keys. It was cut or saved wrongly: download or export it again."
            )
        return {path: weights for path, weights in built.items() if weights is not None}

    def build(self, module_path: str, parts: ModuleParts) -> ModuleWeights | None:
        """The module's weights; None where its parts are too few, which is noted."""
        present = set(parts.keys)
        kind = next((kind for kind, names in _KIND_PARTS if present & names), None)
        if kind is None:  # an alpha or a magnitude alone changes nothing
            self.unused += parts.keys.values()
            return None
        try:
            weights = self._build_kind(kind, module_path, parts)
        except ShapeError as e:
            raise ShapeError(f"{self._name}, {module_path}: {e}. The file is damaged.") from None
        if weights is None:
            found = ", ".join(key.key for key in parts.keys.values())
            self._incomplete.append(f"{module_path} has only {found}")
        return weights

    def _build_kind(self, kind: str, module_path: str, parts: ModuleParts) -> ModuleWeights | None:
        def get(part: str) -> AnyTensor | None:
            return parts.get(self._tensors, part)

        used = {"alpha", "magnitude", "diff_b"}
        bias_delta = get("diff_b")
        if kind == "LoRA":
            used |= {"lora_A", "lora_B", "lora_B_bias"}
            if "lora_A" not in parts.keys or "lora_B" not in parts.keys:
                return None
            weights = LoraWeights(get("lora_A"), get("lora_B"), None, bias_delta)
        elif kind == "LoHa":
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            used |= set(names)
            if not set(names) <= set(parts.keys):
                return None
            weights = LohaWeights(*(get(name) for name in names), None, bias_delta)
        elif kind == "LoKr":
            names = [f"{f}{p}" for f in ("w1", "w2") for p in ("", "_a", "_b")]
            used |= {f"lokr_{name}" for name in names}
            if not all(
                f"lokr_{w}" in parts.keys or {f"lokr_{w}_a", f"lokr_{w}_b"} <= set(parts.keys)
                for w in ("w1", "w2")
            ):
                return None
            weights = LokrWeights(
                **{name: get(f"lokr_{name}") for name in names}, bias_delta=bias_delta
            )
        elif kind == "OFT":
            used |= {"oft_blocks", "oft_rescale"}
            weights = OftWeights(get("oft_blocks"), get("oft_rescale"), None, bias_delta)
        else:
            used = {"diff", "diff_b"}
            weights = DiffWeights(get("diff"), bias_delta)
            self.unused += [key for part, key in parts.keys.items() if part not in used]
            return weights
        self.unused += [key for part, key in parts.keys.items() if part not in used]
        weights = self._with_alpha(module_path, weights, get("alpha"))
        if get("lora_B_bias") is not None:
            # PEFT's lora_bias: scale * (lora_B(h) + bias), see peft/tuners/lora/layer.py.
            bias = weights.scale * load(get("lora_B_bias")).float()
            weights = LoraWeights(get("lora_A"), get("lora_B"), weights.alpha, bias)
        magnitude = get("magnitude")
        if magnitude is None:
            return weights
        if kind == "OFT":
            self.unused.append(parts.keys["magnitude"])
            return weights
        return DoraWeights(weights, magnitude)

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


def find_width(modules: Mapping[str, ModuleWeights]) -> int | None:
    """Width of the model the adapter was made for, from the first module that tells."""
    for module_path, weights in modules.items():
        block, name = targets.split_path(module_path)
        if block is not None and name in targets.BLOCK_LINEARS and weights.shape is not None:
            return weights.shape[0] // targets.compute_shape(name, 1)[0]
    return None

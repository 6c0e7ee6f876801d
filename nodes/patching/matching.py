"""Which modules of a MODEL an adapter matches, and how each can be applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...lora_core import Adapter, KeyFormatError, ModuleWeights, ShapeError, TargetError
from ...lora_core.base_model.families import FAMILIES, detect_by_names
from ...lora_core.base_model.family import Family
from ...lora_core.base_model.module_paths import split_path
from ...lora_core.messages import message
from .. import host
from ..host import Place
from .layouts import Layout, find_layout


@dataclass(frozen=True)
class Match:
    """The adapter's modules, sorted by how they can be applied to this model."""

    side_path: frozenset[str]
    """Additive weights on a Linear: these can run beside the base."""
    merge_only: Mapping[str, str]
    """Module path -> why it can only be merged."""
    absent: tuple[str, ...]
    """In the adapter, not in the model."""
    out_of_reach: Mapping[str, str]
    """Module path -> why this model's module can be served in no way."""
    unmergeable: Mapping[str, str]
    """Module path -> why it can run beside the base and not be merged."""
    family: Family | None
    """That of the model."""
    layout: Layout
    storage: str
    """How the model stores most of its weights, e.g. "float8_e4m3fn"."""
    rounded: Mapping[str, str]
    """Module path -> how the model stores its weight, where a merged one is rounded to less than
    16 bits. A file of 8 bits may keep some modules, such as img_in, in 16."""
    paths: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", self.side_path | frozenset(self.merge_only))


# Matching walks both module lists; a strength change must not repeat it.
_known: WeakKeyDictionary[torch.nn.Module, WeakKeyDictionary[Adapter, Match]] = WeakKeyDictionary()


def match_adapter(model: host.ModelPatcher, adapter: Adapter) -> Match:
    """Compares names and shapes; cached per model and adapter.

    Raises:
        KeyFormatError: the adapter is for models of another family, or none of its modules exists
            in the model.
        ShapeError: a module exists but has another shape. Nothing is applied then.
        TargetError: the modules exist, but this kind of model allows none of them to be patched.
    """
    matches = _known.setdefault(model.model.diffusion_model, WeakKeyDictionary())
    if adapter not in matches:
        matches[adapter] = compute_match(model, adapter)
    return matches[adapter]


def compute_match(model: host.ModelPatcher, adapter: Adapter) -> Match:
    modules = host.get_modules(model)
    # By blocks alone: models of other kinds have an img_in and a txt_in too.
    family = detect_by_names(path for path in modules if split_path(path)[0] is not None)
    check_family(adapter, family)
    layout = find_layout(model.model.diffusion_model)
    places = {path: layout.find_place(path) for path in adapter}
    out_of_reach = {path: layout.reason for path, place in places.items() if place is None}
    present = {path: p for path, p in places.items() if p is not None and p.module_path in modules}
    if not present and not out_of_reach:
        raise build_mismatch(model, adapter, len(modules))
    check_shapes(modules, adapter, present)
    unmergeable = {
        path: layout.no_merge_reason or message("its Linear has no weight that ComfyUI can patch")
        for path, place in present.items()
        if layout.no_merge_reason or not host.has_weight(modules[place.module_path])
    }
    side_path, merge_only = set(), {}
    for path, place in present.items():
        weights = adapter.modules[path]
        if not weights.is_additive:
            merge_only[path] = message("{kind} depends on the base weight", kind=weights.kind)
        elif not is_linear(modules[place.module_path]):
            merge_only[path] = message("it changes a norm")
        else:
            side_path.add(path)
    for path in [path for path in merge_only if path in unmergeable]:
        out_of_reach[path] = message(
            "{why}, so it would have to be merged, and {no_merge}",
            **{"why": merge_only.pop(path), "no_merge": unmergeable[path]},
        )
    if not side_path and not merge_only:
        path, why = next(iter(out_of_reach.items()))
        raise TargetError(
            "none of the {count} modules of {adapter} can be applied to this MODEL, such as "
            "{path}: {why}. Choose a bf16, fp8 or GGUF file of the model.",
            **{"count": len(adapter), "adapter": adapter.name, "path": path, "why": why},
        )
    absent = tuple(p for p in adapter if p not in present and p not in out_of_reach)
    stored = {p: host.describe_storage(modules[place.module_path]) for p, place in present.items()}
    linears = [path for path in present if is_linear(modules[present[path].module_path])]
    storages = Counter(stored[path][0] for path in linears or stored)
    return Match(
        frozenset(side_path),
        merge_only,
        absent,
        out_of_reach,
        unmergeable,
        family,
        layout,
        storages.most_common(1)[0][0],
        {path: storage for path, (storage, is_low) in stored.items() if is_low},
    )


def check_family(adapter: Adapter, family: Family | None) -> None:
    made_for = adapter.base_family
    if family is None or made_for is None or made_for is family:
        return
    raise KeyFormatError(
        "{adapter} is a LoRA for {title}, and this MODEL is a {model}: their modules differ "
        "in names and sizes. Choose a LoRA for {model}, or connect a {title} model.",
        adapter=adapter.name,
        title=made_for.title,
        model=family.title,
    )


def build_mismatch(model: host.ModelPatcher, adapter: Adapter, num_modules: int) -> KeyFormatError:
    model_class, _ = host.describe_model(model)
    return KeyFormatError(
        "{adapter} matches 0 modules of this MODEL, which ComfyUI knows as {model_class} "
        "with {num_modules} modules; expected a {families} model. "
        "Connect the MODEL of its UNETLoader.",
        adapter=adapter.name,
        model_class=model_class,
        num_modules=num_modules,
        families=name_families(adapter),
    )


def name_families(adapter: Adapter) -> str:
    made_for = adapter.base_family
    return made_for.title if made_for else " or ".join(family.title for family in FAMILIES)


def is_linear(module: torch.nn.Module) -> bool:
    # By attributes: Linears of quantised models do not derive from torch.nn.Linear.
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def check_shapes(
    modules: Mapping[str, torch.nn.Module], adapter: Adapter, present: Mapping[str, Place]
) -> None:
    wrong = [
        (path, expected, found)
        for path, place in present.items()
        for expected, found in [
            compare_shape(modules[place.module_path], place, adapter.modules[path])
        ]
        if expected != found
    ]
    if wrong:
        path, expected, found = wrong[0]
        raise ShapeError(
            "{adapter} does not fit this MODEL in {num_wrong} of {num_present} modules: {path} "
            "is {expected} in the model, and the adapter was made for {found}. Choose an "
            "adapter trained for this model's size.",
            adapter=adapter.name,
            num_wrong=len(wrong),
            num_present=len(present),
            path=path,
            expected=expected,
            found=found,
        )


def compare_shape(
    module: Any, place: Place, weights: ModuleWeights
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The module's shape and the one the weights need, or only the outputs of both."""
    shape: tuple[int, ...]
    if is_linear(module):
        shape = (module.out_features // place.num_parts, module.in_features)
    else:
        shape = tuple(module.weight.shape)
    if weights.shape is None:  # an OFT, or the change of a bias alone
        return shape[:1], (weights.out_features,)
    return shape, tuple(weights.shape)

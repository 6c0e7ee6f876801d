"""Which modules of a MODEL an adapter reaches, and how each can be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from ..lora_core import Adapter, KeyFormatError, ModuleWeights, ShapeError
from . import host


@dataclass(frozen=True)
class Match:
    """The adapter's modules, sorted by what can be done with them on this model."""

    side_path: frozenset[str]
    """Additive weights on a Linear: these can run beside the base."""
    merge_only: Mapping[str, str]
    """Module path -> why it can only be merged."""
    absent: tuple[str, ...]
    """In the adapter, not in the model."""
    storage: str
    """How the model stores its weights, e.g. "float8_e4m3fn"."""
    is_low_precision: bool
    """Less than 16 bits a weight."""
    paths: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", self.side_path | frozenset(self.merge_only))


# Matching walks both module lists; a strength change must not pay for it again.
_known: WeakKeyDictionary[torch.nn.Module, WeakKeyDictionary[Adapter, Match]] = WeakKeyDictionary()


def match_adapter(model: host.ModelPatcher, adapter: Adapter) -> Match:
    """Compares names and shapes; remembered per model and adapter.

    Raises:
        KeyFormatError: not one module of the adapter exists in the model.
        ShapeError: a module exists but has another shape. Nothing is applied then.
    """
    matches = _known.setdefault(model.model.diffusion_model, WeakKeyDictionary())
    if adapter not in matches:
        matches[adapter] = compute_match(model, adapter)
    return matches[adapter]


def compute_match(model: host.ModelPatcher, adapter: Adapter) -> Match:
    modules = host.get_modules(model)
    present = [path for path in adapter if path in modules]
    if not present:
        model_class, _ = host.describe_model(model)
        raise KeyFormatError(
            f"{adapter.name} matches 0 modules of this MODEL, which ComfyUI knows as {model_class}"
            f" with {len(modules)} modules; expected a Qwen-Image or Qwen-Image-Edit model. "
            "Connect the MODEL of its UNETLoader."
        )
    check_shapes(modules, adapter, present)
    side_path, merge_only = set(), {}
    for path in present:
        weights = adapter.modules[path]
        if not weights.is_additive:
            merge_only[path] = f"{weights.kind} depends on the base weight"
        elif not is_linear(modules[path]):
            merge_only[path] = "it changes a norm"
        else:
            side_path.add(path)
    absent = tuple(path for path in adapter if path not in modules)
    linears = [path for path in present if is_linear(modules[path])]
    storage, num_bytes = host.describe_storage(modules[(linears or present)[0]])
    return Match(frozenset(side_path), merge_only, absent, storage, num_bytes < 2)


def is_linear(module: torch.nn.Module) -> bool:
    # By attributes: the Linear of quantised models does not derive from torch.nn.Linear.
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def check_shapes(
    modules: Mapping[str, torch.nn.Module], adapter: Adapter, present: list[str]
) -> None:
    wrong = [
        (path, expected, found)
        for path in present
        for expected, found in [compare_shape(modules[path], adapter.modules[path])]
        if expected != found
    ]
    if wrong:
        path, expected, found = wrong[0]
        raise ShapeError(
            f"{adapter.name} does not fit this MODEL in {len(wrong)} of {len(present)} modules: "
            f"{path} is {expected} in the model, and the adapter was made for {found}. "
            "Choose an adapter trained for this model's size."
        )


def compare_shape(module: torch.nn.Module, weights: ModuleWeights) -> tuple[tuple, tuple]:
    """The module's shape and the one the weights want, equal where these do not tell."""
    if is_linear(module):
        shape = (module.out_features, module.in_features)
    else:
        shape = tuple(module.weight.shape)
    if weights.kind == "OFT":
        return shape[:1], (weights.out_features,)
    return shape, shape if weights.shape is None else tuple(weights.shape)

"""LoRA as a side path: out = base(x) + sum of strength * scale * lora_B(lora_A x).

The base stays unchanged. Three pieces work together on a clone of the model:

- `SidePath`, an immutable value in the clone's transformer_options: the adapters and strengths.
- `Bank`, a module with the adapters' weights, under a ModelPatcher of its own. It is built when a
  sampler prepares the model, so that a chain of Apply nodes builds no intermediate banks.
- two wrappers: one passes the bank to ComfyUI when it loads models, one swaps the forwards of the
  affected modules during a call of the diffusion model and restores them after it.

Sampling leaves no trace on the shared model, so clones with other strengths, other extensions
and code after an exception in mid-sampling never see a stale forward.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch

from ...lora_core import Adapter
from ...lora_core.adapter.strengths import Strengths
from ...lora_core.base_model.family import Family
from ...lora_core.findings import Finding
from .. import host
from .bank import Bank, Site
from .idle_modules import report_idle
from .layouts import Layout

logger = logging.getLogger(__name__)

KEY = "qwen_edit_lora"

Swap = tuple[torch.nn.Module, Site, tuple[float, ...]]


@dataclass(frozen=True)
class Entry:
    """One adapter on the side path."""

    adapter: Adapter
    module_paths: frozenset[str]
    strengths: Strengths
    layout: Layout
    family: Family | None = None
    """That of the model."""
    node: host.RunningNode | None = None
    """The node that applied it."""


class SidePath:
    """The adapters that run beside the weights of one MODEL, in the order they were applied."""

    def __init__(self, entries: tuple[Entry, ...], placement: host.Placement):
        self.entries = entries
        self.placement = placement
        self._bank: PlacedBank | None = None
        self._plan: tuple[ref, list[Swap]] | None = None
        self._merged: tuple[ref, host.ModelPatcher] | None = None
        #: This sampling runs on merged weights instead; decided for each sampling.
        self.is_merged = False
        #: Whether the next call of the model checks that it runs all sites: the first of each
        #: sampling, as caches such as EasyCache may skip parts of later ones.
        self.is_unchecked = True
        #: Of modules that the last checked call did not run.
        self.findings: tuple[Finding, ...] = ()

    def __copy__(self) -> SidePath:
        """Itself: extensions deep-copy options, and a copy would run modules nobody has loaded."""
        return self

    def __deepcopy__(self, memo: dict) -> SidePath:
        return self

    @property
    def is_active(self) -> bool:
        return any(not entry.strengths.is_zero for entry in self.entries)

    def get_bank(self, placement: host.Placement | None = None) -> PlacedBank:
        """The bank of these adapters, shared by all strengths; built on first use."""
        placement = placement or self.placement
        if self._bank is None or self._bank.placement != placement:
            contents = tuple((e.adapter, e.module_paths, e.layout) for e in self.entries)
            # Strengths are not part of the key, which makes a strength change free.
            key = (placement, *((id(adapter), *rest) for adapter, *rest in contents))
            bank = _banks.get(key)
            if bank is None:
                bank = _banks[key] = PlacedBank(contents, placement)
            self._bank, self._plan = bank, None
        return self._bank

    @property
    def bank(self) -> PlacedBank:
        """The most recently prepared bank."""
        return self.get_bank(self._bank.placement if self._bank else None)

    def get_merged(self, model: host.ModelPatcher) -> host.ModelPatcher:
        """A clone of `model` with all entries as native patches; cached, to patch only once."""
        if self._merged is None or self._merged[0]() is not model:
            merged = model.clone()
            # Neither its options nor its parents may reference this side path, which references it.
            del host.get_options(merged)[KEY]
            while merged.parent is not None and get_side_path(merged.parent) is not None:
                merged.parent = merged.parent.parent
            for entry in self.entries:
                modules = {path: entry.adapter.modules[path] for path in entry.module_paths}
                place, family = entry.layout.find_place, entry.family
                host.add_merge(merged, modules, entry.strengths, place, family)
            self._merged = (ref(model), merged)
        return self._merged[1]

    def get_plan(self, diffusion_model: torch.nn.Module) -> list[Swap]:
        """Which module gets which site at which gains; cached, as every step needs it."""
        bank = self.bank
        if self._plan is None or self._plan[0]() is not diffusion_model:
            swaps = [
                (module, site, gains)
                for module, site in bank.find_modules(diffusion_model)
                if any(gains := self.compute_gains(site))
            ]
            self._plan = (ref(diffusion_model), swaps)
        return self._plan[1]

    def compute_gains(self, site: Site) -> tuple[float, ...]:
        """The strength of each member of a site."""
        members = [(self.entries[member.entry], member.path) for member in site.members]
        return tuple(entry.strengths.resolve(path, entry.family) for entry, path in members)


class PlacedBank:
    """A bank and the patcher through which ComfyUI moves it."""

    def __init__(
        self,
        contents: tuple[tuple[Adapter, frozenset[str], Layout], ...],
        placement: host.Placement,
    ):
        self.adapters = [adapter for adapter, *_ in contents]  # alive, so no id is reused
        self.placement = placement
        self.module = Bank(contents, placement.dtype)
        self.patcher = host.wrap_in_patcher(self.module, placement)
        self._found: WeakKeyDictionary[torch.nn.Module, list[tuple[torch.nn.Module, Site]]] = (
            WeakKeyDictionary()
        )

    def find_modules(self, diffusion_model: torch.nn.Module) -> list[tuple[torch.nn.Module, Site]]:
        """The base's modules and their sites in this bank; looked up once for all strengths."""
        if diffusion_model not in self._found:
            self._found[diffusion_model] = [
                (diffusion_model.get_submodule(path), site)
                for path, site in self.module.sites.items()
            ]
        return self._found[diffusion_model]


_banks: WeakValueDictionary[tuple, PlacedBank] = WeakValueDictionary()

#: The bank each base sampled with last. ComfyUI drops the old output of Apply before the new one
#: samples, so nothing else would keep the bank alive across a change of strength.
_latest: WeakKeyDictionary[torch.nn.Module, PlacedBank] = WeakKeyDictionary()


def add_to_side_path(model: host.ModelPatcher, entry: Entry) -> None:
    """Adds one more adapter to the side path of `model`, a clone the caller owns."""
    options = host.get_options(model)
    existing = options.get(KEY)
    entries = (*existing.entries, entry) if existing else (entry,)
    options[KEY] = SidePath(entries, host.get_placement(model))
    host.add_wrapper(model, "prepare_sampling", KEY, prepare_side_path)
    host.add_wrapper(model, "diffusion_model", KEY, run_with_side_path)


def get_side_path(model: host.ModelPatcher) -> SidePath | None:
    return host.get_options(model).get(KEY)


def prepare_side_path(
    executor: Callable, model: host.ModelPatcher, *args: Any, **kwargs: Any
) -> Any:
    """PREPARE_SAMPLING wrapper: the bank is loaded, and accounted for, with the model.

    Where swapped forwards cannot work, the entries are merged here. Apply merges if it sees the
    reason; this handles reasons that arise later.
    """
    side_path = get_side_path(model)
    if side_path is None or not side_path.is_active:
        return executor(model, *args, **kwargs)
    reason = host.find_merge_reason(model)
    side_path.is_merged = reason is not None
    if reason is not None:
        logger.warning(
            "Apply Qwen Edit LoRA: %s, so the LoRA is merged into the weights this time, as mode "
            "'merge' does",
            reason,
        )
        return executor(side_path.get_merged(model), *args, **kwargs)
    bank = side_path.get_bank(host.get_placement(model))
    side_path.is_unchecked = True
    _latest[model.model.diffusion_model] = bank
    # Attached only temporarily: ComfyUI caches `model`, and clones of it may be used elsewhere.
    model.set_additional_models(KEY, [bank.patcher])
    try:
        prepared = executor(model, *args, **kwargs)
    finally:
        model.remove_additional_models(KEY)
    host.prioritize(bank.patcher)
    return prepared


def run_with_side_path(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL wrapper: swaps forwards for the duration of one model call."""
    args, kwargs, side_path = take_side_path(args, kwargs)
    if side_path is None or side_path.is_merged or not side_path.is_active:
        return executor(*args, **kwargs)
    with swapped_forwards(executor.class_obj, side_path):
        return executor(*args, **kwargs)


def take_side_path(args: tuple, kwargs: dict) -> tuple[tuple, dict, SidePath | None]:
    """Finds the side path in whichever argument carries transformer_options, and removes it.

    Removed, because a wrapper that is registered twice must not apply it twice.
    """
    found = None

    def strip(value: Any) -> Any:
        nonlocal found
        if isinstance(value, dict) and KEY in value:
            found = value[KEY]
            return {name: item for name, item in value.items() if name != KEY}
        return value

    args = tuple(strip(value) for value in args)
    kwargs = {name: strip(value) for name, value in kwargs.items()}
    return args, kwargs, found


@contextmanager
def swapped_forwards(diffusion_model: torch.nn.Module, side_path: SidePath) -> Iterator[None]:
    undo: list[tuple[dict, Callable | None]] = []
    swapped: list[SwappedForward] = []
    try:
        for module, site, gains in side_path.get_plan(diffusion_model):
            # Through __dict__: nn.Module.__setattr__ costs 10 ms a call over 840 modules.
            attributes = module.__dict__
            undo.append((attributes, attributes.get("forward")))
            swapped.append(SwappedForward(module.forward, site, gains))
            attributes["forward"] = swapped[-1]
        with host.adding_to_folded(find_swapped):
            yield
        if side_path.is_unchecked:
            check_all_ran(side_path, swapped)
    finally:
        for attributes, forward in reversed(undo):
            if forward is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = forward
        if undo:
            side_path.bank.module.forget_inputs()


class SwappedForward:
    """Stands in for one module's forward during one call of the model."""

    __slots__ = ("forward", "gains", "runs", "site")

    def __init__(self, forward: Callable, site: Site, gains: tuple[float, ...]):
        self.forward, self.site, self.gains = forward, site, gains
        self.runs = 0

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.runs += 1
        return run_site(self.forward, self.site, self.gains, x, *args, **kwargs)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.site.add(y, x, self.gains)


def find_swapped(module: torch.nn.Module) -> SwappedForward | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, SwappedForward) else None


def check_all_ran(side_path: SidePath, swapped: list[SwappedForward]) -> None:
    """Reports the modules whose forward was swapped and which the model did not run."""
    side_path.is_unchecked = False
    ran: dict[str, bool] = {}
    paths: dict[host.RunningNode | None, list[str]] = defaultdict(list)
    for one in swapped:
        for member, gain in zip(one.site.members, one.gains, strict=True):
            if gain:
                ran[member.path] = bool(one.runs)
                paths[side_path.entries[member.entry].node].append(member.path)
    side_path.findings = report_idle(ran, paths.items())


def run_site(
    forward: Callable,
    site: Site,
    gains: tuple[float, ...],
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    return site.add(forward(x, *args, **kwargs), x, gains)

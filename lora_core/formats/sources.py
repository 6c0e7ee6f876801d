"""Which keys make up a module, where a file names some of its modules twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..disk.safetensors_file import AnyTensor
from ..messages import message
from .parsed_key import ParsedKey

#: Prefix and adapter name.
Source = tuple[str, str | None]


@dataclass
class ModuleParts:
    """The keys of one module from one source (prefix and adapter name)."""

    prefix: str
    adapter_name: str | None
    keys: dict[str, ParsedKey] = field(default_factory=dict)

    def get(self, tensors: Mapping[str, AnyTensor], part: str) -> AnyTensor | None:
        key = self.keys.get(part)
        return None if key is None else tensors[key.key]


@dataclass(frozen=True)
class Sources:
    chosen: dict[str, ModuleParts]
    """Module path -> its parts."""
    duplicates: list[tuple[ParsedKey, str]]
    """Keys left out, each with where the module was taken from instead."""
    borrowed: list[ParsedKey]
    """Alphas and magnitudes in use whose prefix differs from that of their module's weights."""


def choose_sources(parsed: list[ParsedKey]) -> Sources:
    """One source per module; where a file names a module twice, the file's main source wins.

    An alpha or a magnitude alone makes no source: it belongs to the weights of its own prefix, or
    else to whichever the module has.
    """
    grouped: dict[str, dict[Source, ModuleParts]] = defaultdict(dict)
    companions: list[ParsedKey] = []
    ordered = sorted(parsed, key=lambda key: key.key)
    set_aside = find_other_spellings(ordered)
    for key in ordered:
        if key.key in set_aside:
            continue
        if key.part in COMPANIONS:
            companions.append(key)
            continue
        source = (key.prefix, key.adapter_name)
        sources = grouped[key.module_path]
        if source not in sources:
            sources[source] = ModuleParts(*source)
        sources[source].keys.setdefault(key.part, key)
    orphans: dict[str, list[ParsedKey]] = defaultdict(list)
    for key in companions:
        same = [p for p in grouped[key.module_path].values() if is_companion(key, p)]
        for parts in same:
            parts.keys.setdefault(key.part, key)
        if not same:
            orphans[key.module_path].append(key)
    popularity = Counter(source for sources in grouped.values() for source in sources)
    chosen, duplicates, borrowed = {}, [], []
    for module_path, sources in grouped.items():
        order = list(sources)
        if len(order) > 1:
            order.sort(key=lambda s: (-popularity[s], rank_name(s[1]), s[0], s[1] or ""))
            order.sort(key=lambda s: is_stray(s, sources))
        own = orphans[module_path]
        if not order:
            chosen[module_path] = ModuleParts(own[0].prefix, None, {key.part: key for key in own})
            continue
        kept = chosen[module_path] = sources[order[0]]
        for key in own:
            if kept.keys.setdefault(key.part, key) is key:
                borrowed.append(key)
        if len(order) == 1:
            continue
        used = {key.key for key in kept.keys.values()}
        where = f"{kept.prefix}{module_path}" + ("" if kept.prefix else message(", without prefix"))
        where += f" ({kept.adapter_name})" if kept.adapter_name else ""
        for source in order[1:]:
            for key in sources[source].keys.values():
                if key.key not in used:
                    used.add(key.key)  # an alpha may belong to several sources
                    duplicates.append((key, where))
    placed = {key.key for parts in chosen.values() for key in parts.keys.values()}
    placed.update(key.key for key, _ in duplicates)
    for key in parsed:  # the same part twice under one source, e.g. both lora_A and lora_down
        if key.key not in placed:
            kept_key = chosen[key.module_path].keys.get(key.part)
            duplicates.append((key, kept_key.key if kept_key else "another key"))
    return Sources(chosen, duplicates, borrowed)


def find_other_spellings(ordered: list[ParsedKey]) -> set[str]:
    """Keys of lora_A or lora_B that are no part of their module, which is spelled in another way.

    Both factors of a module are of one spelling, as in ComfyUI: of a lora_A next to a whole pair of
    lora_down and lora_up, the pair is the module. Of two pairs it is the one that ComfyUI takes.
    """
    if len({key.spelling for key in ordered if key.spelling}) < 2:  # as in nearly every file
        return set()
    spelled: dict[tuple, dict[str, list[ParsedKey]]] = defaultdict(lambda: defaultdict(list))
    for key in ordered:
        if key.spelling:
            spelled[key.module_path, key.prefix, key.adapter_name][key.spelling].append(key)
    found: set[str] = set()
    for spellings in spelled.values():
        # Without a whole pair the first is kept, and reported as incomplete.
        whole = [s for s in spellings if len(spellings[s]) == 2]
        kept = min(whole, key=rank_spelling) if whole else next(iter(spellings))
        found.update(key.key for s, keys in spellings.items() if s != kept for key in keys)
    return found


#: Endings of a lora_A in the order in which ComfyUI looks for them (weight_adapter/lora.py).
SPELLINGS = (
    *(".lora_down.weight", "_lora.down.weight", ".lora_A.weight", ".lora.down.weight"),
    *(".lora_A", ".lora_linear_layer.down.weight"),
)


def rank_spelling(key: str) -> int:
    return next((i for i, ending in enumerate(SPELLINGS) if key.endswith(ending)), len(SPELLINGS))


def rank_name(adapter_name: str | None) -> int:
    """Of PEFT's names of adapters: ComfyUI looks for keys without one, then for "default"."""
    return {None: 0, "default": 1}.get(adapter_name, 2)


def is_stray(source: Source, sources: Mapping[Source, ModuleParts]) -> bool:
    """Whether it is one factor beside a whole pair whose keys differ by PEFT's "default" only."""
    prefix, name = source
    other = (prefix, {None: "default", "default": None}.get(name, name))
    return is_half(sources[source]) and other in sources and not is_half(sources[other])


def is_half(parts: ModuleParts) -> bool:
    return ("lora_A" in parts.keys) != ("lora_B" in parts.keys)


#: Parts that change nothing alone.
COMPANIONS = ("alpha", "magnitude")


def is_companion(key: ParsedKey, parts: ModuleParts) -> bool:
    """Whether the key belongs to weights of this source; without a name it belongs to every one."""
    return key.prefix == parts.prefix and key.adapter_name in (None, parts.adapter_name)

"""Which keys make up a module, where a file names some of its modules twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..stored import AnyTensor
from .parsed_key import ParsedKey


@dataclass
class ModuleParts:
    """The keys of one module from one source (prefix and adapter name)."""

    prefix: str
    adapter_name: str | None
    keys: dict[str, ParsedKey] = field(default_factory=dict)

    def get(self, tensors: Mapping[str, AnyTensor], part: str) -> AnyTensor | None:
        key = self.keys.get(part)
        return None if key is None else tensors[key.key]


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

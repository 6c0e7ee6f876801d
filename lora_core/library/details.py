"""Details of one file: its metadata and a table of its modules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..adapter.weights import ModuleWeights
from ..base_model import module_paths
from ..disk.safetensors_file import SafetensorsFile, is_safetensors
from ..errors import LoraError
from ..formats.files import read_adapter
from .facts import OK, AdapterFacts
from .health import Health, finite_or_none
from .metadata import count_tags, list_known_fields

#: Of a metadata value. Trainers put the tags and images of whole data sets in there.
MAX_VALUE = 2000
MAX_FIELDS = 200


def describe_file(path: Path, facts: AdapterFacts, health: Health | None) -> dict[str, Any]:
    """JSON-able: "known", "tags", "metadata", "modules", "hints".

    Raises:
        FileError: the file was removed meanwhile.
    """
    hints: tuple[str, ...] = ()
    modules: list[dict[str, Any]] = []
    metadata: Mapping[str, str] = {}
    if facts.state == OK:
        adapter = read_adapter(path)
        adapter.release()
        metadata, hints = adapter.metadata, adapter.report.hints
        modules = build_module_table(adapter, health)
    elif is_safetensors(path.name):
        try:
            file = SafetensorsFile(path)
            file.release()
            metadata = file.metadata
        except LoraError:
            pass  # `facts.error` reports it
    return {
        "known": list_known_fields(metadata),
        "tags": [list(pair) for pair in count_tags(metadata)],
        "metadata": [
            {"key": key[:MAX_VALUE], "value": value[:MAX_VALUE], "num_chars": len(value)}
            for key, value in sorted(metadata.items())[:MAX_FIELDS]
        ],
        "num_fields": len(metadata),
        "modules": modules,
        "hints": list(hints),
    }


def build_module_table(adapter: Adapter, health: Health | None) -> list[dict[str, Any]]:
    """A row for each name inside a block, such as attn.to_q, over all the blocks that have it."""
    judged = {row["name"]: row for row in health.modules} if health else {}
    groups: dict[str, dict[int | None, ModuleWeights]] = defaultdict(dict)
    for path, weights in adapter.modules.items():
        block, name = module_paths.split_path(path)
        groups[name][block] = weights
    rows = []
    for name, by_block in groups.items():
        found = list(by_block.values())
        alphas = (finite_or_none(w.alpha) for w in found)
        rows.append(
            {
                "name": name,
                "num_modules": len(found),
                "blocks": module_paths.format_blocks({b for b in by_block if b is not None}),
                "kind": find_most_frequent(w.kind for w in found),
                "shape": find_most_frequent(w.shape for w in found),
                "rank": find_most_frequent(w.rank for w in found),
                "alpha": find_most_frequent(alphas),
                "size_bytes": sum(w.size_bytes() for w in found),
                "std": judged.get(name, {}).get("std"),
                "effective_rank": judged.get(name, {}).get("effective_rank"),
            }
        )
    return rows


def find_most_frequent(values: Any) -> Any:
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]

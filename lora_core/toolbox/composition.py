"""What resize, merge and extract return: a new adapter, and what it retained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..adapter.adapter import Adapter
from ..algebra.truncation import Truncated
from ..disk.json_reader import parse_json
from ..errors import ConfigError, FileError
from ..formats.files import build_state_dict, read_state_dict
from ..messages import join_messages, message
from ..text import format_percent

HISTORY = "qwen_edit_lora.history"
#: Metadata that would describe the original file.
STALE = ("lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class Composition:
    """A new adapter, and how much of its sources it retains."""

    adapter: Adapter
    retained: Mapping[str, float]
    """Module path -> share of the squared Frobenius norm, measured on the stored tensors."""
    total_retained: float
    residual: Mapping[str, float] = field(default_factory=dict)
    """Module path -> Frobenius norm of the difference; no singular value of it is larger."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "total_retained": self.total_retained,
            "retained": dict(self.retained),
            "residual": dict(self.residual),
            "notes": list(self.notes),
            "adapter": self.adapter.report.to_dict(),
        }

    def to_text(self) -> str:
        lines = [
            self.adapter.report.to_text(),
            message(
                "{total_retained} of the energy kept",
                total_retained=format_percent(self.total_retained),
            ),
        ]
        if self.retained:
            worst = min(self.retained, key=self.retained.__getitem__)
            lines[-1] += message(
                "; least in {worst} ({retained})",
                worst=worst,
                retained=format_percent(self.retained[worst]),
            )
        return join_messages("\n", [*lines, *self.notes])


def build_composition(
    name: str,
    parts: Mapping[str, Truncated],
    metadata: Mapping[str, str],
    step: Mapping[str, Any],
    notes: list[str],
) -> Composition:
    """The adapter with the report that a reader of its file would give."""
    energy = sum(part.energy for part in parts.values())
    lost = sum(part.residual for part in parts.values())
    total = 1.0 - lost / energy if energy else 1.0
    kept = {key: value for key, value in metadata.items() if key not in STALE}
    history = [*read_history(metadata), {**step, "retained": total}]
    kept[HISTORY] = json.dumps(history)
    modules = {path: part.weights for path, part in parts.items()}
    state_dict = build_state_dict(Adapter(modules, name=name))
    return Composition(
        read_state_dict(state_dict, kept, name),
        {path: part.retained for path, part in parts.items()},
        total,
        {path: math.sqrt(max(part.residual, 0.0)) for path, part in parts.items()},
        tuple(notes),
    )


def read_history(metadata: Mapping[str, str]) -> list[Any]:
    try:
        history = parse_json(metadata.get(HISTORY, "[]"), HISTORY)
    except FileError:
        return []
    return history if isinstance(history, list) else []


def check_rank(rank: int | None) -> None:
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ConfigError("rank is {rank!r}; expected a whole number of at least 1", rank=rank)


def check_energy(energy: float | None) -> None:
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(
            "energy is {energy!r}; expected a share above 0 and up to 1, such as 0.99",
            energy=energy,
        )

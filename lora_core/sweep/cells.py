"""The images of a sweep: which strength, seed and adapter makes each, and their labels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..disk.safetensors_file import shorten
from ..errors import ConfigError
from ..text import format_count

MAX_CELLS = 64
MAX_SEED_DIGITS = 20  # of 64 bits

_PARTS = re.compile(
    r"\s*strength=(?P<strength>\S+)(?:\s+seed=(?P<seed>\d+))?(?:\s+lora=(?P<adapter>.*\S))?\s*"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Hashable; equal cells are the same image."""

    strength: float
    seed: int | None = None
    adapter: str = ""
    """Name of the adapter without folder and extension; empty if it is not named."""


def build_label(cell: Cell) -> str:
    """Such as "strength=0.5 seed=7 lora=my_lora"; unknown parts are left out."""
    # float() since a whole number from a graph may be an int; + 0.0 turns -0.0 into 0.0.
    number = repr(float(cell.strength) + 0.0).removesuffix(".0")
    parts = [f"strength={number}"]
    if cell.seed is not None:
        parts.append(f"seed={cell.seed}")
    if cell.adapter:
        parts.append(f"lora={' '.join(cell.adapter.split())}")
    return " ".join(parts)


def parse_label(text: str) -> Cell:
    """The cell behind a label of `build_label`; a bare number is a strength.

    Raises:
        ConfigError: any other text, or a strength that is not finite.
    """
    parts = _PARTS.fullmatch(text)
    number = parts["strength"] if parts else text
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ConfigError(
            "{text!r} is not a sweep label; expected one such as 'strength=0.5 seed=7 "
            "lora=my_lora', or a bare number such as '0.5'",
            text=shorten(text),
        )
    if parts is None:
        return Cell(strength)
    seed = parts["seed"]
    if seed is not None and len(seed) > MAX_SEED_DIGITS:
        raise ConfigError(
            "{text!r} has a seed of {length} digits; expected at most {max_seed_digits}",
            text=shorten(text),
            length=len(seed),
            max_seed_digits=MAX_SEED_DIGITS,
        )
    return Cell(strength, None if seed is None else int(seed), parts["adapter"] or "")


def build_cells(
    strengths: Sequence[float], seeds: Sequence[int], adapters: Sequence[str]
) -> list[Cell]:
    """Every combination, seed by seed: strength 0 once for all adapters, then each adapter's.

    Args:
        strengths: without duplicates, 0 among them.
        adapters: their names; a single one is not named in the cells.

    Raises:
        ConfigError: more than MAX_CELLS.
    """
    active = [strength for strength in strengths if strength != 0]
    count = len(seeds) * (1 + len(adapters) * len(active))
    if count > MAX_CELLS:
        raise ConfigError(
            "this sweep has {count} images ({num_strengths} and 0, {num_seeds}, "
            "{num_adapters}); expected at most {max_cells}, so use fewer of them, such as the "
            "strengths '0, 1, 2'",
            count=count,
            num_strengths=format_count(len(active), "strength"),
            num_seeds=format_count(len(seeds), "seed"),
            num_adapters=format_count(len(adapters), "adapter"),
            max_cells=MAX_CELLS,
        )
    names = adapters if len(adapters) > 1 else [""] * len(adapters)
    return [
        cell
        for seed in seeds
        for cell in (
            Cell(0.0, seed),
            *(Cell(strength, seed, name) for name in names for strength in active),
        )
    ]


def name_adapters(names: Sequence[str]) -> list[str]:
    """File names without folder and extension, numbered where two are the same."""
    found: list[str] = []
    for name in names:
        stem = " ".join(re.split(r"[\\/]", name)[-1].removesuffix(".safetensors").split())
        stem = stem or "adapter"
        unique, number = stem, 2
        while unique in found:
            unique, number = f"{stem} ({number})", number + 1
        found.append(unique)
    return found

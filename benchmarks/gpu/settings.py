"""Sizes of the check: the model's own on a GPU, tiny ones in a dry run. Imports no torch."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from .records import Recorder

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and its inputs. A side is an image's side divided by 8."""

    heads: int
    head_width: int
    text_width: int
    axes: tuple[int, int, int]
    side: int
    small_side: int
    text_tokens: tuple[int, int]
    """Of the two items of a training set, the larger last."""
    blocks: int
    """Of the whole model."""
    few_blocks: int
    """Of the model under dynamic VRAM."""
    file_blocks: int
    """Of the files that the command line trains on."""
    loaded_blocks: int
    """Of the file whose loading is timed."""
    ranks: tuple[int, int]
    calls: int
    """Of the model that are timed."""
    steps: int
    """Of training that are timed."""

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def num_tokens(self) -> int:
        """Tokens of the target, one reference of the same size, and the text."""
        return 2 * (self.side // 2) ** 2 + self.text_tokens[-1]


CARD = Sizes(
    *(24, 128, 3584, (16, 56, 56)),
    *(128, 64, (180, 256)),
    **{"blocks": 60, "few_blocks": 6, "file_blocks": 4, "loaded_blocks": 6},
    **{"ranks": (16, 64), "calls": 5, "steps": 3},
)
DRY = Sizes(
    *(2, 32, 64, (4, 14, 14)),
    *(8, 4, (5, 8)),
    **{"blocks": 2, "few_blocks": 1, "file_blocks": 1, "loaded_blocks": 1},
    **{"ranks": (2, 4), "calls": 2, "steps": 1},
)


@dataclass(frozen=True)
class Context:
    """Passed to every part."""

    record: Recorder
    sizes: Sizes
    device: str
    """"cuda" or, in a dry run, "cpu"."""
    folder: Path
    """For files that go when the part ends."""
    results: Path
    """results.jsonl, with what earlier parts found."""

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"


def build_context(options: Namespace, folder: Path, part: str) -> Context:
    """Parsed from the command line of one part; see `__main__`."""
    record = Recorder(
        *(part, options.results, options.card, options.command),
        *(options.deadline, options.dry_run),
    )
    sizes = DRY if options.dry_run else CARD
    device = "cpu" if options.dry_run else "cuda"
    return Context(record, sizes, device, folder, options.results)

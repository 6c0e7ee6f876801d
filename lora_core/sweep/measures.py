"""Measuring the images of a sweep, one at a time: only metrics and small copies are kept.

Each image is compared with the one at strength 0 of its seed, and with the source, if there is one,
where nothing was meant to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..messages import message
from ..progress import Progress, ShouldStop, track
from ..text import format_count
from .cells import MAX_CELLS, Cell, build_label, parse_label
from .image_metrics import (
    SSIM_WINDOW,
    Appearance,
    Difference,
    clamp,
    compare_images,
    describe_size,
    fit_image,
    fit_mask,
    measure_appearance,
    take_colours,
)

WHOLE, INSIDE, OUTSIDE = "whole", "inside", "outside"


@dataclass(frozen=True)
class CellMeasures:
    """One image; where it holds NaN or Inf, or has no strength 0, metrics are absent."""

    cell: Cell
    appearance: Appearance
    change: Mapping[str, Difference]
    """Region -> against strength 0: WHOLE, and with a mask INSIDE and OUTSIDE."""
    kept: Difference | None
    """Against the source: outside the mask, or the whole image where there is no mask."""
    thumbnail: np.ndarray
    """uint8 (height, width, 3)."""
    change_thumbnail: np.ndarray | None
    """float16 (height, width, 3): mean absolute difference from strength 0, 0 to 1."""

    @property
    def label(self) -> str:
        return build_label(self.cell)

    def to_dict(self) -> dict[str, Any]:
        """All metrics, without the images."""
        return {
            "label": self.label,
            "strength": self.cell.strength,
            "seed": self.cell.seed,
            "adapter": self.cell.adapter,
            "appearance": asdict(self.appearance),
            "change": {region: asdict(change) for region, change in self.change.items()},
            "kept": None if self.kept is None else asdict(self.kept),
        }


@dataclass(frozen=True)
class SweepMeasures:
    """Every image of a sweep."""

    cells: Mapping[Cell, CellMeasures]
    """In the order of the images."""
    size: tuple[int, int]
    """Width and height of the images in pixels."""
    num_frames: int = 1
    """Images behind each cell: the metrics are of all of them, the sheet shows the first."""
    has_mask: bool = False
    has_source: bool = False
    notes: tuple[str, ...] = ()
    """What was left out, one sentence each."""

    @property
    def strengths(self) -> list[float]:
        return sorted({cell.strength for cell in self.cells})

    @property
    def adapters(self) -> list[str]:
        """Their names, in the order of the images; [""] if none is named."""
        named = dict.fromkeys(cell.adapter for cell in self.cells if cell.strength != 0)
        return list(named or dict.fromkeys(cell.adapter for cell in self.cells))

    @property
    def seeds(self) -> list[int | None]:
        return list(dict.fromkeys(cell.seed for cell in self.cells))

    def find(self, strength: float, seed: int | None, adapter: str) -> CellMeasures | None:
        """The cell there; strength 0 of an adapter is the one shared by all."""
        found = self.cells.get(Cell(strength, seed, adapter))
        if found is None and strength == 0:
            return self.cells.get(Cell(0.0, seed))
        return found


def measure_sweep(
    images: Sequence[torch.Tensor],
    labels: Sequence[str],
    source: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    thumbnail_px: int = 256,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> SweepMeasures:
    """Measures one image after the other.

    Args:
        images: (batch, height, width, channels) each, 0 to 1; one per label, or a single one
            whose batch has one image per label.
        labels: as `cells.build_label` makes them, or bare strengths.
        source: the image that was edited, of any size; the first of its batch.
        mask: (height, width) of any size, 1 where the edit was meant to be.
        thumbnail_px: the longer side of the small copies.

    Raises:
        ConfigError: labels or sizes that do not match, or a seed without strength 0.
        InterruptedError: `should_stop` returned True.
    """
    images = split_images(images, labels)
    by_cell = index_by_cell(images, labels)
    check_sizes(by_cell)
    shape = images[0].shape
    height, width = shape[1:3]
    regions, notes = build_regions(mask, height, width)
    if source is not None:
        source, note = prepare_source(source, shape)
        notes += note
    measured: dict[Cell, CellMeasures] = {}
    for cell, image in track(by_cell.items(), progress, should_stop, message("sweep")):
        zero = find_reference(cell, by_cell)
        reference = None if zero is None else by_cell[zero]
        measured[cell] = measure_cell(cell, image, reference, source, regions, thumbnail_px)
    return SweepMeasures(
        cells=measured,
        size=(width, height),
        num_frames=shape[0],
        has_mask=INSIDE in regions,
        has_source=source is not None,
        notes=tuple(notes),
    )


def split_images(images: Sequence[torch.Tensor], labels: Sequence[str]) -> list[torch.Tensor]:
    """One tensor per label."""
    if len(images) == 1 and len(labels) > 1:
        images = list(images[0].split(1))
    if len(images) != len(labels) or not labels:
        raise ConfigError(
            "there are {num_images} and {num_labels}; expected one label per image, such as "
            "images and labels of Sweep Qwen Edit LoRA",
            num_images=format_count(len(images), "image"),
            num_labels=format_count(len(labels), "label"),
        )
    if len(labels) > MAX_CELLS:
        raise ConfigError(
            "there are {num_labels} images; expected at most {max_cells}",
            num_labels=len(labels),
            max_cells=MAX_CELLS,
        )
    return list(images)


def index_by_cell(
    images: Sequence[torch.Tensor], labels: Sequence[str]
) -> dict[Cell, torch.Tensor]:
    by_cell: dict[Cell, torch.Tensor] = {}
    for image, label in zip(images, labels, strict=True):
        cell = parse_label(label)
        if cell in by_cell:
            raise ConfigError(
                "two images have the label {cell!r}; expected every label once",
                cell=build_label(cell),
            )
        by_cell[cell] = image
    if all(find_reference(cell, by_cell) is None for cell in by_cell):
        raise ConfigError(
            "no image is labelled 'strength=0', and a change can only be measured against it; "
            "add strength 0 to the sweep"
        )
    return by_cell


def check_sizes(by_cell: Mapping[Cell, torch.Tensor]) -> None:
    first_cell, first = next(iter(by_cell.items()))
    for cell, image in by_cell.items():
        if image.shape[:3] != first.shape[:3]:
            raise ConfigError(
                "the images differ in size: {first_cell!r} is {first}, {cell!r} is {image}; "
                "expected the same size for all",
                first_cell=build_label(first_cell),
                first=describe_size(first),
                cell=build_label(cell),
                image=describe_size(image),
            )
    if min(first.shape[1:3]) < SSIM_WINDOW:
        raise ConfigError(
            "the images are {first}; expected at least {ssim_window} pixels each way",
            first=describe_size(first),
            ssim_window=SSIM_WINDOW,
        )


def find_reference(cell: Cell, known: Iterable[Cell]) -> Cell | None:
    """Strength 0 of the same seed: of the same adapter, or the one shared by all."""
    candidates = (replace(cell, strength=0.0), Cell(0.0, cell.seed))
    return next((candidate for candidate in candidates if candidate in known), None)


def build_regions(
    mask: torch.Tensor | None, height: int, width: int
) -> tuple[dict[str, torch.Tensor | None], list[str]]:
    regions: dict[str, torch.Tensor | None] = {WHOLE: None}
    if mask is None:
        return regions, []
    inside = fit_mask(mask, height, width)
    if inside.all() or not inside.any():
        # LoadImage gives an empty mask for an image without transparency.
        kind = message("empty") if not inside.any() else message("full")
        return regions, [message("the mask is {kind} and was left out", kind=kind)]
    return {**regions, INSIDE: inside, OUTSIDE: ~inside}, []


def prepare_source(source: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, list[str]]:
    """The source in the size of the images, once for each of their batch."""
    batch, height, width = shape[:3]
    fitted = fit_image(source[:1], height, width)
    notes = []
    rows, columns = source.shape[1:3]
    ratio = (columns / rows) / (width / height)
    if abs(ratio - 1) > 0.1:
        notes.append(
            message(
                "the source is {source} and was cut in the middle to the shape of {width} x "
                "{height}",
                source=describe_size(source[:1]),
                width=width,
                height=height,
            )
        )
    return fitted.expand(batch, -1, -1, -1), notes


def measure_cell(
    cell: Cell,
    image: torch.Tensor,
    reference: torch.Tensor | None,
    source: torch.Tensor | None,
    regions: Mapping[str, torch.Tensor | None],
    thumbnail_px: int,
) -> CellMeasures:
    image = take_colours(image)
    appearance = measure_appearance(image)
    change, kept, change_thumbnail = {}, None, None
    if appearance.non_finite == 0:
        if reference is not None:
            reference = take_colours(reference)
            if reference.isfinite().all():
                change = compare_images(image, reference, regions)
                difference = (clamp(image[:1]) - clamp(reference[:1])).abs_()
                change_thumbnail = shrink(difference, thumbnail_px).numpy().astype(np.float16)
        if source is not None:
            region = {OUTSIDE: regions.get(OUTSIDE)}
            kept = compare_images(image, source, region)[OUTSIDE]
    small = shrink(clamp(image[:1]), thumbnail_px)
    thumbnail = small.mul(255).round_().to(torch.uint8).numpy()
    return CellMeasures(cell, appearance, change, kept, thumbnail, change_thumbnail)


def shrink(image: torch.Tensor, longer_px: int) -> torch.Tensor:
    """(1, height, width, 3) -> (height, width, 3) with this longer side, or smaller."""
    height, width = image.shape[1:3]
    scale = min(1.0, longer_px / max(height, width))
    if scale == 1.0:
        return image[0].clamp(0, 1)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    resized = torch.nn.functional.interpolate(
        image.movedim(-1, 1), size, mode="bilinear", antialias=True
    )
    return resized[0].movedim(0, -1).clamp(0, 1).contiguous()

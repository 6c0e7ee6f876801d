"""Pairs from images of a graph: batches of targets and references, and captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError
from ..messages import message
from ..text import format_count
from .images import ArrayImage
from .pair import FoundPairs, Pair, clean_caption


def build_graph_pairs(
    targets: Sequence[np.ndarray],
    references: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
) -> FoundPairs:
    """Target i with image i of each reference input; a single image or caption is used for all.

    Args:
        targets, references: float32 (height, width, 3) in [0, 1].
        captions: one text with a line per target, or a text per target.

    Raises:
        ConfigError: no references, or counts that do not match.
    """
    number = len(targets)
    if not references:
        raise ConfigError(
            "targets are connected but no references; connect the images they are made from to "
            "reference_1"
        )
    for slot, images in enumerate(references, 1):
        if len(images) not in (1, number):
            raise ConfigError(
                "reference_{slot} holds {num_images} and targets {number}; expected as many, or "
                "one for all",
                slot=slot,
                num_images=format_count(len(images), "image"),
                number=number,
            )
    texts = split_captions(captions, number)
    shared = [
        [
            ArrayImage(message("reference {slot}.{i}", slot=slot, i=i + 1), image)
            for i, image in enumerate(images)
        ]
        for slot, images in enumerate(references, 1)
    ]
    pairs = [
        Pair(
            name=f"pair_{i + 1:03}",
            target=ArrayImage(message("target {i}", i=i + 1), target),
            references=tuple(p[i if len(p) == number else 0] for p in shared),
            caption=texts[i],
        )
        for i, target in enumerate(targets)
    ]
    return FoundPairs(message("images from the graph"), tuple(pairs))


def split_captions(captions: Sequence[str], number: int) -> list[str | None]:
    """A caption per target; None where there are none at all."""
    texts = [clean_caption(text) for text in captions]
    # Only a line end ends a line: a text pasted from elsewhere may hold U+2028 and its like.
    if len(texts) == 1 and number > 1:
        lines = [caption for caption in map(clean_caption, texts[0].split("\n")) if caption]
        texts = lines or [""]
    if not any(texts):
        return [None] * number
    if len(texts) not in (1, number):
        raise ConfigError(
            "captions holds {num_lines} and targets {num_images}; expected as many, or one for all",
            num_lines=format_count(len(texts), "line"),
            num_images=format_count(number, "image"),
        )
    return [*texts] * (number if len(texts) == 1 else 1)

"""Which items make up which batch, and which noise they get: functions of seed and position.

Nothing here is stateful. Micro-batch number n of a run is the same after a restart, and the same
for any division of its samples among processes, since every sample's draws come from its own
generator, seeded by (seed, epoch, place in the epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ...messages import message
from .dataset import CachedDataset, ItemInfo, collect_text
from .latents import count_target_tokens, normalize


@dataclass(frozen=True, slots=True)
class Slot:
    """One sample of a micro-batch: an item, and what seeds its random draws."""

    item: int
    """Index into the dataset's items."""
    epoch: int
    place: int
    """Number of the sample within its epoch."""


class DataOrder:
    """Mixed buckets in full batches, shuffled per epoch.

    Every batch holds `batch_size` samples of one bucket. A bucket that does not divide evenly
    shows some of its items a second time in that epoch, with other noise.
    """

    def __init__(self, items: Sequence[ItemInfo], batch_size: int, seed: object):
        self.batch_size = batch_size
        self.seed = seed
        self.buckets: dict[object, list[int]] = {}
        for index, info in enumerate(items):
            self.buckets.setdefault(info.bucket, []).append(index)
        self.batches_per_epoch = sum(
            -(-len(bucket) // batch_size) for bucket in self.buckets.values()
        )

    def get_slots(self, micro_step: int) -> tuple[Slot, ...]:
        """The samples of micro-batch number `micro_step`, counted from 0 over the whole run."""
        epoch, offset = divmod(micro_step, self.batches_per_epoch)
        items = self._shuffle(epoch)[offset]
        first = offset * self.batch_size
        return tuple(Slot(item, epoch, first + i) for i, item in enumerate(items))

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its run
    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = make_generator(self.seed, "order", epoch)
        batches = []
        for bucket in self.buckets.values():
            shuffled = permute(bucket, generator)
            shuffled += [shuffled[i % len(bucket)] for i in range(-len(bucket) % self.batch_size)]
            batches += [
                shuffled[start : start + self.batch_size]
                for start in range(0, len(shuffled), self.batch_size)
            ]
        return permute(batches, generator)

    def describe_repeats(self) -> str | None:
        """A message on the items that an epoch shows more than once."""
        repeats = [-len(bucket) % self.batch_size for bucket in self.buckets.values()]
        if not sum(repeats):
            return None
        return message(
            "sizes whose items do not fill batches of {batch_size}: {num_odd} of "
            "{num_sizes}; samples shown again in each epoch: {repeats}",
            batch_size=self.batch_size,
            num_odd=sum(map(bool, repeats)),
            num_sizes=len(repeats),
            repeats=sum(repeats),
        )


def permute(values: list, generator: torch.Generator) -> list:
    return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]


def make_generator(*words: object) -> torch.Generator:
    """A CPU generator that depends on the words alone."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Samples of one bucket, ready for the model; latents are normalised."""

    x_0: torch.Tensor
    """(B, 16, H, W)"""
    references: list[torch.Tensor]
    """One (B, 16, h, w) per reference."""
    text: torch.Tensor
    """(B, T, D)"""
    text_mask: torch.Tensor | None
    """(B, T), True for real tokens; None where no text is padded, which saves later checks."""
    noise: torch.Tensor
    u: torch.Tensor
    """float64 (B,) in (0, 1), from which noise levels are made."""
    mask: torch.Tensor | None
    """(B, 1, H, W) loss weights."""
    num_tokens: int
    """Tokens of all samples: targets, references and text without padding."""
    sigma: torch.Tensor | None = None
    """float32 (B,), the noise levels made from `u`; None before."""

    @property
    def num_target_tokens(self) -> int:
        """Per sample."""
        return count_target_tokens(*self.x_0.shape[-2:])

    def to(self, device: torch.device) -> Batch:
        """On `device`, except `u`; asynchronous from page-locked memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self, device: torch.device) -> Batch:
        """In page-locked memory, if `device` is a GPU; see `pin`."""
        return self._map(pin) if device.type == "cuda" else self

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else function(tensor)

        return replace(
            self,
            x_0=function(self.x_0),
            references=[function(reference) for reference in self.references],
            text=function(self.text),
            text_mask=move(self.text_mask),
            noise=function(self.noise),
            mask=move(self.mask),
            sigma=move(self.sigma),
        )


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked memory, the only kind that a GPU reads asynchronously.

    The tensor unchanged where the system grants no more of it, of which Windows and WSL2 have
    little: the copy to the GPU is then synchronous.
    """
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor


def load_repeated(dataset: CachedDataset, index: int, size: int, seed: object) -> Batch:
    """A batch that shows one item `size` times, to measure with."""
    return load_batch(dataset, [Slot(index, 0, place) for place in range(size)], seed)


def load_batch(
    dataset: CachedDataset,
    slots: Sequence[Slot],
    seed: object,
    *,
    caption_dropout: float = 0.0,
    use_masks: bool = True,
) -> Batch:
    """Reads the items of one micro-batch and draws their noise, level and caption dropout.

    Samples without a mask weigh every position equally, whatever the rest of the batch has.
    """
    items = [dataset.load(slot.item) for slot in slots]
    draws = [draw(seed, slot, item.target.shape) for slot, item in zip(slots, items, strict=True)]
    texts = []
    for item, (_, _, chance) in zip(items, draws, strict=True):
        text = item.text
        if chance < caption_dropout:
            text = dataset.load_empty_text() if item.text_empty is None else item.text_empty
        texts.append(text.float())
    text, text_mask = collect_text(texts)
    mask = None
    if use_masks and any(item.mask is not None for item in items):
        masks = [
            torch.ones(item.target.shape[1:]) if item.mask is None else item.mask.float()
            for item in items
        ]
        mask = torch.stack(masks)[:, None]
    # Converted first: items of one set may be stored in different dtypes.
    x_0 = normalize(torch.stack([item.target.float() for item in items]))
    references = [
        normalize(torch.stack([item.references[i].float() for item in items]))
        for i in range(len(items[0].references))
    ]
    image_tokens = sum(count_target_tokens(*latents.shape[-2:]) for latents in (x_0, *references))
    return Batch(
        x_0=x_0,
        references=references,
        text=text,
        text_mask=text_mask,
        noise=torch.stack([noise for noise, _, _ in draws]),
        u=torch.stack([u for _, u, _ in draws]),
        mask=mask,
        num_tokens=len(items) * image_tokens + sum(text.shape[0] for text in texts),
    )


def draw(seed: object, slot: Slot, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A sample's noise, its number u in (0, 1), and its chance number for caption dropout."""
    generator = make_generator(seed, "sample", slot.epoch, slot.place)
    u = torch.rand((), generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    chance = torch.rand((), generator=generator).item()
    return torch.randn(shape, generator=generator), u, chance

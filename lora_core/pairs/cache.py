"""Encoded pairs on disk: items keyed by their inputs, and a folder for each training set.

    items/<digest>.safetensors   one pair, named by a digest of its inputs
    sets/<name>-<digest>/        a training set as `training.data.dataset` reads it; its items are
                                 hard links to those above, copies where a disk has none

A set never changes: another caption makes another folder, so that a paused run finds what it was
trained on. Nothing is ever deleted here.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..disk.own_folders import check_own_folder, make_own_folder
from ..disk.safetensors_file import SafetensorsFile
from ..disk.writing import explain, replace
from ..errors import FileError, LoraError
from ..messages import message
from ..progress import Progress, ShouldStop, track
from ..text import format_bytes, format_count, shorten
from ..training.data.dataset import (
    CACHED_ITEM,
    ITEMS_FOLDER,
    CachedItem,
    DatasetWriter,
    read_dataset,
)
from ..training.data.item_checks import count_references, find_fault
from .facts import check_unchanged
from .preflight import CheckedPair

#: Goes up when the same pair would be encoded differently.
VERSION = 2
SETS_FOLDER = "sets"
FLOAT_BYTES = 4
TEXT_TOKENS_PER_REFERENCE = 200  # of a 384 x 384 image; the original's 1024 x 1024 has 1370
TEMPLATE_TOKENS = 64
LATENT_CHANNELS, PIXELS_PER_LATENT = 16, 8

Encode = Callable[[CheckedPair], CachedItem]


@dataclass(frozen=True)
class EditDataset:
    """What the dataset node passes to the trainer."""

    folder: Path
    """As `training.data.dataset.read_dataset` takes it."""
    name: str
    keys: tuple[str, ...]
    """Of its items, in their order."""
    variant: str
    """"2509 / 2511" or "original"."""
    summary: str
    """One line for reports."""


@dataclass(frozen=True)
class CachedPairs:
    """What `cache_pairs` did."""

    folder: Path
    keys: tuple[str, ...]
    """Of its items, in their order."""
    num_encoded: int
    num_reused: int


def compute_key(checked: CheckedPair, settings: Mapping[str, object]) -> str:
    """A digest of all that an item depends on.

    Args:
        settings: template, sizes, the identities of CLIP and VAE; anything JSON can hold.
    """
    facts = checked.facts
    parts = {
        "version": VERSION,
        "target": facts.target.digest,
        "references": [reference.digest for reference in facts.references],
        "mask": facts.mask.digest if facts.mask else None,
        "caption": checked.pair.caption,
        "size": checked.size,
        **settings,
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cache_pairs(
    store: Path,
    name: str,
    pairs: Sequence[CheckedPair],
    digests: Sequence[str],
    encode: Encode,
    settings: Mapping[str, object],
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> CachedPairs:
    """Encodes what is missing, one pair at a time; finished items survive an interruption.

    Args:
        digests: as `compute_key` gives one for each pair.
        settings: those of the digests; stored with the set.

    Raises:
        FileError: the disk does not take it, a folder of the cache is a link, or an image changed
            while it was encoded.
        InterruptedError: `should_stop` returned True.
    """
    for own in (store / ITEMS_FOLDER, store / SETS_FOLDER):
        check_own_folder(own)  # before the work
    items = DatasetWriter(store)
    encoded = 0
    for one, key in track(
        list(zip(pairs, digests, strict=True)),
        progress,
        should_stop,
        message("encoding of the pairs"),
    ):
        if not is_encoded(get_path(store, key), one):
            item = encode(one)
            check_unchanged(one.pair, one.facts)  # or it would be another pair's under this key
            items.add(key, item, one.pair.caption or "")
            encoded += 1
    folder, keys = write_set(store, name, pairs, digests, settings)
    return CachedPairs(folder, keys, encoded, len(pairs) - encoded)


def list_missing(
    store: Path, pairs: Sequence[CheckedPair], digests: Sequence[str]
) -> list[CheckedPair]:
    """Those that would have to be encoded."""
    keyed = zip(pairs, digests, strict=True)
    return [one for one, digest in keyed if not is_encoded(get_path(store, digest), one)]


def get_path(store: Path, key: str) -> Path:
    return store / ITEMS_FOLDER / f"{key}.safetensors"


def is_encoded(path: Path, checked: CheckedPair) -> bool:
    """Whether this pair's item exists and is complete, by its header; any other is encoded again.

    An item of another number of references, or with a mask that the pair lacks, is another pair's.
    """
    try:
        file = SafetensorsFile(path, CACHED_ITEM)
    except FileError:
        return False
    file.release()
    pair = checked.pair
    return (
        find_fault(file.tensors) is None
        and count_references(file.tensors) == len(pair.references)
        and ("mask" in file.tensors) == (pair.mask is not None)
    )


def write_set(
    store: Path,
    name: str,
    pairs: Sequence[CheckedPair],
    digests: Sequence[str],
    settings: Mapping[str, object],
) -> tuple[Path, tuple[str, ...]]:
    """The folder of exactly this set and its items' keys; an existing complete one is reused."""
    named = [f"{slug(one.pair.name)}-{text[:12]}" for one, text in zip(pairs, digests, strict=True)]
    digest = hashlib.blake2b("\n".join([*named, *digests]).encode(), digest_size=6).hexdigest()
    folder = store / SETS_FOLDER / f"{slug(name)}-{digest}"
    for own in (folder, folder / ITEMS_FOLDER):
        check_own_folder(own)
    keys = tuple(dict.fromkeys(named))  # two equal pairs of one name are one item
    if is_set(folder):
        return folder, keys
    writer = DatasetWriter(folder)
    for item_name, one, text in zip(named, pairs, digests, strict=True):
        link(get_path(store, text), folder / ITEMS_FOLDER / f"{item_name}.safetensors")
        writer.add_file(item_name, one.pair.caption or "")
    return writer.finish({"name": name, **settings}), keys


def is_set(folder: Path) -> bool:
    try:
        read_dataset(folder).check_items()
    except LoraError:
        return False
    return True


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy; FileError where neither is possible."""
    try:
        make_own_folder(target.parent, parents=True)
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:  # another disk, or one without links
            temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
            try:
                shutil.copyfile(source, temporary)
                replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as e:
        raise FileError(
            "{target} cannot be written: {reason}.", target=shorten(target.name), reason=explain(e)
        ) from None


def slug(name: str) -> str:
    """A file name of ASCII letters that a person recognises; digests make it unique."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-")
    return plain[:60] or "pair"


# --- before the work ------------------------------------------------------------------------------


def check_disk(
    store: Path, missing: Sequence[CheckedPair], text_width: int, reference_megapixels: float
) -> None:
    """Whether the cache's folder can be written and has room.

    Raises:
        FileError: it is not writable, or is full.
    """
    probe = store / f".{secrets.token_hex(8)}.tmp"
    try:
        store.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(store).free
    except OSError as e:
        raise FileError(
            "the cache folder {store} cannot be written: {reason}.",
            store=show_store(store),
            reason=explain(e),
        ) from None
    needed = sum(estimate_bytes(one, text_width, reference_megapixels) for one in missing)
    if needed > free:
        raise FileError(
            "encoding {num_pairs} takes about {needed}, but the disk of {store} has {free} "
            "free; free some space, or lower megapixels.",
            num_pairs=format_count(len(missing), "pair"),
            needed=format_bytes(needed),
            store=show_store(store),
            free=format_bytes(free),
        )


def show_store(store: Path) -> str:
    """As messages call it: paths of a user's folders are private."""
    return f"{store.parent.name}/{store.name}"


def estimate_bytes(checked: CheckedPair, text_width: int, reference_megapixels: float) -> int:
    """Of one item in float32: latents, and two embeddings."""
    references = len(checked.pair.references)
    pixels = checked.size[0] * checked.size[1] + references * reference_megapixels * 1024**2
    latents = LATENT_CHANNELS * pixels / PIXELS_PER_LATENT**2
    tokens = references * TEXT_TOKENS_PER_REFERENCE + TEMPLATE_TOKENS
    tokens_of_caption = len(checked.pair.caption or "") / 3
    return round(FLOAT_BYTES * (latents + 2 * (tokens + tokens_of_caption) * text_width))


def measure_store(store: Path) -> tuple[int, int]:
    """(items, bytes) of the whole cache, those of other sets included."""
    sizes = [path.stat().st_size for path in (store / ITEMS_FOLDER).glob("*.safetensors")]
    return len(sizes), sum(sizes)

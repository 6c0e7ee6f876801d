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
from ..disk.safetensors_file import AnyTensor, SafetensorsFile
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
from ..training.data.item_checks import count_references, find_fault, find_owner_fault
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
class KeyedPair:
    """A pair, and its item in the cache."""

    checked: CheckedPair
    key: str
    """As `compute_key` makes it."""
    path: Path
    tensors: Mapping[str, AnyTensor] | None
    """Shapes and dtypes, by its header; None where it has to be encoded."""


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


def find_items(
    store: Path, pairs: Sequence[CheckedPair], settings: Mapping[str, object]
) -> list[KeyedPair]:
    """What of a set is encoded; each file is opened once, and none is read.

    Args:
        settings: as for `compute_key`.
    """
    keyed = []
    for checked in pairs:
        key = compute_key(checked, settings)
        path = store / ITEMS_FOLDER / f"{key}.safetensors"
        keyed.append(KeyedPair(checked, key, path, read_header(path, checked)))
    return keyed


def read_header(path: Path, checked: CheckedPair) -> Mapping[str, AnyTensor] | None:
    """The tensors of this pair's item, by its header; None where there is none, or no whole one.

    An item of another number of references, or with a mask that the pair lacks, is another pair's.
    """
    try:
        file = SafetensorsFile(path, CACHED_ITEM)
    except FileError:
        return None
    file.release()
    pair, tensors = checked.pair, file.tensors
    is_its_own = (
        find_owner_fault(file.metadata, path.stem) is None
        and find_fault(tensors) is None
        and count_references(tensors) == len(pair.references)
        and ("mask" in tensors) == (pair.mask is not None)
    )
    return tensors if is_its_own else None


def cache_pairs(
    store: Path,
    name: str,
    keyed: Sequence[KeyedPair],
    encode: Encode,
    settings: Mapping[str, object],
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> CachedPairs:
    """Encodes what is missing, one pair at a time; finished items survive an interruption.

    Args:
        keyed: as `find_items` gives them for these settings.
        settings: stored with the set.

    Raises:
        FileError: the disk does not take it, a folder of the cache is a link, or an image changed
            while it was encoded.
        InterruptedError: `should_stop` returned True.
    """
    for own in (store / ITEMS_FOLDER, store / SETS_FOLDER):
        check_own_folder(own)  # before the work
    items = DatasetWriter(store)
    headers = {one.key: one.tensors for one in keyed if one.tensors is not None}
    num_reused = len(headers)
    for one in track(keyed, progress, should_stop, message("encoding of the pairs")):
        if one.key not in headers:
            item = encode(one.checked)
            # or it would be another pair's under this key
            check_unchanged(one.checked.pair, one.checked.facts)
            items.add(one.key, item, one.checked.pair.caption or "")
            headers[one.key] = {name: tensor.to("meta") for name, tensor in item.tensors.items()}
    folder, keys = write_set(store, name, keyed, headers, settings)
    num_encoded = len(headers) - num_reused
    return CachedPairs(folder, keys, num_encoded, len(keyed) - num_encoded)


def write_set(
    store: Path,
    name: str,
    keyed: Sequence[KeyedPair],
    headers: Mapping[str, Mapping[str, AnyTensor]],
    settings: Mapping[str, object],
) -> tuple[Path, tuple[str, ...]]:
    """The folder of exactly this set and its items' keys; an existing complete one is reused.

    Args:
        headers: key -> tensors of its item; only their shapes are used.
    """
    named = [f"{slug(one.checked.pair.name)}-{one.key[:12]}" for one in keyed]
    text = "\n".join([*named, *(one.key for one in keyed)])
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    folder = store / SETS_FOLDER / f"{slug(name)}-{digest}"
    for own in (folder, folder / ITEMS_FOLDER):
        check_own_folder(own)
    keys = tuple(dict.fromkeys(named))  # two equal pairs of one name are one item
    if is_set(folder):
        return folder, keys
    writer = DatasetWriter(folder)
    for item_name, one in zip(named, keyed, strict=True):
        link(one.path, folder / ITEMS_FOLDER / f"{item_name}.safetensors")
        writer.add_entry(item_name, headers[one.key], one.checked.pair.caption or "")
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

"""The cached training set on disk: what a training step needs, encoded once.

A folder with `index.json`, one safetensors file per item under `items/`, and perhaps
`empty.safetensors`. Tensors of an item, D being the width of the text embedding (3584):

    target           (16, H, W)   latents as the VAE gives them, not normalised
    reference_<i>    (16, h, w)   likewise, i = 0, 1, ...; sizes may differ from the target's
    text             (T, D)       embedding of the caption and of the references it was made with
    text_empty       (T', D)      the same with an empty caption; optional
    mask             (H, W)       loss weights >= 0; optional

`empty.safetensors` holds `text_empty` for the items without one of their own.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval, Predicate
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...disk.content_samples import sample_contents
from ...disk.json_reader import parse_object
from ...disk.own_folders import make_own_folder
from ...disk.regular_files import read_bytes
from ...disk.safetensors_file import AnyTensor, SafetensorsFile
from ...disk.typed_json import parse_typed
from ...disk.writing import explain, write_then_rename
from ...errors import ConfigError, FileError, MissingFileError, ShapeError, get_reason
from ...messages import message
from ...text import shorten
from .item_checks import (
    ITEM_KEY,
    KEY,
    MAX_SIDE,
    MAX_TEXT_TOKENS,
    MAX_TEXT_WIDTH,
    check_item,
    count_references,
    find_fault,
    find_name_fault,
    find_owner_fault,
    find_text_fault,
    is_mask,
)
from .latents import count_target_tokens

VERSION = 1
INDEX_FILE = "index.json"
EMPTY_FILE = "empty.safetensors"
ITEMS_FOLDER = "items"
CACHED_ITEM = message("a cached item")
#: How all latents of a set are stored: as the VAE gives them.
LATENTS = "raw"
#: Of an index: a million items.
MAX_INDEX_BYTES = 512 << 20

#: Latent pixels.
Side = Annotated[int, Interval(ge=1, le=MAX_SIDE)]
Size = tuple[Side, Side]


@dataclass(frozen=True)
class ItemInfo:
    """One line of the index: all that batches are made from."""

    key: Annotated[str, Predicate(KEY.fullmatch)]
    """File name without `.safetensors`; letters, digits, `.`, `_` and `-`."""
    target: Size
    """(H, W) in latent pixels."""
    references: tuple[Size, ...]
    num_text_tokens: Annotated[int, Interval(ge=1, le=MAX_TEXT_TOKENS)]
    caption: str = ""
    has_mask: bool = False
    has_empty_text: bool = False

    @property
    def bucket(self) -> tuple[Size, ...]:
        """Items of one bucket can share a batch: RoPE is computed once for all of it."""
        return (self.target, *self.references)

    @property
    def num_tokens(self) -> int:
        """Tokens of the joint sequence: target, references and text."""
        return sum(count_target_tokens(*size) for size in self.bucket) + self.num_text_tokens


@dataclass(frozen=True)
class IndexContent:
    """What `DatasetWriter.finish` writes."""

    version: Annotated[int, Interval(ge=VERSION, le=VERSION)]
    text_width: Annotated[int, Interval(ge=1, le=MAX_TEXT_WIDTH)]
    has_empty_text: bool
    metadata: dict[str, Any]
    items: tuple[ItemInfo, ...]
    latents: str = ""


@dataclass(frozen=True, eq=False)
class CachedItem:
    """One item's tensors as stored; see the module's docstring."""

    target: torch.Tensor
    references: tuple[torch.Tensor, ...]
    text: torch.Tensor
    text_empty: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"target": self.target, "text": self.text}
        named.update({f"reference_{i}": r for i, r in enumerate(self.references)})
        optional = {"text_empty": self.text_empty, "mask": self.mask}
        return named | {name: t for name, t in optional.items() if t is not None}


class DatasetWriter:
    """Writes a training set; it is incomplete until `finish` has written the index.

    Adding a key again replaces its item. An existing set is replaced at `finish`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._items: dict[str, ItemInfo] = {}
        self._text_width: int | None = None
        self._has_empty_text = False

    def add(self, key: str, item: CachedItem, caption: str = "") -> ItemInfo:
        """Checks and writes one item.

        Raises:
            ConfigError: a key that cannot be a file name.
            ShapeError: tensors of other shapes than the module's docstring gives.
            FileError: non-finite values, or the file cannot be written.
        """
        if not KEY.fullmatch(key):
            raise ConfigError(
                "{key!r} cannot name a cached item; expected letters, digits, '.', '_' and '-'",
                key=key,
            )
        self._check(key, item)
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in item.tensors.items()
        }
        self._save(self.folder / ITEMS_FOLDER / f"{key}.safetensors", tensors, {ITEM_KEY: key})
        return self.add_entry(key, tensors, caption)

    def add_entry(self, key: str, tensors: Mapping[str, AnyTensor], caption: str = "") -> ItemInfo:
        """Records an item whose file is in `items/` already.

        Args:
            tensors: the file's; only their shapes are used.

        Raises:
            ShapeError: its text embedding's width differs from the others'.
        """
        self._check_text(key, tensors["text"])
        num_references = count_references(tensors)
        info = ItemInfo(
            key=key,
            target=get_size(tensors["target"]),
            references=tuple(get_size(tensors[f"reference_{i}"]) for i in range(num_references)),
            num_text_tokens=tensors["text"].shape[0],
            caption=caption,
            has_mask="mask" in tensors,
            has_empty_text="text_empty" in tensors,
        )
        self._items[key] = info
        return info

    def set_empty_text(self, text_empty: torch.Tensor) -> None:
        """(T, D): the embedding of an empty caption for every item that has none itself."""
        self._check_text(message("the empty caption"), text_empty)
        tensors = {"text_empty": text_empty.detach().cpu().contiguous()}
        self._save(self.folder / EMPTY_FILE, tensors)
        self._has_empty_text = True

    def finish(self, metadata: Mapping[str, object] | None = None) -> Path:
        """Writes the index, in the order in which items were added.

        Args:
            metadata: what the caches were made with, such as the VAE's name; stored unchanged.
        """
        if not self._items:
            raise ConfigError("the training set holds no items; expected at least one")
        index = {
            "version": VERSION,
            "latents": LATENTS,
            "text_width": self._text_width,
            "has_empty_text": self._has_empty_text,
            "metadata": dict(metadata or {}),
            "items": [vars(info) for info in self._items.values()],
        }
        path = self.folder / INDEX_FILE
        # Half a surrogate pair in a caption is no character: "?" takes its place.
        data = json.dumps(index, indent=1, ensure_ascii=False).encode(errors="replace")
        try:
            write_then_rename(path, lambda temporary: temporary.write_bytes(data))
        except OSError as e:
            raise FileError(
                "{path} cannot be written: {reason}.", path=path.name, reason=explain(e)
            ) from None
        return self.folder

    def _check(self, key: str, item: CachedItem) -> None:
        check_item(key, item)
        self._check_text(key, item.text)
        if item.text_empty is not None:
            self._check_text(key, item.text_empty)

    def _check_text(self, key: str, text: AnyTensor) -> None:
        if text.ndim != 2 or not text.numel() or self._text_width not in (None, text.shape[1]):
            width = self._text_width or "width"
            raise ShapeError(
                "{key}: the text embedding is {text_shape}; expected (tokens, {width})",
                key=key,
                text_shape=tuple(text.shape),
                width=width,
            )
        self._text_width = text.shape[1]

    def _save(
        self, path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        try:
            make_own_folder(path.parent, parents=True)
            if path.exists() and not path.is_file() and not path.is_dir():
                path.unlink()  # a pipe in the set's own folder: nothing of the user's is in it
            write_then_rename(path, lambda temporary: save_file(tensors, temporary, metadata))
        except (OSError, SafetensorError) as e:
            raise FileError(
                "{path} cannot be written: {reason}.", path=path.name, reason=explain(e)
            ) from None


@dataclass(frozen=True)
class CachedDataset:
    """A training set that `DatasetWriter` wrote; items are read when asked for."""

    folder: Path
    items: tuple[ItemInfo, ...]
    text_width: int
    has_empty_text: bool
    metadata: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """Changes when items come, go or change their sizes: data order would not be the same."""
        import hashlib

        text = json.dumps([vars(info) for info in self.items])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def sample_contents(self) -> str | None:
        """Changes, all but surely, when any item's tensors do; None if a file cannot be read."""
        names = sorted(f"{info.key}.safetensors" for info in self.items)
        paths = [self.folder / ITEMS_FOLDER / name for name in names]
        paths += [self.folder / EMPTY_FILE] if self.has_empty_text else []
        return sample_contents(paths, num_samples=4)

    def find_largest(self) -> int:
        """Index of the item with the most tokens."""
        return max(range(len(self)), key=lambda index: self.items[index].num_tokens)

    def load(self, index: int) -> CachedItem:
        """Reads one item.

        Raises:
            FileError: the file is missing, damaged, or does not match the index.
        """
        info = self.items[index]
        file, tensors = self._read(f"{ITEMS_FOLDER}/{info.key}.safetensors")
        self._check_item(info, file)
        item = CachedItem(
            target=tensors["target"],
            references=tuple(tensors[f"reference_{i}"] for i in range(len(info.references))),
            text=tensors["text"],
            text_empty=tensors["text_empty"] if info.has_empty_text else None,
            mask=tensors["mask"] if info.has_mask else None,
        )
        if item.mask is not None and not is_mask(item.mask):
            raise FileError(
                "{key}.safetensors has a mask that is 0 everywhere, negative or not finite; "
                "make the training set again.",
                key=shorten(info.key),
            )
        return item

    def load_empty_text(self) -> torch.Tensor:
        """(T, D), shared by the items without one of their own.

        Raises:
            FileError: the file is missing, damaged, or holds no such embedding.
        """
        _, tensors = self._read(EMPTY_FILE)
        self._check_empty(tensors)
        return tensors["text_empty"]

    def check_items(self) -> None:
        """Whether every item is what the index says, by the headers of their files.

        Found here, before a run starts, and not after the thousand steps that lead to the item.

        Raises:
            FileError: as `load` and `load_empty_text`.
        """
        for info in self.items:
            file = open_item(self.folder / ITEMS_FOLDER / f"{info.key}.safetensors")
            file.release()
            self._check_item(info, file)
        if self.has_empty_text:
            file = open_item(self.folder / EMPTY_FILE)
            file.release()
            self._check_empty(file.tensors)

    def check_captions_can_drop(self) -> None:
        """ConfigError unless every item has the embedding of an empty caption."""
        lacking = [info.key for info in self.items if not info.has_empty_text]
        if lacking and not self.has_empty_text:
            raise ConfigError(
                "caption_dropout needs the embedding of an empty caption, which {lacking} and "
                "{num_lacking} more items lack; cache it with the training set, or set "
                "caption_dropout to 0",
                lacking=lacking[0],
                num_lacking=len(lacking) - 1,
            )

    def _check_item(self, info: ItemInfo, file: SafetensorsFile) -> None:
        fault = find_owner_fault(file.metadata, info.key)
        fault = fault or find_fault(file.tensors, info, self.text_width)
        if fault is not None:
            raise FileError(refuse_misfit(f"{shorten(info.key)}.safetensors", fault))

    def _check_empty(self, tensors: Mapping[str, AnyTensor]) -> None:
        fault = find_name_fault(tensors, ["text_empty"])
        fault = fault or find_text_fault(tensors, "text_empty", self.text_width)
        if fault is not None:
            raise FileError(refuse_misfit(EMPTY_FILE, fault))

    def _read(self, name: str) -> tuple[SafetensorsFile, dict[str, torch.Tensor]]:
        file = open_item(self.folder / name)
        try:
            return file, {key: tensor.load() for key, tensor in file.tensors.items()}
        finally:
            file.release()


def open_item(path: Path) -> SafetensorsFile:
    """FileError with what to do where it is none."""
    try:
        return SafetensorsFile(path, CACHED_ITEM)
    except FileError as e:
        kind = type(e)
        raise kind("{error} If that does not help, make the training set again.", error=e) from None


def read_dataset(folder: str | os.PathLike[str]) -> CachedDataset:
    """Opens a cached training set.

    Raises:
        FileError: no index, one of another version, one that no `DatasetWriter` wrote, or files
            that it names are missing.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    try:
        index = parse_index(read_bytes(path, MAX_INDEX_BYTES), folder.name)
    except MissingFileError:
        raise FileError(
            "{folder} is not a cached training set: it holds no index.json. Make one first, "
            "or correct the folder's name.",
            folder=shorten(folder.name),
        ) from None
    except FileError as e:
        raise FileError("{error} Make the training set again.", error=e) from None
    dataset = CachedDataset(
        folder, index.items, index.text_width, index.has_empty_text, index.metadata
    )
    check_files(dataset)
    return dataset


def parse_index(data: bytes, name: str) -> IndexContent:
    """
    Args:
        name: of the training set.

    Raises:
        FileError: no JSON, of another version, or not what `DatasetWriter` writes.
    """
    try:
        index = parse_typed(data, IndexContent)
    except ValueError as e:
        version = parse_object(data, INDEX_FILE).get("version")
        if version == VERSION:
            raise FileError("index.json is damaged ({error}).", error=e) from None
        raise FileError(
            "{name} was cached by another version of this package (format {version}, this is "
            "{expected_version}).",
            name=shorten(name),
            version=shorten(str(version), 20),
            expected_version=VERSION,
        ) from None
    if index.latents != LATENTS:
        found = shorten(repr(index.latents), 40)
        raise FileError(
            "index.json is damaged (its latents are {found}, expected {latents!r}).",
            found=found,
            latents=LATENTS,
        )
    twice = [key for key, n in Counter(info.key for info in index.items).items() if n > 1]
    if twice:
        raise FileError(
            "index.json is damaged (it names {twice} more than once).",
            twice=shorten(twice[0]),
        )
    return index


def refuse_misfit(name: str, fault: str) -> str:
    return message(
        "{name} does not fit index.json: {fault}; make the training set again.",
        name=name,
        fault=fault,
    )


def check_files(dataset: CachedDataset) -> None:
    folder = dataset.folder / ITEMS_FOLDER
    try:
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as e:
        raise FileError(
            "{folder} cannot be listed: {reason}.",
            folder=shorten(folder.name),
            reason=get_reason(e),
        ) from None
    lacking = [info.key for info in dataset.items if f"{info.key}.safetensors" not in there]
    if lacking or not dataset.items:
        raise FileError(
            "{folder} lacks {num_lacking} of the {total} items its index.json names, "
            "such as {lacking}; make the training set again.",
            folder=shorten(dataset.folder.name),
            num_lacking=len(lacking),
            total=len(dataset),
            lacking=shorten((lacking or ["any"])[0]),
        )


def get_size(latents: AnyTensor) -> Size:
    return latents.shape[-2], latents.shape[-1]


def collect_text(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings (T_i, D) -> (B, T, D) padded with 0, and which tokens are real, (B, T).

    No mask where all are as long: an all-true mask makes attention take a slower kernel, and on a
    GPU it could not be checked without synchronising.
    """
    lengths = [text.shape[0] for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    if min(lengths) == max(lengths):
        return padded, None
    return padded, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def check_text_width(dataset: CachedDataset, width: int) -> None:
    """
    Args:
        width: of the text embeddings that the model takes.

    Raises:
        ConfigError: the training set's have another width.
    """
    if dataset.text_width != width:
        raise ConfigError(
            "the training set's text embeddings are {text_width} wide, but the model takes "
            "{width}; cache it with this model's text encoder",
            text_width=dataset.text_width,
            width=width,
        )

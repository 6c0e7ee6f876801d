"""Checkpoints: folders that are complete or absent, even if the process dies at any moment.

`step_00000250/` holds one safetensors file per group of tensors, and `state.json` with the numbers,
every file's size and digest (BLAKE2b), and a digest of itself. A folder is filled under a temporary
name, flushed to disk (fsync) and renamed; an old one is renamed away before its files are deleted.
So whatever has a checkpoint's name was complete when it got it; later corruption is detected before
any of it is used. No pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...disk.own_folders import check_own_folder, is_link, make_own_folder
from ...disk.regular_files import open_regular, read_bytes
from ...disk.safetensors_file import SafetensorsFile
from ...disk.writing import explain, rename, separate
from ...errors import FileError, get_reason
from ...messages import message
from ...text import shorten

VERSION = 2
STATE_FILE = "state.json"
#: In a run's folder.
CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step_([0-9]{8,})")
#: What a killed process may leave behind: half-written files (`write_then_rename`, and the names
#: under which safetensors itself writes), half-filled and half-deleted checkpoints, and the trial
#: of a folder.
_LEFTOVER = re.compile(r"\.(step_[0-9]{8,}\.)?[0-9a-f]{16}\.tmp|\.tmp[0-9A-Za-z]{6}")

DIGEST_BYTES = 16
READ_BYTES = 2**22
MAX_STATE_BYTES = 2**30

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A complete checkpoint, read into memory."""

    path: Path
    step: int
    tensors: Mapping[str, Tensors]
    """Group ("adapter", "optimizer", ...) -> its tensors."""
    state: Mapping[str, Any]
    """What JSON can hold."""


@dataclass
class CheckpointFolder:
    """The checkpoints of one run."""

    folder: Path
    keep: int = 2
    passed_over: list[str] = field(default_factory=list)
    """A sentence for each damaged checkpoint that `read_latest` skipped."""
    damaged_steps: set[int] = field(default_factory=set)
    """Theirs: they do not count among those that are kept."""

    def prepare(self) -> None:
        """Creates the folder, tests that it is writable, and removes what a killed process left.

        The run's own folder has to exist: if it was moved away meanwhile, it must not be created
        again.

        Raises:
            FileError: the folder is read-only or its disk is full, or the run's is missing.
        """
        try:
            make_own_folder(self.folder)
            trial = self.folder / f".{secrets.token_hex(8)}.tmp"
            trial.write_bytes(b"\0" * 4096)
            trial.unlink()
        except OSError as e:
            raise FileError(
                "{folder_parent} cannot be used for checkpoints: {reason}.",
                folder_parent=self.folder.parent.name,
                reason=explain(e),
            ) from None
        remove_leftovers(self.folder)

    def list_steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def get_path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def write(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then deletes all up to it but the newest `keep` intact ones.

        Raises:
            FileError: the disk is full or the folder read-only. Older checkpoints are untouched.
        """
        path = self.get_path(step)
        temporary = self._name_temporary(step)
        try:
            make_own_folder(self.folder)
            temporary.mkdir()
            for group, named in tensors.items():
                save_file(separate(named), temporary / f"{group}.safetensors")
            files = {file.name: describe_file(file) for file in sorted(temporary.iterdir())}
            record = {"version": VERSION, "step": step, "files": files, "state": dict(state)}
            record["digest"] = compute_state_digest(record)
            (temporary / STATE_FILE).write_text(json.dumps(record), encoding="utf-8")
            for file in temporary.iterdir():
                synchronize(file)
            synchronize(temporary)
            self._move_away(path)
            rename(temporary, path)
            synchronize(self.folder)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = self.list_steps()
            last = (
                message("the last good one is of step {kept}", kept=kept[-1])
                if kept
                else message("there is none yet")
            )
            raise FileError(
                "the checkpoint of step {step} cannot be written: {reason}; {last}.",
                step=step,
                reason=explain(e),
                last=last,
            ) from None
        self.damaged_steps.discard(step)
        self.rotate(step)
        return path

    def read_latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; `passed_over` tells why newer ones were skipped."""
        for step in reversed(self.list_steps()):
            try:
                found = read_checkpoint(self.get_path(step))
                self.damaged_steps.discard(step)
                return found
            except FileError as e:
                self.passed_over.append(str(e))
                self.damaged_steps.add(step)
        return None

    def read_newest_state(self) -> Mapping[str, Any] | None:
        """Of the newest checkpoint whose state.json is intact, whatever its tensors are."""
        for step in reversed(self.list_steps()):
            with contextlib.suppress(FileError):
                state = read_record(self.get_path(step))["state"]
                return state if isinstance(state, dict) else None
        return None

    def _name_temporary(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.{secrets.token_hex(8)}.tmp"

    def rotate(self, newest: int) -> None:
        """Deletes older checkpoints. A later one was skipped as damaged: the run replaces it."""
        older = [step for step in self.list_steps() if step <= newest]
        kept = [step for step in older if step not in self.damaged_steps][-self.keep :]
        for step in set(older) - set(kept):
            with contextlib.suppress(OSError):  # a leftover is no reason to end a run
                self._move_away(self.get_path(step))

    def _move_away(self, path: Path) -> None:
        """Deletes a checkpoint so that its name goes first."""
        found = _NAME.fullmatch(path.name)
        if found is not None and os.path.lexists(path):
            condemned = self._name_temporary(int(found[1]))
            rename(path, condemned)
            remove(condemned)


def make_folder(folder: Path, what: str = message("checkpoints")) -> None:
    """Creates a folder and its parents, before a run. During a run nothing creates one.

    Raises:
        FileError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:  # ValueError: no name of any folder
        name, reason = shorten(folder.name), shorten(explain(e), 200)
        raise FileError(
            "{name} cannot be used for {what}: {reason}.", name=name, what=what, reason=reason
        ) from None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's folder into memory.

    Raises:
        FileError: as `read_record`, or files are missing, cut short or changed.
    """
    with explaining_damage(path):
        record = read_record(path)
        files = {path / name: described for name, described in record["files"].items()}
        for file, described in files.items():
            if not file.is_file() or file.stat().st_size != described["size"]:
                raise FileError(
                    "{path} is damaged: {file} is missing or cut short.",
                    path=path.name,
                    file=file.name,
                )
            if describe_file(file) != described:
                raise FileError(
                    "{path} is damaged: {file} is not what was written.",
                    path=path.name,
                    file=file.name,
                )
        tensors = {file.stem: dict(read_tensors(file)) for file in files}
        return Checkpoint(path, record["step"], tensors, record["state"])


def read_record(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json, after checking its digest.

    Raises:
        FileError: it is missing or changed, another version wrote it, or the checkpoint is a link.
    """
    if is_link(path):
        raise FileError("{path} is a link; expected a folder of the run's own.", path=path.name)
    try:
        data = read_bytes(path / STATE_FILE, MAX_STATE_BYTES)
    except FileError as e:
        raise FileError("{path} is damaged: {error}", path=path.name, error=e) from None
    with explaining_damage(path):
        # Not by the reader of untrusted JSON: prodigy's state holds an infinity, and the digest
        # verifies that it is what was written.
        record: dict[str, Any] = json.loads(data)
        if record["version"] != VERSION:
            raise FileError(
                "{path} was written by another version of this package (format {found}, this "
                "is {version}); start the run again.",
                path=path.name,
                found=record["version"],
                version=VERSION,
            )
        if record["digest"] != compute_state_digest(record):
            raise FileError(
                "{path} is damaged: {state_file} is not what was written.",
                path=path.name,
                state_file=STATE_FILE,
            )
        return record


@contextlib.contextmanager
def explaining_damage(path: Path) -> Iterator[None]:
    """Inside the block, errors of a checkpoint's reading say that it is damaged."""
    try:
        yield
    except OSError as e:
        raise FileError(
            "{path} cannot be read: {reason}.", path=path.name, reason=get_reason(e)
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, FileError):
            raise
        raise FileError(
            "{path} is damaged: its {state_file} is not readable.",
            path=path.name,
            state_file=STATE_FILE,
        ) from None


def describe_file(path: Path) -> dict[str, Any]:
    """Identifies a file's content and detects any damage: size and BLAKE2b digest."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    size = 0
    with open_regular(path) as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
            size += len(data)
    return {"size": size, "digest": digest.hexdigest()}


def compute_state_digest(record: Mapping[str, Any]) -> str:
    """Of everything in state.json but the digest itself; JSON keeps numbers exactly."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left unfinished; nothing that has its final name.

    Raises:
        FileError: the folder is a link.
    """
    check_own_folder(folder)
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Deletes a file, a folder as far as that is possible, or a link and not what it leads to."""
    if path.is_dir() and not is_link(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies, so that no mapping of the file remains open."""
    file = SafetensorsFile(path)
    for key, tensor in file.tensors.items():
        yield key, tensor.load().clone()
    file.release()


def synchronize(path: Path) -> None:
    """Flushes a file or folder to disk; Windows cannot open folders for that."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

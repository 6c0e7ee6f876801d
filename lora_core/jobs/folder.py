"""One job's folder: reading and writing its three JSON files, each write all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ..disk.json_reader import parse_object
from ..disk.own_folders import check_own_folder
from ..disk.regular_files import open_regular, read_bytes
from ..disk.typed_json import parse_typed
from ..disk.writing import BRIEF_PATIENCE_S, PATIENCE_S, explain, replace, retry_while_denied
from ..errors import ConfigError, DeniedFileError, FileError, MissingFileError, get_reason
from ..messages import MESSAGES, add_messages, restore_messages, take_clause
from ..text import shorten
from ..training.config.config_files import build, config_to_dict
from ..training.run.adapter_files import ADAPTERS
from ..training.run.checkpoint import CHECKPOINTS
from ..training.run.metrics import METRICS_FILE
from .job import JobSettings, JobState, Order, Request
from .locks import FileLock

T = TypeVar("T")

VERSION = 1
CONFIG_FILE = "config.json"
STATE_FILE = "state.json"
REQUEST_FILE = "request.json"
#: Endings of an order's file, which is empty.
ORDER_SUFFIX = ".order"
LOCK_FILE = "lock"
LOG_FILE = "log.txt"
SAMPLES = "samples"
#: Of a JSON file here; a state's notes, alarms and end of the log are limited.
MAX_JSON_BYTES = 4 << 20
#: Characters of the reason that a message repeats about a damaged file.
MAX_REASON = 200


class DamagedJobError(FileError):
    """A file of the job is not what a job's file is; the disk itself is fine."""


class BusyFileError(FileError):
    """Another process has the file open; its content is unknown."""


class JobFolder:
    """Paths and files of one job."""

    def __init__(self, path: Path):
        self.path = path
        self.lock = FileLock(path / LOCK_FILE)
        self.log = path / LOG_FILE
        self.metrics = path / METRICS_FILE
        self.samples = path / SAMPLES

    @property
    def id(self) -> str:
        return self.path.name

    def check_lock(self) -> None:
        """Raises FileError where the lock's path holds something that cannot be locked."""
        with contextlib.suppress(OSError):  # mostly there is none yet
            if not stat.S_ISREG((self.path / LOCK_FILE).lstat().st_mode):
                raise DamagedJobError(
                    "{lock_file} of job {id} is not a regular file; delete the job's folder",
                    lock_file=LOCK_FILE,
                    id=self.id,
                )

    def check_folders(self) -> None:
        """Raises FileError where a link has the place of a folder that a run writes to."""
        for name in (CHECKPOINTS, ADAPTERS, SAMPLES):
            check_own_folder(self.path / name)

    def open_log(self) -> BinaryIO:
        """Opened for appending. A link or pipe in its place is removed, not followed.

        Raises:
            OSError: it cannot be opened or removed.
        """
        return open_to_append(self.log)

    def read_settings(self) -> JobSettings:
        """Raises FileError where config.json is missing or broken."""
        values = self._read(CONFIG_FILE)
        train = values.get("train")
        if isinstance(train, dict):
            train["output"] = str(self.path)  # the folder may have been moved
        try:
            return build(JobSettings, values, "")
        except ConfigError as e:
            raise self._explain_damage(CONFIG_FILE, e) from None

    def write_settings(self, settings: JobSettings) -> None:
        values = config_to_dict(settings)
        del values["train"]["output"]
        self._write(CONFIG_FILE, values, durable=True)

    def read_state(self) -> JobState:
        """Raises FileError where state.json is missing or broken, BusyFileError if it may be read
        later.
        """
        values = self._read(STATE_FILE)
        try:
            if "status" not in values:  # its default would start the job
                raise ValueError("it lacks status")
            return restore(JobState, values)
        except ValueError as e:
            raise self._explain_damage(STATE_FILE, e) from None

    def write_state(self, state: JobState, durable: bool = True) -> None:
        """Only for the holder of the lock.

        Args:
            durable: flush it to disk, so that it survives a power cut.
        """
        self._write(STATE_FILE, add_messages(dataclasses.asdict(state)), durable)

    def read_request(self) -> Request | None:
        """None where there is no request, or an unreadable one."""
        try:
            os.stat(self.path / REQUEST_FILE)  # noqa: PTH116 - called for every job all the time
        except FileNotFoundError:
            return None
        except OSError:
            pass  # Windows, for a moment
        try:
            return Request(self._read(REQUEST_FILE).get("request"))
        except ValueError:
            return None

    def write_request(self, request: Request) -> None:
        self._write(REQUEST_FILE, {"request": request}, durable=True)

    def clear_request(self) -> None:
        self._check_place(REQUEST_FILE)
        retry_while_denied(lambda: (self.path / REQUEST_FILE).unlink(missing_ok=True))

    # Each order has a file of its own: a pause that is requested meanwhile replaces none, and the
    # worker takes it by deleting the file, once however many gave it.

    def read_orders(self) -> tuple[Order, ...]:
        """Those that were given and not taken yet."""
        return tuple(order for order in Order if self._has_order(order))

    def write_order(self, order: Order) -> None:
        """Raises FileError where the disk does not take it, or something else has its name."""
        try:
            open_to_append(self._get_order_path(order)).close()
        except OSError as e:
            raise FileError("the order cannot be written: {reason}", reason=explain(e)) from None

    def take_order(self, order: Order) -> bool:
        """Whether there was one; only one caller gets it."""
        if not self._has_order(order):
            return False
        try:
            retry_while_denied(lambda: self._get_order_path(order).unlink(), BRIEF_PATIENCE_S)
        except OSError:  # another one took it, or the disk is read-only: then it would never end
            return False
        return True

    def clear_orders(self) -> None:
        for order in Order:
            self.take_order(order)

    def _has_order(self, order: Order) -> bool:
        try:
            return stat.S_ISREG(os.lstat(self._get_order_path(order)).st_mode)
        except OSError:
            return False

    def _get_order_path(self, order: Order) -> Path:
        return self.path / f"{order.value}{ORDER_SUFFIX}"

    def _read(self, name: str) -> dict[str, Any]:
        try:
            data = retry_while_denied(lambda: self._read_bytes(name), BRIEF_PATIENCE_S)
        except PermissionError as e:
            raise BusyFileError(
                "{name} of job {id} cannot be read: {error}", name=name, id=self.id, error=e
            ) from None
        try:
            values = parse_object(data, name)
        except FileError as e:
            raise self._explain_damage(name, e) from None
        if values.pop("version", None) != VERSION:
            raise DamagedJobError(
                "{name} of job {id} was written by another version; delete the job",
                name=name,
                id=self.id,
            )
        return values

    def _read_bytes(self, name: str) -> bytes:
        try:
            return read_bytes(self.path / name, MAX_JSON_BYTES)
        except DeniedFileError as e:
            raise PermissionError(take_clause(e)) from None  # what `retry_while_denied` retries
        except FileError as e:
            raise self._explain_damage(name, e) from None

    def _explain_damage(self, name: str, error: Exception) -> DamagedJobError:
        reason = shorten(take_clause(error), MAX_REASON)
        return DamagedJobError(
            "{name} of job {id} is damaged ({reason}); delete the job",
            name=name,
            id=self.id,
            reason=reason,
        )

    def _write(self, name: str, values: dict[str, Any], durable: bool) -> None:
        self._check_place(name)
        # Not the name of a training run's temporary files, which a run that starts clears away.
        temporary = self.path / f".{name}.{secrets.token_hex(4)}.new"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                record = {"version": VERSION, **values}
                file.write(json.dumps(record, indent=1, allow_nan=False))
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            patience_s = PATIENCE_S if durable else BRIEF_PATIENCE_S
            replace(temporary, self.path / name, patience_s)
        except BaseException as e:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not isinstance(e, OSError | ValueError):  # ValueError: NaN or an infinity
                raise
            raise FileError(
                "{name} of job {id} cannot be written: {reason}",
                name=name,
                id=self.id,
                reason=explain(e),
            ) from None

    def _check_place(self, name: str) -> None:
        """DamagedJobError for a folder, which no file can replace."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            raise self._explain_damage(name, FileError("it is a folder"))

    def clear_leftovers(self) -> None:
        """Deletes half-written files of processes that were killed; for the holder of the lock."""
        for name in (CONFIG_FILE, STATE_FILE):
            for path in self.path.glob(f".{name}.*.new"):
                path.unlink(missing_ok=True)


def open_to_append(path: Path) -> BinaryIO:
    """A file of a job's folder; see `JobFolder.open_log`."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def open_inside(path: Path) -> BinaryIO:
    """A regular file of a job's folder or of a folder in it, opened for reading; never a link,
    which could show a file from anywhere.

    Raises:
        MissingFileError, DeniedFileError: as `open_regular`.
        DamagedJobError: it is a link, a folder, a pipe or a device.
    """
    try:
        file = open_regular(path)
    except (MissingFileError, DeniedFileError):
        raise
    except FileError as e:
        raise DamagedJobError(e) from None
    try:
        is_own = os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
        if not is_own or path.parent.is_symlink():
            raise DamagedJobError(
                "{path} is a link; expected a file of the job's own.", path=shorten(path.name)
            )
    except OSError as e:
        file.close()
        raise FileError(
            "{path} cannot be opened: {reason}.", path=shorten(path.name), reason=get_reason(e)
        ) from None
    except BaseException:
        file.close()
        raise
    return file


def list_inside(folder: Path) -> list[Path]:
    """The regular files in a folder of a job by their names; none through a link."""
    try:
        if folder.is_symlink():
            return []
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError:  # not there, or no folder
        return []
    return [folder / name for name in sorted(names)]


def restore(kind: type[T], values: Any) -> T:
    """A dataclass from what `dataclasses.asdict`, perhaps `add_messages`, and JSON made of it.

    Unknown names are skipped.

    Raises:
        ValueError: a value is not of its field's kind, or one without a default is missing.
    """
    text = json.dumps(values, ensure_ascii=False)  # half a surrogate pair becomes "?"
    restored = parse_typed(text.encode(errors="replace"), kind, allows_more=True)
    packed = values.get(MESSAGES) if isinstance(values, dict) else None
    return cast(T, restore_messages(restored, packed))

"""One job's folder: reading and writing its three JSON files, each whole or as it was before."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FileError
from ..files import BRIEF_PATIENCE_S, PATIENCE_S, explain, insist, replace
from ..training.config_files import build, config_to_dict
from ..training.metrics import METRICS_FILE
from .job import JobSettings, JobState, Request
from .locks import FileLock

VERSION = 1
CONFIG_FILE = "config.json"
STATE_FILE = "state.json"
REQUEST_FILE = "request.json"
LOCK_FILE = "lock"
LOG_FILE = "log.txt"
SAMPLES = "samples"


class BusyFileError(FileError):
    """Another process has the file in its hands; nothing is known of what it says."""


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

    def read_settings(self) -> JobSettings:
        """Raises FileError where config.json is missing or broken."""
        values = self._read(CONFIG_FILE)
        try:
            values["train"]["output"] = str(self.path)  # the folder may have been moved
            return build(JobSettings, values, "")
        except (ConfigError, KeyError, TypeError, AttributeError) as e:
            raise FileError(
                f"{CONFIG_FILE} of job {self.id} is damaged ({e}); delete the job"
            ) from None

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
            return restore(JobState, values)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise FileError(
                f"{STATE_FILE} of job {self.id} is damaged ({e}); delete the job"
            ) from None

    def write_state(self, state: JobState, durable: bool = True) -> None:
        """Only for who holds the lock.

        Args:
            durable: bring it to the disk, so that it outlives a power cut.
        """
        self._write(STATE_FILE, dataclasses.asdict(state), durable)

    def read_request(self) -> Request | None:
        try:
            return Request(self._read(REQUEST_FILE)["request"])
        except (FileError, ValueError, KeyError, TypeError):
            return None

    def write_request(self, request: Request) -> None:
        self._write(REQUEST_FILE, {"request": request}, durable=True)

    def clear_request(self) -> None:
        insist(lambda: (self.path / REQUEST_FILE).unlink(missing_ok=True))

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            text = insist(lambda: path.read_text(encoding="utf-8"), BRIEF_PATIENCE_S)
            values = json.loads(text)
        except PermissionError as e:
            raise BusyFileError(f"{name} of job {self.id} cannot be read: {e.strerror}") from None
        except OSError as e:
            raise FileError(f"{name} of job {self.id} cannot be read: {e.strerror}") from None
        except ValueError:
            raise FileError(f"{name} of job {self.id} is damaged; delete the job") from None
        if not isinstance(values, dict) or values.pop("version", None) != VERSION:
            raise FileError(
                f"{name} of job {self.id} is damaged or of another version; delete the job"
            )
        return values

    def _write(self, name: str, values: dict[str, Any], durable: bool) -> None:
        # Not the name of a training run's temporary files, which a run that starts clears away.
        temporary = self.path / f".{name}.{secrets.token_hex(4)}.new"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"version": VERSION, **values}, indent=1))
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            patience_s = PATIENCE_S if durable else BRIEF_PATIENCE_S
            replace(temporary, self.path / name, patience_s)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise FileError(f"{name} of job {self.id} cannot be written: {explain(e)}") from None

    def clear_leftovers(self) -> None:
        """Deletes half-written files of processes that were killed; for who holds the lock."""
        for name in (CONFIG_FILE, STATE_FILE):
            for path in self.path.glob(f".{name}.*.new"):
                path.unlink(missing_ok=True)


def restore(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from what `dataclasses.asdict` and JSON made of it; unknown names are skipped."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: convert(hints[name], v) for name, v in values.items() if name in hints})


def convert(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    kind = options[0] if options else hint
    if dataclasses.is_dataclass(kind):
        return restore(kind, value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if kind in (int, float, str) and not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(f"{value!r} where a {kind.__name__} was expected")
    return value

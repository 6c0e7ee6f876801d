"""The SQLite index over the job folders: a copy that can be rebuilt at any time.

It saves reading every folder to list the jobs, and holds the claims by which several servers on one
folder agree which of them starts the next job. Nothing is lost with it: the folders are
authoritative, and their locks keep a job from running twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ..disk.writing import BRIEF_PATIENCE_S, replace

T = TypeVar("T")

BUSY_TIMEOUT = 5.0  # seconds to wait for another process that writes
VERSION = 2
SQLITE_ERROR = 1  # the generic one, as of sqlite3.h
_SCHEMA = """
DROP TABLE IF EXISTS jobs;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, stamp TEXT NOT NULL, job TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS claims (
    job TEXT PRIMARY KEY, device TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, until REAL NOT NULL);
"""

logger = logging.getLogger(__name__)


class JobIndex:
    """Rows of what the folders hold, each with the stamp of the state.json it was read from.

    A broken file is moved aside and rebuilt. Where SQLite cannot be used at all (a read-only or
    full disk), every call returns what an empty index would: slower, but correct.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._last_warning = ""

    def is_open(self) -> bool:
        """Whether the open file is still the one at its path."""
        with self._lock:
            return self._connection is not None and self._opened == self._stat()

    def read(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Job id -> stamp and what was kept of the job."""

        def query(connection: sqlite3.Connection):
            rows = connection.execute("SELECT id, stamp, job, digest FROM jobs").fetchall()
            for *row, digest in rows:
                if compute_digest(*row) != digest:
                    raise ValueError("a row is not what was written")
            return {id_: (stamp, json.loads(job)) for id_, stamp, job, _ in rows}

        return self._use(query, {})

    def update(
        self, changed: Iterable[tuple[str, str, dict[str, Any]]], gone: Iterable[str] = ()
    ) -> None:
        """Inserts (id, stamp, job) and deletes ids."""
        texts = [(id_, stamp, json.dumps(job)) for id_, stamp, job in changed]
        rows = [(*row, compute_digest(*row)) for row in texts]
        gone = [(id_,) for id_ in gone]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("REPLACE INTO jobs VALUES (?, ?, ?, ?)", rows)
            connection.executemany("DELETE FROM jobs WHERE id = ?", gone)
            connection.executemany("DELETE FROM claims WHERE job = ?", gone)
            connection.commit()

        if rows or gone:
            self._use(write, None)

    def claim(
        self,
        job: str,
        device: str,
        owner: str,
        now: float,
        until: float,
        has_ended: Callable[[str], bool],
    ) -> bool:
        """Whether `owner` may start this job on this device, until the time given.

        The owner's own claim is renewed. True where there is no index: then the locks decide.

        Args:
            has_ended: whether an owner is known to have ended; its claims are dropped.
        """

        def write(connection: sqlite3.Connection) -> bool:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "DELETE FROM claims WHERE until < ? OR (owner = ? AND (job = ? OR device = ?))",
                (now, owner, job, device),
            )
            for (other,) in connection.execute("SELECT DISTINCT owner FROM claims").fetchall():
                if has_ended(other):
                    connection.execute("DELETE FROM claims WHERE owner = ?", (other,))
            row = (job, device, owner, until)
            try:
                connection.execute("INSERT INTO claims VALUES (?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                connection.rollback()
                return False
            connection.commit()
            return True

        return self._use(write, True)

    def release(self, job: str, owner: str) -> None:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM claims WHERE job = ? AND owner = ?", (job, owner))
            connection.commit()

        self._use(write, None)

    def close(self) -> None:
        with self._lock:
            self._close()

    def _use(self, action: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        with self._lock:
            for _ in range(2):
                try:
                    result = action(self._open())
                    self._last_warning = ""
                    return result
                except (sqlite3.DatabaseError, ValueError, RecursionError) as e:
                    self._close()
                    if isinstance(e, sqlite3.OperationalError) and not lacks_table(e):
                        self._warn_once(
                            f"the job index cannot be used ({e}); the jobs are read from their "
                            "folders instead"
                        )
                        return otherwise
                    self._warn_once(
                        f"the job index was damaged ({e}) and is rebuilt from the folders"
                    )
                    self._put_aside()
            return otherwise

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._opened == self._stat():
            return self._connection
        self._close()  # the file was deleted or replaced
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT, check_same_thread=False, isolation_level=None
        )
        self._connection = connection
        # Text that is no longer UTF-8 is caught by the digest.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.commit()
        connection.execute("PRAGMA synchronous = NORMAL")
        self._opened = self._stat()
        return connection

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _close(self) -> None:
        if self._connection is not None:
            try:
                self._connection.close()
            except sqlite3.Error:
                pass
        self._connection = self._opened = None

    def _put_aside(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            path = self.path.with_name(self.path.name + suffix)
            try:
                replace(path, path.with_name(f"{path.name}.broken"), BRIEF_PATIENCE_S)
            except OSError:
                path.unlink(missing_ok=True)

    def _warn_once(self, sentence: str) -> None:
        if sentence != self._last_warning:
            logger.warning("Qwen Edit LoRA: %s.", sentence)
            self._last_warning = sentence


def lacks_table(error: sqlite3.OperationalError) -> bool:
    """Whether a table or column is missing; else the file is locked, read-only, or the disk is
    full. False before Python 3.11, which does not report it.
    """
    return getattr(error, "sqlite_errorcode", None) == SQLITE_ERROR


def compute_digest(*row: object) -> str:
    """BLAKE2b of a row's columns: a damaged row would otherwise give a wrong job silently."""
    return hashlib.blake2b(repr(row).encode(), digest_size=8).hexdigest()

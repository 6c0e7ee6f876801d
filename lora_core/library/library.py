"""Every adapter file of some folders: its facts at once, its health after a while."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FileError, LoraError
from ..formats.files import PEFT_CONFIG
from .cache import CacheEntry, Fingerprint, read_cache, write_cache
from .companions import NO_COMPANIONS, Companions, list_companions
from .details import describe_file
from .facts import DAMAGED, OK, AdapterFacts, read_facts
from .favourites import Favourites
from .health import UNEXPECTED, Health
from .inspector import Inspector
from .sidecars import is_link, read_sidecars

#: How long a list waits for headers that have not been read yet; later ones come as events.
LIST_PATIENCE = 0.4  # seconds
NOTICE_INTERVAL = 0.5
SAVE_INTERVAL = 5.0
BUSY_INTERVAL = 0.5
FAVOURITES_FILE = "favourites.json"
#: Instead of the fingerprint of a deleted file.
DELETED: Fingerprint = (-1,)

_ID = re.compile(r"[0-9a-f]{16}")

logger = logging.getLogger(__name__)

Event = dict[str, Any]


class UnknownAdapterError(LoraError, LookupError):
    """There is no file of this id (any more)."""


def build_id(name: str) -> str:
    """Opaque, and the same on every system: from the name below the folders, never from a path."""
    return hashlib.blake2b(
        name.replace("\\", "/").encode(errors="replace"), digest_size=8
    ).hexdigest()


def check_id(adapter_id: object) -> str:
    """The id itself.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(adapter_id, str) or not _ID.fullmatch(adapter_id):
        raise ConfigError(
            "{adapter_id!r} is not an adapter id; expected 16 digits such as 0123456789abcdef, "
            "from the list of adapters",
            adapter_id=str(adapter_id)[:40],
        )
    return adapter_id


@dataclass(frozen=True)
class Entry:
    """One file of the list."""

    name: str
    path: Path
    fingerprint: Fingerprint
    facts: AdapterFacts | None = None
    health: Health | None = None
    companions: Companions = NO_COMPANIONS
    is_favourite: bool = False

    @property
    def id(self) -> str:
        return build_id(self.name)

    @property
    def is_waiting(self) -> bool:
        """For its health."""
        return self.facts is not None and self.facts.state == OK and self.health is None

    def to_dict(self) -> dict[str, Any]:
        facts = self.facts or AdapterFacts(state="reading")
        shown = {
            "id": self.id,
            "name": self.name,
            "size_bytes": self.fingerprint[0],
            "modified_at": self.fingerprint[1] / 1e9,
            **vars(facts),  # asdict would copy all of it, for each of a thousand files
            "preview": self.companions.preview_version,
            "is_favourite": self.is_favourite,
            "health": None,
        }
        if self.health is not None:
            shown["health"] = {"level": self.health.level, "sentence": self.health.sentence}
        elif facts.state == DAMAGED:
            shown["health"] = {"level": "broken", "sentence": facts.error}
        return shown


class AdapterLibrary:
    """The list, its cache, and the one thread that fills it in.

    The thread runs only while there is work.

    Args:
        list_files: name of each file, as the user knows it -> its path.
        cache: file in which results survive the process; stars are kept beside it.
        notify: called with {"adapters": changed entries, "gone": ids, "pending": number}.
        is_busy: whether the machine is needed elsewhere; health waits until it is not.
    """

    def __init__(
        self,
        list_files: Callable[[], Mapping[str, Path]],
        cache: Path,
        notify: Callable[[Event], None] | None = None,
        is_busy: Callable[[], bool] | None = None,
    ):
        self.list_files = list_files
        self.cache = cache
        self.notify = notify or (lambda event: None)
        self.is_busy = is_busy or (lambda: False)
        self.favourites = Favourites(cache.with_name(FAVOURITES_FILE))
        self._favourites_problem = ""
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._cached: dict[str, CacheEntry] | None = None
        self._requested_name = ""
        self._thread: threading.Thread | None = None
        self._inspector = Inspector()
        self._stopped = threading.Event()
        self._is_read = threading.Event()
        self._is_saved = True
        self._can_save = True

    # --- queries ---

    def list(self) -> dict[str, Any]:
        """{"adapters": [...], "pending": how many have no verdict yet}, by name."""
        self.scan()
        self._is_read.wait(LIST_PATIENCE)
        with self._lock:
            entries = sorted(self._entries.values(), key=lambda entry: entry.name.lower())
            return {"adapters": [entry.to_dict() for entry in entries], "pending": self._count()}

    def show(self, adapter_id: str) -> dict[str, Any]:
        """The entry, and everything else that is known of the file; its health is computed next.

        Raises:
            ConfigError, UnknownAdapterError: as `find`.
            FileError: the file was removed or changed meanwhile.
        """
        entry = self._get(adapter_id)
        with self._lock:
            self._requested_name = entry.name
        facts = entry.facts or read_facts(entry.path)
        shown = replace(entry, facts=facts).to_dict()
        sentences = list(entry.health.sentences) if entry.health else []
        details = describe_file(entry.path, facts, entry.health)
        companions = list_companions([entry.path]).get(entry.path, NO_COMPANIONS)
        beside = read_sidecars(entry.path.parent, companions.sidecars)
        noted = {**vars(beside), "has_link": is_link(beside.source)}
        return {**shown, "sentences": sentences, **details, "beside": noted}

    def find(self, adapter_id: str) -> Path:
        """The file of an id.

        Raises:
            ConfigError: what is given is no id.
            UnknownAdapterError: no file of the folders has it.
        """
        return self._get(adapter_id).path

    def show_facts(self, adapter_id: str) -> AdapterFacts:
        """What a file is; errors as `find`."""
        entry = self._get(adapter_id)
        return entry.facts or read_facts(entry.path)

    def find_preview(self, adapter_id: str) -> Path | None:
        """The preview image beside a file; errors as `find`."""
        path = self.find(adapter_id)
        preview = list_companions([path]).get(path, NO_COMPANIONS).preview
        return path.with_name(preview) if preview else None

    def mark(self, adapter_id: str, is_favourite: bool) -> Event:
        """Stars a file or takes its star, on every open page; its entry.

        Raises:
            ConfigError, UnknownAdapterError: as `find`; ConfigError: too many stars.
            FileError: the record is damaged, or the disk does not take it.
        """
        entry = self._get(adapter_id)
        with self._lock:
            # A scan may have dropped the entry since it was found.
            marks = self._list_marks({entry.name: entry, **self._entries})
            self.favourites.set(entry.name, is_favourite, marks)
            entry = replace(self._entries.get(entry.name, entry), is_favourite=is_favourite)
            if entry.name in self._entries:
                self._entries[entry.name] = entry
        self._send_event([entry], ())
        return entry.to_dict()

    def _get(self, adapter_id: str) -> Entry:
        check_id(adapter_id)
        entry = self._find_entry(adapter_id)
        if entry is None or (read_fingerprint(entry.path, ()) or DELETED) != entry.fingerprint[:2]:
            self.scan()  # it is new, changed, or deleted
            entry = self._find_entry(adapter_id)
        if entry is None:
            raise UnknownAdapterError(
                "no adapter in the loras folders has the id {adapter_id}; reload the list",
                adapter_id=adapter_id,
            )
        return entry

    def _find_entry(self, adapter_id: str) -> Entry | None:
        with self._lock:
            return next((e for e in self._entries.values() if e.id == adapter_id), None)

    # --- scanning ---

    def scan(self) -> None:
        """Lists the folders again, and has the thread inspect what is new or changed."""
        files = self.list_files()
        config_fingerprints = {
            folder: read_config_fingerprint(folder) for folder in get_folders(files)
        }
        companions = list_companions(files.values())
        with self._lock:
            if self._cached is None:
                self._cached = read_cache(self.cache)
            entries = {}
            for name, path in files.items():
                fingerprint = read_fingerprint(path, config_fingerprints[path.parent])
                if fingerprint is None:
                    continue  # deleted in between
                entry = self._entries.get(name)
                if entry is None or entry.fingerprint != fingerprint or entry.path != path:
                    known = self._cached.get(name)
                    if known is None or known.stamp != fingerprint:
                        known = CacheEntry(fingerprint)
                    entry = Entry(name, path, fingerprint, known.facts, known.health)
                beside = companions.get(path, NO_COMPANIONS)
                entries[name] = (
                    entry if entry.companions == beside else replace(entry, companions=beside)
                )
            self._mark_favourites(entries)
            if self._cached.keys() - entries.keys():
                self._is_saved = False
            self._entries = entries
            self._update_cached()
            if self._find_work() is None:
                self._is_read.set()
                if not self._is_saved:
                    self._save()
            elif self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(
                    target=self._work, name="qwen_edit_lora adapters", daemon=True
                )
                self._thread.start()

    def _mark_favourites(self, entries: dict[str, Entry]) -> None:
        try:
            starred = self.favourites.find(self._list_marks(entries))
            self._favourites_problem = ""
        except FileError as e:
            starred = set()
            if str(e) != self._favourites_problem:
                self._favourites_problem = str(e)
                logger.warning("Qwen Edit LoRA: no favourites are shown: %s", e)
        for name, entry in entries.items():
            if entry.is_favourite != (name in starred):
                entries[name] = replace(entry, is_favourite=name in starred)

    @staticmethod
    def _list_marks(entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        """Name -> size in bytes and mtime in ns."""
        return {n: (e.fingerprint[0], e.fingerprint[1]) for n, e in entries.items()}

    def _update_cached(self) -> None:
        self._cached = {
            entry.name: CacheEntry(entry.fingerprint, entry.facts, entry.health)
            for entry in self._entries.values()
            if entry.health is None or entry.health.sentence != UNEXPECTED
        }

    def _count(self) -> int:
        return sum(e.facts is None or e.is_waiting for e in self._entries.values())

    def _find_work(self) -> Entry | None:
        """Headers before health, requested files first, then the newest; called under the lock."""

        def get_urgency(entry: Entry) -> tuple[bool, bool, int]:
            return entry.facts is None, entry.name == self._requested_name, entry.fingerprint[1]

        waiting = (e for e in self._entries.values() if e.facts is None or e.is_waiting)
        entry = max(waiting, key=get_urgency, default=None)
        if entry is None or entry.facts is not None:
            self._is_read.set()
        else:
            self._is_read.clear()
        return entry

    # --- the thread ---

    def stop(self, timeout: float | None = 5.0) -> None:
        """Ends the thread for good, whatever it is doing."""
        self._stopped.set()
        self._inspector.close(for_good=True)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def wait(self, timeout: float) -> bool:
        """Whether everything is known by then."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        with self._lock:
            return self._count() == 0

    def _work(self) -> None:
        changed: dict[str, Entry] = {}
        gone: set[str] = set()
        notified_at = saved_at = time.monotonic()
        while True:
            with self._lock:
                entry = None if self._stopped.is_set() else self._find_work()
                if entry is None:
                    self._save()
                    self._inspector.close(self._stopped.is_set())
                    self._thread = None  # under the same lock: scan then starts another
            is_header = entry is not None and entry.facts is None
            now = time.monotonic()
            if (changed or gone) and (not is_header or now - notified_at > NOTICE_INTERVAL):
                self._send_event(changed.values(), gone)
                changed, gone, notified_at = {}, set(), now
            if entry is None:
                return
            if now - saved_at > SAVE_INTERVAL:
                with self._lock:
                    self._save()
                saved_at = now
            found = self._read_header(entry) if is_header else self._inspect(entry)
            if found is None:
                continue  # stopped
            with self._lock:
                now_known = self._entries.get(entry.name)
                if now_known is None or now_known.fingerprint != entry.fingerprint:
                    continue  # a scan saw the file change meanwhile
                if found.fingerprint[0] < 0:
                    del self._entries[entry.name]
                    gone.add(entry.id)
                else:  # it may have got a star or a preview meanwhile
                    changed[entry.name] = self._entries[entry.name] = replace(
                        now_known,
                        fingerprint=found.fingerprint,
                        facts=found.facts,
                        health=found.health,
                    )
                self._update_cached()
                self._is_saved = False

    def _read_header(self, entry: Entry) -> Entry:
        try:
            return replace(entry, facts=read_facts(entry.path))
        except Exception:
            logger.exception("Qwen Edit LoRA: %s cannot be listed", entry.name)
            return replace(entry, facts=AdapterFacts(DAMAGED, error=UNEXPECTED))

    def _inspect(self, entry: Entry) -> Entry | None:
        """With its health; a new fingerprint and no facts if the file changed; None if stopped."""
        while self.is_busy() and not self._stopped.is_set():
            self._stopped.wait(BUSY_INTERVAL)
        if self._stopped.is_set():
            return None
        try:
            warnings = () if entry.facts is None else entry.facts.warnings
            health = self._inspector.inspect(entry.path, warnings)
        except LoraError as e:
            fingerprint = read_fingerprint(entry.path, read_config_fingerprint(entry.path.parent))
            if fingerprint != entry.fingerprint:
                return replace(entry, fingerprint=fingerprint or DELETED, facts=None, health=None)
            health = Health("broken", e.message, (e.message,))
        return None if health is None else replace(entry, health=health)

    def _send_event(self, changed: Iterable[Entry], gone: Iterable[str]) -> None:
        with self._lock:
            pending = self._count()
        event = {"adapters": [e.to_dict() for e in changed], "gone": sorted(gone)}
        self.notify({**event, "pending": pending})

    def _save(self) -> None:
        if self._is_saved or not self._can_save or self._cached is None:
            return
        try:
            write_cache(self.cache, self._cached)
            self._is_saved = True
        except FileError as e:
            self._can_save = False
            logger.warning("Qwen Edit LoRA: adapters are read again after a restart: %s", e)


def get_folders(files: Mapping[str, Path]) -> set[Path]:
    return {path.parent for path in files.values()}


def read_fingerprint(path: Path, config_fingerprint: Fingerprint) -> Fingerprint | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, *config_fingerprint


def read_config_fingerprint(folder: Path) -> Fingerprint:
    """Of PEFT's config file, which determines alpha; () where there is none."""
    return read_fingerprint(folder / PEFT_CONFIG, ()) or ()

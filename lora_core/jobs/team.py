"""The processes of one job: usually one; with several GPUs one for each, started by PyTorch's
launcher and joined by Hugging Face Accelerate.

Rank 0 is the job's worker: it alone holds the locks, writes the state, makes samples and saves. All
watch each other, since a process that waits for a dead one's gradients waits for long: a process
that sees another one die ends too, so that none is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..disk.json_reader import parse_json
from ..disk.writing import replace
from ..messages import add_messages
from .folder import MAX_JSON_BYTES, JobFolder, open_inside, restore
from .identity import identify, is_running
from .job import JobFailure, WorkerIdentity
from .job_reporter import log_line
from .nccl import choose_settings, explain_shared_memory

WATCH_INTERVAL = 0.3  # seconds
#: Seconds in which the death behind a communication error becomes visible.
DEATH_TIMEOUT = 3.0
#: Hours for which a process may wait for another, such as while rank 0 makes samples. A dead one is
#: noticed by `ProcessGroup.watch`.
PATIENCE_H = 48


class ProcessGroup:
    """This process and the others of its job.

    Args:
        accelerator: None for a single process, for which everything here is free.
    """

    def __init__(self, accelerator: Any = None):
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.members: list[WorkerIdentity | None] = []
        self._watching = threading.Lock()
        self._is_over = False

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on all processes."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def watch(self, on_death: Callable[[int], object]) -> None:
        """From now on `on_death(index)` is called once, in a thread, when another process ends.

        Every process has to call this.
        """
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        self.members = gather_object([identify()])
        threading.Thread(target=self._watch, args=(on_death,), name="team", daemon=True).start()

    def find_dead(self, timeout_s: float = 0.0) -> int | None:
        """Another process that has ended, waiting up to `timeout_s`; None while all are alive."""
        deadline = time.monotonic() + timeout_s
        while self.members:
            for index, member in enumerate(self.members):
                if index != self.index and not is_running(member):
                    return index
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        return None

    def stop_watching(self) -> None:
        """After this, the end of another process is ignored.

        Does not return while `on_death` runs, which ends the process.
        """
        with self._watching:
            self._is_over = True

    def wait_for_main(self) -> None:
        """Returns when rank 0 has ended."""
        while self.members and is_running(self.members[0]):
            time.sleep(WATCH_INTERVAL)

    def _watch(self, on_death: Callable[[int], None]) -> None:
        while True:
            time.sleep(WATCH_INTERVAL)
            dead = self.find_dead()
            with self._watching:
                if self._is_over:
                    return
                if dead is not None:
                    on_death(dead)
                    return


def join_process_group(on_cpu: bool) -> ProcessGroup:
    """The process group that the launcher's environment describes.

    Raises:
        ConfigError: Accelerate is missing, or configured to shard the model.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return ProcessGroup()
    from ..training.run.processes import find_accelerator

    if not on_cpu:
        settings = choose_settings(os.environ)
        os.environ.update(settings)
        is_first = os.environ.get("RANK", "0") == "0"
        if settings and is_first:
            log_line(f"set for these cards and their driver: {', '.join(settings)}")
        if is_first and (sentence := explain_shared_memory(count, os.environ)):
            log_line(sentence)
    return ProcessGroup(find_accelerator(on_cpu, patience_h=PATIENCE_H))


# --- failures that other processes report to rank 0 -----------------------------------------------


def get_failure_path(folder: JobFolder, index: int) -> Path:
    return folder.path / f".process_{index}.failure"


def write_failure(folder: JobFolder, index: int, failure: JobFailure) -> None:
    """Raises OSError where the disk does not take it."""
    path = get_failure_path(folder, index)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)  # a link there would be written through
    temporary.write_text(json.dumps(add_messages(dataclasses.asdict(failure))), encoding="utf-8")
    replace(temporary, path)


def pop_failure(folder: JobFolder, index: int) -> JobFailure | None:
    """A process's own failure report; None if it was ended from outside."""
    path = get_failure_path(folder, index)
    try:
        with open_inside(path) as file:
            return restore(JobFailure, parse_json(file.read(MAX_JSON_BYTES), path.name))
    except (OSError, ValueError):  # a FileError is one
        return None
    finally:
        path.unlink(missing_ok=True)


def clear_failures(folder: JobFolder) -> None:
    for path in folder.path.glob(".process_*"):
        path.unlink(missing_ok=True)

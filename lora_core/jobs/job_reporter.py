"""A worker's reporter: heartbeat, state writer, log, stop requests."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..messages import message
from ..training.run.metrics import StepReport
from .folder import STATE_FILE, JobFolder
from .job import JobFailure, JobState, Phase
from .outcomes import advance
from .transitions import STOPS, Event, JobStatus, Order, Request

LISTEN_INTERVAL = 0.2  # seconds between checks for a request
WRITE_INTERVAL = 1.0  # seconds between heartbeats
#: Weight of the past in the seconds per step, whose first steps are slow.
SMOOTHING = 0.9

logger = logging.getLogger(__name__)


class JobReporter:
    """Holds the state of this process's job; the only writer of its state.json."""

    def __init__(self, folder: JobFolder, state: JobState):
        self.folder = folder
        self.state = state
        self.is_terminated: Callable[[], bool] = lambda: False
        """Whether the system asked the process to end."""
        self._lock = threading.RLock()
        self._written_at = 0.0
        self._is_over = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        folder.write_state(state)

    def start(self) -> None:
        self._thread.start()

    def should_stop(self) -> bool:
        """Whether the training has been asked to stop."""
        return self.is_terminated() or self.folder.read_request() in STOPS

    def has_orders(self) -> bool:
        return bool(self.folder.read_orders())

    def take_order(self, order: Order) -> bool:
        """Whether it was given; it is done then."""
        return self.folder.take_order(order)

    def give_back(self, order: Order) -> None:
        """For the next step: it could not be done at this one."""
        try:
            self.folder.write_order(order)
        except FileError as e:
            self.log(message("{order} is not done: {error}", order=order.value, error=e))

    def update(self, **changes: Any) -> None:
        """Changes the state; it is written at once where more than metrics changed."""
        with self._lock:
            before, self.state = self.state, dataclasses.replace(self.state, **changes)
            is_due = time.monotonic() - self._written_at > WRITE_INTERVAL
            is_news = before.phase is not self.state.phase or before.alarms != self.state.alarms
            if is_due or is_news:
                self._write(durable=False)

    def log(self, sentence: str) -> None:
        """Writes to the log."""
        log_line(sentence)

    def add_note(self, sentence: str) -> None:
        """Writes to the log and adds to the job's notes."""
        log_line(sentence)
        self.update(notes=(*self.state.notes, sentence)[-20:])

    def add_alert(self, sentence: str) -> None:
        """Writes to the log and adds to the job's alarms, once each."""
        if sentence not in self.state.alarms:
            log_line(f"warning: {sentence}")
            self.update(alarms=(*self.state.alarms, sentence)[-20:])

    def report(self, report: StepReport) -> None:
        """Updates the state from a step's metrics."""
        past = self.state.seconds_per_step
        seconds = report.seconds
        if past is not None:
            seconds = SMOOTHING * past + (1 - SMOOTHING) * seconds
        changes: dict[str, Any] = {}
        if report.checkpoint:
            changes["checkpoint_step"] = report.step
        if report.adapters:
            changes["adapters"] = report.adapters
        self.update(
            step=report.step,
            loss=report.loss,
            smoothed_loss=report.smoothed_loss,
            seconds_per_step=seconds,
            memory_bytes=report.memory_bytes,
            **changes,
        )

    def finish(
        self, event: Event, request: Request | None = None, failure: JobFailure | None = None
    ) -> None:
        """Writes the state after the last thing that happens to this process.

        Args:
            request: what it stopped for.

        Raises:
            JobStateError: it cannot happen to a job in this state.
            FileError: the disk does not take it.
        """
        self.finish_as(advance(self.state, event, request, failure=failure))

    def finish_as(self, state: JobState) -> None:
        """As `finish`, with a complete state."""
        with self._lock:
            self._is_over = True
            self.folder.write_state(state)
            self.state = state
            if state.status.is_finished:
                self.folder.clear_orders()
            if state.status is JobStatus.FAILED and self.folder.read_request() is Request.RUN:
                self.folder.clear_request()  # withdrew a pause, and must not restart the job now

    def _beat(self) -> None:
        while not self._is_over:
            time.sleep(LISTEN_INTERVAL)
            with self._lock:
                if self._is_over:
                    return
                if is_deleted(self.folder.path / STATE_FILE):
                    log_line("the job's folder no longer exists; the worker exits")
                    sys.stdout.flush()
                    os._exit(0)
                if self.state.phase is Phase.LOADING:
                    self._stop_loading()
                if time.monotonic() - self._written_at > WRITE_INTERVAL:
                    self._write(durable=False)

    def _stop_loading(self) -> None:
        """Ends the process while it has nothing that would have to be saved."""
        request = self.folder.read_request()
        if request not in STOPS:
            return
        try:
            self.finish(Event.STOP, request)
        except FileError as e:
            log_line(str(e))
            return
        log_line(f"{self.state.status.value} while the model was loading")
        sys.stdout.flush()
        os._exit(0)

    def _write(self, durable: bool) -> None:
        self.state = dataclasses.replace(self.state, heartbeat_at=time.time())
        self._written_at = time.monotonic()
        try:
            self.folder.write_state(self.state, durable)
        except FileError as e:
            logger.warning("%s", e)  # metrics only; training decides for itself what it cannot save


def is_deleted(path: Path) -> bool:
    """Whether the file was deleted; Windows may deny access for a moment, which does not count."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


class NullReporter:
    """For every process but rank 0: reports nothing."""

    def __init__(self, folder: JobFolder):
        self.folder = folder
        self.is_terminated: Callable[[], bool] = lambda: False

    def should_stop(self) -> bool:
        """Rank 0 reads the request itself; all stop when one of them does."""
        return self.is_terminated()

    def has_orders(self) -> bool:
        """Rank 0 alone does what is ordered; the others wait for it in their next step."""
        return False

    def take_order(self, order: Order) -> bool:
        return False

    def give_back(self, order: Order) -> None:
        pass

    def update(self, **changes: Any) -> None:
        pass

    def add_note(self, sentence: str) -> None:
        pass

    def add_alert(self, sentence: str) -> None:
        pass

    def report(self, report: StepReport) -> None:
        pass

    def log(self, sentence: str) -> None:
        pass


def log_line(sentence: str) -> None:
    """A line of the log, with its time."""
    sys.stdout.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")
    sys.stdout.flush()

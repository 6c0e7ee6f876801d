"""The process that trains one job: `launch.start_worker` starts it, and it ends with its job.

    python -m lora_core.jobs.worker STORE JOB DEVICE_KEYS DEVICE_NAMES [--shared]

It takes the locks of the job and of its device, and releases them and all memory by ending. It does
not depend on its parent: when ComfyUI ends or crashes, training goes on, and the next ComfyUI finds
it. If its job's folder disappears, it ends by itself.

With --shared it leaves ComfyUI, which computes on the same GPU, a part of the memory.

With several devices, their keys and names separated by commas, PyTorch's launcher starts one such
process for each; see `team`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import FileError, LoraError
from ..messages import message
from ..training.model.libraries import import_diffusers_alone
from ..training.run.interruption import stop_on_signals
from .failure import LOOK_AT_LOG, RESUME, explain_error, read_log_tail
from .folder import JobFolder
from .identity import identify
from .job import JobFailure, JobSettings, JobState, Phase
from .job_reporter import JobReporter, NullReporter, log_line
from .launch import EXIT_NOTHING_TO_DO, EXIT_TAKEN, SHARED
from .locks import FileLock
from .outcomes import advance, restart_or_fail
from .store import JOBS, get_device_lock
from .team import (
    DEATH_TIMEOUT,
    ProcessGroup,
    clear_failures,
    join_process_group,
    pop_failure,
    write_failure,
)
from .transitions import STOPS, Event, find_next, find_stage

#: Seconds to wait for processes that only check whether a lock is free.
LOCK_TIMEOUT = 2.0
EXIT_FAILED = 1
EXIT_UNREPORTED = 74
#: Points by which Linux prefers to end this process over ComfyUI when memory runs out.
OUT_OF_MEMORY_SCORE = 500


def main(argv: list[str]) -> int:
    """Takes the job and works on it; returns the exit status."""
    root, job_id, keys, names, *options = argv
    folder, devices = JobFolder(Path(root) / JOBS / job_id), names.split(",")
    group = join_process_group(on_cpu=devices[0] == "cpu")
    locks = [get_device_lock(Path(root), key) for key in keys.split(",")]
    status = group.agree(acquire_locks(folder, locks) if group.is_main else None)
    if status is not None:
        # A launcher treats every other status as its own failure.
        return status if group.count == 1 or status == EXIT_FAILED else 0
    try:
        settings = folder.read_settings()
        lower_priority(settings.niceness)
        reporter: JobReporter | NullReporter = NullReporter(folder)
        if group.is_main:
            reporter = JobReporter(
                folder, build_running_state(folder.read_state(), ", ".join(devices))
            )
            reporter.start()
    except FileError as e:
        log_line(str(e))
        return EXIT_FAILED
    return run_main(settings, folder, devices, SHARED in options, reporter, group)


def acquire_locks(folder: JobFolder, device_locks: Sequence[FileLock]) -> int | None:
    """Takes all locks, which are released only when the process ends.

    Returns:
        None where the job may begin, the exit status otherwise.
    """
    if not folder.path.is_dir():
        return EXIT_NOTHING_TO_DO
    try:
        if not all(lock.acquire(LOCK_TIMEOUT) for lock in (folder.lock, *device_locks)):
            return EXIT_TAKEN
        state, _ = folder.read_state(), folder.read_settings()
        asked = folder.read_request()
    except FileError as e:
        log_line(str(e))
        return EXIT_FAILED
    if asked in STOPS or find_next(find_stage(state.status), Event.START) is None:
        return EXIT_NOTHING_TO_DO
    folder.clear_leftovers()
    clear_failures(folder)
    return None


def build_running_state(state: JobState, device_name: str) -> JobState:
    return advance(
        state,
        Event.START,
        phase=Phase.LOADING,
        started_at=state.started_at or time.time(),
        heartbeat_at=time.time(),
        device=device_name,
        worker=identify(),
        parent=identify(os.getppid()),
        seconds_per_step=None,
        memory_bytes=None,
    )


def run_main(
    settings: JobSettings,
    folder: JobFolder,
    devices: Sequence[str],
    is_shared: bool,
    reporter: JobReporter | NullReporter,
    group: ProcessGroup,
) -> int:
    if isinstance(reporter, NullReporter):
        return run_follower(settings, folder, devices, is_shared, reporter, group)
    log_line(f"worker {os.getpid()} takes job {folder.id} on {', '.join(devices)}")
    # Around everything: a launcher tells all processes to end when one has died, and this one has
    # to record why.
    with stop_on_signals() as is_terminated:
        reporter.is_terminated = is_terminated
        try:
            group.watch(lambda dead: finish_after_death(dead, settings, folder, reporter, group))
            # expensive, and a broken installation fails here
            import_diffusers_alone()
            from .training_job import run_job

            is_done = run_job(settings, folder, devices, reporter, group.accelerator, is_shared)
            group.stop_watching()
            if is_done:
                reporter.finish(Event.COMPLETE)
            else:
                finish_stopped(settings, folder, reporter)
            return 0
        except BaseException as e:  # noqa: BLE001 - whatever it is, it must be reported
            if not isinstance(e, LoraError):
                traceback.print_exc()
            # To the others, the death of a process appears as a communication error.
            dead = group.find_dead(DEATH_TIMEOUT)
            group.stop_watching()
            if dead is not None:
                return finish_after_death(dead, settings, folder, reporter, group, exit_now=False)
            return finish_failed(e, settings, folder, reporter)


def run_follower(
    settings: JobSettings,
    folder: JobFolder,
    devices: Sequence[str],
    is_shared: bool,
    reporter: NullReporter,
    group: ProcessGroup,
) -> int:
    """What every process but rank 0 does: trains along, and ends with rank 0."""
    try:
        group.watch(lambda dead: os._exit(0))
        with stop_on_signals() as is_terminated:
            reporter.is_terminated = is_terminated
            import_diffusers_alone()
            from .training_job import run_job

            run_job(settings, folder, devices, reporter, group.accelerator, is_shared)
            group.wait_for_main()
        return 0
    except BaseException as e:  # noqa: BLE001 - rank 0 reports it
        dead = group.find_dead(DEATH_TIMEOUT)
        if dead is None:
            if not isinstance(e, LoraError):
                traceback.print_exc()
            with suppress(OSError):
                write_failure(folder, group.index, explain_error(e, settings.train))
        return EXIT_FAILED


def finish_after_death(
    dead: int,
    settings: JobSettings,
    folder: JobFolder,
    reporter: JobReporter,
    group: ProcessGroup,
    exit_now: bool = True,
) -> int:
    """Ends rank 0 because another process has ended; the rest end with this one.

    Args:
        exit_now: end this process immediately, from whatever thread.
    """
    try:
        reported = pop_failure(folder, dead)
        if reported is None:
            failure = JobFailure(
                sentence=message(
                    "process {dead} of {count} was terminated from outside, manually or because "
                    "the computer ran out of memory",
                    dead=dead + 1,
                    count=group.count,
                ),
                advice=(RESUME, LOOK_AT_LOG),
                log_tail=read_log_tail(folder),
            )
            log_line(failure.sentence)
            finish_ended(settings, reporter, reporter.state.checkpoint_step, failure)
        else:
            log_line(f"process {dead + 1} of {group.count} failed: {reported.sentence}")
            failure = dataclasses.replace(reported, log_tail=read_log_tail(folder))
            reporter.finish(Event.FAIL, failure=failure)
    except BaseException:  # noqa: BLE001 - the disk is full, most likely
        traceback.print_exc()
    if exit_now:
        sys.stdout.flush()
        os._exit(EXIT_FAILED)
    return EXIT_FAILED


def finish_stopped(settings: JobSettings, folder: JobFolder, reporter: JobReporter) -> None:
    """Writes the state after a requested stop; a request withdrawn meanwhile counts."""
    request = folder.read_request()
    if request in STOPS or not reporter.is_terminated():
        reporter.finish(Event.STOP, request)
    else:
        failure = JobFailure(
            sentence=message("the worker was asked to exit, as on shutdown, and saved first")
        )
        finish_ended(settings, reporter, reporter.state.step, failure)


def finish_ended(
    settings: JobSettings, reporter: JobReporter, reached: int, failure: JobFailure
) -> None:
    """Writes the state after processes were ended from outside; see `restart_or_fail`."""
    reporter.finish_as(restart_or_fail(reporter.state, reached, failure, settings.max_restarts))


def finish_failed(
    error: BaseException, settings: JobSettings, folder: JobFolder, reporter: JobReporter
) -> int:
    try:
        failure = explain_error(error, settings.train)
        log_line(f"failed: {failure.sentence}")
        for sentence in failure.advice:
            log_line(f"what to do: {sentence}")
        failure = dataclasses.replace(failure, log_tail=read_log_tail(folder))
        reporter.finish(Event.FAIL, failure=failure)
        return EXIT_FAILED
    except BaseException:  # noqa: BLE001 - the disk is full, most likely
        traceback.print_exc()
        return EXIT_UNREPORTED


def lower_priority(niceness: int) -> None:
    """Gives ComfyUI priority on the CPU, and lets it survive when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OUT_OF_MEMORY_SCORE))
    if hasattr(os, "nice"):
        with suppress(OSError):
            os.nice(niceness)
    elif niceness:
        try:
            import psutil

            psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
        except ImportError:
            log_line("psutil is not installed, so the worker's priority stays as it is")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of libraries must not keep the process, and with it the GPU.
    os._exit(status)

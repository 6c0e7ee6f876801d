"""The process that trains one job: `launch.start_worker` starts it, and its job's end is its own.

    python -m lora_core.jobs.worker STORE JOB DEVICE_KEY DEVICE_NAME

It takes the locks of the job and of the device, and gives them and all memory back by ending. It
does not watch whoever started it: when ComfyUI ends or crashes, training goes on, and the next
ComfyUI finds it. Without its job's folder it ends by itself.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from ..errors import FileError, LoraError
from ..training.interruption import stop_on_signals
from .failure import explain_error, read_log_tail, restart_or_fail
from .folder import JobFolder
from .identity import identify
from .job import JobFailure, JobSettings, JobState, JobStatus, Phase, Request
from .launch import EXIT_NOTHING_TO_DO, EXIT_TAKEN
from .locks import FileLock
from .pulse import Pulse, say
from .store import JOBS, get_device_lock

#: Seconds to wait for who only looks whether a lock is free.
LOCK_TIMEOUT = 2.0
EXIT_FAILED = 1
EXIT_NOT_TOLD = 74
#: Points by which Linux shall rather end this process than ComfyUI where memory runs out.
OUT_OF_MEMORY_SCORE = 500


def main(argv: list[str]) -> int:
    """Takes the job and works on it; returns the exit status."""
    root, job_id, device_key, device_name = argv
    folder = JobFolder(Path(root) / JOBS / job_id)
    device_lock = get_device_lock(Path(root), device_key)
    if not folder.path.is_dir():
        return EXIT_NOTHING_TO_DO
    try:
        if not take_both(folder.lock, device_lock):
            return EXIT_TAKEN
        state, settings = folder.read_state(), folder.read_settings()
        asked = folder.read_request()
    except FileError as e:
        say(str(e))
        return EXIT_FAILED
    if state.status is not JobStatus.PENDING or asked in (Request.PAUSE, Request.CANCEL):
        return EXIT_NOTHING_TO_DO
    folder.clear_leftovers()
    give_way(settings.niceness)
    try:
        pulse = Pulse(folder, begin(state, device_name))
    except FileError as e:
        say(str(e))
        return EXIT_FAILED
    pulse.start()
    return work(settings, folder, device_name, pulse)


def take_both(job_lock: FileLock, device_lock: FileLock) -> bool:
    """The locks are given back when the process ends, and not before."""
    return job_lock.acquire(LOCK_TIMEOUT) and device_lock.acquire(LOCK_TIMEOUT)


def begin(state: JobState, device_name: str) -> JobState:
    return dataclasses.replace(
        state,
        status=JobStatus.IN_PROGRESS,
        phase=Phase.LOADING,
        started_at=state.started_at or time.time(),
        heartbeat_at=time.time(),
        ended_at=None,
        failure=None,
        device=device_name,
        worker=identify(),
        parent=identify(os.getppid()),
        seconds_per_step=None,
        memory_bytes=None,
    )


def work(settings: JobSettings, folder: JobFolder, device_name: str, pulse: Pulse) -> int:
    say(f"worker {os.getpid()} takes job {folder.id} on {device_name}")
    try:
        with stop_on_signals() as is_terminated:
            pulse.is_terminated = is_terminated
            # heavy, and anything that is wrong with an installation shows here
            from .training_job import run_job

            is_done = run_job(settings, folder, device_name, pulse)
        if is_done:
            pulse.finish(JobStatus.COMPLETED, restarts=0)
        else:
            finish_stopped(settings, folder, pulse)
        return 0
    except BaseException as e:  # noqa: BLE001 - whatever it is, the user has to be told
        if not isinstance(e, LoraError):
            traceback.print_exc()
        return fail(e, settings, folder, pulse)


def finish_stopped(settings: JobSettings, folder: JobFolder, pulse: Pulse) -> None:
    """The state after a stop that was asked for; a request taken back meanwhile counts."""
    request = folder.read_request()
    if request is Request.CANCEL:
        pulse.finish(JobStatus.CANCELLED)
    elif request is Request.PAUSE:
        pulse.finish(JobStatus.PAUSED)
    else:
        failure = JobFailure(
            sentence="the worker was told to end, as at a shutdown, and saved first"
        )
        state = restart_or_fail(pulse.state, settings, pulse.state.step, failure)
        pulse.finish_as(state)


def fail(error: BaseException, settings: JobSettings, folder: JobFolder, pulse: Pulse) -> int:
    try:
        failure = explain_error(error, settings.train)
        say(f"failed: {failure.sentence}")
        for sentence in failure.advice:
            say(f"what to do: {sentence}")
        failure = dataclasses.replace(failure, log_tail=read_log_tail(folder))
        pulse.finish(JobStatus.FAILED, failure=failure)
        return EXIT_FAILED
    except BaseException:  # noqa: BLE001 - the disk is full, most likely
        traceback.print_exc()
        return EXIT_NOT_TOLD


def give_way(niceness: int) -> None:
    """Lets ComfyUI have the CPU first, and live where memory runs out."""
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
            say("psutil is not installed, so the worker's priority stays as it is")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of libraries must not keep the process, and with it the GPU.
    os._exit(status)

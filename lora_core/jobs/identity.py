"""Distinguishing a process from a later one with the same pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from functools import cache
from pathlib import Path

from .job import WorkerIdentity


@cache
def describe_host() -> str:
    """Where pids are valid: machine, boot, process namespace."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        pass  # not Linux: a machine has one pid namespace there
    return " ".join(parts)


def read_start(pid: int) -> float | None:
    """When a process began, in the system's own measure; None where there is no such process.

    A process that has ended and waits for its parent to notice (a zombie) counts as none.

    On Linux clock ticks since the boot, which psutil would turn into a time of day: then nobody
    would recognise their worker after the clock was set, as at the end of a laptop's sleep.
    """
    if not 0 < pid < 2**32:  # from an untrusted file
        return None
    try:
        # pid (name) state ppid ...: the name may hold spaces and brackets
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except (OSError, IndexError, ValueError):
        if Path("/proc/self/stat").exists():
            return None
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def identify(pid: int | None = None) -> WorkerIdentity | None:
    """A running process, or this one."""
    pid = os.getpid() if pid is None else pid
    started = read_start(pid)
    return (
        None if started is None else WorkerIdentity(host=describe_host(), pid=pid, started=started)
    )


def is_running(process: WorkerIdentity | None) -> bool:
    """Whether exactly this process lives; False for one of another machine."""
    return (
        process is not None
        and process.host == describe_host()
        and read_start(process.pid) == process.started
    )


def kill(process: WorkerIdentity | None) -> bool:
    """Ends exactly this process and its children at once; False where it has already ended."""
    if process is None or not is_running(process):
        return False
    try:
        if os.name == "nt":
            subprocess.run(
                ["taskkill", "/F", "/T", "/PID", str(process.pid)],
                capture_output=True,
                check=False,
            )
        elif os.getpgid(process.pid) == process.pid:  # the leader of its group, as workers are
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True

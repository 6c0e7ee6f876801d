"""Programs with a time limit, terminated together with everything they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .settings import Context

#: Exit status of a program terminated at its limit, as in timeout(1).
TIMED_OUT = 124


def start_group(
    command: Sequence[str | Path], log: TextIO, environment: Mapping[str, str], **options: Any
) -> subprocess.Popen:
    """Starts a program in its own process group, with stderr written to `log`."""
    if os.name == "nt":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        options["start_new_session"] = True
    words = [str(part) for part in command]
    return subprocess.Popen(words, stderr=log, env=dict(environment), **options)


def wait(process: subprocess.Popen, deadline: float) -> int:
    """Its exit status; TIMED_OUT if it was terminated at the deadline, a `time.time`."""
    try:
        return process.wait(max(0.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        stop_group(process)


def stop_group(process: subprocess.Popen) -> None:
    """Immediately ends a program of `start_group` and everything it started."""
    if os.name == "nt":
        if process.poll() is None:
            command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
            subprocess.run(command, capture_output=True, check=False)
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    process.wait()


def start_piece(context: Context, piece: str) -> subprocess.Popen:
    """Starts another process of a part, such as "E:run_legacy"; it ends with its part's group."""
    return subprocess.Popen(build_command(context, piece))


def build_command(context: Context, part: str) -> list[str]:
    """The command line of a part, or of "part:function", with the settings of this one."""
    record = context.record
    command = [sys.executable, "-m", "gpu", part, "--results", record.path]
    command += ["--card", record.card, "--command", record.command]
    command += ["--deadline", record.deadline, "--folder", context.folder]
    return [str(word) for word in [*command, *(["--dry-run"] if context.is_dry else [])]]

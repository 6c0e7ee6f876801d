"""Recognising a process: only while it lives, whatever happens to clocks and pids."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
from qwen_edit_lora.lora_core.jobs.identity import identify, is_running, kill, read_start


def start_sleeper() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_is_the_same_after_the_clock_was_set(monkeypatch):
    this = identify()
    for name in ("_pslinux", "_psosx", "_pswindows"):
        if hasattr(psutil, name):
            monkeypatch.setattr(getattr(psutil, name), "boot_time", lambda: 1e6, raising=False)
    assert is_running(this)


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="has no zombies")
def test_an_ended_process_that_nobody_waited_for_is_not_running():
    with start_sleeper() as child:
        identity = identify(child.pid)
        assert is_running(identity)
        assert kill(identity)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        assert not is_running(identity)
        assert not kill(identity)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_is_another_process():
    this = identify()
    child = os.fork()
    if not child:
        os._exit(int(identify() == this or not is_running(this)))
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_of_another_user_is_seen():
    assert read_start(1) is not None


@pytest.mark.parametrize("pid", [-1, 0, 2**22 + 1, 2**31, 2**32, 2**64])
def test_a_pid_of_no_process_is_none(pid):
    assert read_start(pid) is None
    assert identify(pid) is None

"""If a driver spills into main memory, PyTorch is limited to the free memory."""

from __future__ import annotations

import platform
import sys

import pytest
import torch
from qwen_edit_lora.lora_core.training.machine.memory_limit import SPARE, limit_memory

GIB = 2**30


@pytest.fixture
def limits(monkeypatch):
    """Limits set on a GPU of 24 GiB, 15 of them free and one held by this process."""
    found = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *arguments: found.append(arguments)
    )
    return found


@pytest.mark.parametrize(
    ("system", "release", "is_limited"),
    [
        ("win32", "11", True),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", True),
        ("linux", "6.8.0-45-generic", False),
    ],
)
def test_only_overcommitting_drivers_are_limited(system, release, is_limited, limits, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    limit_memory(torch.device("cuda"))
    # The index by number: torch takes no "cuda" without one here.
    assert limits == ([((16 * GIB - SPARE) / (24 * GIB), 3)] if is_limited else [])


def test_a_cpu_has_no_limit_and_a_full_gpu_none_below_0(limits, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    limit_memory(torch.device("cpu"))
    assert limits == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    limit_memory(torch.device("cuda:1"))
    assert limits == [(0.0, 1)]


def test_a_session_and_an_estimate_begin_with_the_limit(tmp_path, monkeypatch):
    from qwen_edit_lora.lora_core.training.estimate import estimate
    from qwen_edit_lora.lora_core.training.run import session
    from small_bases import TINY, write_base
    from tiny import make_config, make_dataset

    class Reached(Exception):
        pass

    def reach(device):
        raise Reached

    config = make_config(
        tmp_path, **{"model.source": write_base(tmp_path / "base.safetensors", 1, **TINY)}
    )
    dataset = make_dataset(tmp_path / "data")
    for module, function in (
        (session, lambda: session.open_session(config)),
        (estimate, lambda: estimate.estimate_run(config, dataset)),
    ):
        monkeypatch.setattr(module, "limit_memory", reach)
        with pytest.raises(Reached):
            function()

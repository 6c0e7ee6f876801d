"""The devices of this machine that jobs may run on: its GPUs, or its CPU as one device."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """One place for one job at a time."""

    name: str
    """"cpu", "cuda:0", ... as this process counts them."""
    key: str
    """The same for every process that sees the device; names its lock."""
    visible: str
    """For a worker's CUDA_VISIBLE_DEVICES, so that it sees this GPU alone."""

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU


def list_devices() -> list[Device]:
    """The GPUs, then the CPU."""
    host = socket.gethostname()
    cpu = Device(CPU, f"{host}-cpu", "")
    if not torch.cuda.is_available():
        return [cpu]
    return [*(describe_gpu(index, host) for index in range(torch.cuda.device_count())), cpu]


def describe_gpu(index: int, host: str) -> Device:
    entries = [e.strip() for e in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if e]
    visible = entries[index] if index < len(entries) else str(index)
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return Device(f"cuda:{index}", f"{host}-{uuid or visible}", visible)


def measure_memory(device: Device) -> int:
    """Bytes of a GPU's memory, whoever uses it."""
    return torch.cuda.mem_get_info(torch.device(device.name))[1]


def fits(device: Device, wanted: str, has_gpu: bool) -> bool:
    """Whether a job that asks for `wanted` ("auto", "cpu", "cuda", "cuda:1") may run here.

    A GPU that is not there is left to the CPU's worker, which says so.
    """
    if wanted == CPU or not has_gpu:
        return device.name == CPU
    if ":" in wanted:
        return device.name == wanted
    return device.is_gpu

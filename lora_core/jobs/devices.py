"""The devices of this machine that jobs may run on: its GPUs, or its CPU as one device.

`choose_devices` alone decides which devices a job gets: the choice of a storage, the estimate and
the supervisor all use it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..training.config.config import TrainConfig

CPU = "cpu"
CUDA_VARIABLE, HIP_VARIABLE = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Device:
    """Runs one job at a time."""

    name: str
    """"cpu", "cuda:0", ... as this process counts them."""
    key: str
    """The same for every process that sees the device; names its lock."""
    visible: str
    """For the variable that shows a worker this GPU alone; see `name_variable`."""
    memory_bytes: int = 0
    """Of the whole GPU, including what is in use; 0 for a CPU."""
    is_shared: bool = False
    """Whether ComfyUI computes on it too."""

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU


def list_devices() -> list[Device]:
    """The GPUs, then the CPU. Opens no context on any of them."""
    host = socket.gethostname()
    cpu = Device(CPU, f"{host}-cpu", "")
    if not torch.cuda.is_available():
        return [cpu]
    return [*(describe_gpu(index, host) for index in range(torch.cuda.device_count())), cpu]


def describe_gpu(index: int, host: str) -> Device:
    # Not mem_get_info, which opens a context: 0.3 to 0.5 GB of a card for as long as ComfyUI runs.
    properties = torch.cuda.get_device_properties(index)
    visible = find_visible(index, os.environ)
    uuid = getattr(properties, "uuid", None)
    key = f"{host}-{uuid or visible}"
    return Device(f"cuda:{index}", key, visible, properties.total_memory)


def name_variable(environment: Mapping[str, str]) -> str:
    """The variable by which a user selected the GPUs that this process sees.

    ROCm accepts both names, its own before CUDA's. Its indices count the GPUs that
    ROCR_VISIBLE_DEVICES leaves, which a worker inherits unchanged.
    """
    is_rocm = torch.version.hip is not None
    return HIP_VARIABLE if is_rocm and HIP_VARIABLE in environment else CUDA_VARIABLE


def find_visible(index: int, environment: Mapping[str, str]) -> str:
    """The value that shows another process the GPU that is `index` in this one."""
    entries = [e.strip() for e in environment.get(name_variable(environment), "").split(",") if e]
    return entries[index] if index < len(entries) else str(index)


def show_only(devices: Sequence[Device]) -> dict[str, str]:
    """The variables for a process that should see these GPUs only; remove all others."""
    visible = ",".join(device.visible for device in devices if device.is_gpu)
    return {CUDA_VARIABLE if torch.version.hip is None else HIP_VARIABLE: visible}


def is_wanted(device: Device, wanted: str) -> bool:
    """Whether "auto", "cpu", "cuda" or "cuda:1" names this device."""
    return device.name == wanted or (device.is_gpu and wanted in ("auto", "cuda"))


def choose_devices(
    devices: Sequence[Device],
    wanted: str,
    count: int = 1,
    needed_bytes: int = 0,
    taken: Collection[Device] = (),
) -> list[Device]:
    """Those that a job gets, which starts once none of them is taken.

    Args:
        devices: of the machine, those to be used first in front.
        wanted: as `ModelConfig.device`; a missing GPU is left to the CPU's worker, which reports
            it.
        count: devices that the job asks for; a job that asks for more than there are gets all,
            and its worker reports it.
        needed_bytes: of each GPU; smaller ones are left out while there are any others.
        taken: by jobs that run or are queued before.
    """
    named = [device for device in devices if is_wanted(device, wanted)]
    large = [device for device in named if device.memory_bytes >= needed_bytes]
    usable = large or named or [device for device in devices if not device.is_gpu]
    return sorted(usable, key=lambda device: device in taken)[:count]


def set_device(config: TrainConfig, device_name: str) -> TrainConfig:
    """The configuration for a process that sees this device alone."""
    device = CPU if device_name == CPU else "cuda"
    wanted = config.model.device
    if device == CPU and wanted not in ("auto", CPU):
        device = wanted  # there is no such GPU; opening it raises the error
    return replace(config, model=replace(config.model, device=device))

"""Which devices a training job gets in this ComfyUI, and checks before it is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from ...lora_core.errors import ConfigError
from ...lora_core.jobs.devices import Device, choose_devices, list_devices
from ...lora_core.jobs.job import MAX_DEVICES
from ...lora_core.jobs.store import JobStore, get_device_lock
from ...lora_core.messages import message
from ...lora_core.training.run.processes import NO_NCCL, can_join_gpus
from .. import host


def order_devices() -> list[Device]:
    """Puts GPUs that ComfyUI does not use first, and marks the one it uses as shared."""
    ours = host.get_device_name()
    devices = [
        replace(device, is_shared=device.is_gpu and device.name == ours)
        for device in list_devices()
    ]
    return sorted(devices, key=lambda device: device.name == ours)


def choose_for_job(
    store: JobStore, wanted: str, count: int = 1, needed_bytes: int = 0
) -> tuple[list[Device], set[Device]]:
    """The devices a job submitted now gets, and those of all devices that other jobs hold.

    Args:
        wanted, count, needed_bytes: as for `devices.choose_devices`.
    """
    devices = order_devices()
    taken = {one for one in devices if get_device_lock(store.root, one.key).is_held()}
    return choose_devices(devices, wanted, count, needed_bytes, taken), taken


def find_memory(devices: Sequence[Device]) -> int | None:
    """Memory in bytes of the smallest of a job's GPUs; None for a job on the CPU."""
    if not devices or not all(device.is_gpu for device in devices):
        return None
    return min(device.memory_bytes for device in devices)


def prepare_measuring(devices: Sequence[Device], taken: set[Device]) -> str:
    """Inside a running node: unloads ComfyUI's models from the first device, which is measured.

    Returns:
        Why it cannot be measured now, or "".
    """
    if devices[0] in taken:
        return message("another training job runs on {name}", name=devices[0].name)
    if devices[0].name == host.get_device_name():
        host.release_models()
    return ""


def check_devices(count: int) -> None:
    """Checked before a training set is encoded in vain.

    Raises:
        ConfigError: too few GPUs, or the backend that connects their processes is missing.
    """
    if not 1 <= count <= MAX_DEVICES:
        raise ConfigError(
            "gpus is {count}; expected 1 to {max_devices}", count=count, max_devices=MAX_DEVICES
        )
    if count == 1:
        return
    num_gpus = sum(device.is_gpu for device in list_devices())
    if num_gpus < count:
        raise ConfigError(
            "gpus is {count}, but there are {num_gpus} GPUs that ComfyUI sees; expected no more "
            "than there are",
            count=count,
            num_gpus=num_gpus,
        )
    if not can_join_gpus():
        raise ConfigError("gpus is {count}: {no_nccl}", count=count, no_nccl=NO_NCCL)
    if find_spec("accelerate") is None:
        raise ConfigError(
            "several GPUs need Hugging Face Accelerate; run pip install accelerate in ComfyUI's "
            "Python, or set gpus to 1"
        )

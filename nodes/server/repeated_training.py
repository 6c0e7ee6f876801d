"""A LoRA file -> the training that made it, queued again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...lora_core.disk.safetensors_file import SafetensorsFile
from ...lora_core.errors import ConfigError, FileError
from ...lora_core.jobs.job import SampleSettings, UnknownJobError
from ...lora_core.jobs.publication import JOB_KEY
from ...lora_core.jobs.retraining import build_again
from ...lora_core.pairs.cache import SETS_FOLDER
from ...lora_core.pairs.vae_copy import find_vae
from ...lora_core.training.data.dataset import read_dataset
from .. import host
from .job_host import get_jobs
from .prompt_policy import WARN, get_policy


def train_again(adapter_path: Path) -> str:
    """Submits the training that made a LoRA again, from the file's own metadata.

    Uses its job's other settings (samples, policy) if that job still exists, otherwise the
    defaults. The new LoRA gets an unused name.

    Args:
        adapter_path: a file in a loras folder; see `host.find_lora`.

    Returns:
        The new job's id.

    Raises:
        ConfigError: says what is missing: the settings, the base model or the training set.
        FileError: the LoRA or the training set cannot be read, or the job cannot be written.
    """
    jobs, file = get_jobs(), SafetensorsFile(adapter_path)
    train = build_again(file.metadata, find_models, find_datasets, host.find_vaes)
    dataset = read_dataset(train.data.folder)
    try:
        old = jobs.store.get(file.metadata.get(JOB_KEY, ""))
    except (ConfigError, UnknownJobError, FileError):
        old = None
    if old is None:
        keys = tuple(info.key for info in dataset.items)
        samples, policy, more = SampleSettings(every=250, items=keys[:2]), WARN, {}
    else:
        settings, policy = old.settings, get_policy(old)
        samples = settings.samples
        names = ("niceness", "max_restarts", "num_devices")
        more = {name: getattr(settings, name) for name in names}
    vae = find_vae(Path(train.data.folder))
    samples = dataclasses.replace(samples, vae="" if vae is None else str(vae))
    origin = {"again": adapter_path.name}
    return jobs.submit(train, policy=policy, samples=samples, origin=origin, **more)


def find_models(name: str) -> list[Path]:
    """Base models with this file name, in any subfolder."""
    names = [n for n in host.list_training_bases() if Path(n.replace("\\", "/")).name == name]
    return [host.find_training_base(n) for n in names]


def find_datasets(name: str) -> list[Path]:
    """The cached training set with this name, if there is one."""
    folder = host.get_cache_folder() / "datasets" / SETS_FOLDER / name
    return [folder] if folder.is_dir() else []

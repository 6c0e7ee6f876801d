"""A LoRA file in ComfyUI's folders -> the training that made it, queued again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.jobs.publication import publish
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, DatasetWriter, read_dataset
from qwen_edit_lora.lora_core.training.run.adapter_files import build_run_metadata
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

BASE = "tiny_fp32_2509.safetensors"


@pytest.fixture
def job_host(executor: Any, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with its own queue, which has no worker."""
    from qwen_edit_lora.nodes.server import job_host, routes

    prompts = routes.PromptQueue(executor.server)
    jobs = job_host.JobHost(tmp_path / "training", prompts, lambda data: None)
    monkeypatch.setattr(job_host, "_jobs", jobs)
    return job_host


def train_again(path: Path) -> str:
    from qwen_edit_lora.nodes.server import repeated_training

    return repeated_training.train_again(path)


@pytest.fixture
def dataset(ours: Any) -> Any:
    folder = ours.host.get_cache_folder() / "datasets" / "sets" / "pairs-0123456789ab"
    writer = DatasetWriter(folder)
    for key in ("a", "b", "c"):
        target, reference = torch.ones(2, 16, 4, 4).unbind()
        item = CachedItem(target=target, references=(reference.clone(),), text=torch.ones(3, 64))
        writer.add(key, item)
    return read_dataset(writer.finish())


@pytest.fixture
def lora(dataset: Any, demo_models: Any) -> Path:
    config = config_from_dict(
        {
            "name": "my edit",
            "output": "elsewhere/run",
            "steps": 7,
            "model": {"source": f"models_of_another/{BASE}", "compute_dtype": "fp32"},
            "data": {"folder": f"sets_of_another/{dataset.folder.name}"},
        }
    )
    path = demo_models.root / "loras" / "to_train_again.safetensors"
    metadata = build_run_metadata(config, dataset, 7, "2509", False)
    save_file({"x": torch.ones(1)}, path, metadata)
    yield path
    path.unlink()


def test_a_lora_is_trained_again_with_the_files_of_this_comfyui(
    job_host, lora, dataset, demo_models
):
    job = job_host.get_jobs().store.get(train_again(lora))
    train = job.settings.train
    assert Path(train.model.source).samefile(demo_models.dit["2509_fp32"])
    assert Path(train.data.folder) == dataset.folder
    assert (train.name, train.steps, train.model.compute_dtype) == ("my edit", 7, "fp32")
    assert Path(job.settings.loras).samefile(demo_models.root / "loras")
    assert (job.settings.samples.every, job.settings.samples.items) == (250, ("a", "b"))
    assert job.settings.origin == {"again": lora.name, "prompts": "warn"}
    assert train_again(lora) != job.id  # every click is a training


def test_the_jobs_other_settings_are_kept(job_host, lora, dataset):
    first = train_again(lora)
    clone = job_host.get_jobs().store.clone(first, {"samples.every": 3, "niceness": 5})
    (name,) = publish([lora], lora.parent, clone)
    try:
        job = job_host.get_jobs().store.get(train_again(lora.parent / name))
    finally:
        (lora.parent / name).unlink()
    assert (job.settings.samples.every, job.settings.niceness) == (3, 5)


def test_more_gpus_than_exist_are_a_clear_error(ours):
    from qwen_edit_lora.lora_core.jobs.devices import list_devices
    from qwen_edit_lora.nodes.server import job_devices

    num_gpus = sum(device.is_gpu for device in list_devices())
    job_devices.check_devices(1)
    with pytest.raises(ConfigError, match=f"there are {num_gpus} GPUs that ComfyUI sees"):
        job_devices.check_devices(num_gpus + 2)


def test_a_lora_of_another_trainer_or_a_lost_training_set_is_a_clear_error(
    job_host, lora, dataset, tmp_path
):
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors", {"ss_network_dim": "4"})
    with pytest.raises(ConfigError, match="does not say how it was trained"):
        train_again(tmp_path / "foreign.safetensors")
    (dataset.folder / "index.json").unlink()
    for path in dataset.folder.rglob("*.safetensors"):
        path.unlink()
    (dataset.folder / "items").rmdir()
    dataset.folder.rmdir()
    with pytest.raises(ConfigError, match=f"the training set {dataset.folder.name} is missing"):
        train_again(lora)
    assert job_host.get_jobs().store.list() == []

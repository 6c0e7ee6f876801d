"""The devices that the Train node checks are those that its job gets, and what fits on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError, KeyFormatError
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.store import JobStore, get_device_lock
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from qwen_edit_lora.lora_core.training.config.presets import BaseSize
from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, DatasetWriter
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

GIB = 2**30
CPU = Device("cpu", "here-cpu", "")
LARGE = Device("cuda:0", "here-a", "0", 24 * GIB)
SMALL = Device("cuda:1", "here-b", "1", 12 * GIB)
QWEN_IMAGE = BaseSize(60, 339_830_784, 40_519_744, 3072)


@pytest.fixture
def job_devices(ours: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a machine with a 24 GB GPU, shared with ComfyUI, and a 12 GB GPU."""
    from qwen_edit_lora.nodes.server import job_devices

    monkeypatch.setattr(job_devices, "list_devices", lambda: [LARGE, SMALL, CPU])
    monkeypatch.setattr(job_devices.host, "get_device_name", lambda: "cuda:0")
    return job_devices


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "training")


def find_memory(job_devices: Any, store: JobStore, *arguments: Any) -> int | None:
    devices, _ = job_devices.choose_for_job(store, *arguments)
    return job_devices.find_memory(devices)


def test_comfyuis_gpu_comes_last_and_is_marked(job_devices):
    found = [(one.name, one.is_shared) for one in job_devices.order_devices()]
    assert found == [("cuda:1", False), ("cpu", False), ("cuda:0", True)]
    job_devices.host.get_device_name = lambda: "cpu"
    assert not any(one.is_shared for one in job_devices.order_devices())


def test_memory_is_that_of_the_gpu_which_the_job_gets(job_devices, store):
    assert find_memory(job_devices, store, "auto") == 12 * GIB
    assert find_memory(job_devices, store, "cuda:0") == 24 * GIB
    assert find_memory(job_devices, store, "auto", 2) == 12 * GIB
    assert find_memory(job_devices, store, "cpu") is None
    lock = get_device_lock(store.root, SMALL.key)
    with lock.held(1.0):
        assert find_memory(job_devices, store, "auto") == 24 * GIB
        devices, taken = job_devices.choose_for_job(store, "cuda:1")
        problem = job_devices.prepare_measuring(devices, taken)
    assert problem == "another training job runs on cuda:1"


def test_comfyuis_models_are_released_on_the_measured_device(job_devices, store, monkeypatch):
    released = []
    monkeypatch.setattr(job_devices.host, "release_models", lambda: released.append(True))
    assert job_devices.prepare_measuring(*job_devices.choose_for_job(store, "auto")) == ""
    assert released == []
    assert job_devices.prepare_measuring(*job_devices.choose_for_job(store, "cuda:0")) == ""
    assert released == [True]


def test_several_gpus_need_a_backend_that_connects_them(job_devices, monkeypatch):
    job_devices.check_devices(2)
    with pytest.raises(ConfigError, match="gpus is 3, but there are 2 GPUs that ComfyUI sees"):
        job_devices.check_devices(3)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    job_devices.check_devices(1)
    with pytest.raises(ConfigError, match="gpus is 2: several GPUs need NCCL"):
        job_devices.check_devices(2)


# --- how the base is stored there -----------------------------------------------------------------


@pytest.fixture
def choose(job_devices: Any, demo_models: Any, tmp_path: Path, monkeypatch: Any) -> Any:
    """`choose_base` for a base of Qwen-Image's size, one small pair, and 64 GiB of free memory."""
    from qwen_edit_lora.nodes import base_choice

    writer = DatasetWriter(tmp_path / "data")
    writer.add("a", CachedItem(target=torch.ones(16, 4, 4), references=(), text=torch.ones(3, 64)))
    folder = writer.finish()
    monkeypatch.setattr(base_choice, "measure_base", lambda shapes: QWEN_IMAGE)
    monkeypatch.setattr(base_choice, "find_free_host_memory", lambda: 64 * GIB)
    monkeypatch.setattr(base_choice, "find_spec", lambda name: None)

    def run(devices, storage="auto", source=demo_models.dit["2509_fp32"], **own):
        config = config_from_dict(
            {
                "name": "my edit",
                "output": "run",
                "model": {"source": str(source), **own},
                "data": {"folder": str(folder)},
            }
        )
        return base_choice.choose_base(config, storage, own, devices)

    return run


def test_auto_offloads_blocks_on_a_small_gpu_and_reports_it(choose):
    settings, lines, needed_bytes = choose([SMALL])
    assert (settings["storage"], settings["compute_dtype"]) == ("fp8", "bf16")
    assert 0 < settings["offload_blocks"] < 60
    assert "blocks offloaded to main memory" in lines[0]
    assert 11 * GIB < needed_bytes < 12 * GIB
    larger, _, _ = choose([LARGE])
    assert larger["offload_blocks"] < settings["offload_blocks"]


def test_on_a_cpu_nothing_is_offloaded(choose):
    settings, _, needed_bytes = choose([CPU])
    assert settings == {"storage": "fp32", "compute_dtype": "fp32", "offload_blocks": 0}
    assert needed_bytes == 0


def test_auto_keeps_the_users_own_settings(choose):
    assert choose([SMALL], "nf4") == ({"storage": "nf4", "compute_dtype": "bf16"}, [], 0)
    assert choose([SMALL], storage="auto", **{"offload_blocks": 60})[0]["storage"] == "bf16"
    kept, _, _ = choose([SMALL], **{"gradient_checkpointing": False})
    assert kept["offload_blocks"] == 0  # offloaded blocks would have to be recomputed


def test_a_storage_in_more_settings_disables_auto(choose):
    from qwen_edit_lora.nodes import base_choice

    config = config_from_dict(
        {
            "name": "a",
            "output": "run",
            "model": {"source": "a", "storage": "fp8"},
            "data": {"folder": "b"},
        }
    )
    found = base_choice.choose_base(config, "auto", {"storage": "fp8"}, [SMALL])
    assert found == ({"compute_dtype": "bf16"}, [], 0)


def test_a_model_of_another_kind_is_a_clear_error_before_anything_is_measured(choose, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(KeyFormatError, match="is not a Qwen-Image model"):
        choose([SMALL], source=tmp_path / "other.safetensors")


def test_the_same_graph_is_one_job_regardless_of_free_memory(
    choose, executor, store, demo_models, tmp_path, monkeypatch
):
    from qwen_edit_lora.nodes import base_choice
    from qwen_edit_lora.nodes.server import job_host, routes
    from qwen_edit_lora.nodes.train import MEASURE, SKIP, QwenEditLoraTrain

    prompts = routes.PromptQueue(executor.server)
    jobs = job_host.JobHost(tmp_path / "training", prompts, lambda data: None)
    monkeypatch.setattr(job_host, "_jobs", jobs)
    (folder,) = tmp_path.glob("data*")
    dataset = SimpleNamespace(folder=folder, keys=("a",))

    def queue(estimate=SKIP):
        model = Path(demo_models.dit["2509_fp32"]).name
        return QwenEditLoraTrain.execute(model, dataset, "standard", 5, "a", estimate=estimate)

    first, report = queue().args
    settings = jobs.store.get(first).settings
    assert settings.train.model.storage == "fp8"
    assert f"with {settings.train.model.offload_blocks} of 60 blocks offloaded" in report
    assert 11 * GIB < settings.gpu_memory_bytes < 12 * GIB
    monkeypatch.setattr(base_choice, "find_free_host_memory", lambda: 0)
    lock = get_device_lock(jobs.store.root, SMALL.key)
    with lock.held(1.0):
        again, report = queue().args
    assert again == first
    assert "this training is already job" in report
    jobs.store.cancel(first)
    with lock.held(1.0), get_device_lock(jobs.store.root, LARGE.key).held(1.0):
        _, report = queue(MEASURE).args
    assert "not estimated: another training job runs on cuda:1" in report

"""Two CPU processes under `accelerate launch` are one process with twice the batch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.model.model_config import ModelConfig
from qwen_edit_lora.lora_core.training.model.sharding import check_launch, choose_sharding
from qwen_edit_lora.lora_core.training.run.metrics import read_metrics
from qwen_edit_lora.lora_core.training.run.processes import make_buckets
from safetensors.torch import load_file
from small_bases import TINY, write_base
from tiny import make_dataset, make_item

ROOT = Path(__file__).resolve().parents[4]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
KINDS = {"ddp": ["--multi_gpu"], "fsdp": ["--use_fsdp", "--fsdp_version", "2"]}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes")


def write_config(folder: Path, batch_size: int) -> Path:
    folder.mkdir()
    path = folder / "config.json"
    values = {
        "name": "tiny",
        "output": "run",
        "steps": 6,
        "model": {
            "source": "../dit.safetensors",
            "storage": "fp8",  # which gloo could not send
            "compute_dtype": "fp32",
            "device": "cpu",
        },
        "data": {"folder": "../data", "batch_size": batch_size},
        "lora": {"rank": 4},
        "optimizer": {"learning_rate": 1e-2, "accumulation": 2, "ema_decay": 0.9},
        "saving": {"checkpoint_every": 3, "dtype": "fp32"},
    }
    path.write_text(json.dumps(values))
    return path


def launch(num_processes: int, kind: str) -> list[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # Its `--cpu` would start a single process unless mpirun is there.
    command = [*LAUNCH, *KINDS[kind], "--num_processes", str(num_processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "--num_cpu_threads_per_process", "1", "--main_process_port", str(port)]


def start(command: list[str]) -> None:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "view tensor" not in result.stderr  # FSDP's warning about what it cannot track


def run(config: Path, kind: str | None, *more: str) -> list[dict]:
    """`python -m lora_core train`, in two processes where a kind is given; the metrics after it."""
    command = [sys.executable] if kind is None else launch(2, kind)
    start([*command, "-m", "lora_core", "train", str(config), *more])
    return list(read_metrics(config.parent / "run" / "metrics.jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and a training set of two sizes, one of them with padded texts."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("processes")
    dit.write_dit(folder / "dit.safetensors", "2511", "fp32")
    items = {f"s{i}": make_item(i, num_text_tokens=3 + i) for i in range(5)}
    items |= {f"w{i}": make_item(i, (4, 8), num_text_tokens=3) for i in range(3)}
    make_dataset(folder / "data", items)
    return folder


@pytest.fixture(scope="module")
def one(folder) -> list[dict]:
    """Metrics of a single process with twice the batch."""
    return run(write_config(folder / "one", 2), None)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_with_twice_the_batch_and_resume_bit_exactly(kind, folder, one):
    config = write_config(folder / kind, 1)
    two = run(config, kind)
    assert len(one) == len(two) == 6
    assert one[0]["loss"] != pytest.approx(one[1]["loss"], rel=1e-3)
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5, abs=1e-6)
    for name in ("tiny", "tiny_ema"):
        ours, theirs = (
            load_file(folder / n / "run" / f"{name}.safetensors") for n in (kind, "one")
        )
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            # AdamW takes a full step for a gradient that is only rounding; few entries have one.
            assert (ours[key] - tensor).norm() < 1e-3 * tensor.norm(), key

    output = folder / kind / "run"
    finished = (output / "tiny.safetensors").read_bytes()
    shutil.rmtree(output / "checkpoints" / "step_00000006")
    (output / "tiny.safetensors").unlink()
    again = run(config, kind, "--resume")
    assert [line["loss"] for line in again] == [line["loss"] for line in two]
    assert load_tensors(output / "tiny.safetensors") == load_tensors(finished)


def test_sharded_blocks_of_every_storage_compute_the_same_bits_in_half_the_memory(folder):
    base = write_base(folder / "base.safetensors", 3, **TINY)
    script = str(Path(__file__).parents[1] / "sharded_blocks.py")
    start([*launch(2, "fsdp"), script, base, str(folder)])
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for name in found[0]:
        assert all(one[name]["equal"] for one in found), name
        assert sum(one[name]["share"] for one in found) == pytest.approx(1, abs=0.01)
        assert all(one[name]["share"] == pytest.approx(0.5, abs=0.01) for one in found)


def test_buckets_hold_every_gradient_once_and_one_type_each():
    sizes = [3, 5, 2, 7, 1]
    dtypes = [torch.float32] * 3 + [torch.bfloat16] * 2
    parameters = [
        torch.nn.Parameter(torch.zeros(n, dtype=d)) for n, d in zip(sizes, dtypes, strict=True)
    ]
    buckets = list(make_buckets(parameters, 4 * 8))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3, 5], [2], [7, 1]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED would shard the LoRAs"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "launch with --fsdp_version 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "launch with --fsdp_offload_params false",
        ),
    ],
)
def test_unsupported_sharding_is_refused_with_what_to_use(changes, said):
    with pytest.raises(ConfigError, match=said):
        check_launch(changes)


def test_blocks_are_either_sharded_or_offloaded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = ModelConfig(source="base.safetensors", offload_blocks=2)
    with pytest.raises(ConfigError, match=r"FSDP already shards the blocks.*offload_blocks to 0"):
        choose_sharding(config, object())
    assert choose_sharding(config, None) is None


def load_tensors(content: Path | bytes) -> dict[str, list]:
    from safetensors.torch import load

    content = content if isinstance(content, bytes) else content.read_bytes()
    return {key: tensor.tolist() for key, tensor in load(content).items()}

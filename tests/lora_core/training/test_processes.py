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
from demo_base import dit
from qwen_edit_lora.lora_core.training.metrics import read_metrics
from safetensors.torch import load_file
from tiny import make_dataset, make_item

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]

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
            "storage": "fp8",  # which gloo could not send around
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


def run(config: Path, num_processes: int, *more: str) -> list[dict]:
    """`python -m lora_core train`, by Accelerate where there are several; the metrics after it."""
    command = [sys.executable]
    if num_processes > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        # Its `--cpu` would start a single process unless mpirun is there.
        command = [*LAUNCH, "--multi_gpu", "--num_processes", str(num_processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(port)]
    result = subprocess.run(
        [*command, "-m", "lora_core", "train", str(config), *more],
        cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return list(read_metrics(config.parent / "run" / "metrics.jsonl"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny model and a training set of two sizes, one of them with padded texts."""
    pytest.importorskip("accelerate")
    dit.write_dit(tmp_path / "dit.safetensors", "2511", "fp32")
    items = {f"s{i}": make_item(i, num_text_tokens=3 + i) for i in range(5)}
    items |= {f"w{i}": make_item(i, (4, 8), num_text_tokens=3) for i in range(3)}
    make_dataset(tmp_path / "data", items)
    return tmp_path


def test_two_processes_are_one_with_twice_the_batch_and_resume_to_the_bit(folder):
    one = run(write_config(folder / "one", 2), 1)
    config = write_config(folder / "two", 1)
    two = run(config, 2)
    assert len(one) == len(two) == 6
    assert one[0]["loss"] != pytest.approx(one[1]["loss"], rel=1e-3)
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5, abs=1e-6)
    for name in ("tiny", "tiny_ema"):
        ours, theirs = (
            load_file(folder / n / "run" / f"{name}.safetensors") for n in ("two", "one")
        )
        for key, tensor in theirs.items():
            # AdamW makes a whole step of a gradient that is all rounding; few entries have one.
            assert (ours[key] - tensor).norm() < 1e-3 * tensor.norm(), key

    output = folder / "two" / "run"
    finished = (output / "tiny.safetensors").read_bytes()
    shutil.rmtree(output / "checkpoints" / "step_00000006")
    (output / "tiny.safetensors").unlink()
    again = run(config, 2, "--resume")
    assert [line["loss"] for line in again] == [line["loss"] for line in two]
    assert load_tensors(output / "tiny.safetensors") == load_tensors(finished)


def load_tensors(content: Path | bytes) -> dict[str, list]:
    from safetensors.torch import load

    content = content if isinstance(content, bytes) else content.read_bytes()
    return {key: tensor.tolist() for key, tensor in load(content).items()}

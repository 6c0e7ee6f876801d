"""Two CPU processes under `accelerate launch` are one process with twice the batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core.training.metrics import read_metrics
from safetensors.torch import load_file
from tiny import make_dataset, make_item

SCRIPT = Path(__file__).with_name("launched_run.py")


def launch(folder: Path, num_processes: int, batch_size: int, *more: str) -> list[dict]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if num_processes > 1:  # `--cpu` would start a single process unless mpirun is there
        command.append("--multi_gpu")
    command += ["--num_processes", str(num_processes), "--num_machines", "1"]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
    ]
    command += ["1", "--main_process_port", str(port)]
    result = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(batch_size), *more],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return list(read_metrics(folder / "run" / "metrics.jsonl"))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes")
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    pytest.importorskip("accelerate")
    items = {f"s{i}": make_item(i, num_text_tokens=3 + i) for i in range(5)}
    items |= {f"w{i}": make_item(i, (4, 8), num_text_tokens=3) for i in range(3)}
    make_dataset(tmp_path / "data", items)
    one = launch(tmp_path / "one", 1, 2)
    two = launch(tmp_path / "two", 2, 1)
    assert len(one) == len(two) == 6
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5, abs=1e-6)
    files = (load_file(tmp_path / n / "run" / "tiny_ema.safetensors") for n in ("two", "one"))
    ours, theirs = files
    assert all((ours[key] - tensor).abs().max() < 1e-4 for key, tensor in theirs.items())

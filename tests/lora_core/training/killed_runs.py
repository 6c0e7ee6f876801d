"""Runs that are killed, for test_resume.py: `python killed_runs.py FOLDER NUMBER`.

This process imports everything once and then forks a child for each run; a child kills itself with
SIGKILL at its k-th call of a function that touches the disk, or is killed by its parent after a
while. It prints one JSON line: how many runs were killed where, and what was found after each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def import_by_path(name: str, path: Path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


import_by_path("qwen_edit_lora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
tiny = import_by_path("tiny", HERE / "tiny.py")

import torch  # noqa: E402
from qwen_edit_lora.lora_core.training.data.dataset import read_dataset  # noqa: E402
from qwen_edit_lora.lora_core.training.model.libraries import import_diffusers_alone  # noqa: E402
from qwen_edit_lora.lora_core.training.run import checkpoint  # noqa: E402
from qwen_edit_lora.lora_core.training.run.checkpoint import (  # noqa: E402
    CheckpointFolder,
    read_checkpoint,
)
from qwen_edit_lora.lora_core.training.run.trainer import train  # noqa: E402
from safetensors import safe_open  # noqa: E402

import_diffusers_alone()  # before the forks

STEPS = 6
#: Uses everything that has a state or draws random numbers.
CHANGES = {
    "steps": STEPS,
    "data.caption_dropout": 0.3,
    "data.batch_size": 2,
    "lora.dropout": 0.1,
    "optimizer.accumulation": 2,
    "optimizer.ema_decay": 0.9,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 2,
    "saving.checkpoint_every": 1,
    "saving.keep_checkpoints": 2,
    "saving.adapter_every": 3,
    "saving.health_every": 2,
    "saving.dtype": "fp32",
}


def make_data(folder: Path) -> None:
    empty = torch.randn(2, tiny.TEXT_WIDTH)
    items = {f"square_{i}": tiny.make_item(i, text_empty=empty) for i in range(3)}
    items |= {f"wide_{i}": tiny.make_item(9 + i, (4, 8), text_empty=empty) for i in range(2)}
    tiny.make_dataset(folder, items)


def run(folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    config = tiny.make_config(folder, **CHANGES)
    model, injection = tiny.make_injected(config)
    for _ in train(config, model, injection, read_dataset(data), resume=True):
        pass


def fork(action: Callable[[], None]) -> int:
    """Runs `action` in a child and returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        action()
    except BaseException as e:  # noqa: BLE001 - the parent must learn of any error
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        os._exit(1)
    os._exit(0)


def wait(child: int) -> str:
    """ "done", "killed" or "failed"."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return "done" if os.WEXITSTATUS(status) == 0 else "failed"


def kill_at_call(number: int) -> Callable[[], int]:
    """From now on, kills itself just before or after the `number`-th write, fsync or rename.

    Returns:
        A counter of these operations so far.
    """
    calls = 0

    def watch(function, die_after: bool):
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            dies = calls == number
            if dies and not die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **named)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    after = number % 2 == 0
    checkpoint.save_file = watch(checkpoint.save_file, after)
    checkpoint.synchronize = watch(checkpoint.synchronize, after)
    checkpoint.shutil.rmtree = watch(checkpoint.shutil.rmtree, after)
    os.rename = watch(os.rename, after)
    os.replace = watch(os.replace, after)
    return lambda: calls


def find_half_written(folder: Path) -> list[str]:
    """Files and checkpoints that carry their final name but cannot be read."""
    bad = []
    checkpoints = CheckpointFolder(folder / "checkpoints")
    for step in checkpoints.list_steps():
        try:
            read_checkpoint(checkpoints.get_path(step))
        except Exception as e:  # noqa: BLE001
            bad.append(f"step {step}: {e}")
    for path in folder.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            with safe_open(path, "pt") as file:
                [file.get_tensor(key) for key in file.keys()]
    return bad


def count_operations(folder: Path, data: Path) -> int:
    """Number of operations counted by `kill_at_call` in an uninterrupted run."""
    note = folder / "operations"

    def work() -> None:
        calls = kill_at_call(0)
        run(folder / "counted", data)
        note.write_text(str(calls()))

    assert wait(fork(work)) == "done"
    return int(note.read_text())


def main(folder: Path, num_kills: int) -> None:
    data = folder / "data"
    make_data(data)
    started = time.monotonic()
    assert wait(fork(lambda: run(folder / "whole", data))) == "done"
    duration_s = time.monotonic() - started
    num_operations = count_operations(folder, data)
    moments = random.Random(0)
    outcome: dict[str, Any] = {
        "killed_at_operations": 0,
        "killed_after_times": 0,
        "runs": [],
        "half_written": [],
    }

    def note(place: Path, state: str, kind: str) -> None:
        assert state != "failed", place
        outcome[kind] += state == "killed"
        outcome["half_written"] += find_half_written(place / "run")

    # Runs killed at one of their disk operations, each resumed to its end.
    for i in range(num_kills):
        place = folder / f"at_{i}"
        number = 1 + (i * num_operations + moments.randrange(num_operations)) // num_kills

        def work(place: Path = place, number: int = number) -> None:
            kill_at_call(number)
            run(place, data)

        note(place, wait(fork(work)), "killed_at_operations")
        assert wait(fork(lambda place=place: run(place, data))) == "done"
        outcome["runs"].append(place.name)

    # Runs killed repeatedly after random times, until there were enough kills.
    while outcome["killed_after_times"] < num_kills:
        place = folder / f"torn_{len(outcome['runs'])}"
        state = "killed"
        while state == "killed" and outcome["killed_after_times"] < num_kills:
            child = fork(lambda place=place: run(place, data))
            time.sleep(moments.uniform(0, duration_s * 2 / 3))
            os.kill(child, signal.SIGKILL)
            state = wait(child)
            note(place, state, "killed_after_times")
        assert wait(fork(lambda place=place: run(place, data))) == "done"
        outcome["runs"].append(place.name)
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

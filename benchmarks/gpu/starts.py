"""Part B: every way of starting a training works, and a resumed run is identical.

On a GPU the pieces are parallel processes; timed ones run first and alone. In a dry run they run
one after another in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .children import start_piece
from .settings import ROOT, Context

#: Files that a piece waits for: the models are written; the timed pieces have ended.
READY, TIMED = "ready", "timed"
STORAGES = ("bf16", "fp8", "int8", "nf4", "as stored")
FEW_STORAGES = ("nf4", "as stored")  # of a dry run, which must take only seconds
#: Seconds below which a step's time is noise, and not judged.
LEAST_S = 0.1
BESIDE = ("run_compiled", "run_batches", "run_offloaded", "run_out_of_memory")
BESIDE += ("run_resumed", "run_sampled", "run_command_line")


def run(context: Context) -> None:
    if context.is_dry:
        write_files(context)
        for name in ("run_in_turn", *BESIDE):
            globals()[name](context)
        return
    os.environ["OMP_NUM_THREADS"] = "2"
    pieces = {name: start_piece(context, f"B:{name}") for name in ("run_in_turn", *BESIDE)}
    try:
        write_files(context)
    except Exception:
        for piece in pieces.values():
            piece.kill()  # it would wait for the files until the end
        raise
    for name, piece in pieces.items():
        status = piece.wait()
        if name == "run_in_turn":
            (context.folder / TIMED).touch()  # even if it was killed
        if status:
            context.record.must(f"{name} ends well", False, status)


def write_files(context: Context) -> None:
    from .bases import write_base, write_dataset

    sizes, folder, device = context.sizes, context.folder, context.device
    write_dataset(folder / "data", sizes)
    write_dataset(folder / "masked", sizes, with_masks=True)
    write_base(folder / "bf16.safetensors", sizes, sizes.file_blocks, "bf16", device)
    write_base(folder / "scaled.safetensors", sizes, sizes.file_blocks, "fp8_scaled", device)
    (folder / READY).touch()


def wait_for(context: Context, name: str) -> None:
    while not (context.folder / name).exists():
        if time.time() > context.record.deadline:
            raise TimeoutError(f"{name} did not come")
        time.sleep(0.1)


def wait_for_turn(context: Context) -> None:
    """Waits until the timed pieces no longer need the GPU."""
    wait_for(context, READY if context.is_dry else TIMED)


def train(
    context: Context, name: str, *flags: str, prepare: Callable = lambda: None, **changes: Any
):
    """Trains with defaults except `changes`; it must succeed."""
    from .commands import run_command, write_config

    resume = ("--resume",) if "--resume" in flags else ()
    config = write_config(context, name, **changes)
    outcome = run_command(context, ["train", config, "--json", *resume], prepare)
    label = f"train, {name}{' resumed' if resume else ''}"
    context.record.must(f"{label}, ends well", outcome.status == 0, outcome.status, note(outcome))
    context.record.figure(f"{label}, peak", outcome.peak_bytes / 1e9, "GB")
    context.record.figure(f"{label}, a step", outcome.step_s, "s")
    return outcome


def note(outcome: Any) -> str:
    return outcome.explain() if outcome.status else ""


def run_in_turn(context: Context) -> None:
    """Estimates and trains in every storage; memory and time of both, one after the other."""
    from .commands import run_command, write_config

    wait_for(context, READY)
    record = context.record
    for storage in FEW_STORAGES if context.is_dry else STORAGES:
        base = "scaled" if storage == "as stored" else "bf16"
        changes = {"base": base, "model__storage": storage}
        with record.item(storage):
            config = write_config(context, f"estimated {storage}", **changes)
            found = run_command(context, ["estimate", config, "--json"])
            record.must(f"estimate, {storage}, ends well", found.status == 0, found.status)
            taken = train(context, storage, **changes)
            if found.status or taken.status:
                continue
            estimate = json.loads(found.stdout)
            # A CPU's peak includes earlier commands of this process.
            on_gpu = context.device == "cuda"
            held = taken.reserved_bytes if on_gpu else taken.reports[-1]["memory_bytes"]
            memory = estimate["memory_bytes"] / held
            seconds = estimate["longest_step_s"] / taken.step_s
            record.limit(f"estimate / run, {storage}, memory - 1", abs(memory - 1), "", "<= 0.15")
            where = f"estimated {estimate['longest_step_s']:.3f} s, taken {taken.step_s:.3f} s"
            name = f"estimate / run, {storage}, time"
            record.figure(name, seconds, "", where)
            if taken.step_s >= LEAST_S:
                # Only a goal, since a compilation runs in parallel; a `gpu` test checks it alone.
                record.goal(f"{name} - 1", abs(seconds - 1), "", "<= 0.15", where)


def run_compiled(context: Context) -> None:
    wait_for(context, READY)
    if context.is_dry:
        context.record.skip("compile", "takes minutes on a CPU")
        return
    with context.record.item("compile"):
        outcome = train(context, "compiled", model__compile=True)
        context.record.figure("train, compiled, the first step", outcome.reports[0]["seconds"], "s")


def run_batches(context: Context) -> None:
    """A batch of padded texts with masks, and a DoRA."""
    wait_for_turn(context)
    with context.record.item("batch 2"):
        folder = str(context.folder / "masked")
        train(context, "batch 2", data__batch_size=2, data__folder=folder)
    with context.record.item("DoRA"):
        train(context, "DoRA", lora__use_dora=True)


def run_offloaded(context: Context) -> None:
    wait_for_turn(context)
    count = min(2, context.sizes.file_blocks)
    for storage in ("bf16",) if context.is_dry else ("bf16", "nf4"):
        with context.record.item(f"offload, {storage}"):
            changes = {"model__offload_blocks": count, "model__storage": storage}
            train(context, f"offload, {storage}", steps=2, **changes)
            again = train(context, f"offload, {storage}", "--resume", steps=4, **changes)
            steps = [report["step"] for report in again.reports]
            context.record.must(f"offload, {storage}, goes on", steps == [3, 4], str(steps))


def run_out_of_memory(context: Context) -> None:
    """If the first step runs out of memory, the run keeps fewer activations and continues."""
    import torch

    wait_for_turn(context)
    with context.record.item("out of memory"):
        peaks = {
            kept: train(context, f"kept {kept}", model__gradient_checkpointing=kept).peak_bytes
            for kept in (False, True)
        }
        if context.is_dry:
            context.record.skip("out of memory", "a CPU's memory has no limit to set")
            return
        room = (peaks[False] + peaks[True]) // 2
        total = torch.cuda.get_device_properties(0).total_memory

        def fill() -> None:
            """Simulates another program taking the rest, once the model has chosen what to keep."""
            from qwen_edit_lora.lora_core.training.run import session

            original = session.open_session

            def open_session(*arguments: Any, **options: Any) -> Any:
                session.open_session = original
                opened = original(*arguments, **options)
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(room / total)
                return opened

            session.open_session = open_session

        try:
            outcome = train(context, "out of memory", prepare=fill)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        number, notes = outcome.num_ooms, outcome.explain()
        context.record.must("memory did run out, and training went on", number > 0, number, notes)


def run_resumed(context: Context) -> None:
    """Four steps at once, and two plus two, give bit-identical files."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at the first matrix product
    wait_for_turn(context)
    # Flash attention sums its gradients in arbitrary order unless set to be deterministic.
    kinds = (("deterministic", True), ("as by default", False))
    for name, deterministic in kinds[:1] if context.is_dry else kinds:
        with context.record.item(f"resume, {name}"):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            changes = {"steps": 4, "saving__checkpoint_every": 2}
            train(context, f"whole, {name}", **changes)
            whole, halves = (context.folder / f"{kind}, {name}" for kind in ("whole", "halves"))
            keep_first_half(whole, halves)
            train(context, f"halves, {name}", "--resume", **changes)
            equal = have_equal_weights(*(f / "check.safetensors" for f in (whole, halves)))
            if deterministic:
                context.record.must(f"resume is bit-equal, {name}", equal)
            else:
                text = "by default, where attention may add up in any order"
                context.record.figure(f"resume is bit-equal, {name}", str(equal), note=text)
    torch.use_deterministic_algorithms(False)


def keep_first_half(whole: Path, halves: Path) -> None:
    """A copy of the run's folder as of its second step."""
    shutil.copytree(whole, halves)
    *_, last = sorted((halves / "checkpoints").iterdir())
    shutil.rmtree(last)
    (halves / "check.safetensors").unlink()


def have_equal_weights(a: Path, b: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def run_sampled(context: Context) -> None:
    """A sample with a random VAE of Qwen-Image's size."""
    import torch

    from .commands import run_command, write_config

    with context.record.item("sample"):
        from diffusers import AutoencoderKLQwenImage

        torch.manual_seed(0)
        width = 8 if context.is_dry else 96
        AutoencoderKLQwenImage(width).bfloat16().save_pretrained(context.folder / "vae")
        wait_for_turn(context)
        train(context, "sampled")
        config = write_config(context, "sampled", model__vae=str(context.folder / "vae"))
        adapter = context.folder / "sampled" / "check.safetensors"
        arguments = ["sample", config, context.folder / "samples", "--adapter", adapter]
        outcome = run_command(context, [*arguments, "--items", "item_0", "--steps", "2"])
        pictures = [p.name for p in (context.folder / "samples").glob("item_0*")]
        is_good = outcome.status == 0 and len(pictures) >= 2
        context.record.must("sample and decode, ends well", is_good, str(pictures), note(outcome))
        context.record.figure("sample and decode, two steps", outcome.seconds, "s")
        context.record.figure("sample and decode, peak", outcome.peak_bytes / 1e9, "GB")


def run_command_line(context: Context) -> None:
    """The programs a user starts."""
    from .commands import write_config

    wait_for_turn(context)
    config = write_config(context, "command line")
    for name in ("estimate",) if context.is_dry else ("estimate", "train"):
        with context.record.item(name):
            started = time.perf_counter()
            ended = subprocess.run(
                [sys.executable, "-m", "lora_core", name, config, "--json"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.perf_counter() - started
            told = "" if ended.returncode == 0 else ended.stderr[-400:]
            label = f"python -m lora_core {name}"
            context.record.must(label, ended.returncode == 0, ended.returncode, told)
            context.record.figure(f"{label}, from start to end", seconds, "s")

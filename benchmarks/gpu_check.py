#!/usr/bin/env python3
"""Checks that everything starts, is correct and is fast on this GPU, in less than ten minutes.

usage: python3 dev.py gpu [arguments]              in .venv, which it makes
       python3 benchmarks/gpu_check.py             on a bare machine with a GPU and .gpu/
       python3 dev.py gpu --prepare                makes .gpu/ on a machine with a network
       python3 dev.py gpu --dry-run                all of it on a CPU, tiny

    A facts, rates, attention kernels        E the side path under dynamic VRAM, 6 blocks
    B every way of starting a training       F training 60 blocks, beside a plain loop
    C tests that are marked gpu              G the side path on 60 blocks
    D tests with ComfyUI on the GPU

Each part is a process with its own time limit, terminated with everything it started when that is
over; the unused time of a part goes to later ones. Each value is written to OUT/results.jsonl as
soon as it is measured, and a table is printed at the end. Failures and violated requirements give
exit status 1; missed goals are reported but do not.

Needs Linux or Windows, and for parts F and G an NVIDIA GPU with 80 GB; elsewhere choose other
parts.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from gpu import bundle  # noqa: E402
from gpu.children import TIMED_OUT, start_group, stop_group, wait  # noqa: E402
from gpu.records import Recorder, has_failed, print_table, read_records  # noqa: E402

#: Part -> seconds, most valuable first; F needs the rate from A.
SECONDS = {"A": 20, "B": 85, "E": 80, "F": 180, "G": 50, "C": 45, "D": 60}
#: Seconds for the table, and for ending processes.
RESERVE_S = 8
#: A part is not started with less than this share of its seconds.
LEAST_SHARE = 0.35
DRY_SECONDS = 400  # per part; a CI machine may be slow
TAIL_BYTES = 1500


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(SECONDS), help="by comma, in their order")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all (default: 530)")
    parser.add_argument(
        "--out", type=Path, default=Path(".gpu_check"), help="folder of the results"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny models")
    parser.add_argument("--prepare", action="store_true", help="make .gpu/, for a bare machine")
    parser.add_argument("--python", default="3.12", help="the bare machine's, for --prepare")
    options = parser.parse_args(arguments)
    options.parts = [part.strip().upper() for part in options.parts.split(",") if part.strip()]
    if unknown := [part for part in options.parts if part not in SECONDS]:
        parser.error(f"--parts takes {', '.join(SECONDS)}, but found {', '.join(unknown)}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops child processes too
    if options.prepare:
        try:
            bundle.prepare(options.python)
        except bundle.BundleError as e:
            print(f"gpu_check: {e}")
            return 1
        return 0
    command = shlex.join(["benchmarks/gpu_check.py", *arguments])
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        return check(options, command, Path(folder))


def check(options: argparse.Namespace, command: str, folder: Path) -> int:
    """Runs the parts; returns the exit status."""
    started = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    results, log = options.out.resolve() / "results.jsonl", options.out / "log.txt"
    results.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **bundle.find_environment(folder)}
    card = "CPU" if options.dry_run else find_card()
    if card == "unknown" and not has_gpu(environment):
        print("gpu_check: PyTorch finds no GPU here; --dry-run runs the same on a CPU, tiny")
        return 2
    end = started + options.limit - RESERVE_S
    plans = plan_ends(options.parts, started, end, options.dry_run)
    for part, until in plans.items():
        recorder = Recorder(part, results, card, command, until, options.dry_run)
        left = until - time.time()
        if left < LEAST_SHARE * SECONDS[part]:
            recorder.skip("the whole part", f"{max(0, left):.0f} s are left")
            continue
        run_part(recorder, environment, log)
    records = read_records(results)
    print(f"\n{card}, {time.time() - started:.0f} s, {results}", flush=True)
    print_table(records)
    return int(has_failed(records) or not records)


def plan_ends(parts: Sequence[str], started: float, end: float, is_dry: bool) -> dict[str, float]:
    """Deadline of each part; a part that ends early leaves its remaining time to the next."""
    plans, until = {}, started
    for part in parts:
        until += DRY_SECONDS if is_dry else SECONDS[part]
        plans[part] = until if is_dry else min(until, end)
    return plans


def run_part(recorder: Recorder, environment: dict[str, str], log: Path) -> None:
    """Runs one part in its own process group; its exit becomes a record."""
    started = time.time()
    command = [sys.executable, "-m", "gpu", recorder.part, "--results", str(recorder.path)]
    command += ["--card", recorder.card, "--command", recorder.command]
    command += ["--deadline", str(recorder.deadline)]
    command += ["--dry-run"] if recorder.is_dry else []
    with log.open("ab") as output:
        size = output.tell()
        process = start_group(command, output, environment, cwd=FOLDER)
        try:
            status = wait(process, recorder.deadline)
        except KeyboardInterrupt:
            stop_group(process)
            raise
    recorder.figure("seconds of the part", time.time() - started, "s")
    if status == TIMED_OUT:
        recorder.must("the part ends in its time", False, "ended", read_tail(log, size))
    elif status != 0:
        recorder.must("the part ends well", False, status, read_tail(log, size))


def read_tail(log: Path, size: int) -> str:
    """The end of the text appended since the file had this size, as one line."""
    with log.open("rb") as file:
        file.seek(max(size, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return " | ".join(line for line in lines if line.strip())[-600:]


def find_card() -> str:
    """The name of the first GPU, from the driver's own tool."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return (found.stdout.strip().splitlines() or ["unknown"])[0]


def has_gpu(environment: dict[str, str]) -> bool:
    """Whether the parts' Python finds one; asked where the driver's tool does not name any."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    command = [sys.executable, "-c", program]
    return not subprocess.run(command, env=environment, cwd=FOLDER, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

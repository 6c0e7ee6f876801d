"""Latency of 20 prompts while a job trains, compared with the same prompts without a job.

usage: .venv/bin/python benchmarks/prompts_beside_training.py [--prompts 20] [--rounds 3]

A real ComfyUI server on the tiny demo base and a job in its worker process, with the default
niceness of jobs. A prompt is a whole edit: a reference encoded, 8 steps sampled at 128 x 128,
decoded and saved; each has its own seed, so that it is not cached. They run one after another, like
a user's. Repeated `--rounds` times: the prompts without the job, the job resumed, the prompts
beside it, the job paused. The job's own steps are timed in both states.

The server and the worker share the CPU; on one GPU they would share the GPU, and niceness would not
help. COMFYUI_PATH is the path of ComfyUI.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDE = 128  # pixels
TEXT_WIDTH = 64  # of the demo base
BASE = "qwen_image_edit_2511_bf16.safetensors"
ENDLESS_STEPS = 1_000_000  # steps: the job runs as long as needed
TIMEOUT = 600.0  # seconds


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def import_package(name: str, folder: Path) -> None:
    """Imports like tests/conftest.py: neither needs the checkout on sys.path."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def build_graph(seed: int) -> dict[str, Any]:
    from demo_base.prompts import node

    return {
        "unet": node("UNETLoader", unet_name=BASE, weight_dtype="default"),
        "clip": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "photo": node("LoadImage", image="example.png"),
        "small": node(
            "ImageScale",
            image=["photo", 0],
            upscale_method="area",
            width=SIDE,
            height=SIDE,
            crop="center",
        ),
        "latent": node("VAEEncode", pixels=["small", 0], vae=["vae", 0]),
        "text": node("TextEncodeQwenImageEdit", clip=["clip", 0], prompt="an edit"),
        "reference": node("ReferenceLatent", conditioning=["text", 0], latent=["latent", 0]),
        "sampled": node(
            "KSampler",
            model=["unet", 0],
            positive=["reference", 0],
            negative=["reference", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=8,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        "shown": node("PreviewImage", images=["decoded", 0]),
    }


def submit_job(store: Any, folder: Path, base: Path) -> str:
    """A job on pairs of the prompts' size that never finishes by itself."""
    import torch
    from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
    from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, DatasetWriter

    writer = DatasetWriter(folder / "data")
    generator = torch.Generator().manual_seed(0)
    for index in range(8):
        target, reference = (
            torch.randn(16, SIDE // 8, SIDE // 8, generator=generator) for _ in range(2)
        )
        text = torch.randn(40, TEXT_WIDTH, generator=generator)
        writer.add(f"pair_{index}", CachedItem(target, (reference,), text))
    values = {
        "name": "benchmark",
        "output": "x",
        "steps": ENDLESS_STEPS,
        "model": {"source": str(base), "storage": "fp32", "compute_dtype": "fp32"},
        "data": {"folder": str(writer.finish()), "batch_size": 4},
        "saving": {"checkpoint_every": ENDLESS_STEPS, "adapter_every": 0},
    }
    return store.submit(config_from_dict(values), origin={"prompts": "share"})


def measure_prompts(server: Any, seeds: range) -> list[float]:
    """Seconds per prompt, from queueing until its history reports success."""
    seconds = []
    for seed in seeds:
        started = time.perf_counter()
        server.run_prompt(build_graph(seed), TIMEOUT)  # raises on failure
        seconds.append(time.perf_counter() - started)
    return seconds


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the job did not get there in time")
        time.sleep(0.1)


def list_step_seconds(store: Any, job_id: str) -> list[float]:
    return [line["seconds"] for line in store.read_metrics(job_id)]


def measure(server: Any, store: Any, job_id: str, options: argparse.Namespace) -> dict[str, Any]:
    from qwen_edit_lora.lora_core.jobs.job import JobStatus

    latencies: dict[str, list[float]] = {"without": [], "beside": []}
    steps: dict[str, list[float]] = {"alone": [], "beside": []}
    count = 0

    def take(state: str) -> None:
        nonlocal count
        latencies[state] += measure_prompts(server, range(count, count + options.prompts))
        count += options.prompts

    measure_prompts(server, range(10**7, 10**7 + 1))  # loads the models
    for _ in range(options.rounds):
        take("without")
        if store.get(job_id).status is JobStatus.PAUSED:
            store.resume(job_id)
        done = len(list_step_seconds(store, job_id))
        wait_until(lambda done=done: len(list_step_seconds(store, job_id)) > done + 2)
        # ComfyUI released its models when the job started
        measure_prompts(server, range(count + 10**6, count + 10**6 + 1))
        before = len(list_step_seconds(store, job_id))
        take("beside")
        after = len(list_step_seconds(store, job_id))
        wait_until(lambda after=after: len(list_step_seconds(store, job_id)) > after + 10)
        seconds = list_step_seconds(store, job_id)
        steps["beside"] += seconds[before:after]
        steps["alone"] += seconds[after + 1 :]
        store.pause(job_id)
        wait_until(lambda: store.get(job_id).status is JobStatus.PAUSED)
    medians = {state: statistics.median(values) for state, values in latencies.items()}
    return {
        "prompts": {state: len(values) for state, values in latencies.items()},
        "median_s": medians,
        "slowest_s": {state: max(values) for state, values in latencies.items()},
        "ratio": medians["beside"] / medians["without"],
        "step_s": {state: statistics.median(values) for state, values in steps.items()},
        "niceness": store.get(job_id).settings.niceness,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }


def main() -> None:
    options = parse_options()
    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui")
    import_package("qwen_edit_lora", ROOT)
    import_package("demo_base", ROOT / "tests" / "demo_base")
    from demo_base.layout import make_base_directory, make_models
    from demo_base.server import ComfyServer
    from qwen_edit_lora.lora_core.jobs.identity import kill
    from qwen_edit_lora.lora_core.jobs.store import JobStore

    with tempfile.TemporaryDirectory() as name:
        base = make_base_directory(Path(name) / "base", ROOT)
        models = make_models(base / "models", sys.executable, comfyui)
        with ComfyServer.start(base, sys.executable, comfyui) as server:
            server.wait_ready()
            store = JobStore(base / "user" / "__qwen_edit_lora" / "training")
            job_id = submit_job(store, Path(name), models / "diffusion_models" / BASE)
            store.pause(job_id)
            try:
                print(json.dumps(measure(server, store, job_id, options), indent=1))
            finally:
                kill(store.get(job_id).state.worker)  # otherwise it would outlive the server
                store.index.close()


if __name__ == "__main__":
    main()

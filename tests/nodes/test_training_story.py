"""Pairs -> dataset -> training job -> inspection -> sweep, over HTTP on the trained demo base."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_base import edit
from demo_base.photographs import HELD_OUT_CROPS, TRAINING_CROPS, read_crops
from demo_base.prompts import node
from demo_base.server import PromptError
from PIL import Image
from qwen_edit_lora.lora_core.jobs.store import JobStore

pytestmark = pytest.mark.comfy

FOLDER = "blue_hour"
BASE = "qwen_image_edit_2511_bf16.safetensors"
NAME = "blue_hour_lora"
STEPS = 240
SIDE = edit.SIDE
HELD_OUT = "held_out.png"
RENDER = {"seed": 5, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
TRAINING_TIMEOUT = 900.0  # seconds; a minute or two where nothing else runs


def save_picture(picture: torch.Tensor, path: Path) -> None:
    """(3, height, width) in [-1, 1] as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((picture.movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def pairs(base_directory: Path) -> Path:
    """A user's folder of pairs, and a held-out photograph."""
    folder = base_directory / "input" / FOLDER
    before = read_crops(TRAINING_CROPS, SIDE)
    for index, (source, target) in enumerate(zip(before, edit.grade(before), strict=True)):
        save_picture(source, folder / "control" / f"{index:02}.png")
        save_picture(target, folder / "target" / f"{index:02}.png")
        (folder / "target" / f"{index:02}.txt").write_text(edit.PROMPT, encoding="utf-8")
    save_picture(read_crops(HELD_OUT_CROPS, SIDE)[0], base_directory / "input" / HELD_OUT)
    return folder


def training_graph(steps: int = STEPS, name: str = NAME, **more: Any) -> dict[str, Any]:
    settings = {
        "rank": edit.RANK,
        "learning_rate": 2e-3,
        "batch_size": edit.BATCH,
        "sample_every": STEPS // 2,
        "samples": 1,
        "more_settings": "[model]\ngradient_checkpointing = false",
        **more,
    }
    return {
        "clip": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "dataset": node(
            "QwenEditDataset",
            clip=["clip", 0],
            vae=["vae", 0],
            folder=f"input/{FOLDER}",
            variant="2509 / 2511",
            megapixels=SIDE**2 / 2**20,
            reference_megapixels=SIDE**2 / 2**20,
        ),
        "train": node(
            "QwenEditLoraTrain",
            model_name=BASE,
            dataset=["dataset", 0],
            preset="standard",
            steps=steps,
            name=name,
            **settings,
        ),
        "id": node("PreviewAny", source=["train", 0]),
    }


def job_nodes(wait: bool = True) -> dict[str, Any]:
    return {
        "job": node("QwenEditLoraJob", job_id=["train", 0], wait=wait, vae=["vae", 0]),
        "plot": node("PreviewImage", images=["job", 2]),
        "samples": node("PreviewImage", images=["job", 3]),
    }


def sweep_nodes() -> dict[str, Any]:
    return {
        "inspect": node("QwenEditLoraInspect", adapter=["job", 0]),
        "unet": node("UNETLoader", unet_name=BASE, weight_dtype="default"),
        "photo": node("LoadImage", image=HELD_OUT),
        "latent": node("VAEEncode", pixels=["photo", 0], vae=["vae", 0]),
        "text": node(
            "TextEncodeQwenImageEditPlus",
            clip=["clip", 0],
            prompt=edit.PROMPT,
            image1=["photo", 0],
        ),
        # beside it, so that the reference keeps its size; the encoder would enlarge it to 1024²
        "reference": node("ReferenceLatent", conditioning=["text", 0], latent=["latent", 0]),
        "sweep": node(
            "QwenEditLoraSweep",
            model=["unet", 0],
            adapter=["job", 0],
            strengths="0, 0.25, 0.5, 0.75, 1",
            positive=["reference", 0],
            negative=["reference", 0],
            latent_image=["latent", 0],
            vae=["vae", 0],
            denoise=1.0,
            **RENDER,
        ),
        "grid": node(
            "QwenEditLoraSweepGrid",
            images=["sweep", 0],
            labels=["sweep", 2],
            filename_prefix="story/grid",
        ),
        "pictures": node("SaveImage", images=["sweep", 0], filename_prefix="story"),
    }


def read_picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32)


def fetch(server: Any, image: dict[str, str]) -> np.ndarray:
    query = {key: image[key] for key in ("filename", "subfolder", "type")}
    return read_picture(server.request("/view", query))


@pytest.fixture(scope="module")
def story(server: Any, pairs: Path) -> dict[str, Any]:
    """Everything in one graph, as in workflow 07."""
    graph = {**training_graph(), **job_nodes(), **sweep_nodes()}
    return server.run_prompt(graph, TRAINING_TIMEOUT)["outputs"]


def test_the_sweep_of_what_was_trained_is_smooth(story):
    report = story["grid"]["qwen_edit_lora_report"][0]
    assert report.splitlines()[1].startswith("smooth: ")


def test_the_error_on_an_unseen_photograph_is_halved(server, story):
    wanted = edit.grade(read_crops(HELD_OUT_CROPS, SIDE)[:1])[0]
    wanted = ((wanted.movedim(0, -1) + 1) * 127.5).numpy()
    pictures = [fetch(server, image) for image in story["pictures"]["images"]]
    errors = [float(np.square(picture - wanted).mean()) for picture in pictures]
    assert errors[-1] <= 0.5 * errors[0], errors
    assert errors == sorted(errors, reverse=True)  # each strength closer than the previous one


def test_the_job_is_shown_and_its_lora_is_in_the_loras_folder(server, story, demo_models):
    report = story["job"]["qwen_edit_lora_report"][0]
    assert f"completed, step {STEPS} of {STEPS}" in report
    assert f"LoRA: {NAME}.safetensors in models/loras" in report
    assert (demo_models.root / "loras" / f"{NAME}.safetensors").is_file()
    listed = server.get("/object_info/QwenEditLoraLoad")["QwenEditLoraLoad"]["input"]["required"]
    assert f"{NAME}.safetensors" in json.dumps(listed["lora_name"])
    for name in ("plot", "samples"):
        (image,) = story[name]["images"]
        assert fetch(server, image).std() > 5, name
    assert "untrained" not in story["inspect"]["qwen_edit_lora_report"][0]


def test_the_worker_shows_samples_moving_from_the_reference_to_the_target(
    base_directory, story, pairs
):
    store = JobStore(base_directory / "user" / "__qwen_edit_lora" / "training")
    (job,) = [job for job in store.list() if job.name == NAME]
    pictures = store.list_images(job.id)
    shown = [(p.kind, p.step, read_picture(store.read_image(job.id, p.name))) for p in pictures]
    assert [(kind, step) for kind, step, _ in shown] == [
        *(("source", None), ("target", None)),
        *(("sample", step) for step in (0, STEPS // 2, STEPS)),
    ]
    source, target, *samples = [picture for _, _, picture in shown]
    name = pictures[0].item.split("-")[0]
    # as decoded by the VAE
    for picture, original in ((source, "control"), (target, "target")):
        wanted = read_picture((pairs / original / f"{name}.png").read_bytes())
        assert np.square(picture - wanted).mean() < 0.2 * np.square(source - target).mean()
    errors = [float(np.square(sample - target).mean()) for sample in samples]
    assert errors[-1] < 0.5 * errors[0], errors
    assert job.state.notes == ()


def test_the_same_graph_does_not_train_twice(server, story):
    before = len(server.get("/qwen_edit_lora/jobs")["jobs"])
    outputs = server.run_prompt(training_graph(), TRAINING_TIMEOUT)["outputs"]
    assert outputs["id"]["text"] == story["id"]["text"]
    known = f"this training is already job {story['id']['text'][0]}: completed"
    assert known in outputs["train"]["qwen_edit_lora_report"][0]
    assert len(server.get("/qwen_edit_lora/jobs")["jobs"]) == before


def test_an_interrupt_ends_the_wait_and_not_the_job(server, pairs):
    graph = {**training_graph(steps=2000, name="long"), **job_nodes()}
    prompt_id = server.queue_prompt(graph)
    job = wait_for_job(server, "long", lambda job: job["step"] >= 2)
    server.post("/interrupt", {"prompt_id": prompt_id})
    with pytest.raises(PromptError, match="interrupt"):
        server.wait_for_prompt(prompt_id, 60)
    step = server.get(f"/qwen_edit_lora/jobs/{job['id']}")["step"]
    job = wait_for_job(server, "long", lambda job: job["step"] > step + 1)
    assert job["status"] == "in_progress"
    server.post(f"/qwen_edit_lora/jobs/{job['id']}/cancel", {})
    job = wait_for_job(server, "long", lambda job: job["status"] == "cancelled")
    server.post(f"/qwen_edit_lora/jobs/{job['id']}/delete", {})


def wait_for_job(server: Any, name: str, condition: Any, timeout: float = 180.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for job in server.get("/qwen_edit_lora/jobs")["jobs"]:
            if job["name"] == name and condition(job):
                return job
        time.sleep(0.2)
    raise AssertionError(f"job {name} did not get there: {server.get('/qwen_edit_lora/jobs')}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"more_settings": "[optimizer]\nlr = 1"}, "did you mean"),
        ({"more_settings": "nonsense"}, "more_settings cannot be read"),
        ({"more_settings": '[model]\nsource = "x"'}, "more_settings names source"),
        ({"name": "../evil"}, "name is '../evil', which holds '/'"),
        ({"gpus": 16}, "gpus is 16, but there are"),
        ({"gpus": 0}, "gpus is 0; expected 1 to 16"),
    ],
)
def test_wrong_settings_are_a_one_sentence_error_before_anything_runs(server, change, sentence):
    graph = training_graph(steps=3, **change)
    graph["dataset"]["inputs"]["clip"] = ["vae", 0]  # otherwise only the dataset would be made
    with pytest.raises(PromptError, match=re.escape(sentence)):
        server.queue_prompt(graph)


def test_a_missing_base_is_refused_before_anything_runs(server):
    graph = training_graph(steps=3)
    graph["train"]["inputs"]["model_name"] = "gone.gguf"
    graph["dataset"]["inputs"]["clip"] = ["vae", 0]  # otherwise only the dataset would be made
    with pytest.raises(PromptError, match=r"model_name: 'gone\.gguf' not in"):
        server.queue_prompt(graph)


def test_a_missing_job_is_a_clear_error(server):
    graph = {"job": node("QwenEditLoraJob", job_id="20260101-000000-00000000", wait=False)}
    with pytest.raises(PromptError, match="there is no job"):
        server.run_prompt(graph)

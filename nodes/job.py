"""Job id -> the training's progress and its result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..lora_core import ConfigError, FileError, read_adapter
from ..lora_core.disk.plain_json import write_json
from ..lora_core.disk.safetensors_file import SafetensorsFile
from ..lora_core.drawing.contact_sheet import Row, Tile, draw_sheet
from ..lora_core.drawing.style import draw_message
from ..lora_core.findings import WARNING, Finding, mark_warnings
from ..lora_core.jobs.job import Job, JobStatus
from ..lora_core.jobs.log_pieces import hide_paths
from ..lora_core.jobs.pictures import JobImage, build_sort_key, parse_name
from ..lora_core.jobs.store import JobStore
from ..lora_core.jobs.training_plot import draw_training
from ..lora_core.messages import join_messages, message
from ..lora_core.sweep.image_metrics import take_colours
from ..lora_core.text import format_count, format_number, shorten, shorten_list
from . import host
from .server import job_host
from .sockets import (
    CATEGORY,
    AdapterSocket,
    Report,
    build_image,
    report_output,
    show_job,
    show_report,
)

#: Largest side of an image on the sheet of samples, in pixels.
TILE_SIDE = 512
#: Largest side of a sample; 16 times the pixels that models are trained on.
MAX_SIDE_PX = 4096


class QwenEditLoraJob(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraJob",
            display_name="Training Job (Qwen Edit LoRA)",
            category=CATEGORY,
            description=(
                "Shows a training: state, loss, sample images; and gives its LoRA, the newest "
                "that was saved. With wait on, what follows runs when the training is over."
            ),
            search_aliases=["training status", "loss plot", "training progress"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "job_id",
                    default="",
                    placeholder="20260131-120000-0123abcd",
                    tooltip="From Train Qwen Edit LoRA, or pasted; empty: the newest job.",
                ),
                io.Boolean.Input(
                    "wait",
                    default=False,
                    tooltip=(
                        "Wait until the training is over, with its progress on this node. "
                        "Stopping the prompt stops the waiting, not the training."
                    ),
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip=(
                        "Decodes samples that the job keeps as latents only: those of trainings "
                        "whose dataset was encoded by an older version, or with another VAE."
                    ),
                ),
            ],
            outputs=[
                AdapterSocket.Output("adapter", tooltip="The newest LoRA of the job."),
                report_output(),
                io.Image.Output("loss_plot", tooltip="Loss, gradients and size of the deltas."),
                io.Image.Output(
                    "samples",
                    tooltip="As one image: each item's references, target, and samples by step.",
                ),
                io.String.Output(
                    "json", tooltip="The job's state and the metrics of its last step."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        return job_host.describe_states(with_steps=True)

    @classmethod
    def execute(cls, job_id: str = "", wait: bool = False, vae: Any = None) -> io.NodeOutput:
        store = job_host.get_jobs().store
        job = job_host.get_jobs().find(job_id)
        if wait:
            job = wait_for(job.id)
        metrics = store.read_metrics(job.id)
        plot = build_image(draw_training(job.name, metrics, job.state.num_steps))
        samples, findings = draw_samples(job, vae)
        sheet = build_image(samples)
        aging = describe_state(job)
        lines = [*aging, *describe_result(job, needs_vae(job) and vae is None)]
        lines += mark_warnings(finding.text for finding in findings)
        text = Report(join_messages("\n", lines), findings)
        figures = {
            **job.to_dict(),
            "last_step": metrics[-1] if metrics else None,
            "findings": [asdict(finding) for finding in findings],
        }
        warning = job.status in (JobStatus.FAILED, JobStatus.CANCELLED)
        shown = {
            **show_report(text, warning=warning),
            **show_job(job, aging),
        }
        if metrics:  # before the first step the plot only says so, and would stay there
            shown["images"] = ui.PreviewImage(plot, cls=cls).values
        return io.NodeOutput(
            take_adapter(job), text, plot, sheet, write_json(figures, indent=1), ui=shown
        )


def wait_for(job_id: str) -> Job:
    """Waits with a progress bar; interrupting the prompt ends only the wait."""
    progress = host.build_progress()
    job = job_host.get_jobs().wait(
        job_id, lambda job: progress(job.state.step, max(job.state.num_steps, 1))
    )
    if job.status is JobStatus.FAILED and job.state.failure is not None:
        failure = job.state.failure
        raise ConfigError(
            "job {job_id} failed: {sentences}",
            job_id=job.id,
            sentences=join_messages("\n- ", [failure.sentence, *failure.advice]),
        )
    return job


def take_adapter(job: Job) -> Any:
    """The newest adapter, or a value that stops the downstream nodes with a message."""
    files = job_host.get_jobs().store.list_adapters(job.id)
    if not files:
        return host.block_output(
            message(
                "job {job_id} has no LoRA yet (step {step} of {num_steps}); turn on wait, or "
                "run this again later",
                job_id=job.id,
                step=job.state.step,
                num_steps=job.state.num_steps,
            )
        )
    raw = [path for path in files if not path.stem.endswith("_ema")]
    return read_adapter((raw or files)[-1])


def describe_state(job: Job) -> list[str]:
    """Lines that hold until the job's next step or change of status."""
    lines = [message("{name} ({job}): {state}", name=job.name, job=job.id, state=job.describe())]
    if job.state.smoothed_loss is not None:
        lines.append(
            message(
                "loss {smoothed_loss} (smoothed)",
                smoothed_loss=format_number(job.state.smoothed_loss),
            )
        )
    return lines


def describe_result(job: Job, lacks_vae: bool) -> list[str]:
    """What there is, and what went wrong."""
    state = job.state
    lines = []
    if state.published:
        lines.append(
            message(
                "LoRA: {published} in models/loras (press R to see it)",
                published=", ".join(state.published),
            )
        )
    if state.failure is not None:
        lines.append(message("failed: {sentence}", sentence=state.failure.sentence))
        lines += ["- " + sentence for sentence in state.failure.advice]
        if state.failure.log_tail:
            lines += [message("end of the log:"), hide_paths(state.failure.log_tail)]
    lines += state.notes
    if lacks_vae:
        lines.append(message("there are samples without images: connect the VAE to see them"))
    return lines


def list_latents(job: Job) -> list[Path]:
    """Latents of samples that have no decoded image beside them."""
    files = job_host.get_jobs().store.list_samples(job.id)
    names = {path.name for path in files}
    return [p for p in files if p.suffix == ".safetensors" and f"{p.stem}.png" not in names]


def needs_vae(job: Job) -> bool:
    return bool(list_latents(job))


def draw_samples(job: Job, vae: Any) -> tuple[np.ndarray, list[Finding]]:
    """Sheet, uint8 (height, width, 3): per item its references, target and steps; and findings."""
    store = job_host.get_jobs().store
    latents = list_latents(job)
    named = [(path, parse_name(f"{path.stem}.png")) for path in latents if vae is not None]
    # Latents go by the name that their image would have.
    sources: list[tuple[JobImage, Callable[[], np.ndarray]]] = [
        *(
            (image, partial(read_image, store, job.id, image.name))
            for image in store.list_images(job.id)
        ),
        *((image, partial(decode, path, vae)) for path, image in named if image),
    ]
    found, broken = [], []
    for image, read in sources:
        try:
            found.append((image, read()))
        except FileError as e:  # no reason to withhold the LoRA
            broken.append(e.message)
    findings = []
    if broken:
        text = message(
            "{num_samples} not shown: {broken}",
            num_samples=format_count(len(broken), "sample"),
            broken=shorten_list(broken, 2),
        )
        findings.append(Finding("samples_unreadable", WARNING, text, len(broken)))
    return lay_out(job, found, bool(latents)), findings


def lay_out(job: Job, found: list[tuple[JobImage, np.ndarray]], has_latents: bool) -> np.ndarray:
    if not any(image.kind == "sample" for image, _ in found):
        if has_latents:
            return draw_message("Connect the VAE to see the samples.")
        is_off = job.settings.samples.every == 0
        return draw_message(
            "This training makes no samples: sample_every is 0." if is_off else "No sample yet."
        )
    rows: dict[str, list[Tile]] = {}
    for image, pixels in sorted(found, key=lambda one: build_sort_key(one[0])):
        rows.setdefault(image.item, []).append(Tile(pixels, name_tile(image)))
    return draw_sheet(
        f"samples of {job.name}",
        [Row(item, tuple(tiles)) for item, tiles in rows.items()],
        [f"{job.settings.samples.steps} steps, strength 1"],
    )


def name_tile(image: JobImage) -> str:
    if image.kind == "sample":
        return f"step {image.step}"
    return "target" if image.kind == "target" else f"reference {(image.index or 0) + 1}"


def read_image(store: JobStore, job_id: str, name: str) -> np.ndarray:
    """A PNG of the job as a small image, uint8 (height, width, 3).

    Raises:
        FileError: it is not a PNG, damaged, or larger than any sample.
    """
    data = store.read_image(job_id, name)
    try:
        # The only format a worker writes. Pillow's readers of some others start programs.
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            if max(image.size) > MAX_SIDE_PX:
                raise FileError(
                    "{name} is {width} x {height} px; expected at most {max_side_px:,} a side. "
                    "Remove it from the job's samples.",
                    name=name,
                    width=image.width,
                    height=image.height,
                    max_side_px=MAX_SIDE_PX,
                )
            small = image.convert("RGB")
    except FileError:
        raise
    except Exception as e:  # noqa: BLE001 - Pillow raises almost anything on damaged files
        raise FileError(
            "{name} is not a readable PNG ({error}); remove it from the job's samples.",
            name=name,
            error=shorten(str(e) or type(e).__name__),
        ) from None
    small.thumbnail((TILE_SIDE, TILE_SIDE))
    return np.asarray(small)


def decode(path: Path, vae: Any) -> np.ndarray:
    """A sample's latents as a thumbnail, uint8 (height, width, 3)."""
    file = SafetensorsFile(path)
    if "samples" not in file.tensors:
        raise FileError(
            "{path} holds no latents; remove it from the job's samples.", path=shorten(path.name)
        )
    latents = file.tensors["samples"].load().clone()
    file.release()
    images = take_colours(host.decode_latents(vae, latents)[:1])
    first = images[0].movedim(-1, 0)[None]
    factor = min(1.0, TILE_SIDE / max(first.shape[2:]))
    size = [max(1, math.floor(side * factor)) for side in first.shape[2:]]
    small = torch.nn.functional.interpolate(first, size=size, mode="area")
    return (small[0].movedim(0, -1).clamp(0, 1) * 255).round().byte().cpu().numpy()


NODES = [QwenEditLoraJob]

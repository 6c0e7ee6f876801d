"""Model file + dataset + settings -> a training job in the background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..lora_core import TARGET_PRESETS, ConfigError
from ..lora_core.findings import NOTE, WARNING, Finding, mark_warnings
from ..lora_core.jobs.devices import Device
from ..lora_core.jobs.estimate_process import estimate_in_process
from ..lora_core.jobs.job import MAX_DEVICES, Job, SampleSettings
from ..lora_core.messages import join_messages, message
from ..lora_core.pairs.vae_copy import find_vae
from ..lora_core.training.config.config import TrainConfig
from ..lora_core.training.config.presets import PRESETS
from ..lora_core.training.estimate.estimate import Estimate
from ..lora_core.training.model.model_config import VARIANTS
from ..lora_core.training.model.quantization import STORAGES
from ..lora_core.training.optimizer.optimization import OPTIMIZERS
from . import host
from .base_choice import choose_base
from .server import job_devices, job_host, measurements
from .server.prompt_policy import POLICIES, POLICY_TOOLTIP
from .sockets import CATEGORY, DatasetSocket, Report, report_output, show_job, show_report
from .training_settings import (
    AS_PRESET,
    AS_PRESET_CHOICE,
    AUTO,
    build_config,
    compute_key,
    read_more,
)

MEASURE, SKIP = "measure first", "skip"
REFUSE, START_ANYWAY = "refuse", "start anyway"
FITS_NO_DEVICE = message("this training does not fit into the device's memory")
FITS_NO_HOST = message("this training does not fit into main memory")
NO_IMAGES = message(
    "the dataset's VAE was not kept, so that samples come without images; run Image Pairs "
    "again to keep it"
)
#: Input of the node -> setting of the engine.
SETTINGS = {
    "rank": "lora.rank",
    "learning_rate": "optimizer.learning_rate",
    "optimizer": "optimizer.name",
    "batch_size": "data.batch_size",
    "accumulation": "optimizer.accumulation",
    "caption_dropout": "data.caption_dropout",
    "save_every": "saving.adapter_every",
    "seed": "seed",
    "variant": "model.variant",
}


class QwenEditLoraTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraTrain",
            display_name="Train Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Puts a training into the queue of the background worker and returns at once: "
                "ComfyUI stays usable, and the training survives its restart. The same graph does "
                "not start it twice. Watch it with Training Job."
            ),
            search_aliases=["train lora", "fine-tune", "finetune", "training"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.list_training_bases(),
                    tooltip=(
                        "The base model's file in models/diffusion_models: bf16, fp8, scaled fp8, "
                        "int8, or a GGUF, which needs pip install gguf. It is read by the worker, "
                        "never changed."
                    ),
                ),
                DatasetSocket.Input("dataset", tooltip="From Image Pairs: encoded once, cached."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    tooltip=" ".join(f"{name}: {p.about}" for name, p in PRESETS.items()),
                ),
                io.Int.Input(
                    "steps",
                    default=1500,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimizer updates. 50 to 100 for each image are a usual start.",
                ),
                io.String.Input(
                    "name",
                    default="my_edit",
                    tooltip="Of the LoRA's file in models/loras; an existing name gets a number.",
                ),
                *list_advanced_inputs(),
            ],
            outputs=[
                io.String.Output(
                    "job_id", tooltip="For Training Job, which shows it and gives its LoRA."
                ),
                report_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        # Also changes after a job failed or was deleted: then the same graph starts another one.
        return job_host.describe_states()

    @classmethod
    def validate_inputs(
        cls, name: str | None = None, more_settings: str | None = None, gpus: int | None = None
    ) -> bool:
        # Before the dataset is encoded. None: connected. Raised, since ComfyUI would repeat a
        # returned message for every input.
        build_config(
            *(Path("model"), Path("dataset"), "a" if name is None else name, next(iter(PRESETS))),
            steps=1,
            base={},
            chosen={},
            more_settings=more_settings or "",
        )
        if gpus is not None:
            job_devices.check_devices(gpus)
        return True

    @classmethod
    def execute(
        cls,
        model_name: str,
        dataset: Any,
        preset: str,
        steps: int,
        name: str,
        targets: str = AS_PRESET_CHOICE,
        storage: str = AUTO,
        sample_every: int = 250,
        samples: int = 2,
        while_training: str = POLICIES[0],
        estimate: str = MEASURE,
        if_too_large: str = REFUSE,
        more_settings: str = "",
        gpus: int = 1,
        **settings: Any,
    ) -> io.NodeOutput:
        job_devices.check_devices(gpus)
        jobs = job_host.get_jobs()
        model = host.find_training_base(model_name)
        build = partial(
            build_config,
            *(model, Path(dataset.folder), name, preset),
            steps=steps,
            chosen=choose_settings(targets, settings),
            more_settings=more_settings,
        )
        requested = build(base={} if storage == AUTO else {"storage": storage})
        key = build_key(requested, storage, gpus)
        known = jobs.store.find_same(key)
        if known is not None:
            return show(known, describe_job(known, is_known=True))
        devices, taken = job_devices.choose_for_job(jobs.store, requested.model.device, gpus)
        own = read_more(more_settings).get("model", {})
        base, lines, needed_bytes = choose_base(requested, storage, own, devices)
        findings = [Finding("storage_chosen", NOTE, line) for line in lines]
        config = build(base=base)
        vae = find_vae(Path(dataset.folder)) if sample_every else None
        if estimate == MEASURE:
            reason = job_devices.prepare_measuring(devices, taken)
            found = reason or measure(config, devices[0], vae is not None)
            report_estimate(found, if_too_large, lines, findings)
        if sample_every and vae is None:
            lines.append(NO_IMAGES)
            findings.append(Finding("samples_without_pictures", NOTE, lines[-1]))
        job_id = jobs.submit(
            config,
            key=key,
            policy=while_training,
            samples=SampleSettings(
                every=sample_every,
                items=choose_items(dataset, samples),
                vae="" if vae is None else str(vae),
            ),
            num_devices=gpus,
            gpu_memory_bytes=needed_bytes,
        )
        job = jobs.store.get(job_id)
        return show(job, describe_job(job), lines, findings)


def list_advanced_inputs() -> list[Any]:
    """The settings for which the engine has defaults."""
    extra = {"optional": True, "advanced": True}
    return [
        io.Int.Input(
            "rank",
            default=AS_PRESET,
            min=0,
            max=1024,
            tooltip="Size of the LoRA; 0: as the preset.",
            **extra,
        ),
        io.Float.Input(
            "learning_rate",
            default=AS_PRESET,
            min=0.0,
            max=10.0,
            step=1e-6,
            round=1e-8,
            tooltip="0: as the preset. For prodigy a factor on the rate it finds, usually 1.",
            **extra,
        ),
        io.Combo.Input(
            "targets",
            options=[AS_PRESET_CHOICE, *TARGET_PRESETS],
            tooltip="Which layers learn. Other patterns: more_settings, [lora] targets.",
            **extra,
        ),
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            tooltip="adamw8bit takes a quarter of adamw's memory; prodigy finds its own rate. "
            "prodigy and adafactor make each step 0.1 to 0.2 s longer on any GPU (computed).",
            **extra,
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Samples of one size in one forward pass.",
            **extra,
        ),
        io.Int.Input(
            "accumulation",
            default=1,
            min=1,
            max=256,
            tooltip=(
                "Batches whose gradients are summed into one step: a larger batch without its "
                "memory."
            ),
            **extra,
        ),
        io.Combo.Input(
            "storage",
            options=[AUTO, *STORAGES],
            tooltip=(
                "How the base is kept on the GPU. auto: the most exact that leaves room to train "
                "(bf16 41 GB, fp8 20 GB, nf4 14 GB), or on 12 and 16 GB cards fp8 with blocks "
                "offloaded to main memory; on a CPU fp32. The report says which. as stored: the "
                "file's own codes; of a GGUF they are slow to decode, so that fp8 or nf4 train "
                "faster."
            ),
            **extra,
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of samples shown with an empty caption.",
            **extra,
        ),
        io.Int.Input(
            "save_every",
            default=250,
            min=0,
            max=1_000_000,
            tooltip="Steps between LoRA files to try out; 0 keeps the default, 250.",
            **extra,
        ),
        io.Int.Input(
            "sample_every",
            default=250,
            min=0,
            max=1_000_000,
            tooltip="Steps between sample images of the dataset's first items; 0 makes none.",
            **extra,
        ),
        io.Int.Input(
            "samples", default=2, min=1, max=16, tooltip="How many items are sampled.", **extra
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Of the LoRA's start, the noise and the order of the data.",
            **extra,
        ),
        io.Combo.Input(
            "variant",
            options=list(VARIANTS),
            tooltip="The model named in the LoRA's metadata; auto reads it from the file.",
            **extra,
        ),
        io.Combo.Input(
            "while_training",
            options=list(POLICIES),
            tooltip=POLICY_TOOLTIP,
            **extra,
        ),
        io.Combo.Input(
            "estimate",
            options=[MEASURE, SKIP],
            tooltip=(
                "Run a few steps on three blocks first, to estimate memory and time of the whole "
                "run."
            ),
            **extra,
        ),
        io.Combo.Input(
            "if_too_large",
            options=[REFUSE, START_ANYWAY],
            tooltip="What to do if the estimate says that memory will not be enough.",
            **extra,
        ),
        io.String.Input(
            "more_settings",
            default="",
            multiline=True,
            placeholder='[objective]\nsampling = "uniform"',
            tooltip="Any setting of a configuration file, as TOML; it overrides the rest.",
            **extra,
        ),
        io.Int.Input(
            "gpus",
            default=1,
            min=1,
            max=MAX_DEVICES,
            tooltip=(
                "GPUs that train together, each with its own copy of the base and its own batch, "
                "so a step sees gpus times batch_size samples. The estimate is of one of them."
            ),
            **extra,
        ),
    ]


def describe_job(job: Job, is_known: bool = False) -> str:
    if is_known:
        return message(
            "this training is already job {job}: {state}", job=job.id, state=job.describe()
        )
    return message("job {job}: {state}", job=job.id, state=job.describe())


def measure(config: TrainConfig, device: Device, with_samples: bool) -> Estimate:
    """Seconds to minutes, in which every page says so."""
    with measurements.measuring(config.name):
        return host.run_interruptible(
            partial(estimate_in_process, with_samples=with_samples), config, device
        )


def report_estimate(
    found: Estimate | str, if_too_large: str, lines: list[str], findings: list[Finding]
) -> None:
    """Adds the estimate, or why there is none, to a report.

    Raises:
        ConfigError: the training does not fit, and must then be refused.
    """
    if isinstance(found, str):
        lines.append(message("not estimated: {found}", found=found))
        findings.append(Finding("not_estimated", NOTE, lines[-1]))
        return
    lines.append(found.to_text())
    if found.fits:
        return
    too_large = FITS_NO_HOST if found.fits_device else FITS_NO_DEVICE
    if if_too_large == REFUSE:
        text = join_messages("\n", lines)
        raise ConfigError(
            "{too_large}.\n{text}\nLower what the list names, or set if_too_large to 'start "
            "anyway'.",
            too_large=too_large,
            text=text,
        )
    sentence = message("{too_large}; started anyway, as if_too_large says", too_large=too_large)
    lines += mark_warnings([sentence])
    findings.append(Finding("too_large", WARNING, sentence))


def build_key(requested: TrainConfig, storage: str, gpus: int) -> str:
    """What tells one training from another.

    What auto resolves to depends on the memory free now, so it is not part of it.
    """
    return f"{compute_key(requested)}, storage {storage}" + (f" on {gpus}" if gpus > 1 else "")


def show(
    job: Job, head: str, lines: Sequence[str] = (), findings: Sequence[Finding] = ()
) -> io.NodeOutput:
    """The node's outputs; `head` tells of the job's present status."""
    text = Report(join_messages("\n", [head, *lines]), findings)
    return io.NodeOutput(job.id, text, ui=show_report(text) | show_job(job, [head]))


def choose_settings(targets: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the node's inputs by the engine's names of the settings."""
    chosen = {SETTINGS[key]: value for key, value in settings.items()}
    if targets != AS_PRESET_CHOICE:
        chosen["lora.targets"] = (targets,)
    return chosen


def choose_items(dataset: Any, count: int) -> tuple[str, ...]:
    """Keys of the items to sample."""
    return tuple(dataset.keys[:count])


NODES = [QwenEditLoraTrain]

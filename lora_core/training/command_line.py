"""`python -m lora_core train | sample | estimate`: training on a machine without a screen."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import check_number
from ..disk.output_files import check_outputs
from ..errors import ConfigError, LoraError
from ..messages import add_messages
from ..text import flatten

if TYPE_CHECKING:
    from .data.dataset import CachedDataset
    from .run.metrics import StepReport

TRAINING_COMMANDS = ("train", "sample", "estimate")


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the training commands to an argparse sub-parsers object."""
    command = commands.add_parser("train", help="a LoRA from a cached training set")
    command.add_argument(
        "config", metavar="CONFIG.toml", help="such as lora_core/training/example.toml"
    )
    command.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    command.add_argument("--json", action="store_true", help="one JSON object for each step")
    command.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    command.set_defaults(run=run_train)

    command = commands.add_parser("sample", help="images with a LoRA, of cached prompts")
    command.add_argument("config", metavar="CONFIG.toml", help="as for train")
    command.add_argument("out", help="the folder to write to")
    command.add_argument(
        "--overwrite", action="store_true", help="replace files of the items' names in it"
    )
    command.add_argument("--adapter", metavar="FILE", help="without one: the base model alone")
    command.add_argument("--strength", type=float, default=1.0)
    command.add_argument("--items", metavar="KEY,...", help="all items if absent")
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--schedule", choices=("comfyui", "diffusers"), default="comfyui")
    command.add_argument("--guidance", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=run_sample)

    command = commands.add_parser("estimate", help="memory and time of a run before it starts")
    command.add_argument("config", metavar="CONFIG.toml", help="as for train")
    command.add_argument("--json", action="store_true")
    command.add_argument(
        "--shared", action="store_true", help="ComfyUI uses the same GPU during the training"
    )
    command.add_argument(
        "--samples", action="store_true", help="sample images are decoded during the training"
    )
    command.set_defaults(run=run_estimate)


def run_train(options: argparse.Namespace) -> None:
    """Trains; Ctrl-C writes a checkpoint after the current step."""
    from .config.config_files import read_config
    from .model.libraries import quiet_libraries
    from .run.interruption import stop_on_signals
    from .run.loop import Observer, StepLog, open_run, run_steps
    from .run.metrics import describe_report
    from .run.processes import Processes, find_accelerator
    from .run.session import choose_device, describe_session, open_session
    from .run.trainer import check_output

    check_number(options, "log_every", 1, shown="--log-every")
    quiet_libraries()
    config = read_config(options.config)
    accelerator = find_accelerator(on_cpu=config.model.device == "cpu")
    processes = Processes(accelerator)
    observer, notify = Observer(), lambda sentence: None
    if processes.is_main:
        every = 1 if options.json else options.log_every
        describe = write_report if options.json else describe_report
        observer, notify = StepLog(print_now, every, describe), print_line
    device = choose_device(config.model) if accelerator is None else accelerator.device
    if processes.is_main:
        check_output(config, options.resume)
    session = open_session(config, device, accelerator)
    for sentence in describe_session(session, config):
        notify(sentence)
    with stop_on_signals() as should_stop:
        run = open_run(config, session, processes, notify, options.resume)
        is_finished = run_steps(run, observer, should_stop)
    path = f"{config.output}/{config.name}.safetensors"
    notify(f"wrote {path}" if is_finished else f"stopped after step {run.step}; --resume continues")


def run_sample(options: argparse.Namespace) -> None:
    """Writes each item's latents, and its image where the configuration names a VAE."""
    from ..formats.files import read_adapter
    from .config.config_files import read_config
    from .data.dataset import read_dataset
    from .model.libraries import quiet_libraries
    from .run.checkpoint import make_folder
    from .run.session import choose_device, load_model
    from .sampling.image_decoder import load_decoder
    from .sampling.images import write_image, write_latents
    from .sampling.sampling import applied, sample

    check_number(options, "steps", 1, shown="--steps")
    check_number(options, "strength", shown="--strength")
    check_number(options, "guidance", shown="--guidance")
    quiet_libraries()
    config = read_config(options.config)
    device = choose_device(config.model)
    dataset = read_dataset(config.data.folder)
    indices = choose_items(dataset, options.items)
    stems = [Path(options.out) / dataset.items[index].key for index in indices]
    inputs = [path for path in (config.model.source, config.model.vae, options.adapter) if path]
    suffixes = (".safetensors", ".png") if config.model.vae else (".safetensors",)
    files = [stem.with_name(f"{stem.name}{suffix}") for stem in stems for suffix in suffixes]
    check_outputs(files, inputs, options.overwrite)
    adapter = read_adapter(options.adapter) if options.adapter else None
    model = load_model(config.model, device)
    decode = load_decoder(config.model.vae, device) if config.model.vae else None
    if decode is None:
        print("Only latents are written: set model.vae to also get images")
    make_folder(Path(options.out), "samples")
    with applied(model.transformer, adapter, options.strength):
        for index, stem in zip(indices, stems, strict=True):
            latents = sample(
                *(model, dataset, index),
                num_steps=options.steps,
                schedule=options.schedule,
                guidance=options.guidance,
                seed=options.seed,
                device=device,
            )
            print(f"Wrote {write_latents(latents, stem)}")
            if decode is not None:
                print(f"Wrote {write_image(decode(latents)[0], stem)}")


def choose_items(dataset: CachedDataset, keys: str | None) -> list[int]:
    """Indices of the items a list of keys names; all without one."""
    known = {info.key: index for index, info in enumerate(dataset.items)}
    chosen = list(known) if keys is None else [key.strip() for key in keys.split(",")]
    for key in chosen:
        if key not in known:
            raise ConfigError(
                "the training set has no item {key!r}; it has {example}, …",
                key=key,
                example=next(iter(known)),
            )
    return [known[key] for key in chosen]


def run_estimate(options: argparse.Namespace) -> None:
    from .config.config_files import read_config
    from .data.dataset import read_dataset
    from .estimate.estimate import estimate_run
    from .model.libraries import quiet_libraries

    quiet_libraries()
    try:
        config = read_config(options.config)
        dataset = read_dataset(config.data.folder)
        shared, samples = options.shared, options.samples
        estimate = estimate_run(config, dataset, is_shared=shared, with_samples=samples)
    except LoraError as e:
        if options.json:  # for who runs this, in a language of its own; the text goes to stderr
            print(json.dumps(add_messages({"error": flatten(e.message)})))
        raise
    print(json.dumps(estimate.to_dict(), indent=1) if options.json else estimate.to_text())


def write_report(report: StepReport) -> str:
    return json.dumps(report.to_dict())


def print_now(line: str) -> None:
    print(line, flush=True)


def print_line(sentence: str) -> None:
    print(f"train: {sentence}", file=sys.stderr, flush=True)

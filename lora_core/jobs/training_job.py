"""What a worker does with its job: loads, trains from the last checkpoint, publishes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from ..progress import ShouldStop
from ..text import format_count, format_duration
from ..training.command_line import describe_report, quiet_libraries
from ..training.config.config import TrainConfig
from ..training.machine.memory import is_out_of_memory
from ..training.objective.objective import Objective
from ..training.run.adapter_files import EMA_SUFFIX
from ..training.run.processes import NO_NCCL, Processes
from ..training.run.run import Run, open_checkpoints
from ..training.run.session import Session, choose_device, describe_session, open_session
from .alarms import Alerts
from .devices import set_device
from .folder import JobFolder
from .job import JobSettings, Phase, SampleSettings
from .job_reporter import JobReporter, NullReporter
from .publication import publish, remove_unfinished
from .samples import Sampler

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_EVERY = 10  # steps


class Stop:
    """Whether the training should stop: once requested, it stays requested until `reset`.

    Work skipped for a stop must not be missing if the stop is withdrawn a moment later; so every
    caller gets the same answer, and `run_job` checks again when everything is saved.
    """

    def __init__(self, should_stop: ShouldStop):
        self._should_stop = should_stop
        self._is_requested = False

    def __call__(self) -> bool:
        self._is_requested = self._is_requested or self._should_stop()
        return self._is_requested

    def reset(self) -> None:
        self._is_requested = False


def run_job(
    settings: JobSettings,
    folder: JobFolder,
    devices: Sequence[str],
    reporter: JobReporter | NullReporter,
    accelerator: Accelerator | None = None,
    is_shared: bool = False,
) -> bool:
    """Trains until the end or until the reporter requests a stop; either way everything is saved.

    Args:
        devices: names of the job's devices.
        accelerator: for one of several processes; rank 0 makes samples and publishes.
        is_shared: whether ComfyUI computes on the device too.

    Returns:
        Whether it reached the end, and the adapter is in its final place.

    Raises:
        LoraError: what is wrong with the job.
    """
    quiet_libraries()
    if len(devices) != settings.num_devices:
        raise ConfigError(
            f"the job is to train on {settings.num_devices} GPUs together, but there are "
            f"{len(devices)} devices of one kind here; clone it with num_devices {len(devices)}"
        )
    if len(devices) > 1 and accelerator is None:
        raise ConfigError(NO_NCCL)
    processes = Processes(accelerator)
    config = set_device(dataclasses.replace(settings.train, output=str(folder.path)), devices[0])
    reporter.log(f"loading {Path(config.model.source).name}")
    device = choose_device(config.model) if accelerator is None else accelerator.device
    session = open_session(config, device, is_shared=is_shared)
    for sentence in describe_session(session, config):
        reporter.log(sentence)
    run = open_run(config, session, reporter, processes)
    samples = settings.samples if processes.is_main else SampleSettings()
    sampler = Sampler(samples, session, run, folder.samples, reporter.add_note)
    alerts = Alerts(config)
    reporter.update(phase=Phase.TRAINING, step=run.step, num_steps=config.steps)
    stop = Stop(reporter.should_stop)
    while True:
        stop.reset()
        if sampler.list_missing_examples():
            with sampling(sampler, reporter):
                sampler.make_examples(stop)
        take_sample(sampler, run.step, reporter, stop)
        for report in run.take_steps(stop):
            reporter.report(report)
            for sentence in alerts.check(report):
                reporter.add_alert(sentence)
            if report.step == 1 or report.step % LOG_EVERY == 0 or report.step == config.steps:
                reporter.log(describe_report(report))
            take_sample(sampler, report.step, reporter, stop)
        if run.step == config.steps:
            break
        reporter.update(phase=Phase.SAVING)
        adapters = run.save_adapters(run.step) if run.step else ()
        reporter.update(adapters=adapters, checkpoint_step=run.step)
        stop.reset()
        if run.is_still_to_stop(stop):
            reporter.log(f"stopped after step {run.step}")
            return False
        reporter.log(f"the stop was withdrawn; continues after step {run.step}")
        reporter.update(phase=Phase.TRAINING)
    stop.reset()
    take_sample(sampler, run.step, reporter, stop)
    reporter.update(phase=Phase.SAVING)
    suffixes = ("", EMA_SUFFIX) if run.ema is not None else ("",)
    adapters = tuple(f"{config.name}{suffix}.safetensors" for suffix in suffixes)
    reporter.update(adapters=adapters, checkpoint_step=run.step)
    if settings.loras and processes.is_main:
        paths = [folder.path / name for name in adapters]
        remove_unfinished(Path(settings.loras), folder.id)
        published = publish(paths, Path(settings.loras), folder.id)
        reporter.update(published=published)
        reporter.log(f"the adapter is in the loras folder as {', '.join(published)}")
    return True


def open_run(
    config: TrainConfig,
    session: Session,
    reporter: JobReporter | NullReporter,
    processes: Processes,
) -> Run:
    """What `train` opens, kept since a stopped run should also leave an adapter."""
    return Run(
        config,
        session.model,
        session.injection,
        session.dataset,
        session.prior,
        Objective(config.objective, None, session.decode),
        session.variant,
        processes,
        reporter.add_note,
        resume=bool(open_checkpoints(config).list_steps()),
    )


def take_sample(
    sampler: Sampler, step: int, reporter: JobReporter | NullReporter, stop: Stop
) -> None:
    """Makes the step's samples where they are due."""
    if not sampler.is_due(step) or stop():
        return
    with sampling(sampler, reporter):
        seconds = sampler.make(step, stop)
        reporter.log(
            f"sampled {format_count(len(sampler.indices), 'image')} after step {step} in "
            f"{format_duration(seconds)}"
        )


@contextmanager
def sampling(sampler: Sampler, reporter: JobReporter | NullReporter) -> Iterator[None]:
    """Where samples do not fit into memory, training continues without them."""
    reporter.update(phase=Phase.SAMPLING)
    try:
        yield
    except InterruptedError:
        return  # the loop sees the same request
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        sampler.indices = []
        reporter.add_note("samples did not fit into memory; training continues without them")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    finally:
        reporter.update(phase=Phase.TRAINING)

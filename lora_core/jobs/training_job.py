"""What a worker does with its job: loads, trains from the last checkpoint, publishes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, FileError
from ..messages import message
from ..progress import ShouldStop
from ..text import format_count, format_duration
from ..training.config.config import TrainConfig
from ..training.machine.memory import is_out_of_memory
from ..training.model.libraries import quiet_libraries
from ..training.run.adapter_files import EMA_SUFFIX
from ..training.run.loop import StepLog, Stop, open_run, run_steps
from ..training.run.metrics import StepReport
from ..training.run.processes import NO_NCCL, Processes
from ..training.run.run import Run, open_checkpoints
from ..training.run.session import choose_device, describe_session, open_session
from .alarms import Alerts
from .devices import set_device
from .folder import JobFolder
from .job import JobSettings, Phase, SampleSettings
from .job_reporter import JobReporter, NullReporter
from .publication import publish, remove_unfinished
from .samples import Sampler
from .transitions import Order

if TYPE_CHECKING:
    from accelerate import Accelerator


class JobObserver(StepLog):
    """Tells the reporter about a run, and makes samples around its steps.

    Args:
        sample_every: steps between the job's samples, the same on every process; 0 for none.
    """

    def __init__(
        self,
        reporter: JobReporter | NullReporter,
        config: TrainConfig,
        sampler: Sampler,
        sample_every: int = 0,
    ):
        super().__init__(reporter.log)
        self.sample_every = sample_every
        self.reporter = reporter
        self.alerts = Alerts(config)
        self.sampler = sampler

    def before_steps(self, run: Run, stop: ShouldStop) -> None:
        self.reporter.update(phase=Phase.TRAINING, step=run.step, num_steps=run.config.steps)
        if self.sampler.list_missing_examples():
            with sampling(self.sampler, self.reporter):
                self.sampler.make_examples(stop)
        take_sample(self.sampler, run.step, self.reporter, stop)

    def after_step(self, run: Run, report: StepReport, stop: Stop) -> None:
        self.reporter.report(report)
        for sentence in self.alerts.check(report):
            self.reporter.add_alert(sentence)
        super().after_step(run, report, stop)
        take_sample(self.sampler, report.step, self.reporter, stop)
        if self.sample_every and report.step % self.sample_every == 0:
            run.numbers.ask_again()  # a sample that was left out is made where the run stops
        if self.reporter.has_orders():
            self.do_orders(run, report.step, stop)

    def do_orders(self, run: Run, step: int, stop: ShouldStop) -> None:
        """What a user ordered after this step: the run's weights and random numbers stay as they
        are. Before a stop nothing is done; the order waits for the next step.
        """
        if stop():
            return
        if self.reporter.take_order(Order.SAVE):
            save_now(run, step, self.reporter)
        if self.reporter.take_order(Order.SAMPLE):
            if not self.sampler.indices:
                self.reporter.log(message("no sample was made: this job makes none"))
                return
            take_sample(self.sampler, step, self.reporter, stop, is_ordered=True)
            if not self.sampler.has_made(step) and stop():
                self.reporter.give_back(Order.SAMPLE)

    def after_stop(self, run: Run) -> None:
        """A stopped run leaves an adapter too."""
        self.reporter.update(phase=Phase.SAVING)
        adapters = run.save_adapters(run.step) if run.step else ()
        self.reporter.update(adapters=adapters, checkpoint_step=run.step)

    def after_withdrawal(self, run: Run) -> None:
        self.reporter.log(f"the stop was withdrawn; continues after step {run.step}")


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
    folder.check_folders()
    check_devices(settings, devices, accelerator)
    processes = Processes(accelerator)
    config = set_device(dataclasses.replace(settings.train, output=str(folder.path)), devices[0])
    reporter.log(f"loading {Path(config.model.source).name}")
    device = choose_device(config.model) if accelerator is None else accelerator.device
    session = open_session(config, device, is_shared=is_shared)
    for sentence in describe_session(session, config):
        reporter.log(sentence)
    is_resumed = bool(open_checkpoints(config).list_steps())
    run = open_run(config, session, processes, reporter.add_note, is_resumed)
    samples = settings.samples if processes.is_main else SampleSettings()
    sampler = Sampler(samples, session, run, folder.samples, reporter.add_note)
    if not run_steps(
        run, JobObserver(reporter, config, sampler, settings.samples.every), reporter.should_stop
    ):
        reporter.log(f"stopped after step {run.step}")
        return False
    take_sample(sampler, run.step, reporter, reporter.should_stop)
    reporter.update(phase=Phase.SAVING)
    suffixes = ("", EMA_SUFFIX) if config.optimizer.ema_decay else ("",)
    adapters = tuple(f"{config.name}{suffix}.safetensors" for suffix in suffixes)
    reporter.update(adapters=adapters, checkpoint_step=run.step)
    if settings.loras and processes.is_main:
        publish_adapters(adapters, Path(settings.loras), folder, reporter)
    return True


def check_devices(
    settings: JobSettings, devices: Sequence[str], accelerator: Accelerator | None
) -> None:
    """Raises ConfigError if the job is to train on devices together that cannot."""
    if len(devices) != settings.num_devices:
        raise ConfigError(
            "the job is to train on {num_devices} GPUs together, but there are {num_found} "
            "devices of one kind here; clone it with num_devices {num_found}",
            num_devices=settings.num_devices,
            num_found=len(devices),
        )
    if len(devices) > 1 and accelerator is None:
        raise ConfigError(NO_NCCL)


def publish_adapters(
    adapters: Sequence[str], loras: Path, folder: JobFolder, reporter: JobReporter | NullReporter
) -> None:
    """Copies the finished adapters into the loras folder."""
    remove_unfinished(loras, folder.id)
    published = publish([folder.path / name for name in adapters], loras, folder.id)
    reporter.update(published=published)
    reporter.log(
        message("the adapter is in the loras folder as {published}", published=", ".join(published))
    )


def save_now(run: Run, step: int, reporter: JobReporter | NullReporter) -> None:
    """Writes the adapter files of this step; a disk that does not take them costs only them."""
    reporter.update(phase=Phase.SAVING)
    try:
        adapters = run.save_adapters(step)
        reporter.update(adapters=adapters)
        reporter.log(
            message("saved {adapters}", adapters=", ".join(Path(name).name for name in adapters))
        )
    except FileError as e:
        reporter.add_note(message("step {step} was not saved: {error}", step=step, error=e))
    finally:
        reporter.update(phase=Phase.TRAINING)


def take_sample(
    sampler: Sampler,
    step: int,
    reporter: JobReporter | NullReporter,
    stop: ShouldStop,
    is_ordered: bool = False,
) -> None:
    """Makes the step's samples where they are due or ordered."""
    is_due = not sampler.has_made(step) if is_ordered else sampler.is_due(step)
    if not is_due or stop():
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
        reporter.add_note(
            message("samples did not fit into memory; training continues without them")
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    finally:
        reporter.update(phase=Phase.TRAINING)

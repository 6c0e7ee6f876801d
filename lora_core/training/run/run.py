"""A training run in memory: its start, its steps, its output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ...errors import ConfigError, FileError
from ...injection.inject import Injection
from ...messages import message
from ...progress import ShouldStop
from ...text import format_count
from ..config.config import TrainConfig
from ..data.dataset import CachedDataset
from ..objective.objective import Objective, VelocityModel
from ..optimizer.gradients import are_finite, clip_gradients, compute_grad_norm
from ..optimizer.optimization import averaged_weights, set_learning_rate
from ..optimizer.schedules import build_schedule
from .adapter_files import (
    ADAPTERS,
    DTYPES,
    EMA_SUFFIX,
    build_run_metadata,
    write_adapters,
)
from .checkpoint import remove_leftovers
from .health import measure_health
from .metrics import MetricsFile, StepReport, measure_memory
from .micro_steps import MicroSteps
from .output_names import check_is_free, open_checkpoints
from .processes import Processes
from .random_state import seed_everything
from .run_state import (
    build_training_state,
    check_same_run,
    collect_state,
    describe_run,
    restore_state,
    sample_run_contents,
)
from .step_failures import (
    build_non_finite_error,
    build_non_finite_weights_error,
    explaining_lack_of_memory,
)
from .step_numbers import StepNumbers

Notify = Callable[[str], None]


class Run:
    """The state and parts of a run; created by `train`."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        model: VelocityModel,
        injection: Injection,
        dataset: CachedDataset,
        prior: CachedDataset | None,
        objective: Objective,
        variant: str | None,
        processes: Processes,
        notify: Notify,
        resume: bool,
    ):
        self.config = config
        self.dataset = dataset
        self.prior = prior if config.data.prior_weight else None
        self.variant = variant
        self.processes = processes
        self.notify = notify
        self.folder = Path(config.output)
        self.checkpoints = open_checkpoints(config)
        self.metrics = MetricsFile(self.folder)
        self.description = describe_run(
            *(config, dataset, self.prior),
            contents=sample_run_contents(config, dataset, self.prior),
            variant=variant,
            num_processes=processes.count,
        )
        self.check_data()
        self.injection = injection
        self.parameters = injection.parameters()
        self.device = self.parameters[0].device
        self.micro_steps = MicroSteps(
            *(config, model, self.parameters, dataset, self.prior, objective, processes, notify)
        )
        if repeats := self.micro_steps.order.describe_repeats():
            notify(repeats)
        self.state = build_training_state(config.optimizer, injection)
        self.schedule = build_schedule(
            config.optimizer.schedule,
            config.optimizer.warmup_steps,
            config.steps,
            final_factor=config.optimizer.final_factor,
        )
        self.checkpointed_step: int | None = None
        self.numbers = StepNumbers(processes, self.device)
        seed_everything(config.seed + processes.index)
        self.start(resume)
        for layer in injection.layers.values():
            layer.train()
        self.micro_steps.model = processes.prepare(model, self.parameters)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step

    def check_data(self) -> None:
        if self.config.data.caption_dropout:
            self.dataset.check_captions_can_drop()
        if self.prior is not None and self.prior.text_width != self.dataset.text_width:
            raise ConfigError(
                "the prior's text embeddings are {text_width} wide, the training set's "
                "{expected_width}; cache both with the same text encoder",
                text_width=self.prior.text_width,
                expected_width=self.dataset.text_width,
            )

    def start(self, resume: bool) -> None:
        """Restores the newest checkpoint, or ensures that this is a new run."""
        check_is_free(self.config, resume)
        self.processes.wait()  # no process writes before all have checked
        if self.processes.is_main:
            self.checkpoints.prepare()
            remove_leftovers(self.folder)
            remove_leftovers(self.folder / ADAPTERS)
        self.processes.wait()
        checkpoint = self.checkpoints.read_latest()
        for sentence in self.checkpoints.passed_over:
            self.notify(message("skipped: {sentence}", sentence=sentence))
        if checkpoint is not None:
            for sentence in check_same_run(checkpoint.state["run"], self.description):
                self.notify(sentence)
            restore_state(self.state, checkpoint, self.processes.index)
            if self.processes.is_main:  # a killed process may not have come to it
                self.checkpoints.rotate(checkpoint.step)
            self.checkpointed_step = self.step
            self.notify(
                message(
                    "resumed after step {step} of {steps}", step=self.step, steps=self.config.steps
                )
            )
        elif resume:
            self.notify(
                message(
                    "{folder} holds no intact checkpoint; starting at step 1",
                    folder=self.folder.name,
                )
            )
        if self.processes.is_main and (num_unread := self.metrics.cut(self.step)):
            self.notify(
                message(
                    "{num_lines} of {path} left out as unreadable; the run itself is complete",
                    num_lines=format_count(num_unread, "line"),
                    path=self.metrics.path.name,
                )
            )

    def take_steps(self, should_stop: ShouldStop) -> Iterator[StepReport]:
        every = self.config.saving
        try:
            while self.step < self.config.steps:
                if self.numbers.is_asked_to_stop(should_stop):
                    self.save_checkpoint()
                    return
                with explaining_lack_of_memory(self.config, self.device, self.step + 1):
                    report = self.take_step(should_stop)
                if self.processes.is_main:
                    self.metrics.append(report)
                is_last = self.step == self.config.steps
                # The checkpoint comes last: what a killed run did not write, the resumed one does.
                try:
                    if every.adapter_every and self.step % every.adapter_every == 0:
                        report = replace(report, adapters=self.save_adapters(self.step))
                except FileError:
                    self.save_checkpoint()  # a bad adapter name or folder must not lose the work
                    raise
                if is_last or self.step % every.checkpoint_every == 0:
                    report = replace(report, checkpoint=self.save_checkpoint())
                yield report
        finally:
            self.micro_steps.batches.close()
        self.save_adapters(None)

    def take_step(self, should_stop: ShouldStop) -> StepReport:
        """One optimizer update; the host waits for the device once, between gradients and update.

        Whether the new weights are finite is read at the next wait, or before they are saved.

        Raises:
            NonFiniteLossError: the loss or the gradients are NaN or Inf, and nothing was changed;
                or the last step's weights are, and nothing of them is saved.
        """
        started = time.perf_counter()
        options = self.config.optimizer
        parts, own_tokens = self.micro_steps.take(self.step)
        self.processes.average_gradients(self.parameters)
        losses, num_tokens, grad_norm, were_finite = self.numbers.read(
            parts, own_tokens, compute_grad_norm(self.parameters), should_stop
        )
        self.require_finite_weights(were_finite)
        loss = math.fsum(losses.values())
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            keys = self.micro_steps.list_keys(self.step)
            kept = self.checkpoints.list_steps()
            raise build_non_finite_error(loss, grad_norm, self.step + 1, keys, kept)
        clip_gradients(self.parameters, grad_norm, options.max_grad_norm)
        learning_rate = options.learning_rate * self.schedule(self.step)
        set_learning_rate(self.state.optimizer, learning_rate)
        self.state.optimizer.step()
        self.numbers.is_finite = are_finite(self.parameters)
        self.state.step += 1
        if self.state.ema is not None:
            self.state.ema.update()
        seconds = time.perf_counter() - started
        return StepReport(
            step=self.step,
            num_steps=self.config.steps,
            epoch=self.micro_steps.get_epoch(self.step - 1),
            loss=loss,
            smoothed_loss=self.state.smoothed_loss.update(loss),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_s=num_tokens / seconds,
            seconds=seconds,
            memory_bytes=measure_memory(self.device),
            parts=losses if len(losses) > 1 else None,
            health=self.measure_health(),
        )

    def check_weights(self) -> None:
        """Waits for the device if the last step's weights are not yet known to be finite.

        Raises:
            NonFiniteLossError: they are not, and must not be used.
        """
        self.require_finite_weights(self.numbers.read_is_finite())

    def require_finite_weights(self, is_finite: bool) -> None:
        if not is_finite:
            raise build_non_finite_weights_error(self.step, self.checkpoints.list_steps())

    def measure_health(self) -> dict[str, float] | None:
        every = self.config.saving.health_every
        if not every or self.step % every:
            return None
        self.check_weights()
        return (
            measure_health(self.injection, self.step // every) if self.processes.is_main else None
        )

    def save_checkpoint(self) -> str | None:
        """Its name; None where this step needs none or another process writes it."""
        if self.step in (0, self.checkpointed_step):
            return None
        self.check_weights()
        tensors, state = collect_state(self.state, self.processes, self.description)
        path = None
        if self.processes.is_main:
            self.metrics.synchronize()
            path = self.checkpoints.write(self.step, tensors, state)
        self.checkpointed_step = self.step
        self.processes.wait()
        return None if path is None else path.name

    def save_adapters(self, step: int | None) -> tuple[str, ...]:
        """Writes the current weights and their average; `step` None for the finished ones."""
        self.check_weights()
        if not self.processes.is_main:
            return ()
        saving, name, ema = self.config.saving, self.config.name, self.state.ema
        adapters = {}
        with averaged_weights(self.state.optimizer):
            sources = {"": None, **({EMA_SUFFIX: ema.averages} if ema else {})}
            for suffix, tensors in sources.items():
                metadata = build_run_metadata(
                    self.config, self.dataset, self.step, self.variant, bool(suffix)
                )
                adapters[suffix] = self.injection.build_adapter(
                    name, metadata, DTYPES[saving.dtype], tensors
                )
        return write_adapters(adapters, self.folder, name, step, saving.keep_adapters)

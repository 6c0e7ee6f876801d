"""`train`: a model with LoRAs in it, a cached training set and a configuration -> step reports.

A step is one optimizer update, counted from 1 in reports; a micro-step one forward and backward.
What a step does depends on the checkpointed state and on its number alone, so a run that was
killed and resumed is the same run, to the bit where the device computes the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, NonFiniteLossError
from ..injection import Injection
from ..progress import ShouldStop
from ..report import shorten_list
from .adapter_files import ADAPTERS, DTYPES, EMA_SUFFIX, build_run_metadata, write_adapters
from .batches import Batch, DataOrder, load_batch
from .checkpoint import CheckpointFolder, remove_leftovers
from .config import TrainConfig
from .dataset import CachedDataset
from .ema import Ema
from .health import measure_health
from .losses import AuxiliaryLoss, Decode
from .memory import MemoryMeter, is_out_of_memory
from .metrics import MetricsFile, SmoothedLoss, StepReport, measure_memory
from .objective import VELOCITY, Objective, VelocityModel
from .optimization import averaged_weights, build_optimizer, set_learning_rate
from .processes import Processes
from .random_state import collect_random_state, restore_random_state, seed_everything
from .run_state import check_same_run, collect_state, describe_run, restore_state
from .schedules import build_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

Notify = Callable[[str], None]

CHECKPOINTS = "checkpoints"
PRIOR = "prior"
TOKENS = "tokens"


def train(
    config: TrainConfig,
    model: VelocityModel,
    injection: Injection,
    dataset: CachedDataset,
    *,
    prior: CachedDataset | None = None,
    auxiliary: Mapping[str, tuple[AuxiliaryLoss, float]] | None = None,
    decode: Decode | None = None,
    variant: str | None = None,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    should_stop: ShouldStop | None = None,
    notify: Notify | None = None,
) -> Iterator[StepReport]:
    """Trains, and yields a report after every step.

    Everything is checked and restored before this returns; the steps are taken as the reports are
    asked for. The finished adapters lie in `config.output` once the last report was taken.

    Args:
        model: called with normalised latents; its LoRAs are those of `injection`.
        prior: a training set whose loss is added with `config.data.prior_weight`.
        auxiliary: name -> further auxiliary loss and its weight.
        decode: for auxiliary losses that look at the image.
        variant: "original", "2509" or "2511", for the adapters' metadata.
        accelerator: of `accelerate launch`, for several processes.
        resume: go on from the newest whole checkpoint; start anew where there is none.
        should_stop: asked before every step; once it says yes, a checkpoint is written and the
            reports end.
        notify: told in sentences what is not as it was asked for.

    Raises:
        ConfigError: settings that do not fit each other or the run to be resumed, or a folder that
            already holds a run.
        FileError: the output folder cannot be written.
        NonFiniteLossError: while reports are taken; the step was not applied, or not saved.
    """
    return Run(
        config,
        model,
        injection,
        dataset,
        prior,
        Objective(config.objective, auxiliary, decode),
        variant,
        Processes(accelerator),
        notify or (lambda sentence: None),
        resume,
    ).take_steps(should_stop or (lambda: False))


def check_output(config: TrainConfig, resume: bool) -> None:
    """What `train` says of the output folder, for who wants to know before a model is loaded.

    Raises:
        ConfigError: it already holds a run that is not to be resumed.
        FileError: it cannot be written.
    """
    checkpoints = open_checkpoints(config)
    check_is_free(checkpoints, resume)
    checkpoints.prepare()


def open_checkpoints(config: TrainConfig) -> CheckpointFolder:
    return CheckpointFolder(Path(config.output) / CHECKPOINTS, config.saving.keep_checkpoints)


def check_is_free(checkpoints: CheckpointFolder, resume: bool) -> None:
    steps = checkpoints.list_steps()
    if steps and not resume:
        raise ConfigError(
            f"{checkpoints.folder.parent.name} already holds a run up to step {steps[-1]}; resume "
            "it, or choose another output folder"
        )


class Run:
    """Everything a run has while it lives; made by `train`."""

    def __init__(
        self,
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
        self.injection = injection
        self.dataset = dataset
        self.prior = prior if config.data.prior_weight else None
        self.objective = objective
        self.variant = variant
        self.processes = processes
        self.notify = notify
        self.folder = Path(config.output)
        self.checkpoints = open_checkpoints(config)
        self.metrics = MetricsFile(self.folder)
        self.check_data()
        batch_size = config.data.batch_size * processes.count
        self.order = DataOrder(dataset.items, batch_size, config.seed)
        if self.prior is not None:
            self.prior_order = DataOrder(self.prior.items, batch_size, (config.seed, PRIOR))
        if repeats := self.order.describe_repeats():
            notify(repeats)

        self.parameters = injection.parameters()
        self.device = self.parameters[0].device
        options = config.optimizer
        self.optimizer = build_optimizer(
            options.name, self.parameters, options.learning_rate, **options.options
        )
        self.schedule = build_schedule(
            options.schedule,
            options.warmup_steps,
            config.steps,
            final_factor=options.final_factor,
        )
        named = injection.named_parameters()
        self.ema = Ema(named, options.ema_decay) if options.ema_decay else None
        self.smoothed_loss = SmoothedLoss()
        self.step = 0
        self.checkpointed_step: int | None = None
        seed_everything(config.seed + processes.index)
        self.start(resume)
        for layer in injection.layers.values():
            layer.train()
        self.model = processes.prepare(model, self.parameters)

    def check_data(self) -> None:
        if self.config.data.caption_dropout:
            self.dataset.check_captions_can_drop()
        if self.prior is not None and self.prior.text_width != self.dataset.text_width:
            raise ConfigError(
                f"the prior's text embeddings are {self.prior.text_width} wide, the training "
                f"set's {self.dataset.text_width}; cache both with the same text encoder"
            )

    def start(self, resume: bool) -> None:
        """Takes up the newest checkpoint, or makes sure that this is a new run."""
        check_is_free(self.checkpoints, resume)
        self.processes.wait()  # nobody writes before everybody has looked
        if self.processes.is_main:
            self.checkpoints.prepare()
            remove_leftovers(self.folder)
            remove_leftovers(self.folder / ADAPTERS)
        self.processes.wait()
        checkpoint = self.checkpoints.read_latest()
        for sentence in self.checkpoints.passed_over:
            self.notify(f"passed over: {sentence}")
        if checkpoint is not None:
            for sentence in check_same_run(checkpoint.state["run"], describe_run(self)):
                self.notify(sentence)
            restore_state(self, checkpoint)
            self.checkpointed_step = self.step
            self.notify(f"resumed after step {self.step} of {self.config.steps}")
        elif resume:
            self.notify(f"{self.folder.name} holds no whole checkpoint; starting at step 1")
        if self.processes.is_main:
            self.metrics.cut(self.step)

    def take_steps(self, should_stop: ShouldStop) -> Iterator[StepReport]:
        every = self.config.saving
        while self.step < self.config.steps:
            if self.is_asked_to_stop(should_stop):
                self.save_checkpoint()
                return
            report = self.take_step()
            if self.processes.is_main:
                self.metrics.append(report)
            is_last = self.step == self.config.steps
            # The checkpoint comes last: what a killed run left out, the resumed one writes.
            if every.adapter_every and self.step % every.adapter_every == 0:
                report = replace(report, adapters=self.save_adapters(self.step))
            if is_last or self.step % every.checkpoint_every == 0:
                report = replace(report, checkpoint=self.save_checkpoint())
            yield report
        self.save_adapters(None)

    def take_step(self) -> StepReport:
        """One optimizer update.

        Raises:
            NonFiniteLossError: the loss or the gradients are NaN or Inf, and nothing was changed;
                or the new weights are, and nothing of them is saved.
        """
        started = time.perf_counter()
        options = self.config.optimizer
        self.optimizer.zero_grad(set_to_none=True)
        first = self.step * options.accumulation
        micro_steps = range(first, first + options.accumulation)
        parts = self.take_micro_steps(micro_steps)
        names = list(parts[0])
        sums = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in names])
        self.processes.average_gradients(self.parameters)
        figures = dict(zip(names, self.processes.average(sums).tolist(), strict=True))
        num_tokens = figures.pop(TOKENS) * self.processes.count
        loss = math.fsum(figures.values())
        grad_norm = compute_grad_norm(self.parameters)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise NonFiniteLossError(self.explain_non_finite(loss, grad_norm, micro_steps))
        clip_gradients(self.parameters, grad_norm, options.max_grad_norm)
        learning_rate = options.learning_rate * self.schedule(self.step)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        if not are_finite(self.parameters):
            raise NonFiniteLossError(self.explain_non_finite_weights())
        self.step += 1
        if self.ema is not None:
            self.ema.update()
        seconds = time.perf_counter() - started
        return StepReport(
            step=self.step,
            num_steps=self.config.steps,
            epoch=first // self.order.batches_per_epoch + 1,
            loss=loss,
            smoothed_loss=self.smoothed_loss.update(loss),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_s=num_tokens / seconds,
            seconds=seconds,
            memory_bytes=measure_memory(self.device),
            parts=figures if len(figures) > 1 else None,
            health=self.measure_health(),
        )

    def take_micro_steps(self, numbers: range) -> list[dict[str, torch.Tensor]]:
        """What `accumulate` gives for each.

        Where memory runs out and the model was free to choose what it keeps, once more with the
        least kept: the same numbers, so that it is the same run. Not in a group of processes, whose
        others would not come along.
        """
        is_alone = self.processes.count == 1
        can_keep_less = is_alone and getattr(self.model, "can_recompute_more", False)
        random_numbers = collect_random_state() if can_keep_less else None
        try:
            return [self.accumulate(number, number == numbers[-1]) for number in numbers]
        except Exception as e:
            if random_numbers is None or not is_out_of_memory(e):
                raise
        # Only here, where the exception is gone, does nothing hold on to activations.
        self.model.recompute_more()
        self.optimizer.zero_grad(set_to_none=True)
        MemoryMeter(self.device).reset()
        restore_random_state(*random_numbers)
        self.notify(
            f"memory ran out in step {self.step + 1}; from there on gradient_checkpointing is "
            "true, which is slower and gives the same LoRA"
        )
        return self.take_micro_steps(numbers)

    def accumulate(self, micro_step: int, is_last: bool) -> dict[str, torch.Tensor]:
        """Adds one micro-batch's share to the gradients.

        Returns:
            Part of the loss -> its share of the step's, and the number of tokens; scalars on the
            device.
        """
        data, share = self.config.data, 1 / self.config.optimizer.accumulation
        batch = self.load_batch(self.dataset, self.order, micro_step, data.caption_dropout)
        num_tokens = batch.num_tokens
        shares = self.backward(batch, share, is_last and self.prior is None)
        if self.prior is not None:
            batch = self.load_batch(self.prior, self.prior_order, micro_step, 0.0)
            num_tokens += batch.num_tokens
            weight = share * data.prior_weight
            shares[PRIOR] = self.backward(batch, weight, is_last, is_prior=True)[VELOCITY]
        return {**shares, TOKENS: torch.tensor(float(num_tokens), device=self.device)}

    def backward(
        self, batch: Batch, share: float, is_last: bool, is_prior: bool = False
    ) -> dict[str, torch.Tensor]:
        """Forward and backward of one batch, its losses times `share`."""
        with nullcontext() if is_last else self.processes.without_sync(self.model):
            losses = self.objective.compute_losses(self.model, batch, with_auxiliary=not is_prior)
            shares = {name: share * loss.mean() for name, loss in losses.items()}
            torch.stack(list(shares.values())).sum().backward()
        return {name: loss.detach() for name, loss in shares.items()}

    def load_batch(
        self, dataset: CachedDataset, order: DataOrder, micro_step: int, caption_dropout: float
    ) -> Batch:
        """This process's part of the micro-batch."""
        size = self.config.data.batch_size
        start = self.processes.index * size
        slots = order.get_slots(micro_step)[start : start + size]
        use_masks = self.config.data.use_masks
        return load_batch(dataset, slots, order.seed, caption_dropout, use_masks).to(self.device)

    def explain_non_finite(self, loss: float, grad_norm: float, micro_steps: range) -> str:
        what = f"the gradients are {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
        slots = [slot for number in micro_steps for slot in self.order.get_slots(number)]
        keys = dict.fromkeys(self.dataset.items[slot.item].key for slot in slots)
        return (
            f"{what} at step {self.step + 1} ({shorten_list(list(keys), 3)}); expected finite "
            f"numbers. The step was not applied and {self.describe_last_checkpoint()}. Lower the "
            "learning rate, look at these items, or compute in a wider type."
        )

    def explain_non_finite_weights(self) -> str:
        return (
            f"the optimizer made NaN or Inf of finite gradients at step {self.step + 1}, so that "
            f"nothing of it was saved and {self.describe_last_checkpoint()}; lower the learning "
            "rate."
        )

    def describe_last_checkpoint(self) -> str:
        kept = self.checkpoints.list_steps()
        return f"the last checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint"

    def measure_health(self) -> dict[str, float] | None:
        every = self.config.saving.health_every
        if not every or self.step % every or not self.processes.is_main:
            return None
        return measure_health(self.injection, self.step // every)

    def is_asked_to_stop(self, should_stop: ShouldStop) -> bool:
        """True on every process as soon as one of them is asked."""
        asked = torch.tensor(float(should_stop()), device=self.device)
        return self.processes.average(asked).item() > 0

    def save_checkpoint(self) -> str | None:
        """Its name; None where this step needs none or another process writes it."""
        if self.step in (0, self.checkpointed_step):
            return None
        tensors, state = collect_state(self)
        path = None
        if self.processes.is_main:
            self.metrics.synchronize()
            path = self.checkpoints.write(self.step, tensors, state)
        self.checkpointed_step = self.step
        self.processes.wait()
        return None if path is None else path.name

    def save_adapters(self, step: int | None) -> tuple[str, ...]:
        """Files of the present weights and their average; None for the finished ones."""
        if not self.processes.is_main:
            return ()
        saving, name = self.config.saving, self.config.name
        adapters = {}
        with averaged_weights(self.optimizer):
            sources = {"": None, **({EMA_SUFFIX: self.ema.averages} if self.ema else {})}
            for suffix, tensors in sources.items():
                metadata = build_run_metadata(
                    self.config, self.dataset, self.step, self.variant, bool(suffix)
                )
                adapters[suffix] = self.injection.build_adapter(
                    name, metadata, DTYPES[saving.dtype], tensors
                )
        return write_adapters(adapters, self.folder, name, step, saving.keep_adapters)


def are_finite(parameters: Sequence[torch.nn.Parameter]) -> bool:
    """By their norms, which are NaN or Inf if any entry is."""
    norms = torch._foreach_norm([p.detach() for p in parameters])
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def compute_grad_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Of all gradients together; parameters without one count as 0."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0


def clip_gradients(
    parameters: Sequence[torch.nn.Parameter], grad_norm: float, max_norm: float
) -> None:
    """Scales the gradients down to `max_norm`; 0 leaves them alone."""
    if max_norm and grad_norm > max_norm:
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, max_norm / grad_norm)

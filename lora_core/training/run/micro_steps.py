"""The passes of a step: which samples each micro-step sees, its forward and its backward."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from ...messages import message
from ..config.config import TrainConfig
from ..data.batches import Batch, DataOrder, load_batch
from ..data.dataset import CachedDataset
from ..data.prefetch import Prefetcher
from ..machine.memory import MemoryMeter, is_out_of_memory
from ..objective.objective import VELOCITY, Objective, VelocityModel
from .processes import Processes
from .random_state import collect_random_state, restore_random_state

PRIOR = "prior"


class MicroSteps:
    """Leaves a step's gradients in the parameters.

    Meanwhile the next micro-step's batch is read, drawn and put into page-locked memory.

    Args:
        model: as `Processes.prepare` gave it.
        parameters: those that are trained.
        prior: training set whose loss is added with `config.data.prior_weight`; None without.
        notify: called when less is kept for the backward pass from some step on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: VelocityModel,
        parameters: list[torch.nn.Parameter],
        dataset: CachedDataset,
        prior: CachedDataset | None,
        objective: Objective,
        processes: Processes,
        notify: Callable[[str], None],
    ):
        self.config = config
        self.model = model
        self.parameters = parameters
        self.device = parameters[0].device
        self.dataset = dataset
        self.prior = prior
        self.objective = objective
        self.processes = processes
        self.notify = notify
        size = config.data.batch_size * processes.count
        self.order = DataOrder(dataset.items, size, config.seed)
        if prior is not None:
            self.prior_order = DataOrder(prior.items, size, (config.seed, PRIOR))
        self.batches = Prefetcher(self.load_batches, config.steps * config.optimizer.accumulation)

    def get_numbers(self, step: int) -> range:
        """Micro-steps of the step after `step` steps, counted from 0 over the whole run."""
        accumulation = self.config.optimizer.accumulation
        return range(step * accumulation, (step + 1) * accumulation)

    def get_epoch(self, step: int) -> int:
        """Counted from 1."""
        return self.get_numbers(step)[0] // self.order.batches_per_epoch + 1

    def list_keys(self, step: int) -> list[str]:
        """Items that the step shows."""
        slots = [slot for number in self.get_numbers(step) for slot in self.order.get_slots(number)]
        return list(dict.fromkeys(self.dataset.items[slot.item].key for slot in slots))

    def take(self, step: int) -> tuple[dict[str, torch.Tensor], int]:
        """Computes the gradients of the step after `step` steps.

        Where memory runs out and the model may choose what it keeps, retries with less kept: the
        results are the same, and so is the run. Not in a group of processes, where the others
        would not follow.

        Returns:
            Part of the loss -> this process's mean, a scalar on the device; and the number of
            tokens.
        """
        is_alone = self.processes.count == 1
        model: Any = self.model  # perhaps one that can keep less
        can_keep_less = is_alone and getattr(model, "can_recompute_more", False)
        random_numbers = collect_random_state() if can_keep_less else None
        self.drop_gradients()
        try:
            return self.accumulate(self.get_numbers(step))
        except Exception as e:
            if random_numbers is None or not is_out_of_memory(e):
                raise
        # Only here, outside of the handler, does nothing keep activations alive.
        model.recompute_more()
        self.drop_gradients()
        MemoryMeter(self.device).reset()
        restore_random_state(*random_numbers)
        kind = json.dumps(model.gradient_checkpointing)
        self.notify(
            message(
                "memory ran out in step {step}; from there on gradient_checkpointing is {kind}, "
                "which is slower and gives the same LoRA",
                step=step + 1,
                kind=kind,
            )
        )
        return self.take(step)

    def accumulate(self, numbers: range) -> tuple[dict[str, torch.Tensor], int]:
        parts, num_tokens = [], 0
        for number in numbers:
            part, count = self.take_one(number, number == numbers[-1])
            parts.append(part)
            num_tokens += count
        return {
            name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]
        }, num_tokens

    def take_one(self, number: int, is_last: bool) -> tuple[dict[str, torch.Tensor], int]:
        """Adds one micro-batch's share to the gradients.

        Returns:
            Part of the loss -> its share of the step's, and the number of tokens.
        """
        share = 1 / self.config.optimizer.accumulation
        batch, *priors = self.batches.take(number)
        num_tokens = batch.num_tokens
        shares = self.backward(batch, share, is_last=is_last and not priors)
        for prior in priors:
            num_tokens += prior.num_tokens
            weight = share * self.config.data.prior_weight
            shares[PRIOR] = self.backward(prior, weight, is_last=is_last, is_prior=True)[VELOCITY]
        return shares, num_tokens

    def backward(
        self, batch: Batch, share: float, *, is_last: bool, is_prior: bool = False
    ) -> dict[str, torch.Tensor]:
        """Forward and backward of one batch, its losses times `share`."""
        batch = batch.to(self.device)
        with nullcontext() if is_last else self.processes.without_sync(self.model):
            losses = self.objective.compute_losses(self.model, batch, with_auxiliary=not is_prior)
            shares = {name: share * loss.mean() for name, loss in losses.items()}
            torch.stack(list(shares.values())).sum().backward()
        return {name: loss.detach() for name, loss in shares.items()}

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def load_batches(self, number: int) -> list[Batch]:
        """This process's part of a micro-batch, and of the prior's; both on the CPU.

        With noise levels, so that nothing is left to be copied to a GPU from pageable memory, which
        waits for all that the GPU has yet to do.
        """
        dropout = self.config.data.caption_dropout
        batches = [self.load_batch(self.dataset, self.order, number, dropout)]
        if self.prior is not None:
            batches.append(self.load_batch(self.prior, self.prior_order, number, 0.0))
        chosen = [replace(one, sigma=self.objective.choose_sigmas(one)) for one in batches]
        return [batch.pin(self.device) for batch in chosen]

    def load_batch(
        self, dataset: CachedDataset, order: DataOrder, number: int, caption_dropout: float
    ) -> Batch:
        size = self.config.data.batch_size
        start = self.processes.index * size
        slots = order.get_slots(number)[start : start + size]
        return load_batch(
            dataset,
            slots,
            order.seed,
            caption_dropout=caption_dropout,
            use_masks=self.config.data.use_masks,
        )

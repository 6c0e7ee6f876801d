"""Measures an Effect on a MODEL: a few model calls per strength, without sampling.

The strengths run one after the other on the same noise, not as one batch. An edit has thousands of
tokens per item, so a batch saves no arithmetic, and it multiplies the memory for activations. It
would need a gain per batch item in every kind of term. And equal items of a batch may be rounded
differently, while here a change of exactly 0 means that nothing was applied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from ...lora_core import Adapter
from ...lora_core.adapter.strengths import Strengths
from ...lora_core.sweep.effect import ChangeMeter, Effect, StrengthEffect, compute_rms
from .. import host
from ..patching.application import apply_adapters

#: Tokens compared per block, evenly spaced; all of them would be gigabytes over 60 blocks.
MAX_TOKENS = 512


class Recording:
    """The results of one strength's model calls, in main memory."""

    def __init__(self, num_sigmas: int, on_output: Any):
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.blocks: list[dict[int, torch.Tensor]] = [{} for _ in range(num_sigmas)]
        self.on_output = on_output

    def add_block(self, block: int, tokens: torch.Tensor) -> None:
        # The first item of the first call; several prompts may make several calls.
        seen = self.blocks[len(self.outputs)]
        if block not in seen:
            count = tokens.shape[1]
            step = -(-count // MAX_TOKENS)
            seen[block] = tokens[0, ::step].detach().to("cpu", copy=True)

    def add_output(self, index: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
        # x - denoised = sigma * velocity, and sigma is the same for all strengths.
        self.outputs.append((x.cpu(), denoised.detach().to("cpu", copy=True)))
        self.on_output()


def measure_effect(
    model: host.ModelPatcher,
    adapter: Adapter,
    positive: Any,
    latent: Mapping[str, Any],
    strengths: tuple[float, ...],
    sigmas: tuple[float, ...],
    seed: int = 0,
) -> Effect:
    """Compares the model's outputs at each strength with those at 0.

    Raises:
        LoraError: the adapter does not fit the model.
    """
    progress = host.build_progress()
    total = len(sigmas) * len({0.0, *strengths})
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def record(strength: float) -> Recording:
        patched = apply_adapters(model, [(adapter, Strengths(strength))]).model
        recording = Recording(len(sigmas), count)
        host.add_block_recorder(patched, recording.add_block)
        host.predict(patched, positive, latent, list(sigmas), seed, recording.add_output)
        return recording

    reference = record(0.0)
    found = []
    for strength in strengths:
        recording = reference if strength == 0 else record(strength)
        found.append(compare(strength, reference, recording))
    return Effect(adapter.name, sigmas, tuple(found))


def compare(strength: float, reference: Recording, other: Recording) -> StrengthEffect:
    outputs = []
    for (x, denoised), (_, changed) in zip(reference.outputs, other.outputs, strict=True):
        meter = ChangeMeter()
        meter.add(x - denoised, x - changed)
        outputs.append(meter.get_ratio())
    by_block: dict[int, list[float]] = defaultdict(list)
    for before, after in zip(reference.blocks, other.blocks, strict=True):
        for block, tokens in before.items():
            meter = ChangeMeter()
            meter.add(tokens, after[block])
            by_block[block].append(meter.get_ratio())
    blocks = tuple(compute_rms(by_block[block]) for block in sorted(by_block))
    return StrengthEffect(strength, tuple(outputs), blocks)

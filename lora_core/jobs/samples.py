"""Pictures on the way, from the training set's own cached prompts and references."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ..errors import ConfigError
from ..progress import ShouldStop
from ..training.pictures import write_latents, write_picture
from ..training.sampling import sample
from ..training.session import Session
from ..training.trainer import Run
from .job import SampleSettings


class Sampler:
    """Makes an item's picture with the weights as they are."""

    def __init__(self, settings: SampleSettings, session: Session, run: Run, folder: Path):
        """Raises ConfigError where an item is not in the training set, or guidance impossible."""
        self.settings = settings
        self.session = session
        self.run = run
        self.folder = folder
        self.indices = self._choose() if settings.every else []

    def is_due(self, step: int) -> bool:
        """Also before the first step, to compare with; no picture is made twice."""
        due = bool(self.indices) and step % self.settings.every == 0
        return due and not all(self._name(step, i).exists() for i in self.indices)

    def make(self, step: int, should_stop: ShouldStop) -> float:
        """Writes latents, and pictures where there is a VAE; the run stays as it is to the bit.

        Returns:
            Seconds it took.

        Raises:
            InterruptedError: `should_stop` said yes.
        """
        started = time.monotonic()
        layers = self.run.injection.layers.values()
        device = self.run.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for layer in layers:
                layer.eval()  # no dropout in pictures
            try:
                for index in self.indices:
                    self._make_one(step, index, should_stop)
            finally:
                for layer in layers:
                    layer.train()
        return time.monotonic() - started

    def _make_one(self, step: int, index: int, should_stop: ShouldStop) -> None:
        settings, path = self.settings, self._name(step, index)
        latents = sample(
            *(self.session.model, self.session.dataset, index),
            num_steps=settings.steps,
            guidance=settings.guidance,
            seed=settings.seed,
            device=self.run.device,
            should_stop=should_stop,
        )
        stem = path.with_name(path.name.removesuffix(".safetensors"))
        if self.session.decode is not None:
            with torch.no_grad():
                write_picture(self.session.decode(latents)[0], stem)
        write_latents(latents, stem)  # last: it is what says that the sample is there

    def _name(self, step: int, index: int) -> Path:
        return self.folder / f"step_{step:08d}_{self.session.dataset.items[index].key}.safetensors"

    def _choose(self) -> list[int]:
        dataset = self.session.dataset
        known = {info.key: index for index, info in enumerate(dataset.items)}
        keys = self.settings.items or tuple(known)[:1]
        for key in keys:
            if key not in known:
                raise ConfigError(
                    f"the training set has no item {key!r} to sample; it has {next(iter(known))}, …"
                )
        indices = [known[key] for key in keys]
        if self.settings.guidance != 1 and not dataset.has_empty_text:
            without = [dataset.items[i].key for i in indices if not dataset.items[i].has_empty_text]
            if without:
                raise ConfigError(
                    f"sampling with guidance {self.settings.guidance:g} needs the embedding of an "
                    f"empty caption, which {without[0]} lacks; set it to 1"
                )
        return indices

"""Samples during training, from the training set's own cached prompts and references."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import ConfigError
from ..messages import message
from ..progress import ShouldStop, track
from ..training.data.latents import normalize
from ..training.run.run import Run
from ..training.run.session import Session
from ..training.sampling.images import write_latents
from ..training.sampling.sampling import sample
from .job import SampleSettings
from .picture_writer import ImageWriter
from .pictures import SUFFIX, name_sample, name_source, name_target

LATENTS_SUFFIX = ".safetensors"


class Sampler:
    """Makes an item's sample with the current weights; the run stays bit-identical.

    Args:
        notify: called with a sentence for each way the images differ from what was requested.
    """

    def __init__(
        self,
        settings: SampleSettings,
        session: Session,
        run: Run,
        folder: Path,
        notify: Callable[[str], None],
    ):
        """Raises ConfigError where an item is not in the training set, or guidance impossible."""
        self.settings = settings
        self.session = session
        self.run = run
        self.folder = folder
        self.indices = self._choose() if settings.every else []
        self.writer = ImageWriter(settings.vae, session.decode, run.device, notify)

    def is_due(self, step: int) -> bool:
        """Also before the first step, to compare with; no sample is made twice."""
        due = bool(self.indices) and step % self.settings.every == 0
        return due and not self.has_made(step)

    def has_made(self, step: int) -> bool:
        """Whether the samples of a step are complete."""
        return all(self._get_stem(step, i, True).exists() for i in self.indices)

    def make(self, step: int, should_stop: ShouldStop) -> float:
        """Writes latents, and images where there is a VAE.

        Returns:
            Seconds it took.

        Raises:
            InterruptedError: `should_stop` returned True.
            NonFiniteLossError: the weights are not finite.
        """
        started = time.monotonic()
        self.run.check_weights()
        with self._leaving_the_run_alone():
            for index in self.indices:
                self._make_one(step, index, should_stop)
        return time.monotonic() - started

    def list_missing_examples(self) -> list[tuple[int, str, Path]]:
        """Index, tensor and path without a suffix of what samples are compared with."""
        if not self.writer.is_able:
            return []
        wanted = []
        for index in self.indices:
            info = self.session.dataset.items[index]
            names = {
                f"reference_{i}": name_source(info.key, i) for i in range(len(info.references))
            }
            names["target"] = name_target(info.key)
            wanted += [(index, tensor, self.folder / name) for tensor, name in names.items()]
        return [one for one in wanted if not one[2].with_name(one[2].name + SUFFIX).exists()]

    def make_examples(self, should_stop: ShouldStop) -> None:
        """Writes the images of the chosen items' references and targets, from the cached latents.

        Raises:
            InterruptedError: `should_stop` returned True.
        """
        missing = self.list_missing_examples()
        with self._leaving_the_run_alone():
            for index, tensor, stem in track(
                missing, None, should_stop, message("decoding of the pairs")
            ):
                item = self.session.dataset.load(index)
                self.writer.write(normalize(item.tensors[tensor])[None], stem)

    def _make_one(self, step: int, index: int, should_stop: ShouldStop) -> None:
        settings, stem = self.settings, self._get_stem(step, index)
        latents = sample(
            *(self.session.model, self.session.dataset, index),
            num_steps=settings.steps,
            guidance=settings.guidance,
            seed=settings.seed,
            device=self.run.device,
            should_stop=should_stop,
        )
        self.writer.write(latents, stem)
        write_latents(latents, stem)  # last: it marks the sample as complete

    @contextmanager
    def _leaving_the_run_alone(self) -> Iterator[None]:
        layers = self.run.injection.layers.values()
        device = self.run.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for layer in layers:
                layer.eval()  # no dropout in images
            try:
                with self.writer.ready():
                    yield
            finally:
                for layer in layers:
                    layer.train()

    def _get_stem(self, step: int, index: int, is_file: bool = False) -> Path:
        name = name_sample(self.session.dataset.items[index].key, step)
        return self.folder / (name + LATENTS_SUFFIX if is_file else name)

    def _choose(self) -> list[int]:
        dataset = self.session.dataset
        known = {info.key: index for index, info in enumerate(dataset.items)}
        keys = self.settings.items or tuple(known)[:1]
        for key in keys:
            if key not in known:
                raise ConfigError(
                    "the training set has no item {key!r} to sample; it has {example}, …",
                    key=key,
                    example=next(iter(known)),
                )
        indices = [known[key] for key in keys]
        if self.settings.guidance != 1 and not dataset.has_empty_text:
            without = [dataset.items[i].key for i in indices if not dataset.items[i].has_empty_text]
            if without:
                raise ConfigError(
                    "sampling with guidance {guidance:g} needs the embedding of an empty "
                    "caption, which {without} lacks; set it to 1",
                    guidance=self.settings.guidance,
                    without=without[0],
                )
        return indices

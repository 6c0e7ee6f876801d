"""Latents -> PNG files, by a VAE that is on the device only while it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import LoraError
from ..messages import message
from ..training.machine.memory import is_out_of_memory
from ..training.objective.losses import Decode
from ..training.sampling.image_decoder import ImageDecoder, load_decoder
from ..training.sampling.images import write_image

IN_TILES = message(
    "the images do not fit into the device's memory at once and are decoded in tiles"
)
ON_CPU = message("the images do not fit into the device's memory and are decoded on the CPU")


class ImageWriter:
    """Decodes and writes; decoding errors are noted once and are not fatal.

    Args:
        path: the VAE's file; "" where there is none.
        decode: the run's own decoder for its losses; used where there is no path.
        notify: called with a sentence on why there are no images, or why they take longer.
    """

    def __init__(
        self,
        path: str,
        decode: Decode | None,
        device: torch.device,
        notify: Callable[[str], None],
    ):
        self.path = path
        self.decode = None if path else decode
        self.device = device
        self.notify = notify
        self._decoder: ImageDecoder | None = None
        self._in_tiles = False

    @property
    def is_able(self) -> bool:
        """Whether there is a VAE, and nothing has failed yet."""
        return bool(self.path) or self.decode is not None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside the block `write` works; outside, the VAE waits in main memory.

        Only where the random state is kept: libraries may draw from it.
        """
        try:
            yield
        finally:
            if self._decoder is not None:
                self._decoder.vae.to("cpu")
            empty_cache(self.device)

    def write(self, latents: torch.Tensor, stem: Path) -> None:
        """Normalised latents (1, 16, H, W) -> STEM.png, where that is possible.

        Raises:
            FileError: the disk does not take it.
        """
        image = self._try_decode(latents)
        if image is not None:
            write_image(image, stem)

    def _try_decode(self, latents: torch.Tensor) -> torch.Tensor | None:
        if not self.is_able:
            return None
        sentence = ""
        try:
            return self._decode(latents)
        except LoraError as e:  # the file is missing or damaged
            sentence = message("no images are made, latents only: {error}", error=e)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        # Outside of the handler, whose exception keeps the tensors alive.
        if not sentence and self.path and self.device.type != "cpu":
            if self._in_tiles:
                self._drop()
                self.device = torch.device("cpu")
            else:
                empty_cache(self.device)
            self._in_tiles = not self._in_tiles  # a CPU has the memory, and takes longer for tiles
            self.notify(IN_TILES if self._in_tiles else ON_CPU)
            return self._try_decode(latents)
        self._drop()
        self.path, self.decode = "", None
        self.notify(sentence or message("images do not fit into memory; latents only are kept"))
        return None

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(3, 8H, 8W) in [0, 1]."""
        if self.decode is not None:
            return self.decode(latents.to(self.device))[0]
        if self._decoder is None:
            # A CPU computes half precision slowly, and has the memory.
            dtype = torch.float32 if self.device.type == "cpu" else None
            self._decoder = load_decoder(self.path, "cpu", dtype)
        self._decoder.vae.to(self.device)
        return self._decoder(latents.to(self.device), self._in_tiles)[0].cpu()

    def _drop(self) -> None:
        device, self._decoder = self.device, None
        empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Releases PyTorch's cached memory that is no longer in use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

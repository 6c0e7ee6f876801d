"""How strongly an adapter acts on each module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..base_model import module_paths
from ..base_model.family import Family
from ..base_model.qwen_image import QWEN_IMAGE
from ..errors import ConfigError
from ..messages import join_messages, message


@dataclass(frozen=True)
class Strengths:
    """The user's multipliers. Hashable, so that equal settings are recognised."""

    strength: float = 1.0
    image_strength: float = 1.0
    """Further factor on image-stream modules (to_q, img_mlp, ...)."""
    text_strength: float = 1.0
    """Further factor on text-stream modules (add_q_proj, txt_mlp, ...)."""
    blocks: frozenset[int] | None = None
    """Only these blocks, and nothing outside the blocks; None means every module."""

    def __post_init__(self) -> None:
        for name in ("strength", "image_strength", "text_strength"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ConfigError(
                    "{name} is {value}; expected a finite number such as 1.0",
                    name=name,
                    value=value,
                )

    @property
    def is_zero(self) -> bool:
        return self.strength == 0 or (self.image_strength == 0 and self.text_strength == 0)

    @property
    def selects_all(self) -> bool:
        """Whether no module gets 0, as long as the strength itself is not 0."""
        return self.blocks is None and self.image_strength != 0 != self.text_strength

    def select(self, module_paths: Iterable[str], family: Family | None = None) -> list[str]:
        """The modules that get anything at all; see `resolve`."""
        if self.is_zero:
            return []
        if self.selects_all:
            return list(module_paths)
        return [path for path in module_paths if self.resolve(path, family)]

    def resolve(self, module_path: str, family: Family | None = None) -> float:
        """The multiplier of one module. Modules of both streams get the mean of the two factors.

        Args:
            family: that of the model, which tells the stream; by default Qwen-Image.
        """
        block, _ = module_paths.split_path(module_path)
        if self.blocks is not None and block not in self.blocks:
            return 0.0
        if self.image_strength == self.text_strength:
            return self.strength * self.image_strength
        stream = (family or QWEN_IMAGE).get_stream(module_path)
        factors = {"image": self.image_strength, "text": self.text_strength}
        both = (self.image_strength + self.text_strength) / 2
        return self.strength * factors.get(stream, both)

    def __str__(self) -> str:
        return str(self.describe())

    def describe(self) -> str:
        parts = [message("strength {strength:g}", strength=self.strength)]
        if self.image_strength != 1 or self.text_strength != 1:
            streams = {"image": self.image_strength, "text": self.text_strength}
            parts.append(message("image {image:g}, text {text:g}", **streams))
        if self.blocks is not None:
            parts.append(message("blocks {blocks}", blocks=module_paths.format_blocks(self.blocks)))
        return join_messages(", ", parts)

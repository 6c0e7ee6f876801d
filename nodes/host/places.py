"""Where a model keeps a module that an adapter names: a whole Linear, or a part of one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """An adapter's module in a model: a Linear, or one of equal parts of a Linear's output."""

    module_path: str
    part: int = 0
    num_parts: int = 1
    interleave: int = 1
    """Output c * width + d of the adapter's module is d * interleave + c in the model."""

    def build_key(self, name: str, out_features: int) -> str | tuple[str, tuple[int, int, int]]:
        """The key of ComfyUI's patch on "weight" or "bias"; of a part with the rows it has.

        Args:
            out_features: of the adapter's module.
        """
        key = f"diffusion_model.{self.module_path}.{name}"
        if self.num_parts == 1:
            return key
        return key, (0, self.part * out_features, out_features)

"""A family of base models as a value: its modules, their sizes, and what is selected among them.

A module path is `transformer_blocks.<i>.<name>` or a top-level name; `name` below is always the
part after the block number. A further family needs a table like those of `qwen_image.py`, and a
place in `families.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import TargetError
from .module_paths import split_path


@dataclass(frozen=True)
class Fusion:
    """Modules that some files join to one, whose weight has their rows below each other."""

    members: tuple[str, ...]
    """In the order of the rows, which they share equally."""
    title: str
    """E.g. "query, key and value"."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """Models that share one architecture. Compared by identity."""

    name: str
    """As in `Adapter.family` and in JSON, e.g. "qwen-image"."""
    title: str
    """For people, e.g. "Qwen-Image"."""
    licence: str
    is_commercial: bool
    """Whether the licence allows commercial use."""
    num_blocks: int
    width: int
    block_linears: Mapping[str, tuple[int, int]]
    """Name -> (out_features, in_features) at full size, in the order of plots and plans."""
    top_linears: Mapping[str, tuple[int, int]]
    block_norms: tuple[str, ...]
    top_norms: tuple[str, ...]
    default_stream: str
    """Stream of every module that `streams` does not name: "image", "text" or "both"."""
    streams: Mapping[str, str]
    presets: Mapping[str, tuple[str, ...]]
    """Name -> modules of every block."""
    fused: Mapping[str, Fusion]
    """Name inside a block that some files use -> the modules it holds."""
    inert_last_block: tuple[str, ...] = ()
    """Modules of the last block whose output the model discards: they never get a gradient."""
    mlp_fusion: str | None = None
    """The entry of `fused` that base models and adapters may store instead of its members, which
    are what adapters are held in."""
    variants: tuple[str, ...] = ()
    """Models of the family for which a file may say that it was trained."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Name -> short form for plots."""
    architecture: str = ""
    """`modelspec.architecture` of its LoRAs, where it has no variants."""
    base_version: str = ""
    """`ss_base_model_version` in files of kohya's trainers."""
    network_module: str = ""
    """`ss_network_module` there."""

    @cached_property
    def names(self) -> frozenset[str]:
        """Of everything that holds a weight, in a block or on top."""
        return self._in_block | self._on_top

    @cached_property
    def _in_block(self) -> frozenset[str]:
        return frozenset((*self.block_linears, *self.block_norms))

    @cached_property
    def _on_top(self) -> frozenset[str]:
        return frozenset((*self.top_linears, *self.top_norms))

    def is_known(self, module_path: str) -> bool:
        """True for every module that holds a weight, at any number of blocks."""
        block, name = split_path(module_path)
        return name in (self._on_top if block is None else self._in_block)

    def is_fused(self, module_path: str) -> bool:
        block, name = split_path(module_path)
        return block is not None and name in self.fused

    def is_norm(self, module_path: str) -> bool:
        """True for the norms, which have a weight and no bias."""
        block, name = split_path(module_path)
        return name in (self.top_norms if block is None else self.block_norms)

    def is_inert(self, module_path: str, last_block: int) -> bool:
        """Modules of the model's last block whose output it discards."""
        block, name = split_path(module_path)
        return block == last_block and name in self.inert_last_block

    def get_stream(self, module_path: str) -> str:
        """ "image", "text", or "both" for modules that serve the two."""
        return self.streams.get(split_path(module_path)[1], self.default_stream)

    def compute_shape(self, name: str, width: int | None = None) -> tuple[int, int]:
        """(out_features, in_features) of a Linear, by its name inside a block or on top.

        Args:
            width: of a smaller or larger model, for Linears of blocks; those on top keep theirs.

        Raises:
            TargetError: no such Linear.
        """
        if name in self.top_linears:
            return self.top_linears[name]
        if name not in self.block_linears:
            raise TargetError(
                "{name!r} is not a Linear of a block; expected one of {block_linears}",
                name=name,
                block_linears=tuple(self.block_linears),
            )
        out, in_ = self.block_linears[name]
        if width is None:
            return out, in_
        return out // self.width * width, in_ // self.width * width

    def list_module_paths(self, num_blocks: int | None = None) -> list[str]:
        """Every module path, norms included."""
        blocks = range(self.num_blocks if num_blocks is None else num_blocks)
        inside = [
            f"transformer_blocks.{block}.{name}"
            for block in blocks
            for name in (*self.block_linears, *self.block_norms)
        ]
        return [*inside, *self.top_linears, *self.top_norms]

    def get_preset(self, preset: str) -> tuple[str, ...]:
        """
        Raises:
            TargetError: no such preset.
        """
        if preset not in self.presets:
            raise TargetError(
                "unknown preset {preset!r}; expected one of {presets}",
                preset=preset,
                presets=", ".join(self.presets),
            )
        return self.presets[preset]

    def detect_preset(self, module_paths: Iterable[str]) -> str | None:
        """The preset whose module names are exactly those of the blocks in `module_paths`."""
        names = {name for block, name in map(split_path, module_paths) if block is not None}
        for preset, expected in self.presets.items():
            if names == set(expected):
                return preset
        return None

    def count_parameters(self, preset: str, rank: int, num_blocks: int | None = None) -> int:
        """Parameters of a LoRA of `rank` on a preset: rank * (in + out) per module.

        Raises:
            TargetError: no such preset.
        """
        blocks = self.num_blocks if num_blocks is None else num_blocks
        return blocks * rank * sum(sum(self.block_linears[n]) for n in self.get_preset(preset))

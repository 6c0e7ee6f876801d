"""LoRA math and files for Qwen-Image-Edit, without ComfyUI."""

from .adapter import Adapter
from .errors import (
    ConfigError,
    FileError,
    KeyFormatError,
    LoraError,
    NonFiniteWeightsError,
    ShapeError,
    TargetError,
)
from .files import build_state_dict, read_adapter, read_state_dict, write_adapter
from .report import DroppedKey, LoadReport
from .targets import TARGET_PRESETS, count_parameters, parse_block_ranges
from .weights import (
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
    compute_delta,
)

__all__ = [
    "TARGET_PRESETS",
    "Adapter",
    "ConfigError",
    "DiffWeights",
    "DoraWeights",
    "DroppedKey",
    "FileError",
    "KeyFormatError",
    "LoadReport",
    "LohaWeights",
    "LokrWeights",
    "LoraError",
    "LoraWeights",
    "ModuleWeights",
    "NonFiniteWeightsError",
    "OftWeights",
    "ShapeError",
    "TargetError",
    "build_state_dict",
    "compute_delta",
    "count_parameters",
    "parse_block_ranges",
    "read_adapter",
    "read_state_dict",
    "write_adapter",
]

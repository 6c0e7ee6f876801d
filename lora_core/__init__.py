"""LoRA math and files for Qwen-Image-Edit, without ComfyUI."""

from .adapter import Adapter
from .compare import Comparison, ModuleComparison, compare_adapters
from .compose import merge_adapters, resize_adapter
from .composition import Composition
from .errors import (
    ConfigError,
    FileError,
    KeyFormatError,
    LoraError,
    NonFiniteLossError,
    NonFiniteWeightsError,
    OutOfMemoryError,
    ShapeError,
    TargetError,
)
from .extraction import extract_adapter
from .files import build_state_dict, read_adapter, read_state_dict, write_adapter
from .findings import Finding
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
    "Comparison",
    "Composition",
    "ConfigError",
    "DiffWeights",
    "DoraWeights",
    "DroppedKey",
    "FileError",
    "Finding",
    "KeyFormatError",
    "LoadReport",
    "LohaWeights",
    "LokrWeights",
    "LoraError",
    "LoraWeights",
    "ModuleComparison",
    "ModuleWeights",
    "NonFiniteLossError",
    "NonFiniteWeightsError",
    "OftWeights",
    "OutOfMemoryError",
    "ShapeError",
    "TargetError",
    "build_state_dict",
    "compare_adapters",
    "compute_delta",
    "count_parameters",
    "extract_adapter",
    "merge_adapters",
    "parse_block_ranges",
    "read_adapter",
    "read_state_dict",
    "resize_adapter",
    "write_adapter",
]

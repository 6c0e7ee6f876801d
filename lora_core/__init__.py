"""LoRA math and files for Qwen-Image-Edit, without ComfyUI."""

from .adapter.adapter import Adapter
from .adapter.load_report import DroppedKey, LoadReport
from .adapter.weights import (
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
    compute_delta,
)
from .base_model.families import FAMILIES, TARGET_PRESETS, count_parameters
from .base_model.family import Family
from .base_model.module_paths import parse_block_ranges
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
from .findings import Finding
from .formats.files import build_state_dict, read_adapter, read_state_dict, write_adapter
from .inspection.compare import Comparison, ModuleComparison, compare_adapters
from .inspection.inspection import Inspection, ModuleInspection, inspect_adapter
from .toolbox.compose import merge_adapters, resize_adapter
from .toolbox.composition import Composition
from .toolbox.extraction import extract_adapter

__all__ = [
    "FAMILIES",
    "TARGET_PRESETS",
    "Adapter",
    "Comparison",
    "Composition",
    "ConfigError",
    "DiffWeights",
    "DoraWeights",
    "DroppedKey",
    "Family",
    "FileError",
    "Finding",
    "Inspection",
    "KeyFormatError",
    "LoadReport",
    "LohaWeights",
    "LokrWeights",
    "LoraError",
    "LoraWeights",
    "ModuleComparison",
    "ModuleInspection",
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
    "inspect_adapter",
    "merge_adapters",
    "parse_block_ranges",
    "read_adapter",
    "read_state_dict",
    "resize_adapter",
    "write_adapter",
]

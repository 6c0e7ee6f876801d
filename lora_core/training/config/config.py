"""A run's settings as one tree of frozen dataclasses; each value is validated individually.

A configuration file is TOML (or JSON) with these sections as tables:

    name = "my edit"
    output = "runs/my_edit"
    [model]
    source = "qwen_image_edit_2511_bf16.safetensors"
    [data]
    folder = "cache/my_edit"
    [lora]
    rank = 16
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...checks import check_choice, check_number, check_text
from ...errors import ConfigError
from ...injection.plan import LoraSettings
from ..data.data_config import DataConfig
from ..model.model_config import ModelConfig
from ..objective.objective_config import ObjectiveConfig
from ..optimizer.optimizer_config import OptimizerConfig

FILE_DTYPES = ("bf16", "fp16", "fp32")
#: Names of devices on Windows, with whatever ending (Microsoft, "Naming Files, Paths, and
#: Namespaces").
DEVICE_NAMES = ("CON", "PRN", "AUX", "NUL", *(f"{x}{i}" for x in ("COM", "LPT") for i in range(10)))
#: Bytes of a file's name on all common file systems (NAME_MAX).
MAX_NAME_BYTES = 255
#: What files of a run add to its name at most: an adapter of a step, published under a number.
LONGEST_ENDING = "_00000000_ema_99.safetensors"


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    checkpoint_every: int = 250
    """Steps between checkpoints, from which a run can resume exactly."""
    keep_checkpoints: int = 2
    adapter_every: int = 250
    """Steps between adapter files to try out; 0 writes only the last one."""
    keep_adapters: int = 0
    """Older adapter files are deleted beyond so many; 0 keeps all."""
    dtype: str = "bf16"
    """Of the adapter files; checkpoints are exact."""
    health_every: int = 25
    """Steps between looks at the size of the deltas; 0 never looks."""

    def __post_init__(self) -> None:
        check_number(self, "checkpoint_every", 1)
        check_number(self, "keep_checkpoints", 1)
        check_number(self, "adapter_every", 0)
        check_number(self, "keep_adapters", 0)
        check_number(self, "health_every", 0)
        check_choice(self, "dtype", FILE_DTYPES)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    name: str
    """Of the adapter's files; its title in their metadata."""
    output: str
    """Folder of the run."""
    model: ModelConfig
    data: DataConfig
    steps: int = 2000
    seed: int = 0
    lora: LoraSettings = field(default_factory=LoraSettings)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)

    def __post_init__(self) -> None:
        check_text(self, "output")
        check_number(self, "steps", 1)
        check_number(self, "seed", 0)
        if self.optimizer.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps is {self.optimizer.warmup_steps}, more than the {self.steps} steps "
                "of the run; expected at most as many"
            )
        check_file_name(self.name)


def check_file_name(name: str) -> None:
    """ConfigError unless every file made of it can be written on Linux, macOS and Windows."""
    start = name if len(name) <= 40 else f"{name[:40]}…"
    shown = repr(start.encode(errors="backslashreplace").decode())
    is_plain = re.fullmatch(r"[^\\/:*?\"<>|\x00-\x1f\x7f]+", name) and name[0] != "."
    if not is_plain or name != name.strip() or name.endswith("."):
        raise ConfigError(
            f"name is {shown}; expected characters allowed in a file's name, without a dot "
            'or space at either end, e.g. "my edit"'
        )
    if name.partition(".")[0].strip().upper() in DEVICE_NAMES:
        raise ConfigError(
            f"name is {shown}, which Windows reserves for a device; choose another one"
        )
    try:
        size = len(f"{name}{LONGEST_ENDING}".encode())
    except UnicodeEncodeError:
        raise ConfigError(
            f"name is {shown}, which holds an incomplete character; type it again"
        ) from None
    if size > MAX_NAME_BYTES:
        raise ConfigError(
            f"name is {shown}, {len(name.encode())} bytes; expected at most "
            f"{MAX_NAME_BYTES - len(LONGEST_ENDING)}, since file systems limit bytes and the "
            "files' names are longer"
        )

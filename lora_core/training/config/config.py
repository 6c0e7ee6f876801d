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

from dataclasses import dataclass, field

from ...checks import check_choice, check_number, check_text
from ...disk.file_names import check_file_name
from ...errors import ConfigError
from ...injection.plan import LoraSettings
from ..data.data_config import DataConfig
from ..model.model_config import ModelConfig
from ..objective.objective_config import ObjectiveConfig
from ..optimizer.optimizer_config import OptimizerConfig

FILE_DTYPES = ("bf16", "fp16", "fp32")
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
                "warmup_steps is {warmup_steps}, more than the {steps} steps of the run; "
                "expected at most as many",
                warmup_steps=self.optimizer.warmup_steps,
                steps=self.steps,
            )
        check_file_name(self.name, LONGEST_ENDING)

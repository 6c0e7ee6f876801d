"""Everything a run is made of, as one tree of frozen dataclasses; each value checked on its own.

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

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..injection_plan import LoraSettings
from ..text import shorten
from .edit_block import SELECTIVE
from .flow import SAMPLINGS, SCHEDULES, WEIGHTINGS
from .losses import AUXILIARY_LOSSES
from .optimization import OPTIMIZERS
from .quantization import STORAGES
from .schedules import SHAPES

COMPUTE_DTYPES = ("bf16", "fp32")
AUTO = "auto"
FILE_DTYPES = ("bf16", "fp16", "fp32")
#: Names of devices on Windows, with whatever ending (Microsoft, "Naming Files, Paths, and
#: Namespaces").
DEVICE_NAMES = ("CON", "PRN", "AUX", "NUL", *(f"{x}{i}" for x in ("COM", "LPT") for i in range(10)))
#: Bytes of a file's name on all common file systems (NAME_MAX).
MOST_NAME_BYTES = 255
#: What files of a run add to its name at most: an adapter of a step, published under a number.
LONGEST_ENDING = "_00000000_ema_99.safetensors"
VARIANTS = ("auto", "original", "2509", "2511")
#: Of a whole number: the largest seed that PyTorch's generators and ComfyUI's fields take.
MAX_WHOLE = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    source: str
    """ComfyUI's single file, or a diffusers folder."""
    variant: str = "auto"
    """Which Qwen-Image-Edit this is, for the adapter's metadata; "auto" asks the file."""
    storage: str = "bf16"
    """How the base is kept in memory."""
    compute_dtype: str = "bf16"
    device: str = "auto"
    """"cuda", "cuda:1", "cpu"; "auto" takes the GPU where there is one."""
    gradient_checkpointing: bool | str = AUTO
    """Compute activations again in the backward pass: a third more time, far less memory.
    "selective" keeps those that are dear to compute: faster, with six times what true keeps.
    "auto" takes the fastest of the three that fits into 90 % of a GPU's free memory, 60 % where
    ComfyUI computes on it too and half of a CPU's; all give the same bits."""
    compile: bool = False
    """Compile each block once (regional torch.compile)."""
    offload_blocks: int = 0
    """So many blocks wait in host memory until they are needed."""
    vae: str = ""
    """Only for previews and for auxiliary losses that look at the image."""

    def __post_init__(self) -> None:
        check_text(self, "source")
        check_choice(self, "variant", VARIANTS)
        check_choice(self, "storage", STORAGES)
        check_choice(self, "compute_dtype", COMPUTE_DTYPES)
        check_number(self, "offload_blocks", 0)
        if self.gradient_checkpointing not in (AUTO, True, False, SELECTIVE):
            raise ConfigError(
                f"gradient_checkpointing is {show(self.gradient_checkpointing)}; expected "
                '"auto", '
                'true, false or "selective"'
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    folder: str
    """A cached training set; see `lora_core.training.dataset`."""
    batch_size: int = 1
    """Samples of one forward pass on one process."""
    caption_dropout: float = 0.0
    """Share of the samples that are shown with an empty caption."""
    use_masks: bool = True
    """Weigh the loss by the masks that items have."""
    prior: str = ""
    """A second training set whose results shall stay as they are (prior preservation)."""
    prior_weight: float = 1.0
    """The prior's loss counts so much beside the other."""

    def __post_init__(self) -> None:
        check_text(self, "folder")
        check_number(self, "batch_size", 1)
        check_number(self, "caption_dropout", 0, 1)
        check_number(self, "prior_weight", 0)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    sampling: str = "shift"
    """Where noise levels are drawn from; see `flow.choose_sigmas`."""
    shift: float = 2.2
    """For "shift": about the official schedule's at 1536 x 1024."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    schedule: str = "comfyui"
    """For "inference": whose."""
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    weighting: str = "none"
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    """Name of an auxiliary loss -> its weight; see `lora_core.training.losses`."""

    def __post_init__(self) -> None:
        check_choice(self, "sampling", SAMPLINGS)
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "weighting", tuple(WEIGHTINGS))
        check_number(self, "shift", 0, exclusive=True)
        check_number(self, "logit_mean")
        check_number(self, "logit_std", 0, exclusive=True)
        check_number(self, "sigma_min", 0, 1)
        check_number(self, "sigma_max", 0, 1)
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(
                f"sigma_min is {self.sigma_min:g} and sigma_max {self.sigma_max:g}; "
                "expected the first to be smaller"
            )
        for name, weight in self.auxiliary.items():
            if name not in AUXILIARY_LOSSES:
                raise ConfigError(
                    f"unknown auxiliary loss {show(name)}; expected one of "
                    f"{', '.join(AUXILIARY_LOSSES)}"
                )
            if not is_number(weight) or not 0 <= weight < math.inf:
                raise ConfigError(
                    f"the weight of the auxiliary loss {show(name)} is {show(weight)}; "
                    "expected a number from 0, e.g. 0.1"
                )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = "adamw"
    learning_rate: float = 1e-4
    """For "prodigy" a factor on the rate it finds, usually 1."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of the optimizer, such as weight_decay; see `optimization.OPTIMIZERS`."""
    schedule: str = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0
    """Share of the learning rate at which linear, cosine and polynomial schedules end."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    ema_decay: float = 0.0
    """Also keep an exponential moving average of the LoRA, e.g. 0.999; 0 keeps none."""

    def __post_init__(self) -> None:
        check_choice(self, "name", tuple(OPTIMIZERS))
        check_choice(self, "schedule", tuple(SHAPES))
        check_number(self, "learning_rate", 0, exclusive=True)
        check_number(self, "warmup_steps", 0)
        check_number(self, "final_factor", 0, 1)
        check_number(self, "max_grad_norm", 0)
        check_number(self, "accumulation", 1)
        check_number(self, "ema_decay", 0, 1)
        if self.ema_decay == 1:
            raise ConfigError(
                "ema_decay is 1, which would never take a step in; expected e.g. 0.999"
            )


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    checkpoint_every: int = 250
    """Steps between checkpoints, from which a run can go on exactly."""
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
                f"warmup_steps is {self.optimizer.warmup_steps} of {self.steps} steps; "
                "expected no more than there are"
            )
        check_file_name(self.name)


def check_file_name(name: str) -> None:
    """ConfigError unless every file made of it can be written on Linux, macOS and Windows."""
    start = name if len(name) <= 40 else f"{name[:40]}…"
    shown = repr(start.encode(errors="backslashreplace").decode())
    is_plain = re.fullmatch(r"[^\\/:*?\"<>|\x00-\x1f\x7f]+", name) and name[0] != "."
    if not is_plain or name != name.strip() or name.endswith("."):
        raise ConfigError(
            f"name is {shown}; expected characters that can stand in a file's name, without a dot "
            'or blank at its ends, e.g. "my edit"'
        )
    if name.partition(".")[0].strip().upper() in DEVICE_NAMES:
        raise ConfigError(f"name is {shown}, which Windows keeps for a device; choose another one")
    try:
        size = len(f"{name}{LONGEST_ENDING}".encode())
    except UnicodeEncodeError:
        raise ConfigError(
            f"name is {shown}, which holds half of a character; type it anew"
        ) from None
    if size > MOST_NAME_BYTES:
        raise ConfigError(
            f"name is {shown}, {len(name.encode())} bytes; expected at most "
            f"{MOST_NAME_BYTES - len(LONGEST_ENDING)}, since file systems count bytes and the "
            "files' names get longer"
        )


def show(value: object) -> str:
    """A value as a sentence repeats it, of whatever kind and size."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        return f"a {type(value).__name__} too large to be shown"


def is_number(value: object) -> bool:
    """A whole number of up to 64 bits, or a float that may be infinite; no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value) if isinstance(value, float) else abs(value) <= MAX_WHOLE


def check_number(
    section: object,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    exclusive: bool = False,
) -> None:
    """ConfigError unless low <= value <= high, and finite; `exclusive` leaves out `low` itself."""
    value = getattr(section, name)
    if is_number(value) and math.isfinite(value) and low <= value <= high:
        if not (exclusive and value == low):
            return
    expected = "a number"
    if math.isfinite(low):
        expected = f"a number above {low:g}" if exclusive else f"{low:g} or more"
    if math.isfinite(high):
        expected = f"{low:g} to {high:g}"
    raise ConfigError(f"{name} is {show(value)}; expected {expected}")


def check_choice(section: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(section, name)
    if value not in choices:
        raise ConfigError(f"{name} is {show(value)}; expected one of {', '.join(choices)}")


def check_text(section: object, name: str) -> None:
    value = getattr(section, name)
    if not value.strip():
        raise ConfigError(f"{name} is empty; expected a path")

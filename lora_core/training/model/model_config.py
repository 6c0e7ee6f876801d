"""Settings of the base that is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from ...checks import check_choice, check_number, check_text, show
from ...errors import ConfigError
from .edit_block import SELECTIVE
from .quantization import STORAGES

COMPUTE_DTYPES = ("bf16", "fp32")
AUTO = "auto"
VARIANTS = ("auto", "original", "2509", "2511")


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
    """Recompute activations in the backward pass: a third more time, far less memory.
    "selective" keeps those that are expensive to compute: faster, with six times what true keeps.
    "auto" takes the fastest of the three that fits into 90 % of a GPU's free memory, 60 % where
    ComfyUI computes on it too and half of a CPU's; all give bit-identical results."""
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
                'gradient_checkpointing is {gradient_checkpointing}; expected "auto", true, '
                'false or "selective"',
                gradient_checkpointing=show(self.gradient_checkpointing),
            )

"""Where a module's alpha comes from: its own tensor, else metadata, else the rank.

The order is stated because producers disagree: kohya writes a tensor, diffusers hides the value
in the header, PEFT in a file beside it, ai-toolkit and DiffSynth mean "alpha = rank" by silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RULE_TENSOR = "tensor"
RULE_RANK = "rank (the file names none)"
RULE_REPLACED = "rank (the file names NaN or Inf)"


@dataclass(frozen=True)
class LoraConfigAlpha:
    """PEFT's LoraConfig fields that decide the scale, from wherever they were found."""

    source: str
    lora_alpha: float | None
    rank_stabilised: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def resolve(self, module_path: str, rank: int) -> float | None:
        """alpha such that alpha / rank is the scale PEFT uses (peft/tuners/lora/layer.py)."""
        alpha = self.lora_alpha
        for pattern, value in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module_path):
                alpha = value
                break
        if alpha is None:
            return None
        # rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha

    @property
    def rule(self) -> str:
        return f"{self.source} (rsLoRA)" if self.rank_stabilised else self.source


@dataclass(frozen=True)
class AlphaRules:
    config: LoraConfigAlpha | None = None

    def resolve(
        self, module_path: str, rank: int, stored: float | None
    ) -> tuple[float | None, str, bool]:
        """alpha (None means the rank), the rule that gave it, and whether it had to be replaced."""
        if stored is not None:
            if not math.isfinite(stored):
                return None, RULE_REPLACED, True
            return stored, RULE_TENSOR, False
        alpha = self.config.resolve(module_path, rank) if self.config else None
        if alpha is None:
            return None, RULE_RANK, False
        if not math.isfinite(alpha):
            return None, RULE_REPLACED, True
        return alpha, self.config.rule, False


def find_alpha_rules(
    metadata: Mapping[str, str], path: Path | None, key_formats: Collection[str]
) -> AlphaRules:
    """Looks in the header, and for PEFT files in the adapter_config.json beside them.

    kohya's header field counts for kohya's own keys alone: musubi-tuner's converter folds alpha
    into the tensors of its other formats and leaves the field behind.
    """
    return AlphaRules(
        read_diffusers_metadata(metadata)
        or (read_peft_config(path) if path is not None and "peft" in key_formats else None)
        or (read_kohya_metadata(metadata) if "kohya" in key_formats else None)
    )


def read_diffusers_metadata(metadata: Mapping[str, str]) -> LoraConfigAlpha | None:
    """`lora_adapter_metadata`: a flat JSON of LoraConfig with "transformer." before each field."""
    fields = read_json(metadata.get("lora_adapter_metadata"))
    plain = {key.removeprefix("transformer."): value for key, value in fields.items()}
    return build_config("metadata", plain)


def read_peft_config(path: Path) -> LoraConfigAlpha | None:
    config = path.with_name("adapter_config.json")
    try:
        fields = read_json(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return build_config("adapter_config.json", fields)


def read_kohya_metadata(metadata: Mapping[str, str]) -> LoraConfigAlpha | None:
    return build_config("metadata", {"lora_alpha": metadata.get("ss_network_alpha")})


def build_config(source: str, fields: Mapping[str, Any]) -> LoraConfigAlpha | None:
    alpha = read_number(fields.get("lora_alpha"))
    patterns = fields.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    numbers = {pattern: read_number(value) for pattern, value in patterns.items()}
    numbers = {p: value for p, value in numbers.items() if value is not None and is_regex(p)}
    if alpha is None and not numbers:
        return None
    return LoraConfigAlpha(source, alpha, fields.get("use_rslora") is True, numbers)


def read_json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def read_number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None

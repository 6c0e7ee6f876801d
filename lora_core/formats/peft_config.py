"""PEFT's configuration of an adapter, from a header or a separate file: what determines scale.

It is untrusted, so every field is checked: what cannot be used is reported, and what would make
the tensors mean something else than lora_B @ lora_A is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..findings import WARNING, Finding
from ..messages import message
from ..text import shorten, shorten_list
from .module_patterns import ModulePatterns, build_masks, matches, parse_pattern

#: Initialisations that leave the base unchanged (peft/tuners/lora/config.py, init_lora_weights).
_PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
#: Prefixes of the initialisations that move a part out of the base, and their names.
_MOVING_STARTS = {
    "pissa": "PiSSA",
    "corda": "CorDA",
    "olora": "OLoRA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
#: Settings under which a module does not compute scale * lora_B @ lora_A -> their names.
_OTHER_MATH = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "aLoRA",
}
#: Types whose config spells lora_alpha "alpha" (LoHaConfig, LoKrConfig).
_LYCORIS_TYPES = ("LOHA", "LOKR")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


@dataclass(frozen=True)
class PeftConfig:
    """The fields that determine the scale, and those that identify the adapter."""

    source: str
    """"metadata" or the name of a file; part of the report."""
    alpha: float | None = None
    rank: int | None = None
    rank_stabilised: bool = False
    alpha_pattern: ModulePatterns = field(default_factory=lambda: ModulePatterns({}))
    rank_pattern: ModulePatterns = field(default_factory=lambda: ModulePatterns({}))
    target_modules: frozenset[str] | str | None = None
    """Ends of names, or one pattern for the whole name; None where it is not stated."""
    is_lycoris: bool = False
    """LoHa or LoKr as PEFT trains them: scaled by alpha / rank also where no factor has a rank."""
    unusable_reason: str | None = None
    """Why the tensors do not mean what they seem to, for a message: "was trained ..."."""
    findings: tuple[Finding, ...] = ()
    """One for each field that could not be used."""
    is_plain_field: bool = False
    """Only a number in the header, whose meaning no specification states."""

    @property
    def states_alpha(self) -> bool:
        return self.alpha is not None or bool(self.alpha_pattern.values)

    @property
    def rule(self) -> str:
        return f"{self.source} (rsLoRA)" if self.rank_stabilised else self.source

    def resolve(self, module_path: str, rank: int) -> float | None:
        """alpha such that alpha / rank is the scale PEFT uses (peft/tuners/lora/layer.py)."""
        alpha = self.alpha_pattern.find(module_path)
        alpha = self.alpha if alpha is None else alpha
        # rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        return alpha * math.sqrt(rank) if alpha is not None and self.rank_stabilised else alpha

    def resolve_rank(self, module_path: str) -> int | None:
        rank = self.rank_pattern.find(module_path)
        return self.rank if rank is None else int(rank)

    def find_contradiction(self, ranks: Mapping[str, int | None]) -> str | None:
        """Why this cannot be the config of these modules; None where it can.

        Args:
            ranks: module path -> rank; None where the tensors do not determine it.
        """
        for path, rank in ranks.items():
            expected = self.resolve_rank(path)
            if None not in (expected, rank) and expected != rank:
                return message(
                    "it says rank {expected:g}, and {path} has {rank}",
                    expected=expected,
                    path=path,
                    rank=rank,
                )
        missing = next((path for path in ranks if not self.is_target(path)), None)
        return (
            None
            if missing is None
            else message("it does not name {missing} among its targets", missing=missing)
        )

    def is_target(self, module_path: str) -> bool:
        if self.target_modules is None:
            return True
        if isinstance(self.target_modules, str):
            parsed = parse_pattern(self.target_modules)
            # A pattern of another form may match: only a program that runs it knows.
            masks = build_masks(module_path)
            return parsed is None or matches(parsed[1], masks, len(module_path), [0])
        parts = module_path.split(".")
        return any(".".join(parts[i:]) in self.target_modules for i in range(len(parts)))


def build_config(source: str, fields: Mapping[str, Any]) -> PeftConfig:
    """The parsed fields; those that cannot be used become findings. Never raises."""
    reader = _FieldReader(source)
    peft_type = str(fields.get("peft_type") or "").upper()
    is_lycoris = peft_type in _LYCORIS_TYPES
    alpha = reader.read_number(fields, "lora_alpha")
    if alpha is None and is_lycoris:
        alpha = reader.read_number(fields, "alpha")
    rank = reader.read_number(fields, "r")
    start = fields.get("init_lora_weights")
    if not is_known_start(start):
        reader.complain(
            "init_lora_weights",
            message("{start}, an unknown initialisation", start=shorten(repr(start), 40)),
        )
    return PeftConfig(
        source,
        alpha,
        None if rank is None or not math.isfinite(rank) else int(rank),
        reader.read_flag(fields, "use_rslora"),
        reader.read_patterns(fields, "alpha_pattern"),
        reader.read_patterns(fields, "rank_pattern"),
        read_targets(fields.get("target_modules")),
        is_lycoris,
        explain_unusable(source, fields),
        tuple(reader.findings),
    )


class _FieldReader:
    """Reads fields of one config and records a finding for each invalid one."""

    def __init__(self, source: str):
        self.source = source
        self.findings: list[Finding] = []

    def complain(self, name: str, what: str) -> None:
        text = message(
            "{source}: {name} is {what}; the strength may be wrong",
            source=self.source,
            name=name,
            what=what,
        )
        self.findings.append(Finding("config_field", WARNING, text, 1))

    def read_number(self, fields: Mapping[str, Any], name: str) -> float | None:
        value = fields.get(name)
        number = read_number(value)
        if value is not None and number is None:
            self.complain(
                name, message("{value} instead of a number", value=shorten(repr(value), 40))
            )
        return number

    def read_flag(self, fields: Mapping[str, Any], name: str) -> bool:
        value = fields.get(name)
        if value is not None and not isinstance(value, bool):
            self.complain(
                name, message("{value} instead of true or false", value=shorten(repr(value), 40))
            )
        return value is True

    def read_patterns(self, fields: Mapping[str, Any], name: str) -> ModulePatterns:
        values = fields.get(name)
        if values is None:
            return ModulePatterns({})
        if not isinstance(values, dict):
            self.complain(
                name,
                message("{values} instead of names with numbers", values=shorten(repr(values), 40)),
            )
            return ModulePatterns({})
        numbers = {pattern: read_number(value) for pattern, value in values.items()}
        patterns = ModulePatterns({p: n for p, n in numbers.items() if n is not None})
        refused = [p for p, n in numbers.items() if n is None] + patterns.unsupported
        if refused:
            shown = shorten_list([repr(shorten(pattern, 60)) for pattern in refused], 2)
            text = message(
                "{source}: {num_refused} of {num_values} entries of {name} are not taken "
                "({shown}): expected module names with numbers; the strength may be wrong "
                "there",
                source=self.source,
                num_refused=len(refused),
                num_values=len(values),
                name=name,
                shown=shown,
            )
            self.findings.append(Finding("pattern_not_taken", WARNING, text, len(refused)))
        return patterns


def read_number(value: Any) -> float | None:
    """A JSON number, or a text that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value[:100]):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # longer than the part that was looked at, or an integer
        return None


def read_targets(value: Any) -> frozenset[str] | str | None:
    if isinstance(value, str):
        return value if value and value != "all-linear" else None
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return frozenset(value)
    return None


def is_known_start(value: Any) -> bool:
    start = str(value).lower()
    return value is None or start in _PLAIN_STARTS or find_moving_start(value) is not None


def find_moving_start(value: Any) -> str | None:
    """The name of an initialisation that moved the base: B @ A then holds a part of the base."""
    start = str(value).lower()
    return next((shown for begin, shown in _MOVING_STARTS.items() if start.startswith(begin)), None)


def explain_unusable(source: str, fields: Mapping[str, Any]) -> str | None:
    """Why the tensors are no plain LoRA, DoRA, LoHa or LoKr, for a message; None if they are."""
    start = find_moving_start(fields.get("init_lora_weights"))
    if start is not None:
        return message(
            "was trained from a {start} start ({source}: init_lora_weights), which moved "
            "part of the model into the LoRA; on the plain model that part would count "
            "twice. Save it converted: PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion.",
            start=start,
            source=source,
        )
    found = next((field for field in _OTHER_MATH if fields.get(field)), None)
    if found is not None:
        return message(
            "was trained as {other_math} ({source}: {found}), whose modules compute "
            "something other than a LoRA; expected a plain LoRA, DoRA, LoHa or LoKr.",
            other_math=_OTHER_MATH[found],
            source=source,
            found=found,
        )
    return None

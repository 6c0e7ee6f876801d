"""What a reader found in an adapter file, as data and as the few lines a node shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..base_model.families import FAMILIES, get_family
from ..findings import NOTE, WARNING, Finding, list_texts
from ..text import format_bytes, format_count, join_counts, shorten, shorten_list

#: Of a key in the JSON. No trainer's comes near it; an untrusted one may fill the whole file.
MAX_KEY = 500


@dataclass(frozen=True, slots=True)
class DroppedKey:
    """A key that is not part of what was loaded, and why."""

    key: str
    reason: str
    nearest: str | None = None
    """The known module path that looks most like it."""

    def __str__(self) -> str:
        hint = f" (nearest known module: {self.nearest})" if self.nearest else ""
        return f"{shorten(self.key, 120)}: {self.reason}{hint}"


@dataclass(frozen=True)
class LoadReport:
    """Facts about a loaded file. Every list is complete; `to_text` shortens."""

    name: str = ""
    num_keys: int = 0
    num_matched_keys: int = 0
    num_modules: int = 0
    size_bytes: int = 0
    key_format: str = ""
    """E.g. "kohya", or "mixed: comfyui, kohya"."""
    prefixes: Mapping[str, int] = field(default_factory=dict)
    """Prefix as found in the file -> number of keys."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)
    scales: Mapping[float, int] = field(default_factory=dict)
    alphas: Mapping[float, int] = field(default_factory=dict)
    alpha_rules: Mapping[str, int] = field(default_factory=dict)
    """Rule that gave alpha -> number of modules: "tensor", "metadata", "metadata (rsLoRA)", ..."""
    family: str | None = None
    """Name of the base models it was made for, e.g. "qwen-image"; None where nothing tells."""
    preset: str | None = None
    blocks: str = ""
    width: int | None = None
    """Model width implied by the shapes, e.g. 3072."""
    unmatched: tuple[DroppedKey, ...] = ()
    duplicates: tuple[DroppedKey, ...] = ()
    non_finite: tuple[str, ...] = ()
    """Modules whose alpha was NaN or Inf and was replaced by the rank."""
    variants: tuple[str, ...] = ()
    """Variants the file claims: "original", "2509", "2511", "text-to-image"."""
    hints: tuple[str, ...] = ()
    """Where those claims come from, one sentence each."""

    found: tuple[Finding, ...] = ()
    """What the reader reports in addition to the fields above."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the user should know before continuing, the warnings first."""
        listed = []

        def add(kind: str, count: int, text: str) -> None:
            if count:
                listed.append(Finding(kind, WARNING, text, count))

        add(
            "unmatched_keys",
            len(self.unmatched),
            f"{len(self.unmatched)} of {self.num_keys} keys were not loaded: "
            + shorten_list([str(key) for key in self.unmatched], 3),
        )
        add(
            "duplicate_keys",
            len(self.duplicates),
            f"{len(self.duplicates)} keys name a module a second time and were left out: "
            + shorten_list([str(key) for key in self.duplicates], 3),
        )
        add(
            "alpha_not_finite",
            len(self.non_finite),
            f"alpha is NaN or Inf in {format_count(len(self.non_finite), 'module')}; the rank is "
            f"used instead (scale 1): {shorten_list(self.non_finite, 2)}",
        )
        add(
            "alpha_zero",
            # By the scale: in OFT, which has none, alpha is a limit, and 0 means no limit.
            sum(count for scale, count in self.scales.items() if scale == 0),
            "alpha is 0 in some modules, so these do nothing",
        )
        add(
            "text_to_image",
            int(self.variants == ("text-to-image",)),
            "the file says it was trained for text-to-image Qwen-Image, not for an edit model",
        )
        listed += self.found
        return (
            *(finding for finding in listed if finding.severity != NOTE),
            *(finding for finding in listed if finding.severity == NOTE),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """The texts of those findings that are warnings."""
        return list_texts(self.findings, WARNING)

    def to_text(self) -> str:
        lines = [
            f"{self.name}: matched {format_count(self.num_modules, 'module')}, "
            f"{self.num_matched_keys} of {self.num_keys} keys",
            f"format {self.key_format} ({', '.join(p or 'no prefix' for p in self.prefixes)}), "
            f"{join_counts(self.kinds)}, {join_counts(self.dtypes)}, "
            f"{format_bytes(self.size_bytes)}",
            f"rank {join_counts(self.ranks)}; scale {join_counts(self.scales)}; "
            f"alpha {join_counts(self.alphas)} from {join_counts(self.alpha_rules)}",
            f"{describe_family(self.family)}, targets {self.preset or 'custom'}; "
            f"blocks {self.blocks or 'none'}"
            + (f"; model width {self.width}" if self.width else ""),
            *self.hints,
            *(f"Warning: {text}" for text in self.warnings),
            *(f"Note: {text}" for text in list_texts(self.findings, NOTE)),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; "findings" are for programs: kind, severity, text, count."""
        values = {name: value for name, value in asdict(self).items() if name != "found"}
        for name in ("unmatched", "duplicates"):
            values[name] = [{**key, "key": key["key"][:MAX_KEY]} for key in values[name]]
        findings = [asdict(finding) for finding in self.findings]
        return {**values, "findings": findings, "warnings": self.warnings}


def describe_family(name: str | None) -> str:
    """Its title, or those of all that it may be."""
    family = get_family(name)
    return " or ".join(one.title for one in FAMILIES) if family is None else family.title

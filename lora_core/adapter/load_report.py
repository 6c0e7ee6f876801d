"""What a reader found in an adapter file, as data and as the few lines a node shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..base_model.families import FAMILIES, get_family
from ..findings import NOTE, WARNING, Finding, list_texts, mark_warnings
from ..messages import join_messages, message
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
        return str(self.describe())

    def describe(self) -> str:
        text = join_messages(": ", [shorten(self.key, 120), self.reason])
        if self.nearest:
            text += message(" (nearest known module: {nearest})", nearest=self.nearest)
        return text


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
            message(
                "{count} of {total} keys were not loaded: {keys}",
                count=len(self.unmatched),
                total=self.num_keys,
                keys=shorten_list([key.describe() for key in self.unmatched], 3),
            ),
        )
        add(
            "duplicate_keys",
            len(self.duplicates),
            message(
                "{count} keys name a module a second time and were left out: {keys}",
                count=len(self.duplicates),
                keys=shorten_list([key.describe() for key in self.duplicates], 3),
            ),
        )
        add(
            "alpha_not_finite",
            len(self.non_finite),
            message(
                "alpha is NaN or Inf in {num_modules}; the rank is used instead (scale 1): "
                "{modules}",
                num_modules=format_count(len(self.non_finite), "module"),
                modules=shorten_list(self.non_finite, 2),
            ),
        )
        add(
            "alpha_zero",
            # By the scale: in OFT, which has none, alpha is a limit, and 0 means no limit.
            sum(count for scale, count in self.scales.items() if scale == 0),
            message("alpha is 0 in some modules, so these do nothing"),
        )
        add(
            "text_to_image",
            int(self.variants == ("text-to-image",)),
            message(
                "the file says it was trained for text-to-image Qwen-Image, not for an edit model"
            ),
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
            message(
                "{name}: matched {num_modules}, {num_matched} of {num_keys} keys",
                name=self.name,
                num_modules=format_count(self.num_modules, "module"),
                num_matched=self.num_matched_keys,
                num_keys=self.num_keys,
            ),
            message(
                "format {key_format} ({prefixes}), {kinds}, {dtypes}, {size}",
                key_format=self.key_format,
                prefixes=join_messages(", ", [p or message("no prefix") for p in self.prefixes]),
                kinds=join_counts(self.kinds),
                dtypes=join_counts(self.dtypes),
                size=format_bytes(self.size_bytes),
            ),
            message(
                "rank {ranks}; scale {scales}; alpha {alphas} from {rules}",
                ranks=join_counts(self.ranks),
                scales=join_counts(self.scales),
                alphas=join_counts(self.alphas),
                rules=join_counts(self.alpha_rules),
            ),
            message(
                "{family}, targets {preset}; blocks {blocks}{width}",
                family=describe_family(self.family),
                preset=self.preset or message("custom"),
                blocks=self.blocks or message("none"),
                width=message("; model width {width}", width=self.width) if self.width else "",
            ),
            *self.hints,
            *mark_warnings(self.warnings),
            *(message("Note: {text}", text=text) for text in list_texts(self.findings, NOTE)),
        ]
        return join_messages("\n", lines)

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
    return (
        join_messages(" or ", [one.title for one in FAMILIES]) if family is None else family.title
    )

"""Where a module's alpha comes from: its own tensor, else a config or header field, else the rank.

The order is stated because producers disagree: kohya writes a tensor, diffusers puts the value in
the header, PEFT in a separate file; ai-toolkit and DiffSynth write none and mean "alpha = rank".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..disk.json_reader import parse_object, read_object
from ..errors import FileError, KeyFormatError, MissingFileError
from ..findings import NOTE, WARNING, Finding
from ..messages import message, take_clause
from ..text import shorten
from .peft_config import PeftConfig, build_config, read_number

RULE_TENSOR = message("tensor")
RULE_RANK = message("rank (the file names none)")
RULE_REPLACED = message("rank (the file names NaN or Inf)")
#: Of the text of a config. One with an entry for every module takes a tenth of a megabyte.
MAX_CONFIG_BYTES = 4 << 20
#: What everything is computed in; a larger alpha is infinite there.
MAX_ALPHA = torch.finfo(torch.float32).max

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
#: Header fields with a LoraConfig as JSON; the first is diffusers'.
CONFIG_FIELDS = ("lora_adapter_metadata", "lora_config", "adapter_config", "peft_config")
#: Plain header fields, as LightX2V writes them and sglang reads them.
ALPHA_FIELDS = ("lora_alpha", "network_alpha", "alpha")
KOHYA_ALPHA = "ss_network_alpha"
#: kohya's words for "modules differ" and "there is none".
NO_NUMBER = ("", "None", "Dynamic")


@dataclass(frozen=True)
class AlphaRules:
    """The configs that were found, the first choice first, and what could not be read."""

    configs: tuple[PeftConfig, ...] = ()
    unreadable: str | None = None
    """The source whose text could not be read; it may have held alpha."""
    findings: tuple[Finding, ...] = ()
    fallback: str = RULE_RANK
    """The rule's name where the rank is used instead."""

    @property
    def config(self) -> PeftConfig | None:
        """The one that gives alpha."""
        return next((config for config in self.configs if config.states_alpha), None)

    def resolve(
        self, module_path: str, rank: int, stored: float | None
    ) -> tuple[float | None, str, bool]:
        """alpha (None means the rank), the rule that gave it, and whether it had to be replaced."""
        rule, alpha, config = RULE_TENSOR, stored, self.config
        if alpha is None and config is not None:
            rule, alpha = config.rule, config.resolve(module_path, rank)
        if alpha is None:
            return None, self.fallback, False
        if not math.isfinite(alpha) or abs(alpha) > MAX_ALPHA:
            return None, RULE_REPLACED, True
        return alpha, rule, False

    def settle(self, ranks: Mapping[str, int | None], name: str) -> AlphaRules:
        """The rules for the adapter of these modules: another adapter's config is left out.

        Args:
            ranks: module path -> rank; None where the tensors do not determine it.
            name: of the adapter, for errors.

        Raises:
            KeyFormatError: by its config the tensors mean something else than they seem to.
        """
        kept: list[PeftConfig] = []
        found, fallback = list(self.findings), self.fallback
        if self.unreadable:
            fallback = message("rank ({unreadable} cannot be read)", unreadable=self.unreadable)
        for config in self.configs:
            contradiction = config.find_contradiction(ranks)
            if contradiction and config.source == PEFT_CONFIG:
                # In a folder of many adapters it may be another one's.
                if not any(one.states_alpha for one in kept):
                    found.append(report_foreign_config(config, contradiction))
                    fallback = message("rank ({source} is another adapter's)", source=config.source)
                continue
            if config.unusable_reason:
                raise KeyFormatError(
                    "{name} {unusable_reason}",
                    name=shorten(name),
                    unusable_reason=config.unusable_reason,
                )
            found += config.findings
            if contradiction and config.states_alpha:
                text = message(
                    "{source} does not fit the tensors ({contradiction}); the strength may "
                    "be wrong",
                    source=config.source,
                    contradiction=contradiction,
                )
                found.append(Finding("config_mismatch", WARNING, text, 1))
            kept.append(config)
        found += report_contradictions(kept)
        if fallback == RULE_RANK and any(config.findings for config in kept):
            fallback = message("rank ({source} cannot be read)", source=kept[0].source)
        return AlphaRules(tuple(kept), self.unreadable, tuple(found), fallback)


def report_foreign_config(config: PeftConfig, why: str) -> Finding:
    text = message(
        "{source} next to the file belongs to another adapter ({why}), so it is not used",
        source=config.source,
        why=why,
    )
    return Finding("config_of_another", WARNING, text, 1)


def report_contradictions(configs: Sequence[PeftConfig]) -> list[Finding]:
    stating = [config for config in configs if config.alpha is not None]
    others = [config for config in stating if config.alpha != stating[0].alpha]
    if not others:
        return []
    text = message(
        "alpha is {alpha:g} in {source} and {other_alpha:g} in {other_source}; the first is used",
        alpha=stating[0].alpha,
        source=stating[0].source,
        other_alpha=others[0].alpha,
        other_source=others[0].source,
    )
    return [Finding("alpha_contradiction", WARNING, text, len(others))]


def find_alpha_rules(
    metadata: Mapping[str, str], path: Path | None, key_formats: Collection[str]
) -> AlphaRules:
    """Looks in the header, and for PEFT files in the adapter_config.json next to them.

    kohya's header field counts only with kohya's own keys: musubi-tuner's converter folds alpha
    into the tensors of its other formats and leaves the field behind.
    """
    texts: list[tuple[str, str, Callable[[], dict]]] = []
    for header_field in CONFIG_FIELDS:
        if metadata.get(header_field):
            what = message("the header's {header_field}", header_field=header_field)
            texts.append(("metadata", what, partial(parse_header, metadata[header_field], what)))
    if path is not None and ("peft" in key_formats or path.name == PEFT_FILE):
        beside = path.with_name(PEFT_CONFIG)
        texts.append((PEFT_CONFIG, PEFT_CONFIG, partial(read_object, beside, MAX_CONFIG_BYTES)))
    configs, findings, unreadable = [], [], None
    for source, what, read in texts:
        try:
            configs.append(build_config(source, read()))
        except MissingFileError:
            pass
        except FileError as e:
            text = message("{error}, so its alpha is lost", error=take_clause(e))
            findings.append(Finding("config_unreadable", WARNING, text, 1))
            unreadable = unreadable or what
    is_kohya = "kohya" in key_formats
    if is_kohya and (config := read_plain_field(metadata, KOHYA_ALPHA, "ss_network_dim")):
        configs.append(config)
    elif not is_kohya and not any(config.states_alpha for config in configs):
        findings += note_unused_field(metadata)
    plain = (read_plain_field(metadata, header_field, "rank") for header_field in ALPHA_FIELDS)
    configs += [config for config in plain if config is not None]
    return AlphaRules(tuple(configs), unreadable, tuple(findings))


def parse_header(text: str, what: str) -> dict[str, Any]:
    """A flat JSON of LoraConfig; diffusers puts "transformer." before each field."""
    if len(text) > MAX_CONFIG_BYTES:
        raise FileError(
            "{what} holds {length:,} characters; expected a config.",
            what=what,
            length=len(text),
        )
    return {
        key.removeprefix("transformer."): value for key, value in parse_object(text, what).items()
    }


def read_plain_field(
    metadata: Mapping[str, str], alpha_field: str, rank_field: str
) -> PeftConfig | None:
    text = metadata.get(alpha_field)
    if text is None or text.strip() in NO_NUMBER:
        return None
    is_kohya = alpha_field == KOHYA_ALPHA
    source = (
        "metadata" if is_kohya else message("the header's {alpha_field}", alpha_field=alpha_field)
    )
    fields = {"lora_alpha": text, "r": read_number(metadata.get(rank_field))}
    return replace(build_config(source, fields), is_plain_field=not is_kohya)


def note_unused_field(metadata: Mapping[str, str]) -> list[Finding]:
    alpha, rank = (read_number(metadata.get(f"ss_network_{what}")) for what in ("alpha", "dim"))
    if alpha is None or alpha == rank:
        return []
    text = message(
        "the header's {kohya_alpha} ({metadata}) is not used: converters that store alpha "
        "in the tensors leave it in the header",
        kohya_alpha=KOHYA_ALPHA,
        metadata=shorten(metadata[KOHYA_ALPHA], 20),
    )
    return [Finding("alpha_field_unused", NOTE, text, 1)]

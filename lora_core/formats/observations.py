"""What a reader did that the result does not show: one finding per kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..adapter.weights import ModuleWeights
from ..base_model.families import FAMILIES
from ..base_model.family import Family
from ..findings import NOTE, WARNING, Finding
from ..text import format_count, shorten_list
from .alpha import AlphaRules
from .building import ModuleBuilder
from .parsed_key import OF_TEXT_ENCODER, UnknownKey
from .sources import Sources

NUMBER_WORDS = {2: "two", 3: "three"}
#: |alpha / rank| outside is no choice of a trainer: 1e38 makes every image black.
SANE_SCALE = (1e-6, 1e3)


def find_more(
    modules: Mapping[str, ModuleWeights],
    builder: ModuleBuilder,
    rules: AlphaRules,
    sources: Sources,
    family: Family | None,
    unknown: Sequence[UnknownKey],
) -> Iterator[Finding]:
    yield from rules.findings
    low, high = SANE_SCALE
    extreme = {
        path: weights.scale
        for path, weights in modules.items()
        if weights.scale and not low <= abs(weights.scale) <= high
    }
    if extreme:
        path = next(iter(extreme))
        text = (
            f"alpha / rank is {extreme[path]:g} in {len(extreme)} modules such as {path}, far "
            f"outside {low:g} to {high:g}; alpha is probably wrong in the file"
        )
        yield Finding("extreme_scale", WARNING, text, len(extreme))
    if builder.empty:
        text = (
            f"{format_count(len(builder.empty), 'module')} with a LoRA of rank 0, which adds "
            f"nothing: {shorten_list(builder.empty, 2)}"
        )
        yield Finding("rank_zero", NOTE, text, len(builder.empty))
    if builder.repeated:
        text = (
            f"{format_count(len(builder.repeated), 'module')} both alone and in a fused one; the "
            f"single ones are used: {shorten_list(builder.repeated, 2)}"
        )
        yield Finding("fused_repeated", WARNING, text, len(builder.repeated))
    for fusion, number in builder.num_split.items():
        text = (
            f"{fusion.title} are fused in {format_count(number, 'module')}; each is split into "
            f"{NUMBER_WORDS[len(fusion.members)]}"
        )
        yield Finding("fused_split", NOTE, text, number)
    if sources.borrowed:
        key = sources.borrowed[0]
        text = (
            f"{len(sources.borrowed)} alphas or magnitudes have another prefix than their modules' "
            f"weights and are used, such as {key.key}"
        )
        yield Finding("other_prefix", NOTE, text, len(sources.borrowed))
    yield from report_rules(builder.rules, rules)
    yield from report_family(family, len(modules))
    yield from report_text_encoder(unknown)


def report_rules(counts: Mapping[str, int], rules: AlphaRules) -> Iterator[Finding]:
    """Where alpha is taken by a rule that no specification states."""
    guessed = counts.get(rules.fallback, 0)
    if guessed:
        text = (
            f"alpha of {format_count(guessed, 'module')} is the {rules.fallback}, so their scale "
            "is 1"
        )
        yield Finding("alpha_from_rank", NOTE, text, guessed)
    config = rules.config
    if config is not None and config.is_plain_field and counts.get(config.rule):
        number = counts[config.rule]
        text = (
            f"alpha of {format_count(number, 'module')} is {config.alpha:g}, from {config.source}"
        )
        yield Finding("alpha_from_field", NOTE, text, number)


def report_family(family: Family | None, num_modules: int) -> Iterator[Finding]:
    """Whether the family is unknown, or its licence passes to the adapter."""
    if family is None:
        titles = " or ".join(one.title for one in FAMILIES)
        text = (
            f"names, sizes and number of blocks fit {titles}, and nothing else tells which it was "
            "made for"
        )
        yield Finding("family_unknown", NOTE, text, num_modules)
    elif not family.is_commercial:
        text = (
            f"{family.title} is for non-commercial use only ({family.licence}), and so are LoRAs "
            "trained on it"
        )
        yield Finding("licence", NOTE, text)


def report_text_encoder(unknown: Sequence[UnknownKey]) -> Iterator[Finding]:
    found = [key for key in unknown if key.reason == OF_TEXT_ENCODER]
    if found:
        text = (
            f"{format_count(len(found), 'key')} of a text encoder, which is left as it is; "
            "ComfyUI's Load LoRA applies such keys to its CLIP"
        )
        yield Finding("text_encoder_keys", NOTE, text, len(found))

"""What a reader did that the result does not show: one finding per kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..adapter.weights import ModuleWeights
from ..base_model.families import FAMILIES
from ..base_model.family import Family
from ..findings import NOTE, WARNING, Finding
from ..messages import message
from ..text import format_count, shorten_list
from .alpha import AlphaRules
from .building import ModuleBuilder
from .parsed_key import OF_TEXT_ENCODER, UnknownKey
from .sources import Sources

NUMBER_WORDS = {2: message("two"), 3: message("three")}
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
        text = message(
            "alpha / rank is {extreme:g} in {num_extreme} modules such as {path}, far "
            "outside {low:g} to {high:g}; alpha is probably wrong in the file",
            extreme=extreme[path],
            num_extreme=len(extreme),
            path=path,
            low=low,
            high=high,
        )
        yield Finding("extreme_scale", WARNING, text, len(extreme))
    yield from report_builder(builder)
    if sources.borrowed:
        key = sources.borrowed[0]
        text = message(
            "{num_borrowed} alphas or magnitudes have another prefix than their modules' "
            "weights and are used, such as {key}",
            num_borrowed=len(sources.borrowed),
            key=key.key,
        )
        yield Finding("other_prefix", NOTE, text, len(sources.borrowed))
    yield from report_rules(builder.rules, rules)
    yield from report_family(family, len(modules))
    yield from report_text_encoder(unknown)


def report_builder(builder: ModuleBuilder) -> Iterator[Finding]:
    """What was done to modules that are empty, or fused with others."""
    if builder.empty:
        text = message(
            "{num_modules} with a LoRA of rank 0, which adds nothing: {empty}",
            num_modules=format_count(len(builder.empty), "module"),
            empty=shorten_list(builder.empty, 2),
        )
        yield Finding("rank_zero", NOTE, text, len(builder.empty))
    if builder.repeated:
        text = message(
            "{num_modules} both alone and in a fused one; the single ones are used: {repeated}",
            num_modules=format_count(len(builder.repeated), "module"),
            repeated=shorten_list(builder.repeated, 2),
        )
        yield Finding("fused_repeated", WARNING, text, len(builder.repeated))
    for fusion, number in builder.num_split.items():
        text = message(
            "{title} are fused in {num_modules}; each is split into {parts}",
            title=fusion.title,
            num_modules=format_count(number, "module"),
            parts=NUMBER_WORDS[len(fusion.members)],
        )
        yield Finding("fused_split", NOTE, text, number)


def report_rules(counts: Mapping[str, int], rules: AlphaRules) -> Iterator[Finding]:
    """Where alpha is taken by a rule that no specification states."""
    guessed = counts.get(rules.fallback, 0)
    if guessed:
        text = message(
            "alpha of {num_modules} is the {fallback}, so their scale is 1",
            num_modules=format_count(guessed, "module"),
            fallback=rules.fallback,
        )
        yield Finding("alpha_from_rank", NOTE, text, guessed)
    config = rules.config
    if config is not None and config.is_plain_field and counts.get(config.rule):
        number = counts[config.rule]
        text = message(
            "alpha of {num_modules} is {alpha:g}, from {source}",
            num_modules=format_count(number, "module"),
            alpha=config.alpha,
            source=config.source,
        )
        yield Finding("alpha_from_field", NOTE, text, number)


def report_family(family: Family | None, num_modules: int) -> Iterator[Finding]:
    """Whether the family is unknown, or its licence passes to the adapter."""
    if family is None:
        titles = " or ".join(one.title for one in FAMILIES)
        text = message(
            "names, sizes and number of blocks fit {titles}, and nothing else tells which "
            "it was made for",
            titles=titles,
        )
        yield Finding("family_unknown", NOTE, text, num_modules)
    elif not family.is_commercial:
        text = message(
            "{title} is for non-commercial use only ({licence}), and so are LoRAs trained on it",
            title=family.title,
            licence=family.licence,
        )
        yield Finding("licence", NOTE, text)


def report_text_encoder(unknown: Sequence[UnknownKey]) -> Iterator[Finding]:
    found = [key for key in unknown if key.reason == OF_TEXT_ENCODER]
    if found:
        text = message(
            "{num_keys} of a text encoder, which is left as it is; ComfyUI's Load LoRA "
            "applies such keys to its CLIP",
            num_keys=format_count(len(found), "key"),
        )
        yield Finding("text_encoder_keys", NOTE, text, len(found))

"""The strengths a sweep runs over; "auto" compares the adapter with the model's weights."""

from __future__ import annotations

from collections.abc import Iterable

from ...lora_core import Adapter, ConfigError
from ...lora_core.algebra.products import compute_square, explain_no_delta
from ...lora_core.messages import message
from ...lora_core.sweep.strength_choice import choose_strengths
from ...lora_core.sweep.strength_grammar import AutoStrengths, parse_strengths
from ...lora_core.text import format_percent
from .. import host
from ..patching.matching import match_adapter

#: Number of modules measured, evenly spaced; measuring all would read the whole model.
MAX_MODULES = 24


def resolve_strengths(
    text: str, model: host.ModelPatcher, adapters: Iterable[Adapter]
) -> tuple[tuple[float, ...], str]:
    """The strengths, and for "auto" the reason for them; the strongest adapter decides.

    Raises:
        ConfigError: the text is not a list, or "auto" cannot measure any of the adapters.
    """
    parsed = parse_strengths(text)
    if not isinstance(parsed, AutoStrengths):
        return parsed, ""
    ratios = [(measure_ratio(model, adapter), adapter.name) for adapter in adapters]
    if not ratios:
        raise ConfigError("strengths is 'auto', and there is no adapter to measure; connect one")
    ratio, name = max(ratios)
    strengths = choose_strengths(ratio, parsed.count)
    listed = ", ".join(f"{strength:g}" for strength in strengths)
    return (
        strengths,
        message(
            "auto: |delta| of {name} is {ratio} of |W|, so the strengths are {listed}",
            name=name,
            ratio=format_percent(ratio),
            listed=listed,
        ),
    )


def measure_ratio(model: host.ModelPatcher, adapter: Adapter) -> float:
    """|delta|_F / |W|_F over up to MAX_MODULES of the modules it matches in this model."""
    match = match_adapter(model, adapter)
    matched = sorted(match.side_path)
    paths = [path for path in matched if explain_no_delta(adapter.modules[path]) is None]
    squares, weights, reason = 0.0, 0.0, ""
    for path in choose_evenly(paths, MAX_MODULES):
        place = match.layout.find_place(path)
        assert place is not None  # the model has it
        norm = host.measure_weight(model, place)
        if norm.value is None:
            reason = message(
                ": {path} cannot be measured, as {reason}", path=path, reason=norm.reason
            )
        else:
            squares += compute_square(adapter.modules[path])
            weights += norm.value**2
    adapter.release()
    if weights == 0:
        raise ConfigError(
            "strengths is 'auto', and no delta of {adapter} can be measured relative to this "
            "MODEL's weights{reason}; write them yourself, such as '0, 0.5, 1, 2'",
            adapter=adapter.name,
            reason=reason,
        )
    return (squares / weights) ** 0.5


def choose_evenly(items: list[str], count: int) -> list[str]:
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]

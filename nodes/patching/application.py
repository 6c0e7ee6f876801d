"""Applies adapters to a MODEL: chooses side path or merge per module, and reports which and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...lora_core import Adapter, ConfigError, TargetError
from ...lora_core.adapter.strengths import Strengths
from ...lora_core.findings import NOTE, WARNING, Finding, list_texts, mark_warnings
from ...lora_core.messages import join_messages, message
from ...lora_core.text import format_count, shorten_list
from .. import host
from .layouts import check_layout
from .matching import Match, match_adapter
from .side_path import Entry, add_to_side_path

logger = logging.getLogger(__name__)

AUTO, SIDE_PATH, MERGE = MODES = ("auto", "side path", "merge")


@dataclass
class Application:
    """A patched clone, and a report of what was done to it."""

    model: host.ModelPatcher
    lines: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """Notes are also among the lines; warnings follow them."""

    def note(self, kind: str, text: str, count: int | None = None) -> None:
        self.lines.append(text)
        self.findings.append(Finding(kind, NOTE, text, count))

    def warn(self, kind: str, text: str, count: int | None = None) -> None:
        self.findings.append(Finding(kind, WARNING, text, count))

    @property
    def warnings(self) -> tuple[str, ...]:
        return list_texts(self.findings, WARNING)

    def to_text(self) -> str:
        return join_messages("\n", [*self.lines, *mark_warnings(self.warnings)])


def apply_adapters(
    model: host.ModelPatcher,
    layers: Iterable[tuple[Adapter, Strengths]],
    mode: str = AUTO,
    readers: Sequence[str] = (),
    node: host.RunningNode | None = None,
) -> Application:
    """Applies each adapter to a clone of `model`; all of them are checked before the first.

    Args:
        readers: downstream nodes that read the weights; see `host.find_weight_readers`.
        node: the node that applies them, which is told if sampling does not run their modules.

    Raises:
        LoraError: an adapter does not fit, or `mode` cannot serve it. The model is unchanged.
    """
    if mode not in MODES:
        raise ConfigError(
            "unknown mode {mode!r}; expected one of {modes}", mode=mode, modes=", ".join(MODES)
        )
    layers = tuple(layers)
    check_layout(model.model.diffusion_model)
    matches = []
    for adapter, strengths in layers:
        match = match_adapter(model, adapter)
        check_selection(adapter, strengths, match)
        adapter.check_finite()
        matches.append(match)
    application = Application(model.clone())
    for (adapter, strengths), match in zip(layers, matches, strict=True):
        apply_one(application, adapter, strengths, match, mode, readers, node)
    return application


def check_selection(adapter: Adapter, strengths: Strengths, match: Match) -> None:
    if not strengths.is_zero and not strengths.select(match.paths, match.family):
        raise TargetError(
            "{strengths} selects none of the {num_paths} modules of {adapter}; expected block "
            "numbers it has, such as '0-19'.",
            strengths=strengths.describe(),
            num_paths=len(match.paths),
            adapter=adapter.name,
        )


def apply_one(
    application: Application,
    adapter: Adapter,
    strengths: Strengths,
    match: Match,
    mode: str,
    readers: Sequence[str],
    node: host.RunningNode | None,
) -> None:
    model = application.model
    merged = dict(match.merge_only)
    if mode == SIDE_PATH and merged:
        path, why = next(iter(merged.items()))
        raise ConfigError(
            "mode 'side path' cannot serve {num_modules} of {adapter}, such as {path}: {why}. "
            "Choose mode 'auto' or 'merge'.",
            num_modules=format_count(len(merged), "module"),
            adapter=adapter.name,
            path=path,
            why=why,
        )
    if mode == MERGE:
        merged = dict.fromkeys(match.paths, message("as chosen"))
    elif mode == AUTO and (reason := find_merge_reason(model, readers)):
        merged = dict.fromkeys(match.paths, reason)
    if not strengths.is_zero:
        check_mergeable(adapter, merged, match)
    beside = match.paths - frozenset(merged)
    application.lines += describe_match(adapter, match, strengths)
    application.findings += find_warnings(model, adapter, match)
    if strengths.is_zero:
        application.lines.append(message("strength is 0: nothing is applied"))
        return
    if selected := strengths.select(beside, match.family):
        # The whole set, so that another selection reuses the same bank.
        entry = Entry(adapter, beside, strengths, match.layout, match.family, node)
        add_to_side_path(model, entry)
        is_auto = mode == AUTO and not merged
        application.lines.append(
            message(
                "side path: {num_modules}, no weight is touched{why}",
                num_modules=format_count(len(selected), "module"),
                why=message(" (auto: no reason to merge)") if is_auto else "",
            )
        )
        if readers:
            warn_of_readers(application, adapter, readers, len(selected))
    if selected := strengths.select(merged, match.family):
        reasons = {path: merged[path] for path in selected}
        merge(application, adapter, strengths, reasons, match, mode)


def check_mergeable(adapter: Adapter, merged: Mapping[str, str], match: Match) -> None:
    """ConfigError unless the MODEL takes patches for all modules in `merged`, path -> why."""
    blocked = sorted(path for path in merged if path in match.unmergeable)
    if blocked:
        raise ConfigError(
            "{num_modules} of {adapter}, such as {blocked}, would have to be merged into this "
            "MODEL ({merged}), and {unmergeable}. Choose mode 'side path', without "
            "torch.compile and other nodes that need merged weights, or a bf16, fp8 or GGUF "
            "file of the model.",
            num_modules=format_count(len(blocked), "module"),
            adapter=adapter.name,
            blocked=blocked[0],
            merged=merged[blocked[0]],
            unmergeable=match.unmergeable[blocked[0]],
        )


def describe_match(adapter: Adapter, match: Match, strengths: Strengths) -> Iterator[str]:
    yield message(
        "{adapter}: {num_paths} of {num_adapter} modules matched, {strengths}",
        adapter=adapter.name,
        num_paths=len(match.paths),
        num_adapter=len(adapter),
        strengths=strengths.describe(),
    )
    if match.layout.reason:
        yield message(
            "this MODEL is a {layout} Qwen-Image, {storage}",
            layout=match.layout.name,
            storage=match.storage,
        )


def merge(
    application: Application,
    adapter: Adapter,
    strengths: Strengths,
    reasons: dict[str, str],
    match: Match,
    mode: str,
) -> None:
    """Adds native patches for the modules in `reasons`, module path -> why it is merged."""
    modules = {path: adapter.modules[path] for path in reasons}
    place, family = match.layout.find_place, match.family
    host.add_merge(application.model, modules, strengths, place, family)
    counts = Counter(reasons.values()).most_common()
    whys = (
        counts[0][0]
        if len(counts) == 1
        else join_messages("; ", [join_messages(": ", [str(n), why]) for why, n in counts])
    )
    kind = "merged" if mode == MERGE else "merged_instead"
    application.note(
        kind,
        message(
            "merged into the weights: {num_modules} ({whys})",
            num_modules=format_count(len(reasons), "module"),
            whys=whys,
        ),
        len(reasons),
    )
    rounded = Counter(match.rounded[path] for path in reasons if path in match.rounded)
    if rounded:
        application.warn(
            "merge_rounds",
            message(
                "the weights are stored as {storage}; merging rounds a small LoRA away there, the "
                "side path does not",
                storage=rounded.most_common(1)[0][0],
            ),
            rounded.total(),
        )


def find_merge_reason(model: host.ModelPatcher, readers: Sequence[str]) -> str | None:
    """Why no module may run on the side path; None if they may."""
    if readers:
        return message("{readers} after this node reads the weights", readers=", ".join(readers))
    return host.find_merge_reason(model)


def warn_of_readers(
    application: Application, adapter: Adapter, readers: Sequence[str], count: int
) -> None:
    text = message(
        "{readers} after this node reads the weights alone, so that {count} modules of "
        "{adapter} are missing from its output; choose mode 'auto' or 'merge'",
        readers=", ".join(readers),
        count=count,
        adapter=adapter.name,
    )
    application.warn("not_in_weights", text, count)
    logger.warning("Qwen Edit LoRA: %s.", text)


def find_warnings(model: host.ModelPatcher, adapter: Adapter, match: Match) -> list[Finding]:
    found = []
    if match.absent:
        text = message(
            "{num_absent} of {num_adapter} modules are not in this MODEL and were left out: "
            "{absent}",
            num_absent=len(match.absent),
            num_adapter=len(adapter),
            absent=shorten_list(match.absent, 3),
        )
        found.append(Finding("modules_absent", WARNING, text, len(match.absent)))
    for why, count in Counter(match.out_of_reach.values()).most_common():
        text = message(
            "{count} of {num_adapter} modules were left out: {why}. The effect is weaker "
            "than on a bf16, fp8 or GGUF file of the model",
            count=count,
            num_adapter=len(adapter),
            why=why,
        )
        found.append(Finding("modules_out_of_reach", WARNING, text, count))
    _, variant = host.describe_model(model)
    claimed = adapter.report.variants
    if claimed and ((variant == "2511") != ("2511" in claimed)):
        text = message(
            "{adapter} says it was made for {claimed}, and this MODEL is {variant}: it fits by "
            "name, the effect may differ",
            adapter=adapter.name,
            claimed=", ".join(claimed),
            variant=message("a 2511") if variant == "2511" else message("no 2511"),
        )
        found.append(Finding("other_variant", WARNING, text))
    return found

"""Judging an inspection: sentences, each with the value and the threshold behind it.

The ranges are those of known-good Qwen-Image-Edit LoRAs (DESIGN.md, section 5): std of the delta
1e-4 to 1e-3, largest entry 1e-3 to 1e-2, fewer than 1 % of the entries below 1e-6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..base_model import module_paths
from ..base_model.qwen_image import QWEN_IMAGE
from ..findings import ERROR, NOTE, WARNING, Finding
from ..messages import join_messages, message
from ..text import format_count, format_percent, shorten_list

if TYPE_CHECKING:
    from .inspection import Inspection

GOOD_STD = (1e-4, 1e-3)
GOOD_MAX = (1e-3, 1e-2)
GOOD_FRACTION = 0.01
#: Ten times the good range: where a delta starts to overwrite the base (whose std is about 2e-2).
SATURATED_STD = 1e-2
#: A tenth of it: hardly visible at strength 1.
FAINT_STD = 1e-5
#: Share of the rank that carries the spectrum; below it a smaller rank would do.
COLLAPSED = 0.05
#: Noise of a merge, relative to the adapter, that still goes unnoticed.
MERGE_ERROR = 0.25
#: Storages of 4 bits whose rounding is not repeated here, see `survival.PACKED_GRIDS`.
UNPREDICTED = ("nvfp4", "rotated w4a8")
#: The kind of a finding that reports nothing to judge.
NOTHING = "nothing_to_judge"
#: Below this share of the root mean square a delta's mean does not count.
SMALL_MEAN = 0.1
#: alpha / rank at which people usually train; far from it the strength at use is off.
USUAL_SCALE = (1 / 64, 8.0)


def judge(inspection: Inspection) -> tuple[Finding, ...]:
    """The verdict, the most severe first; the last sentence names the kind of adapter."""
    findings = judge_defects(inspection)
    if inspection.modules:
        is_untrained = any(finding.kind == "untrained" for finding in findings)
        findings += judge_scale(inspection)
        findings += judge_merge(inspection)
        if not is_untrained:
            findings.append(judge_size(inspection))
    elif inspection.misfits and not findings:
        first = inspection.misfits[0]
        text = message(
            "nothing to judge: none of {num_misfits} modules fits this base ({first}: "
            "{skipped}); choose the base it was trained on",
            num_misfits=len(inspection.misfits),
            first=first,
            skipped=inspection.skipped[first],
        )
        findings.append(Finding(NOTHING, WARNING, text, len(inspection.misfits)))
    elif not findings:
        text = message("nothing to judge: no module of this adapter has a delta of its own")
        findings.append(Finding(NOTHING, WARNING, text))
    return tuple(findings)


def judge_defects(inspection: Inspection) -> list[Finding]:
    modules = inspection.modules
    found = []
    if inspection.non_finite:
        text = message(
            "non-finite: NaN or Inf in {num_modules} ({non_finite}), as stored or times their "
            "alpha; training diverged or the file is damaged",
            num_modules=format_count(len(inspection.non_finite), "module"),
            non_finite=shorten_list(inspection.non_finite, 2),
        )
        found.append(Finding("non_finite", ERROR, text, len(inspection.non_finite)))
    last = find_last_block(modules)
    zero = [path for path, module in modules.items() if module.frobenius == 0]
    family = inspection.base_family
    inert = [path for path in zero if family is not None and family.is_inert(path, last)]
    dead = [path for path in zero if path not in inert]
    if zero and len(zero) == len(modules):
        text = message(
            "untrained: the delta of all {num_modules} modules is exactly 0 (lora_B is zero); "
            "this adapter does nothing at any strength",
            num_modules=len(modules),
        )
        found.append(Finding("untrained", ERROR, text, len(zero)))
        return found
    if dead:
        is_widespread = len(dead) > len(modules) / 10
        text = message(
            "{what}: {num_dead} of {num_modules} modules have a delta of exactly 0 ({dead})",
            what=message("partly trained") if is_widespread else message("dead modules"),
            num_dead=len(dead),
            num_modules=len(modules),
            dead=shorten_list(dead, 3),
        )
        kind = "partly_trained" if is_widespread else "dead_modules"
        found.append(Finding(kind, WARNING, text, len(dead)))
    if inert:
        text = message(
            "inert, not broken: {num_modules} of block {last} without a gradient, since the "
            "model discards their output ({inert})",
            num_modules=format_count(len(inert), "module"),
            last=last,
            inert=shorten_list(inert, 4),
        )
        found.append(Finding("inert", NOTE, text, len(inert)))
    return found


def judge_scale(inspection: Inspection) -> list[Finding]:
    found = []
    low, high = USUAL_SCALE
    odd = {
        module.scale
        for module in inspection.modules.values()
        if module.kind != "LoKr" and not low <= abs(module.scale) <= high
    }
    if odd:
        shown = ", ".join(f"{scale:g}" for scale in sorted(odd)[:3])
        text = message(
            "scale: alpha / rank is {shown}, outside {low:g} to {high:g}; if alpha is wrong in "
            "the file, the strength is wrong by the same factor",
            shown=shown,
            low=low,
            high=high,
        )
        found.append(Finding("scale", WARNING, text))
    collapsed = [
        path
        for path, module in inspection.modules.items()
        if module.kind == "LoRA"
        and module.rank >= 8
        and 0 < module.effective_rank < max(1.5, COLLAPSED * module.rank)
    ]
    if len(collapsed) > len(inspection.modules) / 2:
        module = inspection.modules[collapsed[0]]
        text = message(
            "collapsed rank: in {num_collapsed} of {num_modules} modules the effective rank is "
            "below {collapsed} of the rank (for example {effective_rank:.1f} of {rank}); a "
            "lower rank would be enough",
            num_collapsed=len(collapsed),
            num_modules=len(inspection.modules),
            collapsed=format_percent(COLLAPSED),
            effective_rank=module.effective_rank,
            rank=module.rank,
        )
        found.append(Finding("collapsed_rank", WARNING, text, len(collapsed)))
    return found


def judge_merge(inspection: Inspection) -> list[Finding]:
    """Whether the adapter survives being merged into its base as stored."""
    error = inspection.merge_error
    if error is None:
        return judge_unknown_merge(inspection)
    with_base = [(m.frobenius, m.base) for m in inspection.modules.values() if m.base is not None]
    storage = Counter(base.storage for _, base in with_base).most_common(1)[0][0]
    measured = [
        (frobenius, base.merge_error_measured)
        for frobenius, base in with_base
        if base.merge_error_measured is not None
    ]
    checked = ""
    if measured:
        squares = sum((share * frobenius) ** 2 for frobenius, share in measured)
        total = sum(frobenius**2 for frobenius, _ in measured)
        real = (squares / total) ** 0.5 if total else 0.0
        checked = message(
            ", {real:.2g} by real rounding in {num_modules}",
            real=real,
            num_modules=format_count(len(measured), "module"),
        )
    noise = message(
        "rounding noise is {error:.2g} times the adapter (predicted{checked}; up to {limit:g} is "
        "fine)",
        error=error,
        checked=checked,
        limit=MERGE_ERROR,
    )
    if error > MERGE_ERROR:
        text = message(
            "merged into this {storage} base, {noise}: use the side path",
            storage=storage,
            noise=noise,
        )
        return [Finding("merge_noise", WARNING, text)]
    return [
        Finding(
            "merge_survives",
            NOTE,
            message(
                "survives merging into this {storage} base: {noise}", storage=storage, noise=noise
            ),
        )
    ]


def describe_value(name: str, size: float, inspection: Inspection) -> str:
    low, high = GOOD_STD
    values = {"name": name, "size": size, "low": low, "high": high}
    if inspection.base_family in (None, QWEN_IMAGE):
        return message("{name} {size:.2e} (known-good LoRAs: {low:g} to {high:g})", **values)
    # nobody has measured those of others
    return message(
        "{name} {size:.2e} (known-good LoRAs of {family}-Edit: {low:g} to {high:g})",
        family=QWEN_IMAGE.title,
        **values,
    )


def judge_unknown_merge(inspection: Inspection) -> list[Finding]:
    """That merging into weights of 4 bits loses what nothing here predicts."""
    bases = [module.base for module in inspection.modules.values() if module.base is not None]
    storages = {base.storage for base in bases if base.storage in UNPREDICTED}
    if not storages:
        return []
    text = message(
        "what is left after merging into this {storages} base is not predicted here; the "
        "side path adds without rounding",
        storages=" and ".join(sorted(storages)),
    )
    return [Finding("merge_unknown", NOTE, text)]


def judge_size(inspection: Inspection) -> Finding:
    """The answer to "my delta is tiny, is that normal?"."""
    largest, below = inspection.abs_max, inspection.fraction_below_1e6
    # The good ranges are deviations; a delta that is the same everywhere has none and is large.
    size = (inspection.std**2 + inspection.mean**2) ** 0.5
    low, high = GOOD_STD
    if abs(inspection.mean) > SMALL_MEAN * size:
        name = message(
            "mean {mean:.2e}, std {std:.2e}, root mean square",
            mean=inspection.mean,
            std=inspection.std,
        )
    else:
        name, size = message("std"), inspection.std
    parts = [describe_value(name, size, inspection)]
    if largest is not None:
        parts.append(
            message(
                "largest entry {largest:.1e} ({low:g} to {high:g})",
                largest=largest,
                low=GOOD_MAX[0],
                high=GOOD_MAX[1],
            )
        )
    if below is not None:
        parts.append(
            message(
                "{below} of the entries below 1e-6 (under {limit})",
                below=format_percent(below),
                limit=format_percent(GOOD_FRACTION),
            )
        )
    numbers = join_messages(", ", parts)
    if size >= SATURATED_STD:
        text = message(
            "saturated: {numbers}; it overwrites the base, use a strength well below 1",
            numbers=numbers,
        )
        return Finding("saturated", WARNING, text)
    if size > high:
        text = message("strong: {numbers}; strengths below 1 may look better", numbers=numbers)
        return Finding("strong", WARNING, text)
    if size < FAINT_STD:
        return Finding(
            "very_faint",
            WARNING,
            message("very faint: {numbers}; expect little at strength 1", numbers=numbers),
        )
    if size < low:
        text = message("faint: {numbers}; a strength above 1 may be needed", numbers=numbers)
        return Finding("faint", WARNING, text)
    small = message("{numbers}; small entries are normal in a LoRA", numbers=numbers)
    if below is None or below < GOOD_FRACTION:
        return Finding("healthy", NOTE, message("dense, small, healthy: {small}", small=small))
    return Finding("sparse", WARNING, message("healthy in size, but sparse: {small}", small=small))


def find_last_block(modules: Iterable[str]) -> int:
    blocks = [block for block, _ in map(module_paths.split_path, modules) if block is not None]
    return max(blocks, default=-1)

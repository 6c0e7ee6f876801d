"""Inspections and comparisons as text: sentences first, then one line per module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..findings import NOTE, WARNING, Finding
from ..messages import join_messages, message
from ..text import align, format_count, format_percent, shorten_list
from .statistics import BY_BLOCK, STATISTICS, sort_modules

if TYPE_CHECKING:
    from .compare import Comparison, ModuleComparison
    from .inspection import Inspection, ModuleInspection


def needs_attention(inspection: Inspection) -> bool:
    """Whether any finding of the verdict is more than good news."""
    return any(finding.severity != NOTE for finding in inspection.findings)


def describe_verdict(inspection: Inspection) -> str:
    """The verdict, one sentence per line, then what could not be inspected."""
    lines = [
        message(
            "{inspection}: {num_modules}",
            inspection=inspection.name,
            num_modules=format_count(len(inspection.modules), "module"),
        ),
        *inspection.verdict,
    ]
    lines += [message("Warning: {text}", text=finding.text) for finding in find_skipped(inspection)]
    return join_messages("\n", lines)


def find_skipped(inspection: Inspection) -> list[Finding]:
    """Modules left out of the statistics; a warning where the base model does not match."""
    if not inspection.skipped:
        return []
    found = [
        message("{path}: {reason}", path=path, reason=reason)
        for path, reason in inspection.skipped.items()
    ]
    text = message(
        "{num_modules} without statistics: {found}",
        num_modules=format_count(len(found), "module"),
        found=shorten_list(found, 2),
    )
    severity = WARNING if inspection.misfits else NOTE
    return [Finding("modules_without_figures", severity, text, len(found))]


#: Always shown, then the statistic that the table is sorted by.
COLUMNS = ("std", "effective rank", "energy rank 99 %", "abs max", "fraction below 1e-6")
HEADERS = {
    "frobenius": "norm",
    "spectral": "sigma 1",
    "effective rank": "eff. rank",
    "energy rank 99 %": "99 %",
    "abs max": "max",
    "fraction below 1e-6": "< 1e-6",
}
FORMATS = {
    "std": ".2e",
    "frobenius": ".3g",
    "spectral": ".3g",
    "effective rank": ".1f",
    "stable rank": ".1f",
    "energy rank 99 %": "d",
    "abs max": ".2e",
}


def build_table(inspection: Inspection, sort_by: str = "std") -> str:
    """One line per module, the worst first; narrow enough for a node.

    Raises:
        ConfigError: an unknown sort key, or one that needs an exact inspection.
    """
    paths = sort_modules(inspection, sort_by)
    names = [n for n in COLUMNS if inspection.is_exact or not STATISTICS[n].needs_exact]
    if sort_by != BY_BLOCK and sort_by not in names:
        names.insert(0, sort_by)
    rows = [build_row(path, inspection.modules[path], names) for path in paths]
    header = ["module", "rank", *(HEADERS.get(name, name) for name in names)]
    order = message("in the model's order")
    if sort_by != BY_BLOCK:
        is_large = STATISTICS[sort_by].worst_is_large
        end = message("largest") if is_large else message("smallest")
        order = message("{end} {sort_by} first", end=end, sort_by=sort_by)
    return join_messages(
        "\n",
        [
            message(
                "{num_modules}, {order}", num_modules=format_count(len(rows), "module"), order=order
            ),
            *align([header, *rows]),
        ],
    )


def build_row(module_path: str, module: ModuleInspection, names: list[str]) -> list[str]:
    cells = [show(STATISTICS[name].read(module), name) for name in names]
    return [module_path.removeprefix("transformer_blocks."), str(module.rank), *cells]


def show(value: float | None, name: str) -> str:
    if value is None:  # needs a scan that this module had not
        return "-"
    return format(value, FORMATS[name]) if name in FORMATS else format_percent(value)


def build_comparison_table(comparison: Comparison) -> str:
    """One line per module that both adapters change, the most opposed first."""
    paths = sorted(comparison.modules, key=lambda path: read_cosine(comparison.modules[path]))
    header = ["module", "cosine", "norm a", "norm b", "b / a", "drift", "overlap"]
    rows = [build_comparison_row(path, comparison.modules[path]) for path in paths]
    return join_messages(
        "\n",
        [
            message(
                "{num_modules}, lowest cosine first", num_modules=format_count(len(rows), "module")
            ),
            *align([header, *rows]),
        ],
    )


def read_cosine(module: ModuleComparison) -> float:
    return 2.0 if module.cosine is None else module.cosine  # those without one come last


def build_comparison_row(module_path: str, module: ModuleComparison) -> list[str]:
    overlap = module.overlap_90
    cells = (module.norm_ratio, module.drift)
    return [
        module_path.removeprefix("transformer_blocks."),
        "-" if module.cosine is None else f"{module.cosine:+.3f}",
        f"{module.norm_a:.3g}",
        f"{module.norm_b:.3g}",
        *("-" if value is None else f"{value:.3g}" for value in cells),
        "-" if overlap is None else f"{overlap.left:.2f}",
    ]

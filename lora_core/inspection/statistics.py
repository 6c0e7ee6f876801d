"""The statistics of a module that can be mapped and sorted by, and the modules in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base_model import module_paths
from ..base_model.families import BLOCK_ORDER
from ..errors import ConfigError

if TYPE_CHECKING:
    from .inspection import Inspection, ModuleInspection

BY_BLOCK = "block"


@dataclass(frozen=True)
class Statistic:
    """One statistic of a module, and which of its values deserves attention first."""

    field: str
    label: str
    is_logarithmic: bool = False
    needs_exact: bool = False
    worst_is_large: bool = False

    def read(self, module: ModuleInspection) -> float | None:
        return getattr(module, self.field)


STATISTICS: dict[str, Statistic] = {
    "std": Statistic("std", "standard deviation of the delta", True),
    "frobenius": Statistic("frobenius", "Frobenius norm of the delta", True),
    "spectral": Statistic("spectral", "largest singular value of the delta", True),
    "effective rank": Statistic("effective_rank", "effective rank"),
    "stable rank": Statistic("stable_rank", "stable rank"),
    "energy rank 99 %": Statistic("energy_rank_99", "singular values for 99 % of the energy"),
    "abs max": Statistic("abs_max", "largest entry of the delta", True, True, True),
    "fraction below 1e-6": Statistic(
        "fraction_below_1e6", "fraction of entries below 1e-6", True, True, True
    ),
}
SORT_KEYS = (*STATISTICS, BY_BLOCK)


def get_statistic(name: str) -> Statistic:
    """
    Raises:
        ConfigError: no such statistic.
    """
    if name not in STATISTICS:
        raise ConfigError(
            "unknown statistic {name!r}; expected one of {statistics}",
            name=name,
            statistics=", ".join(STATISTICS),
        )
    return STATISTICS[name]


def sort_modules(inspection: Inspection, sort_by: str = "std") -> list[str]:
    """Module paths, the worst first; BY_BLOCK gives the order of the model.

    Raises:
        ConfigError: no such key, or one that needs an exact inspection.
    """
    if sort_by == BY_BLOCK:
        return sorted(inspection.modules, key=find_position)
    statistic = get_statistic(sort_by)
    if statistic.needs_exact and inspection.modules and not inspection.is_exact:
        raise ConfigError(
            "sorting by {sort_by!r} needs every entry, but this inspection left them out; turn "
            "exact on, or sort by another statistic",
            sort_by=sort_by,
        )
    return sorted(inspection.modules, key=read_badness(inspection, statistic))


def read_badness(inspection: Inspection, statistic: Statistic) -> Callable[[str], float]:
    sign = -1 if statistic.worst_is_large else 1
    return lambda path: sign * (statistic.read(inspection.modules[path]) or 0.0)


def find_position(module_path: str) -> tuple[int, int, str]:
    """Sorts as the model runs; what is outside the blocks comes last."""
    block, name = module_paths.split_path(module_path)
    if block is None:
        return (1 << 30, 0, name)
    return (block, BLOCK_ORDER.get(name, len(BLOCK_ORDER)), name)

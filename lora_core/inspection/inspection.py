"""What the deltas of an adapter look like: size, spectrum, distribution and dead parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..adapter.adapter import Adapter, is_computable
from ..adapter.weights import DoraWeights, LokrWeights, LoraWeights, ModuleWeights, OftWeights
from ..algebra.factors import compute_effective_rank, get_factors
from ..base_model.base_weights import BaseWeight, BaseWeights, open_base
from ..base_model.families import detect_family
from ..base_model.family import Family
from ..disk.safetensors_file import AnyTensor, load
from ..disk.typed_json import Whole
from ..errors import NonFiniteWeightsError
from ..findings import Finding
from ..messages import message
from ..progress import Progress, ShouldStop, track
from ..threads import map_in_threads
from .against_base import BaseStatistics, compare_with_base
from .entries import Entries, scan_dense, scan_factors, scan_kronecker
from .measures import (
    Measures,
    compute_energy_rank,
    compute_stable_rank,
    measure_dense,
    measure_factors,
    measure_kronecker,
)

#: About how many modules' merges are actually rounded, to check the prediction.
NUM_SAMPLED = 24


@dataclass(frozen=True)
class ModuleInspection:
    """Statistics of one module's delta. Those of a full scan are None unless it was asked for."""

    kind: str
    shape: tuple[Whole, Whole]
    rank: Whole
    alpha: float
    scale: float
    dtype: str
    mean: float
    std: float
    """Of the population."""
    frobenius: float
    spectral: float
    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    energy_rank_90: Whole
    energy_rank_99: Whole
    row_norm_min: float
    row_norm_max: float
    column_norm_min: float
    column_norm_max: float
    num_dead_rows: Whole
    """Outputs that the adapter does not change at all."""
    num_dead_columns: Whole
    is_untrained: bool
    """The factor that starts at zero (lora_B) still is."""
    is_direction_only: bool = False
    """A DoRA without its base: these are the statistics of scale * B @ A, before the magnitude."""
    abs_max: float | None = None
    fraction_below_1e6: float | None = None
    fraction_below_std: float | None = None
    quantiles: Mapping[float, float] | None = None
    histogram: tuple[tuple[float, Whole], ...] | None = None
    base: BaseStatistics | None = None
    """Relative to the base weight, where one was given."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inspection:
    """Statistics of a whole adapter."""

    name: str
    modules: Mapping[str, ModuleInspection]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Module path -> why it has no statistics."""
    non_finite: tuple[str, ...] = ()
    """Modules with NaN or Inf, as stored or in their delta; they have no statistics either."""
    misfits: tuple[str, ...] = ()
    """Those of the skipped that the base lacks, or has in another shape."""

    @cached_property
    def base_family(self) -> Family | None:
        """That of the models the adapter fits; None where nothing tells."""
        absent = dict.fromkeys((*self.skipped, *self.non_finite))
        return detect_family({**absent, **{path: m.shape for path, m in self.modules.items()}})

    @property
    def mean(self) -> float:
        return sum(m.mean * count(m) for m in self.modules.values()) / max(self.num_entries, 1)

    @property
    def std(self) -> float:
        """Of all entries of all deltas together."""
        squares = sum(m.frobenius**2 for m in self.modules.values())
        return max(squares / max(self.num_entries, 1) - self.mean**2, 0.0) ** 0.5

    @property
    def frobenius(self) -> float:
        return sum(m.frobenius**2 for m in self.modules.values()) ** 0.5

    @property
    def num_entries(self) -> int:
        return sum(count(m) for m in self.modules.values())

    @property
    def abs_max(self) -> float | None:
        found = [m.abs_max for m in self.modules.values() if m.abs_max is not None]
        return max(found, default=None)

    @property
    def fraction_below_1e6(self) -> float | None:
        if not self.is_exact:
            return None
        below = sum((m.fraction_below_1e6 or 0.0) * count(m) for m in self.modules.values())
        return below / self.num_entries

    @property
    def is_exact(self) -> bool:
        """Whether every entry was scanned."""
        return bool(self.modules) and all(m.abs_max is not None for m in self.modules.values())

    @property
    def merge_error(self) -> float | None:
        """Relative error of the whole adapter if merged into its base as stored; see survival."""
        squares = [
            (m.base.merge_error_predicted * m.frobenius) ** 2
            for m in self.modules.values()
            if m.base is not None and m.base.merge_error_predicted is not None
        ]
        return (sum(squares) ** 0.5 / self.frobenius) if squares and self.frobenius else None

    @property
    def base_ratio(self) -> float | None:
        """|delta|_F / |W|_F over all modules that have a base weight."""
        found = [(m, m.base) for m in self.modules.values() if m.base is not None]
        total = sum(base.frobenius**2 for _, base in found) ** 0.5
        return sum(m.frobenius**2 for m, _ in found) ** 0.5 / total if total else None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The verdict for programs; see `lora_core.inspection.verdict`."""
        from .verdict import judge

        return judge(self)

    @property
    def verdict(self) -> tuple[str, ...]:
        """Sentences, each with its value and threshold."""
        return tuple(finding.text for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "family": None if self.base_family is None else self.base_family.name,
            "verdict": list(self.verdict),
            "findings": [asdict(finding) for finding in self.findings],
            "mean": self.mean,
            "std": self.std,
            "frobenius": self.frobenius,
            "abs_max": self.abs_max,
            "fraction_below_1e6": self.fraction_below_1e6,
            "base_ratio": self.base_ratio,
            "merge_error": self.merge_error,
            "skipped": dict(self.skipped),
            "non_finite": list(self.non_finite),
            "misfits": list(self.misfits),
            "modules": {path: module.to_dict() for path, module in self.modules.items()},
        }


class NotInspected(NamedTuple):
    """Why a module has no statistics."""

    reason: str
    is_mismatch: bool = False
    """The base does not match: it lacks the module or has it in another shape."""


def count(module: ModuleInspection) -> int:
    return module.shape[0] * module.shape[1]


def inspect_adapter(
    adapter: Adapter,
    base: BaseWeights | Mapping[str, AnyTensor] | str | os.PathLike[str] | None = None,
    exact: bool = False,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Inspection:
    """Inspects every module of an adapter.

    Args:
        base: the model's file, GGUF or diffusers folder, or its tensors by key; read one module at
            a time. Adds `ModuleInspection.base`, and gives DoRA and OFT their true delta.
        exact: also look at every entry: largest value, shares, quantiles, histogram.
        progress: called with (modules done, modules in all).
        should_stop: asked between modules and between the chunks of a scan.

    Raises:
        InterruptedError: `should_stop` returned True.
        FileError: a file is damaged, or was removed or changed meanwhile.
        KeyFormatError: the base is not a Qwen-Image model.
    """
    weights_of_base = None if base is None else open_base(base)
    other = None if weights_of_base is None else explain_other_family(adapter, weights_of_base)
    sampled = choose_sample(list(adapter.modules))

    def inspect(path: str, stop: ShouldStop | None) -> ModuleInspection | NotInspected | None:
        """The statistics, or why there are none; None for NaN or Inf."""
        if other is not None:
            return other
        weights = adapter.modules[path]
        weight = None if weights_of_base is None else weights_of_base.get(path)
        not_inspected = explain_not_inspectable(weights, weights_of_base, weight)
        if not_inspected is not None:
            return not_inspected
        # Once for the check and the statistics; mapped, not copied.
        weights = weights.with_parts({part: load(t) for part, t in weights.parts.items()})
        if not is_computable(weights):
            return None
        try:
            return inspect_module(
                weights, exact=exact, base=weight, is_sampled=path in sampled, should_stop=stop
            )
        except NonFiniteWeightsError as e:
            return NotInspected(e.message)

    paths = list(adapter.modules)
    if weights_of_base is None:
        found = map_in_threads(inspect, paths, progress, should_stop, message("inspection"))
    else:  # one by one, so that only one of the base's weights is in memory at a time
        tracked = track(paths, progress, should_stop, message("inspection"))
        found = [inspect(path, should_stop) for path in tracked]
    adapter.release()
    if weights_of_base is not None:
        weights_of_base.release()
    return gather(adapter.name, dict(zip(paths, found, strict=True)))


def gather(name: str, results: Mapping[str, ModuleInspection | NotInspected | None]) -> Inspection:
    return Inspection(
        name,
        {path: one for path, one in results.items() if isinstance(one, ModuleInspection)},
        {path: one.reason for path, one in results.items() if isinstance(one, NotInspected)},
        tuple(path for path, one in results.items() if one is None),
        tuple(
            path
            for path, one in results.items()
            if isinstance(one, NotInspected) and one.is_mismatch
        ),
    )


def choose_sample(paths: list[str]) -> frozenset[str]:
    """Modules whose merge is actually rounded: a few, spread over the whole adapter."""
    step = max(1, len(paths) // NUM_SAMPLED)
    return frozenset(paths[::step])


def explain_other_family(adapter: Adapter, base: BaseWeights) -> NotInspected | None:
    """Why no module of the adapter has a place in the base; None where they may fit."""
    ours, theirs = adapter.base_family, base.family
    if ours is None or theirs is None or ours is theirs:
        return None
    return NotInspected(
        message(
            "{base} is a {title} model, the adapter was made for {other_title}",
            base=base.name,
            title=theirs.title,
            other_title=ours.title,
        ),
        is_mismatch=True,
    )


def explain_not_inspectable(
    weights: ModuleWeights, base: BaseWeights | None, weight: BaseWeight | None
) -> NotInspected | None:
    """Why a module has no statistics, or None."""
    if weight is not None and not has_shape(weights, tuple(weight.stored.shape)):
        return NotInspected(
            message(
                "the base's weight is {stored_shape}, the adapter was made for {weights_shape}",
                stored_shape=tuple(weight.stored.shape),
                weights_shape=weights.shape,
            ),
            is_mismatch=True,
        )
    if weights.kind == "OFT" and base is None:
        return NotInspected(message("an OFT rotates the base weight and has no delta without it"))
    if weights.kind != "OFT" and (weights.shape is None or len(weights.shape) != 2):
        return NotInspected(message("a change of a norm or bias, which has no matrix"))
    if base is not None and weight is None:
        return NotInspected(message("{base} has no such module", base=base.name), is_mismatch=True)
    return None


def has_shape(weights: ModuleWeights, shape: tuple[int, ...]) -> bool:
    if isinstance(weights, OftWeights):
        return weights.out_features == shape[0]
    return weights.shape is None or tuple(weights.shape) == shape


def inspect_module(
    weights: ModuleWeights,
    *,
    exact: bool = False,
    base: BaseWeight | None = None,
    is_sampled: bool = False,
    should_stop: ShouldStop | None = None,
) -> ModuleInspection:
    """The shortest exact route for the kind: factors, Kronecker factors, or the matrix.

    Raises:
        NonFiniteWeightsError: the base weight holds NaN or Inf.
    """
    inspected = weights
    if isinstance(weights, DoraWeights) and base is None:
        inspected = weights.direction
    factors = get_factors(inspected)
    delta: torch.Tensor | None = None
    if factors is not None:
        measures = measure_factors(factors)
    elif isinstance(inspected, LokrWeights):
        measures = measure_kronecker(inspected)
    else:
        delta = inspected.delta(None if base is None else base.values)
        if not delta.isfinite().all():
            raise NonFiniteWeightsError("the delta relative to this base holds NaN or Inf")
        measures = measure_dense(delta)
    if delta is None and factors is None and base is not None:
        delta = inspected.delta()
    entries = None
    if exact and factors is not None:
        entries = scan_factors(factors, measures.std, should_stop)
    elif exact and delta is not None:
        entries = scan_dense(delta, measures.std, should_stop)
    elif exact and isinstance(inspected, LokrWeights):
        w1, w2 = inspected.factor("lokr_w1"), inspected.factor("lokr_w2")
        entries = scan_kronecker(w1, w2, inspected.scale, measures.std, should_stop)
    beside = None
    either = delta if factors is None else factors
    if base is not None and either is not None:
        spectral = measures.singular_values[0].item() if measures.singular_values.numel() else 0.0
        norms = measures.frobenius, spectral
        beside = compare_with_base(base, either, *norms, is_sampled=is_sampled)
    shape = (len(measures.row_norms), len(measures.column_norms))
    return build_inspection(
        weights, shape, measures, entries, beside, is_direction_only=inspected is not weights
    )


def build_inspection(
    weights: ModuleWeights,
    shape: tuple[int, int],
    measures: Measures,
    entries: Entries | None,
    base: BaseStatistics | None,
    *,
    is_direction_only: bool,
) -> ModuleInspection:
    values = measures.singular_values
    rows, columns = measures.row_norms, measures.column_norms
    scanned: dict[str, Any] = {}
    if entries is not None:
        scanned = {
            "abs_max": entries.abs_max,
            "fraction_below_1e6": entries.fraction_below_1e6,
            "fraction_below_std": entries.fraction_below_std,
            "quantiles": entries.quantiles,
            "histogram": entries.histogram,
        }
    return ModuleInspection(
        kind=weights.kind,
        shape=shape,
        rank=weights.rank,
        alpha=weights.alpha,
        scale=weights.scale,
        dtype=str(weights.dtype).removeprefix("torch."),
        mean=measures.mean,
        std=measures.std,
        frobenius=measures.frobenius,
        spectral=values[0].item() if values.numel() else 0.0,
        singular_values=tuple(values.tolist()),
        effective_rank=compute_effective_rank(values),
        stable_rank=compute_stable_rank(values),
        energy_rank_90=compute_energy_rank(values, 0.90),
        energy_rank_99=compute_energy_rank(values, 0.99),
        row_norm_min=rows.min().item(),
        row_norm_max=rows.max().item(),
        column_norm_min=columns.min().item(),
        column_norm_max=columns.max().item(),
        num_dead_rows=int((rows == 0).sum()),
        num_dead_columns=int((columns == 0).sum()),
        is_untrained=measures.frobenius == 0 and is_untrained(weights),
        is_direction_only=is_direction_only,
        base=base,
        **scanned,
    )


def is_untrained(weights: ModuleWeights) -> bool:
    """Training moves lora_B away from zero at its first step, so all zeros means: not one step."""
    direction = weights.direction if isinstance(weights, DoraWeights) else weights
    if isinstance(direction, LoraWeights):
        return not torch.any(direction.lora_B.float()).item()
    return False

"""Two adapters side by side: direction, size, shared subspaces, drift, conflict when stacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..adapter.adapter import Adapter
from ..adapter.weights import ModuleWeights
from ..algebra.factors import get_factors
from ..algebra.products import (
    Products,
    build_products,
    compute_products,
    compute_square,
    explain_no_delta,
    measure_difference,
)
from ..algebra.subspaces import (
    Overlap,
    average_overlaps,
    compute_overlap,
    compute_svd,
    count_directions,
)
from ..base_model.families import get_family
from ..base_model.family import Family
from ..findings import WARNING, Finding, mark_warnings
from ..messages import join_messages, message
from ..progress import Progress, ShouldStop, track
from ..text import format_count, format_percent, shorten_list

ENERGY_90 = 0.9


@dataclass(frozen=True)
class Relation:
    """How delta b relates to delta a. None where a norm is 0 and the question has no answer."""

    products: Products

    @property
    def norm_a(self) -> float:
        return self.products.square_a**0.5

    @property
    def norm_b(self) -> float:
        return self.products.square_b**0.5

    @property
    def cosine(self) -> float | None:
        """<a, b> / (|a| |b|): 1 the same direction, 0 independent, -1 opposed."""
        if not (self.norm_a and self.norm_b):
            return None
        return max(-1.0, min(1.0, self.products.inner / (self.norm_a * self.norm_b)))

    @property
    def norm_ratio(self) -> float | None:
        """|b| / |a|."""
        return self.norm_b / self.norm_a if self.norm_a else None

    @property
    def drift(self) -> float | None:
        """|b - a| / |a|: the distance from checkpoint a to checkpoint b, in lengths of a."""
        return self.products.square_difference**0.5 / self.norm_a if self.norm_a else None

    @property
    def norm_sum(self) -> float:
        """|a + b|, both stacked at strength 1."""
        products = self.products
        return max(products.square_a + products.square_b + 2 * products.inner, 0.0) ** 0.5

    @property
    def norm_if_independent(self) -> float:
        """What |a + b| would be at cosine 0."""
        return (self.products.square_a + self.products.square_b) ** 0.5

    @property
    def square_weaker(self) -> float:
        return min(self.products.square_a, self.products.square_b)

    @property
    def conflict(self) -> float | None:
        """Share of the weaker delta's energy that the stronger one cancels when both are stacked.

        The weaker delta's component along the stronger has the share cosine^2 of its energy; it
        is lost where the cosine is negative.
        """
        cosine = self.cosine
        return None if cosine is None else min(cosine, 0.0) ** 2

    def get_statistics(self) -> dict[str, float | None]:
        names = (
            *("norm_a", "norm_b", "cosine", "norm_ratio", "drift", "norm_sum"),
            *("norm_if_independent", "conflict"),
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ModuleComparison(Relation):
    """One module that both adapters change."""

    shape: tuple[int, ...]
    kind_a: str
    kind_b: str
    rank_a: int
    rank_b: int
    overlap: Overlap | None = None
    """Of all directions; None where a delta is zero, or of a kind without factors."""
    overlap_90: Overlap | None = None
    """Of the fewest directions that hold 90 % of either delta's energy."""

    def to_dict(self) -> dict[str, Any]:
        rest = {name: value for name, value in asdict(self).items() if name != "products"}
        return {**self.get_statistics(), **rest}


@dataclass(frozen=True)
class Comparison(Relation):
    """Two whole adapters, each as one long vector: a module that an adapter lacks is zero there.

    `conflict` and the overlaps are ratios of sums over the modules both have.
    """

    name_a: str
    name_b: str
    modules: Mapping[str, ModuleComparison]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    not_comparable: Mapping[str, str] = field(default_factory=dict)
    """Module path -> why; these are in no statistic."""
    family_a: str | None = None
    family_b: str | None = None

    @property
    def base_family(self) -> Family | None:
        """That of a, or of b where nothing tells which a is of."""
        return get_family(self.family_a) or get_family(self.family_b)

    @property
    def conflict(self) -> float | None:
        weaker = sum(module.square_weaker for module in self.modules.values())
        lost = sum((m.conflict or 0.0) * m.square_weaker for m in self.modules.values())
        return lost / weaker if weaker else None

    @property
    def overlap(self) -> Overlap | None:
        return average_overlaps(
            [module.overlap for module in self.modules.values() if module.overlap]
        )

    @property
    def overlap_90(self) -> Overlap | None:
        return average_overlaps(
            [module.overlap_90 for module in self.modules.values() if module.overlap_90]
        )

    def to_dict(self) -> dict[str, Any]:
        overlaps = {"overlap": self.overlap, "overlap_90": self.overlap_90}
        return {
            "name_a": self.name_a,
            "name_b": self.name_b,
            "family_a": self.family_a,
            "family_b": self.family_b,
            **self.get_statistics(),
            **{name: asdict(overlap) if overlap else None for name, overlap in overlaps.items()},
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "not_comparable": dict(self.not_comparable),
            "findings": [asdict(finding) for finding in self.findings],
            "modules": {path: module.to_dict() for path, module in self.modules.items()},
        }

    def to_text(self) -> str:
        lines = [
            message("a: {name_a}; b: {name_b}", name_a=self.name_a, name_b=self.name_b),
            message(
                "{num_modules} compared, {num_only_in_a} only in a, {num_only_in_b} only in b "
                "(zero in the other)",
                num_modules=format_count(len(self.modules), "module"),
                num_only_in_a=len(self.only_in_a),
                num_only_in_b=len(self.only_in_b),
            ),
            message(
                "cosine {cosine}; norm {norm_a:.3g} and {norm_b:.3g}, b / a {norm_ratio}; drift "
                "|b - a| / |a| {drift}",
                cosine=show(self.cosine),
                norm_a=self.norm_a,
                norm_b=self.norm_b,
                norm_ratio=show(self.norm_ratio),
                drift=show(self.drift),
            ),
        ]
        lines += [
            message(
                "subspace overlap, {of}: outputs {left:.3f} (chance {left_by_chance:.3f}), inputs "
                "{right:.3f} (chance {right_by_chance:.3f})",
                of=of,
                **vars(overlap),
            )
            for overlap, of in (
                (self.overlap, message("all directions")),
                (self.overlap_90, message("90 % of energy")),
            )
            if overlap
        ]
        if self.conflict is not None:
            lines.append(
                message(
                    "stacked at strength 1: norm {norm_sum:.3g}, {norm_if_independent:.3g} if "
                    "independent; {conflict} of the weaker deltas' energy is cancelled",
                    norm_sum=self.norm_sum,
                    norm_if_independent=self.norm_if_independent,
                    conflict=format_percent(self.conflict),
                )
            )
            worst = max(self.modules, key=lambda path: self.modules[path].conflict or 0.0)
            most = self.modules[worst].conflict or 0.0
            if most > 1e-4:
                lines[-1] += message(
                    ", most in {worst} ({most})", worst=worst, most=format_percent(most)
                )
        for label, paths in (
            (message("only in a"), self.only_in_a),
            (message("only in b"), self.only_in_b),
        ):
            if paths:
                lines.append(join_messages(": ", [label, shorten_list(paths, 3)]))
        lines += mark_warnings(finding.text for finding in self.findings)
        return join_messages("\n", lines)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What no statistic includes."""
        found = []
        families = [get_family(name) for name in (self.family_a, self.family_b)]
        if None not in families and families[0] is not families[1]:
            titles = [family.title for family in families if family is not None]
            text = message(
                "a was made for {title}, b for {other}: no model takes both",
                title=titles[0],
                other=titles[1],
            )
            found.append(Finding("other_family", WARNING, text))
        if not self.not_comparable:
            return tuple(found)
        reasons = [
            join_messages(": ", [path, reason]) for path, reason in self.not_comparable.items()
        ]
        text = message(
            "{num_modules} left out of the comparison: {reasons}",
            num_modules=format_count(len(reasons), "module"),
            reasons=shorten_list(reasons, 3),
        )
        return (*found, Finding("modules_not_compared", WARNING, text, len(reasons)))


def compare_adapters(
    a: Adapter,
    b: Adapter,
    *,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Comparison:
    """Compares the deltas of two adapters, module by module and as a whole.

    Ranks, kinds, scales and targets may differ. Everything comes from the factors where a kind
    has any; the others are compared by their matrices and without subspaces. Bias deltas are left
    out.

    Raises:
        NonFiniteWeightsError: an adapter holds NaN or Inf.
        InterruptedError: `should_stop` returned True.
    """
    a.check_finite()
    b.check_finite()
    modules: dict[str, ModuleComparison] = {}
    not_comparable: dict[str, str] = {}
    total = Products()
    for path in track(
        [*a, *(p for p in b if p not in a.modules)], progress, should_stop, message("comparison")
    ):
        first, second = a.modules.get(path), b.modules.get(path)
        reason = explain_incomparable(first, second)
        if reason:
            not_comparable[path] = reason
        elif first is not None and second is not None:
            modules[path] = compare_modules(first, second)
            total += modules[path].products
        elif first is not None:
            square = compute_square(first)
            total += Products(square_a=square, square_difference=square)
        elif second is not None:
            square = compute_square(second)
            total += Products(square_b=square, square_difference=square)
    a.release()
    b.release()
    return Comparison(
        total,
        a.name,
        b.name,
        modules,
        only_in_a=tuple(path for path in a if path not in b.modules),
        only_in_b=tuple(path for path in b if path not in a.modules),
        not_comparable=not_comparable,
        family_a=a.family,
        family_b=b.family,
    )


def explain_incomparable(a: ModuleWeights | None, b: ModuleWeights | None) -> str | None:
    found = [weights for weights in (a, b) if weights is not None]
    for weights in found:
        reason = explain_no_delta(weights)
        if reason:
            return reason
    if a is not None and b is not None and a.shape != b.shape:
        return message("it is {a_shape} in a but {b_shape} in b", a_shape=a.shape, b_shape=b.shape)
    return None


def compare_modules(a: ModuleWeights, b: ModuleWeights) -> ModuleComparison:
    """Of additive weights of one shape."""
    assert a.shape is not None  # see `explain_no_delta`
    facts = (a.shape, a.kind, b.kind, a.rank, b.rank)
    factors_a, factors_b = get_factors(a), get_factors(b)
    if factors_a is None or factors_b is None:
        return ModuleComparison(compute_products(a, b), *facts)
    svd_a, svd_b = compute_svd(factors_a), compute_svd(factors_b)
    left, right = svd_a.project(svd_b)
    outer = svd_a.values[:, None] * svd_b.values
    products = build_products(
        svd_a.values.square().sum().item(),
        svd_b.values.square().sum().item(),
        (outer * left * right).sum().item(),
        lambda: measure_difference(factors_a, factors_b),
    )
    ranks = count_directions(svd_a.values, 1.0), count_directions(svd_b.values, 1.0)
    ranks_90 = count_directions(svd_a.values, ENERGY_90), count_directions(svd_b.values, ENERGY_90)
    return ModuleComparison(
        products,
        *facts,
        overlap=compute_overlap(left, right, *ranks, factors_a.shape),
        overlap_90=compute_overlap(left, right, *ranks_90, factors_a.shape),
    )


def show(value: float | None) -> str:
    return message("undefined (a delta is zero)") if value is None else f"{value:.3g}"

"""New adapters from old ones: `resize_adapter` and `merge_adapters`, exact in the factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from ..adapter.adapter import Adapter
from ..adapter.weights import DiffWeights, DoraWeights, LokrWeights, LoraWeights, ModuleWeights
from ..algebra.factors import Factors, compute_inner_product, get_factors
from ..algebra.products import compute_square, dot
from ..algebra.truncation import (
    Truncated,
    choose_dtype,
    round_all,
    truncate_dense,
    truncate_factors,
    truncate_weights,
    widen_dtype,
)
from ..disk.safetensors_file import load
from ..errors import ConfigError, ShapeError
from ..messages import join_messages, message
from ..progress import Progress, ShouldStop, track
from ..text import shorten
from ..threads import map_in_threads
from .composition import Composition, build_composition, check_energy, check_rank

#: Times the smaller side of a module: a LoRA of a higher rank is not merged bit by bit, but in
#: factors of the rank its delta can have.
MAX_EXCESS = 8
#: Far beyond any use, and far below any dtype's limit.
MAX_STRENGTH = 1e4


def resize_adapter(
    adapter: Adapter,
    rank: int | None = None,
    energy: float | None = None,
    *,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Composition:
    """Lowers every module's rank to the best approximation of its delta.

    LoHa and LoKr become LoRA. A LoRA whose rank is already low enough stays bit-identical;
    nothing is ever padded. Of a DoRA the direction is resized and the magnitude kept: its energies
    are those of the direction.

    Args:
        rank: the maximum rank of a module.
        energy: share of a module's squared Frobenius norm to keep, above 0 and up to 1; the
            smallest rank that does is taken. With both, `rank` is the limit.

    Raises:
        ConfigError: neither or a wrong setting, or an OFT module, which has no rank to lower.
        NonFiniteWeightsError: the adapter holds NaN or Inf.
        InterruptedError: `should_stop` returned True.
    """
    check_rank(rank)
    check_energy(energy)
    if rank is None and energy is None:
        raise ConfigError("resize got neither rank nor energy; give one of them, or both")
    check_kinds(adapter)
    adapter.check_finite()

    def resize(weights: ModuleWeights, stop: ShouldStop | None) -> Truncated:
        return resize_weights(weights, rank, energy)

    found = map_in_threads(resize, adapter.modules.values(), progress, should_stop, "resize")
    parts = dict(zip(adapter.modules, found, strict=True))
    notes = []
    kept = sum(parts[path].weights is weights for path, weights in adapter.modules.items())
    if kept:
        notes.append(
            message(
                "modules small enough and unchanged: {kept} of {num_parts}",
                kept=kept,
                num_parts=len(parts),
            )
        )
    if "DoRA" in adapter.kinds:
        notes.append(message("DoRA: energies are those of the direction; magnitudes are kept"))
    adapter.release()
    step = {"did": "resize", "rank": rank, "energy": energy, "of": adapter.name}
    return build_composition(f"{adapter.name}, resized", parts, adapter.metadata, step, notes)


def resize_weights(weights: ModuleWeights, rank: int | None, energy: float | None) -> Truncated:
    if isinstance(weights, DoraWeights):
        direction = truncate_weights(weights.direction, rank, energy)
        if direction.weights is weights.direction:
            return Truncated(weights, direction.energy)
        resized = DoraWeights(direction.weights, weights.parts["magnitude"])
        return Truncated(resized, direction.energy, direction.residual)
    if weights.shape is None or len(weights.shape) != 2:
        return Truncated(weights, 0.0)  # a norm or a bias
    return truncate_weights(weights, rank, energy)


def merge_adapters(
    adapters: Sequence[tuple[Adapter, float]],
    rank: int | None = None,
    *,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Composition:
    """One adapter whose deltas are the sums of strength * delta over the given ones.

    Without `rank` the factors are concatenated, so a module's rank is the sum of the ranks; with
    it the sum is cut to the best approximation. Targets may differ. A module that only one adapter
    holds keeps its kind; one at strength 0 counts as absent.

    Raises:
        ConfigError: nothing to merge, a wrong setting, or a module whose kind cannot be summed.
        ShapeError: two adapters disagree about the shape of a module, or are of two families.
        NonFiniteWeightsError: an adapter holds NaN or Inf.
        InterruptedError: `should_stop` returned True.
    """
    check_rank(rank)
    for adapter, strength in adapters:
        if not abs(strength) <= MAX_STRENGTH:
            raise ConfigError(
                "{adapter} has strength {strength:g}; expected a finite number up to "
                "{max_strength:,g}",
                adapter=shorten(adapter.name),
                strength=strength,
                max_strength=MAX_STRENGTH,
            )
        adapter.check_finite()
    used = [(adapter, float(strength)) for adapter, strength in adapters if strength]
    if not used:
        raise ConfigError("there is nothing to merge; give at least one adapter with a strength")
    check_families([adapter for adapter, _ in used])
    paths = dict.fromkeys(path for adapter, _ in used for path in adapter)
    parts = {}
    for path in track(paths, progress, should_stop, message("merge")):
        shares = [(adapter, s) for adapter, s in used if path in adapter.modules]
        check_shapes(path, [adapter for adapter, _ in shares])
        parts[path] = add_weights(path, [(a.modules[path], s) for a, s in shares], rank)
    for adapter, _ in used:
        adapter.release()
    name = " + ".join(adapter.name for adapter, _ in used) if len(used) < 4 else "merged"
    shared = {
        key: value
        for key, value in used[0][0].metadata.items()
        if all(adapter.metadata.get(key) == value for adapter, _ in used)
    }
    sources = [[adapter.name, strength] for adapter, strength in used]
    step = {"did": "merge", "rank": rank, "of": sources}
    return build_composition(name, parts, shared, step, [])


def add_weights(
    path: str, shares: list[tuple[ModuleWeights, float]], rank: int | None
) -> Truncated:
    """strength * delta of every share, summed."""
    if len(shares) == 1:
        weights = scale_weights(path, *shares[0])
        if rank is not None and weights.is_additive:
            return resize_weights(weights, rank, None)
        return Truncated(weights, compute_square(weights) if has_delta(weights) else 0.0)
    for weights, _ in shares:
        if not weights.is_additive:
            raise ConfigError(refuse_sum(path, weights, message("cannot be summed")))
    bias_delta = add_biases(shares)
    matrices = [(weights, strength) for weights, strength in shares if weights.shape is not None]
    if not matrices:
        return Truncated(DiffWeights(None, bias_delta), 0.0)
    dtype = choose_dtype(*(weights for weights, _ in matrices))
    found = [get_factors(weights) for weights, _ in matrices]
    factors = [one for one in found if one is not None]
    if len(factors) == len(matrices):
        exact = sum_factors(zip(factors, (strength for _, strength in matrices), strict=True))
        if rank is not None and rank < exact.inner:
            return truncate_factors(exact, rank, None, dtype, bias_delta)
        return concatenate(matrices, factors, exact, dtype, bias_delta)
    is_dense = any(isinstance(weights, DiffWeights) for weights, _ in matrices)
    if rank is None and not is_dense:  # raised before matrices of gigabytes are made
        whole = next(w for (w, _), f in zip(matrices, found, strict=True) if f is None)
        raise ConfigError(
            "{path} holds {whole_kind} weights without low-rank factors, so the sum has no "
            "exact low rank; give a rank to cut it to.",
            path=path,
            whole_kind=whole.kind,
        )
    dense = sum((strength * w.delta() for w, strength in matrices), torch.zeros(()))
    if is_dense:
        (diff,) = round_all([dense], dtype)
        loss = dot(error := (dense - diff).double(), error)
        return Truncated(DiffWeights(diff, bias_delta), dot(dense, dense), loss)
    return truncate_dense(dense, rank, None, dtype, bias_delta)


def sum_factors(shares: Iterable[tuple[Factors, float]]) -> Factors:
    first, *rest = [factors * strength for factors, strength in shares]
    for factors in rest:
        first = first + factors
    return first


def concatenate(
    shares: list[tuple[ModuleWeights, float]],
    factored: Sequence[Factors],
    exact: Factors,
    dtype: torch.dtype,
    bias_delta: torch.Tensor | None,
) -> Truncated:
    """The factors side by side, under the largest of their scales.

    Tensors with exactly that scale stay bit-identical; the others shrink, so nothing overflows.
    """
    downs, ups, scales = [], [], []
    for (weights, strength), factors in zip(shares, factored, strict=True):
        if isinstance(weights, LoraWeights) and weights.rank <= MAX_EXCESS * min(weights.shape):
            downs.append(weights.lora_A.double())
            ups.append(weights.lora_B.double())
            scales.append(weights.scale * strength)
        else:
            balance = (factors.up.norm() / factors.down.norm().clamp_min(1e-300)).sqrt()
            balance = balance if balance > 0 else 1.0
            downs.append(factors.down * balance)
            ups.append(factors.up / balance)
            scales.append(strength)
    largest = max(abs(scale) for scale in scales) or 1.0
    ups = [up * (scale / largest) for up, scale in zip(ups, scales, strict=True)]
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    lora_A, lora_B = round_all([down, up], dtype)
    merged = LoraWeights(lora_A, lora_B, largest * len(lora_A), bias_delta)
    # up @ down - lora_B @ lora_A, itself as factors, so that nothing cancels
    lost = Factors(lora_A.double(), up - lora_B) + Factors(down - lora_A, up)
    is_exact = torch.equal(up, lora_B.double()) and torch.equal(down, lora_A.double())
    loss = 0.0 if is_exact else largest**2 * compute_inner_product(lost, lost)
    return Truncated(merged, compute_inner_product(exact, exact), loss)


def scale_weights(path: str, weights: ModuleWeights, strength: float) -> ModuleWeights:
    """The same kind with `strength` times the delta; the scale takes what it can, exactly."""
    if strength == 1.0:
        return weights
    if not weights.is_additive:
        what = message("cannot be taken at strength {strength:g}", strength=strength)
        raise ConfigError(refuse_sum(path, weights, what))
    factors = {}
    if weights.parts.get("bias_delta") is not None:
        factors["bias_delta"] = strength
    has_alpha = not isinstance(weights, DiffWeights) and not (
        isinstance(weights, LokrWeights) and weights.is_full
    )
    scaled = weights.with_alpha(weights.alpha * abs(strength)) if has_alpha else weights
    names = ("lora_B", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff")
    carrier = next((name for name in names if name in weights.parts), None)
    if carrier is not None:
        factors[carrier] = math.copysign(1.0, strength) if has_alpha else strength
    parts = dict(weights.parts)
    for name, factor in factors.items():
        if factor != 1.0:
            tensor = load(parts[name])
            exact = tensor.double() * factor
            (parts[name],) = round_all([exact], choose_scaled_dtype(tensor, factor))
    return scaled.with_parts(parts)


def choose_scaled_dtype(tensor: torch.Tensor, factor: float) -> torch.dtype:
    """Its own where that holds the result as finely; a change of sign is exact in most floats."""
    dtype = tensor.dtype
    if factor == -1.0 and dtype.is_floating_point and torch.finfo(dtype).min < 0:
        return dtype
    return widen_dtype(dtype)


def refuse_sum(path: str, weights: ModuleWeights, what: str) -> str:
    return message(
        "{path} holds {weights_kind} weights, which {what}: their delta depends on the base "
        "weight. Merge that file into the model instead, or leave it out.",
        path=path,
        weights_kind=weights.kind,
        what=what,
    )


def add_biases(shares: list[tuple[ModuleWeights, float]]) -> torch.Tensor | None:
    biases = [(w.bias_delta, s) for w, s in shares if w.bias_delta is not None]
    if not biases:
        return None
    total = sum((bias.double() * strength for bias, strength in biases), torch.zeros(()))
    (rounded,) = round_all([total], widen_dtype(biases[0][0].dtype))
    return rounded


def has_delta(weights: ModuleWeights) -> bool:
    return weights.is_additive and weights.shape is not None


def check_kinds(adapter: Adapter) -> None:
    for path, weights in adapter.modules.items():
        if weights.kind == "OFT":
            raise ConfigError(
                "{path} holds OFT weights, a rotation of the base weight, which has no rank to "
                "lower; expected LoRA, LoHa, LoKr or DoRA.",
                path=path,
            )


def check_families(adapters: Sequence[Adapter]) -> None:
    known = {a.base_family: a for a in reversed(adapters) if a.base_family is not None}
    if len(known) > 1:
        found = ", ".join(
            message("{a} for {title}", a=shorten(a.name), title=f.title)
            for f, a in reversed(known.items())
        )
        raise ShapeError(
            "the adapters were made for different models: {found}. Merge adapters made for the "
            "same model.",
            found=found,
        )


def check_shapes(path: str, adapters: Sequence[Adapter]) -> None:
    modules = [(adapter.name, adapter.modules[path]) for adapter in adapters]
    shapes = {name: weights.shape or (weights.out_features,) for name, weights in modules}
    known = {weights.shape for _, weights in modules if weights.shape is not None}
    if len(known) > 1 or len({weights.out_features for _, weights in modules}) > 1:
        found = join_messages(
            ", ",
            [
                message("{shape} in {file}", shape=shape, file=name)
                for name, shape in shapes.items()
            ],
        )
        raise ShapeError(
            "{path} is {found}; expected one shape. Merge adapters made for the same model.",
            path=path,
            found=found,
        )

"""The difference of two models as a LoRA: `extract_adapter`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from ..adapter.weights import DiffWeights
from ..algebra.matmul_precision import exact_products
from ..algebra.truncation import Truncated, sum_squares, truncate_dense
from ..base_model.base_weights import BaseWeights, fetch, open_base
from ..disk.safetensors_file import AnyTensor
from ..errors import ConfigError, KeyFormatError, NonFiniteWeightsError, ShapeError
from ..messages import message
from ..progress import Progress, ShouldStop, track
from ..text import format_count, shorten_list
from .composition import Composition, build_composition, check_rank

Source = BaseWeights | Mapping[str, AnyTensor] | str | os.PathLike[str]


def extract_adapter(
    base: Source,
    tuned: Source,
    rank: int,
    *,
    biases: bool = True,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Composition:
    """A LoRA that turns `base` into `tuned`, as far as `rank` allows.

    Linear by Linear, the float32 difference goes through a randomised SVD, with full float32
    products whatever PyTorch's settings; no more than one module of either model is in memory.
    `retained` and `residual` are measured on the difference itself, so `residual` is a bound that
    holds: |tuned - base - delta|_F, which no singular value of what is missing exceeds. What does
    not differ is left out. Biases and norms are small, so their differences are kept exactly, as
    the `.diff_b` and `.diff` entries that ComfyUI applies too; they are no part of the energy.

    Args:
        base: a model file, a GGUF, a diffusers folder, or tensors by `<module_path>.weight`; bf16,
            fp16, fp32, fp8, int8 or mxfp8, with or without the prefix of ComfyUI's or diffusers'
            files.
        tuned: the same for the fine-tuned model.
        biases: whether to include biases and norms that differ.
        device: where a module's difference is decomposed; the result is on the CPU.

    Raises:
        ConfigError: a wrong rank, models that do not differ, or a packed storage.
        FileError: a file is missing, damaged, or stored in an unsupported way.
        KeyFormatError: no Qwen-Image model, or one lacks Linears of the other.
        ShapeError: the models have Linears of different shapes.
        NonFiniteWeightsError: a difference holds NaN or Inf.
        InterruptedError: `should_stop` returned True.
    """
    check_rank(rank)
    if rank is None:
        raise ConfigError("extract got no rank; expected a whole number of at least 1")
    base, tuned = open_base(base), open_base(tuned)
    matrices = check_models(base, tuned)
    try:
        vectors, notes = compute_vectors(base, tuned) if biases else ({}, [])
        paths = track(matrices, progress, should_stop, message("extraction"))
        parts = extract_linears(base, tuned, matrices, paths, rank, vectors, device)
    finally:
        base.release()
        tuned.release()
    num_same = len(matrices) - sum(part.energy > 0 for part in parts.values())
    for name, difference in vectors.items():  # of norms
        parts[name.removesuffix(".weight")] = Truncated(DiffWeights(difference), 0.0)
    if not parts:
        raise ConfigError(
            "{base} and {tuned} hold the same weights in all {number} Linears, so there is "
            "nothing to extract; choose the model and its fine-tune.",
            **{"base": base.name, "tuned": tuned.name, "number": len(matrices)},
        )
    if num_same:
        notes.insert(0, describe_same(num_same, len(matrices)))
    step = {"did": "extract", "rank": rank, "of": [tuned.name, base.name]}
    return build_composition(f"{tuned.name} - {base.name}", parts, {}, step, notes)


def describe_same(number: int, total: int) -> str:
    return message("Linears that do not differ: {number} of {total}", number=number, total=total)


def read_values(model: BaseWeights, path: str, device: torch.device | str) -> torch.Tensor:
    """float32 (out, in) of a Linear the model is known to have."""
    weight = model.get(path)
    assert weight is not None  # see `check_models`
    return weight.to(device).values


def extract_linears(
    base: BaseWeights,
    tuned: BaseWeights,
    matrices: Mapping[str, AnyTensor],
    paths: Iterable[str],
    rank: int,
    vectors: dict[str, torch.Tensor],
    device: torch.device | str,
) -> dict[str, Truncated]:
    """The Linears that differ; the differences of their biases are taken out of `vectors`."""
    parts = {}
    with exact_products():
        for path in paths:
            difference = read_values(tuned, path, device) - read_values(base, path, device)
            bias = vectors.pop(f"{path}.bias", None)
            part = extract_module(path, difference, rank, matrices[path].dtype, bias)
            if part is not None:
                parts[path] = part
    return parts


def extract_module(
    path: str,
    difference: torch.Tensor,
    rank: int,
    stored: torch.dtype,
    bias: torch.Tensor | None,
) -> Truncated | None:
    """One Linear's part, on the CPU; None if neither it nor its bias differs."""
    square = sum_squares(difference)
    check_finite(square, path)
    if square:
        part = truncate_dense(difference, rank, None, choose_storage(stored), bias)
        return replace(part, weights=part.weights.to(torch.device("cpu")))
    return None if bias is None else Truncated(DiffWeights(bias_delta=bias), 0.0)


def compute_vectors(
    base: BaseWeights, tuned: BaseWeights
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Name -> float32 difference of every bias and norm that differs, and what to report.

    Raises:
        ShapeError: one has two lengths.
        NonFiniteWeightsError: one differs by NaN or Inf.
    """
    found, alone = {}, 0
    ours = base.list_vectors()
    theirs = tuned.list_vectors()
    matrices = tuned.list_matrices()
    for name, tensor in theirs.items():
        path, _, part = name.rpartition(".")
        if name not in ours or (part == "bias" and path not in matrices):
            alone += name not in ours
            continue
        if ours[name].shape != tensor.shape:
            raise ShapeError(
                "{tuned} and {base} differ in the shape of {name}: {tensor_shape} against "
                "{shape}; expected two models of the same kind.",
                tuned=tuned.name,
                base=base.name,
                name=name,
                tensor_shape=tuple(tensor.shape),
                shape=tuple(ours[name].shape),
            )
        difference = fetch(tensor).float() - fetch(ours[name]).float()
        square = difference.square().sum().item()
        check_finite(square, name)
        if square:
            found[name] = difference
    alone += sum(name not in theirs for name in ours)
    notes = []
    if found:
        num_biases = sum(name.endswith(".bias") for name in found)
        notes.append(
            message(
                "{num_biases} and {num_norms} included",
                num_biases=format_count(num_biases, "bias", "biases"),
                num_norms=format_count(len(found) - num_biases, "norm"),
            )
        )
    if alone:
        notes.append(message("biases and norms in one model only, left out: {alone}", alone=alone))
    return found, notes


def check_finite(square: float, name: str) -> None:
    if not math.isfinite(square):
        raise NonFiniteWeightsError(
            "{name} differs by NaN or Inf; expected finite weights. Check that both files are "
            "complete.",
            name=name,
        )


def check_models(base: BaseWeights, tuned: BaseWeights) -> dict[str, AnyTensor]:
    """The tuned model's Linears, all of which the base has in the same shape."""
    ours, theirs = base.list_matrices(), tuned.list_matrices()
    for there, here, model, other in ((ours, theirs, tuned, base), (theirs, ours, base, tuned)):
        missing = [path for path in there if path not in here]
        if missing:
            raise KeyFormatError(
                "{model} lacks {num_missing} of the {total} Linears of {other}: {missing}; "
                "expected two models of the same kind.",
                model=model.name,
                num_missing=len(missing),
                total=len(there),
                other=other.name,
                missing=shorten_list(missing, 3),
            )
    shapes = [
        message(
            "{path} {shape} against {other_shape}",
            path=path,
            shape=tuple(tensor.shape),
            other_shape=tuple(ours[path].shape),
        )
        for path, tensor in theirs.items()
        if tensor.shape != ours[path].shape
    ]
    if shapes:
        raise ShapeError(
            "{tuned} and {base} differ in the shapes of {num_shapes} Linears: {shapes}; "
            "expected two models of the same kind.",
            tuned=tuned.name,
            base=base.name,
            num_shapes=len(shapes),
            shapes=shorten_list(shapes, 3),
        )
    for model, matrices in ((base, ours), (tuned, theirs)):
        for path, tensor in matrices.items():
            if not (tensor.dtype.is_floating_point or tensor.dtype == torch.int8):
                raise ConfigError(
                    "{model} stores {path} as {tensor_dtype}; expected bf16, fp16, fp32, fp8, "
                    "int8 or mxfp8. Use such a file of the model.",
                    model=model.name,
                    path=path,
                    tensor_dtype=str(tensor.dtype).removeprefix("torch."),
                )
    return theirs


def choose_storage(dtype: torch.dtype) -> torch.dtype:
    """As the tuned model is stored; bf16 where that is fp8 or int8."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype

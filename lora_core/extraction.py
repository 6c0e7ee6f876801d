"""The difference of two models as a LoRA: `extract_adapter`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch

from .base_weights import BaseWeights, open_base
from .composition import Composition, build_composition, check_rank
from .errors import ConfigError, KeyFormatError, NonFiniteWeightsError, ShapeError
from .progress import Progress, ShouldStop, track
from .report import shorten_list
from .stored import AnyTensor
from .truncation import sum_squares, truncate_dense

Source = BaseWeights | Mapping[str, AnyTensor] | str | os.PathLike[str]


def extract_adapter(
    base: Source,
    tuned: Source,
    rank: int,
    *,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Composition:
    """A LoRA that turns `base` into `tuned`, as far as `rank` allows.

    Linear by Linear, the float32 difference goes through a randomised SVD; no more than one module
    of either model is in memory. `retained` and `residual` are measured on the difference itself,
    so `residual` is a bound that holds: |tuned - base - delta|_F, which no singular value of what
    is missing exceeds. Linears that do not differ are left out; so are biases and norms.

    Args:
        base: a model file, or tensors by `<module_path>.weight`; bf16, fp16, fp32, fp8 or scaled
            fp8, with or without the prefix of ComfyUI's or diffusers' files.
        tuned: the same for the fine-tuned model.

    Raises:
        ConfigError: a wrong rank, models that do not differ, or a packed storage.
        FileError: a file is missing or damaged.
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
    parts = {}
    try:
        for path in track(matrices, progress, should_stop, "extraction"):
            difference = tuned.get(path).values - base.get(path).values
            square = sum_squares(difference)
            if not math.isfinite(square):
                raise NonFiniteWeightsError(
                    f"{path} differs by NaN or Inf; expected finite weights. Check that both "
                    "files are whole."
                )
            if square:
                dtype = choose_storage(matrices[path].dtype)
                parts[path] = truncate_dense(difference, rank, None, dtype)
    finally:
        base.release()
        tuned.release()
    if not parts:
        raise ConfigError(
            f"{base.name} and {tuned.name} hold the same weights in all {len(matrices)} Linears, "
            "so there is nothing to extract; choose the model and its fine-tune."
        )
    notes = []
    if len(parts) < len(matrices):
        notes.append(f"{len(matrices) - len(parts)} of {len(matrices)} Linears do not differ")
    step = {"did": "extract", "rank": rank, "of": [tuned.name, base.name]}
    return build_composition(f"{tuned.name} - {base.name}", parts, {}, step, notes)


def check_models(base: BaseWeights, tuned: BaseWeights) -> dict[str, AnyTensor]:
    """The tuned model's Linears, all of which the base has in the same shape."""
    ours, theirs = base.list_matrices(), tuned.list_matrices()
    for there, here, model, other in ((ours, theirs, tuned, base), (theirs, ours, base, tuned)):
        missing = [path for path in there if path not in here]
        if missing:
            raise KeyFormatError(
                f"{model.name} lacks {len(missing)} of the {len(there)} Linears of {other.name}: "
                f"{shorten_list(missing, 3)}; expected two models of the same kind."
            )
    shapes = [
        f"{path} {tuple(tensor.shape)} against {tuple(ours[path].shape)}"
        for path, tensor in theirs.items()
        if tensor.shape != ours[path].shape
    ]
    if shapes:
        raise ShapeError(
            f"{tuned.name} and {base.name} differ in the shapes of {len(shapes)} Linears: "
            f"{shorten_list(shapes, 3)}; expected two models of the same kind."
        )
    for model, matrices in ((base, ours), (tuned, theirs)):
        for path, tensor in matrices.items():
            if not tensor.dtype.is_floating_point:
                raise ConfigError(
                    f"{model.name} stores {path} as {str(tensor.dtype).removeprefix('torch.')}; "
                    "expected bf16, fp16, fp32, fp8 or scaled fp8. Use such a file of the model."
                )
    return theirs


def choose_storage(dtype: torch.dtype) -> torch.dtype:
    """As the tuned model is stored; bf16 where that is fp8."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype

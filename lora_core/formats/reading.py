"""From a state dict to modules and the report: the steps of reading, in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import targets
from ..report import DroppedKey, LoadReport
from ..stored import AnyTensor
from ..weights import ModuleWeights
from .alpha import find_alpha_rules
from .architectures import could_be_flux, detect_variants
from .building import ModuleBuilder
from .parsed_key import ParsedKey, UnknownKey, name_scheme, parse_key
from .recognition import check_any_known, raise_unrecognised
from .sources import choose_sources


def read_modules(
    tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str], path: Path | None, name: str
) -> tuple[dict[str, ModuleWeights], str, LoadReport]:
    """Builds the weights of every module found in `tensors`.

    Returns:
        module path -> weights, the name of the key format, and the report.

    Raises:
        KeyFormatError: no key is of a Qwen-Image module, or a module lacks a partner key.
        ShapeError: the tensors of a module do not fit each other.
    """
    parsed, unknown = parse_keys(tensors)
    check_any_known(parsed, unknown, name)
    chosen, duplicates = choose_sources(parsed)
    formats = Counter(name_scheme(key.prefix) for key in parsed)
    alpha_rules = find_alpha_rules(metadata, path, set(formats))
    builder = ModuleBuilder(tensors, alpha_rules, name)
    modules = builder.build_all(chosen)
    if not modules:
        raise_unrecognised(unknown, len(tensors), name)
    dropped_parts = {key.key for key in builder.unused}
    key_format = formats.most_common(1)[0][0]
    variants, hints = detect_variants(dict(metadata), name)
    preset, width = targets.detect_preset(modules), find_width(modules)
    blocks = {block for block, _ in map(targets.split_path, modules) if block is not None}
    if not variants and could_be_flux(preset, blocks, width):
        hints.append(
            "names and sizes would fit Flux as well (attention of the first 19 blocks only): check "
            "what it was trained for"
        )
    report = LoadReport(
        name=name,
        num_keys=len(tensors),
        num_matched_keys=len(parsed) - len(duplicates) - len(dropped_parts),
        num_modules=len(modules),
        size_bytes=sum(t.numel() * t.dtype.itemsize for t in tensors.values()),
        key_format=key_format if len(formats) == 1 else f"mixed: {', '.join(sorted(formats))}",
        prefixes=count(key.prefix for key in parsed),
        kinds=count(weights.kind for weights in modules.values()),
        dtypes=count(str(w.dtype).removeprefix("torch.") for w in modules.values()),
        ranks=count(weights.rank for weights in modules.values() if weights.kind != "diff"),
        scales=count(weights.scale for weights in modules.values() if weights.kind != "diff"),
        alphas=count(weights.alpha for weights in modules.values() if weights.kind != "diff"),
        alpha_rules=dict(builder.rules),
        preset=preset,
        blocks=targets.format_blocks(blocks),
        width=width,
        unmatched=tuple(
            [DroppedKey(key.key, key.reason, key.nearest) for key in unknown]
            + [DroppedKey(key.key, "has no use in a module of this kind") for key in builder.unused]
        ),
        duplicates=tuple(DroppedKey(key.key, f"also in {by}") for key, by in duplicates),
        non_finite=tuple(builder.non_finite),
        variants=tuple(variants),
        hints=tuple(hints),
    )
    return modules, key_format, report


def count(values: Iterable[Any]) -> dict[Any, int]:
    """A plain dict, which dataclasses.asdict copies; it breaks a Counter."""
    return dict(Counter(values))


def parse_keys(keys: Iterable[str]) -> tuple[list[ParsedKey], list[UnknownKey]]:
    parsed, unknown = [], []
    for key in keys:
        result = parse_key(key)
        (parsed if isinstance(result, ParsedKey) else unknown).append(result)
    return parsed, unknown


def find_width(modules: Mapping[str, ModuleWeights]) -> int | None:
    """Width of the model the adapter was made for, from the first module that tells."""
    for module_path, weights in modules.items():
        block, name = targets.split_path(module_path)
        if block is not None and name in targets.BLOCK_LINEARS and weights.shape is not None:
            return weights.shape[0] // targets.compute_shape(name, 1)[0]
    return None

"""From a state dict to modules and the report: the steps of reading, in their order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter.adapter import detect_family_of
from ..adapter.load_report import DroppedKey, LoadReport
from ..adapter.weights import ModuleWeights
from ..base_model import families, module_paths
from ..base_model.family import Family
from ..disk.safetensors_file import AnyTensor
from ..messages import message
from .alpha import find_alpha_rules
from .architectures import detect_variants, find_flux_alike, names_qwen_image_21
from .building import ModuleBuilder
from .fused import find_member
from .observations import find_more
from .parsed_key import PACKED, ParsedKey, UnknownKey, name_scheme, parse_key
from .recognition import check_any_known, raise_unusable
from .sources import ModuleParts, choose_sources
from .state_dicts import check_numbers


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
    check_numbers(tensors, (key.key for key in parsed), name)
    parsed, spoiled = leave_out_spoiled(parsed, unknown)
    sources = choose_sources(parsed)
    foreign = leave_out_other_families(sources.chosen)
    formats = Counter(name_scheme(key.prefix) for key in parsed)
    alpha_rules = find_alpha_rules(metadata, path, set(formats))
    alpha_rules = alpha_rules.settle(read_ranks(sources.chosen, tensors), name)
    builder = ModuleBuilder(tensors, alpha_rules, name)
    modules = builder.build_all(sources.chosen)
    left_out = [*builder.unused, *spoiled, *foreign]
    if not modules:
        raise_unusable(unknown, left_out, builder.empty, len(tensors), name)
    dropped_parts = {key.key for key, _ in builder.unused}
    key_format = formats.most_common(1)[0][0]
    model = find_model(modules, metadata, name)
    num_kept = len(parsed) - len(sources.duplicates) - len(dropped_parts) - len(foreign)
    report = LoadReport(
        name=name,
        num_keys=len(tensors),
        num_matched_keys=num_kept,
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
        family=None if model.family is None else model.family.name,
        preset=model.preset,
        blocks=module_paths.format_blocks(model.blocks),
        width=model.width,
        unmatched=(
            *(DroppedKey(key.key, key.reason, key.nearest) for key in unknown),
            *(DroppedKey(k.key, reason, find_member(k.module_path)) for k, reason in left_out),
        ),
        duplicates=tuple(DroppedKey(key.key, also_in(by)) for key, by in sources.duplicates),
        non_finite=tuple(builder.non_finite),
        variants=tuple(model.variants),
        hints=tuple(model.hints),
        found=tuple(find_more(modules, builder, alpha_rules, sources, model.family, unknown)),
    )
    return modules, key_format, report


class AdaptedModel(NamedTuple):
    """The model an adapter was made for, as its modules and metadata tell."""

    family: Family | None
    preset: str | None
    blocks: set[int]
    width: int | None
    variants: list[str]
    hints: list[str]


def find_model(
    modules: Mapping[str, ModuleWeights], metadata: Mapping[str, str], name: str
) -> AdaptedModel:
    family = detect_family_of(modules)
    variants: list[str] = []
    hints: list[str] = []
    if family is None or family.variants:
        variants, hints = detect_variants(dict(metadata), name)
        if family is None:
            family = find_family_said(metadata)
            if family is not None and not family.variants:
                variants, hints = [], []
    preset, width = detect_preset(modules, family), find_width(modules, family)
    blocks = {block for block, _ in map(module_paths.split_path, modules) if block is not None}
    flux = find_flux_alike(preset, blocks, width)
    if not variants and flux is not None:
        hints.append(
            message(
                "names and sizes would fit {flux} as well (attention of the first {number} blocks "
                "only): check what it was trained for",
                flux=flux[0],
                number=flux[1],
            )
        )
    hints += describe_other_width(family, width)
    return AdaptedModel(family, preset, blocks, width, variants, hints)


#: Narrower models are made for tests, in any width.
MIN_WIDTH = 1024


def describe_other_width(family: Family | None, width: int | None) -> list[str]:
    """What a width says that no model of the family, or of any, has; SD3's names fit, for one."""
    known = [family] if family else families.FAMILIES
    if width is None or width < MIN_WIDTH or any(width == one.width for one in known):
        return []
    text = message(
        "its modules are {width} wide, those of {titles} {widths}: it was probably made for "
        "another model",
        width=width,
        titles=" or ".join(one.title for one in known),
        widths=" or ".join(str(one.width) for one in known),
    )
    return [text]


def find_family_said(metadata: Mapping[str, str]) -> Family | None:
    """The family of which a header names a model; for files whose names and sizes do not tell."""
    said = set(detect_variants(dict(metadata), "")[0])
    found = [f for f in families.FAMILIES if said and said <= set(f.variants)]
    if names_qwen_image_21(dict(metadata)):
        found.append(families.QWEN_IMAGE_21)
    return found[0] if len(found) == 1 else None


def detect_preset(modules: Mapping[str, ModuleWeights], family: Family | None) -> str | None:
    """The preset of the family; without one that of every family in which it is one."""
    found = {one.detect_preset(modules) for one in ([family] if family else families.FAMILIES)}
    return found.pop() if len(found) == 1 else None


def also_in(place: str) -> str:
    return message("also in {place}", place=place)


def leave_out_other_families(chosen: dict[str, ModuleParts]) -> list[tuple[ParsedKey, str]]:
    """Takes modules out that the family of the others has not; a file is of one family."""
    family = families.detect_by_names(chosen)
    if family is None:
        return []
    foreign = [path for path in chosen if not (family.is_known(path) or family.is_fused(path))]
    reason = message(
        "is no module of {title}, to which most of the others belong", title=family.title
    )
    return [(key, reason) for path in foreign for key in chosen.pop(path).keys.values()]


def leave_out_spoiled(
    parsed: list[ParsedKey], unknown: list[UnknownKey]
) -> tuple[list[ParsedKey], list[tuple[ParsedKey, str]]]:
    """Sets aside the keys of modules that a part which is not supported gives another meaning."""
    spoilers = {key.spoils: key.reason for key in unknown if key.spoils}
    kept, spoiled = [], []
    for key in parsed:
        reason = spoilers.get((key.prefix, key.module_path))
        if reason is None:
            kept.append(key)
        else:
            spoiled.append((key, message("its module has {reason}", reason=reason)))
    return kept, spoiled


BARE_DOWN = ".lora_down"
#: Parts with the rank as their rows.
_RANK_PARTS = ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


def read_ranks(
    chosen: Mapping[str, ModuleParts], tensors: Mapping[str, AnyTensor]
) -> dict[str, int | None]:
    """Module path -> rank of its low-rank parts, or None where it has none of them."""
    ranks: dict[str, int | None] = {}
    for path, parts in chosen.items():
        # A whole LoKr factor takes precedence over its product, whose rank then means nothing.
        replaced = [f"{part}_b" for part in parts.keys]
        used = (part for part in _RANK_PARTS if part not in replaced)
        found = (parts.get(tensors, part) for part in used)
        tensor = next((tensor for tensor in found if tensor is not None and tensor.ndim), None)
        ranks[path] = None if tensor is None else tensor.shape[0]
    return ranks


def count(values: Iterable[Any]) -> dict[Any, int]:
    """A plain dict, which dataclasses.asdict copies; it breaks a Counter."""
    return dict(Counter(values))


def parse_keys(
    tensors: Mapping[str, AnyTensor],
) -> tuple[list[ParsedKey], list[UnknownKey]]:
    parsed: list[ParsedKey] = []
    unknown: list[UnknownKey] = []
    for key in tensors:
        result = parse_key(key)
        if isinstance(result, ParsedKey):
            parsed.append(result)
        else:
            unknown.append(result)
    packed = find_packed(parsed, tensors)
    if packed:
        unknown += [UnknownKey(k.key, PACKED, k.module_path) for k in parsed if k.key in packed]
        parsed = [key for key in parsed if key.key not in packed]
    return parsed, unknown


def find_packed(parsed: Iterable[ParsedKey], tensors: Mapping[str, AnyTensor]) -> set[str]:
    """Keys of nunchaku's factors, which end as some LoRAs' do: there both have the rank last.

    A square lora_down could be either's, such as img_in's at rank 64: the file's others tell.
    """
    pairs: dict[str, list[str]] = defaultdict(list)
    for key in parsed:
        if key.spelling.endswith(BARE_DOWN):
            pairs[key.spelling].append(key.key)
    packed: set[str] = set()
    square: set[str] = set()
    num_plain = 0
    for keys in pairs.values():
        shapes = [tensors[key].shape for key in sorted(keys)]
        is_pair = len(shapes) == 2 and all(len(shape) == 2 for shape in shapes)
        if not is_pair or shapes[1][1] != shapes[0][0]:
            packed.update(keys)
        elif shapes[0][0] == shapes[0][1]:
            square.update(keys)
        else:
            num_plain += 1
    return packed if num_plain and not packed else packed | square


def find_width(modules: Mapping[str, ModuleWeights], family: Family | None) -> int | None:
    """Width of the model the adapter was made for, from the first module that implies it.

    Modules of a file that could be of several families have the same multiples in all of them.
    """
    table = family or families.FAMILIES[0]
    for module_path, weights in modules.items():
        block, name = module_paths.split_path(module_path)
        if block is not None and name in table.block_linears and weights.shape is not None:
            return weights.shape[0] // table.compute_shape(name, 1)[0]
    return None

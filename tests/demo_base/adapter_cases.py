"""Generated adapters, valid and damaged, with an independent float64 computation of their deltas.

For hypothesis; used by tests/fuzz.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import (
    Adapter,
    LoraError,
    build_state_dict,
    compare_adapters,
    compute_delta,
    merge_adapters,
    resize_adapter,
)
from qwen_edit_lora.lora_core.inspection.inspection import inspect_adapter
from qwen_edit_lora.lora_core.inspection.tables import build_table, describe_verdict

MAX_MESSAGE = 400


def check_refusal(error: LoraError) -> None:
    """The message is one short text that can be shown anywhere."""
    assert 0 < len(str(error)) <= MAX_MESSAGE, str(error)
    assert str(error).isprintable(), repr(str(error))


# --- adapters ---

PREFIXES = (
    *("", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model."),
    *("transformer.base_model.model.", "pipe.dit.", "dit.", "unet.", "lora_unet_", "lycoris_"),
    *("lora_transformer_", "module.", "_orig_mod.", "_orig_mod.diffusion_model.", "lycoris."),
    *("lora_unet.", "diffusion_model.module."),
)
ENDINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
)
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
NAMES = {
    "attn.to_q": (6, 6),
    "attn.to_out.0": (6, 6),
    "attn.add_k_proj": (6, 6),
    "img_mlp.net.0.proj": (24, 6),
    "img_mlp.net.2": (6, 24),
    "txt_mod.1": (36, 6),
}
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
KINDS = ("LoRA", "DoRA", "LoHa", "LoKr", "LoKr half", "LoKr factored", "OFT", "diff")
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


@dataclass(frozen=True)
class Part:
    """One tensor of one module, under its key."""

    name: str
    key: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Module:
    path: str
    kind: str
    shape: tuple[int, int]
    rank: int
    prefix: str
    parts: tuple[Part, ...]

    def get(self, name: str) -> torch.Tensor | None:
        return next((part.tensor.double() for part in self.parts if part.name == name), None)


@dataclass(frozen=True)
class Case:
    modules: tuple[Module, ...]
    config_alpha: float | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def state_dict(self) -> dict[str, torch.Tensor]:
        parts = [part for module in self.modules for part in module.parts]
        return {part.key: part.tensor for part in parts} | self.extra


def list_shapes(kind: str, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
    out, in_ = shape
    return {
        "LoRA": {"A": (rank, in_), "B": (out, rank)},
        "DoRA": {"A": (rank, in_), "B": (out, rank), "dora_scale": (out, 1)},
        "LoHa": {
            **{"hada_w1_a": (out, rank), "hada_w1_b": (rank, in_)},
            **{"hada_w2_a": (out, rank), "hada_w2_b": (rank, in_)},
        },
        "LoKr": {"lokr_w1": (3, 3), "lokr_w2": (out // 3, in_ // 3)},
        "LoKr half": {
            **{"lokr_w1": (3, 3), "lokr_w2_a": (out // 3, rank)},
            "lokr_w2_b": (rank, in_ // 3),
        },
        "LoKr factored": {
            **{"lokr_w1_a": (3, 1), "lokr_w1_b": (1, 3)},
            **{"lokr_w2_a": (out // 3, rank), "lokr_w2_b": (rank, in_ // 3)},
        },
        "OFT": {"oft_blocks": (out // 2, 2, 2)},
        "diff": {"diff": shape, "diff_b": (out,)},
    }[kind]


@st.composite
def keys_of_modules(draw, path: str) -> tuple[str, str]:
    """(prefix, stem) of a module, with wrappers anywhere and dots or underscores mixed."""
    prefix = draw(st.sampled_from(PREFIXES))
    parts = path.split(".")
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(parts) - 1))
        parts.insert(at, draw(st.sampled_from(WRAPPERS)))
    stem = ".".join(parts)
    if prefix.startswith(("lora_", "lycoris")):
        how = draw(st.sampled_from(("flat", "flat", "dots", "mixed", "end")))
        if how in ("flat", "end"):
            stem = stem.replace(".", "_")
        elif how == "mixed":
            stem = stem.replace(".", "_", draw(st.integers(1, 2)))
        if how == "end":
            stem += "_"
    return prefix, prefix + stem


@st.composite
def modules(draw, path: str, shape: tuple[int, int], kinds=KINDS) -> Module:
    kind = draw(st.sampled_from(kinds))
    rank = draw(st.integers(1, 4))
    prefix, stem = draw(keys_of_modules(path))
    down, up = draw(st.sampled_from(ENDINGS))
    same_dtype = draw(st.sampled_from(DTYPES))
    mixed = draw(st.integers(0, 5)) == 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for name, size in list_shapes(kind, shape, rank).items():
        dtype = draw(st.sampled_from(DTYPES)) if mixed else same_dtype
        tensor = torch.randn(size, generator=generator).to(dtype)
        parts.append(Part(name, stem + {"A": down, "B": up}.get(name, f".{name}"), tensor))
    alpha = draw(st.one_of(st.none(), st.sampled_from((1, 0.5, 16, -2, 1e3 / 7))))
    if alpha is not None and kind != "diff":
        dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
        parts.append(Part("alpha", f"{stem}.alpha", torch.tensor(alpha, dtype=dtype)))
    return Module(path, kind, shape, rank, prefix, tuple(parts))


@st.composite
def cases(draw) -> Case:
    paths = {}
    for block in draw(st.lists(st.sampled_from((0, 1, 59)), min_size=1, max_size=2, unique=True)):
        for name in draw(st.lists(st.sampled_from(list(NAMES)), max_size=3, unique=True)):
            paths[f"transformer_blocks.{block}.{name}"] = NAMES[name]
    if draw(st.booleans()) or not paths:
        paths["img_in"] = (6, 12)
    return Case(tuple(draw(modules(path, shape)) for path, shape in paths.items()))


def compute_alpha(module: Module, config_alpha: float | None) -> float:
    tensor = module.get("alpha")
    if tensor is not None:
        return tensor.item()
    return module.rank if config_alpha is None else config_alpha


def compute_dense(module: Module, base: torch.Tensor, config_alpha: float | None) -> torch.Tensor:
    """The delta by the formula of its kind, in float64."""
    get = module.get
    scale = compute_alpha(module, config_alpha) / module.rank
    if module.kind == "diff":
        return get("diff")
    if module.kind in ("LoRA", "DoRA"):
        delta = scale * get("B") @ get("A")
        if module.kind == "LoRA":
            return delta
        tuned = base + delta
        return get("dora_scale") * tuned / tuned.norm(dim=1, keepdim=True) - base
    if module.kind == "LoHa":
        first, second = get("hada_w1_a") @ get("hada_w1_b"), get("hada_w2_a") @ get("hada_w2_b")
        return scale * first * second
    if module.kind.startswith("LoKr"):
        w1 = get("lokr_w1_a") @ get("lokr_w1_b") if get("lokr_w1") is None else get("lokr_w1")
        w2 = get("lokr_w2_a") @ get("lokr_w2_b") if get("lokr_w2") is None else get("lokr_w2")
        return (1 if module.kind == "LoKr" else scale) * torch.kron(w1, w2)
    blocks, alpha = get("oft_blocks"), get("alpha")
    skew = blocks - blocks.transpose(1, 2)
    if alpha is not None and alpha > 0:
        is_relative = module.prefix.startswith(("lora_", "lycoris"))
        limit = alpha.item() * (module.shape[0] if is_relative else 1)
        skew = skew * min(1.0, limit / skew.norm().item())
    identity = torch.eye(skew.shape[1]).double()
    turn = torch.stack([(identity + q) @ torch.linalg.inv(identity - q) for q in skew])
    return (torch.block_diag(*turn).T @ base) - base


def make_base(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def check_deltas(adapter: Adapter, case: Case) -> None:
    for module in case.modules:
        base = make_base(module.shape)
        expected = compute_dense(module, base.double(), case.config_alpha)
        found = compute_delta(adapter.modules[module.path], base).double()
        size = expected.abs().max() + base.abs().max()
        assert (found - expected).abs().max() <= 1e-4 * size, module.path
        bias = module.get("diff_b")
        if bias is not None:
            assert torch.equal(adapter.modules[module.path].bias_delta.double(), bias)


def use_in_every_way(adapter: Adapter) -> None:
    """Every operation on an adapter ends with a result or one of our errors."""
    report = adapter.report.to_dict()
    json.dumps({k: v for k, v in report.items() if k != "non_finite"}, default=str)
    adapter.report.to_text()
    for work in (
        lambda: describe_verdict(inspect_adapter(adapter)),
        lambda: build_table(inspect_adapter(adapter, exact=True)),
        lambda: json.dumps(inspect_adapter(adapter).to_dict(), allow_nan=False),
        lambda: json.dumps(compare_adapters(adapter, adapter).to_dict(), allow_nan=False),
        lambda: merge_adapters([(adapter, 1.0), (adapter, -0.5)]).to_text(),
        lambda: merge_adapters([(adapter, 0.5)], rank=1).to_text(),
        lambda: resize_adapter(adapter, rank=2).to_text(),
        lambda: resize_adapter(adapter, energy=0.9).to_text(),
        lambda: build_state_dict(adapter, "kohya"),
    ):
        try:
            work()
        except LoraError as error:
            check_refusal(error)


# --- damaged adapters ---

STRANGE_TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        (
            *("", ".", "..", "\n", "\0", "\ud800", "é" * 40, "transformer_blocks.", "_orig_mod."),
            *(".lora_A.weight", ".alpha", "lora_unet_", ".oft_a" * 60, "down_blocks." * 50),
            *("x" * 600, "transformer_blocks.99999.attn.to_q.lora_A.weight"),
            "transformer_blocks.0.attn.to_q.lora_A.weight\n",
        )
    ),
)


@st.composite
def damages(draw, part: Part) -> list[Part]:
    """Possible replacements of one tensor: nothing, another one, or several."""
    tensor = part.tensor
    how = draw(
        st.sampled_from(
            (
                *("gone", "key", "suffix", "flat", "empty", "side 0", "scalar", "cut", "more axes"),
                *("transposed", "nan", "inf", "huge", "zero", "dtype", "integer", "twice"),
                *("other prefix", "upper", "stretched"),
            )
        )
    )
    if how == "gone":
        return []
    if how == "key":
        at = draw(st.integers(0, len(part.key)))
        return [replace(part, key=part.key[:at] + draw(STRANGE_TEXTS) + part.key[at:])]
    if how == "suffix":
        return [replace(part, key=part.key + draw(STRANGE_TEXTS))]
    if how == "other prefix":
        return [replace(part, key=draw(st.sampled_from(PREFIXES)) + part.key)]
    if how == "upper":
        return [replace(part, key=part.key.upper())]
    if how == "twice":
        return [part, replace(part, key=draw(st.sampled_from(PREFIXES)) + part.key)]
    if how == "flat":
        changed = tensor.reshape(-1)
    elif how == "empty":
        changed = tensor.new_empty(0)
    elif how == "side 0":
        sides = list(tensor.shape) or [0]
        sides[draw(st.integers(0, len(sides) - 1))] = 0
        changed = tensor.new_empty(sides)
    elif tensor.numel() == 0:
        changed = tensor
    elif how == "scalar":
        changed = tensor.reshape(-1)[0].clone()
    elif how == "cut":
        changed = tensor[:-1] if tensor.ndim else tensor
    elif how == "more axes":
        changed = tensor.reshape(*tensor.shape, 1, 1)
    elif how == "transposed":
        changed = tensor.transpose(0, -1).contiguous() if tensor.ndim else tensor
    elif how == "dtype":
        changed = tensor.to(draw(st.sampled_from(DTYPES)))
    elif how == "integer":
        dtypes = (torch.int64, torch.int8, torch.uint8, torch.bool)
        changed = tensor.float().to(draw(st.sampled_from(dtypes)))
    elif how == "stretched":
        changed = tensor.repeat(*([1] * (tensor.ndim - 1)), 3) if tensor.ndim else tensor
    else:
        number = {"nan": math.nan, "inf": math.inf, "huge": 3e38, "zero": 0.0}[how]
        changed = tensor.to(torch.float64 if draw(st.booleans()) else torch.float32).clone()
        changed[...] = 1e300 if how == "huge" and changed.dtype == torch.float64 else number
    return [replace(part, tensor=changed)]


@st.composite
def damaged_cases(draw) -> Case:
    case = draw(cases())
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(case.modules) - 1))
        module = case.modules[index]
        if module.parts:
            at = draw(st.integers(0, len(module.parts) - 1))
            new = draw(damages(module.parts[at]))
            parts = (*module.parts[:at], *new, *module.parts[at + 1 :])
            changed = replace(module, parts=parts)
            others = case.modules[:index], case.modules[index + 1 :]
            case = replace(case, modules=(*others[0], changed, *others[1]))
    extra = draw(st.dictionaries(STRANGE_TEXTS, st.just(torch.ones(2, 2)), max_size=2))
    return replace(case, extra=extra)


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**400), 10**400),
        st.floats(),
        st.text(max_size=10),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


TO_Q, TO_K = (f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k"))


def make_plain(prefix: str = "transformer.", rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}{path}.lora_{end}.weight": torch.randn(shape, generator=generator)
        for path in (TO_Q, TO_K)
        for end, shape in (("A", (rank, 6)), ("B", (6, rank)))
    }


_folders: list[Path] = []


def get_folder(tmp_path_factory) -> Path:
    """One folder for all examples of this file; function-scoped fixtures are not recreated."""
    if not _folders:
        _folders.append(tmp_path_factory.mktemp("adapters"))
    return _folders[0]

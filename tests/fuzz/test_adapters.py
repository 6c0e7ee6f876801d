"""Generated adapters must be read correctly, or refused with one sentence.

The oracle is an independent float64 computation on the tensors, and PEFT's own rule for patterns.
Hypothesis prints a failing case completely, and it fails the same way next time.
"""

from __future__ import annotations

import json
import math
import re
import string
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import (
    Adapter,
    FileError,
    LoraError,
    build_state_dict,
    compare_adapters,
    compute_delta,
    merge_adapters,
    read_adapter,
    read_state_dict,
    resize_adapter,
    write_adapter,
)
from qwen_edit_lora.lora_core.disk.json_reader import parse_json
from qwen_edit_lora.lora_core.formats.architectures import detect_variants
from qwen_edit_lora.lora_core.formats.module_patterns import PatternTable
from qwen_edit_lora.lora_core.formats.parsed_key import parse_key
from qwen_edit_lora.lora_core.inspection.inspection import inspect_adapter
from qwen_edit_lora.lora_core.inspection.tables import build_table, describe_verdict
from qwen_edit_lora.lora_core.library.details import describe_file
from qwen_edit_lora.lora_core.library.facts import read_facts
from safetensors.torch import save

MAX_MESSAGE = 400
SHARE = settings.default.max_examples


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


@settings(max_examples=SHARE)
@given(case=cases())
def test_valid_adapters_of_every_spelling_and_kind_are_read_correctly(case):
    adapter = read_state_dict(case.state_dict)
    report = adapter.report
    assert (report.unmatched, report.duplicates) == ((), ())
    assert set(adapter.modules) == {module.path for module in case.modules}
    check_deltas(adapter, case)


@settings(max_examples=SHARE // 4)
@given(case=cases())
def test_every_operation_on_valid_adapters_gives_a_result_or_an_error(case):
    use_in_every_way(read_state_dict(case.state_dict))


@settings(max_examples=SHARE // 4)
@given(case=cases(), key_format=st.sampled_from(("comfyui", "kohya", "diffusers", "peft")))
def test_valid_adapters_survive_every_format_that_can_express_them(case, key_format):
    adapter = read_state_dict(case.state_dict)
    try:
        written = build_state_dict(adapter, key_format)
    except LoraError as error:
        check_refusal(error)
        return
    if key_format in ("comfyui", "kohya"):  # the others keep alpha elsewhere
        check_deltas(read_state_dict(written), case)


@settings(max_examples=SHARE // 4)
@given(data=st.data(), name=st.sampled_from(list(FUSED)))
def test_fused_modules_are_split_exactly_or_reported(data, name):
    path = f"transformer_blocks.3.{name}"
    kinds = tuple(kind for kind in KINDS if kind != "diff")
    module = data.draw(modules(path, (18, 6), kinds))
    beside = data.draw(modules("transformer_blocks.3.img_mlp.net.2", (6, 24), ("LoRA",)))
    case = Case((module, beside))
    adapter = read_state_dict(case.state_dict)
    members = [f"transformer_blocks.3.{member}" for member in FUSED[name]]
    if members[0] not in adapter.modules:
        assert module.kind == "OFT"
        assert adapter.report.warnings
        return
    base = make_base(module.shape)
    expected = compute_dense(module, base.double(), None)
    found = [
        compute_delta(adapter.modules[member], rows).double()
        for member, rows in zip(members, base.split(6), strict=True)
    ]
    size = expected.abs().max() + base.abs().max()
    assert (torch.cat(found) - expected).abs().max() <= 1e-4 * size
    assert "fused_split" in [finding.kind for finding in adapter.report.findings]


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


@settings(max_examples=SHARE)
@given(case=damaged_cases())
def test_damaged_adapters_are_refused_with_a_message_or_usable(case):
    try:
        adapter = read_state_dict(case.state_dict, name="damaged.safetensors")
    except LoraError as error:
        check_refusal(error)
        return
    for warning in adapter.report.warnings:
        assert len(warning) <= 2 * MAX_MESSAGE
    use_in_every_way(adapter)


@settings(max_examples=SHARE // 2)
@given(case=damaged_cases())
def test_what_a_damaged_adapter_lost_is_always_reported(case):
    """Without a warning, everything in the file must be in the adapter."""
    state_dict = case.state_dict
    try:
        adapter = read_state_dict(state_dict)
    except LoraError:
        return
    if not adapter.report.warnings:
        assert adapter.report.num_matched_keys == len(state_dict)


# --- header, metadata and config ---

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
PATTERN_PIECES = (
    *("transformer_blocks", "attn", "to_q", "to_k", ".", ".", r"\.", r"\d+", ".*", "1", "0", "t"),
    *("img_mlp", "net", "proj", "^", "$", "_", "10", "0.attn", "attn.to_q"),
)
PATTERNS = st.lists(st.sampled_from(PATTERN_PIECES), min_size=1, max_size=7).map("".join)
HOSTILE_PATTERNS = st.sampled_from(
    (
        *("([a-z_.0-9]+)+X", "(a*)*b", "(?i)to_q", "[" * 500, "(" * 500, "(?P<", "\\", "*", "+"),
        *("to_q|to_k", "to_[qk]", "(to_q)", ".*" * 90 + "X", "a" * 5000, r"\d+" * 60),
    )
)
TO_Q, TO_K = (f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k"))


def make_plain(prefix: str = "transformer.", rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}{path}.lora_{end}.weight": torch.randn(shape, generator=generator)
        for path in (TO_Q, TO_K)
        for end, shape in (("A", (rank, 6)), ("B", (6, rank)))
    }


@settings(max_examples=SHARE)
@given(pattern=st.one_of(PATTERNS, HOSTILE_PATTERNS, st.text(max_size=20)))
def test_a_pattern_matches_as_in_peft_or_is_refused(pattern):
    table = PatternTable([pattern])
    if table.unsupported or len(re.findall(r"[*+]", pattern)) > 5:  # PEFT's way might never end
        table.find(TO_Q)
        return
    for name in (TO_Q, TO_K, "transformer_blocks.10.img_mlp.net.0.proj", "img_in"):
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert (table.find(name) is not None) == expected, name


@settings(max_examples=SHARE)
@given(
    alpha=st.one_of(st.none(), st.floats(-100, 100).map(lambda x: round(x, 3)), st.integers(1, 64)),
    patterns=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=4),
    is_rank_stabilised=st.booleans(),
    prefix=st.sampled_from(("", "transformer.")),
)
def test_a_config_of_the_header_scales_as_in_peft(alpha, patterns, is_rank_stabilised, prefix):
    fields = {"alpha_pattern": patterns, "use_rslora": is_rank_stabilised, "r": 4}
    fields |= {} if alpha is None else {"lora_alpha": alpha}
    text = json.dumps({prefix + name: value for name, value in fields.items()})
    adapter = read_state_dict(make_plain(), {"lora_adapter_metadata": text})
    if "pattern_not_taken" in [finding.kind for finding in adapter.report.findings]:
        return
    for path in (TO_Q, TO_K):
        matching = (n for p, n in patterns.items() if re.match(rf"(.*\.)?({p})$", path))
        expected = next(matching, alpha)
        scale = 1.0
        if expected is not None:
            scale = expected / (2 if is_rank_stabilised else 4)
        assert adapter.modules[path].scale == pytest.approx(scale)


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": st.one_of(st.integers(1, 64), JSON_VALUES),
        "alpha": st.one_of(st.integers(1, 64), JSON_VALUES),
        "r": st.one_of(st.integers(1, 64), JSON_VALUES),
        "use_rslora": st.one_of(st.booleans(), JSON_VALUES),
        "alpha_pattern": st.one_of(
            st.dictionaries(
                st.one_of(PATTERNS, HOSTILE_PATTERNS), st.one_of(st.integers(), JSON_VALUES)
            ),
            JSON_VALUES,
        ),
        "rank_pattern": st.one_of(st.dictionaries(PATTERNS, st.integers(1, 9)), JSON_VALUES),
        "target_modules": st.one_of(st.lists(PATTERNS), PATTERNS, HOSTILE_PATTERNS, JSON_VALUES),
        "init_lora_weights": st.one_of(
            st.sampled_from((True, "gaussian", "pissa", "olora", "eva", "pissa_niter_16")),
            JSON_VALUES,
        ),
        "peft_type": st.one_of(st.sampled_from(("LORA", "LOHA", "LOKR", "ADALORA")), JSON_VALUES),
        "use_qalora": JSON_VALUES,
        "kasa_config": JSON_VALUES,
    },
)


def encode(value: object, how: str) -> bytes:
    text = json.dumps(value)
    data = text.encode("utf-8")
    return {
        "plain": data,
        "mark": b"\xef\xbb\xbf" + data,
        "utf-16": text.encode("utf-16"),
        "cut": data[: len(data) // 2],
        "nul": data + b"\0",
        "deep": b'{"r":' + b"[" * 5000 + b"]" * 5000 + b"}",
        "empty": b"",
        "list": b"[" + data + b"]",
    }[how]


HOWS = ("plain", "plain", "plain", "mark", "utf-16", "cut", "nul", "deep", "empty", "list")


@settings(max_examples=SHARE)
@given(
    config=CONFIGS,
    how=st.sampled_from(HOWS),
    field_name=st.sampled_from(
        ("lora_adapter_metadata", "lora_config", "alpha", "lora_alpha", "ss_network_alpha", "rank")
    ),
    prefix=st.sampled_from(("transformer.", "diffusion_model.", "base_model.model.", "lora_unet_")),
)
def test_any_config_in_the_header_is_used_reported_or_refused(config, how, field_name, prefix):
    text = encode(config, how).decode("utf-8", "replace")
    state_dict = make_plain(prefix)
    if prefix == "lora_unet_":
        state_dict = {
            key.replace("blocks.0.attn.", "blocks_0_attn_"): t for key, t in state_dict.items()
        }
    try:
        adapter = read_state_dict(state_dict, {field_name: text})
    except LoraError as error:
        check_refusal(error)
        return
    report = adapter.report
    for finding in report.findings:
        assert len(finding.text) <= 2 * MAX_MESSAGE
        assert finding.text.isprintable()
    if any("cannot be read" in rule for rule in report.alpha_rules):
        assert report.warnings
    assert all(math.isfinite(weights.scale) for weights in adapter.modules.values())


@settings(max_examples=SHARE // 2)
@given(config=CONFIGS, how=st.sampled_from(HOWS))
def test_a_config_beside_the_file_is_used_reported_or_refused(config, how, tmp_path_factory):
    path = get_folder(tmp_path_factory) / "adapter_model.safetensors"
    path.write_bytes(save(make_plain("base_model.model.")))
    path.with_name("adapter_config.json").write_bytes(encode(config, how))
    try:
        report = read_adapter(path.parent).report
    except LoraError as error:
        check_refusal(error)
        return
    if how not in ("plain", "mark"):
        assert any("adapter_config.json" in text for text in report.warnings)
    read_facts(path)


_folders: list[Path] = []


def get_folder(tmp_path_factory) -> Path:
    """One folder for all examples of this file; function-scoped fixtures are not recreated."""
    if not _folders:
        _folders.append(tmp_path_factory.mktemp("adapters"))
    return _folders[0]


@settings(max_examples=SHARE // 2)
@given(
    metadata=st.dictionaries(
        st.one_of(
            st.sampled_from(
                (
                    *("ss_tag_frequency", "modelspec.title", "trained_words", "trigger_words"),
                    *("modelspec.architecture", "ss_base_model_version", "base_model", "ss_steps"),
                    *("qwen_edit_lora.history", "training_info", "modelspec.trigger_phrase"),
                )
            ),
            st.text(max_size=10),
        ),
        st.one_of(JSON_VALUES.map(json.dumps), st.text(max_size=40), st.just("[" * 5000)),
        max_size=5,
    ),
    file_name=st.text(string.printable + "é中", min_size=1, max_size=40),
)
def test_a_library_entry_of_any_metadata_is_made(metadata, file_name, tmp_path_factory):
    metadata = {
        key.encode("utf-8", "replace").decode(): value.encode("utf-8", "replace").decode()
        for key, value in metadata.items()
    }
    path = get_folder(tmp_path_factory) / "library.safetensors"
    path.write_bytes(save(make_plain("diffusion_model."), metadata))
    facts = read_facts(path)
    assert facts.state == "ok"
    details = describe_file(path, facts, None)
    json.dumps({**details, **vars(facts)}, allow_nan=False)
    detect_variants(metadata, file_name)
    use_in_every_way(read_adapter(path))


# --- files ---


@st.composite
def damaged_files(draw) -> bytes:
    case = draw(st.one_of(cases(), damaged_cases()))
    try:
        data = save({k: t.clone() for k, t in case.state_dict.items()}, {"format": "pt"})
    except (UnicodeEncodeError, ValueError):
        data = save(make_plain())
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        how = draw(st.sampled_from(("flip", "cut", "insert", "size", "header")))
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        if how == "header":
            at = draw(st.integers(8, min(len(data) - 1, 400))) if len(data) > 9 else 0
        if not data:
            break
        if how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif how == "size":
            data[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
        else:
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=SHARE)
@given(data=damaged_files())
def test_a_file_of_any_bytes_is_read_or_refused_with_a_message(data, tmp_path_factory):
    path = get_folder(tmp_path_factory) / "damaged.safetensors"
    path.write_bytes(data)
    facts = read_facts(path)
    json.dumps(vars(facts), allow_nan=False)
    assert len(facts.error) <= MAX_MESSAGE
    try:
        adapter = read_adapter(path)
    except LoraError as error:
        check_refusal(error)
        return
    assert facts.state == "ok"
    inspect_adapter(adapter)
    adapter.release()
    describe_file(path, facts, None)


@settings(max_examples=SHARE // 4)
@given(name=st.text(max_size=60), key_format=st.sampled_from(("comfyui", "peft")))
def test_a_file_of_any_name_is_written_and_read_or_refused(name, key_format, tmp_path_factory):
    if set(name) & set("/\\") or name.strip(".") == "":
        return
    folder = get_folder(tmp_path_factory) / "names"
    adapter = read_state_dict(make_plain(), name=name)
    try:
        written = write_adapter(adapter, folder / name, key_format)
        assert set(read_adapter(written).modules) == {TO_Q, TO_K}
    except LoraError as error:
        check_refusal(error)


@settings(max_examples=SHARE)
@given(data=st.one_of(st.binary(max_size=60), JSON_VALUES.map(json.dumps).map(str.encode)))
def test_the_reader_of_json_agrees_with_the_json_module_or_refuses(data):
    try:
        value = parse_json(data, "a.json")
    except FileError as error:
        check_refusal(error)
        return
    assert value == json.loads(data)


@settings(max_examples=SHARE)
@given(
    key=st.lists(
        st.one_of(
            STRANGE_TEXTS,
            st.sampled_from(
                (*PREFIXES, *WRAPPERS, *NAMES, *FUSED, "transformer_blocks.0.", ".", "_")
            ),
            st.sampled_from([end for pair in ENDINGS for end in pair]),
        ),
        max_size=6,
    ).map("".join)
)
def test_any_key_is_placed_or_has_a_reason(key):
    parsed = parse_key(key)
    assert parsed.key == key
    try:
        read_state_dict(make_plain() | {key: torch.ones(2, 2)})
        read_state_dict({key: torch.ones(2, 2)})
    except LoraError as error:
        check_refusal(error)

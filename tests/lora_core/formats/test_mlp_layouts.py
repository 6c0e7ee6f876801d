"""Every family in every spelling, kind and layout, against dense float64 formulas; conversions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from qwen_edit_lora.lora_core import (
    FAMILIES,
    Adapter,
    ConfigError,
    DiffWeights,
    DoraWeights,
    Family,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    build_state_dict,
    compute_delta,
    read_adapter,
    read_state_dict,
    write_adapter,
)
from qwen_edit_lora.lora_core.base_model.families import FUSED, is_fused
from qwen_edit_lora.lora_core.base_model.module_paths import split_path
from qwen_edit_lora.lora_core.base_model.qwen_image_21 import GATE_UP, QWEN_IMAGE_21
from qwen_edit_lora.lora_core.disk.safetensors_file import SafetensorsFile

GATE, UP, DOWN = (f"transformer_blocks.1.img_mlp.{n}" for n in ("gate_layer", "proj", "out"))
FUSED_PATH = f"transformer_blocks.1.{GATE_UP}"
ROWS, COLUMNS = 12, 4  # of gate_layer at the fixtures' width
LAYOUTS = [
    (family, layout)
    for family in FAMILIES
    for layout in (("split", "fused") if family.mlp_fusion else ("split",))
]


def list_modules(family: Family, layout: str) -> list[str]:
    names = list(family.block_linears)
    if layout == "fused":
        fused = family.fused[family.mlp_fusion]
        names = [name for name in names if name not in fused.members] + [family.mlp_fusion]
    return [f"transformer_blocks.{i}.{n}" for i in range(2) for n in names] + [*family.top_linears]


def compute_dense(kind: str, parts: dict[str, torch.Tensor], scale: float, base: torch.Tensor):
    """The delta by its definition, in float64."""
    parts = {ending: tensor.double() for ending, tensor in parts.items()}
    if kind.startswith("LoKr"):
        w1 = parts.get(".lokr_w1")
        w1 = parts[".lokr_w1_a"] @ parts[".lokr_w1_b"] if w1 is None else w1
        w2 = parts.get(".lokr_w2")
        w2 = parts[".lokr_w2_a"] @ parts[".lokr_w2_b"] if w2 is None else w2
        return (1.0 if kind == "LoKr" else scale) * torch.kron(w1, w2)
    if kind == "LoHa":
        one = parts[".hada_w1_a"] @ parts[".hada_w1_b"]
        return scale * one * (parts[".hada_w2_a"] @ parts[".hada_w2_b"])
    if kind == "OFT":
        blocks = parts[".oft_blocks"]
        skew = blocks - blocks.transpose(1, 2)
        one = torch.eye(skew.shape[1], dtype=torch.float64)
        turn = torch.block_diag(*[(one + q) @ torch.linalg.inv(one - q) for q in skew])
        return parts[".rescale"] * (turn.T @ base) - base
    if kind == "diff":
        return parts[".diff"]
    delta = scale * parts["B"] @ parts["A"]
    if kind == "LoRA":
        return delta
    tuned = base + delta
    return parts[".dora_scale"] * tuned / tuned.norm(dim=1, keepdim=True) - base


KINDS = ("LoRA", "DoRA", "LoHa", "LoKr", "LoKr half", "LoKr factored", "OFT", "diff")


@pytest.mark.parametrize(("family", "layout"), LAYOUTS, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_spelling_reads_as_its_definition(
    kind, family, layout, key_style, make_state_dict, spell_key, shape_module
):
    modules = list_modules(family, layout)
    alpha = None if kind in ("OFT", "diff") else 3.0
    state_dict = make_state_dict(key_style, modules, rank=2, alpha=alpha, kind=kind)
    adapter = read_state_dict(state_dict)
    assert adapter.family == adapter.report.family == family.name
    assert (adapter.report.num_matched_keys, adapter.report.warnings) == (len(state_dict), ())
    assert set(adapter.modules) == set(list_modules(family, "split"))
    endings = {
        "LoRA": ("A", "B"),
        "DoRA": ("A", "B", ".dora_scale"),
        "LoHa": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
        "LoKr": (".lokr_w1", ".lokr_w2"),
        "LoKr half": (".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"),
        "LoKr factored": (".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b"),
        "OFT": (".oft_blocks", ".rescale"),
        "diff": (".diff",),
    }[kind]
    for path in modules:
        parts = {ending: state_dict[spell_key(path, key_style, ending)] for ending in endings}
        members = [path]
        if is_fused(path):
            block, name = split_path(path)
            members = [f"transformer_blocks.{block}.{m}" for m in FUSED[name].members]
        generator = torch.Generator().manual_seed(1)
        base = torch.randn(shape_module(path), generator=generator).double()
        expected = compute_dense(kind, parts, 1.5, base)
        bases = base.chunk(len(members))
        found = [compute_delta(adapter.modules[m], w) for m, w in zip(members, bases, strict=True)]
        torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-4, atol=1e-5)


def make_member(kind: str, seed: int, rows: int = ROWS, scale: float = 2.0):
    """Weights of one half, at float32 values that bf16 holds too."""
    torch.manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    lora = LoraWeights(draw(2, COLUMNS), draw(rows, 2), 2 * scale)
    if kind == "LoRA":
        return lora
    if kind == "DoRA":
        return DoraWeights(lora, draw(rows).abs())
    if kind == "LoHa":
        factors = (draw(rows, 2), draw(2, COLUMNS), draw(rows, 2), draw(2, COLUMNS))
        return LohaWeights(*factors, alpha=2 * scale)
    if kind == "OFT":
        return OftWeights(draw(rows // 3, 3, 3) / 8, draw(rows, 1))
    if kind == "diff":
        return DiffWeights(draw(rows, COLUMNS))
    assert kind == "LoKr"
    torch.manual_seed(7)  # the inner factor is common to both halves
    w2_a, w2_b = draw(rows // 2, 1), draw(1, 2)
    torch.manual_seed(seed)
    return LokrWeights(w1=draw(2, 2), w2_a=w2_a, w2_b=w2_b, alpha=scale)


def make_base(rows: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)).double()


def write_and_read(adapter: Adapter, tmp_path, layout: str, key_format: str = "comfyui") -> Adapter:
    path = write_adapter(adapter, tmp_path / f"{layout}.safetensors", key_format, layout)
    keys = SafetensorsFile(path).tensors
    is_fused_file = any("gate_up" in key for key in keys)
    assert is_fused_file == (layout == "fused")
    assert not (is_fused_file and any("gate_layer" in key for key in keys))
    return read_adapter(path)


def compute_half(adapter: Adapter, path: str) -> torch.Tensor:
    base = make_base(2 * ROWS)
    return compute_delta(adapter.modules[path], base[:ROWS] if path == GATE else base[ROWS:])


@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "OFT", "diff"])
def test_split_to_fused_and_back_keeps_every_delta(kind, key_format, tmp_path):
    modules = {GATE: make_member(kind, 1), UP: make_member(kind, 2), DOWN: LORA_OF_DOWN}
    adapter = Adapter(modules)
    fused = write_and_read(adapter, tmp_path, "fused", key_format)
    again = write_and_read(fused, tmp_path, "split", key_format)
    for path in (GATE, UP):
        expected = compute_half(adapter, path)
        for other in (fused, again):
            torch.testing.assert_close(compute_half(other, path), expected, rtol=1e-6, atol=1e-6)
        assert again.modules[path].rank == adapter.modules[path].rank
        assert again.modules[path].scale == adapter.modules[path].scale


LORA_OF_DOWN = LoraWeights(torch.ones(1, ROWS), torch.ones(COLUMNS, 1))


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_the_fused_weight_of_a_written_file_is_both_halves_below_each_other(kind, tmp_path):
    adapter = Adapter({GATE: make_member(kind, 1), UP: make_member(kind, 2)})
    path = write_adapter(adapter, tmp_path / "a.safetensors", "kohya", "fused")
    file = SafetensorsFile(path)
    stem = "lora_unet_transformer_blocks_1_img_mlp_gate_up"
    endings = {".lora_down.weight": "A", ".lora_up.weight": "B"}
    parts = {
        endings.get(key.removeprefix(stem), key.removeprefix(stem)): tensor.load()
        for key, tensor in file.tensors.items()
    }
    rank = next(tensor.shape[1] for end, tensor in parts.items() if end in ("B", ".hada_w1_a"))
    assert rank == 4
    scale = parts[".alpha"].item() / rank
    halves = [adapter.modules[half].delta().double() for half in (GATE, UP)]
    torch.testing.assert_close(compute_dense(kind, parts, scale, None), torch.cat(halves))


def test_a_round_trip_of_equal_scales_is_bit_identical(tmp_path):
    adapter = Adapter({GATE: make_member("LoRA", 1), UP: make_member("LoRA", 2)})
    again = write_and_read(write_and_read(adapter, tmp_path, "fused"), tmp_path, "split")
    for path, weights in adapter.modules.items():
        for name in ("lora_A", "lora_B"):
            found = again.modules[path].part(name)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, weights.part(name))


@pytest.mark.parametrize(
    ("scales", "ranks"), [((2.0, 0.5), (2, 2)), ((1 / 3, 0.7), (2, 2)), ((1.0, 1.0), (2, 3))]
)
def test_halves_of_different_scales_and_ranks_are_fused_exactly(scales, ranks, tmp_path):
    modules = {}
    for path, scale, rank in zip((GATE, UP), scales, ranks, strict=True):
        lora_A, lora_B = torch.randn(rank, COLUMNS), torch.randn(ROWS, rank)
        modules[path] = LoraWeights(lora_A.bfloat16(), lora_B.bfloat16(), scale * rank)
    adapter = Adapter(modules)
    fused = write_and_read(adapter, tmp_path, "fused")
    again = write_and_read(fused, tmp_path, "split")
    for path, rank in zip((GATE, UP), ranks, strict=True):
        assert again.modules[path].rank == rank
        for other in (fused, again):
            expected = adapter.modules[path].delta()
            torch.testing.assert_close(other.modules[path].delta(), expected, rtol=1e-6, atol=1e-6)


def test_halves_trained_fused_share_lora_A_and_stay_of_their_rank(tmp_path):
    lora_A, lora_B = torch.randn(3, COLUMNS), torch.randn(2 * ROWS, 3)
    stem = f"diffusion_model.{FUSED_PATH}"
    state_dict = {f"{stem}.lora_A.weight": lora_A, f"{stem}.lora_B.weight": lora_B}
    adapter = read_state_dict(state_dict)
    assert adapter.modules[GATE].lora_A is adapter.modules[UP].lora_A
    split = write_and_read(adapter, tmp_path, "split")
    assert split.modules[GATE].rank == 3
    fused = SafetensorsFile(
        write_adapter(split, tmp_path / "again.safetensors", mlp_layout="fused")
    ).tensors
    for key, tensor in state_dict.items():
        assert torch.equal(fused[key].load(), tensor)


def test_halves_of_their_own_keep_columns_of_zeros(tmp_path):
    """Only what shares lora_A can have come from an exact fusion."""
    modules = {}
    for column, path in enumerate((GATE, UP)):
        lora_B = torch.zeros(ROWS, 2)
        lora_B[:, column] = 1.0
        modules[path] = LoraWeights(torch.randn(2, COLUMNS), lora_B)
    again = write_and_read(Adapter(modules), tmp_path, "split")
    assert {weights.rank for weights in again.modules.values()} == {2}


@pytest.mark.parametrize("present", [GATE, UP])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "diff"])
def test_a_lone_half_gets_zeros_for_the_other(kind, present, tmp_path):
    adapter = Adapter({present: make_member(kind, 1)})
    fused = write_and_read(adapter, tmp_path, "fused")
    absent = UP if present == GATE else GATE
    assert fused.modules[absent].delta().abs().max() == 0
    torch.testing.assert_close(fused.modules[present].delta(), adapter.modules[present].delta())
    assert fused.modules[present].rank == adapter.modules[present].rank


REFUSED = {
    "two kinds": ({GATE: make_member("LoRA", 1), UP: make_member("LoKr", 2)}, "LoKr and LoRA"),
    "a lone DoRA": ({GATE: make_member("DoRA", 1)}, "only one of its parts holds a DoRA"),
    "columns": (
        {path: DoraWeights(make_member("LoRA", 1), torch.ones(1, COLUMNS)) for path in (GATE, UP)},
        "per input column",
    ),
    "other factors": (
        {GATE: make_member("LoKr", 1), UP: LokrWeights(w1=torch.ones(2, 2), w2=torch.ones(6, 2))},
        "different factors",
    ),
    "a lone rotation": ({UP: make_member("OFT", 1)}, "only one of its parts holds a rotation"),
    "limits": (
        {p: OftWeights(torch.ones(4, 3, 3), alpha=1.0) for p in (GATE, UP)},
        "limits of their own",
    ),
    "block sizes": (
        {GATE: OftWeights(torch.ones(4, 3, 3)), UP: OftWeights(torch.ones(6, 2, 2))},
        "blocks of different sizes",
    ),
}


@pytest.mark.parametrize(("modules", "why"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_fused_form_is_refused_in_a_sentence(modules, why, tmp_path):
    with pytest.raises(ConfigError, match=f"has no exact fused form: .*{why}.* mlp_layout split"):
        write_adapter(Adapter(modules), tmp_path / "a.safetensors", mlp_layout="fused")
    assert list(tmp_path.iterdir()) == []
    write_and_read(Adapter(modules), tmp_path, "split")


@pytest.mark.parametrize("key_format", ["diffusers", "peft"])
def test_formats_of_split_models_refuse_the_fused_layout(key_format, tmp_path):
    adapter = Adapter({GATE: make_member("LoRA", 1)})
    with pytest.raises(ConfigError, match="whose MLP is split"):
        write_adapter(adapter, tmp_path / "a", key_format, "fused")


def test_a_family_of_one_layout_refuses_the_fused_one(tmp_path):
    adapter = Adapter({"transformer_blocks.0.img_mlp.net.2": LORA_OF_DOWN})
    with pytest.raises(ConfigError, match="Qwen-Image, whose MLP has one layout only"):
        write_adapter(adapter, tmp_path / "a.safetensors", mlp_layout="fused")
    assert "diffusion_model." in next(iter(build_state_dict(adapter, mlp_layout="split")))


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="unknown mlp_layout 'both'; expected one of split, fused"
    ):
        write_adapter(Adapter({GATE: LORA_OF_DOWN}), tmp_path / "a.safetensors", mlp_layout="both")


@pytest.mark.parametrize(
    ("layout", "start"), [(None, "transformer_blocks."), ("fused", "diffusion_model.")]
)
def test_the_default_is_spelled_as_comfyui_maps_it_on_every_base(layout, start):
    """Measured on ComfyUI 0.45's key map: bare split is whole on split and fused bases, a prefix
    loses the halves on fused ones; fused is found with the prefix only."""
    adapter = Adapter({GATE: make_member("LoRA", 1), UP: make_member("LoRA", 2)})
    assert {key[: len(start)] for key in build_state_dict(adapter, "comfyui", layout)} == {start}


def test_a_written_file_names_its_family(tmp_path):
    adapter = Adapter({GATE: make_member("LoRA", 1)})
    metadata = SafetensorsFile(write_adapter(adapter, tmp_path / "a.safetensors")).metadata
    assert metadata["ss_base_model_version"] == "qwen_image_21"
    assert metadata["modelspec.architecture"] == "Qwen-Image-2.1/lora"
    report = read_adapter(tmp_path / "a.safetensors").report
    assert (report.variants, report.warnings) == ((), ())
    assert report.to_text().splitlines()[3].startswith("Qwen-Image-2.1, targets custom")
    assert "licence" in [finding.kind for finding in report.findings]


def attention(width: int, block: int = 0, rank: int = 1) -> dict[str, torch.Tensor]:
    """An attention-only file as diffusers' scripts write it."""
    return {
        f"transformer.transformer_blocks.{block}.attn.{name}.lora_{end}.weight": torch.ones(shape)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
        for end, shape in {"A": (rank, width), "B": (width, rank)}.items()
    }


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_attention_alone_is_told_by_its_width(family):
    adapter = read_state_dict(attention(family.width))
    assert adapter.family == family.name
    assert adapter.report.width == family.width
    assert adapter.report.preset in ("attention", "image-attention")


def test_attention_of_another_width_is_told_by_its_last_block():
    assert read_state_dict(attention(64, 32)).family == "qwen-image"


def test_what_nothing_tells_is_said_and_not_guessed():
    adapter = read_state_dict(attention(64, 31))
    assert (adapter.family, adapter.report.family) == (None, None)
    (finding,) = [f for f in adapter.report.findings if f.kind == "family_unknown"]
    assert "Qwen-Image or Qwen-Image-2.1" in finding.text
    assert "Qwen-Image or Qwen-Image-2.1, targets" in adapter.report.to_text()


def test_modules_of_the_other_family_are_left_out_and_told(make_state_dict):
    wanted = make_state_dict("ai-toolkit", [GATE, UP, DOWN])
    other = make_state_dict("ai-toolkit", ["transformer_blocks.1.txt_mlp.net.2"])
    report = read_state_dict(wanted | other).report
    assert report.family == "qwen-image-2.1"
    assert (report.num_modules, report.num_matched_keys, len(report.unmatched)) == (3, 6, 2)
    assert "is no module of Qwen-Image-2.1" in report.unmatched[0].reason


@pytest.mark.parametrize("rank", [1, 2])
def test_factors_without_weight_in_their_keys_are_read(rank):
    """As alibaba-pai's PDD files spell them."""
    down, up = torch.randn(rank, COLUMNS), torch.randn(ROWS, rank)
    adapter = read_state_dict({f"{GATE}.lora_down": down, f"{GATE}.lora_up": up})
    torch.testing.assert_close(adapter.modules[GATE].delta(), up @ down)


def test_nunchakus_packed_factors_are_no_lora():
    packed = {f"{GATE}.lora_down": torch.ones(COLUMNS, 2), f"{GATE}.lora_up": torch.ones(ROWS, 2)}
    report = read_state_dict(
        {f"{UP}.lora_A.weight": torch.ones(2, COLUMNS)}
        | {f"{UP}.lora_B.weight": torch.ones(ROWS, 2)}
        | packed
    ).report
    assert (report.num_modules, len(report.unmatched)) == (1, 2)
    assert "nunchaku" in report.unmatched[0].reason


def test_a_scale_of_2_in_the_header_is_not_halved():
    """Pruna's public file: rank 64 and alpha 128 in `lora_adapter_metadata`."""
    header = {"transformer.r": 64, "transformer.lora_alpha": 128}
    adapter = read_state_dict(
        attention(4096, rank=64), {"lora_adapter_metadata": json.dumps(header)}
    )
    assert adapter.report.scales == {2.0: 4}


def test_keys_of_a_text_encoder_and_of_other_modules_are_told():
    """SimpleTuner leaves a REPA projector's tensors in its files."""
    state_dict = attention(4096) | {
        "text_encoders.qwen3vl_8b.transformer.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(
            1, 8
        ),
        "repa_projector.0.weight": torch.ones(8, 8),
    }
    report = read_state_dict(state_dict).report
    found = {finding.kind: finding for finding in report.findings}
    assert found["text_encoder_keys"].count == 1
    assert found["unmatched_keys"].count == 2
    assert report.num_modules == 4


def test_a_fused_loha_and_kron_of_one_row_split_exactly():
    torch.manual_seed(0)
    w1, w2 = torch.randn(1, 2), torch.randn(2 * ROWS, 2)
    stem = f"lora_unet_{FUSED_PATH.replace('.', '_')}"
    adapter = read_state_dict({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2})
    found = torch.cat([adapter.modules[path].delta() for path in (GATE, UP)])
    torch.testing.assert_close(found, torch.kron(w1, w2))


def test_an_odd_kron_is_left_out_and_told(make_state_dict):
    stem = f"lora_unet_{FUSED_PATH.replace('.', '_')}"
    odd = {f"{stem}.lokr_w1": torch.ones(3, 2), f"{stem}.lokr_w2": torch.ones(8, 2)}
    report = read_state_dict(make_state_dict("musubi", [DOWN]) | odd).report
    assert report.num_modules == 1
    assert "fuses gate_layer and proj in a way that cannot be split" in report.unmatched[0].reason


@pytest.mark.parametrize("rank", [16, 64])
def test_the_size_of_a_full_adapter_is_that_of_public_files(rank):
    modules = {}
    for block in range(QWEN_IMAGE_21.num_blocks):
        for name, (out, in_) in QWEN_IMAGE_21.block_linears.items():
            lora_A = torch.empty(rank, in_, dtype=torch.bfloat16, device="meta")
            lora_B = torch.empty(out, rank, dtype=torch.bfloat16, device="meta")
            modules[f"transformer_blocks.{block}.{name}"] = LoraWeights(lora_A, lora_B)
    adapter = Adapter(modules)
    assert (len(adapter), adapter.family) == (224, "qwen-image-2.1")
    size = sum(weights.size_bytes() for weights in adapter.modules.values())
    assert math.isclose(size / 1e6, 335.5 * rank / 64, abs_tol=0.1)

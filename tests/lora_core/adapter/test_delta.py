"""Deltas against an independent dense implementation in float64."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import (
    ConfigError,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    ShapeError,
    compute_delta,
    read_state_dict,
)

OUT, IN, RANK = 8, 6, 3


@pytest.fixture
def rand():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right as a sum of outer products."""
    columns, rows = left.double().unbind(1), right.double().unbind(0)
    return sum(torch.outer(a, b) for a, b in zip(columns, rows, strict=True))


def kronecker(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The block matrix whose block (i, j) is left[i, j] * right."""
    left, right = left.double(), right.double()
    return torch.cat([torch.cat([x * right for x in row], dim=1) for row in left.unbind(0)])


def assert_delta(weights, expected, base_weight=None):
    delta = compute_delta(weights, base_weight)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.5, 0.5), (-3.0, -1.0), (0.0, 0.0)])
def test_lora_delta_is_the_scaled_product(alpha, scale, rand):
    lora_A, lora_B = rand(RANK, IN), rand(OUT, RANK)
    assert_delta(LoraWeights(lora_A, lora_B, alpha), scale * multiply(lora_B, lora_A))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_lora_delta_is_computed_in_float32_whatever_is_stored(dtype, rand):
    lora_A, lora_B = rand(RANK, IN).to(dtype), rand(OUT, RANK).to(dtype)
    assert_delta(LoraWeights(lora_A, lora_B), multiply(lora_B, lora_A))


def test_float64_weights_give_a_float64_delta(rand):
    lora_A, lora_B = rand(RANK, IN).double(), rand(OUT, RANK).double()
    delta = compute_delta(LoraWeights(lora_A, lora_B))
    assert delta.dtype == torch.float64


def test_loha_delta_is_the_scaled_product_entry_by_entry(rand):
    w1_a, w1_b, w2_a, w2_b = rand(OUT, RANK), rand(RANK, IN), rand(OUT, RANK), rand(RANK, IN)
    expected = 2 / RANK * multiply(w1_a, w1_b) * multiply(w2_a, w2_b)
    assert_delta(LohaWeights(w1_a, w1_b, w2_a, w2_b, alpha=2.0), expected)


@pytest.mark.parametrize("alpha", [None, 7.0, 1e10, float("inf")])
def test_whole_lokr_factors_ignore_alpha(alpha, rand):
    w1, w2 = rand(2, 3), rand(4, 2)
    assert_delta(LokrWeights(w1=w1, w2=w2, alpha=alpha), kronecker(w1, w2))


def test_half_factorised_lokr_scales_by_the_factorised_rank(rand):
    w1, w2_a, w2_b = rand(2, 3), rand(4, RANK), rand(RANK, 2)
    expected = 6 / RANK * kronecker(w1, multiply(w2_a, w2_b))
    assert_delta(LokrWeights(w1=w1, w2_a=w2_a, w2_b=w2_b, alpha=6.0), expected)


def test_lokr_with_a_factorised_left_side_scales_by_its_rank(rand):
    w1_a, w1_b, w2 = rand(2, 2), rand(2, 3), rand(4, 2)
    expected = 6 / 2 * kronecker(multiply(w1_a, w1_b), w2)
    assert_delta(LokrWeights(w1_a=w1_a, w1_b=w1_b, w2=w2, alpha=6.0), expected)


def test_lokr_with_both_sides_factorised_scales_by_the_right_rank(rand):
    w1_a, w1_b, w2_a, w2_b = rand(2, 2), rand(2, 3), rand(4, RANK), rand(RANK, 2)
    expected = 6 / RANK * kronecker(multiply(w1_a, w1_b), multiply(w2_a, w2_b))
    weights = LokrWeights(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=6.0)
    assert_delta(weights, expected)


@pytest.fixture(params=["LoRA", "LoHa", "LoKr"])
def direction(request, rand):
    if request.param == "LoRA":
        return LoraWeights(rand(RANK, IN), rand(OUT, RANK), alpha=1.0)
    if request.param == "LoHa":
        factors = rand(OUT, RANK), rand(RANK, IN), rand(OUT, RANK), rand(RANK, IN)
        return LohaWeights(*factors, alpha=1.0)
    return LokrWeights(w1=rand(2, 3), w2_a=rand(4, 1), w2_b=rand(1, 2), alpha=0.5)


@pytest.mark.parametrize("shape", [(OUT,), (OUT, 1)])
def test_dora_sets_the_norm_of_every_output_row(shape, direction, rand):
    base, magnitude = rand(OUT, IN), rand(*shape).abs()
    tuned = (base + direction.delta()).double()
    length = tuned.square().sum(1).sqrt()
    expected = tuned * (magnitude.double().flatten() / length)[:, None] - base
    assert_delta(DoraWeights(direction, magnitude), expected, base)


def test_dora_may_set_the_norm_of_every_input_column(direction, rand):
    base, magnitude = rand(OUT, IN), rand(1, IN).abs()
    tuned = (base + direction.delta()).double()
    expected = tuned * (magnitude.double() / tuned.square().sum(0).sqrt()) - base
    assert_delta(DoraWeights(direction, magnitude), expected, base)


def test_dora_leaves_a_zero_row_zero_instead_of_nan():
    weights = DoraWeights(LoraWeights(torch.zeros(1, 2), torch.ones(2, 1)), torch.full((2,), 50.0))
    base = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    expected = torch.tensor([[0.0, 0.0], [30.0, 40.0]])
    torch.testing.assert_close(base + compute_delta(weights, base), expected)


def cayley_turn(blocks, base, shrink=1.0):
    """R^T W block by block, R = (I + Q)(I - Q)^-1, Q = shrink * (blocks - blocks^T)."""
    size = blocks.shape[1]
    identity = torch.eye(size, dtype=torch.float64)
    rows = []
    for block, part in zip(blocks.double(), base.double().split(size), strict=True):
        skew = shrink * (block - block.T)
        rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
        rows.append(rotation.T @ part)
    return torch.cat(rows)


def test_oft_delta_is_what_the_rotation_changes(rand):
    blocks, base = rand(2, 4, 4), rand(OUT, IN)
    assert_delta(OftWeights(blocks), cayley_turn(blocks, base) - base, base)


def test_oft_keeps_the_length_of_every_column(rand):
    base = rand(OUT, IN)
    turned = base + compute_delta(OftWeights(rand(2, 4, 4)), base)
    torch.testing.assert_close(turned.norm(dim=0), base.norm(dim=0))


@pytest.mark.parametrize("constraint", [0.5, 1e6])
def test_oft_shrinks_the_rotation_to_its_constraint(constraint, rand):
    blocks, base = rand(2, 4, 4), rand(OUT, IN)
    skew = (blocks - blocks.transpose(1, 2)).double()
    shrink = min(1.0, constraint / skew.square().sum().sqrt().item())
    expected = cayley_turn(blocks, base, shrink) - base
    assert_delta(OftWeights(blocks, alpha=constraint), expected, base)


def test_oft_rescales_rows_after_the_rotation(rand):
    blocks, base, gains = rand(2, 4, 4), rand(OUT, IN), rand(OUT, 1)
    expected = gains.double() * cayley_turn(blocks, base) - base
    assert_delta(OftWeights(blocks, gains), expected, base)


def test_a_whole_delta_comes_back_as_float32(rand):
    diff = rand(OUT, IN).half()
    assert_delta(DiffWeights(diff), diff.double())


@pytest.mark.parametrize(
    "weights",
    [
        DoraWeights(LoraWeights(torch.ones(1, 2), torch.ones(2, 1)), torch.ones(2)),
        OftWeights(torch.zeros(1, 2, 2)),
        DiffWeights(bias_delta=torch.ones(2)),
    ],
    ids=lambda weights: weights.kind,
)
def test_a_kind_that_depends_on_the_base_requires_it(weights):
    with pytest.raises(ConfigError, match="depends on the base weight; pass base_weight"):
        compute_delta(weights)


@pytest.mark.parametrize(
    "weights",
    [
        LoraWeights(torch.ones(1, 2), torch.ones(2, 1)),
        DoraWeights(LoraWeights(torch.ones(1, 2), torch.ones(2, 1)), torch.ones(2)),
        OftWeights(torch.zeros(1, 2, 2)),
    ],
    ids=lambda weights: weights.kind,
)
def test_a_base_of_another_size_is_refused(weights):
    with pytest.raises(ShapeError, match=r"2.*4.*choose an adapter that was trained for this"):
        compute_delta(weights, torch.ones(4, 2))


def test_the_scale_is_derived_from_alpha_and_rank(rand):
    weights = LoraWeights(rand(64, IN), rand(OUT, 64), alpha=8.0)
    assert (weights.rank, weights.alpha, weights.scale) == (64, 8.0, 0.125)


def test_with_alpha_shares_the_tensors_and_leaves_the_original(direction, rand):
    other = direction.with_alpha(4.0)
    assert (other.alpha, direction.alpha == 4.0) == (4.0, False)
    assert all(other.parts[name] is tensor for name, tensor in direction.parts.items())


def test_dora_with_alpha_scales_its_direction(direction):
    weights = DoraWeights(direction, torch.ones(OUT)).with_alpha(direction.alpha * 2)
    base = torch.zeros(OUT, IN)
    assert weights.scale == direction.scale * 2
    torch.testing.assert_close(compute_delta(weights, base).norm(dim=1), torch.ones(OUT))


@pytest.mark.parametrize(
    ("ending", "expected"), [(".diff_b", 3.0), (".lora_B.bias", 1.5), (".b_norm", 3.0)]
)
def test_a_bias_delta_is_scaled_only_where_it_sits_inside_lora_B(ending, expected):
    path = "transformer_blocks.0.attn.to_q"
    state_dict = {
        f"{path}.lora_A.weight": torch.ones(2, IN),
        f"{path}.lora_B.weight": torch.ones(OUT, 2),
        f"{path}.alpha": torch.tensor(1.0),
        path + ending: torch.full((OUT,), 3.0),
    }
    weights = read_state_dict(state_dict).modules[path]
    assert torch.equal(weights.bias_delta, torch.full((OUT,), expected))


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64"),
                                    ("bfloat16", "float64"), ("float16", "float32")])  # fmt: skip
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "LoKr factored", "DoRA", "OFT"])
def test_parts_of_two_dtypes_are_multiplied_in_the_wider_one(kind, dtypes, rand):
    one, two = (getattr(torch, name) for name in dtypes)
    base = rand(OUT, IN)
    weights = {
        "LoRA": lambda: LoraWeights(rand(RANK, IN).to(one), rand(OUT, RANK).to(two), 2.0),
        "LoHa": lambda: LohaWeights(
            *(rand(OUT, RANK).to(one), rand(RANK, IN).to(two)),
            *(rand(OUT, RANK).to(two), rand(RANK, IN).to(one)),
        ),
        "LoKr": lambda: LokrWeights(w1=rand(2, 2).to(one), w2=rand(4, 3).to(two)),
        "LoKr factored": lambda: LokrWeights(
            w1=rand(2, 2).to(one), w2_a=rand(4, 1).to(two), w2_b=rand(1, 3).to(one)
        ),
        "DoRA": lambda: DoraWeights(
            LoraWeights(rand(RANK, IN).to(one), rand(OUT, RANK).to(one)), rand(OUT, 1).to(two)
        ),
        "OFT": lambda: OftWeights(rand(2, 4, 4).to(one), rand(OUT, 1).to(two)),
    }[kind]()
    wide = weights.with_parts({name: t.double() for name, t in weights.parts.items()})
    found = compute_delta(weights, base)
    torch.testing.assert_close(
        found.double(), compute_delta(wide, base.double()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "lora_transformer_"])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 10.0])
def test_the_constraint_of_an_oft_counts_in_out_features_where_lycoris_and_kohya_write_it(
    prefix, alpha, rand
):
    blocks, base = rand(3, 4, 4), rand(12, 5)
    stem = f"{prefix}transformer_blocks_0_attn_to_q"
    state_dict = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(alpha)}
    found = read_state_dict(state_dict).modules["transformer_blocks.0.attn.to_q"]
    skew = (blocks - blocks.transpose(1, 2)).double()
    norm, limit = skew.norm(), alpha * 12
    skew = skew * (limit / norm if norm > limit else 1.0)
    turn = torch.block_diag(
        *((torch.eye(4) + q) @ torch.linalg.inv(torch.eye(4).double() - q) for q in skew)
    )
    expected = turn.T @ base.double() - base.double()
    torch.testing.assert_close(compute_delta(found, base).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_constraint_of_comfyuis_own_trainer_is_the_limit_itself(rand):
    blocks = rand(3, 4, 4)
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    state_dict = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(0.5)}
    assert read_state_dict(state_dict).modules["transformer_blocks.0.attn.to_q"].alpha == 0.5


EMPTY = [
    (LoraWeights, (0, IN), (OUT, 0)),
    (LoraWeights, (RANK, 0), (OUT, RANK)),
    (LoraWeights, (RANK, IN), (0, RANK)),
    (LoraWeights, (0,), (0,)),
    (DiffWeights, (0,), None),
    (DiffWeights, (0, 4), None),
    (DiffWeights, None, (0,)),
]


@pytest.mark.parametrize(("kind", "first", "second"), EMPTY)
def test_a_part_without_numbers_is_refused_by_name(kind, first, second):
    parts = [None if shape is None else torch.ones(shape) for shape in (first, second)]
    with pytest.raises(ShapeError, match="is empty"):
        kind(*parts)


@pytest.mark.parametrize("part", ["diff", "diff_b"])
def test_a_scalar_is_neither_a_weight_nor_a_bias(part):
    key = f"diffusion_model.transformer_blocks.0.attn.to_q.{part}"
    with pytest.raises(ShapeError, match="is a single number"):
        read_state_dict({key: torch.tensor(1.0)})


def test_a_module_larger_than_any_models_is_refused_before_it_takes_memory():
    with pytest.raises(ShapeError, match="its module would have 40000 x 40000 entries"):
        LokrWeights(w1=torch.ones(200, 200), w2=torch.ones(200, 200))
    with pytest.raises(ShapeError, match="100000 x 100000"):
        LoraWeights(torch.ones(1, 100_000), torch.ones(100_000, 1))
    LoraWeights(torch.ones(1, 3072), torch.ones(18432, 1))

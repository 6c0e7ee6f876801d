"""Handmade sweeps with one correct verdict each."""

from __future__ import annotations

import json
import math

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.sweep.cells import Cell
from qwen_edit_lora.lora_core.sweep.measures import SweepMeasures, measure_sweep
from qwen_edit_lora.lora_core.sweep.table import build_sweep_table
from qwen_edit_lora.lora_core.sweep.verdict import SweepVerdict, judge_sweep

SIZE = 64


def make_picture(seed: int = 0) -> torch.Tensor:
    """Like a photograph: smooth, with detail, 0.1 to 0.9."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    grain = torch.rand(1, 3, SIZE, SIZE, generator=generator) * 0.05
    return (0.1 + 0.75 * smooth + grain).movedim(1, -1)


def edit(strength: float, seed: int = 0, amount: float = 0.1) -> torch.Tensor:
    """An edit that grows in proportion to the strength."""
    direction = make_picture(100) - 0.5
    return make_picture(seed) + amount * strength * direction


def measure(pictures: dict[str, torch.Tensor], **more: torch.Tensor) -> SweepMeasures:
    return measure_sweep(list(pictures.values()), list(pictures), **more)


def judge(pictures: dict[str, torch.Tensor], **more: torch.Tensor) -> SweepVerdict:
    return judge_sweep(measure(pictures, **more))


def judge_one(pictures: dict[str, torch.Tensor]):
    (verdict,) = judge(pictures).adapters.values()
    return verdict


def damage(strength: float) -> torch.Tensor:
    """Noise over the whole image."""
    generator = torch.Generator().manual_seed(int(strength))
    return torch.rand(1, SIZE, SIZE, 3, generator=generator)


def blue(share: float) -> torch.Tensor:
    """The image with this share of its rows in pure blue."""
    picture = make_picture()
    picture[:, : round(share * SIZE)] = torch.tensor([0.0, 0.0, 1.0])
    return picture


DAMAGES = {
    "NaN": torch.full((1, SIZE, SIZE, 3), math.nan),
    "black": torch.zeros(1, SIZE, SIZE, 3),
    "one colour": torch.full((1, SIZE, SIZE, 3), 0.5),
    "burnt colours": blue(0.3),
    "noise": damage(2),
}
#: Strong edits that a user may intend.
EDITS = {
    "another image": make_picture(55),
    "white background": torch.where(
        torch.arange(SIZE)[None, :, None, None] < 40, torch.ones(()), make_picture()
    ),
    "night": make_picture() * 0.2,
    "some pure blue": blue(0.2),
    "grey": make_picture().mean(dim=-1, keepdim=True).expand(-1, -1, -1, 3),
    "blur": torch.nn.functional.avg_pool2d(
        make_picture().movedim(-1, 1), 9, stride=1, padding=4, count_include_pad=False
    ).movedim(1, -1),
    "sharpened": (make_picture() * 2 - 0.5).clamp(0, 1),
}


def test_an_edit_that_grows_with_the_strength_is_smooth_and_its_whole_range_is_suggested():
    verdict = judge_one({str(s): edit(s) for s in (0, 0.5, 1, 2)})
    assert verdict.kind == "smooth"
    assert verdict.sentences[0].startswith("smooth: the change grows from RMS ")
    assert "in proportion to it, and nothing collapses" in verdict.sentences[0]
    low, high = verdict.suggested
    assert high == 2
    assert "the highest tested" in verdict.sentences[1]
    # Linear, so the strength at which RMS is 2 of 255 can be computed.
    rms = {point.strength: point.rms * 255 for point in verdict.curve}
    assert low == pytest.approx(2 / rms[1], rel=0.3)  # one digit
    assert rms[2] == pytest.approx(2 * rms[1], rel=0.05)


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_a_collapse_at_its_strength(kind):
    pictures = {str(s): edit(s) for s in (0, 0.5, 1)}
    verdict = judge({**pictures, "2": DAMAGES[kind], "3": DAMAGES[kind]})
    (adapter,) = verdict.adapters.values()
    assert adapter.kind == "collapses"
    assert adapter.collapses_at == (2.0,)
    assert adapter.suggested[1] == 1.0
    assert set(verdict.damages.values()) == {kind}
    assert verdict.sentences[0].startswith("collapses at 2: ")
    assert kind in verdict.sentences[0]
    assert "1 (the last before the collapse)" in verdict.sentences[1]
    assert verdict.needs_attention


@pytest.mark.parametrize("kind", EDITS)
def test_a_strong_edit_is_not_a_collapse(kind):
    verdict = judge({"0": make_picture(), "1": EDITS[kind]})
    assert verdict.damages == {}
    assert not verdict.needs_attention


def test_damage_present_at_strength_0_is_not_attributed_to_the_lora():
    pure = blue(0.5)
    assert judge({"0": pure, "1": pure.roll(1, dims=2)}).damages == {}
    flat = judge({"0": DAMAGES["one colour"], "1": make_picture()})
    assert flat.sentences[0].startswith("strength 0 is broken: one colour (contrast 0.0 of 255")
    nan = judge({"0": DAMAGES["NaN"], "1": DAMAGES["NaN"]})
    assert nan.sentences == (
        "strength 0 is broken: NaN or Inf in 100 % of the pixels, shown as black; that is the base "
        "model, not the LoRA",
    )


def test_an_unapplied_lora_is_bit_identical_to_no_effect():
    verdict = judge_one({str(s): make_picture() for s in (0, 1, 2, 4)})
    assert verdict.kind == "no effect"
    assert "all 3 images at other strengths equal strength 0 bit for bit" in verdict.sentences[0]
    assert verdict.suggested is None


@pytest.mark.parametrize(("steps", "kind"), [(0.4, "no effect"), (0.6, "smooth")])
def test_half_a_step_of_255_is_the_limit_of_no_effect(steps, kind):
    verdict = judge_one({"0": make_picture(), "1": make_picture() + steps / 255})
    assert verdict.kind == kind
    expected = "the largest change is RMS 0.4 of 255 at strength 1, under 0.5"
    assert (expected in verdict.sentences[0]) == (kind == "no effect")


def test_a_small_spot_that_changes_much_is_an_effect():
    picture = make_picture()
    picture[:, 30, 30] += 0.1
    verdict = judge_one({"0": make_picture(), "1": picture})
    assert verdict.curve[1].rms * 255 < 0.5
    assert verdict.kind == "smooth"
    assert "suggested range: none" in verdict.sentences[1]


def test_a_change_that_turns_back_is_uneven():
    pictures = {"0": edit(0), "1": edit(2), "2": edit(1), "3": edit(3)}
    verdict = judge(pictures)
    assert verdict.sentences[0].startswith("uneven: the change falls from RMS ")
    assert "at strength 1 to " in verdict.sentences[0]
    assert not verdict.needs_attention


@pytest.mark.parametrize(
    ("amounts", "words"),
    [((1, 2, 4), "in proportion"), ((1, 4, 16), "faster than"), ((2, 3, 3.5), "slower than")],
)
def test_growth_is_compared_with_proportion(amounts, words):
    strengths = (1, 2, 4)
    pictures = {str(s): edit(a) for s, a in zip(strengths, amounts, strict=True)}
    assert words in judge({"0": edit(0), **pictures}).sentences[0]


def test_both_sides_of_zero_can_collapse_and_the_range_is_on_the_positive_one():
    pictures = {str(s): edit(s) for s in (-1, 0, 1)}
    verdict = judge_one({"-2": damage(2), **pictures, "2": damage(2)})
    assert verdict.collapses_at == (-2.0, 2.0)
    assert verdict.sentences[0].startswith("collapses at 2: ")
    assert verdict.sentences[1].startswith("collapses at -2: ")
    assert verdict.suggested[1] == 1.0


def test_a_sweep_of_negative_strengths_gets_a_negative_range():
    verdict = judge_one({"0": edit(0), "-1": edit(-1), "-2": edit(-2)})
    assert verdict.suggested[1] == -2.0
    assert -1 < verdict.suggested[0] < 0


def test_a_collapse_at_the_first_strength_sends_the_user_below_it():
    verdict = judge_one({"0": edit(0), "1": damage(1)})
    assert verdict.suggested is None
    assert "suggested range: between 0 and 1, where none was tested" in verdict.sentences


def test_each_adapter_and_seed_is_compared_with_strength_0_of_its_seed():
    pictures = {}
    for seed in (1, 2):
        pictures[f"strength=0 seed={seed}"] = edit(0, seed)
        for strength in (1, 2):
            label = f"strength={strength} seed={seed}"
            pictures[f"{label} lora=good"] = edit(strength, seed)
            pictures[f"{label} lora=idle"] = edit(0, seed)
            wrong = damage(9) if (strength, seed) == (2, 2) else edit(strength, seed)
            pictures[f"{label} lora=wild"] = wrong
    sweep = measure(pictures)
    assert sweep.find(0.0, 2, "wild") is sweep.find(0.0, 2, "good")
    verdict = judge_sweep(sweep)
    kinds = {name: adapter.kind for name, adapter in verdict.adapters.items()}
    assert kinds == {"good": "smooth", "idle": "no effect", "wild": "collapses"}
    assert any(s.startswith("wild: collapses at 2: noise (SSIM ") for s in verdict.sentences)
    assert any(s.endswith(", in 1 of 2 seeds") for s in verdict.sentences)
    good = verdict.adapters["good"].curve[1]
    assert good.num_seeds == 2
    assert good.rms_low <= good.rms <= good.rms_high
    assert verdict.damages == {Cell(2.0, 2, "wild"): "noise"}


def test_the_mask_and_the_source_tell_what_is_kept():
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :32] = 1.0
    changed = make_picture()
    changed[:, :32] = (changed[:, :32] + 0.3).clamp(0, 1)
    sweep = measure({"0": make_picture(), "1": changed}, source=make_picture(), mask=mask)
    change = sweep.cells[Cell(1.0)].change
    assert change["inside"].rms > 0.2
    assert change["outside"].rms == 0
    assert sweep.cells[Cell(1.0)].kept.rms == 0
    text = judge_sweep(sweep).to_text()
    assert "inside and 0 outside" in text
    assert "source outside the mask: SSIM 0.9" in text
    whole = measure({"0": make_picture(), "1": changed}, source=make_picture())
    assert whole.cells[Cell(1.0)].kept.rms > 0.1


@pytest.mark.parametrize(("value", "kind"), [(0.0, "empty"), (1.0, "full")])
def test_a_mask_without_two_sides_is_ignored_and_reported(value, kind):
    mask = torch.full((1, 64, 64), value)
    verdict = judge({"0": edit(0), "1": edit(1)}, mask=mask)
    assert f"Warning: the mask is {kind} and was left out" in verdict.to_text()


def test_a_source_of_another_shape_is_reported():
    source = torch.rand(1, SIZE, 2 * SIZE, 3)
    verdict = judge({"0": edit(0), "1": edit(1)}, source=source)
    assert "the source is 128 x 64 and was cut in the middle to the shape of 64 x 64" in (
        verdict.to_text()
    )


def test_a_cell_with_nan_has_no_metrics_but_the_rest_continues():
    sweep = measure({"0": edit(0), "1": DAMAGES["NaN"], "2": edit(2)}, source=make_picture())
    broken = sweep.cells[Cell(1.0)]
    assert broken.change == {}
    assert broken.kept is None
    assert (broken.thumbnail == 0).all()
    verdict = judge_sweep(sweep)
    lines = build_sweep_table(sweep, verdict).splitlines()
    assert lines[3].split() == ["strength=1", "-", "-", "-", "-", "-", "NaN"]
    assert len(lines) == 5
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert json.dumps([m.to_dict() for m in sweep.cells.values()], allow_nan=False)


def test_the_table_has_a_column_for_each_metric():
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :32] = 1.0
    sweep = measure({"0": edit(0), "1": edit(1)}, source=make_picture(), mask=mask)
    lines = build_sweep_table(sweep, judge_sweep(sweep)).splitlines()
    assert lines[0] == "2 images; change from strength 0, RMS of 255, PSNR in dB"
    row = lines[3].split()
    assert row[0] == "strength=1"
    assert float(row[1]) == pytest.approx(
        sweep.cells[Cell(1.0)].change["whole"].rms * 255, rel=0.01
    )
    assert len(row) == 10


def test_a_batch_is_split_when_there_is_a_label_for_each():
    batch = torch.cat([edit(0), edit(1), edit(2)])
    sweep = measure_sweep([batch], ["0", "1", "2"])
    apart = measure_sweep(list(batch.split(1)), ["0", "1", "2"])
    assert sweep.cells[Cell(2.0)].change == apart.cells[Cell(2.0)].change
    assert sweep.num_frames == 1


def test_a_batch_per_cell_is_measured_as_a_whole():
    frames = [torch.cat([edit(s), edit(3 * s)]) for s in (0, 1)]
    sweep = measure_sweep(frames, ["0", "1"])
    single = [measure_sweep([edit(0), edit(s)], ["0", "1"]) for s in (1, 3)]
    squares = [m.cells[Cell(1.0)].change["whole"].rms ** 2 for m in single]
    assert sweep.cells[Cell(1.0)].change["whole"].rms ** 2 == pytest.approx(sum(squares) / 2)
    assert sweep.num_frames == 2


def test_only_small_copies_stay():
    big = torch.rand(1, 300, 600, 3)
    sweep = measure_sweep([big, big], ["0", "1"], thumbnail_px=100)
    for measures in sweep.cells.values():
        assert measures.thumbnail.shape == (50, 100, 3)
        assert measures.thumbnail.base is None or measures.thumbnail.base.nbytes < 2**16
        assert measures.change_thumbnail.nbytes == 50 * 100 * 3 * 2


def test_a_sweep_stops_between_two_images():
    reported = []
    with pytest.raises(InterruptedError, match="the sweep was stopped after 2 of 3"):
        measure_sweep(
            [edit(s) for s in (0, 1, 2)],
            ["0", "1", "2"],
            progress=lambda *at: reported.append(at),
            should_stop=lambda: len(reported) == 2,
        )
    assert reported == [(0, 3), (1, 3)]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"0": edit(0), "1": edit(1)[:, :32]}, "'strength=1' is 64 x 32; expected the same size"),
        ({"0": edit(0), "1": torch.cat([edit(1)] * 2)}, "is 2 of 64 x 64"),
        ({"1": edit(1), "2": edit(2)}, "no image is labelled 'strength=0'"),
        ({"0": edit(0), "0.0": edit(1)}, "two images have the label 'strength=0'"),
        ({"0": edit(0), "high": edit(1)}, "'high' is not a sweep label"),
        ({"0": torch.zeros(1, 8, 8, 3)}, "the images are 8 x 8; expected at least 11 pixels"),
    ],
)
def test_mismatched_inputs_are_a_one_sentence_error(pictures, message):
    with pytest.raises(ConfigError) as caught:
        measure(pictures)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_number_of_labels_is_checked():
    with pytest.raises(ConfigError, match="there are 2 images and 3 labels"):
        measure_sweep([edit(0), edit(1)], ["0", "1", "2"])
    with pytest.raises(ConfigError, match="there are 65 images; expected at most 64"):
        measure_sweep([edit(0)] * 65, [str(n) for n in range(65)])


def test_a_seed_without_strength_0_is_reported_and_the_others_are_judged():
    pictures = {f"strength={s} seed=1": edit(s) for s in (0, 1)}
    verdict = judge({**pictures, "strength=1 seed=2": edit(1, seed=2)})
    assert "there is no change to measure: strength=1 seed=2" in verdict.to_text()
    assert verdict.adapters[""].kind == "smooth"


def test_strength_0_alone_is_nothing_to_judge():
    assert judge({"0": edit(0)}).sentences == (
        "nothing to judge: no image at a strength other than 0",
    )

"""A LoRA of one family on a MODEL of the other: an error that names both."""

from __future__ import annotations

import pytest
from qwen_edit_lora.lora_core import KeyFormatError, read_adapter
from qwen_edit_lora.lora_core.adapter.strengths import Strengths

from .test_apply import LINEARS, build_adapter

pytestmark = pytest.mark.comfy


def test_a_2_1_lora_on_a_1_x_model_is_refused_by_family(base, ours):
    layers = [(build_adapter(), Strengths())]
    with pytest.raises(
        KeyFormatError,
        match=r"is a LoRA for Qwen-Image-2\.1, and this MODEL is a Qwen-Image: .*Choose a LoRA for "
        r"Qwen-Image, or connect a Qwen-Image-2\.1 model",
    ):
        ours.application.apply_adapters(base, layers)


def test_a_1_x_lora_on_a_2_1_model_is_refused_by_family(base_21, make_lora, ours):
    layers = [(read_adapter(make_lora("a")), Strengths())]
    with pytest.raises(
        KeyFormatError, match=r"is a LoRA for Qwen-Image, and this MODEL is a Qwen-Image-2\.1"
    ):
        ours.application.apply_adapters(base_21, layers)


def test_the_family_of_a_model_is_known_in_every_layout(base_21, base, make_lora, ours):
    found = ours.matching.match_adapter(base_21, build_adapter())
    assert found.family.name == "qwen-image-2.1"
    assert found.paths == set(LINEARS)
    found = ours.matching.match_adapter(base, read_adapter(make_lora("a")))
    assert found.family.name == "qwen-image"


def test_the_factors_of_streams_follow_the_model_and_not_the_names(load_21, sample_21, apply_ours):
    """to_q is the image stream's in 1.x; in 2.1 text and images share it."""
    from ..conftest import worst

    adapter = build_adapter(path for path in LINEARS if "attn" in path)
    for mode in ("side path", "merge"):
        factored = apply_ours(
            load_21("fused"), adapter, 1.0, mode, image_strength=0.4, text_strength=1.0
        )
        plain = apply_ours(load_21("fused"), adapter, 0.7, mode)
        assert worst(sample_21(factored), sample_21(plain)) < 1e-5


@pytest.mark.parametrize("mine", [True, False])
def test_save_says_the_licence_of_2_1_and_none_for_1_x(mine, make_lora, comfyui, tmp_path):
    from qwen_edit_lora.nodes.save import QwenEditLoraSave

    adapter = build_adapter() if mine else read_adapter(make_lora("a"))
    output = QwenEditLoraSave.execute(adapter, f"licence_{mine}/a")
    _, report = output.result
    kinds = [finding.kind for finding in report.findings]
    assert ("licence" in kinds) == mine
    assert ("non-commercial use only (Qwen Research License)" in report) == mine

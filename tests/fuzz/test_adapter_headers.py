"""Generated headers, metadata and configurations of adapters: read, reported or refused."""

from __future__ import annotations

import json
import math
import re
import string

import pytest
from demo_base.adapter_cases import (
    JSON_VALUES,
    MAX_MESSAGE,
    TO_K,
    TO_Q,
    check_refusal,
    get_folder,
    make_plain,
    use_in_every_way,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import (
    LoraError,
    read_adapter,
    read_state_dict,
)
from qwen_edit_lora.lora_core.formats.architectures import detect_variants
from qwen_edit_lora.lora_core.formats.module_patterns import PatternTable
from qwen_edit_lora.lora_core.library.details import describe_file
from qwen_edit_lora.lora_core.library.facts import read_facts
from safetensors.torch import save

SHARE = settings.default.max_examples


# --- header, metadata and config ---

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

"""Generated adapters must be read correctly, or refused with one sentence.

The oracle is an independent float64 computation on the tensors, and PEFT's own rule for patterns.
Hypothesis prints a failing case completely, and it fails the same way next time.
"""

from __future__ import annotations

import json
import struct

import torch
from demo_base.adapter_cases import (
    ENDINGS,
    FUSED,
    JSON_VALUES,
    KINDS,
    MAX_MESSAGE,
    NAMES,
    PREFIXES,
    STRANGE_TEXTS,
    TO_K,
    TO_Q,
    WRAPPERS,
    Case,
    cases,
    check_deltas,
    check_refusal,
    compute_dense,
    damaged_cases,
    get_folder,
    make_base,
    make_plain,
    modules,
    use_in_every_way,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import (
    FileError,
    LoraError,
    build_state_dict,
    compute_delta,
    read_adapter,
    read_state_dict,
    write_adapter,
)
from qwen_edit_lora.lora_core.disk.json_reader import parse_json
from qwen_edit_lora.lora_core.formats.parsed_key import parse_key
from qwen_edit_lora.lora_core.inspection.inspection import inspect_adapter
from qwen_edit_lora.lora_core.library.details import describe_file
from qwen_edit_lora.lora_core.library.facts import read_facts
from safetensors.torch import save

SHARE = settings.default.max_examples


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

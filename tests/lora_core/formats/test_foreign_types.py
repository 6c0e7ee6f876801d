"""State dicts, metadata and paths of other types: one sentence, never a traceback of torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    ConfigError,
    FileError,
    KeyFormatError,
    LoraError,
    LoraWeights,
    read_state_dict,
    write_adapter,
)

TO_Q = "transformer_blocks.0.attn.to_q"
A, B = f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"


def check_sentence(error: LoraError) -> None:
    text = str(error)
    assert text.isprintable()
    assert len(text) <= 400
    assert text.endswith(".")


UNUSUAL = {
    "None": lambda: None,
    "a list": lambda: [[1.0, 2.0]],
    "meta": lambda: torch.zeros(2, 4, device="meta"),
    "sparse": lambda: torch.zeros(2, 4).to_sparse(),
    "csr": lambda: torch.zeros(2, 4).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2, 4), 1.0, 0, torch.qint8),
    "complex": lambda: torch.zeros(2, 4, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNUSUAL)
def test_a_value_that_is_no_plain_tensor_is_refused(case):
    with pytest.raises(KeyFormatError) as caught:
        read_state_dict({A: UNUSUAL[case](), B: torch.ones(4, 2)})
    check_sentence(caught.value)


@pytest.mark.parametrize(
    "state_dict",
    [None, [], "text", {3: torch.ones(2)}, {None: None}, {"\ud800": torch.ones(2)}],
    ids=ascii,
)
def test_a_state_dict_of_another_type_is_refused(state_dict):
    with pytest.raises(KeyFormatError) as caught:
        read_state_dict(state_dict)
    check_sentence(caught.value)


def test_a_key_that_no_file_can_hold_is_not_written(tmp_path):
    weights = LoraWeights(torch.ones(2, 4), torch.ones(4, 2))
    with pytest.raises(KeyFormatError) as caught:
        write_adapter(Adapter({"\ud800": weights}), tmp_path / "ours.safetensors")
    check_sentence(caught.value)


METADATA = [["a"], "a", 3, {"a": 1}, {1: "a"}, {"a": None}, {"a": "\ud800"}, {"\ud800": "a"}]


@pytest.mark.parametrize("metadata", METADATA, ids=ascii)
def test_metadata_that_is_no_dict_of_texts_is_refused_on_both_ways(metadata, tmp_path):
    tensors = {A: torch.ones(2, 4), B: torch.ones(4, 2)}
    with pytest.raises(ConfigError) as caught:
        read_state_dict(tensors, metadata)
    check_sentence(caught.value)
    adapter = Adapter(read_state_dict(tensors).modules, metadata)
    with pytest.raises(ConfigError) as caught:
        write_adapter(adapter, tmp_path / "ours.safetensors")
    check_sentence(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["meta", "sparse", "complex"])
def test_an_adapter_without_plain_tensors_is_not_written(case, tmp_path):
    weights = LoraWeights(UNUSUAL[case](), torch.ones(4, 2))
    with pytest.raises(KeyFormatError) as caught:
        write_adapter(Adapter({TO_Q: weights}), tmp_path / "ours.safetensors")
    check_sentence(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", Path(), "/", None, 3, b"name", "a\0b", "\ud800"], ids=ascii)
@pytest.mark.parametrize("key_format", ["comfyui", "peft"])
def test_a_path_that_names_no_file_is_refused(path, key_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = read_state_dict({A: torch.ones(2, 4), B: torch.ones(4, 2)})
    with pytest.raises(FileError) as caught:
        write_adapter(adapter, path, key_format)
    check_sentence(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unprintable_name_is_printable_in_the_error(tmp_path):
    adapter = read_state_dict({A: torch.ones(2, 4), B: torch.ones(4, 2)})
    with pytest.raises(ConfigError) as caught:
        write_adapter(adapter, tmp_path / "a\n\x1b[31m.safetensors", "peft")
    check_sentence(caught.value)

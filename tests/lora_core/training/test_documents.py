"""The example configuration and the training docs, checked against the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import count_parameters
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict, config_to_dict
from qwen_edit_lora.lora_core.training.config.presets import (
    GIB,
    PRESETS,
    RESERVE,
    BaseSize,
    choose_storage,
)
from qwen_edit_lora.lora_core.training.data import dataset
from qwen_edit_lora.lora_core.training.data.dataset import read_dataset

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "lora_core" / "training" / "example.toml"
DOCS = ROOT / "docs"
HARDWARE = (DOCS / "hardware.md").read_text(encoding="utf-8")
COMMAND_LINE = (DOCS / "command-line.md").read_text(encoding="utf-8")
#: TOML has no null: the example shows the rank instead, which is what alpha is then.
SHOWN_OTHERWISE = {("lora", "alpha"): 16}


def parse(text: str) -> dict:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads(text)


def test_the_example_is_a_configuration_of_defaults():
    values = parse(EXAMPLE.read_text(encoding="utf-8"))
    config = config_to_dict(config_from_dict(values))
    smallest = {key: values[key] for key in ("name", "output", "model", "data")}
    assert config == config_to_dict(config_from_dict(smallest))


def test_the_example_shows_every_setting_with_its_default():
    text = EXAMPLE.read_text(encoding="utf-8")
    shown = parse(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    expected = config_to_dict(config_from_dict(parse(text)))
    for (section, name), value in SHOWN_OTHERWISE.items():
        expected[section][name] = value
    assert shown == expected


def test_the_training_set_of_the_manual_can_be_written_and_read(tmp_path, monkeypatch):
    (example,) = re.findall(r"```py\n(.*?)```", COMMAND_LINE, re.DOTALL)
    example = example.replace("from lora_core.training import CachedItem, DatasetWriter", "")
    monkeypatch.chdir(tmp_path)
    names = {"CachedItem": dataset.CachedItem, "DatasetWriter": dataset.DatasetWriter}
    exec(example, names)  # noqa: S102 - our own manual
    written = read_dataset(tmp_path / "cache" / "my_edit")
    assert (len(written), written.text_width, written.has_empty_text) == (2, 3584, True)
    assert written.items[0].bucket == ((128, 128), (128, 128))


def test_the_manual_names_only_existing_commands():
    from qwen_edit_lora.lora_core.__main__ import build_parser

    parser = build_parser()
    lines = re.findall(r"-m lora_core (train|sample|estimate)(.*)", COMMAND_LINE)
    assert {command for command, _ in lines} == {"train", "sample", "estimate"}
    for command, rest in lines:
        parser.parse_args([command, *re.findall(r'"[^"]*"|\S+', rest.partition("`")[0])])


# --- which file, which setting, which GPU ---------------------------------------------------------


def count_weights(shapes) -> int:
    return sum(out_features * (in_features + 1) for out_features, in_features in shapes)


SIZE = BaseSize(
    num_blocks=QWEN_IMAGE.num_blocks,
    block_weights=count_weights(QWEN_IMAGE.block_linears.values()),
    other_weights=count_weights(QWEN_IMAGE.top_linears.values()),
    width=QWEN_IMAGE.width,
)
NUM_WEIGHTS = SIZE.num_blocks * SIZE.block_weights + SIZE.other_weights
#: 1024 x 1024, one reference of that size, and a caption.
NUM_TOKENS = 4096 + 4096 + 256
#: Share of a card's nominal memory that PyTorch reports.
REPORTED = 0.98
ROW = re.compile(
    r"^\| (\d+) GB[^|]*\|[^|]*\| (\w+) \| (\w+)( \(auto\))? \| (\d+) \| ([\d.]+) GiB \| "
    r"([\d.]+)(?: GiB)? \|$",
    re.MULTILINE,
)


def compute_headroom(preset: str) -> int:
    settings = PRESETS[preset].settings
    (name,) = settings["lora"]["targets"]
    num_parameters = count_parameters(name, settings["lora"]["rank"])
    averaged = bool(settings["optimizer"].get("ema_decay"))
    return SIZE.count_headroom(NUM_TOKENS, num_parameters, averaged)


def test_the_gpu_table_of_the_manual_is_what_the_engine_chooses():
    rows = ROW.findall(HARDWARE)
    assert {int(row[0]) for row in rows} == {12, 16, 24, 32, 48, 80}
    assert {int(row[0]) for row in rows if row[3]} == {12, 16, 24, 32, 48, 80}
    for gpu, preset, storage, auto, offloaded, on_gpu, in_ram in rows:
        memory, headroom = int(REPORTED * int(gpu) * GIB), compute_headroom(preset)
        total = SIZE.count_resident(storage, int(offloaded)) + headroom
        waiting = int(offloaded) * SIZE.count_block_bytes(storage)
        assert (float(on_gpu), float(in_ram)) == (round(total / GIB, 1), round(waiting / GIB, 1))
        assert total + RESERVE <= memory
        chosen = choose_storage(SIZE, memory, headroom)
        assert not auto or (storage, int(offloaded)) == (chosen.storage, chosen.offload_blocks)


def test_the_sizes_of_base_files_in_the_manual_follow_from_their_weights():
    (bf16,) = re.findall(r"^\| bf16: [^|]*\| ([\d.]+) GB \|", HARDWARE, re.MULTILINE)
    (eight_bits,) = re.findall(r"^\| fp8, [^|]*\| ([\d.]+) GB \|", HARDWARE, re.MULTILINE)
    (gguf,) = re.findall(r"^\| GGUF, ([^|]*)\|([^|]*)GB \|", HARDWARE, re.MULTILINE)
    bits, sizes = (list(map(float, re.findall(r"[\d.]+", text))) for text in gguf)
    assert float(bf16) == round(NUM_WEIGHTS * 2 / 1e9, 1)
    assert float(eight_bits) == round(NUM_WEIGHTS / 1e9, 1)
    assert sizes == [round(NUM_WEIGHTS * bit / 8e9, 1) for bit in bits]

"""The example configuration and the README's section on training, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core.training import dataset
from qwen_edit_lora.lora_core.training.config_files import config_from_dict, config_to_dict
from qwen_edit_lora.lora_core.training.dataset import read_dataset

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "lora_core" / "training" / "example.toml"
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: TOML has no null: the example shows the rank instead, which is what alpha is then.
SHOWN_OTHERWISE = {("lora", "alpha"): 16}


def parse(text: str) -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads(text)


def test_the_example_is_a_configuration_that_leaves_every_default():
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


def test_the_training_set_of_the_readme_can_be_written_and_read(tmp_path, monkeypatch):
    (example,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    example = example.replace(
        "from lora_core.training.dataset import CachedItem, DatasetWriter", ""
    )
    monkeypatch.chdir(tmp_path)
    names = {"CachedItem": dataset.CachedItem, "DatasetWriter": dataset.DatasetWriter}
    exec(example, names)  # noqa: S102 - our own README
    written = read_dataset(tmp_path / "cache" / "my_edit")
    assert (len(written), written.text_width, written.has_empty_text) == (2, 3584, True)
    assert written.items[0].bucket == ((128, 128), (128, 128))


def test_the_readme_names_only_commands_there_are():
    from qwen_edit_lora.lora_core.__main__ import build_parser

    parser = build_parser()
    lines = re.findall(r"-m lora_core (train|sample|estimate)(.*)", README)
    assert {command for command, _ in lines} == {"train", "sample", "estimate"}
    for command, rest in lines:
        parser.parse_args([command, *re.findall(r'"[^"]*"|\S+', rest.partition("`")[0])])

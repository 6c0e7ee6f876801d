"""Configurations: what is refused, with which message, and that files survive a round trip."""

from __future__ import annotations

import json
import sys

import pytest
from qwen_edit_lora.lora_core import ConfigError, FileError, LoraError
from qwen_edit_lora.lora_core.training.config.config_files import (
    config_from_dict,
    config_to_dict,
    list_places,
    read_config,
)
from qwen_edit_lora.lora_core.training.config.setting_names import ELSEWHERE, OTHER_NAMES

SMALLEST = {
    "name": "my edit",
    "output": "run",
    "model": {"source": "m.safetensors"},
    "data": {"folder": "d"},
}


def change(path: str, value: object) -> dict:
    values = json.loads(json.dumps(SMALLEST))
    *sections, key = path.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
    table[key] = value
    return values


def test_the_defaults_are_those_of_a_qwen_image_edit_lora():
    config = config_from_dict(SMALLEST)
    assert (config.lora.rank, config.lora.targets) == (16, ("full",))
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-4)
    assert (config.data.batch_size, config.objective.sampling) == (1, "shift")


def test_a_configuration_survives_a_dictionary_and_json():
    values = change("lora.rank_pattern", {"attn.to_q": 32})
    values["objective"] = {"auxiliary": {"contrastive": 0.1}, "sigma_min": 0.1}
    values["optimizer"] = {"options": {"weight_decay": 0.1, "betas": [0.9, 0.95]}}
    config = config_from_dict(values)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert config_to_dict(again) == config_to_dict(config)
    assert again.lora.rank_pattern["attn.to_q"] == 32


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.learningrate", 1, r"\[optimizer\] has no .*; did you mean learning_rate\?"),
        ("rank", 8, r"the configuration has no setting 'rank'; did you mean \[lora\] rank\?"),
        ("modle", {}, r"no setting 'modle'; did you mean model\?"),
        ("model", "m", r"\[model\] is 'm'; expected a table"),
        ("model.gradient_checkpointing", "some", 'expected "auto", true, false or "selective"'),
        ("lora.rank", 0, r"\[lora\] rank is 0; expected a whole number from 1"),
        ("lora.rank", 4.5, r"lora\.rank is 4\.5; expected a whole number"),
        ("lora.rank", True, r"lora\.rank is True; expected a whole number"),
        ("lora.targets", 3, r"lora\.targets is 3; expected a list of strings"),
        ("model.compile", 1, r"model\.compile is 1; expected true or false"),
        ("model.storage", "fp4", r"\[model\] storage is 'fp4'; expected one of bf16, "),
        ("model.source", " ", r"source is empty; expected a path"),
        ("data.caption_dropout", 1.5, r"\[data\] caption_dropout is 1\.5; expected 0 to 1"),
        ("data.batch_size", 0, r"batch_size is 0; expected 1 or more"),
        ("optimizer.learning_rate", 0, r"learning_rate is 0\.0; expected a number above 0"),
        ("optimizer.learning_rate", float("inf"), r"learning_rate is inf; expected a number above"),
        ("optimizer.ema_decay", 1, "ema_decay is 1, which would never"),
        ("optimizer.name", "adam", r"name is 'adam'; expected one of adamw, "),
        ("optimizer.warmup_steps", 3000, "warmup_steps is 3000, more than the 2000 steps"),
        ("objective.sigma_min", 1, "sigma_min is 1 and sigma_max 1; expected the first"),
        ("objective.auxiliary", {"face": 1}, "unknown auxiliary loss 'face'; expected one of"),
        ("objective.auxiliary", {"contrastive": -1}, "weight of the auxiliary loss 'contrastive'"),
        ("steps", 0, "^steps is 0; expected 1 or more"),
        ("name", "a/b", "name is 'a/b', which holds '/'; expected no"),
        ("name", "", "name is ''; expected at least one letter"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_a_one_sentence_error_with_its_location(path, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_dict(change(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["name", "model.source", "data.folder", "model"])
def test_settings_without_a_default_are_required(path):
    values = json.loads(json.dumps(SMALLEST))
    *sections, key = path.split(".")
    table = values[sections[0]] if sections else values
    del table[key]
    with pytest.raises(ConfigError, match=f"lacks {key}; add it"):
        config_from_dict(values)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_relative_paths_are_relative_to_the_file(tmp_path, suffix):
    folder = tmp_path / "somewhere"
    folder.mkdir()
    path = folder / f"config{suffix}"
    values = SMALLEST | {"steps": 7, "model": {"source": "../m.gguf"}}
    toml = (
        'name = "a"\noutput = "run"\nsteps = 7\n'
        '[model]\nsource = "../m.gguf"\n[data]\nfolder = "d"\n'
    )
    path.write_text(toml if suffix == ".toml" else json.dumps(values))
    config = read_config(path)
    assert config.steps == 7
    assert config.output == str(folder / "run")
    assert config.model.source == str(tmp_path / "m.gguf")
    assert config.model.vae == ""


def test_toml_is_read_by_tomli_where_python_has_no_reader(tmp_path, monkeypatch):
    tomli = pytest.importorskip("tomli" if sys.version_info < (3, 11) else "tomllib")
    monkeypatch.setitem(sys.modules, "tomli", tomli)
    monkeypatch.setitem(sys.modules, "tomllib", None)  # an import raises, as on Python 3.10
    (tmp_path / "a.toml").write_text(TOML)
    assert read_config(tmp_path / "a.toml").name == "my edit"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name = ", r"config\.toml cannot be read as TOML: "),
        (b"\xff\xfe\x00", r"config\.toml is UTF-16 text; save it again as UTF-8"),
        (b"name = 'a'", r"config\.toml: the configuration lacks output; add it"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_an_error_with_its_name(tmp_path, content, message):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(LoraError, match=message):
        read_config(path)


def test_a_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(FileError, match=r"nothing\.toml does not exist"):
        read_config(tmp_path / "nothing.toml")


TOML = """name = "my edit"
output = "run"
model.source = "m.safetensors"
data.folder = "d"
"""


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_byte_order_mark_in_front_of_settings_is_read(tmp_path, suffix):
    text = TOML if suffix == "toml" else json.dumps(SMALLEST)
    path = tmp_path / f"config.{suffix}"
    path.write_text(text, encoding="utf-8-sig")
    assert read_config(path).name == "my edit"


def test_an_error_for_non_utf8_settings_says_what_to_do(tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(TOML.replace("my edit", "\u6211\u7684").encode("gbk"))
    with pytest.raises(
        FileError, match=r"config\.toml is not UTF-8 text .* save it again as UTF-8"
    ):
        read_config(path)


@pytest.mark.parametrize(
    "path", [r"C:\models\qwen.safetensors", r"C:\Users\me", r"D:\x\new", r"a\tb"]
)
@pytest.mark.parametrize("place", ["model.source", "data.folder", "output"])
def test_a_backslash_in_double_quotes_gets_a_hint_and_is_never_a_line_break(tmp_path, path, place):
    lines = [line for line in TOML.splitlines() if not line.startswith(place)]
    config = tmp_path / "config.toml"
    config.write_text("\n".join([f'{place} = "{path}"', *lines]))
    with pytest.raises(LoraError, match=r"write paths with / or in single quotes"):
        read_config(config)
    config.write_text("\n".join([f"{place} = '{path}'", *lines]))
    assert read_config(config).name == "my edit"


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("lora.network_dim", "did you mean rank?"),
        ("lora.network_alpha", "did you mean alpha?"),
        ("network_dim", "did you mean [lora] rank?"),
        ("lora.lr", "did you mean [optimizer] learning_rate?"),
        ("optimizer.lr", "did you mean learning_rate?"),
        ("optimizer.unet_lr", "did you mean learning_rate?"),
        ("lora.max_train_steps", "did you mean steps, above all tables?"),
        ("max_train_steps", "did you mean steps?"),
        ("lora.resolution", "the size is chosen where the training set is made"),
        ("train_batch_size", "did you mean [data] batch_size?"),
        ("data.train_batch_size", "did you mean batch_size?"),
        ("lora.learning_rate", "did you mean [optimizer] learning_rate?"),
        ("optimizer.learning-rate", "did you mean learning_rate?"),
        ("lora.rnak", "did you mean rank?"),
    ],
)
def test_another_trainers_setting_name_is_translated_to_ours(place, hint):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(change(place, 1))
    assert str(caught.value).endswith(hint) or hint in str(caught.value)


@pytest.mark.parametrize("key", ["xyzzy", "q" * 5000, "\n", ""])
def test_an_unlike_name_gets_no_suggestion(key):
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**SMALLEST, key: 1})
    assert "did you mean" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_every_name_that_is_suggested_is_a_setting():
    assert set(OTHER_NAMES.values()) <= set(list_places())
    assert not set(OTHER_NAMES) & set(ELSEWHERE)


def test_settings_that_are_a_pipe_or_nested_without_end_are_refused(tmp_path):
    for name, text in (("a.toml", "x = " + "[" * 10_000), ("a.json", "[" * 10_000)):
        (tmp_path / name).write_text(text)
        with pytest.raises(FileError, match="cannot be read as"):
            read_config(tmp_path / name)

"""Training settings as people type and paste them: TOML and JSON, read or refused in one sentence.

The oracle is the tree of values that a file was written from.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import LoraError
from qwen_edit_lora.lora_core.training.config.config import TrainConfig
from qwen_edit_lora.lora_core.training.config.config_files import (
    config_from_dict,
    config_to_dict,
    list_places,
    read_config,
)
from qwen_edit_lora.lora_core.training.config.setting_names import ELSEWHERE, OTHER_NAMES

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

MAX_MESSAGE = 400
SHARE = settings.default.max_examples
SMALLEST = {
    "name": "my edit",
    "output": "run",
    "model": {"source": "m.safetensors"},
    "data": {"folder": "d"},
}


def check_refusal(error: LoraError) -> None:
    assert 0 < len(str(error)) <= MAX_MESSAGE, str(error)
    assert str(error).isprintable(), repr(str(error))


def read(content: bytes, name: str) -> TrainConfig | None:
    """None if it is refused, which is allowed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            return read_config(path)
        except LoraError as e:
            check_refusal(e)
            return None


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        TEXTS,
        st.sampled_from(["", "auto", "nf4", "x" * 3000, "\0", "a\nb", 10**30, 1e308, 0, 1, 0.5]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
NAMES = st.one_of(
    st.sampled_from(sorted({place.rpartition(".")[2] for place in list_places()})),
    st.sampled_from(sorted([*OTHER_NAMES, *ELSEWHERE])),
    TEXTS,
)
SECTIONS = ("", "model", "data", "lora", "objective", "optimizer", "saving")


@st.composite
def trees(draw) -> dict:
    values = json.loads(json.dumps(SMALLEST))
    for _ in range(draw(st.integers(0, 4))):
        section, name, value = draw(st.sampled_from(SECTIONS)), draw(NAMES), draw(VALUES)
        if not section:
            values[name] = value
        elif isinstance(values.setdefault(section, {}), dict):
            values[section][name] = value
    return values


def is_known(values: dict) -> bool:
    places = set(list_places())
    for name, value in values.items():
        if name not in places:
            return False
        if name in SECTIONS and not all(f"{name}.{key}" in places for key in value):
            return False
    return True


@settings(max_examples=SHARE)
@given(trees())
def test_any_tree_is_accepted_as_is_or_refused_with_a_message(values):
    try:
        config = config_from_dict(values)
    except LoraError as e:
        check_refusal(e)
        return
    assert is_known(values)
    found = config_to_dict(config)
    json.dumps(found, allow_nan=False)
    assert config_to_dict(config_from_dict(json.loads(json.dumps(found)))) == found
    for section, table in values.items():
        for name, value in table.items() if isinstance(table, dict) else ():
            kept = found[section][name]
            if isinstance(value, int | float | str) and not isinstance(kept, list):
                assert kept == value


def write_toml(values: dict) -> str:
    """JSON's numbers, texts and lists are TOML's; tables become sections."""

    def show(value) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{quote(k)} = {show(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(show, value)) + "]"
        return quote(value) if isinstance(value, str) else json.dumps(value)

    def quote(text: str) -> str:
        return json.dumps(text).replace("\x7f", "\\u007f")

    return "\n".join(f"{quote(name)} = {show(value)}" for name, value in values.items())


@settings(max_examples=SHARE // 4)
@given(trees(), st.booleans())
def test_toml_and_json_of_one_tree_are_one_configuration(values, has_mark):
    text = json.dumps(values)
    assume("NaN" not in text and "Infinity" not in text and "null" not in text)
    mark = b"\xef\xbb\xbf" if has_mark else b""
    toml = write_toml(values)
    assume(tomllib_takes(toml, values))
    found = [read(mark + text.encode(), "a.json"), read(mark + toml.encode(), "a.toml")]
    assume(None not in found)
    ends = [Path(config.output).name for config in found]
    assert ends[0] == ends[1]
    trees_found = [config_to_dict(config) for config in found]
    assert trees_found[0]["lora"] == trees_found[1]["lora"]
    assert trees_found[0]["optimizer"] == trees_found[1]["optimizer"]


def tomllib_takes(text: str, values: dict) -> bool:
    """Whether the writer above wrote valid TOML; surrogate pairs exist in JSON only."""
    try:
        return tomllib.loads(text) == values
    except ValueError:
        return False


TOML = """name = "my edit"
output = "run"
[model]
source = "m.safetensors"
[data]
folder = "d"
[lora]
rank = 8
"""


@settings(max_examples=SHARE)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(TOML)),
            st.binary(max_size=3) | st.sampled_from([b"\\", b'"', b"[[", b"C:\\new", b"\xff\xfe"]),
        ),
        max_size=4,
    ),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "gbk", "utf-32"]),
)
def test_a_changed_file_is_settings_or_an_error(changes, encoding):
    data = TOML.encode(encoding)
    for place, piece in changes:
        data = data[:place] + piece + data[place:]
    config = read(data, "a.toml")
    if not changes and encoding in ("utf-8", "utf-8-sig", "gbk"):
        assert config.lora.rank == 8
    if config is not None:
        assert config.model.source.isprintable() or "\n" not in config.model.source


@settings(max_examples=SHARE // 2)
@given(st.binary(max_size=80) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_noise_in_place_of_settings_is_an_error(content):
    for name in ("a.toml", "a.json", "a"):
        assert read(content, name) is None


@settings(max_examples=SHARE // 2)
@given(NAMES, st.sampled_from(SECTIONS))
def test_a_guess_is_a_setting_that_exists(name, section):
    values = json.loads(json.dumps(SMALLEST))
    table = values.setdefault(section, {}) if section else values
    assume(name not in table)
    table[name] = 1
    try:
        config_from_dict(values)
    except LoraError as e:
        check_refusal(e)
        guess = str(e).partition("did you mean ")[2].rstrip("?")
        names = {place.rpartition(".")[2] for place in list_places()}
        if guess:
            assert guess.removesuffix(", above all tables").rpartition(" ")[2] in names

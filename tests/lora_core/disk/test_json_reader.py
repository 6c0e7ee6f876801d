"""Our JSON reader: reads valid texts exactly, and refuses everything else in one sentence."""

from __future__ import annotations

import json
import os

import pytest
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.disk.json_reader import (
    MAX_DEPTH,
    parse_json,
    parse_object,
    read_json,
    read_object,
)
from qwen_edit_lora.lora_core.disk.regular_files import open_regular, read_text
from qwen_edit_lora.lora_core.errors import MissingFileError

VALID = {
    "nothing": None,
    "a text": "ü\u2028\U0001f600",
    "numbers": [0, -1, 1.5, 2**53 + 1, 10**300, -1.7e308, 5e-324],
    "objects": {"a": {"b": [True, False, {}]}, "": []},
}


@pytest.mark.parametrize("value", VALID.values(), ids=VALID)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_valid_json_is_read_as_the_json_module_reads_it(value, mark, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(mark + json.dumps(value).encode())
    assert read_json(path) == value
    assert parse_json(path.read_bytes(), "a.json") == value


def test_of_equal_keys_the_last_one_wins_as_in_the_json_module():
    assert parse_json('{"a": 1, "a": 2}', "a.json") == {"a": 2}


REFUSED = {
    "empty": (b"", "Expecting value"),
    "cut short": (b'{"lora_alpha": 16, "r"', "Expecting"),
    "two values": (b"{} {}", "Extra data"),
    "nul bytes": (b"\0" * 20, "Expecting value"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-16 text; save it again as UTF-8"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "UTF-32 text; save it again as UTF-8"),
    "GBK": ('{"a": "中文"}'.encode("gbk"), "is not UTF-8 text"),
    "NaN": (b'{"a": NaN}', "NaN, which is not a JSON number"),
    "Infinity": (b"[-Infinity]", "-Infinity, which is not a JSON number"),
    "beyond float": (b"[1e999]", "a number that is too large"),
    "a whole number beyond float": (b"[1%s]" % (b"0" * 400), "a number that is too large"),
    "a whole number of 5000 digits": (b"1" * 5000, "a number that is too large"),
    "lists in lists": (b"[" * 100_000 + b"]" * 100_000, "levels deep"),
    "objects in objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "levels deep"),
    "just too deep": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "levels deep"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_invalid_json_is_refused_with_one_sentence(data, reason, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(data)
    with pytest.raises(FileError, match=reason) as error:
        read_json(path)
    assert str(error.value).startswith("adapter_config.json ")
    assert len(str(error.value)) < 200


def test_the_deepest_nesting_allowed_is_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(text, "a")) == text


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "null", "true"])
def test_a_value_that_is_not_an_object_is_named_in_the_error(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FileError, match=r"a\.json holds .*; expected a JSON object"):
        read_object(path)
    with pytest.raises(FileError, match="the header holds"):
        parse_object(text, "the header")


def test_a_missing_file_is_distinguished_from_an_unreadable_one(tmp_path):
    for path in (tmp_path / "a.json", tmp_path / "no folder" / "a.json"):
        with pytest.raises(MissingFileError, match="does not exist"):
            read_json(path)
    (tmp_path / "file").touch()
    with pytest.raises(MissingFileError):
        read_json(tmp_path / "file" / "a.json")


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'"{"a" * 100}"')
    assert read_json(path, max_bytes=102) == "a" * 100
    with pytest.raises(FileError, match="is larger than"):
        read_json(path, max_bytes=101)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_under_a_files_name_does_not_hang(tmp_path):
    path = tmp_path / "adapter_config.json"
    os.mkfifo(path)
    for read in (read_json, read_text, open_regular):
        with pytest.raises(FileError, match="is a pipe, socket or device"):
            read(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300])
def test_a_name_that_no_file_can_have_is_refused(name, tmp_path):
    with pytest.raises(FileError) as error:
        read_json(tmp_path / name)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 200


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(FileError, match="is a folder"):
        read_json(tmp_path)

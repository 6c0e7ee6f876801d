"""JSON of ours read as dataclasses: values of the fields' own types, or one error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core.checks import MAX_WHOLE
from qwen_edit_lora.lora_core.disk.typed_json import Whole, read_typed
from qwen_edit_lora.lora_core.errors import FileError


@dataclass(frozen=True)
class Part:
    size: tuple[Whole, Whole] = (0, 0)
    share: float | None = None
    by_edge: Mapping[float, float] | None = None


@dataclass(frozen=True)
class Record:
    version: Whole
    parts: dict[str, Part]
    is_new: bool = False
    names: tuple[str, ...] = ()


def read(text: str | bytes, folder: Path) -> Record:
    path = folder / "record.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_typed(path, Record)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lists_and_text_keys_become_what_the_fields_are(mark, tmp_path):
    text = b'{"version": 1, "parts": {"a": {"size": [1, 2], "share": 1, "by_edge": {"0.5": 2}}}}'
    expected = Record(1, {"a": Part((1, 2), 1.0, {0.5: 2.0})})
    assert read(mark + text, tmp_path) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "\0", "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500),
        *('{"parts": {}}', '{"version": 1, "parts": {}, "other": 1}'),
        *('{"version": "1", "parts": {}}', '{"version": 1.0, "parts": {}}'),
        *('{"version": true, "parts": {}}', '{"version": 1, "parts": {}, "is_new": 1}'),
        f'{{"version": {MAX_WHOLE + 1}, "parts": {{}}}}',
        f'{{"version": 1{"0" * 5000}, "parts": {{}}}}',
        *('{"version": 1, "parts": []}', '{"version": 1, "parts": {"a": {"other": 1}}}'),
        *('{"version": 1, "parts": {"a": {"size": [1]}}}', '{"version": 1, "parts": {"a": null}}'),
        '{"version": 1, "parts": {"a": {"size": [1, true]}}}',
        '{"version": 1, "parts": {"a": {"share": "1"}}}',
        '{"version": 1, "parts": {"a": {"share": 1e400}}}',
        '{"version": 1, "parts": {"a": {"share": NaN}}}',
        '{"version": 1, "parts": {"a": {"share": -Infinity}}}',
        f'{{"version": 1, "parts": {{"a": {{"share": 1{"0" * 400}}}}}}}',
        '{"version": 1, "parts": {"a": {"by_edge": {"NaN": 1}}}}',
        '{"version": 1, "parts": {"a": {"by_edge": {"a": 1}}}}',
        *(
            '{"version": 1, "parts": {}, "names": "ab"}',
            '{"version": 1, "parts": {}, "names": [1]}',
        ),
        b"\xff\xfe{\0}\0",
        '{"version": 1, "parts": {"' + "\\u0000" * 500 + '": 1}}',
    ],
)
def test_anything_else_is_one_printable_sentence(text, tmp_path):
    with pytest.raises(FileError) as caught:
        read(text, tmp_path)
    message = str(caught.value)
    assert message.startswith("record.json is damaged (")
    assert len(message) < 300
    assert message.isprintable()


def test_a_field_is_named_by_its_place(tmp_path):
    with pytest.raises(FileError, match=r"\(parts\.a\.share is 'x': .*number"):
        read('{"version": 1, "parts": {"a": {"share": "x"}}}', tmp_path)

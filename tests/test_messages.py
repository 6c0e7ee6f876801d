"""Messages: plain English for programs, translatable for people, and all of them translated."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import pickle
import re
import string
import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from message_templates import (
    find_format_strings,
    find_templates,
    list_format_strings,
    list_templates,
)

core = importlib.import_module("qwen_edit_lora.lora_core")
errors = importlib.import_module("qwen_edit_lora.lora_core.errors")
messages = importlib.import_module("qwen_edit_lora.lora_core.messages")
text = importlib.import_module("qwen_edit_lora.lora_core.text")
translation = importlib.import_module("qwen_edit_lora.lora_core.translation")

message, join_messages = messages.message, messages.join_messages
TABLE = translation.read_table("zh")
TEMPLATES = find_templates()


def to_chinese(value):
    return translation.translate(value, "zh")


def list_placeholders(template):
    """(name, conversion, format) of each; a translation may repeat one."""
    return {
        (name, conversion or "", spec or "")
        for _, name, spec, conversion in string.Formatter().parse(template)
        if name is not None
    }


# --- the table of translations --------------------------------------------------------------------


def test_every_template_in_the_source_has_a_translation():
    assert {template: place for template, place in TEMPLATES.items() if template not in TABLE} == {}


def test_every_translation_belongs_to_a_template_in_the_source():
    assert [template for template in TABLE if template not in TEMPLATES] == []


@pytest.mark.parametrize("template", TABLE)
def test_a_translation_has_the_placeholders_of_its_template(template):
    if "{" in template and not template.startswith("changes is not"):  # JSON, without values
        assert list_placeholders(TABLE[template]) == list_placeholders(template)


def test_every_translation_is_chinese_or_only_placeholders_and_signs():
    def is_chinese(translated):
        return any("\u4e00" <= c <= "\u9fff" for c in translated)

    def letters(template):
        parts = (literal for literal, *_ in string.Formatter().parse(template))
        return [c for part in parts for c in part if c.isalpha()]

    english = [t for t in TABLE if "{" in t and letters(t) and not is_chinese(TABLE[t])]
    #: Names of types, of modules and of files, sizes.
    known = {
        "a {name}",
        "a: {name_a}; b: {name_b}",
        "{image} is {traits}",
        "{batch}{image_shape} x {height}",
    }
    assert set(english) == known


def test_templates_are_found_in_messages_errors_and_counts():
    source = (
        'raise ConfigError("{a} is wrong", a=1)\nraise ValueError("no text for users")\n'
        'message("one")\nformat_count(2, "module")\nTOO_DEEP = "deep"\nraise FileError(TOO_DEEP)\n'
    )
    found = [template for template, _ in list_templates(source)]
    assert found == ["{a} is wrong", "one", "{n:,} module", "{n:,} modules", "deep"]


def test_no_f_string_takes_the_place_of_a_template():
    source = 'raise ConfigError(f"{a} is wrong")\nraise ValueError(f"{a}")\nmessage("{a}", a=1)\n'
    assert list(list_format_strings(source)) == [1]
    counts = ("lora_core/text.py:",)  # `format_count`, whose nouns are found where it is called
    assert [place for place in find_format_strings() if not place.startswith(counts)] == []


# --- a message is its English text ----------------------------------------------------------------


SAID = message("{name} is {value:g}, not {other!r}", name="rank", value=0.5, other="1")


def test_a_message_is_its_english_text_for_everything_that_takes_a_text():
    english = "rank is 0.5, not '1'"
    assert english == SAID
    assert {SAID: 1}[english] == 1
    assert json.loads(json.dumps({"text": SAID})) == {"text": english}
    assert f"{SAID}" == english
    assert type(str(SAID)) is str


@pytest.mark.parametrize(
    "change", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("said", [SAID, join_messages("; ", [SAID, "plain"])])
def test_a_copied_or_pickled_message_can_still_be_translated(said, change):
    changed = change(said)
    assert changed == said
    assert to_chinese(changed) == to_chinese(said)
    assert messages.pack(changed) == messages.pack(said)


def test_a_message_without_values_may_hold_braces():
    assert message('expected e.g. {"steps": 500}') == 'expected e.g. {"steps": 500}'


def test_two_messages_together_are_still_translated():
    both = message("paused") + ", " + message("{duration} left", duration="3 s")
    assert both == "paused, 3 s left"
    assert to_chinese(both) == "已暂停, 剩余 3 s"


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_is_english_as_text_and_translated_by_its_message():
    error = core.ConfigError("{name} is empty; expected a path", name="folder")
    assert str(error) == "folder is empty; expected a path"
    assert to_chinese(error.message) == "folder 为空；应为路径"


def test_an_error_within_an_error_is_translated_too():
    inner = core.FileError("index.json is damaged ({error}).", error="no version")
    outer = core.FileError("{error} Make the training set again.", error=inner)
    assert str(outer) == "index.json is damaged (no version). Make the training set again."
    assert to_chinese(outer.message) == "index.json 已损坏（no version）。请重新制作训练集。"


def test_a_sentence_continued_as_a_clause_keeps_its_translation_without_the_full_stop():
    inner = core.FileError("index.json is damaged ({error}).", error="no version")
    longer = message("{error}, so its alpha is lost", error=messages.take_clause(inner))
    assert longer == "index.json is damaged (no version), so its alpha is lost"
    assert to_chinese(longer) == "index.json 已损坏（no version），因此其 alpha 丢失"


@pytest.mark.parametrize(
    ("said", "chinese"),
    [("Permission denied", "权限不足"), ("Odd fault", "Odd fault")],
)
def test_what_the_system_says_is_translated_if_it_is_usual(said, chinese):
    reason = errors.get_reason(OSError(13, said))
    error = core.FileError("{name} cannot be opened: {reason}.", name="a.json", reason=reason)
    assert str(error) == f"a.json cannot be opened: {said}."
    assert to_chinese(error.message) == f"无法打开 a.json：{chinese}。"


def test_a_pickled_error_keeps_its_message():
    error = core.TargetError(
        "unknown preset {preset!r}; expected one of {presets}",
        preset="x",
        presets="full",
    )
    again = pickle.loads(pickle.dumps(error))
    assert to_chinese(again.message) == "未知的预设 'x'；应为 full 之一"


# --- lists, counts, durations ---------------------------------------------------------------------


def test_a_count_has_one_translation_for_singular_and_plural():
    assert [text.format_count(n, "module") for n in (1, 1204)] == ["1 module", "1,204 modules"]
    assert [to_chinese(text.format_count(n, "module")) for n in (1, 1204)] == [
        "1 个模块",
        "1,204 个模块",
    ]


def test_a_shortened_list_is_translated():
    shown = text.shorten_list(["a", "b", "c"], 2)
    assert shown == "a; b; and 1 more"
    assert to_chinese(shown) == "a；b；以及另外 1 个"


def test_a_duration_is_translated():
    assert to_chinese(text.format_duration(12000)) == "3 小时 20 分钟"


# --- languages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("locale", "language"),
    [
        ("zh", "zh"),
        ("zh-CN", "zh"),
        ("zh_CN.UTF-8", "zh"),
        ("en", "en"),
        ("fr", "en"),
        (None, "en"),
    ],
)
def test_a_locale_without_translation_is_english(locale, language):
    assert translation.choose_language(locale) == language


def test_a_text_without_translation_stays_english():
    assert to_chinese("plain") == "plain"
    assert to_chinese(message("no such template {n}", n=1)) == "no such template 1"


@dataclasses.dataclass(frozen=True)
class Failure:
    sentence: str
    advice: tuple[str, ...] = ()


def test_data_is_translated_at_any_depth():
    data = {"jobs": [{"failure": Failure(message("failed"), (message("paused"), "plain"))}], "n": 1}
    translated = translation.translate_all(data, "zh")
    assert translated["jobs"][0]["failure"] == Failure("失败", ("已暂停", "plain"))
    assert translation.translate_all(data, "en") is data


# --- stored texts ---------------------------------------------------------------------------------


def test_stored_messages_are_plain_english_texts_and_become_messages_again():
    said = message("{name}: {text}", name=message("failed"), text=join_messages(", ", [SAID, "x"]))
    stored = json.loads(json.dumps(messages.add_messages({"notes": (said, "plain")})))
    assert stored["notes"] == [str(said), "plain"]
    restored = messages.restore_messages(stored, stored.pop("messages"))
    assert restored["notes"] == stored["notes"]
    assert to_chinese(restored["notes"][0]) == to_chinese(said) != said


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 2**70, -(2**70)])
def test_a_number_that_json_does_not_have_is_stored_as_text(number):
    shown, formatted = message("the loss is {loss}", loss=number), message("{n:g} M", n=number)
    stored = json.dumps(messages.add_messages({"a": shown, "b": formatted}), allow_nan=False)
    assert not re.search(r"\d{20}[^\d\"]*[,}]", stored)
    data = json.loads(stored)
    restored = messages.restore_messages(data, data.pop("messages"))
    assert restored == {"a": shown, "b": formatted}
    assert to_chinese(restored["a"]) == f"损失为 {number}"
    assert type(restored["b"]) is str


@pytest.mark.parametrize(
    "packed",
    [
        {"template": "{a:>999999999}", "values": {"a": "x"}},
        {"template": "{a.__class__}", "values": {"a": "x"}},
        {"template": "{a}", "values": {"a": "another text"}},
        {"template": "{b}", "values": {"a": "x"}},
        {"template": 3, "values": {"a": "x"}},
        {"parts": 1},
        [],
    ],
)
def test_a_stored_message_that_does_not_make_its_text_stays_that_text(packed):
    restored = messages.restore_messages({"note": "x"}, {"x": packed})
    assert restored == {"note": "x"}
    assert type(restored["note"]) is str


@pytest.mark.parametrize(
    "packed",
    [
        {"template": "{a}" * 1000, "values": {"a": "x" * 10**5}},
        {"separator": "x" * 10**5, "parts": [""] * 1000},
    ],
    ids=["values", "separators"],
)
def test_a_stored_message_takes_no_more_memory_than_its_file(packed):
    tracemalloc.start()
    restored = messages.restore_messages({"note": "x"}, {"x": packed})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert restored == {"note": "x"}
    assert peak < 10**7

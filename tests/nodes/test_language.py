"""The language of reports and errors: ComfyUI's setting, or that of the page last heard of."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.comfy

CHINESE_PAGE = {"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.8"}


@pytest.fixture
def language(comfyui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with a folder of users of its own."""
    import folder_paths
    from qwen_edit_lora.nodes.host import language

    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path))
    monkeypatch.setattr(language, "_last_page", "en")
    token = language._request.set("")
    yield language
    language._request.reset(token)
    folder_paths.set_user_directory(before)


def choose(folder: Path, locale: object, user: str = "default") -> None:
    (folder / user).mkdir(exist_ok=True)
    settings = {"Comfy.Locale": locale, "Comfy.Other": 1}
    (folder / user / "comfy.settings.json").write_text(json.dumps(settings), encoding="utf-8")


def test_without_a_setting_and_a_page_it_is_english(language):
    assert language.get_language() == "en"


@pytest.mark.parametrize(("locale", "expected"), [("zh", "zh"), ("zh-TW", "zh"), ("fr", "en")])
def test_the_users_setting_decides(language, tmp_path, locale, expected):
    choose(tmp_path, locale)
    assert language.get_language() == expected
    language.use_page_language(CHINESE_PAGE)
    assert language.get_language() == expected


def test_a_changed_setting_holds_at_once(language, tmp_path):
    choose(tmp_path, "zh")
    assert language.get_language() == "zh"
    choose(tmp_path, "en-US")
    assert language.get_language() == "en"


def test_a_user_who_chose_none_sees_the_browsers_language(language):
    language.use_page_language(CHINESE_PAGE)
    assert language.get_language() == "zh"
    language._request.set("")  # a node, later
    assert language.get_language() == "zh"


def test_a_request_is_answered_in_the_language_of_its_own_user(language, tmp_path, monkeypatch):
    monkeypatch.setattr(language.args, "multi_user", True)
    choose(tmp_path, "zh", user="mei_1")
    choose(tmp_path, "en", user="tom_2")
    for user, expected in (("mei_1", "zh"), ("tom_2", "en")):
        language.use_page_language({"Comfy-User": user})
        assert language.get_language() == expected


def test_without_several_users_a_name_in_the_request_does_not_count(language, tmp_path):
    choose(tmp_path, "zh")
    language.use_page_language({"Comfy-User": ""})  # as ComfyUI's page sends it
    assert language.get_language() == "zh"


@pytest.mark.parametrize("user", ["../default", "..", "__system", "a/b", ""])
def test_a_name_that_is_no_user_is_not_looked_up(language, tmp_path, user):
    choose(tmp_path, "zh")
    assert language.read_setting(user) == ""


@pytest.mark.parametrize("content", ["", "[]", "{", '{"Comfy.Locale": 3}', "\xff"])
def test_damaged_settings_are_english(language, tmp_path, content):
    (tmp_path / "default").mkdir()
    path = tmp_path / "default" / "comfy.settings.json"
    path.write_bytes(content.encode("latin-1"))
    assert language.get_language() == "en"


def test_a_report_and_its_findings_are_in_the_users_language(language, tmp_path):
    from qwen_edit_lora.lora_core.findings import WARNING, Finding
    from qwen_edit_lora.lora_core.messages import message
    from qwen_edit_lora.nodes.sockets import Report, show_report

    choose(tmp_path, "zh")
    text = message("the body ended early; send it again")
    shown = show_report(Report(text, [Finding("odd", WARNING, text, 1)]))
    assert shown["qwen_edit_lora_report"] == ["请求体提前结束；请重新发送"]
    (finding,) = shown["qwen_edit_lora_findings"]
    assert finding == {
        **{"kind": "odd", "severity": "warning", "count": 1},
        "text": "请求体提前结束；请重新发送",
    }


@pytest.fixture
def nodes(comfyui: Any) -> dict[str, Any]:
    import asyncio

    from qwen_edit_lora.nodes import QwenEditLoraExtension

    found = asyncio.run(QwenEditLoraExtension().get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in found}


def test_a_node_raises_its_error_in_the_users_language_and_of_the_same_kind(
    language, tmp_path, nodes
):
    from qwen_edit_lora.lora_core import FileError

    load = nodes["QwenEditLoraLoad"]
    choose(tmp_path, "zh")
    with pytest.raises(FileError, match=r"^no\.safetensors 不在 loras 文件夹中") as raised:
        load.execute("no.safetensors")
    assert raised.value.message.startswith("no.safetensors is not in the loras folders")
    choose(tmp_path, "en")
    with pytest.raises(FileError, match="is not in the loras folders"):
        load.execute("no.safetensors")


def test_a_validation_answers_in_the_users_language_and_takes_the_inputs_it_took(
    language, tmp_path, nodes
):
    choose(tmp_path, "zh")
    validate = nodes["QwenEditLoraLoad"].validate_inputs
    assert "lora_name" in inspect.getfullargspec(validate).args
    assert "不在 loras 文件夹中" in validate("no.safetensors")
    assert validate("") is not True

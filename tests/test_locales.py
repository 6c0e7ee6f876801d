"""The translations, checked against the nodes that ComfyUI serves and the English help pages.

English has no nodeDefs.json: if ComfyUI's page (1.47) finds no entry, it uses the schema's text.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
PAGES = ROOT / "web" / "docs"
TRANSLATIONS = sorted(path.parent.name for path in LOCALES.glob("*/nodeDefs.json"))
#: The sockets of a growing list have their own label, which no translation replaces.
LIST_TYPE, CHOICE_TYPE = "COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3"
#: Characters with a meaning in names and descriptions, which the page compiles.
SYNTAX = set("@{}|")


def read(path: Path) -> Any:
    """The file's content; refuses duplicate keys, of which the second would hide the first."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        assert len(set(names)) == len(names), f"{path.name}: a key stands twice in {names}"
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=build)


@pytest.fixture(scope="module")
def nodes(comfyui: Any) -> dict[str, Any]:
    """Node id -> its entry in /object_info."""
    from qwen_edit_lora.nodes import QwenEditLoraExtension

    found = asyncio.run(QwenEditLoraExtension().get_node_list())
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in found}


def list_inputs(groups: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict]]:
    """(key in a locale file, options) of every input, those of each choice included."""
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            options = rest[0] if rest else {}
            yield prefix + name, options
            if kind == CHOICE_TYPE:
                for choice in options["options"]:
                    yield from list_inputs(choice["inputs"], f"{prefix}{name}_")


def list_texts(node: Mapping[str, Any]) -> dict[str, str]:
    """Key path in a locale file -> English text, for every text of the schema."""
    texts = {"display_name": node["display_name"], "description": node["description"]}
    for key, options in list_inputs(node["input"]):
        texts[f"inputs.{key}.name"] = key
        texts[f"inputs.{key}.tooltip"] = options.get("tooltip", "")
    for index, name in enumerate(node["output_name"]):
        texts[f"outputs.{index}.name"] = name
        texts[f"outputs.{index}.tooltip"] = (node["output_tooltips"] or {index: ""})[index] or ""
    return {place: text for place, text in texts.items() if text}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def list_fixed_parts(text: str) -> list[str]:
    """The parts a translation keeps: numbers, examples in quotes, file names and identifiers."""
    quoted = re.findall(r"(?<!\w)'([^']+)'", text)
    rest = re.sub(r"(?<!\w)'[^']+'", " ", text)
    rest = rest.replace("KSampler", " ")  # named by its translated title, too
    names = re.findall(r"[A-Za-z.]\w*(?:[_./*]+\w+)+|\.\w{2,}|[\w]+/", rest)
    for name in names:
        rest = rest.replace(name, " ", 1)
    return sorted([*quoted, *names, *re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", rest)])


def test_the_fixed_parts_of_a_text_are_found():
    text = "A list '0, 0.5', a/ folder, x_start.png or 64 (.ckpt) to_q, 1e-6."
    expected = [".ckpt", "0, 0.5", "1e-6", "64", "a/", "to_q", "x_start.png"]
    assert list_fixed_parts(text) == expected


def test_every_locale_file_is_one_that_comfyui_reads():
    names = {path.name for path in LOCALES.glob("*/*")} - {"messages.json"}  # read by the core
    assert names <= {"main.json", "nodeDefs.json", "commands.json", "settings.json"}
    assert TRANSLATIONS == ["zh"]
    for path in LOCALES.glob("*/*.json"):
        assert read(path), path


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_has_the_files_and_keys_that_english_has(language):
    for path in (LOCALES / "en").glob("*.json"):
        assert flatten(read(LOCALES / language / path.name)).keys() == flatten(read(path)).keys()


@pytest.mark.comfy
@pytest.mark.parametrize("language", TRANSLATIONS)
def test_every_text_of_every_node_is_translated_and_nothing_else(nodes, language):
    translated = read(LOCALES / language / "nodeDefs.json")
    assert translated.keys() == nodes.keys()
    for node_id, node in nodes.items():
        assert flatten(translated[node_id]).keys() == list_texts(node).keys(), node_id


@pytest.mark.comfy
@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_keeps_numbers_examples_and_identifiers(nodes, language):
    translated = read(LOCALES / language / "nodeDefs.json")
    changed = {}
    for node_id, node in nodes.items():
        texts = flatten(translated[node_id])
        for place, english in list_texts(node).items():
            if place.endswith(".name"):
                continue
            lost = [part for part in list_fixed_parts(english) if part not in texts[place]]
            numbers = set(list_fixed_parts(texts[place])) - set(list_fixed_parts(english))
            added = [part for part in numbers if part[0].isdigit()]
            if lost or added:
                changed[f"{node_id}.{place}"] = (lost, added)
    assert changed == {}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_contains_nothing_the_page_would_compile(language):
    texts = flatten(read(LOCALES / language / "nodeDefs.json"))
    assert all(text == text.strip() != "" for text in texts.values())
    compiled = [text for place, text in texts.items() if not place.endswith(".tooltip")]
    assert [text for text in compiled if SYNTAX & set(text)] == []


@pytest.mark.comfy
def test_the_translated_menu_matches_the_menu(nodes):
    categories = {node["category"] for node in nodes.values()}
    assert set(read(LOCALES / "en" / "main.json")["nodeCategories"]) == categories


# --- help pages ----------------------------------------------------------------------------------

TRANSLATED_PAGES = sorted(PAGES.glob("*/*.md"))


def list_code(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def find_messages(page: str) -> list[str]:
    """The texts of reports, in quotes in the first column of a table."""
    cells = re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)
    return [quote for cell in cells for quote in re.findall(r'"([^"]+)"', cell)]


@pytest.mark.parametrize("page", TRANSLATED_PAGES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_translated_help_page_follows_the_english_one(page):
    assert page.stem in TRANSLATIONS
    english = (PAGES / f"{page.parent.name}.md").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    for pattern in (r"^#+ ", r"^\|", r"^```"):  # headings, rows of tables, fences
        count = len(re.findall(pattern, english, re.MULTILINE))
        assert len(re.findall(pattern, text, re.MULTILINE)) == count, pattern
    assert list_code(english) - list_code(text) == set()
    assert find_messages(text) == find_messages(english)
    assert re.findall(r"```text\n(.*?)```", text, re.DOTALL) == re.findall(
        r"```text\n(.*?)```", english, re.DOTALL
    )


def test_every_help_page_is_translated_but_for_nodes_that_are_in_no_menu():
    internal = {"QwenEditLoraHold", "QwenEditLoraSweepCollect"}
    for language in TRANSLATIONS:
        there = {page.parent.name for page in TRANSLATED_PAGES if page.stem == language}
        assert there == {page.stem for page in PAGES.glob("*.md")} - internal


@pytest.mark.comfy
def test_a_search_for_lora_or_qwen_edit_finds_every_node(nodes):
    shown = {key: node for key, node in nodes.items() if "(internal)" not in node["display_name"]}
    assert len(shown) == len(nodes) - 2
    for node_id, node in shown.items():
        names = " ".join([node["display_name"], *node["search_aliases"]]).lower()
        assert "lora" in names, node_id
        assert "qwen edit" in names, node_id

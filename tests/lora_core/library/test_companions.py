"""Previews and sidecars that other programs keep beside an adapter, and the user's stars."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwen_edit_lora.lora_core.errors import FileError
from qwen_edit_lora.lora_core.jobs.publication import JOB_KEY
from qwen_edit_lora.lora_core.library.companions import NO_COMPANIONS, list_companions
from qwen_edit_lora.lora_core.library.facts import describe_metadata
from qwen_edit_lora.lora_core.library.favourites import Favourites
from qwen_edit_lora.lora_core.library.metadata import HISTORY_FIELD, JOB_FIELD
from qwen_edit_lora.lora_core.library.sidecars import SidecarFacts, is_link, read_sidecars
from qwen_edit_lora.lora_core.toolbox.composition import HISTORY
from qwen_edit_lora.lora_core.translation import translate

HOSTILE = '<img src=x onerror="hacked()">'


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "name.safetensors"
    path.write_bytes(b"x")
    return path


def find(lora: Path) -> Any:
    return list_companions([lora]).get(lora, NO_COMPANIONS)


@pytest.mark.parametrize(
    "file", ["name.preview.png", "name.png", "name.jpg", "name.webp", "name.JPEG", "name.avif"]
)
def test_a_preview_as_other_programs_name_it_is_found(file, lora):
    (lora.parent / file).write_bytes(b"x")
    assert find(lora).preview == file


def test_the_preview_named_as_one_is_taken_before_others_and_a_video_is_not(lora):
    for file in ("name.jpg", "name.preview.webp", "name.mp4", "other.png", "names.png"):
        (lora.parent / file).write_bytes(b"x")
    assert find(lora).preview == "name.preview.webp"


def test_a_link_a_folder_an_empty_and_a_huge_file_are_no_previews(lora, tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_bytes(b"x")
    (lora.parent / "name.preview.png").symlink_to(outside)
    (lora.parent / "name.jpg").mkdir()
    (lora.parent / "name.png").touch()
    with (lora.parent / "name.webp").open("wb") as file:
        file.truncate(1 << 30)
    (lora.parent / "name.json").symlink_to(outside)
    assert find(lora) == NO_COMPANIONS


def test_another_preview_has_another_version(lora):
    preview = lora.parent / "name.png"
    preview.write_bytes(b"x")
    before = find(lora).preview_version
    os.utime(preview, (1e9, 1e9))
    assert find(lora).preview_version not in ("", before)


def read(lora: Path, **files: Any) -> SidecarFacts:
    for ending, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lora.with_name(f"name.{ending.replace('_', '.')}").write_text(text, encoding="utf-8")
    return read_sidecars(lora.parent, find(lora).sidecars)


def test_what_lora_manager_notes_is_read(lora):
    version = {"id": 22, "modelId": 11, "trainedWords": ["restore", "old photo"]}
    version |= {"baseModel": "Qwen", "description": "<p>Use <b>it</b> &amp; enjoy</p>"}
    values = {"model_name": "Old photos", "base_model": "Qwen Image", "notes": "my own\nnote"}
    values |= {"civitai": version, "usage_tips": '{"strength": 0.8}', "sha256": "0" * 64}
    assert read(lora, metadata_json=values) == SidecarFacts(
        title="Old photos",
        trigger_words=("restore", "old photo"),
        base_model="Qwen Image",
        strength="0.8",
        notes="my own note",
        description="Use it & enjoy",
        source="https://civitai.com/models/11?modelVersionId=22",
        files=("name.metadata.json",),
    )


def test_what_the_civitai_helper_and_a1111_note_is_joined(lora):
    civitai = {"id": 2, "modelId": 1, "trainedWords": ["a"], "baseModel": "Other"}
    civitai["model"] = {"name": "From the site", "type": "LORA"}
    a1111 = {"activation text": "b, c", "preferred weight": 0.7, "sd version": "Unknown"}
    found = read(lora, civitai_info=civitai, json={**a1111, "notes": "mine"})
    assert (found.title, found.base_model, found.strength) == ("From the site", "Other", "0.7")
    assert (found.trigger_words, found.notes) == (("a", "b, c"), "mine")
    assert found.files == ("name.civitai.info", "name.json")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", "null", "NaN", '{"a": ' * 100, "\x00", '"text"'),
        '{"civitai": 1, "notes": NaN}',
    ],
    ids=repr,
)
def test_a_broken_sidecar_shows_nothing_but_says_so(text, lora):
    found = read(lora, metadata_json=text)
    assert found == SidecarFacts(problems=found.problems)
    (problem,) = found.problems
    assert "name.metadata.json" in problem
    assert str(lora.parent) not in problem


@pytest.mark.parametrize(
    "values",
    [
        {"civitai": [1], "notes": {}, "base_model": 5, "model_name": None, "usage_tips": "[1]"},
        {"civitai": {"trainedWords": "text", "modelId": "1", "id": True, "model": []}},
        {"activation text": ["a"], "preferred weight": "much", "description": 5},
        {"modelId": -1},
        {"modelId": 10**30},
        {"usage_tips": "{" * 5000},
        {"weights": [1, 2]},
    ],
)
def test_values_of_other_kinds_are_left_out_without_an_error(values, lora):
    assert read(lora, metadata_json=values) == SidecarFacts()


def test_hostile_values_stay_short_text(lora):
    values = {"model_name": HOSTILE, "notes": f"a\x1b[31m\u202e{'x' * 10**6}", "url": HOSTILE}
    values |= {"civitai": {"trainedWords": [HOSTILE] * 2 + ["w" * 9999, *map(str, range(999))]}}
    found = read(lora, metadata_json=values)
    assert found.title == found.source == HOSTILE
    assert len(found.notes) <= 2000
    assert found.notes.isprintable()
    assert len(found.trigger_words) == 20
    assert max(map(len, found.trigger_words)) <= 200


def test_a_character_of_thousands_of_digits_is_no_text(lora):
    found = read(lora, json={"description": f"<b>first &#{'1' * 5000}; &#65;"})
    assert found.description == "first A"


def test_what_is_wrong_with_a_sidecar_is_said_in_the_readers_language(lora):
    (problem,) = read(lora, json="{").problems
    assert translate(problem, "zh").startswith("无法把 name.json 读作 JSON")


def test_a_sidecar_of_any_size_is_not_read_into_memory(lora):
    with lora.with_name("name.json").open("wb") as file:
        file.truncate(1 << 32)
    (problem,) = read(lora).problems
    assert "larger than" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://civitai.com/models/1?modelVersionId=2", True),
        ("http://civitai.com/models/1", False),
        ("javascript:alert(1)//https://a.b", False),
        ("https://user@evil.example/", False),
        ("https:///path", False),
        ("https://a b/", False),
        ("https://\u0430pple.com/", False),
        ("https://[broken", False),
        ("", False),
    ],
)
def test_only_a_plain_https_address_is_a_link(text, expected):
    assert is_link(text) is expected


def test_a_file_derived_from_a_trained_one_names_no_training():
    assert (JOB_FIELD, HISTORY_FIELD) == (JOB_KEY, HISTORY)
    job_id = "20260131-120000-0123abcd"
    assert describe_metadata({JOB_FIELD: job_id})["job_id"] == job_id
    assert describe_metadata({JOB_FIELD: job_id, HISTORY_FIELD: "[]"})["job_id"] == ""


# --- favourites -----------------------------------------------------------------------------------

FILES = {"a.safetensors": (5, 50), "sub\\b.safetensors": (6, 60), "c.safetensors": (5, 50)}


@pytest.fixture
def open_stars(tmp_path: Path) -> Callable[[], Favourites]:
    return lambda: Favourites(tmp_path / "user" / "favourites.json")


def test_a_star_survives_a_restart_and_can_be_taken(open_stars):
    open_stars().set("a.safetensors", True, FILES)
    open_stars().set("sub\\b.safetensors", True, FILES)
    assert open_stars().find(FILES) == {"a.safetensors", "sub\\b.safetensors"}
    open_stars().set("a.safetensors", False, FILES)
    assert open_stars().find(FILES) == {"sub\\b.safetensors"}


def test_a_renamed_file_keeps_its_star_and_can_lose_it(open_stars):
    open_stars().set("sub\\b.safetensors", True, FILES)
    renamed = {"a.safetensors": (5, 50), "new.safetensors": (6, 60)}
    assert open_stars().find(renamed) == {"new.safetensors"}
    open_stars().set("new.safetensors", False, renamed)
    assert open_stars().find(renamed) == set()


def test_of_several_copies_none_is_guessed(open_stars):
    open_stars().set("a.safetensors", True, FILES)
    copies = {"x.safetensors": (5, 50), "y.safetensors": (5, 50)}
    assert open_stars().find(copies) == set()


def test_what_is_gone_for_a_while_keeps_its_star(open_stars):
    """A drive that is not plugged in."""
    open_stars().set("a.safetensors", True, FILES)
    open_stars().set("other.safetensors", True, {"other.safetensors": (1, 1)})
    assert open_stars().find(FILES) == {"a.safetensors"}


def test_a_click_on_a_star_reads_the_files_once_however_many_stars_there_are(open_stars):
    class Files(dict):
        num_reads = 0

        def __iter__(self):
            Files.num_reads += 1
            return super().__iter__()

        def items(self):
            Files.num_reads += 1
            return super().items()

    for size, name in enumerate("abc"):
        open_stars().set(name, True, {name: (size, 1)})
    open_stars().set("new.safetensors", True, Files({"new.safetensors": (5, 50)}))
    assert Files.num_reads <= 2


@pytest.mark.parametrize("text", ["", "{", '{"version": 1, "favourites": [{"name": 5}]}'])
def test_a_damaged_record_is_reported_and_never_overwritten(text, open_stars):
    stars = open_stars()
    stars.path.parent.mkdir()
    stars.path.write_text(text)
    with pytest.raises(FileError, match=r"favourites\.json"):
        stars.set("a.safetensors", True, FILES)
    assert stars.path.read_text() == text

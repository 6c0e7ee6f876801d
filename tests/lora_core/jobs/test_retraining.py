"""Retraining an adapter from its metadata alone, and what prevents it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.jobs.retraining import build_again
from qwen_edit_lora.lora_core.training.run.adapter_files import CONFIG_KEY
from safetensors import safe_open
from tiny_jobs import assert_equal_weights, make_train, train_here

BASE = "tiny_fp32_2509.safetensors"


def make_finder(folder: Path):
    return lambda name: [path for path in folder.rglob("*") if path.name == name]


def test_a_lora_retrained_from_its_metadata_is_bit_identical(store, material):
    train = make_train(
        material,
        **{"data.caption_dropout": 0.0, "optimizer.warmup_steps": 2, "objective.shift": 3.0},
    )
    first = train_here(store, train)
    file = store.catalog.find(first).path / "tiny.safetensors"
    with safe_open(file, "pt") as adapter:
        metadata = adapter.metadata()
    assert str(material) not in json.dumps(metadata)
    again = build_again(metadata, make_finder(material), make_finder(material))
    assert (again.model, again.data, again.lora) == (train.model, train.data, train.lora)
    second = train_here(store, again)
    assert_equal_weights(store.catalog.find(second).path / "tiny.safetensors", file)


def describe(**changes) -> dict[str, str]:
    """Metadata of a run with prior and VAE; changes by "table.setting"."""
    values = {
        "name": "a",
        "output": "x",
        "model": {"source": BASE, "vae": "v.safetensors"},
        "data": {"folder": "set-1", "prior": "set-2"},
    }
    for place, value in changes.items():
        table, _, name = place.rpartition(".")
        (values[table] if table else values)[name] = value
    return {CONFIG_KEY: json.dumps(values)}


@pytest.fixture
def here(tmp_path: Path):
    """Finds everything except what a test specifies."""

    def find(*lacking: str):
        return lambda name: [] if name in lacking else [tmp_path / name]

    return find


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ((BASE,), f"the base model {BASE} is missing"),
        (("set-1",), "the training set set-1 is missing"),
        (("set-2", "v.safetensors"), "prior's training set set-2 is missing; the VAE v.safeten"),
    ],
)
def test_what_is_missing_is_named(lacking, sentence, here):
    find = here(*lacking)
    with pytest.raises(ConfigError, match="cannot be trained again") as refused:
        build_again(describe(), find, find, find)
    assert sentence in str(refused.value)
    assert "Put what is missing where it was" in str(refused.value)


def test_two_bases_of_one_name_are_not_guessed_between(here, tmp_path):
    def twice(name: str) -> list[Path]:
        return [tmp_path / "a" / name, tmp_path / "b" / name]

    with pytest.raises(ConfigError, match=f"the base model {BASE} was found 2 times"):
        build_again(describe(), twice, here(), here())


@pytest.mark.parametrize(
    "evil", ["../secret", "/etc/passwd", "a\\b", "C:x", "..", "a\0b", "x" * 400, 7, ["a"]]
)
@pytest.mark.parametrize("place", ["model.source", "data.folder", "data.prior", "model.vae"])
def test_metadata_from_elsewhere_never_becomes_a_path(evil, place, tmp_path):
    asked: list[object] = []

    def find(name):
        asked.append(name)
        return [tmp_path / name]

    with pytest.raises(ConfigError, match="is missing"):
        build_again(describe(**{place: evil}), find, find, find)
    assert evil not in asked


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "does not say how it was trained"),
        ({CONFIG_KEY: "{"}, "are damaged"),
        ({CONFIG_KEY: "[]"}, "are damaged"),
        ({CONFIG_KEY: '{"model": 1, "data": {}}'}, "are damaged"),
        (describe(novelty=1), "are of another version: the configuration has no setting 'novelty'"),
        (describe(steps="many"), "are of another version: steps is 'many'"),
    ],
)
def test_incomplete_metadata_is_a_clear_error(metadata, sentence, here):
    with pytest.raises(ConfigError, match=sentence):
        build_again(metadata, here(), here(), here())

"""The routes that measure and clean the cache of encoded image pairs."""

from __future__ import annotations

import pytest
from demo_base.pair_folders import write_text
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict

pytestmark = pytest.mark.comfy

PAIRS, CACHE = "/qwen_edit_lora/pairs", "/qwen_edit_lora/pair_cache"


def test_the_cache_is_cleaned_except_for_what_trainings_use(
    routes, folder, tmp_path, demo_models, monkeypatch
):
    from qwen_edit_lora.nodes import host

    monkeypatch.setattr(host, "get_cache_folder", lambda: tmp_path / "user")
    store = tmp_path / "user" / "datasets"
    needed, spare = (store / "sets" / f"animals-{letter * 12}" for letter in "ab")
    for number, one in enumerate((needed, spare)):
        write_text(one / "items" / f"x-{str(number) * 12}.safetensors", "1234")
        write_text(store / "items" / f"{str(number) * 32}.safetensors", "1234")
    data = {"source": str(tmp_path / "base.safetensors"), "device": "cpu"}
    train = {"name": "t", "output": "unused", "model": data, "data": {"folder": str(needed)}}
    job = type("Job", (), {"name": "t"})()
    job.settings = type("Settings", (), {"train": config_from_dict(train)})()
    monkeypatch.setattr(JobStore, "list", lambda self: [job])
    assert routes.ask("GET", CACHE).read() == {"size_bytes": 16, "freed_bytes": 8, "num_sets": 1}
    (listed,) = routes.ask("GET", PAIRS).read()["sets"]
    assert listed["cached_bytes"] == 8
    assert routes.post(f"{CACHE}/clean").read() == {"freed_bytes": 8}
    assert needed.is_dir()
    assert not spare.exists()
    assert [path.name for path in (store / "items").iterdir()] == [f"{'0' * 32}.safetensors"]
    job.settings.train = config_from_dict({**train, "data": {"folder": "unknown"}})
    answer = routes.post(f"{CACHE}/clean")
    assert (answer.status, "damaged" in answer.sentence) == (409, True)
    assert needed.is_dir()


def test_the_cache_is_not_cleaned_while_a_prompt_may_be_encoding(routes, tmp_path, monkeypatch):
    from qwen_edit_lora.nodes import host
    from server import PromptServer

    monkeypatch.setattr(host, "get_cache_folder", lambda: tmp_path)
    spare = write_text(tmp_path / "datasets" / "items" / f"{'0' * 32}.safetensors", "1234")
    queue = PromptServer.instance.prompt_queue
    monkeypatch.setattr(queue, "currently_running", {0: (0, "id", {}, {}, [])})
    answer = routes.post(f"{CACHE}/clean")
    assert (answer.status, "a prompt is running" in answer.sentence) == (409, True)
    assert spare.exists()
    monkeypatch.setattr(queue, "currently_running", {})
    assert routes.post(f"{CACHE}/clean").status == 200
    assert not spare.exists()

"""The list of adapter files: its entries, when it computes, and what it caches."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from demo_base.adapters import make_adapter
from qwen_edit_lora.lora_core import read_adapter, resize_adapter
from qwen_edit_lora.lora_core.errors import ConfigError
from qwen_edit_lora.lora_core.findings import Finding
from qwen_edit_lora.lora_core.inspection.saved import read_inspection
from qwen_edit_lora.lora_core.library import health, library
from qwen_edit_lora.lora_core.library.cache import CacheEntry, read_cache, write_cache
from qwen_edit_lora.lora_core.library.details import describe_file
from qwen_edit_lora.lora_core.library.facts import AdapterFacts, read_facts
from qwen_edit_lora.lora_core.library.health import UNEXPECTED
from qwen_edit_lora.lora_core.library.inspector import Inspector, answer
from qwen_edit_lora.lora_core.library.library import AdapterLibrary, UnknownAdapterError, build_id
from safetensors.torch import save_file

MODULES = {f"transformer_blocks.{i}.attn.to_{k}": (64, 64) for i in range(2) for k in "qkv"}
WAIT = 60.0  # seconds
ASK = Inspector._ask


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    (folder / "styles").mkdir(parents=True)
    return folder


@pytest.fixture
def open_library(
    loras: Path, tmp_path: Path, in_process: None
) -> Iterator[Callable[..., AdapterLibrary]]:
    """A library over `loras`, as after a restart: each call makes another on the same cache."""
    made = []

    def open_(**options) -> AdapterLibrary:
        def list_files() -> dict[str, Path]:
            return {
                path.relative_to(loras).as_posix(): path
                for path in loras.rglob("*")
                if path.is_file()
            }

        made.append(AdapterLibrary(list_files, tmp_path / "cache" / "adapters.json", **options))
        return made[-1]

    yield open_
    for one in made:
        one.stop()


def examine(adapters: AdapterLibrary) -> dict[str, dict]:
    """Name -> entry, once everything is known."""
    adapters.list()
    assert adapters.wait(WAIT)
    answer = adapters.list()
    assert answer["pending"] == 0
    return {entry["name"]: entry for entry in answer["adapters"]}


def save_sdxl(path: Path) -> None:
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.lora_down.weight": torch.zeros(2, 8)}, path, {"ss_output_name": "paint"})


def forbid_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "read_facts", lambda path: pytest.fail("read again"))
    monkeypatch.setattr(Inspector, "inspect", lambda *args: pytest.fail("inspected again"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspects like the inspector process, without the seconds torch takes to start."""

    def ask(inspector: Inspector, question: str) -> str:
        return json.dumps(answer(json.loads(question))) + "\n"

    monkeypatch.setattr(Inspector, "_ask", ask)


def test_an_entry_describes_the_file(loras, open_library):
    metadata = {
        "modelspec.architecture": "Qwen-Image-Edit-2511/lora",
        "modelspec.title": "Old photographs",
        "modelspec.trigger_phrase": "restore, old photo",
        "qwen_edit_lora.config": "{}",
    }
    path = loras / "styles" / "old.safetensors"
    make_adapter(path, MODULES, rank=4, alpha=2.0, key_style="kohya", metadata=metadata)
    (entry,) = examine(open_library()).values()
    assert entry["id"] == build_id("styles/old.safetensors")
    assert (entry["name"], entry["size_bytes"]) == ("styles/old.safetensors", path.stat().st_size)
    assert entry["modified_at"] == pytest.approx(path.stat().st_mtime)
    assert (entry["state"], entry["model"], entry["is_ours"]) == ("ok", "Qwen-Image", True)
    assert (entry["key_format"], entry["kinds"]) == ("kohya", ("LoRA",))
    assert (entry["ranks"], entry["alphas"], entry["num_modules"]) == ((4,), (2.0,), 6)
    assert (entry["title"], entry["variants"]) == ("Old photographs", ("2511",))
    assert entry["trigger_words"] == ("restore", "old photo")
    assert entry["health"]["level"] == "healthy"
    assert entry["health"]["sentence"].startswith("dense, small, healthy: std")


def test_each_kind_of_bad_file_is_distinguished(loras, open_library):
    good = make_adapter(loras / "good.safetensors", MODULES)
    (loras / "cut.safetensors").write_bytes(good.read_bytes()[:2000])
    (loras / "empty.safetensors").touch()
    (loras / "pickle.ckpt").write_bytes(b"\x80\x02cos\nsystem\n")
    (loras / "disguised.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 100)
    save_sdxl(loras / "sdxl.safetensors")
    save_file({"blocks.0.mystery.lora_A.weight": torch.zeros(2, 2)}, loras / "new.safetensors")
    half = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 8)}
    save_file(half, loras / "half.safetensors")
    untrained = {
        f"transformer_blocks.0.attn.to_q.lora_{part}.weight": tensor
        for part, tensor in (("A", torch.randn(2, 8)), ("B", torch.zeros(8, 2)))
    }
    save_file(untrained, loras / "untrained.safetensors")
    diverged = untrained | {
        "transformer_blocks.0.attn.to_q.lora_B.weight": torch.full((8, 2), float("nan"))
    }
    save_file(diverged, loras / "diverged.safetensors")
    found = {
        name.partition(".")[0]: (entry["state"], (entry["health"] or {}).get("level"))
        for name, entry in examine(open_library()).items()
    }
    assert found == {
        "good": ("ok", "healthy"),
        "cut": ("damaged", "broken"),
        "empty": ("damaged", "broken"),
        "disguised": ("damaged", "broken"),
        "half": ("damaged", "broken"),
        "untrained": ("ok", "broken"),
        "diverged": ("ok", "broken"),
        "sdxl": ("other model", None),
        "new": ("unknown model", None),
        "pickle": ("not opened", None),
    }


@pytest.mark.parametrize("name", ["a.sft", "a.SFT", "a.SAFETENSORS"])
def test_every_ending_of_safetensors_is_opened(name, loras):
    make_adapter(loras / "a.safetensors", MODULES).rename(loras / name)
    facts = read_facts(loras / name)
    assert facts.state == "ok"
    assert describe_file(loras / name, facts, None)["modules"]


@pytest.mark.parametrize("text", ["paint, brush", '["paint", "brush"]'])
def test_the_trigger_words_simpletuner_writes_are_shown(text, loras):
    make_adapter(loras / "a.safetensors", MODULES, metadata={"trained_words": text})
    assert read_facts(loras / "a.safetensors").trigger_words == ("paint", "brush")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [DEEP, f'{{"a": {DEEP}}}', f'{{"a": 1{"0" * 400}}}', "{"])
@pytest.mark.parametrize("name", ["ss_tag_frequency", "trigger_words", "qwen_edit_lora.history"])
def test_a_file_with_unreadable_json_is_still_listed(name, text, loras):
    path = make_adapter(loras / "a.safetensors", MODULES, metadata={name: text})
    facts = read_facts(path)
    assert facts.state == "ok"
    assert describe_file(path, facts, None)["num_fields"] >= 1
    resize_adapter(read_adapter(path), rank=1)


@pytest.mark.parametrize("text", [DEEP, "{", "", '{"version": NaN}', "\0\0"])
def test_an_unreadable_cache_is_ignored(text, tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(text)
    assert read_cache(path) == {}
    assert read_inspection(path, "a") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_for_a_file_is_reported_and_does_not_hang(loras, tmp_path):
    os.mkfifo(loras / "a.safetensors")
    assert "is a pipe" in read_facts(loras / "a.safetensors").error
    os.mkfifo(tmp_path / "cache.json")
    assert read_cache(tmp_path / "cache.json") == {}


def test_facts_hold_the_findings_for_programs(loras):
    state_dict = {
        f"transformer_blocks.0.attn.to_q.lora_{end}.weight": torch.ones(2, 2) for end in "AB"
    }
    save_file(state_dict | {"nothing": torch.ones(1)}, loras / "a.safetensors")
    facts = read_facts(loras / "a.safetensors")
    kinds = [f["kind"] for f in facts.findings]
    assert kinds == ["unmatched_keys", "alpha_from_rank", "family_unknown"]
    assert facts.warnings == (facts.findings[0]["text"],)


def test_errors_are_one_sentence_without_a_path(loras, open_library):
    (loras / "empty.safetensors").touch()
    save_sdxl(loras / "sdxl.safetensors")
    found = examine(open_library())
    assert "is empty (0 bytes)" in found["empty.safetensors"]["error"]
    assert found["sdxl.safetensors"]["model"] == "SDXL UNet"
    assert found["sdxl.safetensors"]["title"] == "paint"
    text = json.dumps(found)
    assert str(loras) not in text


def test_a_restart_recomputes_nothing(loras, open_library, monkeypatch):
    make_adapter(loras / "a.safetensors", MODULES)
    save_sdxl(loras / "b.safetensors")
    (loras / "c.safetensors").touch()
    before = examine(open_library())
    forbid_computing(monkeypatch)
    again = open_library()
    assert {entry["name"]: entry for entry in again.list()["adapters"]} == before
    assert again._thread is None


def test_changed_new_and_vanished_files_are_noticed(loras, open_library, tmp_path):
    for name in ("same", "other", "lost"):
        make_adapter(loras / f"{name}.safetensors", MODULES, rank=2)
    adapters = open_library()
    before = examine(adapters)
    make_adapter(loras / "other.safetensors", MODULES, rank=8)
    make_adapter(loras / "new.safetensors", MODULES, rank=4)
    (loras / "lost.safetensors").unlink()
    after = examine(adapters)
    assert {name: entry["ranks"] for name, entry in after.items()} == {
        "same.safetensors": (2,),
        "other.safetensors": (8,),
        "new.safetensors": (4,),
    }
    assert after["same.safetensors"] == before["same.safetensors"]
    kept = json.loads((tmp_path / "cache" / "adapters.json").read_text())["adapters"]
    assert set(kept) == set(after)


def test_a_file_of_the_same_size_with_an_older_time_is_a_different_one(loras, open_library):
    path = make_adapter(loras / "a.safetensors", MODULES, delta_std=3e-4)
    adapters = open_library()
    assert examine(adapters)["a.safetensors"]["health"]["level"] == "healthy"
    make_adapter(path, MODULES, delta_std=0.05)
    os.utime(path, ns=(1, 1))
    assert "saturated" in examine(adapters)["a.safetensors"]["health"]["sentence"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": [0], "adapters": {}}'])
def test_a_damaged_or_older_cache_is_rebuilt(text, loras, open_library, tmp_path):
    make_adapter(loras / "a.safetensors", MODULES)
    cache = tmp_path / "cache" / "adapters.json"
    cache.parent.mkdir()
    cache.write_text(text)
    assert examine(open_library())["a.safetensors"]["health"]["level"] == "healthy"
    assert "a.safetensors" in json.loads(cache.read_text())["adapters"]


def test_a_name_that_is_no_unicode_costs_only_its_own_entry(tmp_path):
    known = {name: CacheEntry((1, 2), AdapterFacts(title="赛")) for name in ("a", "\udc80")}
    write_cache(tmp_path / "cache.json", known)
    assert read_cache(tmp_path / "cache.json")["a"] == known["a"]


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_result(
    loras, open_library, tmp_path, caplog
):
    make_adapter(loras / "a.safetensors", MODULES)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert examine(open_library())["a.safetensors"]["health"]["level"] == "healthy"
    assert "read again after a restart" in caplog.text


def test_results_come_as_events_one_file_at_a_time(loras, open_library):
    names = [f"{i}.safetensors" for i in range(4)]
    for i, name in enumerate(names):
        path = make_adapter(loras / name, MODULES)
        os.utime(path, (1e9 + i, 1e9 + i))
    events, threads = [], set()

    def notify(event):
        events.append(event)
        threads.update(t for t in threading.enumerate() if t.name == "qwen_edit_lora adapters")

    adapters = open_library(notify=notify)
    for _ in range(20):  # as many pages at once
        adapters.list()
    assert adapters.wait(WAIT)
    verdicts = [e["adapters"] for e in events if any(a["health"] for a in e["adapters"])]
    assert [[a["name"] for a in batch] for batch in verdicts] == [[n] for n in names[::-1]]
    assert [e["pending"] for e in events][-4:] == [3, 2, 1, 0]
    assert len(threads) == 1


def test_a_viewed_file_is_judged_next(loras, open_library):
    for i in range(6):
        path = make_adapter(loras / f"{i}.safetensors", MODULES)
        os.utime(path, (1e9 + i, 1e9 + i))
    judged, is_busy = [], True
    adapters = open_library(
        notify=lambda event: judged.extend(a["name"] for a in event["adapters"] if a["health"]),
        is_busy=lambda: is_busy,
    )
    adapters.list()
    assert adapters.show(build_id("0.safetensors"))["ranks"] == (8,)
    is_busy = False
    assert adapters.wait(WAIT)
    assert judged.index("0.safetensors") <= 1  # at most the one in progress comes before


def test_health_waits_while_the_machine_is_busy_and_stops_when_asked(loras, open_library):
    make_adapter(loras / "a.safetensors", MODULES)
    adapters = open_library(is_busy=lambda: True)
    deadline = time.monotonic() + 20
    while adapters.list()["adapters"][0]["state"] != "ok":
        assert time.monotonic() < deadline
    assert not adapters.wait(0.3)
    adapters.stop()
    assert adapters._thread is None
    assert adapters.list()["pending"] == 1


def test_a_file_that_vanishes_while_it_is_inspected_leaves_the_list(
    loras, open_library, monkeypatch
):
    path = make_adapter(loras / "a.safetensors", MODULES)
    inspect = Inspector.inspect

    def delete_and_inspect(inspector, *args):
        path.unlink()
        return inspect(inspector, *args)

    monkeypatch.setattr(Inspector, "inspect", delete_and_inspect)
    events = []
    adapters = open_library(notify=events.append)
    assert examine(adapters) == {}
    deadline = time.monotonic() + WAIT
    while not any(event["gone"] for event in events):  # sent after the thread has finished
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert events[-1]["gone"] == [build_id("a.safetensors")]


def test_a_killed_inspection_is_not_a_verdict_and_is_retried_in_the_next_session(
    loras, open_library, monkeypatch, caplog
):
    make_adapter(loras / "a.safetensors", MODULES)
    start = Inspector._start

    def start_and_kill(inspector):
        process = start(inspector)
        process.kill()
        return process

    monkeypatch.setattr(Inspector, "_ask", ASK)
    with monkeypatch.context() as patch:
        patch.setattr(Inspector, "_start", start_and_kill)
        health = examine(open_library())["a.safetensors"]["health"]
    assert health == {"level": "unknown", "sentence": UNEXPECTED}
    assert "a.safetensors ended with status" in caplog.text
    assert examine(open_library())["a.safetensors"]["health"]["level"] == "healthy"


def test_an_inspector_that_is_closed_while_it_waits_gives_no_verdict(monkeypatch):
    monkeypatch.setattr(Inspector, "_ask", lambda *_: "")  # as when `close` has killed the process
    assert Inspector().inspect(Path("a.safetensors")) is None


def test_the_process_ends_with_the_work_and_with_the_library(loras, open_library, monkeypatch):
    monkeypatch.setattr(Inspector, "_ask", ASK)
    make_adapter(loras / "a.safetensors", MODULES)
    started = []
    start = Inspector._start

    def start_and_note(inspector):
        started.append(start(inspector))
        return started[-1]

    monkeypatch.setattr(Inspector, "_start", start_and_note)
    assert examine(open_library())["a.safetensors"]["health"]["level"] == "healthy"
    (process,) = started
    assert process.poll() is not None
    inspector = Inspector()
    running = inspector._start()
    inspector.close(for_good=True)
    assert running.poll() is not None


def test_the_details_hold_metadata_modules_and_every_sentence(loras, open_library):
    metadata = {
        "ss_tag_frequency": json.dumps({"1_set": {"portrait": 3, "red hat": 9}}),
        "ss_steps": "1200",
        "long": "x" * 5000,
    }
    make_adapter(loras / "a.safetensors", MODULES, rank=4, metadata=metadata)
    adapters = open_library()
    entry = examine(adapters)["a.safetensors"]
    details = adapters.show(entry["id"])
    assert details | entry == details
    assert details["known"]["steps"] == "1200"
    assert details["tags"] == [["red hat", 9], ["portrait", 3]]
    (long,) = (field for field in details["metadata"] if field["key"] == "long")
    assert (len(long["value"]), long["num_chars"]) == (2000, 5000)
    rows = {row["name"]: row for row in details["modules"]}
    assert set(rows) == {"attn.to_q", "attn.to_k", "attn.to_v"}
    assert (rows["attn.to_q"]["num_modules"], rows["attn.to_q"]["rank"]) == (2, 4)
    assert rows["attn.to_q"]["std"] == pytest.approx(3e-4, rel=0.2)
    assert details["sentences"][0] == entry["health"]["sentence"]
    json.dumps(details, allow_nan=False)


def test_ids_are_checked(loras, open_library):
    make_adapter(loras / "a.safetensors", MODULES)
    adapters = open_library()
    assert adapters.find(build_id("a.safetensors")) == loras / "a.safetensors"
    for bad in ("../a.safetensors", "a.safetensors", "", "0123456789ABCDEF", 7):
        with pytest.raises(ConfigError, match="not an adapter id"):
            adapters.find(bad)
    with pytest.raises(UnknownAdapterError, match="reload the list"):
        adapters.show(build_id("b.safetensors"))
    make_adapter(loras / "b.safetensors", MODULES, rank=3)
    assert adapters.show(build_id("b.safetensors"))["ranks"] == (3,)
    (loras / "b.safetensors").unlink()
    with pytest.raises(UnknownAdapterError):
        adapters.find(build_id("b.safetensors"))


def test_a_thousand_files_are_listed_from_the_cache_without_opening_one(
    loras, open_library, monkeypatch
):
    path = make_adapter(loras / "styles" / "0.safetensors", MODULES, rank=1)
    for i in range(1, 1000):
        (loras / "styles" / f"{i}.safetensors").hardlink_to(path)
    adapters = open_library()
    adapters.scan()
    adapters.stop()
    entry = next(iter(adapters._entries.values()))
    facts = library.read_facts(path)
    judged = health.Health("healthy", "s" * 200, ("s" * 200,) * 3, ({"name": "attn.to_q"},) * 12)
    adapters._entries = {
        name: library.replace(entry, name=name, path=e.path, facts=facts, health=judged)
        for name, e in adapters._entries.items()
    }
    adapters._update_cached()
    adapters._is_saved = False
    adapters._save()
    opened: list[str] = []
    monkeypatch.setattr(library, "read_facts", lambda path, *rest: opened.append(path.name))
    again = open_library()
    answer = again.list()
    assert (len(answer["adapters"]), answer["pending"]) == (1000, 0)
    assert opened == []


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (Finding("untrained", "error", "healthy"), "broken"),
        (Finding("saturated", "warning", "healthy"), "warning"),
        (Finding("inert", "note", "broken"), "healthy"),
        (Finding("nothing_to_judge", "warning", "healthy"), "unknown"),
    ],
)
def test_a_finding_has_the_level_of_its_kind_and_severity_whatever_it_says(finding, level):
    assert health.get_level(finding) == level


def test_a_factor_that_halves_of_a_fused_module_share_is_counted_once(tmp_path):
    stem = "transformer_blocks.0.img_mlp.gate_up"
    parts = {"A": torch.ones(2, 4), "B": torch.ones(24, 2)}
    tensors = {f"{stem}.lora_{end}.weight": tensor for end, tensor in parts.items()}
    save_file(tensors, tmp_path / "fused.safetensors")
    facts = read_facts(tmp_path / "fused.safetensors")
    assert (facts.num_modules, facts.num_parameters) == (2, 2 * 4 + 24 * 2)

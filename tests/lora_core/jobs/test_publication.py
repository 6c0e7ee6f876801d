"""The finished adapter in a loras folder: complete, under a free name, once."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.jobs import publication
from qwen_edit_lora.lora_core.jobs.publication import publish, read_job_id, remove_published
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_jobs import make_train, run_here

JOB, OTHER = "20260131-120000-0123abcd", "20260131-120000-4567abcd"


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Raw and averaged weights, as written by a run."""
    return [write(tmp_path / "a.safetensors", 1), write(tmp_path / "a_ema.safetensors", 2)]


def write(path: Path, seed: int, date: str = "2026-01-31") -> Path:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    save_file({"x": tensor, "alpha": torch.tensor(4.0)}, path, {"modelspec.date": date})
    return path


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_copy_has_the_same_tensors_and_names_its_job(adapters, loras):
    assert publish(adapters, loras, JOB) == ("a.safetensors", "a_ema.safetensors")
    for path in adapters:
        ours, theirs = load_file(loras / path.name), load_file(path)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        with safe_open(loras / path.name, "pt") as file:
            assert file.metadata() == {"modelspec.date": "2026-01-31", publication.JOB_KEY: JOB}
    assert read_job_id(adapters[0]) is None


def test_no_other_file_is_overwritten_and_a_run_keeps_its_number(adapters, loras):
    (loras / "a_ema.safetensors").write_bytes(b"mine")
    assert publish(adapters, loras, JOB) == ("a_2.safetensors", "a_2_ema.safetensors")
    assert publish(adapters, loras, OTHER) == ("a_3.safetensors", "a_3_ema.safetensors")
    assert (loras / "a_ema.safetensors").read_bytes() == b"mine"
    assert read_job_id(loras / "a_3.safetensors") == OTHER
    assert len(list_names(loras)) == 5


def test_what_a_killed_worker_published_is_found_again(adapters, loras):
    names = publish(adapters, loras, JOB)
    (loras / names[1]).unlink()  # killed between the two
    write(adapters[0], 1, date="2026-02-01")  # written again by the resumed run
    assert publish(adapters, loras, JOB) == names
    assert list_names(loras) == sorted(names)
    write(adapters[0], 3)  # the same job trained on: other weights
    assert publish(adapters, loras, JOB) == ("a_2.safetensors", "a_2_ema.safetensors")


def test_a_file_system_without_hard_links_is_supported(adapters, loras, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(publication.os, "link", refuse)
    (loras / "a.safetensors").write_bytes(b"mine")
    assert publish(adapters, loras, JOB) == ("a_2.safetensors", "a_2_ema.safetensors")
    assert (loras / "a.safetensors").read_bytes() == b"mine"
    assert len(list_names(loras)) == 3


def test_an_unwritable_folder_is_a_clear_error_and_leaves_nothing(adapters, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="the adapter cannot be put into loras"):
        publish(adapters, tmp_path / "file" / "loras", JOB)


def test_only_the_jobs_own_copies_are_removed(adapters, loras):
    publish(adapters, loras, JOB)
    write(loras / "a_ema.safetensors", 5)  # replaced by the user
    outside = write(loras.parent / "outside.safetensors", 6)
    remove_published(["a.safetensors", "a_ema.safetensors", f"../{outside.name}"], loras, JOB)
    assert list_names(loras) == ["a_ema.safetensors"]
    assert outside.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 4, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_damaged_files_belong_to_no_job(content, loras):
    path = loras / "x.safetensors"
    path.write_bytes(content)
    assert read_job_id(path) is None
    assert json.dumps(list_names(loras)) == '["x.safetensors"]'


def test_a_partial_copy_of_a_killed_worker_is_removed_by_its_next_attempt_or_with_the_job(
    store, material, tmp_path
):
    loras = tmp_path / "loras_of_killed"
    loras.mkdir()
    job_id = store.submit(make_train(material, steps=1), loras=str(loras))
    ours, others = (loras / f".{one}.0123456789abcdef.tmp" for one in (job_id, OTHER))
    for path in (ours, others):
        path.write_bytes(b"half")
    run_here(store, job_id)
    names = ["tiny.safetensors", "tiny_ema.safetensors"]
    assert list_names(loras) == [others.name, *names]
    ours.write_bytes(b"half")
    store.delete(job_id)
    assert list_names(loras) == [others.name, *names]


# on request


@pytest.fixture
def with_adapter(store, material, loras):
    """The folder of a job that has an adapter."""
    folder = store.catalog.find(store.submit(make_train(material), loras=str(loras)))
    write(folder.path / "tiny.safetensors", 1)
    folder.write_state(dataclasses.replace(folder.read_state(), adapters=("tiny.safetensors",)))
    return folder


def test_a_copy_made_on_request_is_shown_and_survives_what_the_worker_writes(
    store, with_adapter, loras
):
    """A worker knows only its own copies, and writes the whole state."""
    assert store.list()[0].state.published == ()
    held = with_adapter.read_state()
    names = store.publish(with_adapter.id)
    assert store.publish(with_adapter.id) == names == ("tiny.safetensors",)
    assert store.list()[0].state.published == names
    with_adapter.write_state(dataclasses.replace(held, published=("of_the_worker.safetensors",)))
    expected = ("of_the_worker.safetensors", "tiny.safetensors")
    assert store.get(with_adapter.id).state.published == expected
    assert [job.state.published for job in store.list()] == [expected]
    store.delete(with_adapter.id, with_adapter=True)
    assert list_names(loras) == []


def test_a_copy_made_on_request_stays_without_the_users_act(store, with_adapter, loras):
    store.publish(with_adapter.id)
    store.delete(with_adapter.id)
    assert list_names(loras) == ["tiny.safetensors"]


def test_no_record_of_copies_leads_out_of_the_loras_folder(store, with_adapter, loras, tmp_path):
    names = ["../secret.safetensors", str(tmp_path / "a.safetensors"), "\udcff", "a\0b", ""]
    text = "\n".join(names).encode("utf-8", "surrogateescape")
    (with_adapter.path / publication.PUBLISHED_FILE).write_bytes(text)
    write(tmp_path / "secret.safetensors", 1)
    assert json.dumps(store.get(with_adapter.id).to_dict()["published"])
    store.delete(with_adapter.id, with_adapter=True)
    assert (tmp_path / "secret.safetensors").exists()


def test_a_link_in_the_place_of_the_record_is_not_followed(store, with_adapter, loras, tmp_path):
    (tmp_path / "outside").write_text("other.safetensors\n")
    (with_adapter.path / publication.PUBLISHED_FILE).symlink_to(tmp_path / "outside")
    assert store.get(with_adapter.id).state.published == ()
    store.publish(with_adapter.id)
    assert (tmp_path / "outside").read_text() == "other.safetensors\n"
    assert store.get(with_adapter.id).state.published == ("tiny.safetensors",)

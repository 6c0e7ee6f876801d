"""Orders to a running job: a sample or a saved LoRA of the next step, and nothing else changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.job import JobStateError, JobStatus
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter
from qwen_edit_lora.lora_core.jobs.orders import give_order
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.training_job import run_job
from qwen_edit_lora.lora_core.jobs.transitions import Event, Order, Request
from qwen_edit_lora.lora_core.training.run.run import Run
from tiny_jobs import assert_equal_weights, make_train, run_here, take, train_here

SAMPLES = {"every": 100, "steps": 2}
STEPS = 5
FINAL = ("tiny.safetensors", "tiny_ema.safetensors")


class Ordering(JobReporter):
    """Somebody gives orders while a step is reported, and perhaps asks for a pause too."""

    def __init__(self, folder: JobFolder, orders: dict[int, tuple[Order, ...]], pause_at: int = 0):
        super().__init__(folder, take(folder))
        self.orders, self.pause_at = orders, pause_at

    def report(self, report: Any) -> None:
        super().report(report)
        for order in self.orders.get(report.step, ()):
            self.folder.write_order(order)
        if report.step == self.pause_at:
            self.folder.write_request(Request.PAUSE)


def run_with(store: JobStore, job_id: str, reporter: Ordering) -> bool:
    folder = store.catalog.find(job_id)
    is_done = run_job(folder.read_settings(), folder, ["cpu"], reporter)
    reporter.finish(Event.COMPLETE if is_done else Event.STOP, folder.read_request())
    return is_done


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """The folder of a job that got no order."""
    store = JobStore(tmp_path_factory.mktemp("whole"))
    job_id = train_here(store, make_train(material, steps=STEPS), SAMPLES)
    yield store.catalog.find(job_id)
    store.index.close()


def submit(store: JobStore, material: Path, **changes: Any) -> str:
    samples = changes.pop("samples", SAMPLES)
    return store.submit(make_train(material, steps=STEPS, **changes), samples=samples)


def list_steps(store: JobStore, job_id: str) -> list[str]:
    return [path.name for path in store.list_samples(job_id)]


def test_ordered_samples_and_saves_come_at_once_and_change_no_weight(store, material, whole):
    job_id = submit(store, material)
    folder = store.catalog.find(job_id)
    orders = {2: (Order.SAMPLE,), 3: (Order.SAVE, Order.SAMPLE), 4: (Order.SAVE,)}
    assert run_with(store, job_id, Ordering(folder, orders))
    assert list_steps(store, job_id) == [
        f"step_0000000{step}_item_0.safetensors" for step in (0, 2, 3)
    ]
    names = [path.name for path in store.list_adapters(job_id)]
    saved = [f"tiny_0000000{n}{ema}.safetensors" for n in (3, 4) for ema in ("", "_ema")]
    assert set(names) == {*saved, *FINAL}
    for name in FINAL:
        assert_equal_weights(folder.path / name, whole.path / name)
    losses = [[row["loss"] for row in s.read_metrics(i)] for s, i in ((store, job_id),)]
    theirs = [row["loss"] for row in JobStore(whole.path.parents[1]).read_metrics(whole.id)]
    assert losses == [theirs]
    assert folder.read_orders() == ()


def test_an_order_before_a_pause_waits_for_the_next_step(store, material, whole):
    job_id = submit(store, material)
    folder = store.catalog.find(job_id)
    orders = {2: (Order.SAMPLE, Order.SAVE)}
    assert not run_with(store, job_id, Ordering(folder, orders, pause_at=2))
    assert store.get(job_id).status is JobStatus.PAUSED
    assert len(list_steps(store, job_id)) == 1  # before the first step
    store.resume(job_id)
    run_here(store, job_id)
    assert list_steps(store, job_id)[1:] == ["step_00000003_item_0.safetensors"]
    assert (folder.path / "adapters" / "tiny_00000003.safetensors").is_file()
    for name in FINAL:
        assert_equal_weights(folder.path / name, whole.path / name)


def test_a_pause_in_the_middle_of_an_ordered_sample_gives_the_order_back(store, material):
    job_id = submit(store, material)
    folder = store.catalog.find(job_id)

    class Interrupting(Ordering):
        def update(self, **changes: Any) -> None:
            super().update(**changes)
            if changes.get("phase") == "sampling" and self.state.step == 2:
                self.folder.write_request(Request.PAUSE)

    assert not run_with(store, job_id, Interrupting(folder, {2: (Order.SAMPLE,)}))
    assert folder.read_orders() == (Order.SAMPLE,)
    assert len(list_steps(store, job_id)) == 1


def test_a_disk_that_does_not_take_a_save_costs_only_that(store, material, whole, monkeypatch):
    job_id = submit(store, material)
    folder = store.catalog.find(job_id)
    write = Run.save_adapters

    def refuse(run: Run, step: int | None) -> tuple[str, ...]:
        if step is not None:
            raise FileError("the disk is full; free some space and save again")
        return write(run, step)

    monkeypatch.setattr(Run, "save_adapters", refuse)
    assert run_with(store, job_id, Ordering(folder, {2: (Order.SAVE,)}))
    assert any("step 2 was not saved: the disk is full" in n for n in folder.read_state().notes)
    assert_equal_weights(folder.path / FINAL[0], whole.path / FINAL[0])


def test_only_a_running_job_takes_orders(store, material):
    job_id = submit(store, material)
    with pytest.raises(JobStateError, match="is waiting; only one that trains can save"):
        give_order(store, job_id, Order.SAVE)
    folder = store.catalog.find(job_id)
    assert folder.lock.try_acquire()
    try:
        running = dataclasses.replace(folder.read_state(), status=JobStatus.IN_PROGRESS)
        folder.write_state(running)
        for _ in range(2):  # the second changes nothing
            assert give_order(store, job_id, Order.SAVE).orders == (Order.SAVE,)
        (listed,) = store.list()
        assert listed.orders == (Order.SAVE,)
        assert "save" not in listed.actions
        folder.write_request(Request.PAUSE)
        with pytest.raises(JobStateError, match="was asked to stop"):
            give_order(store, job_id, Order.SAMPLE)
        folder.write_state(dataclasses.replace(running, status=JobStatus.PAUSED))
    finally:
        folder.lock.release()


def test_a_job_without_samples_says_so(store, material):
    job_id = submit(store, material, samples={"every": 0})
    with pytest.raises(JobStateError, match="makes no samples"):
        give_order(store, job_id, Order.SAMPLE)


def test_a_link_or_folder_with_an_orders_name_is_no_order(store, material, tmp_path):
    folder = store.catalog.find(submit(store, material))
    outside = tmp_path / "outside"
    outside.touch()
    (folder.path / "sample.order").symlink_to(outside)
    (folder.path / "save.order").mkdir()
    assert folder.read_orders() == ()
    assert not folder.take_order(Order.SAVE)
    folder.write_order(Order.SAMPLE)  # in the link's place, not through it
    assert folder.take_order(Order.SAMPLE)
    assert outside.is_file()
    with pytest.raises(FileError, match="cannot be written"):
        folder.write_order(Order.SAVE)


def test_an_ended_job_has_no_orders_left(store, material):
    job_id = submit(store, material)
    folder = store.catalog.find(job_id)
    reporter = Ordering(folder, {})
    folder.write_order(Order.SAVE)
    reporter.finish(Event.COMPLETE)
    assert folder.read_orders() == ()

"""What becomes of a job: every stage with everything that can happen in it."""

from __future__ import annotations

import dataclasses
import time

import pytest
from qwen_edit_lora.lora_core.jobs.job import (
    SILENCE_TIMEOUT,
    Job,
    JobFailure,
    JobSettings,
    JobState,
    JobStateError,
    JobStatus,
    Order,
    Phase,
    Request,
    SampleSettings,
    WorkerIdentity,
)
from qwen_edit_lora.lora_core.jobs.outcomes import advance
from qwen_edit_lora.lora_core.jobs.transitions import (
    Event,
    Stage,
    find_next,
    find_offers,
    find_stage,
)
from tiny_jobs import make_train

#: One row for each stage, one column for each event; "-" cannot happen.
TABLE = """
            pause      resume     cancel      start    stop       complete   restart  fail
pending     paused     -          cancelled   running  -          -          pending  failed
running     pausing    -          cancelling  -        pending    completed  pending  failed
pausing     pausing    running    cancelling  -        paused     completed  pending  failed
cancelling  pausing    running    cancelling  -        cancelled  completed  pending  failed
paused      paused     pending    cancelled   -        -          -          -        -
completed   -          -          -           -        -          -          -        -
failed      -          pending    -           -        -          -          -        -
cancelled   -          pending    cancelled   -        -          -          -        -
"""
OFFERS = {
    "pending": {"pause", "cancel"},
    "running": {"pause", "cancel"},
    "pausing": {"resume", "cancel"},
    "cancelling": {"pause", "resume"},
    "paused": {"resume", "cancel"},
    "completed": set(),
    "failed": {"resume"},
    "cancelled": {"resume"},
}
ASKED = {Stage.PAUSING: Request.PAUSE, Stage.CANCELLING: Request.CANCEL}
USERS = (Event.PAUSE, Event.RESUME, Event.CANCEL)
FAILURE = JobFailure(sentence="it broke")

HEAD, *ROWS = TABLE.strip().splitlines()
PAIRS = [
    (Stage(row.split()[0]), Event(event), None if name == "-" else Stage(name))
    for row in ROWS
    for event, name in zip(HEAD.split(), row.split()[1:], strict=True)
]


def make_state(stage: Stage) -> JobState:
    """A state with every field that an event could have to clear."""
    worker = WorkerIdentity(host="here", pid=1, started=1.0)
    in_progress = stage.status is JobStatus.IN_PROGRESS
    return JobState(
        status=stage.status,
        created_at=1.0,
        queued_at=2.0,
        ended_at=3.0 if stage.status.is_finished else None,
        phase=Phase.TRAINING if in_progress else None,
        worker=worker if in_progress else None,
        restarts=2,
        failure=FAILURE if stage is Stage.FAILED else None,
    )


def test_the_table_names_every_stage_and_every_event():
    assert {(stage, event) for stage, event, _ in PAIRS} == {(s, e) for s in Stage for e in Event}
    assert len(PAIRS) == len(Stage) * len(Event)


@pytest.mark.parametrize(("stage", "event", "after"), PAIRS)
def test_every_event_in_every_stage_leads_where_the_table_says(stage, event, after):
    assert find_next(stage, event) is after
    state, request = make_state(stage), ASKED.get(stage)
    if after is None:
        with pytest.raises(JobStateError):
            advance(state, event, request, failure=FAILURE)
        return
    found = advance(state, event, request, failure=FAILURE, at=9.0)
    if event in USERS and (after is stage or after.status is JobStatus.IN_PROGRESS):
        assert found == state  # the request file is all that changes, if anything
        return
    assert found.status is after.status
    assert found.ended_at == (9.0 if found.status.is_finished else None)
    assert found.failure == (FAILURE if after is Stage.FAILED else None)
    assert found.queued_at == (9.0 if event is Event.RESUME else 2.0)
    assert found.restarts == (0 if event in (Event.RESUME, Event.COMPLETE) else 2)
    has_worker = found.status is JobStatus.IN_PROGRESS
    expected = (state.worker, state.phase) if has_worker else (None, None)
    assert (found.worker, found.phase) == expected


@pytest.mark.parametrize("status", JobStatus)
@pytest.mark.parametrize("request_", [None, *Request])
def test_only_a_job_in_progress_is_in_another_stage_by_a_request(status, request_):
    stage = find_stage(status, request_)
    assert stage.status is status
    if status is JobStatus.IN_PROGRESS:
        names = {Request.PAUSE: "pausing", Request.CANCEL: "cancelling"}
        assert stage.value == names.get(request_, "running")


@pytest.mark.parametrize("stage", Stage)
def test_a_user_is_offered_what_is_allowed_and_would_change_something(stage):
    assert {event.value for event in find_offers(stage)} == OFFERS[stage.value]
    for event in USERS:
        is_offered = event.value in OFFERS[stage.value]
        assert is_offered == (find_next(stage, event) not in (None, stage))


@pytest.fixture(scope="module")
def settings(material):
    return JobSettings(train=make_train(material))


@pytest.mark.parametrize("stage", Stage)
def test_a_job_names_its_actions(stage, settings):
    job = Job("id", settings, make_state(stage), ASKED.get(stage))
    expected = OFFERS[stage.value] | {"clone"}
    if stage is Stage.RUNNING:
        expected |= {"save"}
    if stage.status is not JobStatus.IN_PROGRESS:
        expected |= {"delete"}
    assert set(job.actions) == expected
    assert job.to_dict()["actions"] == job.actions
    written = dataclasses.replace(job.state, adapters=("a.safetensors",))
    with_loras = dataclasses.replace(settings, loras="loras")
    for used, is_published in ((settings, False), (with_loras, True)):
        actions = dataclasses.replace(job, settings=used, state=written).actions
        assert ("publish" in actions) is is_published
    assert dataclasses.replace(job, is_damaged=True).actions == ("delete",)


def test_a_running_job_takes_each_order_once_and_samples_only_if_it_makes_any(settings):
    running = Job("id", settings, make_state(Stage.RUNNING))
    assert {"save", "sample"} & set(running.actions) == {"save"}
    sampled = dataclasses.replace(settings, samples=SampleSettings(every=100))
    running = dataclasses.replace(running, settings=sampled)
    assert {"save", "sample"} <= set(running.actions)
    given = dataclasses.replace(running, orders=(Order.SAMPLE,))
    assert {"save", "sample"} & set(given.actions) == {"save"}
    beat = dataclasses.replace(running.state, heartbeat_at=time.time() - 2 * SILENCE_TIMEOUT)
    silent = dataclasses.replace(running, state=beat)
    assert {"save", "sample"}.isdisjoint(silent.actions)


def test_a_cancellation_is_offered_again_only_when_the_worker_is_silent(settings):
    state = make_state(Stage.CANCELLING)
    for silence, is_offered in ((0.0, False), (2 * SILENCE_TIMEOUT, True)):
        beat = dataclasses.replace(state, heartbeat_at=time.time() - silence)
        job = Job("id", settings, beat, Request.CANCEL)
        assert ("cancel" in job.actions) is is_offered

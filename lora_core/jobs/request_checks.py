"""Whether a request can be granted now: the job's status, the files it needs."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FileError
from ..messages import message
from ..text import shorten
from .job import Job, JobSettings, JobStateError
from .transitions import STATUS_WORDS, Event, find_next, find_stage

PARTICIPLES = {
    Event.PAUSE: message("paused"),
    Event.RESUME: message("resumed"),
    Event.CANCEL: message("cancelled"),
}


def check_allowed(job: Job, event: Event) -> Job:
    """The job itself; JobStateError if a user cannot do that to it now."""
    if find_next(find_stage(job.status, job.request), event) is None:
        raise JobStateError(
            "job {job_id} is {status} and cannot be {done}",
            job_id=job.id,
            status=STATUS_WORDS[job.status],
            done=PARTICIPLES[event],
        )
    return job


def check_files(settings: JobSettings) -> None:
    """Raises FileError for what would fail in a worker minutes later."""
    train = settings.train
    places = (
        (message("the model"), train.model.source),
        (message("the training set"), train.data.folder),
        (message("the prior's training set"), train.data.prior),
        (message("the VAE"), train.model.vae),
    )
    for what, place in places:
        if place and not os.path.exists(place):  # noqa: PTH110 - Path's may raise
            raise FileError(
                "{what}, {place}, does not exist; choose another one",
                what=what,
                place=shorten(Path(place).name),
            )

"""Requests that our own page never sends, and that change nothing."""

from __future__ import annotations

import gzip
import logging

import pytest

pytestmark = pytest.mark.comfy

JOBS = "/qwen_edit_lora/jobs"


@pytest.mark.parametrize("name", ["origin", "origin.prompts", "origin.again", "origin.clone_of"])
def test_clone_changes_nothing_inside_a_setting_that_it_protects(routes, job_id, name):
    """`origin` itself is refused; its fields are what the submitter wrote."""
    answer = routes.post(f"{JOBS}/{job_id}/clone", {"changes": {name: "pause prompts"}})
    assert (answer.status, len(routes.store.list())) == (400, 1)


def test_an_id_of_other_than_ascii_digits_is_no_id(routes, job_id):
    r"""\d of `re` takes the digits of every script; ids are folder names."""
    from demo_base.route_server import encode

    digits = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
    stem, _, rest = job_id.rpartition("-")
    answer = routes.ask("GET", f"{JOBS}/{encode(f'{stem.translate(digits)}-{rest}')}")
    assert (answer.status, "is not a job id" in answer.sentence) == (400, True)


def test_a_compressed_body_is_refused_and_leaves_no_traceback(routes, job_id, caplog):
    caplog.set_level(logging.WARNING)
    for body in (b"junk", gzip.compress(b"{}" * 100)[:-20], gzip.compress(b"{}")):
        answer = routes.post(f"{JOBS}/{job_id}/pause", body, **{"Content-Encoding": "gzip"})
        assert answer.status == 400
        assert "the body has Content-Encoding gzip; expected JSON without one" in answer.sentence
    assert routes.ask("GET", JOBS).status == 200
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_identity_is_no_encoding(routes, job_id):
    answer = routes.post(f"{JOBS}/{job_id}/pause", b"{}", **{"Content-Encoding": "identity"})
    assert answer.status == 200

"""Alarms: what goes wrong is said once, with its figure; what goes well is left alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
from qwen_edit_lora.lora_core.jobs.alarms import Alerts
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from qwen_edit_lora.lora_core.training.run.metrics import SmoothedLoss, StepReport

STEPS = 1000
CONFIG = config_from_dict(
    {"name": "a", "output": "b", "model": {"source": "c"}, "data": {"folder": "d"}, "steps": STEPS}
)
REPORT = StepReport(
    step=1,
    num_steps=STEPS,
    epoch=1,
    loss=0.1,
    smoothed_loss=0.1,
    learning_rate=1e-4,
    grad_norm=1.0,
    tokens_per_s=1.0,
    seconds=1.0,
    memory_bytes=1,
)


def look_at(losses, stds=None):
    """All sentences of a run with these raw losses and sizes of the delta."""
    alerts, smoothed, said = Alerts(CONFIG), SmoothedLoss(), []
    for i, loss in enumerate(losses):
        health = {"std": stds[i]} if stds is not None else None
        report = dataclasses.replace(
            REPORT, step=i + 1, loss=loss, smoothed_loss=smoothed.update(loss), health=health
        )
        said += alerts.check(report)
    return said


def noisy(step: int) -> float:
    """0.02 to 0.3 as sigma varies, without a trend."""
    return 0.02 + 0.28 * (0.5 + 0.5 * math.sin(step * 12.9898) * math.cos(step * 4.1)) ** 2


def test_a_noisy_falling_loss_raises_no_alarm():
    assert look_at([noisy(i) * (0.5 + 0.5 * 0.995**i) for i in range(STEPS)]) == []


def test_an_exploding_loss_is_reported_once_with_its_step():
    losses = [noisy(i) if i < 300 else 1.0 for i in range(STEPS)]
    (sentence,) = look_at(losses)
    assert "the training diverges; clone it with a lower learning rate than 0.0001" in sentence
    step = int(sentence.split(" at step ")[1].split(",")[0])
    assert 325 <= step < 400


def test_a_single_bad_step_raises_no_alarm():
    assert look_at([50.0 if i == 400 else 10.0 for i in range(STEPS)]) == []


@pytest.mark.parametrize(("std", "is_alarm"), [(1e-3, False), (9e-3, False), (2e-2, True)])
def test_a_delta_that_overwrites_the_base_is_reported(std, is_alarm):
    said = look_at([0.1] * 100, [std * i / 100 for i in range(1, 101)])
    assert bool(said) is is_alarm
    assert all("overwrites the base" in sentence for sentence in said)


def test_an_unchanging_delta_is_reported_after_a_tenth_of_the_run():
    assert look_at([0.1] * 99, [1e-9] * 99) == []
    (sentence,) = look_at([0.1] * STEPS, [1e-9] * STEPS)
    assert "still 1e-09 after 100 steps" in sentence
    assert look_at([0.1] * STEPS, [1e-5] * STEPS) == []

"""The plot of a training shows the metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from qwen_edit_lora.lora_core.jobs.training_plot import (
    MAX_POINTS,
    average_groups,
    describe,
    draw_training,
)


def make_metrics(num_steps: int, level: float = 0.4) -> list[dict]:
    lines = []
    for step in range(1, num_steps + 1):
        loss = level * (0.3 + math.exp(-step / 200)) * (1 + 0.3 * math.sin(step * 7.3))
        line = {"step": step, "loss": loss, "smoothed_loss": level * (0.3 + math.exp(-step / 200))}
        line |= {"learning_rate": 1e-4, "grad_norm": 0.05, "seconds": 1.5}
        if step % 25 == 0:
            line["health"] = {"std": 1e-6 * step, "spectral": 1.0, "effective_rank": 4.0}
        if step % 250 == 0:
            line["adapters"] = ["a"]
        lines.append(line)
    return lines


def test_a_run_without_a_step_gives_an_image_that_says_so():
    assert draw_training("a", [], 100).shape[2] == 3


@pytest.mark.parametrize("num_steps", [1, 30, 5000])
def test_a_run_of_any_length_is_drawn(num_steps):
    picture = draw_training("my edit $x$ \U0001f600", make_metrics(num_steps), 5000)
    assert picture.shape == (1024, 1024, 3)
    assert picture.std() > 5


def test_the_curve_moves_with_the_loss():
    low, high = (draw_training("a", make_metrics(300, level), 300) for level in (0.1, 0.4))
    assert (low != high).any()
    assert np.array_equal(low, draw_training("a", make_metrics(300, 0.1), 300))


def test_thinning_keeps_the_mean_and_the_order():
    metrics = make_metrics(12345)
    steps, losses = average_groups(metrics, lambda line: line["loss"])
    assert len(steps) == len(losses) == MAX_POINTS
    assert (np.diff(steps) > 0).all()
    assert losses.mean() == pytest.approx(np.mean([line["loss"] for line in metrics]), rel=1e-2)


def test_the_note_states_the_last_step():
    assert describe(make_metrics(50)) == (
        "loss 0.432 (smoothed), learning rate 0.0001, 1.5 s per step, std of the delta 5.0e-05"
    )

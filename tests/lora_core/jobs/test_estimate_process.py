"""Estimating in a separate process gives the same estimate, and clear errors."""

from __future__ import annotations

import time

import pytest
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.base_model.base_files import open_base_file
from qwen_edit_lora.lora_core.jobs.devices import CPU, Device
from qwen_edit_lora.lora_core.jobs.estimate_process import estimate_in_process, explain
from qwen_edit_lora.lora_core.training.data.dataset import read_dataset
from qwen_edit_lora.lora_core.training.estimate.estimate import count_parameters
from qwen_edit_lora.lora_core.translation import translate
from tiny_jobs import make_material, make_train

DEVICE = Device(CPU, "test-cpu", "")


def test_the_estimate_of_another_process_is_of_this_run(tmp_path):
    config = make_train(make_material(tmp_path))
    found = estimate_in_process(config, DEVICE)
    items = read_dataset(config.data.folder).items
    assert found.device == "cpu"
    assert found.num_parameters == count_parameters(config, open_base_file(config.model.source))
    assert found.num_tokens == max(info.num_tokens for info in items)
    assert found.total_s == pytest.approx(found.seconds_per_step * config.steps)
    assert found.fits


def test_what_is_wrong_with_the_run_is_reported_in_its_own_words(tmp_path):
    config = make_train(make_material(tmp_path), **{"model.source": str(tmp_path / "gone.gguf")})
    expected = r"^gone.gguf does not exist; expected a diffusion model"
    with pytest.raises(ConfigError, match=expected) as raised:
        estimate_in_process(config, DEVICE)
    assert translate(raised.value.message, "zh").startswith("gone.gguf 不存在；应为")


def test_a_process_that_sees_one_gpu_is_not_asked_for_the_second(tmp_path):
    config = make_train(make_material(tmp_path), **{"model.device": "cuda:1"})
    none_visible = Device("cuda:1", "test-gpu", "99")
    # It looks for the only GPU it can see, and not for a second one.
    with pytest.raises(ConfigError, match="the device 'cuda' does not exist"):
        estimate_in_process(config, none_visible)


def test_a_stopped_estimate_leaves_no_process(tmp_path):
    config = make_train(make_material(tmp_path))
    started = time.monotonic()
    with pytest.raises(InterruptedError, match="nothing was started"):
        estimate_in_process(config, DEVICE, lambda: True)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        ("noise\nestimate: rank is 0; expected 1\n", "rank is 0; expected 1"),
        ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory.\n", "not even three blocks fit"),
        ("Traceback\nKeyError: 3\n", "the estimate ended with exit code 9: KeyError: 3"),
        ("", "the estimate ended with exit code 9: it reported nothing"),
    ],
)
def test_the_last_output_becomes_the_error_message(errors, sentence):
    assert explain(errors, 9).startswith(sentence)

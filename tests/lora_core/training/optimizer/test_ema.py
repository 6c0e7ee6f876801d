"""The moving average: its formula, bit-exact swapping, and its state."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.optimizer.ema import Ema


def make_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in {"a.lora_A": (2, 5), "a.lora_B": (4, 2)}.items()
    }


def move(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_the_average_is_that_of_the_formula():
    parameters = make_parameters()
    ema = Ema(parameters.items(), 0.5)
    expected = {name: p.detach().double() for name, p in parameters.items()}
    for step in range(20):
        move(parameters, step)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, p in parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    assert ema.compute_decay() == 0.5
    for name, average in ema.averages.items():
        torch.testing.assert_close(average.double(), expected[name], atol=1e-5, rtol=1e-5)


def test_the_average_of_low_precision_weights_is_float32():
    """Steps far below bfloat16's spacing still add up."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = Ema([("p", parameter)], 0.999)
    ema.num_updates = 10**6
    with torch.no_grad():
        parameter.fill_(1.0078125)  # the next number after 1
    for _ in range(100):
        ema.update()
    assert ema.averages["p"].dtype == torch.float32
    assert ema.averages["p"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**100), abs=1e-6)


def test_a_resumed_average_is_bit_identical():
    first_parameters, second_parameters = make_parameters(), make_parameters()
    first = Ema(first_parameters.items(), 0.9)
    for step in range(3):
        move(first_parameters, step)
        first.update()
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = Ema(second_parameters.items(), 0.9)
    second.load_state_dict(state)
    for name, p in second_parameters.items():
        p.data.copy_(first_parameters[name])
    for step in range(3, 6):
        for ema, parameters in ((first, first_parameters), (second, second_parameters)):
            move(parameters, step)
            ema.update()
    assert first.num_updates == second.num_updates == 6
    for name, average in first.averages.items():
        assert torch.equal(average, second.averages[name])


def test_a_state_of_other_parameters_is_refused():
    state = Ema(make_parameters().items()).state_dict()
    del state["a.lora_B"]
    with pytest.raises(ConfigError, match=r"differ in 1 tensors, first a\.lora_B"):
        Ema(make_parameters().items()).load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ConfigError, match="expected 0 to below 1"):
        Ema(make_parameters().items(), decay)

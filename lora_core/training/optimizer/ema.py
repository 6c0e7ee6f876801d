"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ...errors import ConfigError


class Ema:
    """average <- decay * average + (1 - decay) * weights, in float32, once per step.

    The decay rises as (1 + n) / (10 + n) with the number of updates n up to its final value, so
    that a short run is not dominated by the start (as TensorFlow's ExponentialMovingAverage).

    Not diffusers' EMAModel: it averages bf16 weights in bf16 (6 % off after 500 small steps), has
    no names, which a checkpoint needs, and takes 5 s of CPU to import.

    Args:
        named_parameters: those of `Injection.named_parameters()`.
        decay: in [0, 1), e.g. 0.999.

    Raises:
        ConfigError: `decay` outside its range.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], decay: float = 0.999
    ):
        if not 0 <= decay < 1:
            raise ConfigError(
                "the EMA's decay is {decay!r}; expected 0 to below 1, e.g. 0.999", decay=decay
            )
        self.decay = decay
        self.num_updates = 0
        self.parameters = dict(named_parameters)
        self.averages = {
            name: parameter.detach().to(choose_dtype(parameter), copy=True)
            for name, parameter in self.parameters.items()
        }

    def compute_decay(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current weights; call it once after each step."""
        averages = list(self.averages.values())
        weights = [
            parameter.detach().to(average.dtype)
            for parameter, average in zip(self.parameters.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, 1 - self.compute_decay())
        self.num_updates += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by name and `num_updates`; not copies."""
        return {**self.averages, "num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state_dict`, in place.

        Raises:
            ConfigError: the names or shapes are not those of the parameters.
        """
        shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        found = {name: tensor.shape for name, tensor in state_dict.items()}
        different = sorted(
            name for name in {**shapes, **found} if shapes.get(name) != found.get(name)
        )
        if different:
            raise ConfigError(
                "the checkpoint's EMA and the settings differ in {num_different} tensors, first "
                "{different}; resume with the settings it was made with.",
                num_different=len(different),
                different=different[0],
            )
        for name, average in self.averages.items():
            average.copy_(state_dict[name])
        self.num_updates = int(state_dict["num_updates"])


def choose_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)

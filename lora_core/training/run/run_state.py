"""A run's state in a checkpoint, and whether a run may resume from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...base_model.base_files import list_base_files
from ...disk.content_samples import sample_contents
from ...errors import ConfigError, LoraError
from ...injection.inject import Injection
from ...messages import message
from ..config.config import TrainConfig
from ..config.config_files import config_to_dict, flatten
from ..data.dataset import CachedDataset
from ..optimizer.ema import Ema
from ..optimizer.optimization import build_optimizer, flatten_state, load_state, unflatten_state
from ..optimizer.optimizer_config import OptimizerConfig
from .checkpoint import Checkpoint, Tensors
from .metrics import SmoothedLoss
from .processes import Processes
from .random_state import collect_random_state, restore_random_state

#: Settings that a resumed run may change without becoming another run.
FREE = (
    *("name", "output", "saving", "model.device", "model.gradient_checkpointing"),
    *("model.compile", "model.offload_blocks", "model.vae", "model.variant"),
    *("data.folder", "data.prior"),
)
#: Settings that change later steps, but not the meaning of the state; the change is reported.
SOFT: tuple[str, ...] = (
    "steps",
    "objective",
    "optimizer",
    "data.caption_dropout",
    "data.use_masks",
)
SOFT += ("data.prior_weight", "model.source", "model.storage", "model.compute_dtype")
#: Those of SOFT that do change what the state means.
HARD = ("optimizer.name", "optimizer.accumulation", "optimizer.options")


@dataclass
class TrainingState:
    """All that training changes; nothing else has to be saved but the random numbers."""

    injection: Injection
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    smoothed_loss: SmoothedLoss = field(default_factory=SmoothedLoss)
    step: int = 0
    """Steps taken."""

    def state_dict(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Tensors by group, not copies, and what JSON can hold; both without `step`."""
        tensors: dict[str, Tensors] = {"adapter": self.injection.state_dict()}
        tensors["optimizer"], optimizer = flatten_state(self.optimizer.state_dict())
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        return tensors, {"optimizer": optimizer, "smoothed_loss": asdict(self.smoothed_loss)}

    def load_state_dict(
        self, tensors: Mapping[str, Tensors], values: Mapping[str, Any], step: int
    ) -> None:
        """The inverse of `state_dict`, in place.

        Raises:
            ConfigError: tensors are not those of the modules or of the optimizer.
        """
        self.injection.load_state_dict(tensors["adapter"])
        load_state(self.optimizer, unflatten_state(tensors["optimizer"], values["optimizer"]))
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        self.smoothed_loss = SmoothedLoss(**values["smoothed_loss"])
        self.step = step


def build_training_state(config: OptimizerConfig, injection: Injection) -> TrainingState:
    """The state before the first step."""
    optimizer = build_optimizer(
        config.name, injection.parameters(), config.learning_rate, **config.options
    )
    named = injection.named_parameters()
    return TrainingState(
        injection, optimizer, Ema(named, config.ema_decay) if config.ema_decay else None
    )


def collect_state(
    state: TrainingState, processes: Processes, description: Mapping[str, Any]
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Everything `restore_state` needs; every process takes part, one writes it.

    Args:
        description: as `describe_run` gives it.
    """
    tensors, values = state.state_dict()
    random_numbers = []
    for index, (generators, numbers) in enumerate(processes.gather(collect_random_state())):
        tensors[f"random_{index}"] = generators
        random_numbers.append(numbers)
    return tensors, {"run": description, **values, "random": random_numbers}


def restore_state(state: TrainingState, checkpoint: Checkpoint, index: int) -> None:
    """Restores the state and the random numbers to those that `collect_state` found.

    Args:
        index: this process's.
    """
    tensors, values = checkpoint.tensors, checkpoint.state
    state.load_state_dict(tensors, values, checkpoint.step)
    restore_random_state(tensors[f"random_{index}"], values["random"][index])


def describe_run(
    config: TrainConfig,
    dataset: CachedDataset,
    prior: CachedDataset | None,
    *,
    contents: Mapping[str, str | None],
    variant: str | None,
    num_processes: int,
) -> dict[str, Any]:
    """What has to be the same for a checkpoint to fit.

    Args:
        contents: as `sample_run_contents` gives it.
    """
    return {
        "config": config_to_dict(config),
        "dataset": dataset.fingerprint,
        "prior": None if prior is None else prior.fingerprint,
        "processes": num_processes,
        "has_ema": bool(config.optimizer.ema_decay),
        "contents": dict(contents),
        "variant": variant,
    }


def sample_run_contents(
    config: TrainConfig, dataset: CachedDataset, prior: CachedDataset | None
) -> dict[str, str | None]:
    """What a run reads, by what it is -> a digest of samples of it; None where there is none."""
    return {
        message("the base model"): sample_base(config.model.source),
        message("the VAE"): sample_contents(Path(config.model.vae)) if config.model.vae else None,
        message("the training set"): dataset.sample_contents(),
        message("the prior"): None if prior is None else prior.sample_contents(),
    }


def sample_base(source: str) -> str | None:
    try:
        files = list_base_files(source)
    except (LoraError, OSError, ValueError):
        return None
    return sample_contents(files[0] if len(files) == 1 else files)


def check_same_run(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Compares a checkpoint's settings with those of the run.

    Returns:
        A sentence for each setting that differs and takes effect from now on.

    Raises:
        ConfigError: a difference under which the checkpoint's state means something else.
    """
    for name, what in (
        ("dataset", message("training set's items")),
        ("prior", message("prior's items")),
        ("processes", message("number of processes")),
        ("has_ema", "EMA"),
    ):
        if then[name] != now[name]:
            raise ConfigError(
                "the {what} changed since the checkpoint was made, so its order of data and "
                "state do not fit; resume with what it was made with, or start in another folder",
                what=what,
            )
    earlier = then.get("contents", {})
    for what, sample in now["contents"].items():
        if None not in (sample, earlier.get(what)) and sample != earlier[what]:
            yield message(
                "{what} changed since the checkpoint was made; from now on the new one is used",
                what=what,
            )
    if None not in (now["variant"], then.get("variant")) and now["variant"] != then["variant"]:
        yield message(
            "the variant was {then} and is {now} from now on",
            then=then["variant"],
            now=now["variant"],
        )
    old, new = (flatten(values["config"]) for values in (then, now))
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if name == "model.source":  # a file may move, but must not be replaced unnoticed
            before, after = (
                str(path).replace("\\", "/").rpartition("/")[2] for path in (before, after)
            )
        if before == after or matches(name, FREE):
            continue
        if matches(name, SOFT) and not matches(name, HARD):
            yield message(
                "{name} was {before!r} and is {after!r} from now on",
                name=name,
                before=before,
                after=after,
            )
            continue
        raise ConfigError(
            "{name} was {before!r} when the checkpoint was made and is {after!r} now; resume "
            "with the settings it was made with, or start in another folder",
            name=name,
            before=before,
            after=after,
        )


def matches(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)

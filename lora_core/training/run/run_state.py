"""A run's state in a checkpoint, and whether a run may resume from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...disk.content_samples import sample_contents
from ...errors import ConfigError
from ..config.config_files import config_to_dict
from ..optimizer.optimization import flatten_state, load_state, unflatten_state
from .checkpoint import Checkpoint, Tensors
from .random_state import collect_random_state, restore_random_state

if TYPE_CHECKING:
    from ..config.config import TrainConfig
    from ..data.dataset import CachedDataset
    from .run import Run

#: Settings that a resumed run may change without becoming another run.
FREE = (
    *("name", "output", "saving", "model.device", "model.gradient_checkpointing"),
    *("model.compile", "model.offload_blocks", "model.vae", "model.variant"),
    *("data.folder", "data.prior"),
)
#: Settings that change later steps, but not the meaning of the state; the change is reported.
SOFT = ("steps", "objective", "optimizer", "data.caption_dropout", "data.use_masks")
SOFT += ("data.prior_weight", "model.source", "model.storage", "model.compute_dtype")
#: Those of SOFT that do change what the state means.
HARD = ("optimizer.name", "optimizer.accumulation", "optimizer.options")


def collect_state(run: Run) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Everything `restore_state` needs; every process takes part, one writes it."""
    tensors: dict[str, Tensors] = {"adapter": run.injection.state_dict()}
    tensors["optimizer"], optimizer = flatten_state(run.optimizer.state_dict())
    if run.ema is not None:
        tensors["ema"] = run.ema.state_dict()
    random_numbers = []
    for index, (generators, numbers) in enumerate(run.processes.gather(collect_random_state())):
        tensors[f"random_{index}"] = generators
        random_numbers.append(numbers)
    return tensors, {
        "run": describe_run(run),
        "optimizer": optimizer,
        "smoothed_loss": vars(run.smoothed_loss),
        "random": random_numbers,
    }


def restore_state(run: Run, checkpoint: Checkpoint) -> None:
    """Restores a run to where `collect_state` was called."""
    tensors, state = checkpoint.tensors, checkpoint.state
    run.injection.load_state_dict(tensors["adapter"])
    load_state(run.optimizer, unflatten_state(tensors["optimizer"], state["optimizer"]))
    if run.ema is not None:
        run.ema.load_state_dict(tensors["ema"])
    vars(run.smoothed_loss).update(state["smoothed_loss"])
    index = run.processes.index
    restore_random_state(tensors[f"random_{index}"], state["random"][index])
    run.step = checkpoint.step


def describe_run(run: Run) -> dict[str, Any]:
    """What has to be the same for a checkpoint to fit."""
    return {
        "config": config_to_dict(run.config),
        "dataset": run.dataset.fingerprint,
        "prior": None if run.prior is None else run.prior.fingerprint,
        "processes": run.processes.count,
        "has_ema": run.ema is not None,
        "contents": run.contents,
        "variant": run.variant,
    }


def sample_run_contents(
    config: TrainConfig, dataset: CachedDataset, prior: CachedDataset | None
) -> dict[str, str | None]:
    """What a run reads, by what it is -> a digest of samples of it; None where there is none."""
    return {
        "the base model": sample_contents(Path(config.model.source)),
        "the training set": dataset.sample_contents(),
        "the prior": None if prior is None else prior.sample_contents(),
    }


def check_same_run(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Compares a checkpoint's settings with those of the run.

    Returns:
        A sentence for each setting that differs and takes effect from now on.

    Raises:
        ConfigError: a difference under which the checkpoint's state means something else.
    """
    for name, what in (
        ("dataset", "training set's items"),
        ("prior", "prior's items"),
        ("processes", "number of processes"),
        ("has_ema", "EMA"),
    ):
        if then[name] != now[name]:
            raise ConfigError(
                f"the {what} changed since the checkpoint was made, so its order of data and state "
                "do not fit; resume with what it was made with, or start in another folder"
            )
    earlier = then.get("contents", {})
    for what, sample in now["contents"].items():
        if None not in (sample, earlier.get(what)) and sample != earlier[what]:
            yield f"{what} changed since the checkpoint was made; from now on the new one is used"
    if None not in (now["variant"], then.get("variant")) and now["variant"] != then["variant"]:
        yield f"the variant was {then['variant']} and is {now['variant']} from now on"
    old, new = (dict(flatten(values["config"])) for values in (then, now))
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if name == "model.source":  # a file may move, but must not be replaced unnoticed
            before, after = (
                str(path).replace("\\", "/").rpartition("/")[2] for path in (before, after)
            )
        if before == after or matches(name, FREE):
            continue
        if matches(name, SOFT) and not matches(name, HARD):
            yield f"{name} was {before!r} and is {after!r} from now on"
            continue
        raise ConfigError(
            f"{name} was {before!r} when the checkpoint was made and is {after!r} now; resume with "
            "the settings it was made with, or start in another folder"
        )


def matches(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

"""`train`: a model with LoRAs in it, a cached training set and a configuration -> step reports.

A step is one optimizer update, counted from 1 in reports; a micro-step one forward and backward.
A step depends only on the checkpointed state and on its number, so a run that was killed and
resumed is the same run, bit-identical where the device is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...injection.inject import Injection
from ...progress import ShouldStop
from ..config.config import TrainConfig
from ..data.dataset import CachedDataset
from ..objective.losses import AuxiliaryLoss, Decode
from ..objective.objective import Objective, VelocityModel
from .checkpoint import make_folder
from .metrics import StepReport
from .output_names import check_is_free, open_checkpoints
from .processes import Processes
from .run import Notify, Run

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(
    config: TrainConfig,
    model: VelocityModel,
    injection: Injection,
    dataset: CachedDataset,
    *,
    prior: CachedDataset | None = None,
    auxiliary: Mapping[str, tuple[AuxiliaryLoss, float]] | None = None,
    decode: Decode | None = None,
    variant: str | None = None,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    should_stop: ShouldStop | None = None,
    notify: Notify | None = None,
) -> Iterator[StepReport]:
    """Trains, and yields a report after every step.

    Everything is checked and restored before this returns; the steps are taken as the reports are
    consumed. The finished adapters are in `config.output` once the last report has been consumed.

    Args:
        model: called with normalised latents; its LoRAs are those of `injection`.
        prior: a training set whose loss is added with `config.data.prior_weight`.
        auxiliary: name -> further auxiliary loss and its weight.
        decode: for auxiliary losses on images.
        variant: "original", "2509" or "2511", for the adapters' metadata.
        accelerator: of `accelerate launch`, for several processes.
        resume: from the newest intact checkpoint; start from scratch where there is none.
        should_stop: called before every step, with several processes during the previous one; once
            one of them returns True, a checkpoint is written and the reports end.
        notify: called with a sentence for each deviation from the request.

    Raises:
        ConfigError: settings that do not fit each other or the run to be resumed, or a folder that
            already holds a run, or a LoRA or the base model under the run's name.
        FileError: the output folder cannot be written.
        NonFiniteLossError: while reports are taken; the step was not applied, or not saved.
        OutOfMemoryError: while reports are taken; with what would lower the memory.
    """
    make_folder(Path(config.output))
    return Run(
        config=config,
        model=model,
        injection=injection,
        dataset=dataset,
        prior=prior,
        objective=Objective(config.objective, auxiliary, decode),
        variant=variant,
        processes=Processes(accelerator),
        notify=notify or (lambda sentence: None),
        resume=resume,
    ).take_steps(should_stop or (lambda: False))


def check_output(config: TrainConfig, resume: bool) -> None:
    """Checks the output folder as `train` does, before a model is loaded.

    Raises:
        ConfigError: it already holds a run that is not to be resumed, or a file that the run would
            replace.
        FileError: it cannot be written.
    """
    checkpoints = open_checkpoints(config)
    check_is_free(config, resume)
    make_folder(Path(config.output))
    checkpoints.prepare()

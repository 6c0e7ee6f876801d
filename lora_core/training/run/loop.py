"""One loop for all programs that train: `python -m lora_core train`, and a job's worker."""

from __future__ import annotations

from collections.abc import Callable

from ...progress import ShouldStop
from ..config.config import TrainConfig
from ..objective.objective import Objective
from .metrics import StepReport, describe_report
from .processes import Processes
from .run import Notify, Run
from .session import Session

LOG_EVERY = 10  # steps


class Stop:
    """Whether the training should stop: once requested, it stays requested until `reset`.

    Work skipped for a stop must not be missing if the stop is withdrawn a moment later; so every
    caller gets the same answer, and `run_steps` checks again when everything is saved.
    """

    def __init__(self, should_stop: ShouldStop):
        self._should_stop = should_stop
        self._is_requested = False

    def __call__(self) -> bool:
        self._is_requested = self._is_requested or self._should_stop()
        return self._is_requested

    def reset(self) -> None:
        self._is_requested = False


class Observer:
    """What a program does around the steps of a run, on each of its processes. Here: nothing."""

    def before_steps(self, run: Run, stop: Stop) -> None:
        """At the start, and again where a stop was withdrawn."""

    def after_step(self, run: Run, report: StepReport, stop: Stop) -> None:
        """The step's metrics and checkpoint are written."""

    def after_stop(self, run: Run) -> None:
        """The steps have ended for a stop, with a checkpoint."""

    def after_withdrawal(self, run: Run) -> None:
        """The stop was withdrawn meanwhile: the steps go on."""


class StepLog(Observer):
    """Logs the first and the last step, and each `every` steps."""

    def __init__(
        self,
        log: Callable[[str], None],
        every: int = LOG_EVERY,
        describe: Callable[[StepReport], str] = describe_report,
    ):
        self.log = log
        self.every = every
        self.describe = describe

    def after_step(self, run: Run, report: StepReport, stop: Stop) -> None:
        if report.step in (1, report.num_steps) or report.step % self.every == 0:
            self.log(self.describe(report))


def open_run(
    config: TrainConfig, session: Session, processes: Processes, notify: Notify, resume: bool
) -> Run:
    """The run that a session was opened for; errors as `train`."""
    return Run(
        config=config,
        model=session.model,
        injection=session.injection,
        dataset=session.dataset,
        prior=session.prior,
        objective=Objective(config.objective, None, session.decode),
        variant=session.variant,
        processes=processes,
        notify=notify,
        resume=resume,
    )


def run_steps(run: Run, observer: Observer, should_stop: ShouldStop) -> bool:
    """Trains until the end or a stop; either way everything is saved.

    Returns:
        Whether it reached the end.
    """
    stop = Stop(should_stop)
    while True:
        stop.reset()
        observer.before_steps(run, stop)
        for report in run.take_steps(stop):
            observer.after_step(run, report, stop)
        if run.step == run.config.steps:
            return True
        observer.after_stop(run)
        stop.reset()
        if run.numbers.is_still_to_stop(stop):
            return False
        observer.after_withdrawal(run)

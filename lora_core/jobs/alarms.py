"""Alerts before a training is over: that it diverges, overshoots or stalls."""

from __future__ import annotations

from ..inspection.verdict import GOOD_STD, SATURATED_STD
from ..messages import message
from ..training.config.config import TrainConfig
from ..training.run.metrics import StepReport

#: The smoothed loss has this many steps to settle before it is compared with its own minimum.
SETTLING_STEPS = 50
#: Multiple of its own minimum that the smoothed loss does not reach by noise.
DIVERGENCE = 2.0
#: Steps in a row that it has to stay there.
DIVERGENCE_STEPS = 25
#: A thousandth of what good LoRAs end with.
STALLED_STD = GOOD_STD[0] / 1000
#: Share of the steps after which a delta has to be larger than that.
STALLED_SHARE = 0.1


class Alerts:
    """Checks every step's report; reports each problem once."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self._lowest = float("inf")
        self._num_high = 0
        self._num_seen = 0
        self._reported: set[str] = set()

    def check(self, report: StepReport) -> list[str]:
        """Sentences with the value, the threshold and what to do; mostly none."""
        found = {
            "diverges": self._judge_loss(report),
            "saturated": self._judge_size(report),
            "stands": self._judge_progress(report),
        }
        news = {what: text for what, text in found.items() if text and what not in self._reported}
        self._reported.update(news)
        return list(news.values())

    def _judge_loss(self, report: StepReport) -> str:
        self._num_seen += 1
        if self._num_seen < SETTLING_STEPS:
            return ""
        self._lowest = min(self._lowest, report.smoothed_loss)
        is_high = report.smoothed_loss > DIVERGENCE * self._lowest
        self._num_high = self._num_high + 1 if is_high else 0
        if self._num_high < DIVERGENCE_STEPS:
            return ""
        return message(
            "the smoothed loss is {smoothed_loss:.3g} at step {step}, more than "
            "{divergence:g} times its lowest value {lowest:.3g}: the training diverges; "
            "clone it with a lower learning rate than {learning_rate:.2g}",
            smoothed_loss=report.smoothed_loss,
            step=report.step,
            divergence=DIVERGENCE,
            lowest=self._lowest,
            learning_rate=report.learning_rate,
        )

    def _judge_size(self, report: StepReport) -> str:
        std = (report.health or {}).get("std", 0.0)
        if std <= SATURATED_STD:
            return ""
        return message(
            "the delta's std is {std:.2g} at step {step}; good LoRAs end with {low:g} "
            "to {high:g}, and above {limit:g} it overwrites the base: use an "
            "earlier file, or a lower learning rate",
            std=std,
            step=report.step,
            low=GOOD_STD[0],
            high=GOOD_STD[1],
            limit=SATURATED_STD,
        )

    def _judge_progress(self, report: StepReport) -> str:
        std = (report.health or {}).get("std")
        is_early = report.step < max(SETTLING_STEPS, STALLED_SHARE * report.num_steps)
        if std is None or is_early or std >= STALLED_STD:
            return ""
        return message(
            "the delta's std is still {std:.2g} after {step} steps; good LoRAs end with "
            "{low:g} to {high:g}: the learning rate {learning_rate:.2g} is too "
            "low, or its warm-up too long",
            std=std,
            step=report.step,
            low=GOOD_STD[0],
            high=GOOD_STD[1],
            learning_rate=report.learning_rate,
        )

"""Alerts before a training is over: that it diverges, overshoots or stalls."""

from __future__ import annotations

from ..inspection.verdict import GOOD_STD, SATURATED_STD
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
        return (
            f"the smoothed loss is {report.smoothed_loss:.3g} at step {report.step}, more than "
            f"{DIVERGENCE:g} times its lowest value {self._lowest:.3g}: the training diverges; "
            f"clone it with a lower learning rate than {report.learning_rate:.2g}"
        )

    def _judge_size(self, report: StepReport) -> str:
        std = (report.health or {}).get("std", 0.0)
        if std <= SATURATED_STD:
            return ""
        return (
            f"the delta's std is {std:.2g} at step {report.step}; good LoRAs end with "
            f"{GOOD_STD[0]:g} to {GOOD_STD[1]:g}, and above {SATURATED_STD:g} it overwrites the "
            "base: use an earlier file, or a lower learning rate"
        )

    def _judge_progress(self, report: StepReport) -> str:
        std = (report.health or {}).get("std")
        is_early = report.step < max(SETTLING_STEPS, STALLED_SHARE * report.num_steps)
        if std is None or is_early or std >= STALLED_STD:
            return ""
        return (
            f"the delta's std is still {std:.2g} after {report.step} steps; good LoRAs end with "
            f"{GOOD_STD[0]:g} to {GOOD_STD[1]:g}: the learning rate {report.learning_rate:.2g} is "
            "too low, or its warm-up too long"
        )

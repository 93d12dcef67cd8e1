"""A quick look at a plan whose own repair takes long: its cut alone, with ridge, on the first shards.

`stream` and `distill` run the model over the calibration text: `stream` takes 30 s for 1.5B parameters on an H100, and
ridge a second or two. What each gains over ridge is foretold by the damage table, and learnt from the trials that had
both. All precisions of a cut share its cheap screen; what a precision loses is the damage table's to say.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from compressors.plan import CompressionPlan, canonical

SLOW_REPAIRS = ("stream", "distill")  # the repairs that take long
RELATIVE_SE = 0.3  # of what is foretold, before any trial has shown it
LEAST_RELATIVE_SE = 0.12
LEARNS_FROM = 3  # trials
LEAST_LOSS = 0.01  # nats per token, below which a ratio of losses says nothing


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a plan's own repair leaves of the loss in the cheap screen.

    Attributes:
        share: The loss of the full screen over that of the cheap one.
        share_se: Its standard deviation from plan to plan.
    """

    share: float
    share_se: float

    @classmethod
    def learnt(cls, foretold: float, seen: Sequence[tuple[float, float, float]]) -> Gain:
        """Return the gain to expect of a plan, from what is foretold and what trials show.

        Args:
            foretold: The share that is foretold of the plan.
            seen: What was foretold of each trial, and its loss in the cheap and in the full screen, in nats per token.
        """
        off = [full / (quick * share) for share, quick, full in seen if quick * share > LEAST_LOSS]
        if len(off) < LEARNS_FROM:
            return cls(foretold, RELATIVE_SE * foretold)
        share = foretold * statistics.median(off)
        return cls(share, foretold * max(statistics.stdev(off), LEAST_RELATIVE_SE))

    def loss(self, quick: float, quick_se: float) -> tuple[float, float]:
        """Return the loss to expect of the full screen and its standard error, in nats per token."""
        lost = max(quick, 0.0)
        return self.share * lost, math.hypot(self.share_se * lost, self.share * quick_se)


def cut_alone(plan: CompressionPlan, own: CompressionPlan) -> CompressionPlan | None:
    """Return the plan of the cheap screen; None for a plan that needs none, since its full screen is as cheap.

    Args:
        plan: The plan.
        own: The plan of the base model itself.
    """
    if plan.repair not in SLOW_REPAIRS:
        return None
    quick = canonical(dataclasses.replace(plan, repair="ridge", precision=own.precision), own)
    return None if quick == own else quick

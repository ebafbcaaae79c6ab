"""What a running generation was planned to be, and its correction from what it has moved."""

from __future__ import annotations

import functools
from collections.abc import Callable

from .plan import Plan

#: Steps of one token with rows below the device, before their traffic says anything about the churn.
CHURN_STEPS = 16


class Forecast:
    """The plan of a call of `generate`, made when it is asked for: planning takes a tenth of a second.

    make: the plan under a churn of the policy's dynamic rows; None = that of the machine profile. Its result is None
    where no plan can be made.
    """

    def __init__(self, make: Callable[[float | None], Plan | None]) -> None:
        self._make = functools.lru_cache(maxsize=8)(make)  # a report asks for four, and may be asked for often

    @property
    def plan(self) -> Plan | None:
        """With the churn that was expected."""
        return self._make(None)

    def measured_churn(self, up_bytes: int, steps: int) -> float | None:
        """The churn with which the plan's first `steps` decode steps move so many bytes up to the device.

        Rows that come up are proportional to it, beside those that stream through in refresh steps. None where the
        plan moves none with any churn.
        """
        still, turning = self._make(0.0), self._make(1.0)
        if still is None or turning is None:
            return None
        least, most = (sum(plan.bytes_moved["host_to_device"][1 : steps + 1]) for plan in (still, turning))
        return None if most <= least else min(1.0, max(0.0, (up_bytes - least) / (most - least)))

    def corrected(self, churn: float) -> Plan | None:
        """The plan with a measured churn."""
        return self._make(churn)

"""How long a smoke test will take: of a device nothing is known until its speed is measured, and then nearly all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

# What a runner does, in order; and the share of the time that each step takes where the speed is measured last.
STEPS = {"load": 1, "speed": 2, "answers": 4, "repeated": 1, "context": 4, "memory": 0}
_LETTERS_PER_TOKEN = 4  # of a question, about
_SLOWEST_PER_S = 1e-6  # tokens; what is slower is no measurement


class Forecast:
    """How far the whole of ``job`` is, as its runner tells of steps and results.

    Args:
        clock: seconds.
    """

    def __init__(self, job: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._job, self._clock, self._started = job, clock, clock()
        # A llama-bench beside another engine has its turn when that has ended.
        last = job.get("bench") and job.get("engine") != "bench"
        self._order = sorted(STEPS, key=lambda name: name == "speed") if last else list(STEPS)
        self._seconds: dict[str, float] = {}

    def learn(self, step: Any, found: Any) -> None:
        """Take in the result ``found`` of a ``step``: those after the speed take time by it."""
        if step != "speed":
            return
        self._seconds = {}
        with suppress(KeyError, TypeError):  # whatever a device says
            rates = found["prefill_per_s"], found["decode_per_s"]
            if all(_SLOWEST_PER_S < rate < math.inf for rate in rates):
                self._seconds = self._expected(*rates)

    def _expected(self, prefill_per_s: float, decode_per_s: float) -> dict[str, float]:
        """Seconds of the steps behind the speed; of answers at most, as they may end early."""
        job = self._job
        each = [
            len(prompt["text"]) / _LETTERS_PER_TOKEN / prefill_per_s + job["most_tokens"] / decode_per_s
            for prompt in job["prompts"]
        ]
        context = job["launch"]["context"] / prefill_per_s
        return {"answers": sum(each), "repeated": sum(each[: job["repeated"]]), "context": context}

    def share(self, message: Mapping[str, Any]) -> tuple[int, int]:
        """How much is done of how much, when ``message`` tells how far one step is; nothing while nobody knows."""
        step, part = message["step"], 0.0
        with suppress(KeyError, TypeError, ZeroDivisionError):
            part = max(0.0, min(1.0, message["done"] / message["total"]))
        if step not in self._order:
            return 0, 1
        later = self._order[self._order.index(step) + 1 :]
        if self._order[-1] == "speed":
            total = sum(STEPS.values())
            left = sum(STEPS[name] for name in later) + (1 - part) * STEPS[step]
            return int(1000 * (total - left)), 1000 * total
        if not self._seconds:
            return 0, 1
        left = sum(self._seconds.get(name, 0.0) for name in later) + (1 - part) * self._seconds.get(step, 0.0)
        spent = self._clock() - self._started
        return int(1000 * spent), int(1000 * (spent + left)) + 1

"""Steps that would spoil the weights: left out, counted, and after three in a row the end of the run."""

import math
import statistics
from collections import deque
from typing import Any

WINDOW = 64  # steps whose figures are what is usual
MIN_STEPS = 16  # before that nothing is known to be unusual
MAX_IN_A_ROW = 3
SLACK = 0.05  # of a loss: near zero, where a run has learned its data by heart, a multiple means nothing


class Guard:
    """Refuses steps whose loss or gradient is not finite, or far beyond what is usual.

    Far beyond is a loss of more than `factor` times the median of the last 64 steps, or a gradient of so many times
    theirs at a loss above all of theirs: a gradient alone also grows when a run leaves a plateau. All processes hold
    the same figures and so decide alike. `state` belongs into the checkpoint: a run that goes on decides as if it had
    never stopped.
    """

    def __init__(self, factor: float | None):
        self.factor = factor
        self.usual: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "gradient norm")}
        self.skipped = 0
        self.in_a_row = 0

    def refuse(self, loss: float, grad_norm: float) -> str | None:
        """Return why the step must not change the weights, None where it may."""
        worse = loss > max(self.usual["loss"], default=math.inf) + SLACK
        reasons = [self._complaint("loss", loss, True), self._complaint("gradient norm", grad_norm, worse)]
        reason = " and ".join(filter(None, reasons)) or None
        if reason is None:
            self.in_a_row = 0
            self.usual["loss"].append(loss)
            self.usual["gradient norm"].append(grad_norm)
        else:
            self.in_a_row += 1
            self.skipped += 1
        return reason

    def forget(self) -> None:
        """Take nothing for usual any more."""
        for values in self.usual.values():
            values.clear()

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        usual = {name: list(values) for name, values in self.usual.items()}
        return {"usual": usual, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name, values in state["usual"].items():
            self.usual[name].extend(values)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _complaint(self, name: str, value: float, judged: bool) -> str | None:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        known = self.usual[name]
        if self.factor is None or not judged or len(known) < MIN_STEPS:
            return None
        usual = statistics.median(known)
        least = SLACK if name == "loss" else 0.0
        return f"the {name} is {value:.3g}, usual is {usual:.3g}" if value > self.factor * usual + least else None

"""Detection of steps that would damage the weights: they are skipped and counted; three in a row end the run."""

import math
import statistics
from collections import deque
from typing import Any

WINDOW = 64  # steps in the running median
MIN_STEPS = 16  # steps before the first outlier can be detected
MAX_IN_A_ROW = 3
SLACK = 0.05  # added to loss thresholds: multiples of a loss near zero, of an overfitted model, are no outliers


class Guard:
    """Rejects steps with a non-finite or outlier loss or gradient norm.

    A loss is an outlier if it exceeds `factor` times the median of the last 64 steps; a gradient norm, if it exceeds
    `factor` times its median while the loss exceeds all losses of the window, because gradients also grow when a run
    leaves a plateau. All ranks have the same values and so decide equally. `state` is saved in the checkpoint, so that
    a resumed run decides as if it had not been interrupted.
    """

    def __init__(self, factor: float | None):
        self.factor = factor
        self.usual: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "gradient norm")}
        self.skipped = 0
        self.in_a_row = 0

    def refuse(self, loss: float, grad_norm: float) -> str | None:
        """Return the reason to skip the step; None if it may update the weights."""
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
        """Clear the window of the running medians."""
        for values in self.usual.values():
            values.clear()

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`."""
        usual = {name: list(values) for name, values in self.usual.items()}
        return {"usual": usual, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
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
        return f"the {name} is {value:.3g}, usually {usual:.3g}" if value > self.factor * usual + least else None

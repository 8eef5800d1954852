"""Whether a training has diverged: its loss is no number, or stays far above its running mean."""

import math
from dataclasses import asdict, dataclass


@dataclass
class LossGuard:
    """Watches the loss of each optimizer step.

    A step is suspicious if its loss is above the running mean, at its lowest so far, by all three of: `deviations`
    standard deviations of the noise (from differences of successive steps, which a slow climb does not widen); half of
    that mean; a tenth of the mean of the first steps (losses near 0 jump, and nothing is wrong). Suspicious steps
    change none of these, and `patience` of them in a row are a divergence: one hard batch stops nothing.

    Args:
        deviations: 0 switches the watch off (a loss that is no number stops the run anyway).
        patience: suspicious steps in a row that stop the run.
    """

    deviations: float = 6.0
    patience: int = 10
    steps: int = 0
    """Those that were not suspicious."""
    suspicious: int = 0
    """In a row, up to the last step."""
    loss: float = 0.0
    """Of the last step that was not suspicious."""
    mean: float = 0.0
    first: float = 0.0
    lowest: float = 0.0
    variance: float = 0.0

    ABOVE_MEAN, ABOVE_FIRST = 0.5, 0.1
    MEMORY = 0.98  # share of the mean that a step leaves: it reaches back about 50 steps
    FIRST = 50  # steps whose mean is a plain one
    UNWATCHED = 10  # steps that only tell mean and noise

    def __post_init__(self):
        if not self.deviations >= 0:
            raise ValueError(
                f"--divergence_deviations is at least 0 (0: loss jumps are not watched), got {self.deviations}."
            )
        if not self.patience >= 1:
            raise ValueError(f"--divergence_patience is at least 1 step, got {self.patience}.")

    def see(self, loss):
        """Take in the loss of one more step; why training should stop, in words, or None."""
        limit = self._limit()
        if not math.isfinite(loss) or loss > limit:
            self.suspicious += 1
            if not math.isfinite(loss):
                return f"The loss is {loss}"
            if self.suspicious < self.patience:
                return None
            return (
                f"The loss is {loss:.4g}, and has been far above its running mean, {self.lowest:.4g} at its lowest, "
                f"for {self.suspicious} steps (limit {limit:.4g} by --divergence_deviations {self.deviations:g}, "
                f"--divergence_patience {self.patience})"
            )
        self._take_in(loss)
        return None

    def _limit(self):
        if not self.deviations or self.steps < self.UNWATCHED:
            return math.inf
        noise = self.deviations * math.sqrt(self.variance)
        return self.lowest + max(noise, self.ABOVE_MEAN * self.lowest, self.ABOVE_FIRST * self.first)

    def _take_in(self, loss):
        # plain means at first
        self.mean += max(1 - self.MEMORY, 1 / (self.steps + 1)) * (loss - self.mean)
        if self.steps:
            share = max(1 - self.MEMORY, 1 / self.steps)
            self.variance += share * ((loss - self.loss) ** 2 / 2 - self.variance)
        self.suspicious, self.loss, self.steps = 0, loss, self.steps + 1
        if self.steps <= self.FIRST:
            self.first = self.lowest = self.mean
        self.lowest = min(self.lowest, self.mean)

    def state(self):
        """What a resumed run goes on with."""
        return {name: value for name, value in asdict(self).items() if name not in ("deviations", "patience")}

    def restore(self, state):
        for name, value in state.items():
            setattr(self, name, value)

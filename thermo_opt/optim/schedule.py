"""When curvature is refreshed: often while it moves fast, seldom later, and not everywhere at
once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refresh:
    """Each block is refreshed every ``interval(step)`` steps, a power of two that grows with the
    step up to ``longest``.

    Curvature changes by a constant fraction in a constant fraction of the steps taken so far, so
    the interval is at most ``step / patience``. With ``staggered`` the blocks' turns are spread
    over the interval, so that no step pays for all. A function of the step alone: a resumed run
    needs no state.
    """

    longest: int = 32
    patience: int = 12
    staggered: bool = True

    def interval(self, step: int) -> int:
        """Steps between refreshes of one block at this step."""
        interval = 1
        while interval * 2 <= self.longest and interval * 2 * self.patience <= step:
            interval *= 2
        return interval

    def due(self, step: int, block: int, blocks: int) -> bool:
        """Whether block number ``block`` of ``blocks`` has its turn at this step."""
        interval = self.interval(step)
        phase = block * interval // blocks if self.staggered else 0
        return (step + phase) % interval == 0

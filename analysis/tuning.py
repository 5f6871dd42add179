"""Which setting of a method to try next: every method gets the same number of trials, on a grid
that follows the optimum.

The first three trials are central settings, half a decade apart. Each further trial depends on what
was found: with the best at an edge of what was tried, the next half-decade beyond it; otherwise the
middle of the wider gap beside the best (of equally wide ones, on the side of the better neighbour).
A method whose optimum lies far from its centre thus spends its trials on getting there, and says so
when it has not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

TRIALS = 5
"""Settings tried for each method."""


def best(scores: Mapping[float, float]) -> float:
    """The setting with the lowest score (nats); a score that isn't finite loses to any other. Of
    equals, the lowest setting."""
    return min(sorted(scores), key=lambda setting: _comparable(scores[setting]))


def thrifty(scores: Mapping[float, float], reference: Mapping[float, float]) -> float | None:
    """The smallest setting that scores no worse than the best of ``reference``; None if that is the
    best one anyway, or no setting does."""
    limit = _comparable(reference[best(reference)])
    good = [
        setting for setting in sorted(scores) if _comparable(scores[setting]) <= limit < math.inf
    ]
    return good[0] if good and good[0] != best(scores) else None


def bracketed(scores: Mapping[float, float]) -> bool:
    """Whether settings on both sides of the best were tried."""
    return min(scores) < best(scores) < max(scores)


def next_setting(central: Sequence[float], scores: Mapping[float, float]) -> float:
    """The setting to try after these (see the module's text); the central ones come first."""
    for setting in central:
        if setting not in scores:
            return setting
    settings = sorted(scores)
    place = settings.index(best(scores))
    if place == 0:
        return _half_decade(settings[0], -1)
    if place == len(settings) - 1:
        return _half_decade(settings[-1], 1)
    here, below, above = settings[place], settings[place - 1], settings[place + 1]
    gaps = {below: math.log(here / below), above: math.log(above / here)}
    even = abs(gaps[above] - gaps[below]) < 0.2 * min(
        gaps.values()
    )  # settings are rounded, so gaps are equal only nearly
    beside = (
        min((below, above), key=lambda s: _comparable(scores[s]))
        if even
        else max(gaps, key=lambda s: gaps[s])
    )
    return float(f"{math.sqrt(here * beside):.2g}")


def _comparable(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def _half_decade(setting: float, places: int) -> float:
    """A setting of 1, 3, 10, 30, … this many places further."""
    decades, half = divmod(round(2 * math.log10(setting)) + places, 2)
    return float(f"{(1, 3)[half]}e{decades}")

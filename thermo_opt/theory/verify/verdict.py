"""What checking a claim yields: measured against predicted, and a verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Relation = Literal["=", "≤", "≥"]
Ruling = Literal["holds", "fails", "not established"]


@dataclass(frozen=True)
class Check:
    """One comparison a claim makes on one problem: ``measured relation predicted`` within
    ``tolerance``."""

    problem: str
    statement: str
    predicted: float
    measured: float
    tolerance: float
    relation: Relation = "="

    @property
    def holds(self) -> bool:
        """Whether the comparison is met; a NaN meets nothing."""
        gap = self.measured - self.predicted
        if self.relation == "=":
            return abs(gap) <= self.tolerance
        return gap <= self.tolerance if self.relation == "≤" else gap >= -self.tolerance


@dataclass(frozen=True)
class Verdict:
    """A check's outcome: ``verdict`` is "holds", "fails" or "not established" (a solver gave up:
    ``measured`` is None).

    ``seconds`` is the time of the whole claim, the same for each of its checks.
    """

    claim: str
    problem: str
    statement: str
    predicted: float | None
    relation: Relation
    measured: float | None
    tolerance: float | None
    verdict: Ruling
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As a plain dict; non-finite numbers become None, as strict JSON wants."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def equal(
    problem: str, statement: str, predicted: float, measured: float, tolerance: float
) -> Check:
    """|measured − predicted| ≤ tolerance."""
    return Check(problem, statement, float(predicted), float(measured), float(tolerance))


def at_most(
    problem: str, statement: str, bound: float, measured: float, tolerance: float = 0.0
) -> Check:
    """measured ≤ bound + tolerance."""
    return Check(problem, statement, float(bound), float(measured), float(tolerance), "≤")


def at_least(
    problem: str, statement: str, bound: float, measured: float, tolerance: float = 0.0
) -> Check:
    """measured ≥ bound − tolerance."""
    return Check(problem, statement, float(bound), float(measured), float(tolerance), "≥")

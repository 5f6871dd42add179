"""Runs too many to tell apart in one figure: the best, the median and the worst stand out and are
named, the others are grey and behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thermo_opt.lenses.results import Audited
from thermo_opt.plots.palette import BEHIND, Look, look
from thermo_opt.plots.series import loss_curve

MOST = 12
"""Runs whose lines can be told apart in one figure."""

_WORDS = ("lowest loss at the end", "median loss at the end", "highest loss at the end")


@dataclass(frozen=True)
class Crowd:
    """How each of several runs is drawn, the same in every figure of them.

    ``looks``: one a run. ``standing_out``: position → why, of the few that stand out; empty where
    each run has a look of its own, or no loss is known.
    """

    looks: list[Look]
    standing_out: dict[int, str]

    @property
    def behind(self) -> int:
        """How many runs are drawn grey."""
        return sum(own.recedes for own in self.looks)

    @property
    def order(self) -> list[int]:
        """Positions in the order of drawing: what stands out comes last, the best on top."""
        if not self.behind:
            return list(range(len(self.looks)))
        grey = [i for i, own in enumerate(self.looks) if own.recedes]
        return [*grey, *reversed(self.standing_out)]

    def label(self, index: int, name: str) -> str:
        """The words of a run's entry in a key: one entry for all that are grey."""
        if index in self.standing_out:
            return f"{name}: {self.standing_out[index]}"
        if not self.looks[index].recedes:
            return name
        first = next(i for i, own in enumerate(self.looks) if own.recedes)
        return (
            f"{self.behind} {'other ' if self.standing_out else ''}runs" if index == first else ""
        )

    def line(self, index: int, name: str) -> dict[str, Any]:
        """A run's line, as Matplotlib takes it."""
        own = self.looks[index]
        said = self.label(index, name) or "_"  # an underscore: no entry in the key
        found: dict[str, Any] = {"linestyle": own.linestyle, "color": own.hex, "label": said}
        return found | ({"linewidth": 0.7, "alpha": 0.5} if own.recedes else {})

    def sentence(self, audits: Sequence[Audited]) -> str:
        """Which runs stand out, for a caption; empty where none does."""
        if not self.standing_out:
            return ""
        named = "; ".join(
            f"{self.looks[i].colour}: {audits[i].run} ({why})"
            for i, why in self.standing_out.items()
        )
        return f" {named[0].upper()}{named[1:]}; grey: the other {self.behind} runs."


def crowd(audits: Sequence[Audited]) -> Crowd:
    """How these runs are drawn. Cost: one look at each run's losses."""
    if len(audits) <= MOST:
        return Crowd([look(i) for i in range(len(audits))], {})
    losses = [loss_curve(audit)[1] for audit in audits]
    ends = {i: float(loss[-1]) for i, loss in enumerate(losses) if len(loss)}
    known = sorted(ends, key=ends.__getitem__)
    chosen: dict[int, str] = {}
    if len(known) >= len(_WORDS):
        places = (known[0], known[(len(known) - 1) // 2], known[-1])
        chosen = dict(zip(places, _WORDS, strict=True))
    looks = [BEHIND] * len(audits)
    for n, i in enumerate(chosen):
        looks[i] = look(n)
    return Crowd(looks, chosen)

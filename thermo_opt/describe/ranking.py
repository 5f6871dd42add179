"""Which of several audits may be ranked by efficiency, and why others may not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from thermo_opt.describe.quantities import number
from thermo_opt.lenses.results import Audited

_HARDLY = 0.5
"""A run whose loss fell by less than this part of the largest fall among the runs hardly trained:
it went nowhere, which costs nothing and is no efficiency."""


@dataclass(frozen=True)
class Ranking:
    """Positions of audits by efficiency.

    Attributes:
        order: The most efficient first.
        hardly: Those left out because their loss hardly fell.
        elsewhere: Those left out because they were recorded on another probe than most.
        obstacle: Why there is no ranking, in a sentence, or None.
    """

    order: list[int] = field(default_factory=list)
    hardly: list[int] = field(default_factory=list)
    elsewhere: list[int] = field(default_factory=list)
    obstacle: str | None = None


def snapshots_of(audit: Audited) -> tuple[int, ...]:
    """Step numbers of the snapshots that an audit's headline lens used."""
    steps = audit.steps
    return (*steps["step"].tolist(), int(steps["step_end"].iloc[-1]))


def coarsened(runs: Sequence[str], common: Sequence[int], unit: str) -> str:
    """A sentence: runs were compared at these snapshots, and some had recorded others too."""
    gaps = {end - start for start, end in pairwise(common)}
    every = (
        (f"every {number(gap)} {unit}s" if (gap := min(gaps)) > 1 else f"every {unit}")
        if len(gaps) == 1
        else f"at {len(common)} {unit}s, unevenly"
    )
    return (
        f"Compared at the snapshots that all runs have, {every} from {common[0]} to {common[-1]}: "
        f"{named(runs)} recorded others too, which are left out here."
    )


def named(runs: Sequence[str], most: int = 4) -> str:
    """A list of runs in a sentence, its end counted where it is long."""
    more = len(runs) - most
    return ", ".join(runs[:most]) + (f" and {more} more" if more > 0 else "")


def on_one_probe(audits: Sequence[Audited]) -> list[int]:
    """Positions of the audits on the probe that most of them have: the only ones to compare."""
    probes = [audit.probe for audit in audits]
    usual = max(probes, key=probes.count)
    return [i for i, probe in enumerate(probes) if probe == usual]


def _likelihood(audit: Audited) -> tuple[str, float] | None:
    """The output family, with its variance, that a run's losses are of; None where unknown."""
    lens = audit.lenses.get("outputs")
    start = None if lens is None else lens.start
    return None if start is None else (start.likelihood, start.sigma2)


def ranking(audits: Sequence[Audited]) -> Ranking:
    """The runs by efficiency, if they may be compared: on one probe, seen through one lens, at the
    same snapshots, on one clock, with a known efficiency and a loss that fell (§4)."""
    if len(audits) < 2:
        return Ranking()
    together = on_one_probe(audits)
    if len(together) < 2:
        return Ranking(obstacle="The runs are not ranked: each was recorded on a probe of its own.")
    if len(together) < len(audits):
        found = ranking([audits[i] for i in together])
        return Ranking(
            [together[i] for i in found.order],
            [together[i] for i in found.hardly],
            [i for i in range(len(audits)) if i not in together],
            found.obstacle,
        )
    if len({_likelihood(audit) for audit in audits}) > 1:
        return Ranking(
            obstacle=(
                "The runs are not ranked: their likelihoods differ, or each estimated a σ² of its "
                "own, so that their losses and dissipations are in different units: give one "
                "(--sigma2)."
            )
        )
    summaries = [audit.summary for audit in audits]
    if len({s["lens"] for s in summaries}) > 1 or summaries[0]["lens"] == "optimizer-state":
        return Ranking(obstacle="The runs are not ranked: not all recorded predictions on a probe.")
    if len({s["clock"] for s in summaries}) > 1:
        clocks = ", ".join(sorted({str(s["clock"]) for s in summaries}))
        return Ranking(
            obstacle=f"The runs are not ranked: they were audited on different clocks ({clocks})."
        )
    if len({s["step_unit"] for s in summaries}) > 1:
        return Ranking(
            obstacle="The runs are not ranked: some count their snapshots in steps, some in epochs."
        )
    if len({snapshots_of(audit) for audit in audits}) > 1:
        return Ranking(
            obstacle=(
                "The runs are not ranked: they were not recorded at the same steps, and what is "
                "seen less often looks more efficient."
            )
        )
    fall = [
        None
        if s["loss_start"] is None or s["loss_end"] is None
        else s["loss_start"] - s["loss_end"]
        for s in summaries
    ]
    if any(value is None for value in fall):
        return Ranking(obstacle="The runs are not ranked: their losses are unknown.")
    largest = max(value for value in fall if value is not None)
    trained = [
        i for i, value in enumerate(fall) if value is not None and value >= _HARDLY * largest > 0
    ]
    hardly = [i for i in range(len(audits)) if i not in trained]
    if len(trained) < 2:
        return Ranking(
            hardly=hardly,
            obstacle="The runs are not ranked: the loss of all but one of them hardly fell."
            if trained
            else "The runs are not ranked: their losses did not fall.",
        )
    efficiency = [s["efficiency"] for s in summaries]
    if any(efficiency[i] is None for i in trained):
        names = named([audits[i].run for i in trained if efficiency[i] is None])
        return Ranking(obstacle=f"The runs are not ranked: the efficiency of {names} is unknown.")
    order = sorted(trained, key=lambda i: -float(efficiency[i] or 0.0))
    return Ranking(order, hardly)

"""What a comparison and a front of thinned runs say, held against the same runs recorded at every
step: every sentence must be one that is known here, and true."""

import re
from dataclasses import dataclass
from itertools import pairwise

from tests.audits.claims import NUMBER, SHARE, Whole, holds, near, value

EVERY = rf"every (?:(?P<every>{NUMBER}) )?steps?"


@dataclass
class Compared:
    """Summaries of the runs as seen, by name, and what each is at every step."""

    seen: dict[str, dict]
    whole: dict[str, Whole]

    @property
    def sparse(self) -> bool:
        """Whether not every step was seen."""
        return not all(summary["every_step"] for summary in self.seen.values())

    def strides(self) -> set[float]:
        """Steps between the snapshots that were used."""
        return {summary["stride"] for summary in self.seen.values()}


def coarsened(found, runs: Compared) -> None:
    every = value(found["every"]) if found["every"] else 1
    assert runs.strides() == {every}
    for summary in runs.seen.values():
        assert summary["first_step"] == int(found["first"])
        assert summary["last_step"] == int(found["last"])
    assert set(found["names"].split(", ")) <= set(runs.seen)


def ranked(found, runs: Compared) -> None:
    assert int(found["count"]) == len(runs.seen)
    best, worst = found["best"], found["worst"]
    for run, share, loss in ((best, found["most"], "low"), (worst, found["least"], "high")):
        assert near(found[loss], runs.whole[run]["loss_end"])
        side = "at most" if found["top"] else "exact"
        assert holds(side, share, runs.whole[run]["efficiency"])
    efficiency = {run: whole["efficiency"] for run, whole in runs.whole.items()}
    if found["how"] == "is":
        assert not runs.sparse
        assert best == max(efficiency, key=efficiency.__getitem__)
        assert worst == min(efficiency, key=efficiency.__getitem__)
    else:
        assert runs.sparse
        assert found["top"]


def alike(found, runs: Compared) -> None:
    assert (found["how"] == "looks") == runs.sparse
    rounded = any(summary["rounding"] >= 0.005 for summary in runs.seen.values())
    assert rounded == (found["side"] == "about ")
    for whole in runs.whole.values():
        if not rounded:
            side = "at most" if found["side"] else "exact"
            assert holds(side, found["share"], whole["efficiency"])


def cautious(found, runs: Compared) -> None:
    assert runs.sparse


def unknown(found, runs: Compared) -> None:
    for run in found["names"].split(", "):
        assert runs.seen[run]["efficiency"] is None


def apart(found, runs: Compared) -> None:
    assert len({(s["first_step"], s["last_step"], s["steps"]) for s in runs.seen.values()}) > 1


COMPARISON = [
    (
        rf"Compared at the snapshots that all runs have, {EVERY} from (?P<first>\d+) to "
        r"(?P<last>\d+): (?P<names>[^:]+) recorded others too, which are left out here\.",
        coarsened,
    ),
    (
        rf"Of the (?P<count>\d+) runs, seen (?:about )?{EVERY}, the most efficient "
        rf"(?P<how>is|seems to be) (?P<best>[^:]+): (?P<top>at most )?(?P<most>{SHARE}) of what "
        rf"it dissipated was unavoidable, and it ended at loss (?P<low>{NUMBER})\. The least "
        rf"efficient (?:is|seems to be) (?P<worst>[^:]+): (?:at most )?(?P<least>{SHARE}), at "
        rf"loss (?P<high>{NUMBER})\. A path can be efficient and lead to a worse loss\.",
        ranked,
    ),
    (
        rf"Of the \d+ runs, seen (?:about )?{EVERY}, none (?P<how>is|looks) more efficient than "
        rf"another: (?P<side>at most |about )?(?P<share>{SHARE}) of what each dissipated was "
        r"unavoidable\.",
        alike,
    ),
    (
        r"What was undone between two snapshots is not seen: it may (?:tell them apart|reverse the "
        r"order)\.",
        cautious,
    ),
    (r"The runs are not ranked: the efficiency of (?P<names>.+) is unknown\.", unknown),
    (
        r"The runs are not ranked: they were not recorded at the same steps, and what is seen less "
        r"often looks more efficient\.",
        apart,
    ),
]
"""Every sentence that comparing these runs may bring, and what makes it true."""


@dataclass
class Fronted:
    """A front's table as in its JSON, and the lines of its runs at every step, by name."""

    rows: list[dict]
    whole: dict

    @property
    def sparse(self) -> bool:
        return not all(row["every_step"] for row in self.rows)


def nothing_beats(found, front: Fronted) -> None:
    """The front named is the one of the table, which at every step is that of the runs."""
    rows = [row for row in front.rows if near(found["target"], row["target_loss"])]
    target = rows[0]["target_loss"]
    assert bool(found["seen"]) == bool(found["about"]) == front.sparse
    missed = {row["run"] for row in rows if row["censored"]}
    assert int(found["missed"] or 0) == len(missed)
    if found["missed"]:
        assert (found["late"] == "never") != front.sparse
    reached = {row["run"]: (row["time"], row["dissipation"]) for row in rows if row["on_front"]}
    if not front.sparse:
        met = {run: line.crossing(target) for run, line in front.whole.items()}
        assert missed == {run for run, c in met.items() if not c.reached}
        cost = {run: (c.time, c.dissipation) for run, c in met.items() if c.reached}
        reached = {
            run: (t, q)
            for run, (t, q) in cost.items()
            if not any(u <= t and p <= q and (u, p) != (t, q) for u, p in cost.values())
        }
    assert set(found["names"].split(", ")) == set(reached)


def estimated(found, front: Fronted) -> None:
    assert front.sparse
    assert {value(found["apart"])} == {row["stride"] for row in front.rows}


def scaled(found, front: Fronted) -> None:
    assert len({row["least_distance"] for row in front.rows}) > 1


def unseen(found, front: Fronted) -> None:
    assert {int(found["first"])} == {row["first_step"] for row in front.rows}


FRONT = [
    (
        rf"To reach loss (?P<target>{NUMBER}), (?P<seen>at the snapshots that are seen, )?(?:no "
        r"other run is|no run is) both faster and cheaper than (?P<names>[^:]+): (?:it "
        rf"dominates|together they dominate) (?P<about>about )?{SHARE} of what the universal "
        r"frontier leaves possible(?:; (?P<missed>\d+) of \d+ runs (?P<late>never|are not seen to) "
        r"reach it)?\.",
        nothing_beats,
    ),
    (
        r"The runs start from different predictions, so each one’s dissipation is scaled by its "
        r"own D\*²\.",
        scaled,
    ),
    (COMPARISON[0][0], lambda found, front: None),
    (
        rf"Not every optimizer step was seen, the snapshots lying (?P<apart>{NUMBER}) steps? "
        r"apart: times, dissipations, efficiencies and dominated shares are estimates, and another "
        r"order is possible\.",
        estimated,
    ),
    (
        r"The first snapshot is step (?P<first>\d+): what came before it is not seen, and in no "
        r"number here\.",
        unseen,
    ),
]
"""Every sentence that a front of these runs may bring, and what makes it true."""


def check_cells(found: list[str], row: dict, target: float, line) -> None:
    """Time, dissipation, least distance and efficiency of a front's row as printed."""
    time, spent, least, efficiency = found
    assert near(least, line.start.least_distance(target))
    if row["every_step"]:
        met = line.crossing(target)
        if met.reached:
            assert near(time, met.time)
            assert near(spent, met.dissipation)
            share = met.least_distance**2 / (2 * met.time * met.dissipation)
            assert near(efficiency, share)
        else:
            assert (time[0], spent[0], efficiency) == (">", ">", "–")
    elif row["censored"]:
        assert (time, spent, efficiency) == ("–", "–", "–")
    else:
        assert all(cell.startswith("≈ ") for cell in (time, spent, efficiency))
        # what is read between snapshots is a path that exists: the frontier binds it, too
        assert row["dissipation"] * row["time"] >= 0.5 * row["least_distance"] ** 2 * (1 - 1e-9)


def tables(text: str) -> list[list[list[str]]]:
    """The tables of what the terminal showed, each a list of rows, its header first."""
    lines = [line.rstrip() for line in text.splitlines()]
    found = []
    for above, ruled in pairwise(range(len(lines))):
        if lines[ruled].startswith("──"):
            end = next((k for k in range(ruled, len(lines)) if not lines[k]), len(lines))
            found.append(
                [
                    re.split(r"\s{2,}", row.strip())
                    for row in [lines[above], *lines[ruled + 1 : end]]
                ]
            )
    return found


def check_all(text: str, known: list, runs) -> None:
    """Each sentence is known and true."""
    text = re.sub("[ \n]+", " ", text)
    while text := text.strip():
        for pattern, true in known:
            if found := re.match(pattern, text):
                true(found, runs)
                text = text[found.end() :]
                break
        else:
            raise AssertionError(f"what makes this true? {text[:200]}")

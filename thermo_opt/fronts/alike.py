"""Runs of one front must be alike in what their losses and distances are of: probe, unit of steps,
likelihood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from thermo_opt.errors import InputError
from thermo_opt.fronts.trajectory import Trajectory


def _likelihood(track: Trajectory) -> str:
    variance = f" (σ² = {track.start.sigma2:g})" if track.start.log_p_y is None else ""
    return track.start.likelihood + variance


_FEATURES: tuple[tuple[str, Callable[[Trajectory], str], str], ...] = (
    ("probe", lambda track: track.probe or "none", "record or replay them on one probe"),
    ("unit of steps", lambda track: track.step_unit, "compare them apart"),
    (
        "likelihood",
        _likelihood,
        "losses of different likelihoods can't be compared; a σ² that each run estimates of its "
        "own is made one by giving it (--sigma2)",
    ),
)
"""What, how it is read, and the remedy where runs differ in it."""
_LETTERS = 24
"""Of a fingerprint or a likelihood that are shown."""


def refuse_unlike(tracks: Sequence[Trajectory]) -> None:
    """InputError where runs differ, naming those that aren't like the majority."""
    for what, of, remedy in _FEATURES:
        same(what, [track.run for track in tracks], [of(track) for track in tracks], remedy)


def like_most(
    tracks: Sequence[Trajectory],
) -> tuple[list[Trajectory], list[tuple[Trajectory, str]]]:
    """The runs that are like most of them, and each of the others with the reason; all where at
    most one would stay."""
    kept, others = list(tracks), []
    for what, of, remedy in _FEATURES:
        usual = _usual([of(track) for track in kept])
        for track in [track for track in kept if of(track) != usual]:
            own, most = of(track)[:_LETTERS], usual[:_LETTERS]
            reason = f"its {what} is {own}, that of most runs {most}: {remedy}"
            others.append((track, reason))
        kept = [track for track in kept if of(track) == usual]
    return (kept, others) if len(kept) > 1 else (list(tracks), [])


def seen_in_time(
    tracks: Sequence[Trajectory], target_loss: float
) -> tuple[list[Trajectory], list[tuple[Trajectory, str]]]:
    """The runs whose first snapshot comes before another run has met the target, and each of the
    others with the reason: a front begins where all of its runs are seen."""
    kept, late = list(tracks), []
    while len(kept) > 1:
        begin = max(int(track.steps[0]) for track in kept)
        met = next(
            (t for t in kept if t.loss[0] > target_loss >= t.loss[t.steps <= begin].min()), None
        )
        last = [track for track in kept if track.steps[0] == begin]
        if met is None or len(last) == len(kept):
            break
        late += [
            (
                track,
                f"its first snapshot is {track.step_unit} {begin}, when {met.run} had met the "
                f"target loss {target_loss:g}",
            )
            for track in last
        ]
        kept = [track for track in kept if track not in last]
    return kept, late


def same(what: str, names: Sequence[str], values: Sequence[str], remedy: str) -> None:
    """Refuse runs that differ in something, naming those that aren't like the majority."""
    if len(set(values)) < 2:
        return
    usual = _usual(values)
    other = [
        f"{name} ({value[:_LETTERS]})"
        for name, value in zip(names, values, strict=True)
        if value != usual
    ]
    rest = next(name for name, value in zip(names, values, strict=True) if value == usual)
    listed = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
    raise InputError(f"{listed} and {rest} ({usual[:_LETTERS]}) differ in their {what}: {remedy}")


def _usual(values: Sequence[str]) -> str:
    """The value that most have, of equally many the first."""
    return Counter(values).most_common(1)[0][0]

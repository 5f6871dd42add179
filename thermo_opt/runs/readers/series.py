"""Which of many checkpoint files make one series, and the step of each: what stands beside it is
left out, and said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thermo_opt.errors import InputError
from thermo_opt.runs.readers.steps import increasing, numbers_in

_ALONE = frozenset(["best", "last", "latest", "final", "current", "newest"])
"""Words of names that repeat another checkpoint, or the last one."""
_AVERAGED = frozenset(["ema", "swa", "avg", "averaged", "shadow"])


@dataclass
class Candidate:
    """A checkpoint that may belong to the series: its path, its name without suffix, and the step
    its content counts.
    """

    path: Path
    stem: str
    count: Callable[[], tuple[int, str] | None] = field(default=lambda: None, repr=False)


@dataclass
class Series:
    """The series: ``(step, candidate)`` in order, the unit of its steps, where they were read, and
    what was left out.
    """

    members: list[tuple[int, Candidate]]
    unit: str
    source: str
    remarks: list[str]


def series(
    folder: Path, candidates: Sequence[Candidate], same: Callable[[Candidate, Candidate], bool]
) -> Series:
    """The checkpoints of one run among ``candidates``, each with its step (from its content, else
    from its name).

    ``same`` tells whether two of them hold the same weights: then one counts. Raises `InputError`
    when no steps can be told, several series are there, or two different checkpoints claim one
    step.
    """
    main, beside = _main(folder, candidates)
    names = numbers_in([candidate.stem for candidate in main])
    counts = _counts(main, names.numbers)
    remarks: list[str] = []
    if counts is not None and increasing([count for count, _ in counts], names.numbers):
        steps, unit = [count for count, _ in counts], "step"
        source = f"{counts[-1][1]} in each checkpoint"
        for candidate in list(beside):
            found = candidate.count()
            if found is not None and found[1] == counts[-1][1] and found[0] not in steps:
                steps.append(found[0])
                main = [*main, candidate]
                beside.remove(candidate)
    else:
        unnamed = [
            candidate
            for candidate, number in zip(main, names.numbers, strict=True)
            if number is None
        ]
        beside += unnamed
        main = [
            candidate
            for candidate, number in zip(main, names.numbers, strict=True)
            if number is not None
        ]
        steps = [number for number in names.numbers if number is not None]
        if not main:
            raise InputError(
                f"{unnamed[0].path}: there is no step number in its name; rename it like "
                f"step-100{unnamed[0].path.suffix}"
            )
        if counts is not None and len({count for count, _ in counts}) == len(counts):
            remarks.append(
                f"the counts in its files ({counts[-1][1]}) don't grow with the numbers in their "
                "names, which were followed: were files renamed or swapped?"
            )
        unit = names.unit or "step"
        source = (
            "the number after the word in each name" if names.unit else "the number in each name"
        )
        if names.unit == "epoch":
            remarks.append("its checkpoints are numbered by epoch: time is counted in epochs")
        elif names.unit is None:
            remarks.append(
                "its checkpoints' names don't say what their numbers count: they are taken for "
                "steps"
            )
    kept: dict[int, Candidate] = {}
    for step, candidate in sorted(
        zip(steps, main, strict=True), key=lambda pair: (pair[0], pair[1].path.name)
    ):
        if step in kept and not same(kept[step], candidate):
            raise InputError(
                f"{kept[step].path} and {candidate.path} both hold step {step}, with different "
                "weights; if they are of several runs, give each run a folder of its own, else "
                "move one of them elsewhere"
            )
        kept.setdefault(step, candidate)
    if beside:
        shown = ", ".join(candidate.path.name for candidate in beside[:3])
        remarks.append(f"left out beside the series: {shown}{', …' if len(beside) > 3 else ''}")
    return Series(list(kept.items()), unit, source, remarks)


def _main(folder: Path, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """The checkpoints whose names make a series, and the others."""
    families: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault(_family(candidate.stem), []).append(candidate)
    aside = _ALONE | _AVERAGED
    plain = {name: members for name, members in families.items() if not _words(name) & aside}
    numbered = {name: members for name, members in plain.items() if "#" in name} or {
        name: members for name, members in families.items() if "#" in name
    }
    long = {name: members for name, members in numbered.items() if len(members) > 1}
    taken: set[int | None] = set()
    for name, members in long.items():
        numbers = set(numbers_in([member.stem for member in members]).numbers)
        if taken & numbers:
            raise InputError(
                f"{folder} holds several series of checkpoints ({', '.join(sorted(long)[:4])}); "
                f"move {name} or the other to a folder of its own"
            )
        taken |= numbers
    main = [member for members in long.values() for member in members]
    for members in numbered.values():  # such as init-0 before model-1, model-2, …
        if len(members) == 1:
            (number,) = numbers_in([members[0].stem]).numbers
            if number not in taken:
                main, taken = [*main, *members], taken | {number}
    main = main or [c for c in candidates if not _words(c.stem) & _ALONE] or list(candidates)
    chosen = {id(member) for member in main}
    return main, [candidate for candidate in candidates if id(candidate) not in chosen]


def _family(stem: str) -> str:
    return re.sub(r"\d+(?:[.,]\d+)?(?:e[+-]?\d+)?", "#", re.sub(r"[-_]v\d+$", "", stem.lower()))


def _words(stem: str) -> set[str]:
    return set(re.findall(r"[a-z]+", stem.lower()))


def _counts(
    main: Sequence[Candidate], numbers: Sequence[int | None]
) -> list[tuple[int, str]] | None:
    """The step counts in the contents. Where the first, middle and last of many agree with their
    names, the names serve.
    """
    places = sorted(
        {0, len(main) // 2, len(main) - 1}, key=lambda i: (numbers[i] is None, numbers[i] or 0)
    )
    sample = [(main[i].count(), numbers[i]) for i in places]
    if all(found is None for found, _ in sample):
        return None
    if len(main) > 64 and all(found is not None and found[0] == number for found, number in sample):
        return None
    found = [candidate.count() for candidate in main]
    return (
        None
        if any(count is None for count in found)
        else [count for count in found if count is not None]
    )

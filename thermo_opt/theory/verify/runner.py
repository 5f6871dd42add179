"""Run claims, and their mutants, and say what held."""

from __future__ import annotations

import difflib
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from thermo_opt.errors import InputError
from thermo_opt.theory.flow import NotConverged
from thermo_opt.theory.verify.claims import CLAIMS, Claim
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.mutants import MUTANTS, Mutant
from thermo_opt.theory.verify.verdict import Verdict

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Rejection:
    """What a claim made of a wrong twin: ``rejected`` when at least one of its checks failed;
    ``by`` is the first that did.
    """

    claim: str
    mutant: str
    rejected: bool
    by: str | None
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def claim_names() -> list[str]:
    """Names of all claims, in the order in which they run."""
    return list(CLAIMS)


def describe(name: str) -> str:
    """What the claim says, in one sentence: the first paragraph of its docstring."""
    return " ".join((_named(name).__doc__ or "").split("\n\n")[0].split())


def run_claims(
    names: Iterable[str] | None = None, seed: int = 0, progress: Progress | None = None
) -> list[Verdict]:
    """Check the named claims and return one `Verdict` per comparison.

    Each claim draws from its own generator, seeded by ``seed`` and its name, so results don't
    depend on which others run. A solver that gives up yields "not established", never "holds".

    Args:
        names: of claims, see `claim_names`; default: all.
        seed: of all random problems.
        progress: called with each claim's name before it starts.

    Raises:
        InputError: for an unknown name, suggesting the nearest.
    """
    chosen = _chosen(names)
    verdicts: list[Verdict] = []
    for name in chosen:
        if progress:
            progress(name)
        verdicts += _run(name, CLAIMS[name], Ingredients(), seed)
    return verdicts


def run_mutants(
    names: Iterable[str] | None = None, seed: int = 0, progress: Progress | None = None
) -> list[Rejection]:
    """Run every wrong twin of the named claims through its claim, which should reject it.

    Args:
        names: of claims, see `claim_names`; default: all.
        seed: of all random problems.
        progress: called with each claim's name before it starts.

    Raises:
        InputError: for an unknown claim.
    """
    chosen = set(_chosen(names))
    results = []
    for mutant in MUTANTS:
        if mutant.claim not in chosen:
            continue
        if progress:
            progress(f"{mutant.claim}: {mutant.name}")
        results.append(_reject(mutant, seed))
    return results


def _reject(mutant: Mutant, seed: int) -> Rejection:
    begun = time.perf_counter()
    verdicts = _run(mutant.claim, CLAIMS[mutant.claim], mutant.ingredients, seed)
    by = next((f"{v.problem}: {v.statement}" for v in verdicts if v.verdict == "fails"), None)
    return Rejection(
        mutant.claim, mutant.name, by is not None, by, seed, time.perf_counter() - begun
    )


def _run(name: str, claim: Claim, use: Ingredients, seed: int) -> list[Verdict]:
    begun = time.perf_counter()
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    try:
        checks = claim(use, rng)
    except NotConverged as error:
        seconds = time.perf_counter() - begun
        return [
            Verdict(name, "", str(error), None, "=", None, None, "not established", seed, seconds)
        ]
    seconds = time.perf_counter() - begun
    return [
        Verdict(
            name,
            c.problem,
            c.statement,
            c.predicted,
            c.relation,
            c.measured,
            c.tolerance,
            "holds" if c.holds else "fails",
            seed,
            seconds,
        )
        for c in checks
    ]


def _chosen(names: Iterable[str] | None) -> list[str]:
    wanted = list(names or [])
    for name in wanted:
        _named(name)
    return wanted or list(CLAIMS)


def _named(name: str) -> Claim:
    if name not in CLAIMS:
        near = difflib.get_close_matches(name, CLAIMS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(CLAIMS)}"
        raise InputError(f"there is no claim {name!r}; {hint}")
    return CLAIMS[name]

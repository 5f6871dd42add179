"""When to take a snapshot: every so many steps, or at steps spaced evenly on a logarithmic
scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import TypeAlias

from thermo_opt.errors import InputError

Every: TypeAlias = int | Callable[[int], bool]


def log_spaced(per_decade: int = 10) -> Callable[[int], bool]:
    """A schedule for ``every=``, dense early and sparse late.

    True at the steps round(10^{j/per_decade}), j = 0, 1, …: a run of T steps takes at most
    per_decade·log₁₀ T + 1 snapshots.

    Args:
        per_decade: snapshots per factor of ten.

    Raises:
        InputError: unless ``per_decade`` is a positive whole number.
    """
    if not isinstance(per_decade, int) or isinstance(per_decade, bool) or per_decade < 1:
        raise InputError(f"log_spaced: per_decade is {per_decade!r}; give a positive whole number")

    def is_due(step: int) -> bool:
        exponent = per_decade * math.log10(step)
        return any(
            round(10 ** (j / per_decade)) == step
            for j in (math.floor(exponent), math.ceil(exponent))
        )

    return is_due


def schedule(every: Every) -> Callable[[int], bool]:
    """``every`` as a function of the step number (from 1); raises `InputError` for anything but a
    positive int or a callable.
    """
    if callable(every):
        return every
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise InputError(
            f"every is {every!r}; give a positive whole number of steps or a function of the step"
        )
    interval = int(every)
    return lambda step: step % interval == 0

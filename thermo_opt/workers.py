"""Work shared out over processes, through joblib; inside `cluster.on_cluster` over a cluster's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_SAFE = "PYTHONSAFEPATH"


def in_processes(calls: Iterable[Any], jobs: int, *, ordered: bool = True) -> Iterator[Any]:
    """Results of calls made by joblib's ``delayed``, each as soon as it is there.

    Worker processes start without the working directory on their path: a folder that one stands in
    may be a stranger's run, and a ``numpy.py`` lying there must not be imported.

    Args:
        calls: what to call, ``delayed(function)(arguments)`` each.
        jobs: processes; -1: one per core.
        ordered: results in the order of the calls, rather than of their ends.
    """
    from joblib import Parallel

    order = "generator" if ordered else "generator_unordered"
    with _without_working_directory():
        yield from Parallel(n_jobs=jobs, return_as=order)(calls)


def send_by_value(module: ModuleType) -> None:
    """Have a module's classes and functions sent to other processes whole, since those can't import
    it."""
    names = ["cloudpickle", "joblib.externals.cloudpickle"]  # joblib's own before 1.6
    for name in [*names, *(["ray.cloudpickle"] if "ray" in sys.modules else [])]:
        try:
            import_module(name).register_pickle_by_value(module)
        except ImportError:
            continue


@contextmanager
def _without_working_directory() -> Iterator[None]:
    """Python processes started inside don't put the working directory on their path."""
    before = os.environ.get(_SAFE)
    os.environ[_SAFE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SAFE, None)
        else:
            os.environ[_SAFE] = before

"""Work shared out over the machines of a Dask cluster that runs already, through joblib's backend.

In Python joblib alone does the same: ``with joblib.parallel_config(backend="dask"):`` around a call
with ``jobs=-1``.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from thermo_opt.errors import InputError, first_line

if TYPE_CHECKING:
    from distributed import Client

_ADDRESS = re.compile(r"dask://[^/\s]+:\d+/?")


def existing(paths: Iterable[Path | None]) -> list[Path]:
    """Those of the paths that this machine has: of others the work itself says what is wrong."""
    return [path for path in paths if path is not None and path.exists()]


@contextmanager
def on_cluster(address: str | None, paths: Sequence[Path] = ()) -> Iterator[None]:
    """Have `thermo_opt.workers.in_processes` use a cluster instead of processes of this machine.

    The cluster's workers need the same packages, and the runs under the same paths (a shared
    folder). A worker that dies costs nothing but the time of its work, which another one repeats.

    Args:
        address: ``dask://HOST:PORT`` of a scheduler; None: nothing changes.
        paths: absolute paths that the work reads.

    Raises:
        InputError: the address is of another form, ``distributed`` isn't installed, nothing
            answers there, or its machines can't do the work: no workers, several threads in one,
            other versions, or paths that they don't see.
    """
    if address is None:
        yield
        return
    if not _ADDRESS.fullmatch(address):
        raise InputError(
            f"--cluster {address}: write dask://HOST:PORT, the address of a scheduler that runs "
            "already"
        )
    try:
        from distributed import Client
    except ImportError:
        raise InputError("--cluster needs Dask: pip install 'thermo-opt[dask]'") from None
    try:
        client = Client(address.rstrip("/").replace("dask://", "tcp://"), timeout=5)
    except (OSError, TimeoutError) as error:
        raise InputError(
            f"--cluster {address}: nothing answers there ({first_line(error)})"
        ) from None
    from joblib import parallel_config

    with client, parallel_config(backend="dask"):
        _check(client, address, [str(path) for path in paths])
        yield


def _check(client: Client, address: str, paths: Sequence[str]) -> None:
    """Refuse a cluster whose machines can't do the same work as this process."""
    threads = client.nthreads()
    if not threads:
        raise InputError(f"--cluster {address}: it has no workers; start some with 'dask worker'")
    if (most := max(threads.values())) > 1:
        raise InputError(
            f"--cluster {address}: a worker has {most} threads, which would share one random "
            "state and one gradient mode: start workers with --nthreads 1"
        )
    try:
        found = [*client.run(_seen, paths).values(), client.run_on_scheduler(_seen, paths)]
    except Exception as error:  # whatever it is that isn't installed there
        raise InputError(
            f"--cluster {address}: its machines can't import thermo-opt ({first_line(error)}): "
            "install it there, and on the scheduler's machine too"
        ) from None
    ours, _ = _seen([])
    for versions, missing in found:
        for name, version in versions.items():
            if version != ours[name]:
                raise InputError(
                    f"--cluster {address}: it has {name} {version} and this process {ours[name]}: "
                    "install the same version on all machines"
                )
        if missing:
            raise InputError(
                f"--cluster {address}: its machines don't see {missing[0]}: put it in a folder "
                "that all of them have under this path"
            )


def _seen(paths: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Versions on this machine, and which of the paths it lacks."""
    from importlib.metadata import version

    import numpy
    import torch

    versions = {
        "Python": platform.python_version(),
        "thermo-opt": version("thermo-opt"),
        "torch": str(torch.__version__),
        "NumPy": numpy.__version__,
    }
    return versions, [path for path in paths if not Path(path).exists()]

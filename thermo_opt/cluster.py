"""Work shared out over the machines of a Dask cluster that runs already, through joblib's backend.

In Python joblib alone does the same: ``with joblib.parallel_config(backend="dask"):`` around a call
with ``jobs=-1``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from thermo_opt.errors import InputError, first_line

_ADDRESS = re.compile(r"dask://[^/\s]+:\d+/?")


@contextmanager
def on_cluster(address: str | None) -> Iterator[None]:
    """Have `thermo_opt.workers.in_processes` use a cluster instead of processes of this machine.

    The cluster's workers need the same packages, and the runs under the same paths (a shared
    folder). A worker that dies costs nothing but the time of its work, which another one repeats.

    Args:
        address: ``dask://HOST:PORT`` of a scheduler; None: nothing changes.

    Raises:
        InputError: the address is of another form, ``distributed`` isn't installed, or nothing
            answers there.
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
        yield

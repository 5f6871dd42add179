"""Work shared out over the machines of a Dask or Ray cluster that runs already, through joblib's
backends.

In Python joblib alone does the same: ``with joblib.parallel_config(backend="dask"):`` around a call
with ``jobs=-1``.
"""

from __future__ import annotations

import logging
import platform
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thermo_opt.errors import InputError, first_line

_ADDRESS = re.compile(r"(dask|ray)://([^/\s]+:\d+)/?")
_AGAIN = 3
"""How often Ray begins anew what a dead worker was doing; Dask's own number is 3, too."""
Seen = tuple[dict[str, str], list[str]]


def existing(paths: Iterable[Path | None]) -> list[Path]:
    """Those of the paths that this machine has: of others the work itself says what is wrong."""
    return [path for path in paths if path is not None and path.exists()]


@contextmanager
def on_cluster(address: str | None, paths: Sequence[Path] = ()) -> Iterator[None]:
    """Have `thermo_opt.workers.in_processes` use a cluster instead of processes of this machine.

    The cluster's workers need the same packages, and the runs under the same paths (a shared
    folder). A worker that dies costs nothing but the time of its work, which another one repeats.

    Args:
        address: ``dask://HOST:PORT`` of a scheduler, or ``ray://HOST:PORT`` of a Ray cluster's
            head, one of whose machines this is; None: nothing changes.
        paths: absolute paths that the work reads.

    Raises:
        InputError: the address is of another form, its library isn't installed, nothing answers
            there, or its machines can't do the work: no workers, several threads in one, other
            versions, or paths that they don't see.
    """
    if address is None:
        yield
        return
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise InputError(
            f"--cluster {address}: write dask://HOST:PORT, the address of a scheduler that runs "
            "already, or ray://HOST:PORT, that of a Ray cluster's head"
        )
    kind, place = found.groups()
    with (_dask if kind == "dask" else _ray)(address, place, [str(path) for path in paths]):
        yield


@contextmanager
def _dask(address: str, place: str, paths: Sequence[str]) -> Iterator[None]:
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            f"--cluster {address} needs Dask: pip install 'thermo-opt[dask]'"
        ) from None
    try:
        client = Client(f"tcp://{place}", timeout=5)
    except (OSError, TimeoutError) as error:
        raise InputError(
            f"--cluster {address}: nothing answers there ({first_line(error)})"
        ) from None
    from joblib import parallel_config

    with client, parallel_config(backend="dask"):
        threads = client.nthreads()
        if not threads:
            raise InputError(
                f"--cluster {address}: it has no workers; start some with 'dask worker'"
            )
        if (most := max(threads.values())) > 1:
            raise InputError(
                f"--cluster {address}: a worker has {most} threads, which would share one random "
                "state and one gradient mode: start workers with --nthreads 1"
            )
        try:
            found = [*client.run(_seen, paths).values(), client.run_on_scheduler(_seen, paths)]
        except Exception as error:  # whatever it is that isn't installed there
            raise _not_importable(address, error) from None
        _check(found, address)
        yield


@contextmanager
def _ray(address: str, place: str, paths: Sequence[str]) -> Iterator[None]:
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise InputError(f"--cluster {address} needs Ray: pip install 'thermo-opt[ray]'") from None
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--cluster {address}: nothing answers there ({first_line(error)})"
        ) from None
    mine = not ray.is_initialized()
    try:
        if mine:
            ray.init(place, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of the cluster, of gRPC, or ConnectionError
        raise InputError(
            f"--cluster {address}: no Ray cluster could be joined there ({first_line(error)}): "
            "give the address that 'ray start' printed, on one of the cluster's machines"
        ) from None
    from joblib import parallel_config, register_parallel_backend

    try:
        seen = ray.remote(_seen)
        nodes = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        ]
        if not nodes:
            raise InputError(
                f"--cluster {address}: it has no processors free to work; start machines with 'ray "
                "start --address'"
            )
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        try:
            found = ray.get([seen.options(scheduling_strategy=s).remote(paths) for s in there])
        except Exception as error:  # as of Dask
            raise _not_importable(address, error) from None
        _check(found, address)
        register_parallel_backend("ray tasks", _ray_tasks())
        with parallel_config(backend="ray tasks"):
            yield
    finally:
        if mine:
            ray.shutdown()


def _ray_tasks() -> Any:
    """A class of joblib's backends that makes each call a task of Ray, which runs it again when its
    worker dies; Ray's own backend for joblib keeps workers of a pool and doesn't."""
    import ray
    from joblib.parallel import ParallelBackendBase

    work = ray.remote(max_retries=_AGAIN)(_called)

    class RayTasks(ParallelBackendBase):
        supports_retrieve_callback = supports_return_generator = True
        default_n_jobs = -1

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(1, int(ray.cluster_resources().get("CPU", 1)))

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = work.remote(func).future()
            if callback is not None:
                future.add_done_callback(callback)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            return out.result()

    return RayTasks


def _called(work: Any) -> Any:
    return work()


def _not_importable(address: str, error: BaseException) -> InputError:
    return InputError(
        f"--cluster {address}: its machines can't import thermo-opt ({first_line(error)}): "
        "install it there, and on the scheduler's machine too"
    )


def _check(found: Iterable[Seen], address: str) -> None:
    """Refuse a cluster whose machines can't do the same work as this process."""
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


def _seen(paths: Sequence[str]) -> Seen:
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

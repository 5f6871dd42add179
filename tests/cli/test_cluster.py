"""The same tables from the workers of a cluster as from this process, whatever happens to them."""

import os
import platform
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from tests.cli.cluster_commands import RUNS, printed, swept
from thermo_opt.cli import main
from thermo_opt.cluster import on_cluster
from thermo_opt.errors import InputError
from thermo_opt.lenses import path


@pytest.fixture(scope="module", name="scheduler")
def _scheduler():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("command", [["pareto", *RUNS], ["audit", RUNS[0], "--lens", "outputs"]])
def test_a_cluster_gives_the_same_numbers(command, scheduler, capsys):
    address = scheduler.replace("tcp://", "dask://")
    here = printed([*command, "--json"], capsys)
    assert printed([*command, "--json", "--cluster", address], capsys) == here


def test_a_worker_that_is_killed_in_the_middle_loses_nothing(scheduler, tmp_path):
    def kill():
        while not list((tmp_path / "there").glob("*/*")):
            time.sleep(0.02)
        with Client(scheduler) as client:
            pids = client.run(os.getpid)
        os.kill(next(iter(pids.values())), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    there = swept(tmp_path / "there", "--cluster", scheduler.replace("tcp://", "dask://"))
    killer.join()
    pd.testing.assert_frame_equal(there, swept(tmp_path / "here"))


def test_relative_paths_and_several_segments(scheduler, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "run").mkdir()
    labels = np.arange(4) % 3
    noise = rng.normal(size=(1 + 2 * path._SEGMENT + 3, 4, 3))
    logits = (0.02 * noise + 0.01 * np.eye(3)[labels]).cumsum(axis=0)
    np.savez(tmp_path / "run" / "all.npz", logits=logits, labels=labels)
    monkeypatch.chdir(tmp_path)  # where the workers, started before, don't stand
    address = scheduler.replace("tcp://", "dask://")
    for command in (["audit", "run", "--lens", "outputs"], ["pareto", "run"]):
        here = printed([*command, "--json"], capsys)
        assert printed([*command, "--json", "--cluster", address], capsys) == here


def refused(address, said, *paths):
    scheme = address.replace("tcp://", "dask://")
    with pytest.raises(InputError, match=said), on_cluster(scheme, paths):
        pass


def test_a_cluster_that_can_not_do_the_same_work_is_refused(scheduler, monkeypatch):
    refused(scheduler, "don't see /nowhere/run", Path("/nowhere/run"))
    monkeypatch.setattr(platform, "python_version", lambda: "another")
    refused(scheduler, "and this process another: install the same version")


@pytest.mark.parametrize(("workers", "said"), [(0, "no workers"), (1, "--nthreads 1")])
def test_workers_with_threads_or_none_are_refused(workers, said):
    options = {"threads_per_worker": 2, "dashboard_address": ":0"}
    with LocalCluster(n_workers=workers, **options) as cluster:
        refused(cluster.scheduler_address, said)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("dask://", "write dask://HOST:PORT"),
        ("slurm://here:1", "write dask://HOST:PORT"),
        ("dask://127.0.0.1:9", "nothing answers there"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address, said, capsys):
    assert main(["pareto", *RUNS, "--cluster", address]) == 2
    assert said in capsys.readouterr().err

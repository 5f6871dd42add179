"""The same tables from the workers of a cluster as from this process, whatever happens to them."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from distributed import Client, LocalCluster

from thermo_opt.cli import main

DATA = Path(__file__).parents[2] / "data"

RUNS = [str(DATA / name) for name in ("digits-sgd", "digits-sgd-momentum", "digits-adam")]
SWEEP = """
output = "{}"

[task]
name = "blobs"

[pareto]
target_loss = [1.0]

[training]
seeds = [0, 1, 2]
steps = 40
batch_size = 64
every = 4

[[method]]
name = "SGD"
optimizer = "SGD"
grid = {{ lr = [0.03, 0.1] }}
"""


@pytest.fixture(scope="module", name="scheduler")
def _scheduler():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def printed(arguments, capsys):
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", [["pareto", *RUNS], ["audit", RUNS[0], "--lens", "outputs"]])
def test_a_cluster_gives_the_same_numbers(command, scheduler, capsys):
    address = scheduler.replace("tcp://", "dask://")
    here = printed([*command, "--json"], capsys)
    assert printed([*command, "--json", "--cluster", address], capsys) == here


def test_a_worker_that_is_killed_in_the_middle_loses_nothing(scheduler, tmp_path):
    def swept(name, *options):
        config = tmp_path / f"{name}.toml"
        config.write_text(SWEEP.format((tmp_path / name).as_posix()))
        assert main(["sweep", str(config), *options]) == 0
        table = pd.read_csv(tmp_path / name / "table.csv")
        return table.drop(columns=[column for column in table if "seconds" in column])

    def kill():
        while not list((tmp_path / "there").glob("*/*")):
            time.sleep(0.02)
        with Client(scheduler) as client:
            pids = client.run(os.getpid)
        os.kill(next(iter(pids.values())), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    there = swept("there", "--cluster", scheduler.replace("tcp://", "dask://"))
    killer.join()
    pd.testing.assert_frame_equal(there, swept("here"))


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

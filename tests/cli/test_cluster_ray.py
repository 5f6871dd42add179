"""The same tables from the machines of a Ray cluster as from this process."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from thermo_opt.cli import main

ray = pytest.importorskip("ray")

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


@pytest.fixture(scope="module", name="address")
def _address():
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1)
    yield f"ray://{cluster.address}"
    cluster.shutdown()


def printed(arguments, capsys):
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_ray_gives_the_same_numbers(address, capsys):
    for command in (["pareto", *RUNS], ["audit", RUNS[0], "--lens", "outputs"]):
        here = printed([*command, "--json"], capsys)
        assert printed([*command, "--json", "--cluster", address], capsys) == here


def test_a_worker_of_ray_that_is_killed_loses_nothing(address, tmp_path):
    import psutil

    def swept(name, *options):
        config = tmp_path / f"{name}.toml"
        config.write_text(SWEEP.format((tmp_path / name).as_posix()))
        assert main(["sweep", str(config), *options]) == 0
        table = pd.read_csv(tmp_path / name / "table.csv")
        return table.drop(columns=[column for column in table if "seconds" in column])

    killed = []

    def kill():
        while not list((tmp_path / "there").glob("*/*")):
            time.sleep(0.02)
        while not killed:
            for process in psutil.Process().children(recursive=True):
                if process.cmdline()[:1] == ["ray::_called"] and not killed:
                    killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    there = swept("there", "--cluster", address)
    killer.join()
    assert killed
    pd.testing.assert_frame_equal(there, swept("here"))


def test_no_ray_there(capsys):
    assert main(["pareto", *RUNS, "--cluster", "ray://127.0.0.1:9"]) == 2
    assert "nothing answers there" in capsys.readouterr().err

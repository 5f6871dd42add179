"""The same tables from the machines of a Ray cluster as from this process."""

import os
import signal
import threading
import time

import pandas as pd
import pytest

from tests.cli.cluster_commands import RUNS, printed, swept
from thermo_opt.cli import main

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", name="address")
def _address():
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1)
    yield f"ray://{cluster.address}"
    cluster.shutdown()


def test_ray_gives_the_same_numbers(address, capsys):
    for command in (["pareto", *RUNS], ["audit", RUNS[0], "--lens", "outputs"]):
        here = printed([*command, "--json"], capsys)
        assert printed([*command, "--json", "--cluster", address], capsys) == here


def test_a_worker_of_ray_that_is_killed_loses_nothing(address, tmp_path):
    import psutil

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
    there = swept(tmp_path / "there", "--cluster", address)
    killer.join()
    assert killed
    pd.testing.assert_frame_equal(there, swept(tmp_path / "here"))


def test_no_ray_there(capsys):
    assert main(["pareto", *RUNS, "--cluster", "ray://127.0.0.1:9"]) == 2
    assert "nothing answers there" in capsys.readouterr().err

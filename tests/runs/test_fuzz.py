"""Runs of every layout with one file damaged at random are read or refused, and nothing else."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.fuzz import make_seeds, trial

LAYOUTS = (
    *("own", "torch", "lightning", "safetensors", "folders", "distributed", "huggingface"),
    *("predictions-npz", "predictions-pkl", "predictions-csv", "predictions-pt"),
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**31))
def test_a_damaged_run_is_read_or_refused(seeds, tmp_path, layout, seed):
    verdict, done = trial(seeds, layout, seed, tmp_path)
    assert not verdict.startswith("FAILED"), f"seed {seed}: {verdict}: {done}"

"""The command that sets sketches beside whole predictions, on a small vocabulary."""

import sys

import pytest

import thermo_opt as to
from analysis import sketch
from thermo_opt.manifold.sketch import relative_error

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_every_number_of_a_sketched_language_model_is_within_its_error(tmp_path):
    for side in sketch.SIDES:
        sketch.record(side, tmp_path / side, vocabulary=300, tokens=128, snapshots=4, width=32)
    pair = [to.audit(tmp_path / side, lens="outputs").summary for side in sketch.SIDES]
    error = relative_error(32, 1)
    rows = sketch.compared(*pair, error)
    assert {"dissipation", "distance", "loss_end", "least_distance"} <= {r["value"] for r in rows}
    assert all(row["within"] for row in rows)
    wrong = sketch.compared({**pair[0], "dissipation": 3 * pair[1]["dissipation"]}, pair[1], error)
    assert [row["value"] for row in wrong if not row["within"]] == ["dissipation"]
    assert sketch.peak() > 2**24

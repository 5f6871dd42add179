"""The command that audits runs larger than memory, on runs that are not."""

import sys

import pytest

from analysis import large

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("kind", large.LENSES)
def test_every_snapshot_is_audited_and_memory_is_told(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(large, "CLASSES", 50)
    monkeypatch.setattr(large, "SIDES", (20, 30))
    row = large.measured(kind, tmp_path, 500_000)
    assert row["snapshots audited"] == row["snapshots"] > 2
    assert 0.02 < row["anonymous GB"] < 1
    assert not (tmp_path / kind).exists()

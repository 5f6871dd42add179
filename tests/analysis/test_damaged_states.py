"""Damaged states of NGD-T are refused with nothing changed, or read as they were written."""

import pytest

from analysis.damaged_states import KINDS, saved_state, trial


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_is_refused_or_read_as_it_was_written(kind):
    saved = saved_state(kind)
    verdicts = [trial(kind, saved, seed) for seed in range(10_000, 10_012)]
    assert {verdict for verdict, _ in verdicts} <= {"refused", "loaded"}, verdicts
    assert "refused" in {verdict for verdict, _ in verdicts}

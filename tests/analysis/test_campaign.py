"""Fault campaigns: what is interrupted at random ends right, and what is wrong is counted."""

import pytest

from analysis import campaign
from analysis.__main__ import main


@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_recording_that_is_interrupted_at_random_is_readable_and_resumes(kind):
    (row,) = campaign.campaign(kind, 4, 0, ["recorder"])
    assert (row["tried"], row["wrong"]) == (4, 0), row["first"]


def test_what_is_wrong_is_counted_and_named(monkeypatch):
    def forgetful(folder, reference):
        raise ValueError("torn")

    subject = campaign.Subject(lambda folder: (folder / "file").write_text("x"), forgetful)
    monkeypatch.setitem(campaign.SUBJECTS, "forgetful", subject)
    (row,) = campaign.campaign("kill", 2, 0, ["forgetful"])
    assert (row["wrong"], row["first"]) == (2, "ValueError: torn")


def test_an_unknown_subject_is_refused(capsys):
    assert main(["campaign", "kill", "--subjects", "printer"]) == 2
    assert "subject 'printer' is unknown" in capsys.readouterr().err

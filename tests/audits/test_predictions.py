"""Predictions of any library, in memory or in files, give the audit of the same recorded run."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

import thermo_opt as to

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, 40)
Z = np.cumsum(RNG.normal(size=(6, 40, 3)) * 0.3 + 0.4 * np.eye(3)[Y], axis=0)
STEPS = np.arange(6) * 5


@pytest.fixture(scope="module", name="expected")
def _expected():
    return to.audit_predictions(Z, Y, steps=STEPS).summary


@pytest.mark.parametrize(
    ("predictions", "kind"),
    [
        (torch.tensor(Z), "logits"),
        (list(Z), "logits"),
        ((z for z in Z), "logits"),
        (softmax(Z, axis=-1), "probabilities"),
        (log_softmax(Z, axis=-1), "log-probabilities"),
    ],
)
def test_arrays_tensors_and_iterators_agree(expected, predictions, kind):
    got = to.audit_predictions(predictions, Y, steps=STEPS, kind=kind).summary
    for key in ("dissipation", "length", "distance", "least_distance", "loss_end", "efficiency"):
        assert got[key] == pytest.approx(expected[key], rel=1e-9), key
    assert got["stride"] == 5
    assert not got["every_step"]


def write(folder, layout):
    folder.mkdir()
    if layout == "npz":
        np.savez(folder / "all.npz", logits=Z, labels=Y, steps=STEPS)
    elif layout == "npy":
        np.save(folder / "logits.npy", Z)
        np.save(folder / "targets.npy", Y)
        np.save(folder / "steps.npy", STEPS)
    for step, z in zip(STEPS, Z, strict=True):
        if layout == "npz each":
            np.savez(folder / f"step_{step}.npz", logits=z, targets=Y)
        elif layout == "pt each":
            named = {"probs": torch.tensor(softmax(z, axis=-1)), "y": torch.tensor(Y)}
            torch.save(named, folder / f"preds-step{step}.pt")
    return folder


@pytest.mark.parametrize("layout", ["npz", "npy", "npz each", "pt each"])
def test_files_agree_with_memory(tmp_path, expected, layout):
    got = to.audit(write(tmp_path / "run", layout)).summary
    for key in ("dissipation", "length", "least_distance", "loss_end", "stride"):
        assert got[key] == pytest.approx(expected[key], rel=1e-9), (layout, key)


def test_without_step_numbers_nothing_is_said_of_single_steps():
    s = to.audit_predictions(Z, Y).summary
    assert (s["step_unit"], s["every_step"], s["alignment_lower"]) == ("snapshot", False, None)


def test_gaussian_means_and_scikit_learn():
    from sklearn.datasets import load_iris
    from sklearn.linear_model import SGDClassifier

    x, y = load_iris(return_X_y=True)
    model = SGDClassifier(loss="log_loss", random_state=0, alpha=1.0)
    seen = []
    for _ in range(5):
        model.partial_fit(x, y, classes=[0, 1, 2])
        seen.append(model.predict_proba(x))
    s = to.audit_predictions(seen, y, kind="probabilities", name="iris").summary
    assert s["run"] == "iris"
    assert 0 < s["distance"] <= s["length"]
    mean = to.audit_predictions(Z[..., 0], Z[-1, :, 0] + 0.1, kind="mean", sigma2=0.25).summary
    assert mean["distance"] == pytest.approx(np.sqrt(np.mean((Z[-1] - Z[0])[:, 0] ** 2) / 0.25))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"predictions": Z[:1], "targets": Y}, "two moments"),
        ({"predictions": Z, "targets": Y, "steps": [0, 1]}, "2 steps for 6 predictions"),
        ({"predictions": Z, "targets": Y, "steps": [0, 2, 1, 3, 4, 5]}, "must increase"),
        ({"predictions": Z, "targets": Y, "kind": "odds"}, "use one of"),
        ({"predictions": [Z[0], Z[1, :9]], "targets": Y}, "same examples"),
        ({"predictions": 3}, "give an array"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments, words):
    with pytest.raises(to.InputError, match=words):
        to.audit_predictions(**arguments)

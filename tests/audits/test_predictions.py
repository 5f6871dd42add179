"""Predictions of any library, in memory or in files, give the audit of the same recorded run."""

import numpy as np
import pandas as pd
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


def test_targets_may_be_given_for_each_snapshot(expected):
    close(to.audit_predictions(Z, np.tile(Y, (6, 1)), steps=STEPS).summary, expected)
    with pytest.raises(to.InputError, match="don't fit"):
        to.audit_predictions(Z, np.stack([np.roll(Y, k) for k in range(6)]))


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
        ({"predictions": {"a": Z[0]}}, "one array per snapshot"),
        ({"predictions": Z, "steps": 5}, "whole numbers"),
        ({"predictions": Z[:, :0], "targets": Y[:0]}, "hold nothing"),
        ({"predictions": Z, "targets": Y + 1}, "count from 0"),
        ({"predictions": Z, "targets": np.array(["a", "b", "c"])[Y]}, "give class numbers"),
        ({"predictions": Z, "steps": ["a"] * 6}, "whole numbers"),
        ({"predictions": Z, "steps": [0, 0.5, 1, 2, 3, 4]}, "whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments, words):
    with pytest.raises(to.InputError, match=words):
        to.audit_predictions(**arguments)


def per_epoch(folder, **arrays):
    """A file for each snapshot, named by its step."""
    folder.mkdir()
    for k, step in enumerate(STEPS):
        np.savez(folder / f"step_{step}.npz", **{name: a[k] for name, a in arrays.items()})
    return folder


def close(got, expected):
    for key in ("dissipation", "length", "distance", "loss_end", "stride"):
        assert got[key] == pytest.approx(expected[key], rel=1e-9), key


@pytest.mark.parametrize("layout", ["npy each", "counted", "counted pt", "beside", "table", "rows"])
def test_other_files_of_the_same_predictions(tmp_path, expected, layout):
    if layout == "counted":
        arrays = {"logits": Z, "y": np.tile(Y, (6, 1)), "step": STEPS}
        folder = per_epoch(tmp_path / "run", **arrays)
        for k, step in enumerate(STEPS):  # the count in the file, not the number in the name
            (folder / f"step_{step}.npz").rename(folder / f"part{k}.npz")
    elif layout == "beside":
        folder = per_epoch(tmp_path / "run", logits=Z)
        np.save(folder / "labels.npy", Y)
    else:
        (folder := tmp_path / "run").mkdir()
    if layout == "npy each":
        np.save(folder / "targets.npy", Y)
        for step, z in zip(STEPS, Z, strict=True):
            np.save(folder / f"logits_step{step}.npy", z)
    elif layout == "counted pt":
        for k, (step, z) in enumerate(zip(STEPS, Z, strict=True)):
            content = {"logits": torch.tensor(z), "labels": torch.tensor(Y), "step": int(step)}
            torch.save(content, folder / f"epoch{k}.pt")
    elif layout == "table":
        rows = [
            {"step": step, "example": i, "logits": z[i], "label": Y[i]}
            for step, z in zip(STEPS, Z, strict=True)
            for i in RNG.permutation(len(Y))  # which example a row is, says the table
        ]
        pd.DataFrame(rows).to_parquet(folder / "all.parquet")
    elif layout == "rows":
        np.savez(folder / "all.npz", logits=Z, labels=np.tile(Y, (6, 1)), steps=STEPS)
    close(to.audit(folder).summary, expected)


def test_weights_and_masks_in_files_are_used(tmp_path):
    kept = np.arange(40) % 4 > 0
    expected = to.audit_predictions(Z[:, kept], Y[kept], steps=STEPS).summary
    for name in ("weights", "sample_weight", "attention_mask"):
        (folder := tmp_path / name).mkdir()
        arrays = {"logits": Z, "labels": Y, "steps": STEPS, name: kept.astype(int), "odd": Y}
        np.savez(folder / "all.npz", **arrays)
        got = to.audit(folder)
        close(got.summary, expected)
        assert "arrays that nothing uses: odd" in got.summary["notes"]


@pytest.mark.parametrize("known", ["labels", "ids"])
def test_rows_in_another_order_are_refused(tmp_path, known):
    orders = np.stack([RNG.permutation(40) for _ in STEPS])
    rows = np.take_along_axis(Z, orders[..., None], axis=1)
    names = Y[orders] if known == "labels" else orders
    with pytest.raises(to.InputError, match="same order"):
        to.audit(per_epoch(tmp_path / "each", logits=rows, **{known: names}))
    (folder := tmp_path / "all").mkdir()
    np.savez(folder / "all.npz", logits=rows, **{known: names})
    with pytest.raises(to.InputError, match="same order"):
        to.audit(folder)


def test_one_moment_alone_is_refused(tmp_path):
    np.savez(tmp_path / "epoch_3.npz", logits=Z[0], labels=Y)
    with pytest.raises(to.InputError, match="two snapshots or more"):
        to.audit(tmp_path)


def test_what_was_declared_is_what_the_note_says(tmp_path):
    np.savez(tmp_path / "all.npz", probs=softmax(Z, axis=-1), labels=Y)
    assert any("taken for class probabilities" in n for n in to.audit(tmp_path).summary["notes"])

"""Predictions under other names, in other forms and kinds of files give the same audit."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax, softmax

import thermo_opt as to

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, 40)
Z = np.cumsum(RNG.normal(size=(4, 40, 3)) * 0.3 + 0.4 * np.eye(3)[Y], axis=0)
P = softmax(Z, axis=-1)
STEPS = np.arange(4) * 5
EXPECTED = to.audit_predictions(Z, Y, steps=STEPS).summary


def check(folder, loss=True):
    got = to.audit(folder).summary
    for key in ("dissipation", "length", "distance", *(["loss_end"] if loss else [])):
        # what isn't a step number counts snapshots: Q is per unit of time
        scale = 5 / got["stride"] if key == "dissipation" else 1
        assert got[key] == pytest.approx(EXPECTED[key] * scale, rel=1e-6), key
    return got


@pytest.mark.parametrize(
    "name",
    [
        *("step0000{}.npy", "step_{}.npy", "{}.npy", "preds_{}.npy", "val_logits_ep{}.npy"),
        *("epoch{}_logits.npy", "logits_{}.pt", "epoch_{}.pt"),
    ],
)
def test_one_bare_array_per_file(tmp_path, name):
    for k, z in enumerate(Z):
        file = tmp_path / name.format(k)
        np.save(file, z) if file.suffix == ".npy" else torch.save(torch.tensor(z), file)
    if name.endswith("pt"):
        torch.save(torch.tensor(Y), tmp_path / "labels.pt")
    else:
        np.save(tmp_path / "y_test.npy", Y)
    got = check(tmp_path)
    assert got["step_unit"] == {"s": "step", "v": "epoch", "e": "epoch"}.get(name[0], "snapshot")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        *((name, Z) for name in ("arr_0", "preds", "outputs", "y_pred", "val_logits", "scores")),
        *((name, P) for name in ("softmax", "y_proba", "predict_proba")),
        ("logProbs", log_softmax(Z, -1)),
    ],
)
def test_other_names_of_arrays(tmp_path, name, array):
    for step, a in zip(STEPS, array, strict=True):
        labels = "arr_1" if name == "arr_0" else "y_true"
        np.savez(tmp_path / f"step_{step}.npz", **{name: a, labels: Y})
    got = check(tmp_path)
    unsaid = f"its predictions are what its files call {name}" in got["notes"]
    assert unsaid == (name in ("arr_0", "preds", "outputs", "y_pred", "scores"))


T, LABELS = [torch.tensor(z) for z in Z], torch.tensor(Y)
ONE_FILE = {
    "list": [*T],
    "stack": torch.stack(T),
    "numbers": dict(enumerate(T)),
    "epochs": {f"epoch_{k}": z for k, z in enumerate(T)},
    "lists": {"logits": T, "labels": LABELS},
    "split": {"val": {"logits": torch.stack(T), "labels": LABELS}},
    "records": [{"epoch": k, "logits": z, "labels": LABELS} for k, z in enumerate(T)],
    "nested": {f"epoch_{k}": {"logits": z, "labels": LABELS} for k, z in enumerate(T)},
}


@pytest.mark.parametrize("form", ONE_FILE)
@pytest.mark.parametrize("kind", ["torch", "pickle", "protocol 5"])
def test_one_file_for_all_epochs(tmp_path, form, kind):
    def arrays(tree):
        if isinstance(tree, torch.Tensor):
            return tree.numpy()
        if isinstance(tree, dict):
            return {key: arrays(value) for key, value in tree.items()}
        return [arrays(value) for value in tree] if isinstance(tree, list) else tree

    if kind == "torch":
        torch.save(ONE_FILE[form], tmp_path / "val_logits.pt")
    else:
        with open(tmp_path / "val_logits.pkl", "wb") as file:
            protocol = 5 if kind == "protocol 5" else 4
            pickle.dump(arrays(ONE_FILE[form]), file, protocol=protocol)
    np.save(tmp_path / "labels.npy", Y)
    check(tmp_path)


@pytest.mark.parametrize("names", ["arr", "epoch_{}", "logits_{}"])
def test_one_npz_of_numbered_arrays(tmp_path, names):
    if names == "arr":
        np.savez(tmp_path / "all.npz", *Z)
    else:
        np.savez(tmp_path / "all.npz", **{names.format(k): z for k, z in enumerate(Z)}, labels=Y)
    check(tmp_path, loss=names != "arr")


def table(k, columns, array):
    frame = pd.DataFrame({column: array[k][:, j] for j, column in enumerate(columns)})
    return frame.assign(label=Y, id=range(40), step=STEPS[k]).sample(frac=1, random_state=k)


def write(frame, file):
    if file.suffix == ".csv":
        frame.to_csv(file)
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=True, double_precision=15)


@pytest.mark.parametrize(
    ("columns", "array"),
    [
        (["logit_0", "logit_1", "logit_2"], Z),
        (["prob_class_1", "prob_class_2", "prob_class_3"], P),
        (["p0", "p1", "p2"], P),
        (["prob_cat", "prob_dog", "prob_hen"], P),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_tables_with_a_column_for_each_class(tmp_path, columns, array, suffix):
    frame = pd.concat([table(k, columns, array) for k in range(4)], ignore_index=True)
    write(frame, tmp_path / f"preds.{suffix}")
    check(tmp_path)


def test_one_file_may_be_given_by_its_own_path(tmp_path):
    np.savez(tmp_path / "first.npz", logits=Z, steps=STEPS)
    np.savez(tmp_path / "second.npz", preds=2 * Z, steps=STEPS)
    np.save(tmp_path / "labels.npy", Y)
    got = check(tmp_path / "first.npz")
    assert (got["run"], got["stride"]) == ("first", 5)
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "model.pt")
    for name in ("model.pt", "labels.npy"):
        assert "is a file, and not one of predictions" in refused(tmp_path / name)
    torch.save({"logits": []}, tmp_path / "step_1.pt")
    assert "'logits' is empty" in refused(tmp_path / "step_1.pt")


def test_lines_of_json_with_lists(tmp_path):
    rows = [
        {"step": int(step), "example": i, "logits": z[i].tolist(), "label": int(Y[i])}
        for step, z in zip(STEPS, Z, strict=True)
        for i in range(40)
    ]
    (tmp_path / "preds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check(tmp_path)


def refused(folder):
    with pytest.raises(to.InputError) as error:
        to.audit(folder)
    return str(error.value)


def test_what_is_not_predictions_is_refused_with_a_remedy(tmp_path):
    for name in ("objects", "hard", "probabilities", "weights", "log", "megatron"):
        (tmp_path / name).mkdir()
    rows = np.array([None, *Z], dtype=object)
    np.save(tmp_path / "objects/logits.npy", rows, allow_pickle=True)
    assert "numpy.stack" in refused(tmp_path / "objects")
    for k in range(3):
        np.savez(tmp_path / f"hard/epoch_{k}.npz", y_pred=Z[k].argmax(-1), y_true=Y)
        np.savez(tmp_path / f"probabilities/epoch_{k}.npz", y_pred=P[k], y_true=Y)
        np.savez(tmp_path / f"weights/step_{k}.npz", w=Z[k], b=Z[k, 0])
    assert "logits or the probabilities" in refused(tmp_path / "hard")
    assert "--kind probabilities" in refused(tmp_path / "probabilities")
    to.audit(tmp_path / "probabilities", kind="probabilities")
    assert "call the arrays logits" in refused(tmp_path / "weights")
    pd.DataFrame({"step": range(5), "loss": 1.0, "mean": 0.3}).to_csv(tmp_path / "log/metrics.csv")
    assert "logit_0, logit_1" in refused(tmp_path / "log")
    (place := tmp_path / "megatron/iter_0000010/mp_rank_00").mkdir(parents=True)
    torch.save({"model": {}}, place / "model_optim_rng.pt")
    assert "Megatron" in refused(tmp_path / "megatron")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_labels_that_are_text_and_files_that_are_large_are_refused(tmp_path, suffix, monkeypatch):
    from thermo_opt.runs.readers import named_arrays

    columns = ["prob_cat", "prob_dog", "prob_hen"]
    frame = pd.concat([table(k, columns, P) for k in range(4)], ignore_index=True)
    frame["label"] = np.array(["cat", "dog", "hen"])[frame["label"]]
    write(frame, tmp_path / f"preds.{suffix}")
    assert "give class numbers" in refused(tmp_path)
    if suffix != "parquet":
        monkeypatch.setattr(named_arrays, "LIMIT", 1000)
        assert "read at once" in refused(tmp_path)


@pytest.mark.parametrize("at", [0, 1])
def test_a_path_that_is_not_finite_says_which_examples(tmp_path, at):
    wrong = Z.copy()
    wrong[at, 3] = np.nan
    np.savez(tmp_path / "all.npz", logits=wrong, labels=Y, steps=STEPS)
    said = refused(tmp_path)
    assert f"1 of 40 examples at step {STEPS[at]}" in said
    assert "leave out" in said


@pytest.mark.parametrize(
    ("shape", "said"), [((5, 4, 4, 4), "axis 1 is taken"), ((5, 4, 4), "the last axis is taken")]
)
def test_an_axis_of_classes_that_shapes_do_not_tell_is_said(tmp_path, shape, said):
    z, y = RNG.normal(size=(3, *shape)), RNG.integers(0, 4, shape[:-1])
    notes = to.audit_predictions(z, y).summary["notes"]
    assert any(said in note for note in notes)
    np.savez(tmp_path / "all.npz", logits=z, labels=y)
    assert any(said in note for note in to.audit(tmp_path).summary["notes"])
    told = to.audit_predictions(RNG.normal(size=(3, 5, 4, 6, 6)), np.ones((5, 6, 6), int))
    assert not any("axis" in note for note in told.summary["notes"])


def test_predictions_beside_a_series_of_checkpoints_are_not_the_run(tmp_path):
    for k in range(3):
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"model-{k}.pt")
    np.savez(tmp_path / "predictions.npz", logits=Z[0], labels=Y)
    assert to.load_run(tmp_path).format == "torch"


@pytest.mark.parametrize("inner", ["model", "checkpoint", "anything"])
def test_a_model_one_folder_deeper(tmp_path, inner):
    for k in (0, 10, 20):
        (place := tmp_path / f"ckpts/iter_{k}" / inner).mkdir(parents=True)
        torch.save(torch.nn.Linear(4, 3).state_dict(), place / "weights.pth")
    run = to.load_run(tmp_path)
    assert (run.format, [s.step for s in run.snapshots]) == ("folders", [0, 10, 20])
    assert set(run.snapshots[0].layout) == {"params/weight", "params/bias"}


def test_a_tensor_can_not_be_changed_by_its_pickle(tmp_path):
    from thermo_opt.runs.torch_file import TorchFile, restricted

    class Changed:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (), {"shape": (10**9,)}

    with pytest.raises(to.InputError):
        restricted(pickle.dumps(Changed()), tmp_path / "x")
    file = tmp_path / "array.pkl"
    file.write_bytes(pickle.dumps(np.array([1.0, None], dtype=object)))
    assert TorchFile(file).content.array is None

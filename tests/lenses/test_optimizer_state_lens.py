"""The optimizer-state lens against a float64 computation from the recorded files, and its
invariances (§9)."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thermo_opt as to
from thermo_opt import thermodynamics as td
from thermo_opt.errors import InputError
from thermo_opt.fisher.optimizer_state import step_scalars
from thermo_opt.runs.format import write_tensors


def flat(snapshot, group):
    return np.concatenate(
        [t.double().numpy().ravel() for _, t in sorted(snapshot.load_group(group).items())]
    )


def straightforward(run, batch_size, indices):
    """Summary of the lens from dense float64 vectors, step by step as §9 writes it."""
    shots = [run.snapshots[i] for i in indices]
    theta = np.stack([flat(s, "params") for s in shots])
    delta = np.diff(theta, axis=0)
    b1, b2 = run.info.betas
    t = np.array([s.step for s in shots[1:]])[:, None]
    m = np.stack([flat(s, "exp_avg") for s in shots[1:]]) / (1 - b1**t)
    v = np.stack([flat(s, "exp_avg_sq") for s in shots[1:]]) / (1 - b2**t)
    metric = v if batch_size is None else batch_size * np.maximum(v - m**2, 0) + m**2
    a, d = np.sum(metric * delta**2, axis=1), -np.sum(m * delta, axis=1)
    dual = np.sum(np.divide(m**2, metric, out=np.zeros_like(m), where=metric > 0), axis=1)
    tau = np.diff([s.step for s in shots]).astype(float)
    q = a / (2 * tau)
    geodesic = np.linalg.norm(np.sum(np.sqrt(metric) * delta, axis=0))
    epsilon = d * np.abs(d) / (a * dual)
    length, time = np.sum(np.sqrt(a)), tau.sum()
    return {
        "dissipation": q.sum(),
        "length": length,
        "distance": geodesic,
        "irreducible": geodesic**2 / (2 * time),
        "detour": (length**2 - geodesic**2) / (2 * time),
        "pacing": q.sum() - length**2 / (2 * time),
        "straightness": geodesic**2 / length**2,
        "steadiness": length**2 / (2 * q.sum() * time),
        "efficiency": geodesic**2 / (2 * q.sum() * time),
        "alignment": np.average(epsilon, weights=q),
    }


@pytest.mark.parametrize("stride", [1, 4])
def test_every_summary_key_against_dense_float64(adam_run, stride):
    run = to.load_run(adam_run)
    indices = sorted({*range(0, 38, stride), 37})
    expected = straightforward(run, 20, indices)
    got = to.audit(run, lens="optimizer-state", stride=stride)
    for key, value in expected.items():
        assert got.summary[key] == pytest.approx(value, rel=1e-6), key
    assert got.summary["distance"] <= got.summary["length"]
    assert got.summary["least_distance"] is None


def test_without_a_batch_size_only_ratios_are_known(adam_run, tmp_path, make_run):
    path = make_run(tmp_path / "unknown", batch_size=None)
    run = to.load_run(path)
    expected = straightforward(run, None, range(38))
    s = to.audit(run, lens="optimizer-state").summary
    for key in ("straightness", "steadiness", "efficiency", "alignment"):
        assert s[key] == pytest.approx(expected[key], rel=1e-6), key
    for key in ("dissipation", "length", "distance", "irreducible", "detour", "pacing"):
        assert s[key] is None, key
    assert any("batch size unknown" in note for note in s["notes"])
    known = to.audit(run, lens="optimizer-state", batch_size=20).summary
    assert known["dissipation"] == pytest.approx(
        to.audit(adam_run, lens="optimizer-state").summary["dissipation"]
    )


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_ratios_do_not_change_when_the_metric_is_scaled(seed, scale):
    rng = np.random.default_rng(seed)
    theta = torch.tensor(np.cumsum(rng.normal(size=(6, 30)), axis=0))
    m, v = torch.tensor(rng.normal(size=(5, 30))), torch.tensor(rng.uniform(0.1, 2, size=(5, 30)))
    ratios = []
    for factor in (1.0, scale):
        u = torch.zeros(30, dtype=torch.float64)
        steps = [
            step_scalars(
                theta[k], theta[k + 1], m[k], factor * v[k], bias1=1.0, bias2=1.0, developed=u
            )
            for k in range(5)
        ]
        a, d, delta = (np.array([getattr(s, key) for s in steps]) for key in ("a", "d", "delta"))
        parts = td.decompose(a, 1.0, float(u.norm()))
        ratios.append([parts.straightness, parts.steadiness, *td.alignment(a, d, delta)])
    assert np.allclose(*ratios, rtol=1e-9)


def test_sgd_has_no_moments_and_the_audit_says_so(sgd_run):
    audit = to.audit(sgd_run)
    assert "moments" in audit.missing["optimizer-state"]
    with pytest.raises(InputError, match="moments"):
        to.audit(sgd_run, lens="optimizer-state")


def test_a_damaged_tensor_is_named_though_it_is_read_in_pieces(adam_run, tmp_path):
    copy = shutil.copytree(adam_run, tmp_path / "copy")
    for group in ("params", "exp_avg", "exp_avg_sq"):
        file = copy / "snapshots" / "00000011.safetensors"
        whole = file.read_bytes()
        tensor = to.load_run(copy).snapshots[11].load(f"{group}/0.weight")
        at = whole.index(tensor.numpy().tobytes())
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(
            InputError, match=rf"00000011\.safetensors is damaged: '{group}/0\.weight'"
        ):
            to.audit(copy, lens="optimizer-state")
        file.write_bytes(whole)
    to.audit(copy, lens="optimizer-state")


def test_moments_of_another_shape_are_named(adam_run, tmp_path):
    copy = shutil.copytree(adam_run, tmp_path / "copy")
    snapshot = to.load_run(copy).snapshots[5]
    tensors = {name: snapshot.load(name) for name in snapshot.names()} | {
        "exp_avg/0.weight": torch.zeros(6, 8)
    }
    moments = json.dumps(snapshot.moments_meta())
    write_tensors(snapshot.path, tensors, {"step": "5", "moments": moments})
    with pytest.raises(
        InputError, match=r"00000005\.safetensors: exp_avg/0\.weight has shape \(6, 8\)"
    ):
        to.audit(copy, lens="optimizer-state")


def test_the_number_of_torch_threads_stays(adam_run):
    threads = torch.get_num_threads()
    to.audit(adam_run, lens="optimizer-state")
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *seen] == [threads] * 2

"""The optimizer-state lens against a float64 computation from the recorded files, and its
invariances (§9)."""

import json
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thermo_opt as to
from thermo_opt import thermodynamics as td
from thermo_opt.describe.quantities import number
from thermo_opt.errors import InputError
from thermo_opt.fisher.optimizer_state import step_scalars
from thermo_opt.runs.format import write_tensors


def flat(snapshot, group):
    return np.concatenate(
        [t.double().numpy().ravel() for _, t in sorted(snapshot.load_group(group).items())]
    )


def straightforward(run, batch_size, indices):
    """What the lens says, from dense float64 vectors, step by step as §9 writes it."""
    shots = [run.snapshots[i] for i in indices]
    theta = np.stack([flat(s, "params") for s in shots])
    delta = np.diff(theta, axis=0)
    b1, b2 = run.info.betas
    t = np.array([s.step for s in shots[1:]])[:, None]
    m = np.stack([flat(s, "exp_avg") for s in shots[1:]]) / (1 - b1**t)
    v = np.stack([flat(s, "exp_avg_sq") for s in shots[1:]]) / (1 - b2**t)
    metric = batch_size * np.maximum(v - m**2, 0) + m**2
    a, d = np.sum(metric * delta**2, axis=1), -np.sum(m * delta, axis=1)
    dual = np.sum(np.divide(m**2, metric, out=np.zeros_like(m), where=metric > 0), axis=1)
    tau = np.diff([s.step for s in shots]).astype(float)
    q = a / (2 * tau)
    straight = np.linalg.norm(np.sum(np.sqrt(metric) * delta, axis=0))
    length, time = np.sum(np.sqrt(a)), tau.sum()
    return {
        "adam_straightness": straight**2 / length**2,
        "adam_steadiness": length**2 / (2 * q.sum() * time),
        "adam_alignment": np.average(d * np.abs(d) / (a * dual), weights=q),
    }


@pytest.mark.parametrize("stride", [1, 4])
def test_its_numbers_against_dense_float64(adam_run, stride):
    run = to.load_run(adam_run)
    expected = straightforward(run, 20, sorted({*range(0, 38, stride), 37}))
    got = to.audit(run, lens="optimizer-state", stride=stride).summary
    if stride > 1:  # alignment is of a step
        expected.pop("adam_alignment")
        assert got["adam_alignment_lower"] is got["adam_alignment_upper"] is None
    for key, value in expected.items():
        assert got[f"{key}_lower"] == got[f"{key}_upper"] == pytest.approx(value, rel=1e-6), key


FISHER_KEYS = [
    "dissipation",
    "length",
    "distance",
    "least_distance",
    "irreducible",
    "detour",
    "pacing",
    "straightness",
    "steadiness",
    "efficiency",
    "alignment",
    "alignment_lower",
    "alignment_upper",
    "downhill_lower",
    "uphill_upper",
]


def test_it_says_nothing_under_the_names_of_the_fisher_metric(adam_run):
    audit = to.audit(adam_run, lens="optimizer-state")
    assert {audit.summary[key] for key in FISHER_KEYS} == {None}
    assert not {"a", "d", "delta_lower", "dissipation", "alignment_lower"} & set(audit.steps)
    assert audit.steps["adam_share_lower"].sum() == pytest.approx(1)


def test_without_a_batch_size_it_gives_a_range_over_plausible_ones(tmp_path, make_run):
    run = to.load_run(make_run(tmp_path / "unknown", batch_size=None))
    each = [straightforward(run, size, range(38)) for size in (1, 32, 1024, 32768)]
    s = to.audit(run, lens="optimizer-state").summary
    for key in each[0]:
        assert s[f"{key}_lower"] == pytest.approx(min(e[key] for e in each), rel=1e-6)
        assert s[f"{key}_upper"] == pytest.approx(max(e[key] for e in each), rel=1e-6)
    assert any("batch size unknown" in note and "tokens" in note for note in s["notes"])
    true = to.audit(run, lens="optimizer-state", batch_size=20).summary
    for key in each[0]:
        assert s[f"{key}_lower"] - 0.01 <= true[f"{key}_lower"] <= s[f"{key}_upper"] + 0.01


def test_beside_a_probe_it_says_how_far_it_is_off(adam_run, small_model):
    audit = to.audit(adam_run, model=small_model())
    note = next(n for n in audit.lenses["optimizer-state"].summary["notes"] if "is off" in n)
    assert f"where the probe says {number(audit.summary['straightness'], 2)}" in note
    low, high = re.search(r"where the probe certifies ([\d.]+) to ([\d.]+)", note).groups()
    bracket = next(s for s in audit.summaries if s["lens"] == "parameters")
    assert bracket["alignment_lower"] - 0.011 < float(low) <= bracket["alignment_lower"]
    assert bracket["alignment_upper"] <= float(high) < bracket["alignment_upper"] + 0.011


def test_recorded_clipping_and_accumulation_are_said(tmp_path, make_run):
    path = make_run(tmp_path / "clipped")
    header = json.loads((path / "run.json").read_text())
    header["notes"] = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 4}
    (path / "run.json").write_text(json.dumps(header))
    notes = to.audit(path, lens="optimizer-state").summary["notes"]
    assert any("gradient_clip_val = 1.0, accumulate_grad_batches = 4" in note for note in notes)


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

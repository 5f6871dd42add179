"""The outputs lens against a straightforward float64 computation from the recorded files, and the
inequalities of §4-5."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

import thermo_opt as to
from thermo_opt.errors import InputError


def recorded(run: to.Run):
    """All predictions and targets of a run, float64."""
    z = np.stack([s.load("probe/logits").double().numpy() for s in run.snapshots])
    return z, run.probe.targets.numpy()


def distance(p, q):
    """sqrt(mean_i (2 arccos Σ √(p q))²), as written in §4."""
    return np.sqrt(np.mean((2 * np.arccos(np.clip(np.sum(np.sqrt(p * q), axis=-1), 0, 1))) ** 2))


def straightforward(z, y, tau):
    """Every summary key of the outputs lens, the long way round."""
    p = softmax(z, axis=-1)
    rows = np.arange(len(y))
    loss = -log_softmax(z, axis=-1)[:, rows, y].mean(axis=1)
    a = np.array([distance(p[k], p[k + 1]) ** 2 for k in range(len(p) - 1)])
    q = np.sum(a / (2 * tau))
    length, time, d = np.sum(np.sqrt(a)), np.sum(tau), distance(p[0], p[-1])
    phi = np.arccos(np.sqrt(p[0][rows, y]))

    def shrunk(mu):
        return np.array(
            [
                brentq(lambda x, f=f: x + mu * np.tan(x) - f, 0, f, xtol=1e-15, rtol=1e-14)
                for f in phi
            ]
        )

    def excess(log_mu):
        return np.mean(-2 * np.log(np.cos(shrunk(np.exp(log_mu))))) - loss[-1]

    frontier = 2 * np.sqrt(
        np.mean((phi - shrunk(np.exp(brentq(excess, -20, 20, xtol=1e-14)))) ** 2)
    )
    # first-order decrease along the geodesic, and the χ² certificate
    decrease = []
    for k in range(len(a)):
        cos = np.sum(np.sqrt(p[k] * p[k + 1]), axis=-1)
        theta = np.arccos(np.clip(cos, 0, 1))
        tangent = (
            (np.sqrt(p[k + 1][rows, y]) - cos * np.sqrt(p[k][rows, y])) * theta / np.sin(theta)
        )
        decrease.append(np.mean(2 * tangent / np.sqrt(p[k][rows, y])))
    chi2 = np.mean(1 / p[:-1, rows, y] - 1, axis=1)
    inner = np.array(decrease) * np.abs(decrease) / (a * chi2)
    sign = np.sign(decrease)
    weights = a / (2 * tau) / q
    return {
        "duration": time,
        "steps": len(a),
        "loss_start": loss[0],
        "loss_end": loss[-1],
        "dissipation": q,
        "length": length,
        "distance": d,
        "least_distance": frontier,
        "irreducible": d**2 / (2 * time),
        "detour": (length**2 - d**2) / (2 * time),
        "pacing": q - length**2 / (2 * time),
        "straightness": d**2 / length**2,
        "steadiness": length**2 / (2 * q * time),
        "efficiency": d**2 / (2 * q * time),
        "alignment_lower": np.sum(weights * np.minimum(inner, sign)),
        "alignment_upper": np.sum(weights * np.maximum(inner, sign)),
    }


@pytest.mark.parametrize("clock", ["step", "flow", "examples"])
def test_every_summary_key_against_a_dense_float64_computation(adam_run, clock):
    run = to.load_run(adam_run)
    z, y = recorded(run)
    tau = {"step": 1.0, "flow": 2e-2, "examples": 20.0}[clock] * np.ones(len(z) - 1)
    got = to.audit(run, lens="outputs", clock=clock).summary
    for key, value in straightforward(z, y, tau).items():
        assert got[key] == pytest.approx(value, rel=1e-6), key
    assert got["alignment"] is None
    assert got["lens"] == "outputs"
    assert got["clock"] == clock
    assert got["stride"] == 1


def test_chain_of_inequalities_and_parts(adam_run, sgd_run):
    for path in (adam_run, sgd_run):
        s = to.audit(path, lens="outputs").summary
        assert (
            s["least_distance"]
            <= s["distance"]
            <= s["length"]
            <= np.sqrt(2 * s["dissipation"] * s["duration"])
        )
        assert s["irreducible"] + s["detour"] + s["pacing"] == pytest.approx(
            s["dissipation"], rel=1e-12
        )
        assert s["efficiency"] == pytest.approx(s["straightness"] * s["steadiness"], rel=1e-12)


def test_stride_sees_only_every_mth_snapshot_and_the_last(adam_run):
    run = to.load_run(adam_run)
    z, y = recorded(run)
    index = [*range(0, 37, 5), 37]
    got = to.audit(run, lens="outputs", stride=5).summary
    for key, value in straightforward(z[index], y, np.diff(index).astype(float)).items():
        if "alignment" in key:  # it is of a step
            assert got[key] is None
        else:
            assert got[key] == pytest.approx(value, rel=1e-6), key
    assert got["stride"] == 5
    assert not got["every_step"]


def test_coarse_curves_match_their_own_strided_audits(adam_run):
    whole = to.audit(adam_run, lens="outputs").headline.coarse
    assert whole["stride"].tolist() == [1, 2, 4, 8, 16, 32]
    for row in whole.itertuples():
        strided = to.audit(adam_run, lens="outputs", stride=row.stride).summary
        assert row.length == pytest.approx(strided["length"], rel=1e-12)
        assert row.dissipation == pytest.approx(strided["dissipation"], rel=1e-12)
    assert np.all(np.diff(whole["length"]) <= 1e-12)
    assert np.all(np.diff(whole["dissipation"]) <= 1e-12)


def test_long_runs_walk_in_segments_and_processes_alike(tmp_path_factory, make_run):
    path = make_run(tmp_path_factory.mktemp("long") / "run", steps=150, params=False, moments=False)
    run = to.load_run(path)
    one, two = (to.audit(run, lens="outputs", jobs=jobs) for jobs in (1, 2))
    assert one.summary == two.summary
    assert one.headline.coarse.equals(two.headline.coarse)
    z, y = recorded(run)
    for key, value in straightforward(z, y, np.ones(150)).items():
        assert one.summary[key] == pytest.approx(value, rel=1e-6), key
    marks = one.headline.landmarks
    assert len(marks.steps) == len(np.unique(marks.steps)) == 48
    assert marks.steps[[0, -1]].tolist() == [0, 150]


def test_replay_gives_what_was_recorded(adam_run, small_model):
    run = to.load_run(adam_run)
    seen = to.audit(run, lens="outputs").summary
    again = to.audit(run, lens="outputs", model=small_model(), probe=run.probe).summary
    for key in ("dissipation", "length", "distance", "least_distance", "loss_end"):
        assert again[key] == pytest.approx(seen[key], rel=1e-6)


def test_replay_on_another_probe_from_each_file_format(adam_run, small_model, tmp_path):
    import pandas as pd
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 6)).astype(np.float32), rng.integers(0, 4, size=9)
    save_file({"inputs": x, "targets": y}, tmp_path / "p.safetensors")
    np.savez(tmp_path / "p.npz", inputs=x, targets=y)
    pd.DataFrame({"inputs": list(x), "targets": y}).to_parquet(tmp_path / "p.parquet")
    results = [
        to.audit(adam_run, lens="outputs", model=small_model(), probe=tmp_path / name).summary
        for name in ("p.safetensors", "p.npz", "p.parquet")
    ]
    assert results[0]["dissipation"] > 0
    assert results[0] == results[1] == results[2]


def test_other_likelihoods(tmp_path):
    from torch import nn

    for likelihood, y in (
        ("bernoulli", torch.randint(0, 2, (12, 3)).float()),
        ("gaussian", torch.randn(12, 3)),
    ):
        torch.manual_seed(1)
        x, model = torch.randn(12, 5), nn.Linear(5, 3)
        opt = torch.optim.SGD(model.parameters(), 0.05)
        path = tmp_path / likelihood
        extra = {"sigma2": 0.5} if likelihood == "gaussian" else {}
        with to.Recorder(
            path, model=model, optimizer=opt, probe=(x, y), likelihood=likelihood, **extra
        ) as rec:
            for _ in range(30):
                f = model(x)
                loss = (
                    nn.functional.binary_cross_entropy_with_logits(f, y, reduction="sum") / 12
                    if likelihood == "bernoulli"
                    else ((f - y) ** 2).sum() / (2 * 0.5 * 12)
                )
                opt.zero_grad()
                loss.backward()
                opt.step()
                rec.step(loss=loss)
        run = to.load_run(path)
        s = to.audit(run, lens="outputs").summary
        z = np.stack([k.load("probe/logits").double().numpy() for k in run.snapshots])
        if likelihood == "gaussian":
            a = np.sum(np.diff(z, axis=0) ** 2, axis=-1).mean(axis=1) / 0.5
            geodesic = np.sqrt(np.mean(np.sum((z[-1] - z[0]) ** 2, axis=-1)) / 0.5)
            loss = np.mean(np.sum((z - y.numpy()) ** 2, axis=-1), axis=1) + 1.5 * np.log(
                2 * np.pi * 0.5
            )
        else:
            half = np.arcsin(np.sqrt(1 / (1 + np.exp(-z))))
            a = np.sum((2 * np.diff(half, axis=0)) ** 2, axis=-1).mean(axis=1)
            geodesic = np.sqrt(np.mean(np.sum((2 * (half[-1] - half[0])) ** 2, axis=-1)))
            loss = np.mean(np.sum(np.logaddexp(0, z) - y.numpy() * z, axis=-1), axis=1)
        assert s["dissipation"] == pytest.approx(a.sum() / 2, rel=1e-6)
        assert s["distance"] == pytest.approx(geodesic, rel=1e-6)
        assert s["loss_start"] == pytest.approx(loss[0], rel=1e-6)
        assert s["loss_end"] == pytest.approx(loss[-1], rel=1e-6)
        assert 0 < s["least_distance"] <= s["distance"]


def write_run(path, logits, targets=None, probe_kind=None):
    """A run of bare predictions, as another framework would write it: one safetensors file a
    snapshot."""
    from safetensors.numpy import save_file

    path.mkdir()
    for k, z in enumerate(logits):
        tensors = {"probe/logits": z.astype(np.float32)}
        if targets is not None:
            tensors["probe/targets"] = np.asarray(targets, dtype=np.int64)
        save_file(tensors, path / f"{k:08d}.safetensors")
    return path


def test_predictions_alone_from_any_framework(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, size=10)
    z = np.cumsum(0.3 * rng.normal(size=(6, 10, 3)) + 0.3 * np.eye(3)[y], axis=0).astype(np.float32)
    s = to.audit(write_run(tmp_path / "with targets é", z, y)).summary
    for key, value in straightforward(z.astype(float), y, np.ones(5)).items():
        assert s[key] == pytest.approx(value, rel=1e-6), key
    bare = to.audit(write_run(tmp_path / "bare", z))
    assert bare.summary["dissipation"] == s["dissipation"]
    assert bare.summary["loss_end"] is None
    assert bare.summary["least_distance"] is None
    assert any("no targets" in note for note in bare.summary["notes"])


def test_nan_predictions_audit_what_precedes_and_say_from_which_step(tmp_path):
    z = np.cumsum(np.random.default_rng(0).normal(size=(8, 5, 3)), axis=0)
    z[5, 2, 1] = np.nan
    s = to.audit(write_run(tmp_path / "nan", z, np.zeros(5))).summary
    assert s["steps"] == 4
    assert any("from step 5" in note for note in s["notes"])
    z[1] = np.inf
    with pytest.raises(InputError, match="step 1"):
        to.audit(write_run(tmp_path / "early", z, np.zeros(5)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lens": "entropy"}, "unknown"),
        ({"stride": 0}, "stride"),
        ({"clock": "tokens"}, "tokens"),
        ({"clock": "sundial"}, "sundial"),
        ({"lens": "optimizer-state", "batch_size": 0}, "batch_size"),
        ({"lens": "outputs", "probe": "nowhere.npz"}, "nowhere.npz"),
        ({"lens": "parameters"}, "--model"),
        ({"lens": "parameters", "model": "no.such:thing"}, "no.such"),
        ({"lens": "parameters", "model": "torch.nn:Identity"}, "weight"),
        ({"lens": "parameters", "model": "nocolon"}, "package.module:factory"),
    ],
)
def test_bad_arguments_get_a_sentence(adam_run, arguments, said):
    with pytest.raises(InputError, match=said):
        to.audit(adam_run, **arguments)


def test_one_snapshot_is_no_path(tmp_path):
    with pytest.raises(InputError, match="at least two snapshots"):
        to.audit(write_run(tmp_path / "one", np.zeros((1, 4, 3))))


def test_a_module_named_only_by_the_run_directory_is_never_imported(tmp_path, make_run):
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')\n")
    path = make_run(tmp_path / "run", steps=3, factory="evil:factory")
    assert json.loads((path / "run.json").read_text())["model"] == "evil:factory"
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import thermo_opt as to; "
        f"to.audit({str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".")
    assert done.returncode == 0, done.stderr
    assert "only imported on request" in to.audit(path).missing["parameters"]


def test_compare_puts_the_most_efficient_first(adam_run, sgd_run):
    audits = [to.audit(path, lens="outputs") for path in (adam_run, sgd_run)]
    table = to.compare(audits)
    assert table["efficiency"].is_monotonic_decreasing
    assert set(table["run"]) == {"adam", "sgd"}
    with pytest.raises(InputError, match="nothing to compare"):
        to.compare([])


def test_json_is_strict_and_holds_one_summary_a_lens(adam_run, tmp_path):
    audit = to.audit(adam_run)
    text = audit.to_json(tmp_path / "a.json")
    parsed = json.loads(text, parse_constant=lambda c: pytest.fail(f"not JSON: {c}"))
    assert [s["lens"] for s in parsed["runs"]] == list(audit.lenses)
    assert json.loads((tmp_path / "a.json").read_text()) == parsed


def test_the_public_name_is_callable_whatever_was_imported_first(adam_run):
    code = (
        "import thermo_opt.lenses.path, thermo_opt as to; "
        f"print(to.audit({str(adam_run)!r}, lens='outputs').summary['steps'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".")
    assert done.stdout.strip() == "37", done.stderr


def test_the_recorders_clock_is_the_audits_default(tmp_path, make_run):
    path = make_run(tmp_path / "run", steps=4, clock="examples")
    assert to.audit(path, lens="outputs").summary["clock"] == "examples"
    assert to.audit(path, lens="outputs", clock="step").summary["duration"] == 4


def test_rounding_is_no_motion_with_a_direction(tmp_path):
    z = (
        np.random.default_rng(0).integers(-8, 8, size=(5, 3)) / 4
    )  # a shift of these by 1 is exact, and changes nothing
    s = to.audit(write_run(tmp_path / "still", [z, z + 1.0, z], np.zeros(5))).summary
    assert s["alignment_lower"] is None


def test_a_single_interval_has_no_efficiency(tmp_path):
    z = np.random.default_rng(0).normal(size=(2, 50, 3))
    s = to.audit(write_run(tmp_path / "two", z, np.zeros(50))).summary
    assert {s[key] for key in ("detour", "pacing", "straightness", "efficiency")} == {None}
    assert s["irreducible"] == pytest.approx(s["dissipation"])
    assert any("one interval only" in note for note in s["notes"])


def test_the_examples_that_hold_chi_squared_are_named_and_the_rest_is_bounded(tmp_path):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 4, 300)
    truth = np.where(np.arange(300) == 41, (y + 1) % 4, y)  # example 41 carries a wrong label
    z = np.linspace(5, 12, 25)[:, None, None] * np.eye(4)[truth]
    path = write_run(tmp_path / "one-wrong", z, y)
    s = to.audit(path, lens="outputs").summary
    assert s["held_by"] == [41]
    assert s["alignment_lower"] < 0.1 < 0.9 < s["alignment_lower_rest"]
    others = np.delete(np.arange(300), 41)
    alone = to.audit(write_run(tmp_path / "rest", z[:, others], y[others]), lens="outputs").summary
    assert s["alignment_lower_rest"] == pytest.approx(alone["alignment_lower"], rel=1e-9)
    assert alone["held_by"] is None


def test_an_infinite_loss_is_not_called_standing_still(tmp_path):
    z = np.cumsum(np.random.default_rng(2).normal(size=(6, 30, 3)), axis=0)
    z[2, 4, 1] = -np.inf
    s = to.audit(write_run(tmp_path / "infinite", z, np.ones(30)), lens="outputs").summary
    assert any("the loss is infinite" in note for note in s["notes"])
    assert not any("nothing moved" in note for note in s["notes"])


def test_what_came_before_the_first_snapshot_is_said_to_be_unseen(adam_run):
    run = to.load_run(adam_run)
    run.snapshots = run.snapshots[7:]
    for lens in ("outputs", "optimizer-state"):
        s = to.audit(run, lens=lens).summary
        assert s["first_step"] == 7
        assert any("the first snapshot is step 7" in note for note in s["notes"])


def with_one_wrong(layout):
    """Logits, targets and weights of 40 examples in several layouts, example 7 mislabelled: what
    the outputs lens is given, and the likelihood."""
    rng = np.random.default_rng(5)
    progress = np.linspace(5, 12, 15).reshape(-1, *[1] * 3)
    if layout == "multi-label":
        y = rng.integers(0, 2, (40, 4))
        truth = np.where(np.arange(40)[:, None] == 7, 1 - y, y)
        return progress[..., 0] * (2 * truth - 1), y, None, "bernoulli"
    y = rng.integers(0, 3, (40, 5))
    truth = np.where(np.arange(40)[:, None] == 7, (y + 1) % 3, y)
    z, weights = progress * np.eye(3)[truth], None
    y[:, 3] = np.where(np.arange(40) % 2, -100, y[:, 3])
    if layout == "soft":
        y = np.where((y == -100)[..., None], -100.0, 0.99 * np.eye(3)[y % 3] + 0.01 / 3)
    if layout == "weighted":
        weights = np.where(np.arange(40) == 3, 0.0, 1 + np.arange(40) % 3)
    if layout == "classes along axis 1":
        z = np.moveaxis(z, -1, 2)
    return z, y, weights, "categorical"


@pytest.mark.parametrize(
    "layout", ["positions", "soft", "weighted", "classes along axis 1", "multi-label"]
)
def test_the_example_that_holds_chi_squared_is_named_in_every_layout(layout):
    z, y, weights, likelihood = with_one_wrong(layout)
    steps = np.arange(len(z))
    s = to.audit_predictions(z, y, steps=steps, weights=weights, likelihood=likelihood).summary
    assert s["held_by"] == [7]
    others = np.delete(np.arange(40), 7)
    alone = to.audit_predictions(
        z[:, others],
        y[others],
        steps=steps,
        weights=None if weights is None else weights[others],
        likelihood=likelihood,
    ).summary
    assert s["alignment_lower_rest"] == pytest.approx(alone["alignment_lower"], rel=1e-9)
    assert s["alignment_lower_rest"] > s["alignment_lower"] + 0.1

"""Runs that are odd or wrong: a sentence where there is nothing to audit, an honest audit where
there is."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import thermo_opt as to
from thermo_opt.describe.sentences import explanation
from thermo_opt.errors import InputError
from thermo_opt.manifold import embed


def write(path, outputs, targets=None, curve=(), steps=None, **info):
    """A run of predictions alone, in our own layout, as another framework would write it."""
    (path / "snapshots").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"schema_version": 1, **info}))
    (path / "steps.jsonl").write_text(
        "".join(json.dumps({"step": k + 1, **row}) + "\n" for k, row in enumerate(curve))
    )
    for step, z in zip(steps or range(len(outputs)), outputs, strict=True):
        tensors = {"probe/logits": z} | ({} if targets is None else {"probe/targets": targets})
        save_file(tensors, path / "snapshots" / f"{step:08d}.safetensors")
    return path


@pytest.fixture
def logits():
    return list(torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def weights(tmp_path, small_model):
    """A folder of weights, a probe beside them."""
    path = tmp_path / "weights"
    path.mkdir()
    for step in range(4):
        torch.manual_seed(0)
        state = {
            name: p + 0.05 * step * torch.randn(p.shape)
            for name, p in small_model.state_dict().items()
        }
        save_file(state, path / f"model-{step}.safetensors")
    save_file(
        {"inputs": torch.randn(9, 6), "targets": torch.arange(9) % 4}, path / "probe.safetensors"
    )
    return path


@pytest.fixture
def small_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("lr", [0.1, 0.1, 0.0, 0.1], "clock 'flow' stands still from step 2 to 3"),
        ("lr", [0.1, 0.1, -0.1, 0.1], "clock 'flow' runs backwards from step 2 to 3"),
        ("wall", [1.0, 2.0, 2.0, 3.0], "clock 'wall' stands still from step 2 to 3"),
        ("lr", [0.1, None, 0.1, 0.1], r"clock 'flow' needs 'lr' at step 2, .*\(1 of 4 "),
    ],
)
def test_clocks_that_cannot_be(tmp_path, logits, column, values, said):
    path = write(tmp_path / "run", logits, TARGETS, [{column: value} for value in values])
    with pytest.raises(InputError, match=said) as refusal:
        to.audit(path, clock={"lr": "flow"}.get(column, column))
    assert str(refusal.value).count(str(path)) <= 1


def test_a_step_number_far_beyond_the_log_costs_no_memory(tmp_path, logits):
    path = write(tmp_path / "run", logits, TARGETS, [{"lr": 0.1}] * 3, steps=[0, 1, 2, 3, 10**12])
    with pytest.raises(InputError, match=rf"at step 4, .*\({10**12 - 3} of {10**12} "):
        to.audit(path, clock="flow")


def test_step_numbers_that_are_times_of_day_are_refused(tmp_path, logits):
    path = write(tmp_path / "run", logits, TARGETS, steps=[0, 1, 2, 3, 20260101120000123456789])
    with pytest.raises(InputError, match="20260101120000123456789 can't be a step number"):
        to.audit(path)


@pytest.mark.parametrize(
    "outputs",
    [torch.randn(5, 6), torch.randn(5, 6, 1), torch.randn(5, 6, 4).to(torch.complex64)],
    ids=["a number an example", "one class", "complex"],
)
def test_outputs_that_are_no_class_logits(tmp_path, outputs):
    with pytest.raises(InputError, match=r"00000000.safetensors.*outputs"):
        to.audit(write(tmp_path / "run", [z.clone() for z in outputs]))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_probabilities_are_refused_until_they_are_said_to_be_such(tmp_path, likelihood):
    generator = torch.Generator().manual_seed(0)
    steps = (
        torch.randn(5, 6, 4, generator=generator)
        * torch.tensor([2, 0.5, 0.5, 0.5, 0.5])[:, None, None]
    )
    z = list(steps.cumsum(0))
    y = TARGETS if likelihood == "categorical" else torch.randint(2, (6, 4), generator=generator)
    p = [x.softmax(-1) if likelihood == "categorical" else x.sigmoid() for x in z]
    expected = to.audit(write(tmp_path / "z", z, y, likelihood=likelihood)).summary
    path = write(tmp_path / "p", p, y, likelihood=likelihood)
    with pytest.raises(InputError, match=r"00000000.*look like probabilities"):
        to.audit(path)
    found = to.audit(path, kind="probabilities").summary
    for key in ("dissipation", "distance", "least_distance", "loss_end", "alignment_lower"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    assert to.audit(path, kind="logits").summary["dissipation"] < expected["dissipation"]


def test_a_variance_that_nobody_said_is_estimated_and_said(tmp_path):
    generator = torch.Generator().manual_seed(0)
    f = list(torch.randn(5, 6, 2, generator=generator).cumsum(0))
    y = f[-1] + 0.1 * torch.randn(6, 2, generator=generator)
    path = write(tmp_path / "run", f, y, likelihood="gaussian")
    sigma2 = float(((y - f[-1]) ** 2).mean())
    found = to.audit(path).summary
    assert any("sigma2 wasn't given: " in note for note in found["notes"])
    said = to.audit(path, sigma2=sigma2).summary
    assert not any("sigma2" in note for note in said["notes"])
    assert found["dissipation"] == pytest.approx(said["dissipation"], rel=1e-6)
    quarter = to.audit(path, sigma2=4 * sigma2).summary
    assert quarter["dissipation"] == pytest.approx(said["dissipation"] / 4, rel=1e-6)
    with pytest.raises(InputError, match="give sigma2"):
        to.audit(write(tmp_path / "bare", f, None, likelihood="gaussian"))
    with pytest.raises(InputError, match="sigma2 is the variance of gaussian"):
        to.audit(write(tmp_path / "z", f, None, likelihood="categorical"), sigma2=1.0)


def test_rows_shuffled_between_snapshots_are_refused(tmp_path, logits):

    (tmp_path / "run").mkdir()
    for k, z in enumerate(logits):
        order = torch.arange(6).roll(k // 3)
        content = {"probe/logits": z[order], "probe/targets": TARGETS[order]}
        save_file(content, tmp_path / f"run/{k}.safetensors")
    with pytest.raises(InputError, match=r"3\.safetensors.*same examples in the same order"):
        to.audit(tmp_path / "run")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_recorded_outputs_of_any_real_dtype(tmp_path, logits, dtype):
    rounded = [z.mul(4).to(dtype) for z in logits]
    seen = to.audit(write(tmp_path / "run", rounded, TARGETS)).summary
    exact = to.audit(write(tmp_path / "exact", [z.double() for z in rounded], TARGETS)).summary
    assert seen["dissipation"] == pytest.approx(exact["dissipation"], rel=1e-6)


def test_a_saturated_prediction_has_no_negative_loss():
    """Logits so far apart that the target's probability rounds to 1, or above it."""
    z = np.random.default_rng(0).uniform(-150, 150, (2000, 3))
    loss = embed(z, z.argmax(1)).loss
    assert loss is not None
    assert loss.min() >= 0


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_stays_below_the_geodesic_where_they_meet(tmp_path, seed):
    """One example of two classes: only one path, so D* = D but for rounding, also at a loss that
    rounds to 0."""
    start = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    path = [start, start + torch.tensor([[10.0 * (seed + 1), 0.0]])]
    seen = to.audit(write(tmp_path / "run", path, torch.tensor([0]))).summary
    assert seen["least_distance"] <= seen["distance"]
    assert seen["least_distance"] == pytest.approx(seen["distance"], rel=1e-6)


def test_nothing_moved(tmp_path, logits, weights):
    seen = to.audit(write(tmp_path / "run", [logits[0]] * 4, TARGETS)).summary
    assert [
        seen[key]
        for key in ("dissipation", "length", "distance", "least_distance", "detour", "pacing")
    ] == [0.0] * 6
    assert [
        seen[key] for key in ("straightness", "efficiency", "alignment", "alignment_lower")
    ] == [None] * 4


def test_names_cannot_write_to_the_terminal(tmp_path, logits):
    named = to.load_run(
        write(tmp_path / "run", logits, name="r\x1b[31med\n\ud800 Läufe 👩\u200d💻")
    ).name
    assert named == "r\ufffd[31med\ufffd\ufffd Läufe 👩\u200d💻"


def test_probes_that_the_model_cannot_take(tmp_path, weights, small_model):
    for inputs in (torch.randn(9, 7), torch.zeros(9, 6, dtype=torch.int64)):
        save_file({"inputs": inputs, "targets": torch.arange(9) % 4}, tmp_path / "p.safetensors")
        for lens in ("outputs", "parameters"):
            with pytest.raises(InputError, match="can't be evaluated on its inputs"):
                to.audit(weights, model=small_model, probe=tmp_path / "p.safetensors", lens=lens)


@pytest.mark.parametrize("dtype", [">f4", "<f8"])
def test_probes_of_another_precision_or_byte_order(tmp_path, weights, small_model, dtype):
    probe = to.load_run(weights).probe
    np.savez(
        tmp_path / "p.npz",
        inputs=probe.inputs.numpy().astype(dtype),
        targets=probe.targets.numpy().astype("f8"),
    )
    seen = to.audit(weights, model=small_model, probe=tmp_path / "p.npz")
    same = to.audit(weights, model=small_model)
    for lens in ("outputs", "parameters"):
        assert seen.lenses[lens].summary["dissipation"] == pytest.approx(
            same.lenses[lens].summary["dissipation"]
        )


def test_the_callers_model_is_left_alone(weights, small_model):
    before = {name: p.clone() for name, p in small_model.state_dict().items()}
    small_model.train()
    to.audit(weights, model=small_model, lens=["parameters", "outputs"])
    assert small_model.training
    assert all(torch.equal(p, before[name]) for name, p in small_model.state_dict().items())


def test_weights_that_are_not_finite_from_the_start(weights, small_model):
    state = {name: torch.full_like(p, torch.nan) for name, p in small_model.state_dict().items()}
    save_file(state, weights / "model-0.safetensors")
    with pytest.raises(
        InputError, match=r"model-0\.safetensors: weights are NaN or infinite at step 0"
    ):
        to.audit(weights, model=small_model, lens="parameters")


@pytest.mark.parametrize("steps", [slice(50, 60), slice(2, 0), [7]])
def test_intervals_that_there_are_not(weights, small_model, steps):
    with pytest.raises(InputError, match="0 … 2"):
        to.audit(weights, model=small_model, steps=steps)


def test_checkpoints_whose_optimizer_state_was_thrown_away(tmp_path, small_model):
    """Only the last one has its moments: that lens can't look, the others do."""
    optimizer = torch.optim.Adam(small_model.parameters())
    probe = {"inputs": torch.randn(9, 6), "targets": torch.arange(9) % 4}
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(small_model(probe["inputs"]), probe["targets"]).backward()
        optimizer.step()
        state = {"optimizer": optimizer.state_dict()} if step == 2 else {}
        torch.save({"model": small_model.state_dict(), **state}, tmp_path / f"model-{step}.pt")
    save_file(probe, tmp_path / "probe.safetensors")
    seen = to.audit(tmp_path, model=small_model)
    assert set(seen.lenses) == {"outputs", "parameters"}
    assert "model-1.pt holds no Adam moments" in seen.missing["optimizer-state"]


def test_processes_that_cannot_be(adam_run):
    with pytest.raises(InputError, match="jobs"):
        to.audit(adam_run, lens="outputs", jobs=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stride": "2"}, "stride is '2'; give a whole number"),
        ({"stride": 0}, "stride is 0; it must be at least 1"),
        ({"stride": True}, "stride is True; give a whole number"),
        ({"lens": 3}, "lens is 3; use outputs"),
        ({"lens": [None]}, r"lens\[0\] is None; use outputs"),
        ({"clock": 3}, "clock 3"),
        ({"batch_size": 2.5}, "batch_size is 2.5; give a whole number"),
        ({"steps": 4}, "steps is 4; give a slice, or whole numbers"),
        ({"steps": ["1"]}, r"steps\[0\] is '1'; give a slice, or whole numbers"),
        ({"jobs": "2"}, "jobs is '2'; give a whole number"),
        ({"damping": "1"}, "damping is '1'; give a positive number"),
        ({"device": "abacus"}, "device is 'abacus'; give one of torch's"),
        ({"probe": 3}, "probe is 3; give the path"),
    ],
)
def test_arguments_of_the_wrong_type(adam_run, arguments, said):
    with pytest.raises(InputError, match=said):
        to.audit(adam_run, **arguments)


def test_what_is_no_run_and_no_audit(adam_run):
    with pytest.raises(InputError, match="path is 3; give the path"):
        to.audit(3)
    audit = to.audit(adam_run, lens="outputs")
    for together in (to.compare, to.pareto):
        for wrong in (audit, "runs", [adam_run], 3):
            with pytest.raises(InputError, match=r"audits.* give a list of what to\.audit returns"):
                together(wrong)
    for arguments, said in (
        ({"target_loss": "0.5"}, "target_loss is '0.5'"),
        ({"target_loss": ["0.5"]}, r"target_loss\[0\] is '0.5'"),
        ({"groups": "adam"}, "groups is 'adam'"),
        ({"corner": 3}, "corner is 3; give two numbers"),
        ({"corner": (1, 2, 3)}, "corner is .* give two numbers"),
    ):
        with pytest.raises(InputError, match=said):
            to.pareto([audit], **arguments)


def trained(path, model, rate, steps=8, size=1.0):
    """A run of plain descent whose weights and predictions are recorded at every step."""
    torch.manual_seed(0)
    x, y = size * torch.randn(40, 6), torch.randint(4, (40,))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with to.Recorder(path, model=model, optimizer=optimizer, probe=(x, y), params=True) as recorder:
        for _ in range(steps):
            pick = torch.randint(40, (16,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
            optimizer.step()
            recorder.step()
    return path


def test_statistics_that_move_alone_are_no_step_and_have_no_alignment(tmp_path):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 4))
    audit = to.audit(trained(tmp_path / "run", model, 0.0), model=model)
    outputs, parameters = (audit.lenses[name] for name in ("outputs", "parameters"))
    assert outputs.summary["dissipation"] > 0 == parameters.summary["dissipation"]
    assert outputs.summary["alignment_lower"] is None
    assert outputs.steps["alignment_lower"].isna().all()
    assert any("which is no step of the optimizer" in n for n in outputs.summary["notes"])
    for key in ("distance", "irreducible"):  # of the predictions, whatever moved them
        assert parameters.summary[key] == pytest.approx(outputs.summary[key], rel=1e-5)
    assert not any("too long" in note for note in parameters.summary["notes"])


def test_a_run_that_diverges_is_audited_as_far_as_numbers_go(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    audit = to.audit(trained(tmp_path / "run", model, 30.0, size=30.0), model=model)
    assert audit.lenses["outputs"].summary["dissipation"] > 0
    said = " ".join(audit.lenses["parameters"].summary["notes"])
    assert "nothing follows from them" in said
    assert "nothing need be paid" in " ".join(explanation(audit.summary))


def test_a_lag_is_told_only_with_the_transport_it_belongs_to(tmp_path, small_model):
    told = to.audit(trained(tmp_path / "run", small_model, 0.0), lens="outputs").summary["split"]
    assert told is None or (told["transport"] is None) == (told["transport_lag"] is None)

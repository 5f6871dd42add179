"""The counterfactual lens: own steps and natural-gradient steps of the same nats, realised."""

import matplotlib
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import thermo_opt as to
from thermo_opt import fisher, plots
from thermo_opt.describe.sentences import closest, explanation, headline
from thermo_opt.errors import InputError
from thermo_opt.report.page import render
from thermo_opt.runs.batches import read_batches

matplotlib.use("agg")


def recorded(path, make, *, steps=40, kept=True, every=lambda k: k % 10 in (0, 1), params=True):
    """A small classifier on held-out data, its minibatches recorded every tenth step."""
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = (x @ torch.randn(6, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    optimizer = make(model)
    with to.Recorder(
        path, model=model, optimizer=optimizer, probe=(x[:100], y[:100]), every=every, params=params
    ) as recorder:
        for _ in range(steps):
            rows = 100 + torch.randint(200, (32,))
            loss = cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, batch=(x[rows], y[rows]) if kept else None)
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("counterfactual") / "sgd"
    return path, recorded(path, sgd)


@pytest.fixture(scope="module")
def audit(run):
    return to.audit(run[0], model=run[1], lens="counterfactual")


def test_steps_are_the_realised_ones(run, audit):
    path, model = run
    opened = to.load_run(path)
    assert [b.step for b in read_batches(path)] == [0, 10, 20, 30]
    steps = audit.steps
    assert steps["step"].tolist() == [0, 10, 20, 30]
    states = {s.step: s.load_group("params") for s in opened.snapshots}
    model = model.double()
    for row, batch in zip(steps.to_dict("records"), read_batches(path), strict=True):
        found = batch.load()
        before, after = ({k: v.double() for k, v in states[batch.step + j].items()} for j in (0, 1))
        data = (found.inputs.double(), found.targets)
        assert row["nats"] == pytest.approx(fisher.kl(model, data, before, after), rel=1e-9)
        fall = fisher.loss(model, data, parameters=before) - fisher.loss(
            model, data, parameters=after
        )
        assert row["decrease"] == pytest.approx(fall, rel=1e-9)
    assert (steps["loss"] - steps["loss_end"]).to_numpy() == pytest.approx(steps["decrease_held"])


def test_natural_gradients_buy_at_least_as_much_of_their_own_minibatch(audit):
    """Among small steps of one KL none buys more; SGD's are small enough here (§3)."""
    steps = audit.steps
    assert (steps["natural_decrease"] > steps["decrease"]).all()
    assert (steps["natural_decrease"] > 0).all()
    found = audit.summary["counterfactual"]
    assert 0 < found["natural_share"] < 1
    assert found["held_share"] == pytest.approx(steps["nats_held"].sum() / steps["nats"].sum())
    assert found["kfac_decrease"] > found["decrease"]


def test_a_run_of_the_natural_gradient_is_its_own_counterfactual(tmp_path):
    def make(model):
        return to.NGDT(model, 0.003, metric="exact", momentum=0.0, damping=1e-3)

    model = recorded(tmp_path / "ngdt", make, steps=22)
    audit = to.audit(tmp_path / "ngdt", model=model, lens="counterfactual", damping=1e-3)
    found = audit.summary["counterfactual"]
    assert found["natural_share"] == pytest.approx(1, rel=0.03)
    assert found["natural_decrease_held"] == pytest.approx(found["decrease_held"], rel=0.05)


def test_words_page_and_figures(audit):
    assert "steps looked at" in headline(audit.summary)
    assert "natural gradient buy" in " ".join(explanation(audit.summary))
    page = render([audit])
    assert 'id="counterfactual"' in page
    assert 'data-key="counterfactual-held_share"' in page
    line = plots.held_out(audit).lines[0]
    share = audit.steps["nats_held"] / audit.steps["nats"]
    assert line.get_ydata() == pytest.approx(share.to_numpy())
    assert len(plots.counterfactual(audit).lines) == 4
    audit.plot()
    matplotlib.pyplot.close("all")


def test_beside_other_lenses_and_only_by_name(run):
    both = to.audit(run[0], model=run[1], lens=["outputs", "counterfactual"])
    assert list(both.lenses) == ["outputs", "counterfactual"]
    assert both.summary["lens"] == "outputs"
    assert "natural gradient buy" in " ".join(explanation(closest(both)))
    assert "counterfactual" not in to.audit(run[0]).missing
    chosen = to.audit(run[0], model=run[1], lens="counterfactual", steps=[1, 3])
    assert chosen.steps["step"].tolist() == [10, 30]
    with pytest.raises(InputError, match="chooses none of the 4"):
        to.audit(run[0], model=run[1], lens="counterfactual", steps=[9])


def test_what_is_missing_is_said(run, tmp_path):
    recorded(tmp_path / "none", sgd, steps=4, kept=False)
    with pytest.raises(InputError, match="holds no minibatches"):
        to.audit(tmp_path / "none", model=run[1], lens="counterfactual")
    recorded(tmp_path / "apart", sgd, steps=4, every=2)
    assert read_batches(tmp_path / "apart") == []
    recorded(tmp_path / "light", sgd, steps=4, params=False, every=1)
    with pytest.raises(InputError, match="holds no weights"):
        to.audit(tmp_path / "light", model=run[1], lens="counterfactual")


def test_resuming_drops_later_minibatches(run, tmp_path):
    model = recorded(tmp_path / "again", sgd, steps=24)
    first = to.load_run(tmp_path / "again").snapshots
    state = next(s for s in first if s.step == 11).load_group("params")
    model.load_state_dict(state)
    probe = to.load_run(tmp_path / "again").probe
    with to.Recorder(
        tmp_path / "again", model=model, optimizer=sgd(model), resume=11, params=True,
        probe=(probe.inputs, probe.targets), every=lambda k: k % 10 in (0, 1),
    ):  # fmt: skip
        pass
    assert [b.step for b in read_batches(tmp_path / "again")] == [0, 10]


def test_a_label_map_is_one_prediction_however_it_is_laid_out(tmp_path):
    """As the other lenses count binary maps (n, h, w): by example, not by row."""
    found = []
    for name, shape in (("map", (3, 4)), ("row", (12,))):
        torch.manual_seed(0)
        x = torch.randn(60, 6)
        y = (x @ torch.randn(6, 12) > 0).float().reshape(60, *shape)
        model = nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, shape))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with to.Recorder(
            tmp_path / name,
            model=model,
            optimizer=optimizer,
            probe=(x[:20], y[:20]),
            likelihood="bernoulli",
            params=True,
            every=1,
        ) as recorder:
            for _ in range(2):
                loss = nn.functional.binary_cross_entropy_with_logits(model(x[20:]), y[20:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss, batch=(x[20:], y[20:]))
        audit = to.audit(tmp_path / name, model=model, lens=["outputs", "counterfactual"])
        found.append(audit.lenses["counterfactual"].summary["counterfactual"])
        outputs = audit.lenses["outputs"].steps["a"].sum() / 2
        assert found[-1]["nats_held"] == pytest.approx(outputs, rel=0.2)  # KL is a/2 + O(δ³)
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-5), key

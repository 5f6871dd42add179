"""Noise, housekeeping and transport of recorded runs: numbers, words, figures, page."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import thermo_opt as to
from thermo_opt import plots
from thermo_opt.describe.sentences import brief, explanation
from thermo_opt.errors import InputError
from thermo_opt.fronts import drift_front
from thermo_opt.lenses.noise import memory
from thermo_opt.report.page import render
from thermo_opt.runs.run import RunInfo

matplotlib.use("agg")

ETA, WIDTH, STEPS = 0.1, 400, 80


def recorded(path, batch, *, momentum=0.0, every=1, replica_every=4, seed=0, replicas=True):
    """SGD on the mean of a Gaussian with curvatures over a decade, fluctuations stationary."""
    torch.manual_seed(seed)
    h = torch.linspace(0.3, 3.0, WIDTH)
    model = nn.Linear(1, WIDTH, bias=False)
    spread = 0.0 if batch is None else (ETA / batch / (h * (2 - ETA * h))).sqrt()
    model.weight.data = (0.5 + spread * torch.randn(WIDTH))[:, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=ETA, momentum=momentum)
    one = torch.ones(1, 1)

    def loss():
        optimizer.zero_grad()
        scatter = 0.0 if batch is None else torch.randn(WIDTH) / batch**0.5
        f = model(one)[0]
        value = (0.5 * h * f**2 + scatter * f).sum()
        value.backward()
        return value

    with to.Recorder(
        path, model=model, optimizer=optimizer, probe=(one, torch.zeros(1, WIDTH)),
        likelihood="gaussian", sigma2=1.0, batch_size=batch or 1000, every=every,
        replica=loss if replicas else None, replica_every=replica_every,
    ) as recorder:  # fmt: skip
        for _ in range(STEPS):
            value = loss()
            optimizer.step()
            recorder.step(loss=value)
    return to.audit(path, lens="outputs")


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    return [recorded(folder / f"batch-{b}", b) for b in (2, 32, None)]


def test_parts_are_those_of_the_closed_form(audits):
    h = np.linspace(0.3, 3.0, WIDTH)
    decay = (1 - (1 - ETA * h) ** (2 * STEPS)) / (1 - (1 - ETA * h) ** 2)
    transport = 0.5 * ETA**2 * (h**2 * 0.25 * decay).sum()
    for audit, batch in zip(audits[:2], (2, 32), strict=True):
        split = audit.summary["split"]
        noise = STEPS * 0.5 * ETA**2 * WIDTH / batch
        rest = STEPS * 0.5 * ETA**2 * (h**2 * ETA / batch / (h * (2 - ETA * h))).sum()
        assert abs(split["noise"] - noise) < 4 * split["noise_error"] < noise
        assert abs(split["housekeeping"] - rest) < 4 * split["housekeeping_error"] + 0.05 * rest
        assert abs(split["transport"] - transport) < 4 * split["transport_error"]
        assert split["drift"] == pytest.approx(split["transport"] + split["housekeeping"])
        b_star = batch * noise / (transport + rest)
        assert abs(split["critical_batch"] - b_star) < 4 * split["critical_batch_error"]
        whole = split["noise"] + split["drift"]
        assert whole == pytest.approx(audit.summary["dissipation"], rel=0.1)


def test_a_full_batch_has_no_noise(audits):
    split = audits[2].summary["split"]
    assert split["noise"] == 0
    assert split["transport"] == pytest.approx(audits[2].summary["dissipation"], rel=0.1)
    assert abs(split["housekeeping"]) <= 3 * split["housekeeping_error"] + 0.05 * split["drift"]


def test_the_curve_adds_up_to_the_run(audits):
    for audit in audits:
        split = audit.headline.split
        for key in ("noise", "drift", "transport"):
            span = split.curve["step_end"] - split.curve["step"]
            total = (span * split.curve[key]).sum()
            assert total == pytest.approx(getattr(split, key), rel=1e-9, abs=1e-12)
    critical = audits[0].headline.split.critical
    told = critical.dropna(subset="critical_batch")
    assert (told["critical_batch_lower"] <= told["critical_batch"]).all()


def test_critical_batch_of_one_run_and_of_several(audits, tmp_path):
    one = to.critical_batch(audits[1])
    assert one.batch_size == 32
    assert (np.diff(one.step) > 0).all()
    h = np.linspace(0.3, 3.0, WIDTH)
    m2 = np.array([0.25 * (1 - ETA * h) ** (2 * k) for k in range(STEPS)])
    drift = (h**2 * (m2 + ETA / 32 / (h * (2 - ETA * h)))).sum(axis=1)
    spans = [slice(int(i), int(j)) for i, j in zip(one.step, one.step_end, strict=True)]
    known = WIDTH / np.array([drift[span].mean() for span in spans])
    assert np.nanmedian(np.abs(one.value - known) / one.error) < 2
    worth = (one.step_end - one.step) / (1 + known / 32)
    assert one.overall.value == pytest.approx((worth * known).sum() / worth.sum(), rel=0.25)
    assert one.steps_saved(64) == pytest.approx(
        1 - (1 + one.overall.value / 64) / (1 + one.overall.value / 32)
    )
    assert one.examples_saved(16) > 0 > one.examples_saved(64)
    more = to.critical_batch([audits[1], recorded(tmp_path / "other", 32, seed=3)])
    assert more.overall.error < one.overall.error
    with pytest.raises(InputError, match="differ in batch size"):
        to.critical_batch(audits[:2])
    with pytest.raises(InputError, match="at least one"):
        to.critical_batch([])


def test_a_schedule_follows_the_critical_batch(audits):
    found = to.critical_batch(audits[0])
    schedule = found.schedule()
    assert schedule.batch_sizes.sum() == STEPS * 2
    assert schedule.batch_sizes.min() >= 1
    assert schedule.noise.value == pytest.approx(audits[0].summary["split"]["noise"])
    wide = to.critical_batch(audits[1]).schedule(least=4, most=64)
    assert wide.batch_sizes.sum() == STEPS * 32
    assert wide.batch_sizes.min() >= 4
    assert wide.batch_sizes.max() <= 65
    assert wide.batch_sizes[-1] > wide.batch_sizes[0]  # B* grows while the mean decays
    with pytest.raises(InputError, match="no room"):
        found.schedule(least=4)


def test_momentum_has_a_memory(tmp_path):
    audit = recorded(tmp_path / "m", 512, momentum=0.5)
    split = audit.headline.split
    assert split.memory == 2
    assert split.transport_lag >= 2
    assert split.critical_batch is None
    assert "momentum" in split.reason
    with pytest.raises(InputError, match="without momentum"):
        to.critical_batch(audit)
    assert memory(RunInfo("SGD", {"momentum": 0.9})) == pytest.approx(10)
    assert memory(RunInfo("SGD")) == 1
    assert memory(RunInfo("Adam", {"betas": [0.8, 0.99]})) == pytest.approx(5)
    assert memory(RunInfo("Lion")) == pytest.approx(10)


def test_what_can_not_be_told_is_null_with_a_reason(tmp_path):
    alone = recorded(tmp_path / "alone", 2, replicas=False)
    split = alone.summary["split"]
    assert split["noise"] is None
    assert split["housekeeping"] is None
    assert "without replicas" in split["reason"]
    assert explanation(alone.summary) == explanation(dict(alone.summary) | {"split": None})
    short = recorded(tmp_path / "short", 2, every=60).summary["split"]
    assert short["noise"] > 0
    assert short["transport"] is None
    assert "too short" in short["reason"]


def test_a_front_on_drift_has_the_noise_beside_it(audits, tmp_path):
    loss = 1.0001 * max(audit.steps["loss_end"].min() for audit in audits)
    table = drift_front(audits, target_loss=float(loss))
    assert table["run"].tolist() == [audit.run for audit in audits]
    whole = table.set_index("run")
    assert whole.loc["batch-None", "noise"] == 0
    assert whole.loc["batch-2", "noise"] > whole.loc["batch-32", "noise"] > 0
    total = whole["noise"] + whole["drift"]
    assert total.to_numpy() == pytest.approx(whole["dissipation"].to_numpy(), rel=1e-6)
    reached = whole[~whole["censored"]]
    best = reached["time"].idxmin()
    assert reached.loc[best, "on_front"]
    assert plots.drift_front(table).get_xlabel().endswith("(steps)")
    matplotlib.pyplot.close("all")
    bare = recorded(tmp_path / "bare", 2, replicas=False)
    with pytest.raises(InputError, match="bare: a front on drift"):
        drift_front([*audits, bare])


def test_words_page_and_figures_say_the_same(audits, tmp_path):
    said = " ".join(explanation(audits[0].summary))
    assert "are noise, the scatter of minibatches" in said
    assert "undid earlier noise" in said
    assert "of it is noise, the scatter of minibatches, and" in " ".join(brief(audits[0].summary))
    page = render(audits)
    assert 'id="split"' in page
    assert 'id="critical-batch"' in page
    for key in ("noise", "drift", "transport", "housekeeping", "critical_batch"):
        assert f'data-key="split-{key}"' in page
    table = to.compare(audits)
    assert table.set_index("run").loc["batch-2", "noise"] == audits[0].summary["split"]["noise"]
    json.loads(audits[0].to_json())
    ax = plots.split_bars(audits)
    widths = [bar.get_width() for bar in ax.patches[:3]]
    whole = audits[0].headline.split
    assert sum(widths) == pytest.approx(whole.noise + whole.drift)
    assert [t.get_text() for t in plots.split_curve(audits[0]).get_legend().texts]
    assert plots.critical_batch(audits[:2]).lines
    matplotlib.pyplot.close("all")

"""Many runs in the space of predictions: distances, progress, the map, entropy production."""

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import thermo_opt as to
from thermo_opt import plots
from thermo_opt.errors import InputError
from thermo_opt.manifold import fisher_rao, progress
from thermo_opt.theory import uncertainty

matplotlib.use("agg")


def recorded(path, seed, momentum=0.0, every=4, likelihood="categorical"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=generator)).argmax(1)
    torch.manual_seed(1)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=momentum)
    draws = torch.Generator().manual_seed(seed)
    with to.Recorder(
        path, model=model, optimizer=optimizer, probe=(x[:40], y[:40]), every=every
    ) as recorder:
        for _ in range(24):
            rows = torch.randint(200, (8,), generator=draws)
            loss = cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    return [recorded(folder / f"seed-{s}", s) for s in range(6)]


@pytest.fixture(scope="module")
def found(paths):
    return to.ensemble(paths)


def test_distances_are_fisher_rao(paths, found):
    d = found.distances()
    logits = [to.load_run(p).snapshots[-1].load("probe/logits") for p in paths]
    assert d[0, 3] == pytest.approx(
        float(fisher_rao(logits[0].softmax(1).numpy(), logits[3].softmax(1).numpy())), rel=1e-3
    )
    assert np.allclose(d, d.T)
    assert (found.distances(0) < 1e-2).all()  # one start
    assert found.steps.tolist() == [0, 4, 8, 12, 16, 20, 24]
    with pytest.raises(InputError, match="step 3 is not common"):
        found.distances(3)


def test_progress_runs_from_ignorance_to_truth():
    rng = np.random.default_rng(0)
    start, truth = np.full((20, 4), 0.5), np.eye(4)[rng.integers(4, size=20)]
    angle = np.arccos(0.5)
    for s in (0.0, 0.13, 0.5, 0.98, 1.0):
        on = (np.sin((1 - s) * angle) * start + np.sin(s * angle) * truth) / np.sin(angle)
        at, off = progress(on[None], start, truth)
        assert at[0] == pytest.approx(s, abs=1e-4)
        assert off[0] < 1e-3
    p = rng.dirichlet(np.ones(4), size=20)
    at, off = progress(np.sqrt(p)[None], start, truth)
    tried = [
        np.sqrt(np.mean(4 * np.arccos(np.clip(np.einsum(
            "ij,ij->i", np.sqrt(p),
            (np.sin((1 - s) * angle) * start + np.sin(s * angle) * truth) / np.sin(angle),
        ), -1, 1)) ** 2))
        for s in np.linspace(0, 1, 2001)
    ]  # fmt: skip
    assert off[0] == pytest.approx(min(tried), rel=1e-5)
    with pytest.raises(InputError, match="same examples"):
        progress(np.sqrt(p), start, truth)
    with pytest.raises(InputError, match="must differ"):
        progress(truth[None], truth, truth)


def test_an_ensemble_makes_progress_and_is_mapped(found):
    assert (found.progress[:, -1] > found.progress[:, 0]).all()
    assert (found.off_geodesic >= 0).all()
    paths, explained = found.map()
    assert len(paths) == 6
    assert 0 < explained <= 1
    assert len(plots.ensemble_map(found).lines) == 6 * 2 + 1
    assert len(plots.progress(found, groups=list("aabbcc")).lines) == 6 + 3
    matplotlib.pyplot.close("all")


def test_entropy_is_bounded_where_the_relation_holds(found, tmp_path):
    bound = found.entropy_bound()
    moved = found.progress - found.progress[:, :1]
    assert bound == uncertainty.relaxing_bound(moved[:, 1:], found.steps[1:])
    assert bound.value >= 0
    others = [recorded(tmp_path / f"m{s}", s, momentum=0.5) for s in range(3)]
    with pytest.raises(InputError, match="without momentum"):
        to.ensemble(others).entropy_bound()


def test_what_does_not_fit_is_refused(paths, tmp_path):
    with pytest.raises(InputError, match="no runs"):
        to.ensemble([])
    other = recorded(tmp_path / "odd", 1, every=7)
    assert to.ensemble([paths[0], other]).steps.tolist() == [0, 24]
    x, y = torch.randn(9, 5), torch.randint(3, (9,))
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with to.Recorder(tmp_path / "probe", model=model, optimizer=optimizer, probe=(x, y)) as r:
        r.step()
    with pytest.raises(InputError, match="different probes"):
        to.ensemble([paths[0], tmp_path / "probe"])

"""What rounding feigns is told from motion; what sketches estimate agrees with what they stand for;
theory §4, §13."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt.describe import sentences
from thermo_opt.describe.standing import standing
from thermo_opt.manifold import embed, squared_distance
from thermo_opt.manifold.precision import computed_dtype, rounding_floor, ulp
from thermo_opt.manifold.sketch import relative_error, signs


def geodesic(count, far, examples=60, classes=10):
    """Logits (count, examples, classes) that go straight and steadily from one point to another."""
    rng = np.random.default_rng(0)
    u, v = np.sqrt(rng.dirichlet(np.full(classes, 3.0), size=(2, examples)))
    angle = np.arccos((u * v).sum(1, keepdims=True))
    t = np.linspace(0, far, count)[:, None, None]
    path = (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)
    return torch.from_numpy(2 * np.log(path) + 3.0)


def folder(path, snapshots, targets):
    path.mkdir()
    for k, z in enumerate(snapshots):
        save_file(
            {"probe/logits": z.contiguous(), "probe/targets": targets}, path / f"{k}.safetensors"
        )
    return path


@pytest.mark.parametrize(("dtype", "far"), [(torch.bfloat16, 0.1), (torch.float16, 0.012)])
def test_a_straight_path_in_half_precision_does_not_read_as_diffusion(tmp_path, dtype, far):
    z, y = geodesic(200, far), torch.arange(60) % 10
    exact = to.audit(folder(tmp_path / "exact", z, y))
    assert exact.headline.hurst == pytest.approx(1, abs=0.01)
    assert exact.summary["alignment_lower"] is not None
    rounded = to.audit(folder(tmp_path / "rounded", z.to(dtype), y))
    widened = to.audit(folder(tmp_path / "widened", z.to(dtype).float(), y))
    for seen in (rounded, widened):
        assert seen.summary["dissipation"] > 5 * exact.summary["dissipation"]
        assert seen.headline.hurst is None
        assert seen.summary["alignment_lower"] is None
        name = str(dtype).removeprefix("torch.")
        assert any(f"computed in {name}" in note for note in seen.summary["notes"])


@pytest.mark.parametrize("far", [0.1, 0.5])
def test_dissipation_that_is_partly_rounding_is_told_as_about_so_much(tmp_path, far):
    z, y = geodesic(200, far), torch.arange(60) % 10
    exact = to.audit(folder(tmp_path / "exact", z, y)).summary
    seen = to.audit(folder(tmp_path / "rounded", z.to(torch.bfloat16), y)).summary
    feigned = 1 - exact["dissipation"] / seen["dissipation"]
    assert seen["rounding"] == pytest.approx(feigned, rel=0.3)
    assert exact["rounding"] < 1e-6
    assert standing(seen, "dissipation") == standing(seen, "efficiency") == "estimate"
    assert standing(seen, "distance") == standing(seen, "least_distance") == "exact"
    assert standing(exact, "dissipation") == "exact"
    assert "nats, rounding included, that this run" in sentences.headline(seen)
    assert "about" in sentences.explanation(seen)[1]
    assert any("of the dissipation is rounding" in note for note in seen["notes"])
    sparse = to.audit(tmp_path / "rounded", stride=2).summary
    assert standing(sparse, "dissipation") == "estimate"  # a bound of what was computed only
    assert "in rounded values of its predictions" in sentences.headline(sparse)
    assert "at least" not in sentences.headline(sparse)


def test_motion_above_the_floor_is_told_in_any_precision(tmp_path):
    z, y = geodesic(30, 1.0), torch.arange(60) % 10
    seen = to.audit(folder(tmp_path / "run", z.to(torch.bfloat16), y))
    assert seen.headline.hurst == pytest.approx(1, abs=0.05)
    assert seen.summary["alignment_lower"] is not None
    assert not any("alignment is not told there" in note for note in seen.summary["notes"])


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian", "heteroscedastic"])
def test_the_floor_is_the_squared_length_that_two_roundings_feign(likelihood):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        shifts = [0.1 * z * torch.rand(z.shape, generator=generator) for _ in range(2)]
        jitter = [(z + s).to(dtype).double() - s for s in shifts]  # independent roundings of z
        p, q = (embed(x.numpy(), likelihood=likelihood) for x in jitter)
        floor = rounding_floor(z.numpy(), str(dtype).removeprefix("torch."), likelihood)
        assert squared_distance(p, q, likelihood) == pytest.approx(floor, rel=0.2)


def test_the_dtype_in_which_outputs_were_computed_is_told_from_their_values():
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    for dtype in ("bfloat16", "float16", "float32"):
        low = z.to(getattr(torch, dtype))
        assert computed_dtype(low.float().numpy(), "float32") == dtype
        assert computed_dtype(low.double().numpy(), "float64") == dtype
    assert computed_dtype(z.double().numpy() / 3, "float64") == "float64"
    assert computed_dtype(np.zeros((50, 4), np.float32), "float32") == "float32"  # proves nothing
    assert ulp([1.0, 1.99, 2.0, 1000.0], "bfloat16").tolist() == [2**-7, 2**-7, 2**-6, 4.0]


class Low(nn.Linear):
    """A model whose own forward runs under autocast, as Accelerate's does."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize(("autocast", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_probes_are_taken_in_full_precision_unless_asked(tmp_path, autocast, dtype):
    torch.manual_seed(0)
    model = Low(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = (torch.randn(8, 5), torch.arange(8) % 3)
    with to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=probe, probe_autocast=autocast
    ):
        pass
    logits = to.load_run(tmp_path / "run").snapshots[0].load("probe/logits")
    assert logits.dtype == dtype
    assert model(probe[0]).dtype == torch.bfloat16


VOCABULARY, TOKENS = 3000, (12, 10)


def recorded(path, **options):
    """A small language model under Adam, whose predictions are recorded or sketched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, VOCABULARY))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x, y = torch.randint(50, TOKENS), torch.randint(VOCABULARY, TOKENS)
    y[:, -2:] = -100
    with to.Recorder(path, model=model, optimizer=optimizer, probe=(x, y), **options) as recorder:
        for _ in range(6):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return path


def test_sketched_predictions_agree_with_the_whole_ones_within_their_error(tmp_path):
    exact = to.audit(recorded(tmp_path / "whole")).summary
    sketched = to.audit(recorded(tmp_path / "sketched", sketch=64)).summary
    error = relative_error(64, 96)
    assert any("sketches of 64" in note for note in sketched["notes"])
    for key in ("loss_start", "loss_end"):
        assert sketched[key] == pytest.approx(exact[key], rel=1e-6)
    for key in ("dissipation", "irreducible"):
        assert sketched[key] == pytest.approx(exact[key], rel=5 * error)
    for key in ("length", "distance"):
        assert sketched[key] == pytest.approx(exact[key], rel=3 * error)
    assert sketched["least_distance"] == pytest.approx(exact["least_distance"], rel=1e-4)
    size = {
        name: sum(f.stat().st_size for f in (tmp_path / name / "snapshots").iterdir())
        for name in ("whole", "sketched")
    }
    assert size["sketched"] < size["whole"] / 30
    info = to.load_run(tmp_path / "sketched").info
    assert info.sketch == {"width": 64, "seed": 0}
    assert (sketched["sketch"], exact["sketch"]) == (64, None)
    for key in ("dissipation", "length", "distance", "alignment_lower"):
        assert standing(sketched, key) == "estimate"
    assert standing(sketched, "loss_end") == "exact"
    said = " ".join([sentences.headline(sketched), *sentences.explanation(sketched)])
    assert "about" in said
    assert "at least" not in said
    assert "at most" not in said


@pytest.mark.parametrize("kind", [None, "probabilities"])
def test_a_sketch_is_the_signs_times_the_roots_of_p(kind, monkeypatch):
    from thermo_opt.runs import probing

    monkeypatch.setattr(probing, "_SKETCH_BYTES", dict.fromkeys((True, False), 8 * 70 * 3))
    rng = torch.Generator().manual_seed(0)
    z = 30 * torch.randn(10, 70, generator=rng)
    z[:, 3] = -torch.inf  # a word that is never said
    y = torch.arange(10) * 7 % 70 + 4
    y[2] = -100
    log_p = z.double().log_softmax(-1)
    given = z if kind is None else log_p.exp()
    seen = probing.ProbeObserver(
        nn.Identity(), (given, y), likelihood="categorical", kind=kind, sketch=8
    ).observe()
    expected = (0.5 * log_p).exp() @ torch.from_numpy(signs(70, 8, probing.SKETCH_SEED))
    torch.testing.assert_close(seen["probe/sketch"].double(), expected, rtol=1e-5, atol=1e-6)
    at_y = log_p[torch.arange(10), y.clamp_min(0)].masked_fill(y == -100, 0.0)
    torch.testing.assert_close(seen["probe/log_p_y"], at_y, rtol=1e-12, atol=1e-12)


def test_squared_chords_of_sketches_are_unbiased():
    rng = np.random.default_rng(0)
    u, v = np.sqrt(rng.dirichlet(np.full(500, 0.1), size=(2, 3000)))
    chord = ((u - v) ** 2).sum(1).mean()
    for width in (4, 16):
        s = signs(500, width, seed=1)
        np.testing.assert_allclose(s**2, 1 / width)
        found = (((u - v) @ s) ** 2).sum(1)
        assert found.mean() == pytest.approx(chord, rel=6 * relative_error(width, 3000))
    assert signs(70, 3, 5)[:2].tolist() == signs(70, 3, 5)[:2].tolist()
    assert (signs(70, 3, 5) != signs(70, 3, 6)).any()


def test_examples_in_blocks_add_up_to_the_whole(tmp_path, monkeypatch):
    """What is done for large vocabularies changes no number but by rounding."""
    from thermo_opt.lenses import predictions

    path = recorded(tmp_path / "run")
    whole = to.audit(path)
    monkeypatch.setattr(predictions, "_BLOCK_BYTES", 8 * VOCABULARY * TOKENS[1] * 5)
    source = predictions.RecordedPredictions(to.load_run(path), "categorical")
    assert [block.point(0).examples for block in source.blocks(0)] == [40, 40, 16]
    split = to.audit(path)
    for key, value in whole.summary.items():
        if isinstance(value, float):
            assert split.summary[key] == pytest.approx(value, rel=1e-9), key
    np.testing.assert_allclose(split.steps.to_numpy(), whole.steps.to_numpy(), rtol=1e-9)
    np.testing.assert_allclose(split.headline.coarse, whole.headline.coarse, rtol=1e-9)
    assert split.headline.hurst == pytest.approx(whole.headline.hurst)


@pytest.mark.parametrize("kept", ["blocks", "sketch"])
def test_who_holds_chi_squared_is_told_of_large_vocabularies_too(tmp_path, monkeypatch, kept):
    from thermo_opt.lenses import predictions

    y = torch.arange(40 * 3).reshape(40, 3) * 7 % 50
    y[5:8, 0] = -100
    truth = torch.where(torch.arange(40)[:, None] == 17, (y + 1) % 50, y).clamp_min(0)
    logits = nn.Parameter(functional.one_hot(truth, 50).double() * 9)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = logits

        def forward(self, x):
            return self.rows[x]

    model = Table()
    options = {"sketch": 48} if kept == "sketch" else {}
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    probe = (torch.arange(40), y)
    path = tmp_path / "run"
    with to.Recorder(path, model=model, optimizer=optimizer, probe=probe, **options) as recorder:
        for _ in range(6):
            with torch.no_grad():
                logits += 0.3 * functional.one_hot(truth, 50)
            recorder.step()
    whole = to.audit(path).summary
    assert whole["held_by"] == [17]
    assert whole["alignment_lower"] < 0.1 < 0.9 < whole["alignment_lower_rest"]
    if kept == "blocks":
        monkeypatch.setattr(predictions, "_BLOCK_BYTES", 8 * 50 * 3 * 7)
        source = predictions.RecordedPredictions(to.load_run(path), "categorical")
        assert len(source.blocks(0)) == 6
        split = to.audit(path).summary
        assert split["held_by"] == [17]
        for key in ("alignment_lower", "alignment_lower_rest"):
            assert split[key] == pytest.approx(whole[key], rel=1e-9)


def test_predictions_that_move_alike_share_a_sketchs_error():
    p, q = (np.sqrt(x) for x in np.random.default_rng(0).dirichlet(np.ones(60), 2))
    found = np.array([(((p - q) @ signs(60, 8, seed)) ** 2).sum() for seed in range(400)])
    chord = ((p - q) ** 2).sum()
    assert found.mean() == pytest.approx(chord, rel=6 * relative_error(8, 400))
    assert found.std() / chord == pytest.approx(relative_error(8, 1), rel=0.2)

"""``thermo-opt advise``: a saving where one can be predicted, and otherwise why not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import thermo_opt as to
from thermo_opt import cli
from thermo_opt.audits import advise
from thermo_opt.describe.sentences import explanation
from thermo_opt.fronts import drift_front


def _record(path: Path, every: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 5)
    y = (x @ torch.randn(5, 3)).argmax(1)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with to.Recorder(path, model=model, optimizer=optimizer, probe=(x, y), every=every) as recorder:
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)


def _advice(path: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert cli.main(["advise", str(path), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["run"] == path.name
    return {entry["about"]: entry["words"] for entry in told["advice"]}


def test_a_run_of_every_step_is_offered_its_even_schedule(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "whole", every=1)
    words = _advice(tmp_path / "whole", capfd)
    saving = to.even_schedule(to.audit(tmp_path / "whole", lens="outputs")).saving
    assert saving > 0.02  # descent slows down, so an even speed saves
    assert f"{100 * saving:.0f}" in words["schedule"]
    assert "50\u00a0% fewer snapshots" in words["recording"]


def test_a_strided_run_is_told_to_record_every_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "thinned", every=5)
    words = _advice(tmp_path / "thinned", capfd)
    assert "every step" in words["recording"]
    assert "No schedule" in words["schedule"]


@dataclass
class _Loop:
    """A training with replicas, of minibatches that are drawn anew."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    minibatch: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    probe: tuple[torch.Tensor, torch.Tensor]
    batch_size: int
    steps: int
    replica_every: int

    def closure(self) -> torch.Tensor:
        x, y = self.minibatch()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def recorded(
        self, path: Path, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    ) -> to.Audit:
        """Its audit; the scheduler is called last."""
        with to.Recorder(
            path,
            model=self.model,
            optimizer=self.optimizer,
            probe=self.probe,
            batch_size=self.batch_size,
            replica=self.closure,
            replica_every=self.replica_every,
        ) as recorder:
            for _ in range(self.steps):
                loss = self.closure()
                self.optimizer.step()
                recorder.step(loss=loss)
                if scheduler is not None:
                    scheduler.step()
        return to.audit(path, lens="outputs")


def _noisy(path: Path, batch: int, momentum: float = 0.0) -> to.Audit:
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    y = (x @ torch.randn(8, 4) + torch.randn(400, 4)).argmax(1)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3 * (1 - momentum), momentum=momentum)

    def minibatch() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(100, 400, (batch,))
        return x[rows], y[rows]

    loop = _Loop(model, optimizer, minibatch, (x[:100], y[:100]), batch, steps=80, replica_every=2)
    return loop.recorded(path)


def test_minibatch_runs_are_advised_on_batch_and_momentum_and_it_comes_true(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    audit = _noisy(tmp_path / "small", 16)
    assert cli.main(["advise", str(tmp_path / "small"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["advice"]
    found = {entry["about"]: entry for entry in told}
    assert list(found) == ["schedule", "batch size", "momentum", "recording"]
    batch = found["batch size"]
    assert "At batch size 32 instead of 16" in batch["words"]
    assert " ± " in batch["words"].split(" fewer steps")[0]
    assert batch["of"] == "steps"
    star = to.critical_batch(audit).overall.value
    assert batch["predicted_saving"] == pytest.approx(1 - (1 + star / 32) / (1 + star / 16))
    assert "Nothing to gain" in found["recording"]["words"]
    momentum = found["momentum"]
    after = _noisy(tmp_path / "momentum", 16, momentum=0.9).summary
    fell = 1 - after["dissipation"] / audit.summary["dissipation"]
    assert fell > momentum["predicted_saving"] - 3 * momentum["error"]
    assert momentum["predicted_saving"] > 0.4
    assert after["loss_end"] < 1.3 * audit.summary["loss_end"]


def test_a_sparse_record_promises_momentum_no_more_than_the_whole(tmp_path: Path) -> None:
    """Noise is told per step by the replicas, dissipation at stride m only from below: their
    quotient would be too large."""
    whole = _noisy(tmp_path / "run", 16)
    full = {one.about: one for one in advise(whole)}["momentum"].predicted_saving
    assert full is not None
    for stride in (2, 5, 10):
        sparse = to.audit(tmp_path / "run", lens="outputs", stride=stride)
        found = {one.about: one for one in advise(sparse)}["momentum"]
        assert found.predicted_saving is not None
        assert found.error is not None
        assert found.predicted_saving <= full + found.error
        assert "earlier noise or turned elsewhere" in " ".join(explanation(sparse.summary))


def test_large_batches_are_advised_to_be_smaller(tmp_path: Path) -> None:
    audit = _noisy(tmp_path / "large", 3000)
    found = {one.about: one for one in advise(audit)}
    assert found["batch size"].of == "examples"
    assert "fewer examples" in found["batch size"].words
    assert found["momentum"].predicted_saving is not None


def test_momentum_and_full_batches_leave_nothing_to_say(tmp_path: Path) -> None:
    found = {one.about: one for one in advise(_noisy(tmp_path / "momentum", 4, 0.5))}
    assert "without momentum" in found["batch size"].words
    assert found["momentum"].predicted_saving is None
    _record(tmp_path / "whole", every=1)
    bare = {one.about: one for one in advise(to.audit(tmp_path / "whole", lens="outputs"))}
    assert "replica" in bare["batch size"].words
    assert "replicas" in bare["momentum"].words


def _whole_batches(path: Path, lr: float, even: to.EvenSchedule | None = None) -> to.Audit:
    """Full-batch descent with replicas; ``even``: its rates by a scheduler that is called last."""
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    first = lr if even is None else float(even.learning_rates[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=first)
    factor = (lambda _: 1.0) if even is None else even.lr_lambda()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    loop = _Loop(model, optimizer, lambda: (x, y), (x, y), 60, steps=60, replica_every=4)
    return loop.recorded(path, scheduler)


def test_a_run_that_follows_its_advice_has_nothing_more_to_gain(tmp_path: Path) -> None:
    constant = _whole_batches(tmp_path / "constant", 0.5)
    schedule = to.even_schedule(constant)
    largest = f"{schedule.learning_rates.max():.3g} (the largest here was 0.5"
    assert f"If training is stable at a learning rate of {largest}" in advise(constant)[0].words
    even = _whole_batches(tmp_path / "even", 0.5, schedule)
    spent = even.summary["dissipation"]
    assert spent == pytest.approx(schedule.predicted_dissipation, rel=0.03)
    found = {one.about: one for one in advise(even)}
    assert "already moved at an even speed" in found["schedule"].words
    assert "full batches have no noise" in found["batch size"].words
    assert not found["batch size"].words.endswith("..")
    assert f"{even.run}:" not in found["batch size"].words
    assert "hardly any noise" in found["momentum"].words


def test_full_batches_that_go_to_and_fro_promise_no_schedule(tmp_path: Path) -> None:
    """Descent along a parabola at ηh = 1.9: no noise, and each step undoes the one before."""
    torch.manual_seed(0)
    model = nn.Linear(1, 5, bias=False)
    one, nothing = torch.ones(1, 1), torch.zeros(1, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.9)
    options = {"probe": (one, nothing), "likelihood": "gaussian", "sigma2": 1.0}
    path = tmp_path / "run"
    with to.Recorder(path, model=model, optimizer=optimizer, **options) as recorder:  # type: ignore[arg-type]
        for _ in range(30):
            optimizer.zero_grad()
            loss = (0.5 * (model(one) - nothing) ** 2).sum()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    schedule = to.even_schedule(to.audit(path, lens="outputs"))
    assert schedule.overshoot == pytest.approx(1.9, abs=0.1)
    assert schedule.near_instability
    words = advise(to.audit(path, lens="outputs"))[0].words
    assert words.startswith("Nothing is predicted of an even schedule: this run’s steps undo")


def test_of_a_run_whose_loss_rose_nothing_is_predicted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _whole_batches(tmp_path / "diverged", 1e5)
    assert cli.main(["advise", str(tmp_path / "diverged"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["advice"]
    for entry in told[:3]:
        assert entry["words"].startswith("Nothing is predicted of ")
        assert ": the loss on the probe went from" in entry["words"]
        assert entry["predicted_saving"] is None


def test_fronts_on_drift(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _noisy(tmp_path / "small", 16)
    _noisy(tmp_path / "large", 200)
    _record(tmp_path / "bare", every=1)
    runs = [str(tmp_path / name) for name in ("small", "large", "bare")]
    assert cli.main(["pareto", *runs, "--drift", "--target-loss", "1.0", "--json"]) == 0
    out = capfd.readouterr()
    told = json.loads(out.out)
    assert [row["run"] for row in told["runs"]] == ["small", "large"]
    assert told["runs"][0]["noise"] > told["runs"][1]["noise"]
    assert "no replicas" in told["left_out"][0]["reason"]
    assert cli.main(["pareto", *runs[:2], "--drift", "--target-loss", "1.0"]) == 0
    assert "noise apart" in capfd.readouterr().out
    assert told["schema_version"] == 2
    assert told["notes"] == []
    thinned = to.load_run(tmp_path / "small")
    thinned.snapshots = thinned.snapshots[::4]
    audits = [to.audit(thinned, lens="outputs"), to.audit(tmp_path / "large", lens="outputs")]
    notes = drift_front(audits, target_loss=1.0).attrs["notes"]
    assert "every 4 steps" in notes[0]
    assert "are estimates" in notes[1]
    assert cli.main(["pareto", *runs, "--drift", "--jobs", "2"]) == 2


def test_the_page_of_a_front_on_drift_holds_what_the_json_holds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _noisy(tmp_path / "small", 16)
    _noisy(tmp_path / "large", 200)
    page = tmp_path / "drift.html"
    options = ["--drift", "--target-loss", "1.0", "--target-loss", "0.9", "--html", str(page)]
    options += ["--group-by", "batch_size", "--label", "lr", "--json"]
    assert cli.main(["pareto", *(str(tmp_path / n) for n in ("small", "large")), *options]) == 0
    told = json.loads(capfd.readouterr().out)
    text = page.read_text()
    embedded, figures = (
        json.loads(re.search(f'id="thermo-opt-{name}">(.*?)</script>', text, re.S)[1])
        for name in ("summaries", "figures")
    )
    assert embedded == told
    rows = [row for row in told["runs"] if row["target_loss"] == 1.0]
    assert [row["group"] for row in rows] == ["batch_size 16", "batch_size 200"]
    assert rows[0]["run"] == "small (lr 0.3)"
    assert all(0 < row["noise_error"] < row["noise"] for row in rows)
    marks = [t for t in figures[0]["data"] if t.get("mode") == "markers"]
    for part, kept in (("drift", marks[::2]), ("noise", marks[1::2])):
        assert [t["y"] for t in kept] == [[row[part]] for row in rows]
    assert [f["key"] for f in figures] == ["front-0", "front-1"]

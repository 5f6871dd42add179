"""``Recorder(log=…)``: the one-line hook for plain loops and for Accelerate's."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import thermo_opt as to
from tests.integrations.small_worlds import loader
from thermo_opt.errors import InputError


def train(folder, log, optimizer=None, prepare=None, every=1, resume=False, steps=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = to.NGDT(model) if optimizer is None else optimizer(model.parameters())
    probe = next(iter(loader(shuffle=False)))
    if prepare is not None:
        model, optimizer = prepare(model, optimizer)
    recorder = to.Recorder(
        folder,
        model=model,
        optimizer=optimizer,
        probe=tuple(probe),
        every=every,
        log=log,
        resume=resume,
    )
    with recorder as rec:
        for _, (x, y) in zip(range(steps), loader(shuffle=False), strict=False):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(loss=loss)


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_logged_last_is_what_the_audit_says(tmp_path, every):
    heard = []
    train(tmp_path / "run", lambda values, step: heard.append((step, values)), every=every)
    summary = to.audit(to.load_run(tmp_path / "run"), lens="outputs").summary
    assert [step for step, _ in heard] == list(range(every, 7, every))
    assert heard[-1][1]["thermo/dissipation"] == pytest.approx(summary["dissipation"])
    assert heard[-1][1]["thermo/efficiency"] == pytest.approx(summary["efficiency"])
    assert heard[-1][1]["thermo/kappa"] > 0


def test_a_bound_on_the_alignment_is_given_of_single_steps_only(tmp_path):
    single, pairs = [], []
    sgd = lambda params: torch.optim.SGD(params, 0.1)  # noqa: E731
    train(tmp_path / "one", lambda values, step: single.append(values), sgd)
    train(tmp_path / "two", lambda values, step: pairs.append(values), sgd, every=2)
    assert all(0 < abs(v["thermo/alignment_lower"]) <= 1 for v in single)
    assert not any("thermo/alignment_lower" in v for v in pairs)


def test_accelerates_log_fits_as_it_is(tmp_path):
    accelerator = Accelerator(cpu=True)
    heard = []
    accelerator.log = lambda values, step=None, log_kwargs=None: heard.append((step, values))
    train(tmp_path / "run", accelerator.log, prepare=accelerator.prepare)
    assert heard[-1][0] == 6
    assert heard[-1][1]["thermo/realised"] > 0
    assert to.load_run(tmp_path / "run").info.optimizer == "NGDT"


def test_a_hook_that_fails_ends_the_recording_and_not_the_training(tmp_path):
    def broken(values, step):
        raise ConnectionError("no network")

    with pytest.warns(UserWarning, match="no network"):
        train(tmp_path / "run", broken)
    assert len(to.load_run(tmp_path / "run").snapshots) >= 2


def test_something_that_is_no_function_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"wandb\.log"):
        train(tmp_path / "run", log="wandb")

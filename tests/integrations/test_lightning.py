"""`lightning.ThermoCallback` on the real Lightning `Trainer`."""

import lightning
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import thermo_opt as to
from tests.integrations.small_worlds import Manual, Module, lightning_trainer, loader, weights
from thermo_opt.errors import InputError
from thermo_opt.integrations.lightning import ThermoCallback


def fit(folder, module, callback=None, resume=None, **options):
    torch.manual_seed(3)
    training = lightning_trainer(folder, [callback] if callback else [], **options)
    training.fit(module, loader(), loader(shuffle=False), ckpt_path=resume)
    return training


@pytest.mark.parametrize("kind", [Module, Manual])
def test_training_is_bit_for_bit_what_it_is_without_the_callback(tmp_path, kind):
    plain, watched = kind(), kind()
    fit(tmp_path, plain)
    fit(tmp_path, watched, ThermoCallback(tmp_path / "run"))
    assert torch.equal(weights(plain), weights(watched))


@pytest.mark.parametrize("kind", [Module, Manual])
def test_the_loggers_have_the_scalars_of_the_audit(tmp_path, kind):
    logger = CSVLogger(tmp_path)
    training = fit(tmp_path, kind(), ThermoCallback(tmp_path / "run"), logger=logger)
    summary = to.audit(to.load_run(tmp_path / "run"), lens="outputs").summary
    assert summary["steps"] == training.global_step
    shown = list(pd.read_csv(f"{logger.log_dir}/metrics.csv")["thermo/dissipation"].dropna())
    assert len(shown) >= summary["steps"]
    assert shown[-1] == pytest.approx(summary["dissipation"], rel=1e-5)
    assert float(training.callback_metrics["thermo/dissipation"]) == pytest.approx(shown[-1])


def test_a_step_of_accumulated_batches_is_one_recorded_step_with_their_mean_loss(tmp_path):
    fit(tmp_path, Module(), ThermoCallback(tmp_path / "run"), accumulate_grad_batches=3)
    run = to.load_run(tmp_path / "run")
    assert len(run.steps) == 6
    assert 0.5 < run.steps["loss"].iloc[0] < 2  # a mean of three, not their sum


def test_a_run_is_continued_where_the_checkpoint_was_written(tmp_path):
    first = lightning_trainer(tmp_path, [ThermoCallback(tmp_path / "run")], max_steps=4)
    first.fit(Module(), loader(), loader())
    first.save_checkpoint(tmp_path / "end.ckpt")
    at_four = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "at-{step}", every_n_train_steps=3
    )
    again = lightning_trainer(
        tmp_path / "other",
        [ThermoCallback(tmp_path / "again"), at_four],
        max_steps=5,
        enable_checkpointing=True,
    )
    again.fit(Module(), loader(), loader())
    fit(
        tmp_path,
        Module(),
        ThermoCallback(tmp_path / "again"),
        resume=tmp_path / "at-step=3.ckpt",
        max_steps=8,
    )
    run = to.load_run(tmp_path / "again")
    assert list(run.steps.index) == list(range(1, 9))
    assert [s.step for s in run.snapshots] == list(range(9))


def test_ngdt_shows_its_alignment_realised_kl_and_kappa(tmp_path):
    module = Module(lambda m: to.NGDT(m.net))
    training = fit(tmp_path, module, ThermoCallback(tmp_path / "run"))
    assert training.callback_metrics["thermo/kappa"] > 0
    assert training.callback_metrics["thermo/realised"] > 0


class Headless(Module):
    forward = lightning.LightningModule.forward

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


def test_a_module_without_forward_names_the_part_that_is_called(tmp_path):
    module = Headless()
    before = weights(module)
    with pytest.raises(InputError, match="model=lambda module"):
        fit(tmp_path, module, ThermoCallback(tmp_path / "run"))
    assert torch.equal(weights(module), before)
    fit(tmp_path, module, ThermoCallback(tmp_path / "run", model=lambda m: m.net))
    assert len(to.load_run(tmp_path / "run").snapshots) == 7


def test_no_validation_loader_and_no_probe_is_refused_before_a_weight_moves(tmp_path):
    module = Module()
    before = weights(module)
    with pytest.raises(InputError, match="no validation DataLoader"):
        lightning_trainer(tmp_path, [ThermoCallback(tmp_path / "run")]).fit(module, loader())
    assert torch.equal(weights(module), before)

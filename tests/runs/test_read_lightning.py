"""The reader of Lightning checkpoints, on what the real Lightning `Trainer` writes."""

import shutil

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.runs import install, load_run, predict


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Classifier(lightning.LightningModule):
    def __init__(self, freeze=False):
        super().__init__()
        self.save_hyperparameters()
        self.net = network()
        self.net[0].weight.requires_grad_(not freeze)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def train(path, callbacks=(), **options):
    torch.manual_seed(0)
    rows = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(0, 3, (32,)))
    module = Classifier(**options)
    trainer = lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        default_root_dir=path,
        logger=CSVLogger(path),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, save_last=True),
            LearningRateMonitor(logging_interval="step"),
            *callbacks,
        ],
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8))
    return module, trainer.optimizers[0], trainer


@pytest.fixture(scope="module", params=[False, True], ids=["all", "frozen"])
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("lightning")
    return path, *train(path, freeze=request.param)[:2]


def test_weights_buffers_and_moments_are_those_of_the_trainer(trained):
    path, module, optimizer = trained
    run = load_run(path)
    assert run.format == "lightning"
    assert [snapshot.step for snapshot in run.snapshots] == [2, 4, 6]  # last.ckpt repeats step 6
    last = run.snapshots[-1]
    for name, parameter in module.named_parameters():
        assert torch.equal(last.load(f"params/{name}"), parameter)
        if parameter.requires_grad:
            assert torch.equal(
                last.load(f"exp_avg_sq/{name}"), optimizer.state[parameter]["exp_avg_sq"]
            )
    assert set(last.load_group("params")) == {name for name, _ in module.named_parameters()}
    assert set(last.load_group("buffers")) == {name for name, _ in module.named_buffers()}
    assert set(last.load_group("exp_avg")) == {
        name for name, p in module.named_parameters() if p.requires_grad
    }
    assert last.moments_meta() == {"step": 6, "betas": (0.9, 0.999)}


def test_training_curve(trained):
    path, _, _ = trained
    run = load_run(path)
    assert list(run.steps.index) == [1, 2, 3, 4, 5, 6]
    assert run.steps["loss"].notna().all()
    assert run.clock_readings("flow", [6])[0] == pytest.approx(0.06)


@pytest.mark.parametrize("make", [Classifier, network], ids=["module", "network inside"])
def test_replay(trained, make):
    path, module, _ = trained
    run, model = load_run(path), make()
    install(model, run.snapshots[-1])
    x = torch.randn(5, 4)
    assert torch.equal(predict(model, x), predict(module, x))


def test_several_runs_and_foreign_files_are_refused(trained, tmp_path):
    path, _, _ = trained
    file = next(path.rglob("*step=2.ckpt"))
    for version in ("a", "b"):
        (tmp_path / version).mkdir()
        shutil.copy(file, tmp_path / version)
    with pytest.raises(InputError, match="several runs"):
        load_run(tmp_path)
    shutil.copy(file, tmp_path / "a/again.ckpt")
    assert len(load_run(tmp_path / "a").snapshots) == 1  # a copy counts once
    content = torch.load(file, weights_only=True)
    content["state_dict"] = {name: w + 1 for name, w in content["state_dict"].items()}
    torch.save(content, tmp_path / "a" / f"{file.stem}-v1.ckpt")
    with pytest.raises(InputError, match="both hold step 2"):
        load_run(tmp_path / "a")
    torch.save({"state_dict": {}}, tmp_path / "b" / "x.ckpt")
    with pytest.raises(InputError, match="global_step"):
        load_run(tmp_path / "b")
    (tmp_path / "b/x.ckpt").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"x\.ckpt"):
        load_run(tmp_path / "b")


def test_averaged_weights_are_told_from_those_that_the_optimizer_moved(tmp_path):
    *_, trainer = train(tmp_path, [EMAWeightAveraging(decay=0.5)])
    (folder,) = {file.parent for file in tmp_path.rglob("*.ckpt")}
    raw = torch.load(folder / "last.ckpt", weights_only=False)["current_model_state"]
    for file in (folder / "last.ckpt", next(folder.glob("*step=6.ckpt"))):
        file.unlink()
    trainer.save_checkpoint(folder / "epoch=1-step=6.ckpt")  # the average has taken their place
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [2, 4]
    assert any("epoch=1-step=6.ckpt, where averaged weights" in said for said in run.remarks)
    assert any("averaged weights (EMA): the raw ones" in said for said in run.remarks)
    final = torch.load(folder / "epoch=1-step=6.ckpt", weights_only=False)
    final["current_model_state"] = raw
    torch.save(final, folder / "epoch=1-step=6.ckpt")
    last = load_run(tmp_path).snapshots[-1]
    assert last.step == 6
    assert torch.equal(last.load("params/net.0.weight"), raw["net.0.weight"])


def test_the_average_began_within_the_run(tmp_path):
    train(tmp_path, [EMAWeightAveraging(decay=0.5)])
    first = next(tmp_path.rglob("*step=2.ckpt"))
    content = torch.load(first, weights_only=False)
    raw = content["state_dict"] = content.pop("current_model_state")
    del content["averaging_state"]  # as written before the callback was added
    torch.save(content, first)
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [2, 4, 6]
    assert torch.equal(run.snapshots[0].load("params/net.0.weight"), raw["net.0.weight"])
    assert any("averaged weights (EMA): the raw ones" in said for said in run.remarks)

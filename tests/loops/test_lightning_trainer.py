"""NGD-T in the real Lightning `Trainer`: automatic and manual optimization, callbacks,
schedulers."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

import thermo_opt as to
from tests.integrations.small_worlds import Manual, Module, lightning_trainer, loader, weights


def ngdt(module):
    return to.NGDT(module)


def loss_of(module):
    x, y = loader(shuffle=False).dataset.tensors
    with torch.no_grad():
        return F.cross_entropy(module.eval()(x), y).item()


def fit(folder, module, callbacks=(), steps=12, **options):
    torch.manual_seed(3)
    training = lightning_trainer(folder, callbacks, max_steps=steps, **options)
    training.fit(module, loader())
    return training


class Part(Module):
    """`training_step` calls a part of the module, not the module."""

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Skipping(Module):
    """`training_step` returns None for some batches."""

    def training_step(self, batch, index):
        return None if index % 3 == 1 else super().training_step(batch, index)


class Logging(Module):
    """`training_step` returns a dictionary."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("train_loss", loss)
        return {"loss": loss, "index": index}


KINDS = {
    "automatic": (Module, {}),
    "manual, accumulated, clipped, a batch skipped": (Manual, {}),
    "a part of the module called": (Part, {}),
    "batches skipped by None": (Skipping, {}),
    "a dictionary returned": (Logging, {}),
    "accumulated": (Module, {"accumulate_grad_batches": 2}),
    "clipped": (Module, {"gradient_clip_val": 1.0}),
    "bfloat16": (Module, {"precision": "bf16-mixed"}),
    "exponential average": (Module, {"callbacks": [EMAWeightAveraging(decay=0.5)]}),
    "weights averaged": (Module, {"callbacks": [StochasticWeightAveraging(1.0, 1)]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_trains(kind, tmp_path):
    make, options = KINDS[kind]
    module = make(ngdt)
    before = loss_of(module)
    module.train()
    callbacks = options.get("callbacks", [])
    training = fit(
        tmp_path, module, callbacks, **{k: v for k, v in options.items() if k != "callbacks"}
    )
    optimizer = training.optimizers[0]
    assert loss_of(module) < 0.9 * before
    assert optimizer.calibration.last >= 2
    assert 0 < optimizer.steps <= 12


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=1.0, total_steps=20, cycle_momentum=False
    ),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "chained": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.5, 3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch_drive_the_step(name, tmp_path):
    def make(module):
        optimizer = to.NGDT(module)
        schedule = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    class Scheduled(Module):
        seen: tuple = ()

        def on_train_batch_end(self, *_):
            optimizer = self.trainer.optimizers[0]
            self.seen += ((optimizer.param_groups[0]["lr"], optimizer.last_step["predicted"]),)

    module = Scheduled(make)
    fit(tmp_path, module)
    rates = [rate for rate, _ in module.seen]
    assert len(set(rates)) > 1
    for rate, predicted in zip([None, *rates], [p for _, p in module.seen], strict=False):
        if rate is not None:  # the step spends lr²·budget at most
            assert predicted <= 0.03 * rate**2 * (1 + 1e-6)


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    def run(folder, module, steps, resume=None):
        keep = ModelCheckpoint(folder, "at-{step}", every_n_train_steps=6, save_top_k=-1)
        training = lightning_trainer(folder, [keep], max_steps=steps, enable_checkpointing=True)
        training.fit(module, loader(shuffle=False), ckpt_path=resume)

    def plain(module):
        return to.NGDT(module)

    class Still(Module):
        def __init__(self):
            super().__init__(plain)
            self.net[1] = torch.nn.Identity()

    through, resumed = Still(), Still()
    run(tmp_path / "one", through, 12)
    run(tmp_path / "two", resumed, 12, tmp_path / "one" / "at-step=6.ckpt")
    assert torch.equal(weights(through), weights(resumed))


def test_an_optimizer_of_the_inner_network_is_the_same(tmp_path):
    whole, part = Module(ngdt), Module(lambda m: to.NGDT(m.net))
    fit(tmp_path, whole)
    fit(tmp_path, part)
    assert torch.equal(weights(whole), weights(part))


class Unfreeze(BaseFinetuning):
    """The first layer joins after an epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1.0)


def test_finetuning_unfreezes_layers_that_then_move(tmp_path):
    module = Module(lambda m: to.NGDT(m, params=[p for p in m.parameters() if p.requires_grad]))
    first = module.net[0].weight.detach().clone()
    fit(tmp_path, module, [Unfreeze()], steps=4)
    assert torch.equal(module.net[0].weight, first)
    module = Module(lambda m: to.NGDT(m, params=[p for p in m.parameters() if p.requires_grad]))
    fit(tmp_path, module, [Unfreeze()], steps=12)
    assert not torch.equal(module.net[0].weight, first)

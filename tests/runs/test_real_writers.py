"""Runs that other tools wrote here and now are read to what the tool itself held.

Tools that aren't among the tests' dependencies are used where they are installed.
"""

import os
import socket

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import thermo_opt as to

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches():
    return DataLoader(TensorDataset(X, Y), batch_size=16)


def trained(save, epochs=3):
    """A model trained for some epochs of four steps, with ``save(step, model, optimizer)`` after
    each."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for epoch in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        save(4 * (epoch + 1), model, optimizer)
    return model, optimizer


def check(folder, model, steps=(4, 8, 12), optimizer=None):
    """The folder's last weights (and moments) are the model's, and it is audited."""
    run = to.load_run(folder)
    assert [s.step for s in run.snapshots] == list(steps)
    last = run.snapshots[-1]
    for name, weight in model.state_dict().items():
        assert torch.equal(last.load(f"params/{name}"), weight), name
    if optimizer is not None:
        for name, weight in model.named_parameters():
            moment = optimizer.state[weight]["exp_avg_sq"]
            assert torch.equal(last.load(f"exp_avg_sq/{name}"), moment), name
    audit = to.audit(run, model=net(), probe=(X, Y))
    assert audit.lenses["outputs"].summary["dissipation"] > 0
    assert ("optimizer-state" in audit.lenses) == (optimizer is not None)
    return run


def test_accelerate(tmp_path):
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    kept = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=kept)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, wrapped, loader = accelerator.prepare(model, optimizer, batches())
    for _ in range(3):
        for x, y in loader:
            wrapped.zero_grad()
            accelerator.backward(cross_entropy(model(x), y))
            wrapped.step()
        accelerator.save_state()
    check(tmp_path, model, optimizer=optimizer)


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def _sharded(rank, folder, port):
    """One of two gloo processes that train a model cut by `fully_shard` and save it whole
    (``pytorch_model_fsdp.bin``, as Accelerate names it) and in pieces."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(1, 13):
        optimizer.zero_grad()
        cross_entropy(model(X[rank::2]), Y[rank::2]).backward()
        optimizer.step()
        if step % 4:
            continue
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=f"{folder}/dcp/step-{step}")
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer, options=whole)
        if rank == 0:
            os.makedirs(place := f"{folder}/bin/checkpoint-{step}")
            torch.save(weights, f"{place}/pytorch_model_fsdp.bin")
            torch.save(state, f"{place}/optimizer.bin")
    dist.destroy_process_group()


def test_two_processes_of_fully_shard(tmp_path):
    mp.spawn(_sharded, (str(tmp_path), _free_port()), nprocs=2)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(12):  # the same steps in one process
        optimizer.zero_grad()
        cross_entropy(model(X), Y).backward()
        optimizer.step()
    runs = [to.load_run(tmp_path / kind) for kind in ("dcp", "bin")]
    for run in runs:
        assert [s.step for s in run.snapshots] == [4, 8, 12]
        last = run.snapshots[-1]
        assert last.moments_meta() == {"step": 12, "betas": (0.9, 0.999)}
        for name, weight in model.named_parameters():
            moment = optimizer.state[weight]["exp_avg"]
            close = {"rtol": 1e-3, "atol": 1e-4}  # Adam's first steps enlarge rounding
            torch.testing.assert_close(last.load(f"params/{name}"), weight.detach(), **close)
            torch.testing.assert_close(last.load(f"exp_avg/{name}"), moment, **close)
    audits = [to.audit(run, model=net(), probe=(X, Y)) for run in runs]
    for name in ("outputs", "optimizer-state"):
        one, two = (audit.lenses[name].summary for audit in audits)
        keys = [key for key, value in one.items() if isinstance(value, float)]
        assert keys
        assert all(one[key] == pytest.approx(two[key]) for key in keys)


def _deepspeed(_, folder, port, stage):
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    deepspeed.init_distributed("gloo")
    model = net()
    config = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(3):
        for x, y in batches():
            engine.backward(cross_entropy(engine(x), y))
            engine.step()
        engine.save_checkpoint(f"{folder}/raw")
    for step in (4, 8, 12):
        place = f"{folder}/converted/global_step{step}"
        convert_zero_checkpoint_to_fp32_state_dict(f"{folder}/raw", place, tag=f"global_step{step}")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_and_its_own_converter(tmp_path, stage):
    pytest.importorskip("deepspeed")
    mp.spawn(_deepspeed, (str(tmp_path), _free_port(), stage), nprocs=1)
    model, _ = trained(lambda *_: None)
    if stage == 3:  # weights are cut, too
        with pytest.raises(to.InputError, match="zero_to_fp32"):
            to.load_run(tmp_path / "raw")
    for kind in ("converted",) if stage == 3 else ("raw", "converted"):
        run = to.load_run(tmp_path / kind)
        assert [s.step for s in run.snapshots] == [4, 8, 12]
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(run.snapshots[-1].load(f"params/{name}"), weight)


def _trainer_under_deepspeed(_, folder, port, stage):
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    ids = torch.randint(1, 60, (64, 12))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, **small))
    options = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "report_to": []}
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=8, use_cpu=True, deepspeed=config, **options
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    for step in (4, 8) if stage == 3 else ():
        place = f"{folder}/checkpoint-{step}"
        convert_zero_checkpoint_to_fp32_state_dict(place, place)


def test_hugging_faces_trainer_under_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    ids = torch.randint(1, 60, (8, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for stage in (2, 3):
        folder = tmp_path / str(stage)
        mp.spawn(_trainer_under_deepspeed, (str(folder), _free_port(), stage), nprocs=1)
        audit = to.audit(folder, probe={"input_ids": ids, "labels": ids}, lens="outputs")
        assert audit.summary["last_step"] == 8
        losses.append(audit.summary["loss_end"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def saving(folder):
    def save(step, model, optimizer):
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content, folder / f"step_{step}.pt")

    return save


def test_curves_of_tensorboard(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 13):
            writer.add_scalar("Loss/train", 1 / step, step)
            writer.add_scalar("lr", 0.01, step)
    model, optimizer = trained(saving(tmp_path))
    run = check(tmp_path, model, optimizer=optimizer)
    assert run.steps["loss"].tolist() == pytest.approx([1 / k for k in range(1, 13)])
    assert run.steps["lr"].tolist() == pytest.approx([0.01] * 12)


@pytest.mark.parametrize("kind", ["history", "page"])
def test_curves_exported_from_weights_and_biases(tmp_path, kind):
    columns = {
        "history": {"_step": range(1, 13), "train/loss": 0.5, "_runtime": 1.0},
        "page": {"Step": range(1, 13), "brisk-sun-3 - train/loss": 0.5}
        | {"brisk-sun-3 - train/loss__MIN": 0.5, "brisk-sun-3 - train/loss__MAX": 0.5},
    }
    pd.DataFrame(columns[kind]).to_csv(tmp_path / "wandb_export_2026.csv", index=False)
    trained(saving(tmp_path))
    assert to.load_run(tmp_path).steps["loss"].tolist() == [0.5] * 12


def test_the_folder_of_weights_and_biases_is_named(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="p", dir=str(tmp_path), mode="offline") as run:
        run.log({"train/loss": 1.0})
    trained(saving(tmp_path))
    assert any("wandb_export.csv" in remark for remark in to.load_run(tmp_path).remarks)


def test_ignite(tmp_path):
    pytest.importorskip("ignite")
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def step(_, batch):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    trainer = Engine(step)
    saved = {"model": model, "optimizer": optimizer, "trainer": trainer}
    disk = DiskSaver(str(tmp_path), require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(saved, disk, n_saved=None))
    trainer.run(batches(), 3)
    check(tmp_path, model, optimizer=optimizer)


def test_skorch(tmp_path):
    pytest.importorskip("skorch")
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Checkpoint

    saved = Checkpoint(
        monitor=None,
        dirname=str(tmp_path),
        f_params="params_{last_epoch[epoch]}.pt",
        f_optimizer="optimizer_{last_epoch[epoch]}.pt",
    )
    options = {"criterion": nn.CrossEntropyLoss, "optimizer": torch.optim.Adam, "max_epochs": 3}
    network = NeuralNetClassifier(
        net(), **options, verbose=0, train_split=None, callbacks=[saved], batch_size=16
    )
    network.fit(X.numpy(), Y.numpy())
    check(tmp_path, network.module_, steps=(4, 8, 12), optimizer=network.optimizer_)


def test_flax(tmp_path):
    pytest.importorskip("flax")
    import jax
    import jax.numpy as jnp
    from flax import linen
    from flax.serialization import to_bytes

    model, x, y = linen.Dense(3), jnp.array(X.numpy()), jnp.array(Y.numpy())
    weights = model.init(jax.random.key(0), x)

    def loss(weights):
        return -jax.nn.log_softmax(model.apply(weights, x))[jnp.arange(len(y)), y].mean()

    seen = []
    for step in range(0, 40, 10):
        seen.append(np.asarray(model.apply(weights, x)))
        np.savez(tmp_path / f"step_{step}.npz", logits=seen[-1], labels=y)
        gradient = jax.grad(loss)(weights)
        weights = jax.tree.map(lambda w, g: w - g, weights, gradient)
    expected = to.audit_predictions(seen, Y, steps=range(0, 40, 10)).summary
    assert to.audit(tmp_path).summary["dissipation"] == pytest.approx(expected["dissipation"])
    (tmp_path / "msgpack").mkdir()
    (tmp_path / "msgpack/params_10.msgpack").write_bytes(to_bytes(weights))
    with pytest.raises(to.InputError, match="Flax or Orbax"):
        to.load_run(tmp_path / "msgpack")


def test_checkpoints_without_weights_are_named(tmp_path):
    for name in ("checkpoint-{}", "global_step{}"):
        (folder := tmp_path / name[:6]).mkdir()
        for step in (4, 8, 12, 16):
            (place := folder / name.format(step)).mkdir()
            (place / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")
            if step < 12:
                torch.save(net().state_dict(), place / "pytorch_model.bin")
        run = to.load_run(folder)
        assert [s.step for s in run.snapshots] == [4, 8]
        said = f"can be read: {name.format(12)}, {name.format(16)}"
        assert any(said in remark for remark in run.remarks)


def test_keras_and_jax(tmp_path, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = [keras.Input((6,)), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential(layers)
    model.compile("sgd", "sparse_categorical_crossentropy")
    seen = []

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(self.model.predict(X.numpy(), verbose=0))
            np.savez(tmp_path / f"epoch_{epoch}.npz", softmax=seen[-1], labels=Y.numpy())

    model.fit(X.numpy(), Y.numpy(), epochs=4, verbose=0, callbacks=[Save()])
    expected = to.audit_predictions(seen, Y, kind="probabilities").summary["distance"]
    assert to.audit(tmp_path).summary["distance"] == pytest.approx(expected)


@pytest.mark.parametrize("library", ["xgboost", "lightgbm"])
def test_boosted_trees(tmp_path, library):
    trees = pytest.importorskip(library)
    rounds = (1, 5, 10, 20)
    if library == "xgboost":
        data = trees.DMatrix(X.numpy(), Y.numpy())
        booster = trees.train(
            {"objective": "multi:softprob", "num_class": 3, "nthread": 1}, data, 20
        )
        seen = [booster.predict(data, iteration_range=(0, k)) for k in rounds]
        tables = [
            pd.DataFrame(p, columns=["prob_0", "prob_1", "prob_2"]).assign(iteration=k, label=Y)
            for k, p in zip(rounds, seen, strict=True)
        ]
        pd.concat(tables).to_parquet(tmp_path / "predictions.parquet")
        kind = "probabilities"
    else:
        options = {"objective": "multiclass", "num_class": 3, "verbose": -1, "num_threads": 1}
        data = trees.Dataset(X.numpy(), Y.numpy())
        booster = trees.train({**options, "min_data_in_leaf": 2}, data, 20)
        seen = [booster.predict(X.numpy(), num_iteration=k, raw_score=True) for k in rounds]
        arrays = {"raw_score": np.stack(seen), "label": Y.numpy(), "num_iteration": rounds}
        np.savez(tmp_path / "predictions.npz", **arrays)
        kind = "logits"
    expected = to.audit_predictions(seen, Y, kind=kind, steps=rounds).summary
    got = to.audit(tmp_path).summary
    for key in ("dissipation", "distance", "loss_end", "last_step"):
        assert got[key] == pytest.approx(expected[key], rel=1e-5), key

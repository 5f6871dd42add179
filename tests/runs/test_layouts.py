"""Layouts that people have on disk: names, suffixes, wrappers, folders, what stands beside."""

import argparse
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.runs import as_probe, install, load_run, predict
from thermo_opt.runs.readers.steps import numbers_in

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def train(save, count=3, per=4):
    """save(k, step, model, optimizer) before training and after each ``per`` steps."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    save(0, 0, model, optimizer)
    for k in range(1, count + 1):
        for _ in range(per):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
        save(k, k * per, model, optimizer)
    return model


def assert_replays(path, model, steps, **options):
    run = load_run(path, **options)
    assert [snapshot.step for snapshot in run.snapshots] == steps
    replayed = network()
    install(replayed, run.snapshots[-1], run.info.tied)
    assert torch.equal(predict(replayed, X), predict(model, X))
    return run


@pytest.mark.parametrize(
    ("stems", "numbers", "unit"),
    [
        (["epoch00-loss1.4000", "epoch01-loss0.6123"], [0, 1], "epoch"),
        (["ckpt_acc95_it200", "ckpt_acc97_it400"], [200, 400], "step"),
        (["resnet50_v2_10", "resnet50_v2_20"], [10, 20], None),
        (["epoch=1-step=500", "epoch=2-step=1000-v1"], [500, 1000], "step"),
        (["2024-11-25_iter_7", "2024-11-26_iter_9"], [7, 9], "step"),
        (["model-1e-05-3", "model-1e-05-4"], [3, 4], None),
        (["best", "model.7"], [None, 7], None),
    ],
)
def test_a_score_in_a_name_is_never_a_step(stems, numbers, unit):
    found = numbers_in(stems)
    assert found.numbers == numbers
    assert found.unit == unit


def test_two_numbers_that_vary_need_a_word():
    with pytest.raises(InputError, match="which of the numbers 3 and 95 is the step"):
        numbers_in(["net-3-95", "net-4-97"])


@pytest.mark.parametrize("suffix", [".pth.tar", ".bin", ".th", ".pkl", ".ckpt", ".PT"])
def test_suffixes_of_torch_save(tmp_path, suffix):
    model = train(
        lambda k, step, m, o: torch.save(
            {"net": m.state_dict(), "epoch": k}, tmp_path / f"e{k}{suffix}"
        )
    )
    run = assert_replays(tmp_path, model, [0, 1, 2, 3])
    assert run.info.step_unit == "epoch"
    assert any("epoch" in remark for remark in run.remarks)


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "net._orig_mod.", "a.b."])
def test_wrappers_are_peeled(tmp_path, prefix):
    def save(k, step, m, o):
        tensors = {prefix + name: tensor for name, tensor in m.state_dict().items()}
        torch.save({**tensors, "criterion.weight": torch.ones(3)}, tmp_path / f"step{step}.pt")

    assert_replays(tmp_path, train(save), [0, 4, 8, 12])


def test_a_wrong_model_is_noticed_behind_a_prefix(tmp_path):
    deep = nn.Sequential(*network(), nn.Linear(3, 3))
    tensors = {f"net.{name}": tensor for name, tensor in deep.state_dict().items()}
    torch.save(tensors, tmp_path / "1.pt")
    with pytest.raises(InputError, match="the model lacks"):
        install(network(), load_run(tmp_path).snapshots[0])


def test_steps_come_from_a_count_in_the_file(tmp_path):
    def save(k, step, m, o):
        torch.save({"model": m.state_dict(), "iter_num": 10 * step}, tmp_path / f"epoch_{k}.pt")

    run = assert_replays(tmp_path, train(save), [0, 40, 80, 120])
    assert run.info.step_unit == "step"
    assert "iter_num" in run.info.step_source


def test_files_that_changed_places_are_said(tmp_path):
    def save(k, step, m, o):
        torch.save({"model": m.state_dict(), "global_step": step}, tmp_path / f"step-{step}.pt")

    train(save, count=4)
    assert not any("swapped" in remark for remark in load_run(tmp_path).remarks)
    a, b = sorted(tmp_path.glob("*.pt"))[:2]
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    assert any(r"(global_step) don't grow" in remark for remark in load_run(tmp_path).remarks)


def test_objects_beside_the_weights_are_skipped(tmp_path):
    def save(k, step, m, o):
        content = {
            "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")),
            "best": np.float32(0.5),
            "curve": np.arange(4.0),
            "global_step": np.int64(step),
            "ema": {name: w + 1 for name, w in m.state_dict().items()},
            "inner": {"model": m.state_dict()},
            "optim": o.state_dict(),
        }
        torch.save(content, tmp_path / f"{k}.pt")

    model = train(save)
    run = assert_replays(tmp_path, model, [0, 4, 8, 12])
    assert run.snapshots[-1].moments_meta()["step"] == 12
    averaged = load_run(tmp_path, key="ema").snapshots[-1]
    assert torch.equal(averaged.load("params/0.bias"), model[0].bias + 1)


def shifted(model, by):
    return {name: w + by if w.is_floating_point() else w for name, w in model.state_dict().items()}


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_averaged_weights_and_raw_ones_make_no_series(tmp_path, odd):
    def save(k, step, m, o):
        content = {"model_ema": shifted(m, 0.5)} if k == odd else {"model": m.state_dict()}
        torch.save(content, tmp_path / f"step_{step}.pt")

    train(save)
    with pytest.raises(InputError, match="don't make one series"):
        [snapshot.load_group("params") for snapshot in load_run(tmp_path).snapshots]


def test_a_series_that_begins_averaged_goes_on_averaged(tmp_path):
    def save(k, step, m, o):
        raw = {"model": m.state_dict()} if k else {}
        torch.save({"modelEma": shifted(m, 0.5), **raw}, tmp_path / f"step_{step}.pt")

    model = train(save)
    run = load_run(tmp_path)
    assert torch.equal(run.snapshots[-1].load("params/0.bias"), model[0].bias + 0.5)
    assert any("are an average (modelEma)" in remark for remark in run.remarks)


@pytest.mark.parametrize("swapped", [0, 1, 2])
def test_the_average_put_into_the_model_at_the_end_is_left_out(tmp_path, swapped):
    def save(k, step, m, o):
        average = shifted(m, 0.5 if k else 0.0)  # before the first step it is the model's copy
        own = average if k > 3 - swapped else m.state_dict()
        torch.save({"model": own, "ema": average}, tmp_path / f"step_{step}.pt")

    train(save)
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 4, 8, 12][: 4 - swapped]
    assert any("have taken the place" in remark for remark in run.remarks) == (swapped > 0)


def test_words_that_hold_ema_are_no_averages(tmp_path):
    def save(k, step, m, o):
        content = {"semantic_head": m.state_dict()}
        torch.save(content, tmp_path / f"step_{step}.pt")

    assert not any(
        "average" in remark
        for remark in assert_replays(tmp_path, train(save), [0, 4, 8, 12]).remarks
    )


def test_a_whole_pickled_model_gives_its_weights_and_its_class_is_not_built(tmp_path):
    model = train(lambda k, step, m, o: torch.save(m, tmp_path / f"step_{step}.pt"))
    assert_replays(tmp_path, model, [0, 4, 8, 12])


def test_several_models_in_a_file_need_a_key(tmp_path):
    for k in range(2):
        torch.save(
            {"G": network().state_dict(), "D": nn.Linear(2, 2).state_dict()}, tmp_path / f"{k}.pt"
        )
    with pytest.raises(InputError, match=r"several models \(D, G\); choose one with --key"):
        load_run(tmp_path)
    assert load_run(tmp_path, key="D").snapshots[0].shape("params/weight") == (2, 2)


def test_one_folder_per_checkpoint(tmp_path):
    def save(k, step, m, o):
        for kind in ("torch", "tensors", "distributed"):
            (tmp_path / kind / f"ckpt_{k}").mkdir(parents=True)
        torch.save(m.state_dict(), tmp_path / f"torch/ckpt_{k}/model.pt")
        torch.save(o.state_dict(), tmp_path / f"torch/ckpt_{k}/optimizer.bin")
        save_file(m.state_dict(), tmp_path / f"tensors/ckpt_{k}/model.safetensors")
        dcp.save({"model": m.state_dict()}, checkpoint_id=tmp_path / f"distributed/ckpt_{k}")

    model = train(save)
    run = assert_replays(tmp_path / "torch", model, [0, 4, 8, 12])  # the optimizer's own count
    assert run.snapshots[2].has_group("exp_avg_sq")
    assert_replays(tmp_path / "tensors", model, [0, 1, 2, 3])
    assert_replays(tmp_path / "distributed", model, [0, 1, 2, 3])


def test_weights_and_moments_of_torch_distributed_checkpoint(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    kept = []

    def save(k, step, m, o):
        if step == 0:  # torch would take a step to have a state
            return
        weights, state = get_state_dict(m, o)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / f"step-{step}")
        kept.append(
            {name: o.state[p].get("exp_avg", p).clone() for name, p in m.named_parameters()}
        )

    train(save)
    last = load_run(tmp_path).snapshots[-1]
    assert last.moments_meta() == {"step": 12, "betas": (0.9, 0.999)}
    for name, moment in kept[-1].items():
        assert torch.equal(last.load(f"exp_avg/{name}"), moment)


def test_files_beside_a_series_do_not_stop_it(tmp_path):
    def save(k, step, m, o):
        torch.save(m.state_dict(), tmp_path / f"model_{k}.pt")
        torch.save(o.state_dict(), tmp_path / f"optimizer_{k}.pt")
        torch.save(m.state_dict(), tmp_path / f"ema_{k}.pt")

    model = train(save)
    shutil.copy(tmp_path / "model_3.pt", tmp_path / "best.pt")
    torch.save({"last_epoch": 3}, tmp_path / "scheduler.pt")
    run = assert_replays(tmp_path, model, [0, 4, 8, 12])
    assert run.snapshots[1].has_group("exp_avg")
    assert any("best.pt" in remark for remark in run.remarks)


def test_a_broken_optimizer_file_stops_only_the_moments(tmp_path):
    def save(k, step, m, o):
        torch.save(m.state_dict(), tmp_path / f"model_{k}.pt")
        (tmp_path / f"optimizer_{k}.pt").write_bytes(b"PK\x03\x04broken")

    run = assert_replays(tmp_path, train(save), [0, 1, 2, 3])
    with pytest.raises(InputError, match=r"optimizer_3\.pt"):
        run.snapshots[3].load_group("exp_avg")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"exp_avg_sq_row", "exp_avg_sq_col"}, "factored second moments"),
        ({"state1", "state2"}, "quantised moments"),
    ],
)
def test_other_optimizers_are_named(tmp_path, keys, said):
    weights = {"w": torch.ones(2, 2)}
    state = {
        "state": {0: {"step": 1, **{key: torch.ones(2) for key in keys}}},
        "param_groups": [{"params": [0], "lr": 0.1}],
    }
    torch.save({"model": weights, "optimizer": state}, tmp_path / "1.pt")
    with pytest.raises(InputError, match=said):
        load_run(tmp_path).snapshots[0].load_group("exp_avg")


def test_saved_names_beat_the_order(tmp_path):
    """Two parameters of one shape, given to the optimizer in the other order by name."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    optimizer = torch.optim.Adam([(f"{n}.weight", model[n].weight) for n in ("b", "a")])
    (model["a"].weight.sum() + 2 * model["b"].weight.sum()).backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "1.pt"
    )
    (snapshot,) = load_run(tmp_path).snapshots
    assert torch.equal(
        snapshot.load("exp_avg/b.weight"), optimizer.state[model["b"].weight]["exp_avg"]
    )


def test_a_folder_above_one_run_is_that_run_and_above_several_names_them(tmp_path):
    for seed in ("s0", "s1"):
        (tmp_path / seed / "checkpoints").mkdir(parents=True)
        for step in (1, 2):
            torch.save(network().state_dict(), tmp_path / seed / "checkpoints" / f"step_{step}.pt")
    assert len(load_run(tmp_path / "s0").snapshots) == 2
    with pytest.raises(InputError, match=r"holds several runs .*s0.*s1.*compare"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("epoch_1.weights.h5", "Keras"),
        ("__0_0.distcp", "torch.distributed.checkpoint"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt.x", "DeepSpeed"),
        ("_CHECKPOINT_METADATA", "Orbax"),
        ("model.ckpt-100.index", "TensorFlow"),
        ("events.out.tfevents.1.host", "TensorBoard"),
        ("predictions.npz", "audit_predictions"),
    ],
)
def test_other_layouts_are_told_by_name(tmp_path, name, said):
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_5" / name).write_text("x")
    with pytest.raises(InputError, match=said):
        load_run(tmp_path)


def test_deepspeed_weights_are_read_and_its_optimizer_is_named(tmp_path):
    for step in (10, 20):
        (tmp_path / f"global_step{step}").mkdir()
        torch.save(
            {"module": network().state_dict(), "lr_scheduler": None},
            tmp_path / f"global_step{step}/mp_rank_00_model_states.pt",
        )
        torch.save({}, tmp_path / f"global_step{step}/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [10, 20]
    assert run.snapshots[0].load_group("params")
    with pytest.raises(InputError, match="DeepSpeed"):
        run.snapshots[0].load_group("exp_avg")


def test_curves_of_csv_and_json_lines(tmp_path):
    for name, text in (
        ("log.csv", "step,train_loss,lr\n1,0.5,0.1\n2,0.25,0.1\n"),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5, "lr": 0.1}\n{"step": 2, "loss": 0.25}\n'),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        torch.save(network().state_dict(), folder / "step_1.pt")
        (folder / name).write_text(text)
        assert load_run(folder).steps["loss"].tolist() == [0.5, 0.25]


def test_probes_as_people_hold_them():
    ids = torch.arange(12).reshape(4, 3)
    rows = [{"input_ids": row, "attention_mask": torch.ones(3), "labels": row[0]} for row in ids]
    loader = torch.utils.data.DataLoader(rows, batch_size=3)
    probe = as_probe(loader)
    assert set(probe.inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(probe.targets, ids[:, 0])
    pair = as_probe((ids.numpy(), ids[:, 0].tolist()))
    assert torch.equal(pair.inputs, ids)
    named = as_probe({"x": ids, "y": ids[:, 0], "weight_of_row": ids[:, 1]})
    assert torch.equal(named.inputs, ids)
    assert any("weight_of_row" in remark for remark in named.remarks)
    with pytest.raises(InputError, match="give the path of a file"):
        as_probe(object())


def test_sharded_files_of_torch_save(tmp_path):
    model = network()
    tensors = model.state_dict()
    for step in (1, 2):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        names = list(tensors)
        shards = {"a.bin": names[:3], "b.bin": names[3:]}
        for file, part in shards.items():
            torch.save({name: tensors[name] for name in part}, folder / file)
        of = {name: file for file, part in shards.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": of}))
    assert_replays(tmp_path, model, [1, 2])


@pytest.mark.parametrize("names", [("module.encoder_q", "module.encoder_k"), ("0", "1")])
def test_a_model_stored_twice_needs_a_key(tmp_path, names):
    models = [network(), network()]
    for step in (1, 2):
        nn.init.normal_(models[1][0].weight)
        stored = {
            f"{prefix}.{name}": tensor
            for prefix, model in zip(names, models, strict=True)
            for name, tensor in model.state_dict().items()
        }
        torch.save({"state_dict": stored}, tmp_path / f"step_{step}.pt")
    inputs = torch.randn(8, *models[0][0].weight.shape[1:])
    probe = (inputs, models[0](inputs).argmax(-1))
    last = names[1].split(".")[-1]
    with pytest.raises(InputError, match=rf"2 times, under .*'{last}\.'.*--key"):
        to.audit(tmp_path, model=network(), probe=probe, lens="outputs")
    run = load_run(tmp_path, key=last)
    assert torch.equal(run.snapshots[-1].load("params/0.weight"), models[1][0].weight)
    assert to.audit(run, model=network(), probe=probe, lens="outputs").summary["distance"] > 0


@pytest.mark.parametrize("form", [list, lambda states: dict(enumerate(states))])
def test_all_models_in_one_file_are_told(tmp_path, form):
    torch.save({"states": form([network().state_dict()] * 3)}, tmp_path / "history.pt")
    with pytest.raises(InputError, match=r"holds 3 models .* a file of its own"):
        load_run(tmp_path)


def test_training_states_beside_models_are_the_optimizers(tmp_path):
    def save(k, step, m, o):
        torch.save(m.state_dict(), tmp_path / f"model_state_epoch_{k}.th")
        state = {"optimizer": o.state_dict(), "metric_tracker": {}}
        torch.save(state, tmp_path / f"training_state_epoch_{k}.th")

    run = assert_replays(tmp_path, train(save), [0, 4, 8, 12])
    assert run.snapshots[1].has_group("exp_avg")

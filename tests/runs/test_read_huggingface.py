"""The reader of Hugging Face output, on what the real `Trainer` writes (tiny models, from configs,
no download)."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from thermo_opt.errors import InputError
from thermo_opt.runs import install, load_run, predict
from thermo_opt.runs.readers.architecture import model_from_config

SMALL = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None}


def gpt2():
    """Tied input and output embeddings, biases, LayerNorm."""
    return GPT2LMHeadModel(GPT2Config(**SMALL, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama_frozen_bf16():
    """Untied, RMSNorm, bf16, one layer frozen: fewer parameters in the optimizer than in the
    model."""
    config = LlamaConfig(
        **SMALL,
        pad_token_id=None,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.embed_tokens.requires_grad_(False)
    return model


def bert():
    """A classifier with an integer buffer."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def train(path, model, **arguments):
    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (32, 8))
    labels = tokens[:, 0] % 3 if isinstance(model, BertForSequenceClassification) else tokens
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    settings = TrainingArguments(
        str(path),
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        include_num_input_tokens_seen=True,
        **arguments,
    )
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    return trainer


@pytest.fixture(
    scope="module",
    params=[gpt2, llama_frozen_bf16, bert],
    ids=["gpt2", "llama-frozen-bf16", "bert"],
)
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hugging face") / "ausgabe ü"
    torch.manual_seed(0)
    model = request.param()
    return path, model, train(path, model)


def test_weights_and_moments_are_those_of_the_trainer(trained):
    path, model, trainer = trained
    run = load_run(path)
    assert run.format == "huggingface"
    assert [snapshot.step for snapshot in run.snapshots] == [2, 4, 6]
    last = run.snapshots[-1]
    weights = last.load_group("params")
    optimizer = (
        trainer.optimizer.optimizer
        if hasattr(trainer.optimizer, "optimizer")
        else trainer.optimizer
    )
    for name, parameter in model.named_parameters():
        assert weights[name].dtype == parameter.dtype
        assert torch.equal(weights[name], parameter)
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            assert torch.equal(last.load(f"exp_avg/{name}"), state["exp_avg"])
            assert torch.equal(last.load(f"exp_avg_sq/{name}"), state["exp_avg_sq"])
        else:
            assert f"exp_avg/{name}" not in last.names()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(last.load_group("exp_avg")) == trainable
    assert last.moments_meta() == {"step": 6, "betas": (0.9, 0.999)}
    assert run.info.optimizer == "AdamW"
    assert run.info.likelihood == "categorical"


def test_training_curve_and_clocks(trained):
    path, _, trainer = trained
    run = load_run(path)
    assert list(run.steps.index) == [1, 2, 3, 4, 5, 6]
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert list(run.steps["loss"]) == logged
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert run.clock_readings("flow", [6])[0] == pytest.approx(sum(rates))
    assert list(run.clock_readings("tokens", [2, 4, 6])) == [64, 128, 192]
    with pytest.raises(InputError, match="'examples'"):
        run.clock_readings("examples", [2, 4])


def test_replay_from_the_config(trained):
    path, model, _ = trained
    run = load_run(path)
    replayed = model_from_config(run.info.hf_config_path).to(next(model.parameters()).dtype)
    install(replayed, run.snapshots[-1], run.info.tied)
    tokens = torch.arange(24).reshape(3, 8)
    assert torch.equal(
        predict(replayed, {"input_ids": tokens}), predict(model, {"input_ids": tokens})
    )


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2") / "run"
    torch.manual_seed(0)
    train(path, gpt2())
    return path


@pytest.fixture
def copy(gpt2_run, tmp_path):
    """A GPT-2 run that a test may change."""
    return shutil.copytree(gpt2_run, tmp_path / "copy")


def test_sharded_weights(copy):
    before = [snapshot.load_group("params") for snapshot in load_run(copy).snapshots]
    for folder in copy.glob("checkpoint-*"):
        model = GPT2LMHeadModel.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    run = load_run(copy)
    for snapshot, expected in zip(run.snapshots, before, strict=True):
        found = snapshot.load_group("params")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert snapshot.has_group("exp_avg")
    shard = next((copy / "checkpoint-4").glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load_run(copy).snapshots[1].load_group("params")


def test_pickles_are_never_run(copy, tmp_path):
    """training_args.bin isn't opened at all; a poisoned optimizer.pt is refused by name without
    running."""
    mark = tmp_path / "ran"

    class Poison:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    (copy / "checkpoint-2/training_args.bin").write_bytes(pickle.dumps(Poison()))
    assert load_run(copy).snapshots[0].has_group("exp_avg")
    torch.save({"state": Poison(), "param_groups": []}, copy / "checkpoint-2/optimizer.pt")
    first = load_run(copy).snapshots[0]
    assert first.load_group("params")  # a broken optimizer file stops only what needs it
    with pytest.raises(InputError, match=r"optimizer\.pt"):
        first.load_group("exp_avg")
    assert not mark.exists()


def test_moments_that_cannot_be_named(copy):
    """Without the architecture the order of the moments is unknown; the weights are read, the
    moments refused with the reason.
    """
    for folder in copy.glob("checkpoint-*"):
        (folder / "config.json").unlink()
    run = load_run(copy)
    assert run.info.hf_config_path is None
    assert run.info.likelihood is None
    snapshot = run.snapshots[0]
    assert snapshot.load_group("params")
    assert not snapshot.has_group("exp_avg")
    with pytest.raises(InputError, match="more than one possibility"):
        snapshot.load_group("exp_avg")
    with pytest.raises(InputError, match="more than one possibility"):
        snapshot.moments_meta()


def test_code_in_a_checkpoint_is_not_run(copy, tmp_path):
    for folder in copy.glob("checkpoint-*"):
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own",
            "architectures": ["Own"],
            "auto_map": {"AutoModel": "own.Own"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    run = load_run(copy)
    with pytest.raises(InputError, match="more than one possibility"):
        run.snapshots[0].load_group("exp_avg")
    with pytest.raises(InputError, match="--model"):
        model_from_config(run.info.hf_config_path)
    assert not (tmp_path / "ran").exists()


def test_unnamed_moments_with_unique_shapes(tmp_path):
    """Shapes that occur once each need no architecture."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (snapshot,) = load_run(tmp_path).snapshots
    for name, parameter in model.named_parameters():
        assert torch.equal(snapshot.load(f"exp_avg/{name}"), optimizer.state[parameter]["exp_avg"])


def test_damage_is_named(copy):
    weights = copy / "checkpoint-4/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = load_run(copy)
    assert run.snapshots[0].load_group("params")
    with pytest.raises(InputError, match=r"checkpoint-4/model\.safetensors"):
        run.snapshots[1].load_group("params")
    (copy / "checkpoint-6/trainer_state.json").write_text('{"log_history": [')
    with pytest.raises(InputError, match=r"trainer_state\.json"):
        load_run(copy)


def test_checkpoints_that_changed_places_are_refused(copy):
    first, second = sorted(copy.glob("checkpoint-*"))[:2]
    between = copy / "between"
    first.rename(between)
    second.rename(first)
    between.rename(second)
    with pytest.raises(InputError, match="is named as step 2, but its"):
        load_run(copy)


@pytest.mark.parametrize("format", ["huggingface", None])
def test_one_checkpoint_folder_is_not_a_run(copy, format):
    with pytest.raises(InputError, match="folder that holds it"):
        load_run(copy / "checkpoint-2", format=format)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no-such"},
        {"architectures": [3]},
        {"n_embd": "wide"},
        {"n_embd": 33, "n_head": 2},
    ],
)
def test_a_config_that_builds_nothing_is_named(copy, change):
    for file in copy.glob("checkpoint-*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    run = load_run(copy)
    assert run.snapshots[0].load_group("params")
    with pytest.raises(InputError, match=r"config\.json.*--model"):
        model_from_config(run.info.hf_config_path)


def test_a_log_without_numbers_is_named_and_tokens_are_counted_from_the_row_before(copy):
    state = copy / "checkpoint-6/trainer_state.json"
    state.write_text(json.dumps({"log_history": [{"step": 1, "loss": "low"}]}))
    with pytest.raises(InputError, match=r"trainer_state\.json: 'loss'"):
        load_run(copy)
    seen = [
        {"step": 1, "num_input_tokens_seen": 10},
        {"step": 2},
        {"step": 3, "num_input_tokens_seen": 40},
    ]
    state.write_text(json.dumps({"log_history": seen}))
    assert load_run(copy).steps["tokens"].dropna().to_dict() == {1: 10.0, 3: 30.0}


def test_probe_beside_the_checkpoints(copy):
    save_file(
        {"inputs/input_ids": torch.zeros(2, 8, dtype=torch.long), "targets": torch.ones(2, 8)},
        copy / "probe.safetensors",
    )
    assert set(load_run(copy).probe.inputs) == {"input_ids"}

"""LoRA adapters as the real Trainer and PEFT leave them: replayed on a base that the user gives."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import thermo_opt as to
from thermo_opt.errors import InputError

TOKENS = torch.randint(0, 40, (24, 8), generator=torch.Generator().manual_seed(1))


def gpt2():
    config = GPT2Config(
        vocab_size=40, bos_token_id=None, eos_token_id=None, n_positions=16, n_embd=16, n_layer=2,
        n_head=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(**settings):
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, **settings,
    )  # fmt: skip
    return BertForSequenceClassification(config)


CASES = {
    "gpt2": (
        gpt2,
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
        TOKENS,
    ),
    "gpt2-patterns-dora": (
        gpt2,
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=r".*(c_attn|c_fc)",
            rank_pattern={"c_fc": 3},
            alpha_pattern={"h.1.attn.c_attn": 7},
            use_dora=True,
            use_rslora=True,
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        ),
        TOKENS,
    ),
    "bert-regression-head-and-biases": (
        lambda: bert(num_labels=1),
        LoraConfig(
            r=2, target_modules=["query", "word_embeddings"], bias="all", task_type="SEQ_CLS"
        ),
        TOKENS[:, :1].float() / 40,
    ),
    "bert-classes": (
        lambda: bert(num_labels=3),
        LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"),
        TOKENS[:, 0] % 3,
    ),
}


def train(path, base, config, labels):
    base.save_pretrained(path / "base")
    rows = [{"input_ids": x, "labels": y} for x, y in zip(TOKENS, labels, strict=True)]
    settings = TrainingArguments(
        str(path / "run"), max_steps=3, save_steps=1, learning_rate=0.2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(get_peft_model(base, config), settings, train_dataset=rows).train()


def own_loss_and_outputs(path, kind, labels):
    """What PEFT itself makes of every checkpoint."""
    for step in (1, 2, 3):
        base = kind.from_pretrained(path / "base")
        model = PeftModel.from_pretrained(base, path / f"run/checkpoint-{step}").eval()
        with torch.no_grad():
            yield model(input_ids=TOKENS, labels=labels)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_on_its_base_replays_to_pefts_own_outputs(tmp_path, name):
    make, config, labels = CASES[name]
    torch.manual_seed(0)
    kind = type(base := make())
    train(tmp_path, base, config, labels)
    lenses = {"outputs", "parameters"}
    if "biases" not in name:  # whose order among the base's layers nothing tells
        lenses |= {"optimizer-state"}
        alone = to.audit(tmp_path / "run")
        assert set(alone.lenses) == {"optimizer-state"}
        assert "give" in alone.missing["outputs"]
    probe = {"input_ids": TOKENS, "labels": labels}
    audit = to.audit(tmp_path / "run", model=str(tmp_path / "base"), probe=probe, batch_size=8)
    assert set(audit.lenses) == lenses
    seen = audit.lenses["outputs"]
    own = list(own_loss_and_outputs(tmp_path, kind, labels))
    if "regression" in name:
        sigma2 = float(own[-1].loss)
        a = [float((p.logits - q.logits).square().mean()) / sigma2
             for p, q in itertools.pairwise(own)]  # fmt: skip
    else:
        where = slice(None, -1) if kind is GPT2LMHeadModel else slice(None)
        p = [(o.logits[:, where] if o.logits.ndim == 3 else o.logits).double() for o in own]
        p = [z.log_softmax(-1).numpy() for z in p]
        a = [
            np.mean((2 * np.arccos(np.minimum(np.exp((s + t) / 2).sum(-1), 1))) ** 2)
            for s, t in itertools.pairwise(p)
        ]
        np.testing.assert_allclose(seen.steps["loss"], [o.loss for o in own[:-1]], rtol=1e-5)
    np.testing.assert_allclose(seen.steps["a"], a, rtol=2e-4)
    assert max(a) > 1e-4
    in_weights = audit.lenses["parameters"].steps["a"]
    assert abs(np.log(in_weights / seen.steps["a"])).max() < 1  # to first order in large steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    make, config, labels = CASES["gpt2"]
    train(path, make(), config, labels)
    return path


PROBE = {"input_ids": TOKENS, "labels": TOKENS}


def test_the_base_may_be_a_module_or_pefts_whole_model(run):
    base = GPT2LMHeadModel.from_pretrained(run / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    whole = PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(run / "base"), run / "run/checkpoint-1"
    )
    audits = [
        to.audit(run / "run", model=model, probe=PROBE, lens="outputs", jobs=jobs)
        for model, jobs in ((str(run / "base"), 1), (base, 1), (whole, 1), (whole, 2))
    ]
    for audit in audits[1:]:
        assert audit.summary["dissipation"] == audits[0].summary["dissipation"]
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_other_adapters_are_replayed_on_pefts_whole_model(tmp_path):
    config = IA3Config(
        target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], task_type="CAUSAL_LM",
        fan_in_fan_out=True,
    )  # fmt: skip
    torch.manual_seed(0)
    train(tmp_path, gpt2(), config, TOKENS)
    with pytest.raises(InputError, match=r"'IA3', not LORA.*whole PEFT model"):
        to.audit(tmp_path / "run", model=str(tmp_path / "base"), probe=PROBE, lens="outputs")
    whole = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config)
    audit = to.audit(tmp_path / "run", model=whole, probe=PROBE, lens="outputs")
    own = own_loss_and_outputs(tmp_path, GPT2LMHeadModel, TOKENS)
    losses = [float(o.loss) for o in own]
    np.testing.assert_allclose(audit.steps["loss"], losses[:-1], rtol=1e-5)


@pytest.fixture
def copy(run, tmp_path):
    """A run of an adapter that a test may change."""
    return shutil.copytree(run, tmp_path / "copy")


def change(copy, **settings):
    for file in copy.glob("run/checkpoint-*/adapter_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' isn't replayed"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "without patterns"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"bias": "odd"}, "PEFT can't build it"),
    ],
)
def test_settings_that_are_not_replayed_are_named(copy, settings, said):
    change(copy, **settings)
    with pytest.raises(InputError, match=said):
        to.audit(copy / "run", model=str(copy / "base"), probe=PROBE, lens="outputs")


def test_what_an_adapters_config_names_is_not_used(copy, tmp_path, monkeypatch):
    """Patterns aren't matched, and neither the base nor a library that it names is looked for."""
    change(
        copy,
        target_modules="(((a+)+)+)+$",
        base_model_name_or_path="elsewhere/base",
        auto_mapping={"base_model_class": "Own", "parent_library": "poison"},
    )
    (tmp_path / "poison.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert to.audit(copy / "run", model=str(copy / "base"), probe=PROBE, lens="outputs").summary
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match=r"elsewhere.*--model FOLDER"):
        to.audit(copy / "run", probe=PROBE, lens="outputs")


def test_a_wrong_base_is_noticed(copy):
    with pytest.raises(InputError, match=r"'transformer\.h\.0\.attn\.c_attn'.*trained on"):
        to.audit(copy / "run", model=bert(num_labels=3), probe=PROBE, lens="outputs")
    wider = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2,
                                       n_head=2))  # fmt: skip
    with pytest.raises(InputError, match="right base model"):
        to.audit(copy / "run", model=wider, probe=PROBE, lens="outputs")
    (copy / "base/config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        to.audit(copy / "run", model=str(copy / "base"), probe=PROBE, lens="outputs")

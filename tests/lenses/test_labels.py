"""Labels of Hugging Face's models are taken as each model's own loss takes them; padding is no
example."""

import inspect

import numpy as np
import pytest
import torch
import transformers as tr
from torch.nn.functional import cross_entropy

import thermo_opt as to
from thermo_opt.runs import probe as probes

N, T, V = 6, 8, 30
IDS = torch.randint(3, V, (N, T), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[::2, 5:] = 0
PADDED = IDS.masked_fill(MASK == 0, -100)
SMALL = {"vocab_size": V, "d_model": 16, "max_position_embeddings": 20}
BART = {
    **SMALL,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
}
XLM = {"vocab_size": V, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 20}
GPT = tr.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=V, n_positions=16)
T5 = tr.T5Config(
    **{"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    decoder_start_token_id=0,
)
XLNET = tr.XLNetConfig(vocab_size=V, d_model=16, n_layer=1, n_head=2, d_inner=16)


def audited(tmp_path, model, columns):
    """The audit's last loss after two steps, and the loss that the model itself computes there."""
    batch = {name: columns[name] for name in columns if name != "labels"}
    labels = columns["labels"]
    if "attention_mask" in columns and not model.config.is_encoder_decoder:
        labels = labels.masked_fill(columns["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    for step in range(3):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.savez(tmp_path / "probe.npz", **{name: t.numpy() for name, t in columns.items()})
    audit = to.audit(tmp_path, probe=tmp_path / "probe.npz", lens="outputs")
    return audit.summary["loss_end"], float(loss.detach())


@pytest.mark.parametrize(
    ("build", "columns"),
    [
        (lambda: tr.GPT2LMHeadModel(GPT), {"labels": IDS}),
        (lambda: tr.GPT2LMHeadModel(GPT), {"labels": IDS, "attention_mask": MASK}),
        (lambda: tr.GPT2DoubleHeadsModel(GPT), {"labels": IDS}),
        (lambda: tr.XLNetLMHeadModel(XLNET), {"labels": IDS}),
        (lambda: tr.XLMWithLMHeadModel(tr.XLMConfig(**XLM)), {"labels": IDS}),
        (lambda: tr.BartForCausalLM(tr.BartConfig(**BART)), {"labels": IDS}),
        (lambda: tr.T5ForConditionalGeneration(T5), {"labels": IDS}),
        (lambda: tr.T5ForConditionalGeneration(T5), {"labels": PADDED, "attention_mask": MASK}),
        (lambda: tr.T5ForConditionalGeneration(T5), {"labels": IDS, "attention_mask": MASK}),
    ],
)
def test_the_loss_is_the_models_own(tmp_path, build, columns):
    torch.manual_seed(0)
    got, own = audited(tmp_path, build(), {"input_ids": IDS, **columns})
    assert got == pytest.approx(own, rel=1e-5)


SHIFTING = "BertLMHeadModel GPT2LMHeadModel LlamaForCausalLM OPTForCausalLM GPT2DoubleHeadsModel"


@pytest.mark.parametrize("name", [*sorted(probes._AS_THEY_ARE), *SHIFTING.split()])
def test_which_models_shift_their_labels_is_what_their_code_does(name):
    """Those that hand their loss to transformers' common one, or cut the last position off."""
    if not hasattr(tr, name):
        pytest.skip(f"this version of transformers has no {name}")
    code = inspect.getsource(getattr(tr, name).forward)
    assert probes.is_causal(name) == ("loss_function(" in code or ":-1" in code)


def test_arguments_of_rarer_models_reach_them(tmp_path):
    torch.manual_seed(0)
    config = tr.LxmertConfig(
        **{"vocab_size": V, "hidden_size": 16, "num_attention_heads": 2, "num_qa_labels": 5},
        **{"intermediate_size": 16, "l_layers": 1, "x_layers": 1, "r_layers": 1},
        visual_feat_dim=8,
        max_position_embeddings=20,
    )
    model = tr.LxmertForQuestionAnswering(config).eval()
    batch = {
        "input_ids": IDS,
        "visual_feats": torch.randn(N, 4, 8),
        "visual_pos": torch.rand(N, 4, 4),
    }
    answers = torch.arange(N) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        loss = cross_entropy(model(**batch).question_answering_score, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    columns = {**batch, "labels": answers}
    np.savez(tmp_path / "probe.npz", **{name: t.numpy() for name, t in columns.items()})
    audit = to.audit(tmp_path, probe=tmp_path / "probe.npz", lens="outputs")
    assert audit.summary["loss_end"] == pytest.approx(float(loss.detach()), rel=1e-5)

"""Extractive question answering as the real Trainer leaves it: two categorical predictions for each
example."""

import itertools

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainingArguments

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.runs.probe import as_probe

LENGTH = 9


def batch():
    tokens = torch.randint(1, 40, (24, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[::3, -2:] = 0
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "start_positions": tokens[:, 0] % (LENGTH - 2),
        "end_positions": tokens[:, 1] % (LENGTH - 2),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "run"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    rows = [
        dict(zip(batch(), values, strict=True)) for values in zip(*batch().values(), strict=True)
    ]
    settings = TrainingArguments(
        str(path), max_steps=4, save_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(BertForQuestionAnswering(config), settings, train_dataset=rows).train()
    return path


def own_outputs(path, batch):
    """What the library itself makes of every checkpoint: log-probabilities (n, 2, t) and loss."""
    for step in range(1, 5):
        model = BertForQuestionAnswering.from_pretrained(path / f"checkpoint-{step}").eval()
        with torch.no_grad():
            out = model(**batch)
        logits = torch.stack([out.start_logits, out.end_logits], dim=1).double()
        yield logits.log_softmax(-1).numpy(), float(out.loss)


def test_starts_and_ends_are_two_predictions(trained):
    audit = to.audit(trained, probe=batch())
    assert set(audit.lenses) == {"outputs", "parameters", "optimizer-state"}
    log_p, losses = zip(*own_outputs(trained, batch()), strict=True)
    squares = [
        np.mean((2 * np.arccos(np.minimum(np.exp((p + q) / 2).sum(-1), 1))) ** 2)
        for p, q in itertools.pairwise(log_p)
    ]
    seen = audit.lenses["outputs"]
    np.testing.assert_allclose(seen.steps["a"], squares, rtol=1e-4)
    np.testing.assert_allclose(seen.steps["loss"], losses[:-1], rtol=1e-5)
    assert seen.summary["loss_end"] == pytest.approx(losses[-1], rel=1e-5)
    in_weights = audit.lenses["parameters"].steps["a"]
    assert abs(np.log(in_weights / seen.steps["a"])).max() < 1  # to first order in large steps
    assert not any("taken for" in note for note in seen.summary["notes"])


def test_an_answer_cut_off_counts_as_little_as_in_the_model(trained):
    cut = batch()
    cut["start_positions"] = cut["start_positions"].clone()
    cut["start_positions"][:5] = LENGTH
    cut["end_positions"] = cut["end_positions"].clone()
    cut["end_positions"][:5] = LENGTH + 40
    audit = to.audit(trained, probe=cut, lens="outputs")
    losses = [loss for _, loss in own_outputs(trained, cut)]
    np.testing.assert_allclose(audit.steps["loss"], losses[:-1], rtol=1e-5)
    assert any("10 of 48 positions" in note for note in audit.summary["notes"])


def test_positions_that_cannot_be_used():
    with pytest.raises(InputError, match="24 rows and end_positions 23"):
        as_probe(batch() | {"end_positions": batch()["end_positions"][:23]})
    with pytest.raises(InputError, match="whole number"):
        as_probe(batch() | {"end_positions": torch.rand(24)})
    half = batch()
    del half["end_positions"]
    assert "start_positions" in as_probe(half).remarks[0]

"""NGD-T in the real Hugging Face `Trainer` and in Accelerate's loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering

import thermo_opt as to
from tests.integrations.small_worlds import (
    BERT,
    TOKENS,
    classifier,
    gpt2,
    masked,
    rows,
    t5,
    trainer,
    weights,
)

SETTINGS = {
    "plain": {},
    "bfloat16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation, smaller last part": {"gradient_accumulation_steps": 3, "data": 26},
    "smaller last batch": {"data": 26},
    "clipped at 1.0": {"max_grad_norm": 1.0},
    "checkpointed layers": {"gradient_checkpointing": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "bfloat16 and accumulation": {"bf16": True, "gradient_accumulation_steps": 2},
}


def train(folder, model, steps=20, **options):
    data = rows()[: options.pop("data", None)]
    optimizer = to.NGDT(model)
    training = trainer(
        folder,
        model,
        steps,
        data=data,
        optimizers=(optimizer, None),
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        **{"logging_steps": 1, **options},
    )
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    return optimizer, losses


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_trainer_trains_a_language_model_with(setting, tmp_path):
    optimizer, losses = train(tmp_path, gpt2(), **SETTINGS[setting])
    smoothed = 0.3 if "smoothing" in setting else 0.0
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0] + smoothed
    assert optimizer.calibration.last >= 10  # the KL of steps was measured until late
    assert math.isfinite(optimizer.last_step["kappa"])


class Answers(BertForQuestionAnswering):
    """Start and end of an answer are the first two tokens' values."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(BertConfig(**BERT))


MODELS = {
    "causal": (gpt2, rows()),
    "masked": (masked, rows()),
    "encoder-decoder": (t5, rows()),
    "classes": (classifier, rows(TOKENS[:, 0] % 2)),
    "answers": (
        Answers,
        [{"input_ids": x, "start_positions": x[0] % 9, "end_positions": x[1] % 9} for x in TOKENS],
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_trainer_trains(kind, tmp_path):
    make, data = MODELS[kind]
    model = make()
    optimizer = to.NGDT(model)
    trainer(tmp_path, model, 4, data=data, optimizers=(optimizer, None)).train()
    assert optimizer.last_step["realised"] > 0
    assert optimizer.steps == 4


def test_resuming_from_a_checkpoint_continues_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    through, resumed = gpt2(), gpt2(seed=1)
    for model, checkpoint in ((through, None), (resumed, tmp_path / "checkpoint-3")):
        training = trainer(tmp_path, model, 6, optimizers=(to.NGDT(model), None), **options)
        training.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert torch.equal(weights(through), weights(resumed))


class LossOnly(nn.Module):
    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.between = nn.Embedding(12, 8), nn.Linear(8, 12), between

    def forward(self, input_ids, labels):
        logits = self.head(self.between(self.embed(input_ids)))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_a_model_that_returns_the_loss_alone_trains_where_its_parts_follow_on_each_other(tmp_path):
    model = LossOnly(nn.Tanh())
    optimizer = to.NGDT(model)
    trainer(tmp_path, model, 2, optimizers=(optimizer, None)).train()
    assert optimizer.last_step["realised"] > 0


def test_where_something_happens_between_them_it_is_refused_before_a_weight_moves(tmp_path):
    model = LossOnly(torch.tanh)
    before = weights(model)
    training = trainer(tmp_path, model, 2, optimizers=(to.NGDT(model), None))
    with pytest.raises(to.InputError, match="'head' was given something that was computed between"):
        training.train()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerates_loop_with_accumulation_and_clipping(precision):
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's precision
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = gpt2()
    model, optimizer = accelerator.prepare(model, to.NGDT(model))
    losses = []
    for _ in range(8):
        for part in TOKENS.split(20):
            with accelerator.accumulate(model):
                loss = model(input_ids=part, labels=part).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.optimizer.steps == 8
    assert optimizer.optimizer.last_step["realised"] > 0

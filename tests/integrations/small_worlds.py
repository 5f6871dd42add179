"""Tiny models and data for the trainers' tests: nothing is downloaded."""

import lightning
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

TOKENS = (torch.arange(40)[:, None] + torch.arange(9)) % 12


def rows(labels=None):
    labels = TOKENS if labels is None else labels
    return [{"input_ids": x, "labels": y} for x, y in zip(TOKENS, labels, strict=True)]


def gpt2(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 12, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))


BERT = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def masked(seed=0):
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(**BERT))


def classifier(seed=0, **options):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**BERT, **options))


def t5(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def trainer(folder, model, steps=6, **options):
    data = options.pop("data", rows())
    optimizers = options.pop("optimizers", (None, None))
    evaluation = options.pop("eval_dataset", data[:8])
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(folder), max_steps=steps, **(settings | options))
    return Trainer(
        model, arguments, train_dataset=data, eval_dataset=evaluation, optimizers=optimizers
    )


class Module(lightning.LightningModule):
    """A classifier of four features; ``make``: parameters → optimizer."""

    def __init__(self, make=lambda module: torch.optim.AdamW(module.parameters(), 1e-2)):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 3))
        self.make = make

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return self.make(self)


class Manual(Module):
    """The same with two parts accumulated by hand, clipping, and a batch that is skipped."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        if index == 3:
            return None
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            self.manual_backward(nn.functional.cross_entropy(self(x[part]), y[part]) / 2)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        return None


def loader(count=48, size=8, shuffle=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    y = x[:, :3].argmax(1)
    data = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(data, batch_size=size, shuffle=shuffle)


def lightning_trainer(folder, callbacks=(), **options):
    settings = {
        "max_steps": 6,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(folder),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(callbacks=list(callbacks), **(settings | options))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

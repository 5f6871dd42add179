"""Audit the checkpoints that a Hugging Face Trainer saved: predictions are replayed on a probe.

python huggingface_checkpoints.py      # needs the extra: pip install 'thermo-opt[transformers]'
"""

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import thermo_opt as to

torch.manual_seed(0)
tokens = (torch.randint(0, 16, (128, 1)) + torch.arange(17)) % 16  # counting modulo 16
train, held_out = tokens[16:], tokens[:16]

model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=16, n_layer=1, n_head=2))
arguments = TrainingArguments(
    "checkpoints",
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=1e-2,
    save_steps=5,
    logging_steps=1,
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
Trainer(
    model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in train]
).train()

# The probe: inputs by the names of the model's arguments; targets: each position's next token.
probe = {"inputs/input_ids": held_out[:, :-1].contiguous(), "targets": held_out[:, 1:].contiguous()}
save_file(probe, "probe.safetensors")

audit = to.audit("checkpoints", probe="probe.safetensors", lens="outputs")
print(audit.run, audit.summary["dissipation"], "nats or more, at stride", audit.summary["stride"])
for note in audit.summary["notes"]:
    print("-", note)

"""Record a Hugging Face Trainer's run from step 0 with a callback, and audit it.

python huggingface_trainer.py          # needs the extra: pip install 'thermo-opt[transformers]'
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import thermo_opt as to
from thermo_opt.integrations.huggingface import ThermoCallback

torch.manual_seed(0)
tokens = (torch.randint(0, 16, (128, 1)) + torch.arange(16)) % 16  # counting modulo 16
rows = [{"input_ids": row, "labels": row} for row in tokens]

model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=16, n_layer=1, n_head=2))
arguments = TrainingArguments(
    "trainer-output",
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=1e-2,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=rows[16:], eval_dataset=rows[:16])
trainer.add_callback(ThermoCallback(trainer, "trainer-run"))  # the probe: the evaluation set
trainer.train()

audit = to.audit("trainer-run", lens="outputs")
print(audit.run, audit.summary["dissipation"], "nats at stride", audit.summary["stride"])

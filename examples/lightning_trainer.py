"""Record a Lightning run from step 0 with a callback, and audit it.

python lightning_trainer.py            # needs the extra: pip install 'thermo-opt[lightning]'
"""

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import thermo_opt as to
from thermo_opt.integrations.lightning import ThermoCallback


class Classifier(lightning.LightningModule):
    """A small network on synthetic data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.log("validation_loss", cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


torch.manual_seed(0)
x = torch.randn(400, 8)
y = (x @ torch.randn(8, 3)).argmax(1)
trainer = lightning.Trainer(
    max_steps=20,
    accelerator="cpu",
    callbacks=[ThermoCallback("lightning-run")],  # the probe: the validation set
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(
    Classifier(),
    DataLoader(TensorDataset(x[100:], y[100:]), batch_size=30, shuffle=True),
    DataLoader(TensorDataset(x[:100], y[:100]), batch_size=50),
)

audit = to.audit("lightning-run", lens="outputs")
print(audit.run, audit.summary["dissipation"], "nats at stride", audit.summary["stride"])

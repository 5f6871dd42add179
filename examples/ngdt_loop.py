"""Train one network with AdamW and with NGDT at two budgets, and audit all three on one probe.

python ngdt_loop.py
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import thermo_opt as to

torch.manual_seed(0)
x = torch.randn(600, 8)
y = (x @ torch.randn(8, 4) + torch.randn(600, 4)).argmax(1)
probe, x, y = (x[:100], y[:100]), x[100:], y[100:]

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "ngdt-0.001": lambda model: to.NGDT(model, budget=1e-3),
    "ngdt-0.0003": lambda model: to.NGDT(model, budget=3e-4),
}

audits = []
for name, make in OPTIMIZERS.items():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = make(model)
    with to.Recorder(name, model=model, optimizer=optimizer, probe=probe) as recorder:
        for _ in range(40):
            batch = torch.randint(0, len(x), (100,))
            loss = cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, examples=len(batch))
    audits.append(to.audit(name, lens="outputs"))

print(to.compare(audits)[["run", "loss_end", "dissipation", "efficiency"]].to_string(index=False))

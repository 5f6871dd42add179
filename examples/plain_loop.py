"""Record a plain PyTorch loop, audit it, and write the report.

python plain_loop.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import thermo_opt as to

torch.manual_seed(0)
x = torch.randn(600, 8)
y = (x @ torch.randn(8, 4) + torch.randn(600, 4)).argmax(1)
probe, x, y = (x[:100], y[:100]), x[100:], y[100:]  # the probe is never trained on

for batch_size in (20, 200):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    folder = f"plain-batch-{batch_size}"
    with to.Recorder(folder, model=model, optimizer=optimizer, probe=probe) as recorder:
        for _ in range(60):
            batch = torch.randint(0, len(x), (batch_size,))
            loss = cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, examples=batch_size)
    audit = to.audit(folder)
    summary = audit.summary
    print(
        f"batch {batch_size:3d}: loss {summary['loss_end']:.3f}, "
        f"{summary['dissipation']:.3f} nats, of it {summary['efficiency']:.0%} unavoidable"
    )
    audit.to_html(f"{folder}.html")

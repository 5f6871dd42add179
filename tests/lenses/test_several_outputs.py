"""A model that returns several tensors: which one is taken for its predictions is said."""

import pytest
import torch
from torch import nn

import thermo_opt as to


class Two(nn.Module):
    """Returns its logits, and what it computed them from, in one order or the other."""

    def __init__(self, first: str):
        super().__init__()
        self.first = first
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.body(x).tanh()
        logits = self.head(hidden)
        state = torch.zeros(1, *hidden.shape)  # as recurrent layers return it: no row per example
        if self.first == "alone":
            return logits, state
        return (logits, hidden) if self.first == "logits" else (hidden, logits)


@pytest.mark.parametrize("first", ["logits", "hidden", "alone"])
def test_which_of_several_tensors_is_taken_is_said(tmp_path, first):
    torch.manual_seed(0)
    model, x, y = Two(first), torch.randn(20, 4), torch.randint(3, (20,))
    for step in range(3):
        torch.save(model.state_dict(), tmp_path / f"step_{step}.pt")
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    notes = to.audit(tmp_path, probe=(x, y), model=model, lens="outputs").summary["notes"]
    said = [note for note in notes if "2 tensors of a row per example" in note]
    assert len(said) == (first != "alone")
    assert not said or said[0].index("(3,)") > said[0].index("(6,)") or first == "logits"

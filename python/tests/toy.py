"""Small models with PEFT's names, and their training, for the tests."""

import torch
from torch import nn


class LoraLinear(nn.Module):
    """A linear layer with adapters, as PEFT's are named: base_layer, lora_A.<adapter>, lora_B.<adapter>."""

    def __init__(self, wide_in, wide_out, rank, adapters=("default",)):
        super().__init__()
        self.base_layer = nn.Linear(wide_in, wide_out).requires_grad_(False)
        self.lora_A = nn.ModuleDict({name: nn.Linear(wide_in, rank, bias=False) for name in adapters})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, wide_out, bias=False) for name in adapters})

    def forward(self, x):
        return self.base_layer(x) + sum(self.lora_B[name](self.lora_A[name](x)) for name in self.lora_A)


def model(adapters=("default",), dtype=torch.float32, seed=0):
    """Two adapted layers, and a head that is trained by AdamW."""
    torch.manual_seed(seed)
    layers = LoraLinear(8, 16, 2, adapters), nn.Tanh(), LoraLinear(16, 12, 3, adapters), nn.Linear(12, 4)
    return nn.Sequential(*layers).to(dtype)


def backward(net, number, scale=1.0):
    """Gradients of batch `number`; returns the loss."""
    generator = torch.Generator().manual_seed(1000 + number)
    dtype = next(net.parameters()).dtype
    x = torch.randn(6, 8, generator=generator).to(dtype)
    loss = (net(x) - x[:, :4].sin()).square().mean()
    (loss * scale).backward()
    return loss


def train(net, optimizer, steps, first=0, scheduler=None):
    """The losses of some steps."""
    losses = []
    for number in range(first, first + steps):
        optimizer.zero_grad()
        losses.append(backward(net, number).item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return losses


def trained(net):
    """Copies of the trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


def same(one, other):
    """Are two such dicts equal to the bit?"""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(before, after):
    """Has every parameter moved?"""
    return all(not torch.equal(before[name], after[name]) for name in before)

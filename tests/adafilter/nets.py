"""Networks small enough to be written out by hand, gated, with the two copies of every filter made different."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_transfer.functional import apply_adafilter
from lightning_transfer.methods.adafilter.apply import gates_of

SITES = ("a.conv", "b.conv", "c")  # the last has no norm


class Block(nn.Module):
    def __init__(self, taken, given):
        super().__init__()
        self.conv = nn.Conv2d(taken, given, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(given)

    def forward(self, images):
        return F.relu(self.bn(self.conv(images)))


class Chain(nn.Module):
    """A stem, two blocks, a convolution without a norm, a head; parts may be checkpointed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a, self.b = Block(4, 5), Block(5, 6)
        self.c = nn.Conv2d(6, 7, 3, padding=1)
        self.fc = nn.Linear(7, 3)
        self.checkpointed = ()  # names of parts, and whether they are run again in the reentrant way
        self.reentrant = False

    def part(self, name, features):
        layer = getattr(self, name)
        if name in self.checkpointed and torch.is_grad_enabled():
            return checkpoint(layer, features, use_reentrant=self.reentrant)
        return layer(features)

    def forward(self, images):
        features = self.part("b", self.part("a", F.relu(self.stem(images))))
        return self.fc(F.relu(self.part("c", features)).mean((2, 3)))


def chain(seed=0):
    """A pretrained chain: its norms have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Chain().double()
        net(torch.randn(16, 3, 8, 8, dtype=torch.float64))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return net


def move(module, amount=0.3):
    """Make the two copies of every filter differ, and the gates' logits spread: else a gate's gradient is 0."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        gates = gates_of(module)
        for param in module.parameters():
            param.add_(torch.randn_like(param), alpha=amount)
        for layer in gates.gate.outputs:
            layer.weight.mul_(20)
        for layer in gates.gate.inputs:
            layer.weight.mul_(2)


def gated_chain(**options):
    net = chain()
    apply_adafilter(net, gate_width=4, **options)
    move(net)
    return net


def by_hand(net, images, labels):
    """The loss by the formula as it is printed, on the gated network's own numbers."""
    state = dict(net.named_parameters()) | dict(net.named_buffers())
    gate = {name.removeprefix("adafilter.gate."): value for name, value in state.items() if "adafilter" in name}
    features = F.relu(F.conv2d(images, state["stem.weight"], state["stem.bias"]))
    hidden = cell = images.new_zeros(len(images), 4)
    for number, site in enumerate(SITES):
        pooled = features.mean((2, 3)) @ gate[f"inputs.{number}.weight"].T
        sums = pooled @ gate["cell.weight_ih"].T + gate["cell.bias_ih"]
        sums = sums + hidden @ gate["cell.weight_hh"].T + gate["cell.bias_hh"]
        enter, forget, candidate, leave = sums.chunk(4, 1)
        cell = sigmoid(forget) * cell + sigmoid(enter) * torch.tanh(candidate)
        hidden = sigmoid(leave) * torch.tanh(cell)
        share = sigmoid(hidden @ gate[f"outputs.{number}.weight"].T + gate[f"outputs.{number}.bias"])
        chosen = ((share > 0.5).to(share.dtype) + share - share.detach())[:, :, None, None]
        responses = []
        for kind in ("tuned", "frozen"):
            bias = state.get(f"{site}.{kind}.bias")
            response = F.conv2d(features, state[f"{site}.{kind}.weight"], bias, padding=1)
            if site != "c":
                norm = f"{site}.norm.{kind}"
                mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
                if kind == "tuned" and net.training:
                    mean, variance = response.mean((0, 2, 3)), response.var((0, 2, 3), correction=0)
                scale = state[f"{norm}.weight"] / (variance + 1e-5).sqrt()
                response = (response - mean[:, None, None]) * scale[:, None, None]
                response = response + state[f"{norm}.bias"][:, None, None]
            responses.append(response)
        features = F.relu(chosen * responses[0] + (1 - chosen) * responses[1])
    return F.cross_entropy(features.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"], labels)


def sigmoid(values):
    return 1 / (1 + torch.exp(-values))


def batch(seed=1, number=6):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, 8, 8, dtype=torch.float64, generator=generator)
    images += 2 * torch.randn(number, 3, 1, 1, dtype=torch.float64, generator=generator)  # so that gates differ
    return images, torch.randint(0, 3, (number,), generator=generator)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: param.grad.clone() for name, param in net.named_parameters() if param.grad is not None}

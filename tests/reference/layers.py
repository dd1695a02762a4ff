"""Gated networks as hand-written training loops over the toy network: plain tensors, formulas as they are printed.

Shares no code with the package; the first weights of what the package adds are handed in.
"""

import torch
import torch.nn.functional as F

from tests import toys

EPS = 1e-5  # of the toy's BatchNorm


def sigmoid(values):
    return 1 / (1 + torch.exp(-values))


def lstm_cell(values, hidden, cell, weights):
    """The textbook's cell; gates in torch's order: input, forget, candidate, output."""
    sums = values @ weights["weight_ih"].T + weights["bias_ih"] + hidden @ weights["weight_hh"].T + weights["bias_hh"]
    enter, forget, candidate, leave = sums.split(hidden.shape[1], dim=1)
    cell = sigmoid(forget) * cell + sigmoid(enter) * torch.tanh(candidate)
    return sigmoid(leave) * torch.tanh(cell), cell


def batch_norm(values, weight, bias, mean, variance):
    return (values - mean[:, None, None]) / (variance + EPS).sqrt()[:, None, None] * weight[:, None, None] + bias[
        :, None, None
    ]


def over_batch(values, weight, bias, statistics):
    """In training: by the batch's own mean and variance, which move the running ones."""
    mean, variance = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
    number = values.numel() / len(mean)
    with torch.no_grad():
        statistics["mean"].lerp_(mean, 0.1)
        statistics["var"].lerp_(variance * number / (number - 1), 0.1)
    return batch_norm(values, weight, bias, mean, variance)


class Adafilter:
    """The toy network, its only convolution gated."""

    def __init__(self, gate, dtype):
        net = toys.toy_net().to(dtype)
        self.frozen = {name: value.clone() for name, value in net.state_dict().items()}
        self.statistics = {"mean": net.bn.running_mean.clone(), "var": net.bn.running_var.clone()}
        self.tuned = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        self.gate = {name: value.to(dtype).clone().requires_grad_() for name, value in gate.items()}

    def parameters(self):
        return [*self.tuned.values(), *self.gate.values()]

    def loss(self, pixels, labels):
        gate = self.gate
        pooled = pixels.mean((2, 3)) @ gate["inputs.0.weight"].T
        zero = torch.zeros_like(pooled)
        cell = {name.removeprefix("cell."): value for name, value in gate.items() if name.startswith("cell.")}
        hidden, _ = lstm_cell(pooled, zero, zero, cell)
        open_share = sigmoid(hidden @ gate["outputs.0.weight"].T + gate["outputs.0.bias"])
        gates = (open_share > 0.5).to(pixels.dtype) + open_share - open_share.detach()
        tuned, frozen = self.tuned, self.frozen
        mine = over_batch(
            F.conv2d(pixels, tuned["conv.weight"], tuned["conv.bias"]),
            tuned["bn.weight"],
            tuned["bn.bias"],
            self.statistics,
        )
        kept = batch_norm(
            F.conv2d(pixels, frozen["conv.weight"], frozen["conv.bias"]),
            frozen["bn.weight"],
            frozen["bn.bias"],
            frozen["bn.running_mean"],
            frozen["bn.running_var"],
        )
        gates = gates[:, :, None, None]
        features = F.relu(gates * mine + (1 - gates) * kept).mean((2, 3))
        logits = features @ tuned["fc.weight"].T + tuned["fc.bias"]
        target = F.cross_entropy(logits, labels)
        return target, target

    def weights(self):
        return {
            "model.conv.tuned.weight": self.tuned["conv.weight"],
            "model.conv.norm.tuned.weight": self.tuned["bn.weight"],
            "model.conv.norm.tuned.running_mean": self.statistics["mean"],
            "model.conv.norm.tuned.running_var": self.statistics["var"],
            "model.fc.weight": self.tuned["fc.weight"],
            **{f"model.adafilter.gate.{name}": value for name, value in self.gate.items()},
        }


class GatedTransfer:
    """The toy network with a transfer module and an auxiliary classifier on its BatchNorm, without dropout."""

    def __init__(self, transfer, auxiliary, dtype):
        net = toys.toy_net().to(dtype)
        self.statistics = {"mean": net.bn.running_mean.clone(), "var": net.bn.running_var.clone()}
        self.net = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        self.transfer = {name: value.to(dtype).clone().requires_grad_() for name, value in transfer.items()}
        self.auxiliary = {name: value.to(dtype).clone().requires_grad_() for name, value in auxiliary.items()}

    def parameters(self):
        return [*self.net.values(), *self.transfer.values(), *self.auxiliary.values()]

    def loss(self, pixels, labels):
        net = self.net
        tapped = over_batch(
            F.conv2d(pixels, net["conv.weight"], net["conv.bias"]), net["bn.weight"], net["bn.bias"], self.statistics
        )
        features = F.relu(tapped).mean((2, 3))
        squeezed = F.relu(features @ self.transfer["squeeze.weight"].T)
        weighted = sigmoid(squeezed @ self.transfer["expand.weight"].T) * features
        target = F.cross_entropy(weighted @ net["fc.weight"].T + net["fc.bias"], labels)
        auxiliary = tapped.mean((2, 3)) @ self.auxiliary["linear.weight"].T + self.auxiliary["linear.bias"]
        return target, target + 0.2 * F.cross_entropy(auxiliary, labels)

    def weights(self):
        return {
            "model.conv.weight": self.net["conv.weight"],
            "model.bn.running_var": self.statistics["var"],
            "model.fc.head.weight": self.net["fc.weight"],
            **{f"model.fc.transfer.{name}": value for name, value in self.transfer.items()},
        }


class Collaborative:
    """The toy network and another beside it, of which the first convolution and its BatchNorm are frozen.

    They stand at `place`, that of the whole network or of its head.
    """

    def __init__(self, other, dtype, place):
        self.place = place
        net = toys.toy_net().to(dtype)
        self.statistics = {"mean": net.bn.running_mean.clone(), "var": net.bn.running_var.clone()}
        self.net = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        self.other = {name: value.detach().to(dtype).clone() for name, value in other.items()}
        for name in ("conv2.weight", "conv2.bias", "fc.weight", "fc.bias"):
            self.other[name].requires_grad_()

    def parameters(self):
        return [*self.net.values(), *(value for value in self.other.values() if value.requires_grad)]

    def loss(self, pixels, labels):
        net, other = self.net, self.other
        features = F.conv2d(pixels, net["conv.weight"], net["conv.bias"])
        features = F.relu(over_batch(features, net["bn.weight"], net["bn.bias"], self.statistics)).mean((2, 3))
        mine = features @ net["fc.weight"].T + net["fc.bias"]
        kept = [other[f"bn1.{name}"] for name in ("weight", "bias", "running_mean", "running_var")]
        features = F.relu(batch_norm(F.conv2d(pixels, other["conv1.weight"], other["conv1.bias"]), *kept))
        features = F.relu(F.conv2d(features, other["conv2.weight"], other["conv2.bias"])).mean((2, 3))
        theirs = features @ other["fc.weight"].T + other["fc.bias"]
        distances = sum(((z - (mine + theirs) / 2) ** 2).sum(1).sqrt() / 2 for z in (mine, theirs))
        joint = F.cross_entropy(mine, labels) + F.cross_entropy(theirs, labels) + 0.2 * distances.mean()
        return F.cross_entropy((mine + theirs) / 2, labels), joint

    def weights(self):
        own = {**self.net, "bn.running_var": self.statistics["var"]}
        return {
            **{f"model.{name}".replace(self.place, f"{self.place}.members.own.network"): own[name] for name in own},
            **{
                f"{self.place}.members.source1.network.{name}": value
                for name, value in self.other.items()
                if "tracked" not in name
            },
        }


def train(network, *, dtype=torch.float32, accumulate=1, clip=None, skip=(), batch_size=4, epochs=2):
    """Train on the toy target; gives the target losses, None for a skipped batch."""
    images, labels = toys.target_data().tensors
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    losses = []
    for _ in range(epochs):
        for number in range(len(images) // batch_size):
            if number in skip:
                losses.append(None)
                continue
            rows = slice(number * batch_size, (number + 1) * batch_size)
            target, loss = network.loss(images[rows].to(dtype), labels[rows])
            losses.append(target.item())
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return losses

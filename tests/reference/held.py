"""The toy network held at its start, by weights or by feature maps, as hand-written loops: number by number."""

import torch.nn.functional as F

from tests import toys
from tests.reference.layers import batch_norm, over_batch


class Toy:
    """The toy network as plain tensors, and what they were at the start."""

    def __init__(self, dtype):
        net = toys.toy_net().to(dtype)
        self.start = {name: value.clone() for name, value in net.state_dict().items()}
        self.statistics = {"mean": net.bn.running_mean.clone(), "var": net.bn.running_var.clone()}
        self.net = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}

    def parameters(self):
        return [*self.net.values()]

    def run(self, pixels):
        """Return the maps after BatchNorm, and the logits."""
        net = self.net
        maps = F.conv2d(pixels, net["conv.weight"], net["conv.bias"])
        maps = over_batch(maps, net["bn.weight"], net["bn.bias"], self.statistics)
        return maps, F.relu(maps).mean((2, 3)) @ net["fc.weight"].T + net["fc.bias"]

    def weights(self):
        return {
            f"model.{name}": value for name, value in {**self.net, "bn.running_var": self.statistics["var"]}.items()
        }


class Weights(Toy):
    """L2-SP."""

    def loss(self, pixels, labels):
        target = F.cross_entropy(self.run(pixels)[1], labels)
        joint = target
        for name, values in self.net.items():
            of_head = name.startswith("fc")
            for value, start in zip(values.flatten(), self.start[name].flatten(), strict=True):
                joint = joint + (0.005 * value * value if of_head else 0.05 * (value - start) * (value - start))
        return target, joint


class Maps(Toy):
    """DELTA on the BatchNorm."""

    def loss(self, pixels, labels):
        maps, logits = self.run(pixels)
        start = self.start
        kept = F.conv2d(pixels, start["conv.weight"], start["conv.bias"])
        kept = batch_norm(kept, *(start[f"bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")))
        distance = 0
        for image in range(len(pixels)):
            for channel in range(toys.WIDTH):
                distance = distance + ((maps[image, channel] - kept[image, channel]) ** 2).sum()
        target = F.cross_entropy(logits, labels)
        return target, target + 0.01 * distance / 2 / len(pixels)


class Knowledge(Toy):
    """Learning without forgetting, with weight .5 and temperature 2."""

    def __init__(self, dtype):
        super().__init__(dtype)
        head = toys.source_head().to(dtype)
        self.pretrained = {name: value.detach().clone() for name, value in head.named_parameters()}
        self.kept = {name: value.clone().requires_grad_() for name, value in self.pretrained.items()}

    def parameters(self):
        return [*self.net.values(), *self.kept.values()]

    def loss(self, pixels, labels):
        maps, logits = self.run(pixels)
        start = self.start
        old = F.conv2d(pixels, start["conv.weight"], start["conv.bias"])
        nothing_kept = {name: pixels.new_zeros(toys.WIDTH) for name in ("mean", "var")}
        old = over_batch(old, start["bn.weight"], start["bn.bias"], nothing_kept)
        said, wanted = (
            (F.relu(each).mean((2, 3)) @ head["weight"].T + head["bias"]) / 2
            for each, head in ((maps, self.kept), (old, self.pretrained))
        )
        forgotten = 0
        for image in range(len(pixels)):
            mine, other = said[image].exp(), wanted[image].exp()
            mine, other = mine / mine.sum(), other / other.sum()
            for one, two in zip(mine, other, strict=True):
                forgotten = forgotten + two * (two.log() - one.log())
        target = F.cross_entropy(logits, labels)
        return target, target + 0.5 * 2**2 * forgotten / len(pixels)

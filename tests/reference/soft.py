"""Soft fine-tuning as a hand-written training loop in plain torch; shares no code with the package."""

import contextlib

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision

from tests import toys


def train(
    *,
    source_indices: list[int],
    forward: str = "separate",
    mix: str = "add",
    until: int,
    epochs: int = 2,
    batch_size: int = 4,
    accumulate: int = 1,
    clip: float | None = None,
    double: bool = False,
    bf16: bool = False,
    skip: tuple[int, ...] = (),
):
    """Train a toy network; the source samples are given, the rest is computed here.

    Returns:
        The network, its source head and the target losses of all steps.
    """
    net, head = toys.toy_net(), toys.source_head()
    (target_images, target_labels), (source_images, source_labels) = (
        toys.target_data().tensors,
        toys.source_data().tensors,
    )
    if double:
        net, head = net.double(), head.double()
        target_images, source_images = target_images.double(), source_images.double()
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
    queue, losses, step = list(source_indices), [], 0
    for _ in range(epochs):
        for number in range(len(target_images) // batch_size):
            if number in skip:
                losses.append(None)
                step += 1  # Lightning runs the optimizer all the same, without gradients
                continue
            rows = slice(number * batch_size, (number + 1) * batch_size)
            weight = max(0.0, 1.0 - step / until)
            # Lightning's own context: whether casts are cached, and so where gradients are rounded, is its version's
            with MixedPrecision("bf16-mixed", "cpu").forward_context() if bf16 else contextlib.nullcontext():
                source = [queue.pop(0) for _ in range(batch_size)] if weight else []
                if source and forward == "joint":
                    both = net.features(torch.cat([target_images[rows], source_images[source]]))
                    target_features, source_features = both[:batch_size], both[batch_size:]
                else:
                    target_features = net.features(target_images[rows])
                loss = target_loss = F.cross_entropy(net.fc(target_features), target_labels[rows])
                if source:
                    if forward == "separate":
                        of_target = [buffer.clone() for buffer in net.buffers()]
                        source_features = net.features(source_images[source])
                    source_loss = F.cross_entropy(head(source_features), source_labels[source])
                    loss = target_loss * (1.0 - weight if mix == "convex" else 1.0) + source_loss * weight
            losses.append(target_loss.item())
            (loss / accumulate).backward()
            if source and forward == "separate":
                for buffer, value in zip(net.buffers(), of_target, strict=True):
                    buffer.copy_(value)
            if (number + 1) % accumulate == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    return net, head, losses

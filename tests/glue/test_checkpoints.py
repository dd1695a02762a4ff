"""What optimizers remember of training-only parameters leaves a checkpoint and comes back, whatever the order."""

import copy

import pytest
import torch
from torch import nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.checkpoints import KEY, TrainingOnly, hide_optimizer_states, unhide_optimizer_states


def stepped_optimizer():
    """Two owners' parameters between the user's, in two groups, each with a state of its own."""
    user = [nn.Parameter(torch.full((2,), float(number))) for number in range(3)]
    first, second = (TrainingOnly(owner, nn.Linear(2, 1)) for owner in ("First", "Second"))
    groups = [
        {"params": [user[0], *first.parameters(), user[1]]},
        {"params": [*second.parameters(), user[2]], "lr": 0.5},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.rand_like(param)
    optimizer.step()
    return optimizer


def same(found, expected):
    """Equal, tensors compared by value."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def test_hidden_and_back_is_what_it_was():
    optimizer = stepped_optimizer()
    whole = copy.deepcopy(optimizer.state_dict())
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    hide_optimizer_states([optimizer], checkpoint)
    hidden = copy.deepcopy(checkpoint)
    assert [len(group["params"]) for group in hidden["optimizer_states"][0]["param_groups"]] == [2, 1]
    hide_optimizer_states([optimizer], checkpoint)  # as the second of our callbacks does
    assert same(checkpoint, hidden)
    unhide_optimizer_states(["First", "Second"], checkpoint)
    assert same(checkpoint["optimizer_states"][0], whole)
    assert KEY not in checkpoint


def test_only_those_who_are_there_get_theirs_back():
    optimizer = stepped_optimizer()
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    hide_optimizer_states([optimizer], checkpoint)
    unhide_optimizer_states(["Second"], checkpoint)
    state = checkpoint["optimizer_states"][0]
    assert [len(group["params"]) for group in state["param_groups"]] == [2, 3]
    live = [param for group in optimizer.param_groups for param in group["params"]]
    kept = [param for param in live if getattr(param, "training_only_of", "Second") == "Second"]
    for number, param in enumerate(kept):
        assert torch.equal(state["state"][number]["exp_avg"], optimizer.state[param]["exp_avg"])


def test_another_order_of_callbacks_would_swap_states_and_is_refused():
    optimizer = stepped_optimizer()
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    hide_optimizer_states([optimizer], checkpoint)
    with pytest.raises(TransferConfigError, match="in the order First, Second; keep that order"):
        unhide_optimizer_states(["Second", "First"], checkpoint)

"""What a removal measures on a loader changes nothing but the layers that it removes."""

import pytest
from torch.utils.data import DataLoader

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.functional import (
    apply_adafilter,
    apply_collaborative,
    apply_gated_transfer,
    remove_adafilter,
    remove_collaborative,
    remove_gated_transfer,
)
from lightning_transfer.randomness import next_numbers
from tests import toys

REMOVALS = {
    "adafilter": (lambda module: apply_adafilter(module, gated=lambda *_: True), remove_adafilter),
    "gated": (lambda module: apply_gated_transfer(module, ratio=2), remove_gated_transfer),
    "collaborative": (lambda module: apply_collaborative(module, {"other": toys.toy_net()}), remove_collaborative),
}


@pytest.mark.parametrize(("apply", "remove"), REMOVALS.values(), ids=REMOVALS)
def test_a_measured_removal_leaves_modes_hooks_and_random_states_as_found(apply, remove):
    module = toys.LitToy()
    apply(module)
    module.train()
    module.model.eval()
    numbers = next_numbers()
    found = remove(module, loader=DataLoader(toys.target_data(), batch_size=8, shuffle=True))
    assert found.accuracy_before is not None
    assert found.accuracy_after is not None
    assert next_numbers() == numbers
    assert module.training
    assert not any(layer.training for layer in module.model.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert [*module.state_dict()] == [*toys.LitToy().state_dict()]


@pytest.mark.parametrize(("apply", "remove"), REMOVALS.values(), ids=REMOVALS)
def test_a_loader_that_can_be_read_once_is_refused_before_anything_is_removed(apply, remove):
    module = toys.LitToy()
    apply(module)
    names = [*module.state_dict()]
    once = (batch for batch in DataLoader(toys.target_data(), batch_size=8))
    with pytest.raises(TransferConfigError, match="loader= is a generator, which can be read once"):
        remove(module, loader=once)
    assert [*module.state_dict()] == names

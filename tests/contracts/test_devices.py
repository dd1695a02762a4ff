"""What decides on which device something is made and computed, as far as a machine without a GPU shows it.

As in test_reads.py, what the Trainer has moved, the parameters, and all that is computed from these count as on the
device. Here an operation that takes tensors of both is an error, as on a GPU.
"""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_transfer as lt
from lightning_transfer.methods.selective.describing import Describer
from lightning_transfer.methods.selective.pictures import Picture
from lightning_transfer.source.term import SourceTerm
from lightning_transfer.surgery import own_randomness
from tests import toys
from tests.contracts.test_reads import RUNS, Copies, OnDevice, Reads
from tests.methods import borrowed, each, one, toy_bank
from tests.toys import LitToy, assert_same, fit, weights

INDEXING = {"index", "index_put_"}  # indices may be on the CPU
JOINING = {"cat", "stack"}  # the others take single numbers of the CPU


class TwoDevices(OnDevice):
    """Refuses an operation that takes tensors of the device and of the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "copy_":
            return function(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in INDEXING and self.holds(tensors[0]):
            tensors = tensors[:1]
        elif name not in JOINING | INDEXING:
            tensors = [tensor for tensor in tensors if tensor.ndim]
        if len({self.holds(tensor) for tensor in tensors}) > 1:
            places = [(tuple(tensor.shape), self.holds(tensor)) for tensor in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device; {name} takes {places}")
        return super().__torch_dispatch__(function, types, args, kwargs)


class Moves(Copies):
    """Follows tensors that are made on the device, or moved to it and away from it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        is_held = self.device.holds(args[:1])
        if is_held and name in ("numpy", "__array__"):
            raise TypeError("can't convert a tensor of the device to numpy")
        result = super().__torch_function__(function, types, args, kwargs)
        place = args[1] if name == "to" and len(args) > 1 else kwargs.get("device")
        if place == "cpu" and isinstance(place, str):
            result = result.clone()
            self.device.storages.pop(result.untyped_storage()._cdata, None)
        elif isinstance(place, torch.device) or (isinstance(place, Tensor) and self.device.holds(place)):
            result = result if is_held or name != "to" else result.clone()
            self.device.add(result)
        return result


class Apart(Reads):
    """Has the CPU and the device apart while a run trains."""

    def __init__(self):
        super().__init__()
        self.device = TwoDevices()
        self.copies = Moves(self.device)


MORE = {
    "a measured gap": (LitToy, lambda: [one(has_source=True).always("auto")]),
    "a rare class": (LitToy, lambda: [one(name="selective-separate").callback(neighbors=borrowed(min_per_class=1))]),
    "a baseline": (LitToy, lambda: [lt.AdaFilter(gated="model.conv", estimator="random")]),
}


@pytest.mark.filterwarnings("ignore:Domain gap")
@pytest.mark.parametrize("name", RUNS | MORE)
def test_no_operation_takes_tensors_of_two_devices(name):
    make, callbacks = (RUNS | MORE)[name]
    module, apart = make(), Apart()
    runner = toys.trainer([*callbacks(), apart], log_every_n_steps=2)
    runner.fit(module, toys.target_loader(), toys.target_loader() if isinstance(module, toys.ToySteps) else None)
    assert apart.steps


@pytest.mark.parametrize(
    "act",
    [
        lambda mine, other: mine + other,
        lambda mine, other: other.add_(mine),
        lambda mine, other: torch.cat([mine, other]),
        lambda mine, other: torch.stack([mine.sum(), other.sum()]),
        lambda mine, other: other[mine.long()],
        lambda mine, other: mine.numpy(),
        lambda mine, other: mine.cpu() + mine,
        lambda mine, other: mine.to("cpu") + mine,
        lambda mine, other: other.to(mine) + other,
        lambda mine, other: torch.zeros(2) + mine,
        lambda mine, other: torch.zeros(2, device=mine.device) + other,
    ],
)
def test_what_would_fail_on_a_gpu_fails(act):
    device, mine, other = TwoDevices(), torch.ones(2), torch.ones(2)
    device.add(mine)
    with device, Moves(device):
        assert (mine + other.sum() + other.to(mine) + mine[other.long()]).sum() > 0
        with pytest.raises((RuntimeError, TypeError), match="device"):
            act(mine, other)


def test_neighbors_are_found_of_histograms_on_the_device():
    sets = lt.functional.response_histograms(torch.randn(9, 2, 30), torch.tensor([[-1.0, 0.0, 1.0]] * 2))
    expected = lt.functional.symmetric_kl_neighbors(sets[:3], sets[3:], k=2)
    device = TwoDevices()
    device.add(sets)
    with device, Copies(device):
        found = lt.functional.symmetric_kl_neighbors(sets[:3], sets[3:], k=2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


class Late(toys.Late):
    """Lightning calls `configure_model` with the run's device as the default."""

    def build(self):
        with torch.device("cpu"):
            return toys.toy_net()


@each()
def test_another_default_device_changes_nothing_in_a_late_network(method, monkeypatch):
    plain, module = LitToy(), Late()
    fit(plain, [method.callback()], max_epochs=1)
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda self: torch.device("meta"))
    fit(module, [method.callback()], max_epochs=1)
    assert_same(weights(module), weights(plain))


def test_new_weights_do_not_depend_on_the_default_device():
    def made():
        with own_randomness():
            return nn.Linear(2, 3)

    expected = made()
    with torch.device("meta"):
        assert_same(weights(made()), weights(expected))
        assert torch.zeros(1).is_meta


def test_an_example_runs_where_the_network_is():
    class Parts(nn.Module):
        """Without a forward, and without a name that says which Linear is the head."""

        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Linear(2, 4, device="meta"), nn.Linear(4, 3, device="meta")

    data = torch.utils.data.TensorDataset(torch.rand(6, 2), torch.arange(6) % 3)
    source = lt.SourceTask(data, num_classes=3, forward=lambda module, images: module.out(module.body(images)))
    term = SourceTerm(source, Parts(), weight=lt.Schedule(1.0, 1.0), mix="add")
    assert term.head_path == "out"


@pytest.mark.parametrize("is_on", [True, False])
def test_filters_run_with_cudnn_unless_the_user_turned_it_off(is_on):
    bank, found = toy_bank(), []
    bank.register_forward_pre_hook(lambda *_: found.append(torch.backends.cudnn.enabled))
    with torch.backends.cudnn.flags(enabled=is_on):
        Describer(bank, torch.device("cpu")).response_counts([([0], [Picture(torch.rand(3, 6, 6), 0)])])
    assert found == [is_on]

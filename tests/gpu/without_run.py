"""What a machine without a GPU does with the checkpoints of one."""

import torch

from tests import toys
from tests.contracts.test_reads import RUNS
from tests.methods import METHODS


def results(folder):
    """The last weights of every run that is resumed, and the weights of every network that is loaded."""
    assert not torch.cuda.is_available()
    resumed, loaded = {}, {}
    for name, (make, callbacks) in RUNS.items():
        module = make()
        path = folder / name / f"step={cut(name)}.ckpt"
        toys.fit(module, callbacks(), ckpt_path=path, precision="64-true", **in_order(name))
        resumed[name] = tensors(module.state_dict())
    for method in METHODS:
        path = folder / str(method) / f"step={cut(str(method))}.ckpt"
        loaded[str(method)] = tensors(method.load(toys.LitToy, path).state_dict())
    return resumed, loaded


def tensors(state):
    """What a state_dict holds of numbers, on the CPU; a mixin's holds plain data too."""
    return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


def cut(name):
    """The step after which a run is resumed: in mid-epoch, with source images before and after it."""
    return 6 if name == "ProbeStart" else 3


def in_order(name):
    """A loader that continues in mid-epoch; `ProbeStart` needs one that shows its dataset."""
    return {} if name == "ProbeStart" else {"loader": toys.StatefulLoader()}

"""Layers with an adapter, as peft puts LoRA around them: what is found is the layer, not a part of its adapter."""

import copy

import pytest
from torch import nn

import lightning_transfer as lt
from lightning_transfer.roles import find_head, is_adapted
from tests import toys
from tests.toys import LitToy, fit


class Adapter(nn.Module):
    """LoRA of rank 2."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        if isinstance(layer, nn.Linear):
            down, up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        else:
            down, up = nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, toys.WIDTH, 1, bias=False)
        nn.init.zeros_(up.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def forward(self, taken):
        return self.base_layer(taken) + self.lora_B["default"](self.lora_A["default"](taken))


class ModulesToSave(nn.Module):
    """A head that is trained as a whole, beside the one that it began as."""

    def __init__(self, layer):
        super().__init__()
        self.original_module, self.modules_to_save = layer, nn.ModuleDict({"default": copy.deepcopy(layer)})

    def forward(self, taken):
        return self.modules_to_save["default"](taken)


def adapted(name="fc", wrap=Adapter):
    module = LitToy()
    setattr(module.model, name, wrap(getattr(module.model, name)))
    return module


def kept():
    network = toys.toy_net()
    network.fc = toys.source_head()
    return lt.SourceKnowledge(network)


@pytest.mark.parametrize("make", [kept, lambda: lt.SourceTask(toys.source_data(), head=toys.source_head())])
@pytest.mark.parametrize(("wrap", "path"), [(Adapter, "model.fc"), (ModulesToSave, "model.fc.modules_to_save.default")])
def test_what_the_head_takes_are_the_features(make, wrap, path):
    module, plain = adapted(wrap=wrap), LitToy()
    assert find_head(module).path == path
    losses = []
    for one in (module, plain):
        runner = fit(one, [lt.SoftFinetuning(make(), weight=0.5)], max_steps=1)
        losses.append([float(value) for name, value in runner.callback_metrics.items() if "loss" in name])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) >= 2


def test_what_needs_a_plain_layer_names_the_adapter():
    with pytest.raises(lt.TransferConfigError, match=r"'model.fc' has an adapter of peft \(name it in modules_to_save"):
        fit(adapted(), [lt.ProbeStart()])
    with pytest.raises(lt.TransferConfigError, match=r"'model.fc' is a Linear with an adapter of peft"):
        fit(adapted(), [lt.GatedTransfer(ratio=2)])
    with pytest.raises(lt.TransferConfigError, match=r"conv.base_layer: it is in an adapter of peft"):
        fit(adapted("conv"), [lt.AdaFilter(gated="model.conv*")])


def test_a_network_with_a_part_of_that_name_is_not_an_adapter():
    """timm's DLA calls its stem so."""

    class Dla(toys.ToyNet):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Sequential(nn.Identity())

    assert not is_adapted(Dla())
    assert find_head(Dla()).path == "fc"

"""What soft fine-tuning refuses, as a callback and as a mixin."""

import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.functional import anneal, joint_loss
from tests import toys
from tests.methods import SoftByHand


def source():
    return lt.SourceTask(toys.source_data(), num_classes=7)


@pytest.mark.parametrize("make", [lt.SoftFinetuning, SoftByHand], ids=["callback", "mixin"])
@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (toys.source_data(), {}, r"source is a TensorDataset; wrap the dataset: lt.SourceTask.from_timm\("),
        (toys.toy_net(), {}, r"source is a ToyNet; .* Without source images: lt.SoftFinetuning\(lt.SourceKnowledge"),
        (None, {"weight": -1}, "weight=-1; it takes"),
        (None, {"weight": True}, "weight=True is not a weight; write lt.Schedule"),
        (None, {"weight": {"strat": 1.0}}, "weight has no option 'strat'. Did you mean 'start'"),
        (None, {"weight": lambda p: 1 - p}, r"write lt.Schedule\(1.0, 0.0, shape="),
        (None, {"weight": "cosine"}, r"write lt.Schedule\(shape='cosine'\)"),
        (None, {"weight": lt.Schedule(0.1, 0.5)}, "would rise from 0.1 to 0.5"),
        (None, {"mix": "ad"}, "Did you mean 'add'"),
        (None, {"mix": "convex", "weight": lt.Schedule(2.0)}, "mix='convex' takes weights up to 1, not 2"),
    ],
)
def test_refused_at_construction(make, task, options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        make(task or source(), **options)


def test_no_source_is_refused():
    with pytest.raises(lt.TransferConfigError, match="source is None; wrap the dataset"):
        lt.SoftFinetuning(None)


def test_a_misspelt_option_is_refused_with_the_nearest_name():
    with pytest.raises(lt.TransferConfigError, match="SoftFinetuning has no option 'wieght'. Did you mean 'weight'"):
        lt.SoftFinetuning(source(), wieght=lt.Schedule())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weight": 0.5, "mix": "mean"}, "mix='mean'"), ({"weight": 2, "mix": "convex"}, "weight=2")],
)
def test_joint_loss_refuses_what_is_no_mix(options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        joint_loss(torch.tensor(1.0), torch.tensor(1.0), **options)


def test_anneal_refuses_what_is_no_share():
    with pytest.raises(lt.TransferConfigError, match="until=50"):
        anneal(0.2, until=50)


def test_callback_and_mixin_together_are_refused():
    class Automatic(SoftByHand):
        def __init__(self):
            super().__init__(source())
            self.automatic_optimization = True

    with pytest.raises(lt.TransferConfigError, match="a second one would count the source twice"):
        toys.fit(Automatic(), [lt.SoftFinetuning(source())])

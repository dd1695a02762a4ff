"""What stands beside ours on the wrong side, or is missing in a resumed run, is named in place of a raw error."""

import re

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import ModelPruning

import lightning_transfer as lt
from tests import toys
from tests.methods import GatedFeatures, SoftByHand, chosen, each
from tests.toys import LitToy, fit


class FinetuningScheduler(L.Callback):
    """Lists parameters in its own setup and thaws those alone, as the project of this name does."""

    def setup(self, trainer, module, stage):
        self.params = list(module.named_parameters())


class Subclass(FinetuningScheduler):
    pass


@each()
@pytest.mark.parametrize("kind", [FinetuningScheduler, Subclass])
def test_a_finetuning_scheduler_lists_the_users_parameters_as_they_are_trained(method, kind):
    ours, other = method.callback(), kind()
    right, wrong = ([ours, other], [other, ours]) if method.changes_layers else ([other, ours], [ours, other])
    names = [type(callback).__name__ for callback in right]
    with pytest.raises(
        lt.TransferConfigError, match=rf"(?:lists|include) .*parameters.*In callbacks put {names[0]} before {names[1]}"
    ):
        fit(LitToy(), wrong)
    module = LitToy()
    fit(module, right)
    listed = {id(param) for _, param in other.params}
    assert method.changes_layers or not any("lightning_transfer" in name for name, _ in other.params)
    assert all(id(param) in listed for param in module.parameters())


@each()
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_pruning_comes_first(method):
    """Otherwise the weights that a method has added would count among those of which the smallest are pruned."""

    def pruning():
        return ModelPruning("l1_unstructured", amount=0.3)

    name = type(method.callback()).__name__
    with pytest.raises(lt.TransferConfigError, match=f"In callbacks put ModelPruning before {name}"):
        fit(LitToy(), [method.callback(), pruning()])
    module = LitToy()
    fit(module, [pruning(), method.callback()])
    assert any((param == 0).float().mean() > 0.2 for param in module.parameters())


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_pruning_of_layers_of_ours_names_what_to_write():
    def pruning(**options):
        return ModelPruning("l1_unstructured", amount=0.3, **options)

    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    gated, sourced, again = GatedFeatures(ratio=2), SoftByHand(source, weight=lt.Schedule(until_steps=5)), LitToy()
    fit(again, [lt.GatedTransfer(ratio=2)])
    for module, callbacks in ((gated, []), (sourced, []), (again, [lt.GatedTransfer(ratio=2)])):
        with pytest.raises(lt.TransferConfigError, match=r"ModelPruning lists layers that .* parameters_to_prune=\["):
            fit(module, [pruning(), *callbacks], max_epochs=1)
    fit(gated, [pruning(parameters_to_prune=[(gated.model.conv, "weight")])], max_epochs=1)
    assert (gated.model.conv.weight == 0).float().mean() > 0.2


class Injected(LitToy):
    def __init__(self, network):
        super().__init__()
        self.save_hyperparameters()
        self.model = network


class InjectedAndGated(lt.GatedTransferMixin, Injected):
    def __init__(self, network):
        super().__init__(network)
        self.add_gated_transfer(ratio=2)

    def training_step(self, batch, batch_idx):
        return self.gated_loss(super().training_step(batch, batch_idx))


@pytest.mark.filterwarnings("ignore:Attribute 'network' is an instance of `nn.Module`")
def test_a_changed_network_among_the_hyperparameters_is_named(caplog, tmp_path):
    line = r"self.save_hyperparameters\(ignore=\['network'\]\)"
    with pytest.warns(UserWarning, match=rf"InjectedAndGated cannot be made from it again. Write {line}"):
        fit(InjectedAndGated(toys.toy_net()), max_epochs=1)
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(
            module := Injected(toys.toy_net()),
            [lt.AdaFilter(gated="model.conv"), toys.SaveEveryStep(tmp_path)],
            max_epochs=1,
        )
    assert re.search(line, caplog.text)
    loaded = lt.load_from_checkpoint(Injected, tmp_path / "step=6.ckpt", weights_only=False)
    toys.assert_same(toys.weights(loaded), toys.weights(module))


@each(changes_layers=True)
@pytest.mark.parametrize("sourced", chosen(has_source=True, is_joint=False), ids=str)
def test_a_changed_networks_checkpoint_with_a_source_method_alone_names_who_is_missing(method, sourced, tmp_path):
    ours = method.callback()
    fit(LitToy(), [ours, toys.SaveEveryStep(tmp_path)], max_epochs=1)
    expected = rf"changed by {type(ours).__name__}, which is not in callbacks.*load_from_checkpoint"
    with pytest.raises(lt.TransferConfigError, match=expected):
        fit(LitToy(), [sourced.callback()], ckpt_path=tmp_path / "step=2.ckpt")
    for run in ("validate", "test"):
        runner = toys.trainer([sourced.callback()])
        with pytest.raises(lt.TransferConfigError, match=expected):
            getattr(runner, run)(LitToy(), toys.target_loader(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    for callbacks in ([sourced.callback(), ours], [ours, sourced.callback()]):
        if ours.structure.composes:  # and so is rebuilt from a checkpoint alone
            runner = toys.trainer(callbacks)
            runner.validate(LitToy(), toys.target_loader(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)

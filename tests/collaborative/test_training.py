"""Networks that learn together in somebody's training step: in every way it can run, and what is refused."""

import copy
from functools import partial

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_transfer as lt
from lightning_transfer.functional import apply_collaborative
from tests import toys
from tests.toys import LitToy, assert_same, fit, weights


def together(**options):
    return lt.CollaborativeFinetuning([toys.OtherNet()], frozen_layers={"source1": 1}, **options)


class Twice(LitToy):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0] + 0.1), self(batch[0]))


class Around(LitToy):
    def forward(self, pixels):
        return self.model.fc(self.model.features(pixels))


@pytest.mark.parametrize(("module", "times"), [(Twice, 3), (Around, 0)])
def test_a_step_that_does_not_run_the_networks_once_is_refused(module, times):
    with pytest.raises(lt.TransferConfigError, match=f"ran 'model' {times} times"):
        fit(module(), [together()])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_and_the_other_is_right():
    class Checkpointed(LitToy):
        reentrant = False

        def forward(self, pixels):
            return checkpoint(self.model, pixels, use_reentrant=self.reentrant)

    class Reentrant(Checkpointed):
        reentrant = True

    plain, module = LitToy(), Checkpointed()
    plain.model.bn, module.model.bn = nn.Identity(), nn.Identity()  # it runs twice, so its statistics move twice
    fit(plain, [together()])
    fit(module, [together()])
    assert_same(weights(module), weights(plain))
    with pytest.raises(lt.TransferConfigError, match="ran 'model' 1 times without gradients"):
        fit(Reentrant(), [together()])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("how", ["module", "submodule", "in place"])
def test_compiled_it_trains_the_same(how):
    plain, module = LitToy(), LitToy()
    fit(plain, [together()], max_epochs=1)
    if how == "submodule":
        module.model = torch.compile(module.model, backend="eager")
    elif how == "in place":
        module.model.compile(backend="eager")
    runner = torch.compile(module, backend="eager") if how == "module" else module
    fit(runner, [together()], max_epochs=1)
    found = {name.replace("_orig_mod.", ""): value for name, value in weights(module).items()}
    assert_same(
        {k: v for k, v in found.items() if "extra" not in k},
        {k: v for k, v in weights(plain).items() if "extra" not in k},
        1e-6,
    )


def test_another_criterion_of_the_step_is_warned_of_and_given_it_is_right():
    smooth = partial(F.cross_entropy, label_smoothing=0.3)

    class Smooth(LitToy):
        def training_step(self, batch, batch_idx):
            return smooth(self(batch[0]), batch[1])

    with pytest.warns(
        UserWarning, match=r"training_step gives a loss of .* pass it: CollaborativeFinetuning\(..., loss="
    ):
        fit(Smooth(), [together()], max_steps=1)
    module, networks = Smooth(), LitToy()
    fit(module, [together(loss=smooth)], max_steps=1)
    apply_collaborative(networks, [toys.OtherNet()], frozen_layers={"source1": 1})
    networks.train()
    optimizer = networks.configure_optimizers()
    images, labels = next(iter(toys.target_loader()))
    logits = torch.stack([member(images) for member in networks.model.members.values()])
    (
        smooth(logits[0], labels) + smooth(logits[1], labels) + 0.2 * (logits - logits.mean(0)).norm(dim=2).mean()
    ).backward()
    optimizer.step()
    assert_same(weights(module), weights(networks), 1e-6)


def test_what_the_step_adds_to_its_criterion_is_kept():
    class Decayed(LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 3 * self.model.fc.weight.pow(2).sum()

    plain, module = LitToy(), Decayed()
    fit(plain, [together()], max_steps=8)
    with pytest.warns(UserWarning, match="a regulariser are kept"):
        fit(module, [together()], max_steps=8)
    norms = [each.model.members.own.network.fc.weight.norm().item() for each in (plain, module)]
    assert norms[1] < 0.7 * norms[0]


def test_labels_may_lie_elsewhere():
    class Named(LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["pixels"], batch["kind"]), batch_idx)

    batches = [{"pixels": images, "kind": labels} for images, labels in toys.target_loader()]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    plain, module = LitToy(), Named()
    fit(plain, [together()])
    fit(module, [together(labels=lambda batch: batch["kind"])], loader=data)
    assert_same(weights(module), weights(plain))
    with pytest.raises(lt.TransferConfigError, match="labels=lambda batch"):
        fit(Named(), [together()], loader=data)
    with pytest.raises(lt.TransferConfigError, match="ran 4 images, and the batch has 2 labels"):
        fit(LitToy(), [together(labels=lambda batch: batch[1][:2])])


def test_labels_are_checked_in_training_even_if_a_validation_came_first():
    class Late(LitToy):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum()

    images, labels = toys.target_data().tensors
    several = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.ones(24, 5)), batch_size=4)
    beyond = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels + 3), batch_size=4)
    for loader, said in ((several, "cross_entropy cannot learn from them"), (beyond, "and the networks give 5 logits")):
        runner = toys.trainer([together(labels=lambda batch: batch[1])])
        with pytest.raises(lt.TransferConfigError, match=said):
            runner.fit(Late(), loader, toys.target_loader() if loader is beyond else loader)


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_networks():
    class Broken(LitToy):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                with torch.no_grad():
                    self.model.members.source1.network.fc.bias.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match=r"in step 2: the losses of own, source1 are \[\d.*nan\]"):
        fit(Broken(), [together()])


def test_new_networks_reach_an_optimizer_of_groups_each_at_its_neighbors_rate():
    class Groups(LitToy):
        def configure_optimizers(self):
            head = list(self.model.fc.parameters())
            body = [param for name, param in self.model.members.own.network.named_parameters() if "fc" not in name]
            self.groups = [{"params": body, "lr": 0.01}, {"params": head, "lr": 0.3}]
            return torch.optim.SGD(self.groups)

    module = Groups()
    fit(module, [together()], max_steps=1)
    names = {id(param): name for name, param in module.named_parameters()}
    found = [[names[id(param)] for param in group["params"]] for group in module.groups]
    assert {name for name in found[1] if "source1" in name} == {
        f"model.members.source1.network.fc.{kind}" for kind in ("weight", "bias")
    }
    assert "model.members.source1.network.conv2.weight" in found[0]


def test_groups_by_name_are_those_that_were_meant():
    class ByName(LitToy):
        def configure_optimizers(self):
            self.seen = [name for name, _ in self.named_parameters()]
            return super().configure_optimizers()

    module = ByName()
    fit(module, [together()], max_steps=1)
    assert [name for name in module.seen if "source1" not in name] == [name for name, _ in LitToy().named_parameters()]


def test_mixins_that_forget_or_repeat_the_loss_are_told():
    class Forgetful(lt.CollaborativeMixin, toys.ToySteps, L.LightningModule):
        times = 0

        def __init__(self):
            super().__init__()
            self.add_sources([toys.OtherNet()])

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for _ in range(self.times):
                loss = self.collaborative_loss(loss)
            return loss

    with pytest.raises(lt.TransferConfigError, match=r"never called self\.collaborative_loss"):
        fit(Forgetful())
    module = Forgetful()
    module.times = 2
    with pytest.raises(lt.TransferConfigError, match="called twice"):
        fit(module)
    del module.lightning_transfer_collaborative
    with pytest.raises(lt.TransferConfigError, match=r"self\.add_sources"):
        module.ensemble  # noqa: B018


@pytest.mark.parametrize("other", [lt.AdaFilterMixin, lt.GatedTransferMixin, lt.SourceTaskMixin])
def test_beside_another_methods_mixin_it_is_refused(other):
    class Both(other, toys.ToySteps, L.LightningModule):
        def __init__(self):
            super().__init__()
            if other is lt.AdaFilterMixin:
                self.add_adafilter(gated="model.conv")
            elif other is lt.GatedTransferMixin:
                self.add_gated_transfer(ratio=2, aux_weight=0)
            else:
                self.add_source_task(lt.SourceTask(toys.source_data(), head=toys.source_head()))

    with pytest.raises(lt.TransferConfigError, match="has parts of other methods"):
        fit(Both(), [together()])


def test_beside_a_frozen_teacher_the_network_is_asked_for_by_name():
    class Distilled(LitToy):
        def __init__(self):
            super().__init__()
            self.teacher = toys.OtherNet().requires_grad_(False)

    with pytest.raises(lt.TransferConfigError, match="images enter, backbone='model'"):
        fit(Distilled(), [together()])
    fit(Distilled(), [together(backbone="model")])


def test_another_callback_beside_its_mixin_is_refused():
    class Mixed(lt.CollaborativeMixin, toys.ToySteps, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.add_sources([toys.OtherNet()])

    for callback in (
        lt.AdaFilter(gated="model.conv"),
        lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7)),
        lt.GatedTransfer(ratio=2),
    ):
        with pytest.raises(lt.TransferConfigError, match="trains several networks as one"):
            fit(Mixed(), [callback])


def test_logs_what_each_network_has_right_and_what_they_disagree_by():
    module, looked = LitToy(), []

    class Looking(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                networks = copy.deepcopy(module.model.members).train()
                looked.append((torch.stack([each(batch[0]) for each in networks.values()]).double(), batch[1]))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            logits, labels = looked[-1]
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            for number, name in enumerate(("own", "source1")):
                right = (logits[number].argmax(1) == labels).double().mean().item()
                assert found[f"transfer/accuracy/{name}"] == pytest.approx(right)
            assert found["transfer/ensemble_accuracy"] == pytest.approx(
                (logits.sum(0).argmax(1) == labels).double().mean().item()
            )
            apart = sum((each - logits.mean(0)).norm(dim=1) for each in logits).mean() / 2
            assert found["transfer/disagreement"] == pytest.approx(apart.item(), rel=1e-4)

    fit(module, [together(), Looking()], max_epochs=1)
    assert len(looked) == 6


def test_a_criterion_with_numbers_of_its_own_is_a_part_of_the_run(tmp_path):
    criterion = nn.CrossEntropyLoss(weight=torch.rand(toys.TARGET_CLASSES))

    class Weighted(LitToy):
        def training_step(self, batch, batch_idx):
            return criterion(self(batch[0]), batch[1])

    whole, module = Weighted(), Weighted()
    callback = together(loss=criterion)
    fit(whole, [callback, toys.SaveEveryStep(tmp_path)], loader=toys.StatefulLoader())
    assert callback.part.criterion is not criterion
    assert "criterion.weight" in dict(callback.part.named_buffers())  # so that it moves to a device
    again = together(loss=criterion)
    fit(module, [again], loader=toys.StatefulLoader(), ckpt_path=tmp_path / "step=5.ckpt")
    assert_same(weights(module), weights(whole))

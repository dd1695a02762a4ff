"""A network that is handed on loads without this package and gives the same; what would not load is refused."""

import json
import re
import tempfile

import lightning.pytorch as L
import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from onnx.reference import ReferenceEvaluator
from PIL import Image
from safetensors.torch import load_file, load_model
from torch import nn
from torch.utils.data import DataLoader

import lightning_transfer as lt
from tests import toys
from tests.toys import LitToy, fit


class Lit(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2


def tiny(num_classes=3):
    return timm.create_model("test_resnet", num_classes=num_classes)  # its name is in timm's registry


def test_timm_loads_what_was_trained_and_the_card_says_how(tmp_path):
    module = Lit(tiny())
    data = DataLoader([(image, index % 3) for index, image in enumerate(IMAGES)], batch_size=4)
    runner = toys.trainer(
        [lt.ProbeStart(), lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7), weight=0)]
    )
    runner.fit(module, data)
    folder = lt.export(module, tmp_path / "new" / "mine", trainer=runner, classes=["ant", "bee", "cat"], image_size=32)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(again(IMAGES), module.network.eval()(IMAGES), rtol=0, atol=0)
    assert again.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    card = (folder / "README.md").read_text()
    for part in ("# test_resnet, fine-tuned", "3 classes: ant, bee, cat", "4 steps, 2 epochs", "| train_loss | "):
        assert part in card
    assert "- ProbeStart(head=auto), https://arxiv.org/abs/2202.10054" in card
    assert "weight/start=0, " in card
    assert "https://arxiv.org/abs/1909.02236" in card
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine"]


def test_the_card_names_the_paper_of_what_is_kept_without_source_images(tmp_path):
    data, network = DataLoader([(image, index % 3) for index, image in enumerate(IMAGES)], batch_size=4), tiny(7)
    with torch.no_grad():
        network.get_classifier().weight *= 2  # as if it was trained
    runner = toys.trainer([lt.SoftFinetuning(lt.SourceKnowledge(network))], max_steps=1)
    network.reset_classifier(3)
    runner.fit(module := Lit(network), data)
    card = (
        lt.export(module, tmp_path / "mine", trainer=runner, classes=["ant", "bee", "cat"], image_size=32) / "README.md"
    ).read_text()
    assert "source/temperature=2.0" in card
    assert "https://arxiv.org/abs/1606.09282" in card


OTHERS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "nearest", "crop_pct": 0.8}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({}, {**OTHERS, "input_size": (3, 48, 48)}),  # the user's own
        ({"in_chans": 1}, {}),
        ({"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 1}, {}),
    ],
    ids=["timm's", "changed", "grey", "of one size"],
)
def test_the_card_has_the_preprocessing_and_code_that_makes_the_transform(tmp_path, options, changes):
    network = timm.create_model(**{"model_name": "test_resnet", "num_classes": 3, **options})
    network.pretrained_cfg |= changes
    folder, known, made = lt.export(network, tmp_path / "mine"), network.pretrained_cfg, {}
    card = (folder / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("FOLDER", str(folder)), made)
    picture = Image.effect_noise((70, 60), 80).convert("L" if options.get("in_chans") else "RGB")
    size = options.get("img_size", known["input_size"][1])
    edge = int(size / known["crop_pct"])
    wide = picture.resize((int(edge * 70 / 60), edge), getattr(Image.Resampling, known["interpolation"].upper()))
    left, top = round((wide.width - size) / 2), round((edge - size) / 2)
    pixels = np.asarray(wide.crop((left, top, left + size, top + size)), float).reshape(size, size, -1) / 255
    mean, std = (np.array(known[key])[: pixels.shape[2]] for key in ("mean", "std"))
    given = made["transform"](picture)
    np.testing.assert_allclose(given.permute(1, 2, 0), (pixels - mean) / std, atol=1e-5)
    assert made["network"](given[None]).shape == (1, 3)
    saved = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"):
        assert f"| {key} | {saved[key]} |" in card


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_takes_any_number_of_images(tmp_path):
    module = LitToy()
    module.example_input_array = torch.randn(2, 3, 6, 6)
    folder = lt.export(module, tmp_path / "mine", onnx=True)
    assert all(child.training for child in module.modules())
    model = onnx.load(folder / "model.onnx")
    images = torch.randn(5, 3, 6, 6)
    found = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), module.model.eval()(images), rtol=1e-4, atol=1e-5)
    assert load_file(folder / "model.safetensors").keys() == module.model.state_dict().keys()


def by_hand():
    network = tiny()
    network.fc = nn.Linear(network.num_features, 3)
    network.num_classes = 10
    return network


FC = ("fc.weight", "fc.bias")


def changed(path="", **parts):
    network = tiny()
    for name, part in parts.items():
        setattr(network.get_submodule(path), name, part)
    return network


def of_eight_pixels(images):
    assert images.shape[-1] == 8, "8 pixels"


def hooked():
    network = tiny()
    network.layer1.register_forward_hook(lambda layer, args, given: given * 2)
    return network


def not_a_number():
    head = tiny().fc
    nn.init.constant_(head.weight, torch.nan)
    return head


def sparse():
    network = tiny()
    network.register_buffer("mask", torch.eye(3).to_sparse())
    return network


def parametrized(change, *args):
    network = tiny()
    change(network.fc, *args)
    return network


class Several(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = tiny(), tiny()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.student(batch[0]), batch[1])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 2), nn.Linear(4, 3)


class Apart(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(4, 2),
        )

    def forward(self, images):
        return self.head(self.backbone(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: Lit(by_hand()), {}, "timm does not load this ResNet again: .*reset_classifier"),
        (Apart, {}, r"The head 'head' is not in 'backbone'.*nn.Sequential\(module.backbone, module.head\)"),
        (LitToy, {"classes": ["one"]}, "classes names 1 classes, and the head gives 5 numbers"),
        (LitToy, {"classes": [1, 2, 3, 4, 5]}, r"classes=\[1, 2, 3, 4, 5\]; it takes a list of names"),
        (LitToy, {"classes": ["a", "b", "c", "d", None]}, r"classes=\['a'.* takes a list of names"),
        (LitToy, {"classes": iter("abcde")}, "classes=<.*takes a list of names"),
        (LitToy, {"classes": "abcde"}, "classes='abcde'; it takes a list of names"),
        (lambda: Lit(tiny(1)), {"classes": ["one"]}, "two names, of 0 and of 1"),
        (LitToy, {"trainer": 3}, "trainer=3; it takes the Trainer"),
        (lambda: changed(maxpool=nn.Identity()), {}, "for the same image it gives other numbers"),
        (lambda: changed(act1=nn.Sigmoid()), {}, "for the same image it gives other numbers"),
        (lambda: changed("conv1.0", stride=(1, 1)), {}, "for the same image it gives other numbers"),
        (lambda: changed(forward=of_eight_pixels), {}, "timm does not load this ResNet again: 8 pixels"),
        (hooked, {}, "for the same image it gives other numbers"),
        (lambda: changed(fc=not_a_number()), {}, "fc.weight holds NaN"),
        (lambda: changed(fc=torch.jit.script(nn.Linear(64, 5))), {}, "torch.jit has compiled layers"),
        (lambda: torch.jit.script(nn.Linear(4, 2)), {}, "torch.jit has compiled layers"),
        (sparse, {}, "mask is sparse, and only dense tensors are exported"),
        (lambda: tiny().double(), {}, "conv1.* is torch.float64, and timm loads torch.float32.*network.float"),
        (lambda: parametrized(nn.utils.parametrizations.weight_norm), {}, "remove the parametrization"),
        (lambda: parametrized(nn.utils.prune.random_unstructured, "weight", 0.5), {}, "remove the parametrization"),
        (Several, {}, r"several parts.*Export the network itself: lt.export\(module.student, folder\)."),
        (TwoHeads, {}, r"ambiguous: fc, head. Export the network itself: lt.export\(module.network, folder\).$"),
        (lambda: Lit(Several()), {}, r"ambiguous: network.student.*itself: lt.export\(module.network, folder\)."),
        (LitToy, {"onnx": True}, "shape of an image is not known.*example_input_array"),
    ],
)
def test_what_would_not_load_is_refused_and_leaves_no_folder(tmp_path, module, options, message):
    with pytest.raises(lt.TransferConfigError, match=f"(?s){message}"):
        lt.export(module(), tmp_path / "mine", **options)
    assert [*tmp_path.iterdir()] == []


def test_classes_in_another_order_than_the_training_images_have_are_refused(tmp_path):
    images = toys.target_data()
    images.classes = [*"abcde"]
    trainer = toys.trainer()
    trainer.fit(module := LitToy(), DataLoader(images, batch_size=5))
    with pytest.raises(lt.TransferConfigError, match=r"in another order: classes=\['a', 'b', 'c', 'd', 'e'\]"):
        lt.export(module, tmp_path / "mine", trainer=trainer, classes=[*"bacde"])
    for classes in (None, [*"abcde"], [*"vwxyz"]):
        lt.export(module, tmp_path / f"{classes}", trainer=trainer, classes=classes)


class Changes(Lit):
    def __init__(self, network, change):
        super().__init__(network)
        self.change = change

    def forward(self, images):
        return self.network(self.change(images))


class OfBatches(Lit):
    def forward(self, batch):
        return self.network(batch["image"])


@pytest.mark.parametrize(
    "change", [lambda images: (images - 0.5) / 0.2, lambda images: images / 255, lambda images: images.flip(1)]
)
def test_images_that_the_module_changes_before_its_network_are_warned_of(tmp_path, change):
    with pytest.warns(UserWarning, match="The forward of Changes changes images before its ResNet takes them"):
        lt.export(module := Changes(tiny(), change), tmp_path / "inside")
    assert not module._forward_pre_hooks
    assert not module.network._forward_pre_hooks
    lt.export(module.network, tmp_path / "network")  # warnings are errors
    lt.export(OfBatches(tiny()), tmp_path / "batches")


def trained_tiny():
    torch.manual_seed(0)
    network = tiny()
    with torch.no_grad():
        network.get_classifier().weight *= 20  # as if it was trained
    return network


class Gives(Lit):
    def __init__(self, network, forward):
        super().__init__(network)
        self.give = forward

    def forward(self, images):
        return self.give(self.network, images)


def max_pooled(network, images):
    return network.get_classifier()(network.forward_features(images).amax((2, 3)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda network, images: network(images) + torch.tensor([0.7, 0.2, 0.1]).log(),
        lambda network, images: {"scores": (network(images) + torch.tensor([0.0, 0.0, 1.0])).softmax(1)},
        lambda network, images: network(images) / 2,
        lambda network, images: network(images.flip(3)) + network(images),
        max_pooled,
        lambda network, images: max_pooled(network, images).softmax(1),
    ],
    ids=["prior", "prior, softmax", "temperature", "two views", "pooling", "pooling, softmax"],
)
def test_outputs_that_the_module_changes_after_its_network_are_warned_of(tmp_path, forward):
    with pytest.warns(UserWarning, match="The forward of Gives gives other outputs than its ResNet") as caught:
        lt.export(module := Gives(trained_tiny(), forward), tmp_path / "mine")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not module.network._forward_hooks


@pytest.mark.parametrize(
    "forward",
    [
        lambda network, images: network(images).softmax(1),
        lambda network, images: network(images).sigmoid(),
        lambda network, images: {"scores": network(images), "classes": network(images).argmax(1)},
        lambda network, images: network(images).argmax(1),
        lambda network, images: network.forward_head(network.forward_features(images)),
        lambda network, images: network.forward_features(images),
    ],
    ids=["softmax", "sigmoid", "dict", "argmax", "by parts", "features"],
)
def test_outputs_in_the_order_of_the_networks_scores_are_not_warned_of(tmp_path, forward):
    lt.export(Gives(trained_tiny(), forward), tmp_path / "mine")  # warnings are errors


def test_rounding_at_half_precision_is_not_warned_of(tmp_path):
    half = nn.Sequential(trained_tiny()).bfloat16()
    lt.export(Gives(half, lambda network, images: network(images).softmax(1)), tmp_path / "mine")


def test_swapped_arguments_are_refused_by_name(tmp_path):
    with pytest.raises(lt.TransferConfigError, match=r"first argument is a str; .*lt.export\(module, 'mine'\)"):
        lt.export(str(tmp_path / "mine"), LitToy())


def test_of_a_timm_network_that_no_longer_says_its_name_the_weights_are_written(tmp_path):
    network = tiny()
    network.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    folder = lt.export(network, tmp_path / "mine")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_the_card_of_a_trainer_that_never_fitted_says_what_is_not_known(tmp_path):
    runner, module = toys.trainer([lt.ProbeStart()]), LitToy()
    runner.validate(module, toys.target_loader(), verbose=False)
    card = (lt.export(module, tmp_path / "tested", trainer=runner) / "README.md").read_text()
    assert "Not known: the Trainer that was given to `export` has taken no training step." in card
    assert "steps," not in card
    assert "ProbeStart" not in card
    card = (lt.export(module, tmp_path / "fitted", trainer=fit(module)) / "README.md").read_text()
    assert "12 steps, 2 epochs.\n\nNo callback of lightning_transfer." in card
    assert card.endswith(".\n")
    runner = fit(module, max_epochs=1, limit_train_batches=1)
    assert "1 step, 1 epoch.\n" in (lt.export(module, tmp_path / "once", trainer=runner) / "README.md").read_text()


def test_changed_layers_are_refused_until_they_are_taken_out(tmp_path):
    module = LitToy()
    fit(module, [lt.GatedTransfer(ratio=2)])
    with pytest.raises(lt.TransferConfigError, match="layers of GatedTransfer .*remove_gated_transfer"):
        lt.export(module, tmp_path / "mine")
    lt.functional.remove_gated_transfer(module)
    assert lt.export(module, tmp_path / "mine").is_dir()
    with pytest.raises(lt.TransferConfigError, match="mine holds something already"):
        lt.export(module, tmp_path / "mine")


def test_several_networks_are_named_as_what_they_are_before_a_head_is_looked_for(tmp_path):
    module = LitToy()
    fit(module, [lt.CollaborativeFinetuning([toys.OtherNet()], backbone="model")])
    with pytest.raises(lt.TransferConfigError, match="layers of CollaborativeFinetuning .*remove_collaborative"):
        lt.export(module, tmp_path / "mine")


class OnItself(lt.SourceTaskMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)
        self.add_source_task(lt.SourceTask(toys.source_data(), num_classes=7))

    def forward(self, images):
        return self.fc(self.last(self.first(images)).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return self.joint_loss(F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_of_a_module_with_layers_on_itself_only_the_users_are_written(tmp_path):
    module = OnItself()
    fit(module)
    assert any(key.startswith("source_task.") for key in module.state_dict())
    folder = lt.export(module, tmp_path / "mine")
    written = load_file(folder / "model.safetensors")
    assert written.keys() == {"first.weight", "first.bias", "last.weight", "last.bias", *FC}
    assert torch.equal(written["fc.weight"], module.fc.weight)
    assert "without what lightning_transfer attached" in (folder / "README.md").read_text()
    plain = OnItself()
    del plain.source_task
    load_model(plain, folder / "model.safetensors")


def refuse_to_compile(graph, inputs):
    raise NotImplementedError("an export compiles nothing")


def compiled(module):
    return torch.compile(module, backend=refuse_to_compile)


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.body(images))


@pytest.mark.parametrize(
    "module",
    [
        lambda: compiled(tiny()),
        lambda: compiled(Lit(tiny())),
        lambda: Lit(compiled(tiny())),
        lambda: changed(layer1=compiled(tiny().layer1)),
        Beside,
        lambda: tiny().to(memory_format=torch.channels_last),
    ],
)
def test_compiled_parts_and_layouts_of_memory_are_not_in_what_is_written(tmp_path, module):
    torch.manual_seed(0)
    network = module()
    before = torch.get_rng_state()
    folder = lt.export(network, tmp_path / "mine")
    assert torch.equal(torch.get_rng_state(), before)
    written = load_file(folder / "model.safetensors")
    plain = tiny().state_dict().keys() if module is not Beside else {"body.0.weight", "body.0.bias", *FC}
    assert written.keys() == plain
    assert (folder / "config.json").exists() == (module is not Beside)


@pytest.mark.parametrize("name", ["file/mine", "file", "dangling", "a\0b", "", ".", "x" * 300])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(lt.TransferConfigError, match=rf"^The folder {re.escape(repr(name))} cannot be written: ."):
        lt.export(LitToy(), name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(lt.TransferConfigError, match="The folder '.*mine' cannot be written: Permission denied"):
        lt.export(LitToy(), tmp_path / "mine")


VIT = {"model_name": "vit_tiny_patch16_224", "img_size": 64, "depth": 1}


@pytest.mark.parametrize(
    ("example", "options", "shape"),
    [
        (torch.zeros(1, 3, 40, 40), {}, (3, 40, 40)),
        (torch.zeros(1, 3, 40, 40), {"image_size": (64, 48)}, (3, 64, 48)),
        (None, {"image_size": 64, "in_chans": 1}, (1, 64, 64)),
        ((torch.zeros(1, 3, 40, 40),), {}, (3, 40, 40)),
        (None, {"in_chans": 1}, (1, 160, 160)),
        (None, VIT, (3, 64, 64)),
        (None, {**VIT, "dynamic_img_size": True}, (3, 224, 224)),  # it takes any, as timm says
        (torch.zeros(1, 3, 64, 64), {**VIT, "dynamic_img_size": True}, (3, 64, 64)),
    ],
)
def test_onnx_takes_the_size_of_the_example_or_of_the_network(tmp_path, monkeypatch, example, options, shape):
    def stop(network, images, *args, **kwargs):
        raise RuntimeError(f"no operator for {tuple(images[0].shape)}")

    monkeypatch.setattr(torch.onnx, "export", stop)
    asked = {"onnx": True, "image_size": options.pop("image_size", None)}
    module = Lit(timm.create_model(**{"model_name": "test_resnet", "num_classes": 3, **options}))
    module.example_input_array = example
    message = f"torch.onnx does not export .*: no operator for {re.escape(str((2, *shape)))}"
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.export(module, tmp_path / "mine", **asked)


def test_names_break_neither_lines_nor_tables_of_the_card(tmp_path):
    runner = toys.trainer()
    runner.fit(module := LitToy(), toys.target_loader())
    runner.callback_metrics["a|b\nc"] = torch.tensor(1.0)
    folder = lt.export(module, tmp_path / "mine", trainer=runner, classes=["one\n# two", "a|b", "c", "d", "e"])
    card = (folder / "README.md").read_text()
    assert r"5 classes: one # two, a\|b, c, d, e." in card
    assert r"| a\|b c | 1 |" in card

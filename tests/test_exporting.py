"""A network that is handed on loads without this package and gives the same; what would not load is refused."""

import lightning.pytorch as L
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
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


IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny():
    return timm.create_model("test_resnet", num_classes=3)  # its name is in timm's registry


def test_timm_loads_what_was_trained_and_the_card_says_how(tmp_path):
    module = Lit(tiny())
    data = DataLoader([(image, index % 3) for index, image in enumerate(IMAGES)], batch_size=4)
    runner = toys.trainer(
        [lt.ProbeStart(), lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7), weight=0)]
    )
    runner.fit(module, data)
    folder = lt.export(module, tmp_path / "new" / "mine", trainer=runner, classes=["ant", "bee", "cat"])
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


class Apart(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(4, 2),
        )

    def forward(self, images):
        return self.head(self.backbone(images))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: Lit(by_hand()), {}, "timm does not load this ResNet again: .*reset_classifier"),
        (Apart, {}, r"The head 'head' is not in 'backbone'.*nn.Sequential\(module.backbone, module.head\)"),
        (LitToy, {"classes": ["one"]}, "classes names 1 classes, and the head gives 5 numbers"),
        (LitToy, {"onnx": True}, "size of an image is not known.*example_input_array"),
    ],
)
def test_what_would_not_load_is_refused_and_leaves_no_folder(tmp_path, module, options, message):
    with pytest.raises(lt.TransferConfigError, match=f"(?s){message}"):
        lt.export(module(), tmp_path / "mine", **options)
    assert [*tmp_path.iterdir()] == []


def test_changed_layers_are_refused_until_they_are_taken_out(tmp_path):
    module = LitToy()
    fit(module, [lt.GatedTransfer(ratio=2)])
    with pytest.raises(lt.TransferConfigError, match="layers of GatedTransfer .*remove_gated_transfer"):
        lt.export(module, tmp_path / "mine")
    lt.functional.remove_gated_transfer(module)
    assert lt.export(module, tmp_path / "mine").is_dir()
    with pytest.raises(lt.TransferConfigError, match="mine holds something already"):
        lt.export(module, tmp_path / "mine")

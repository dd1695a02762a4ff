"""LightningModules as they are found in projects, unmodified; a docstring's first line names the row of the table.

Of each, `features` and `seen` are the oracle's way to what its head takes; the rest is what a project has.
"""

import functools
import warnings

import lightning.pytorch as L
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from tests.field import nets

CLASSES = 5
SOURCE_CLASSES = 7


class Steps:
    """What the modules below share.

    Attributes:
        head_path: where the classifier sits.
        entry: the network that images enter.
        epochs: of a run.
    """

    head_path = "model.fc"
    entry = "model"
    epochs = 1

    def __init__(self):
        super().__init__()
        self.model = nets.timm_resnet()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=4)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    @staticmethod
    def sample(image, label, index, classes):
        """What the project's dataset gives."""
        return image, label

    @staticmethod
    def criterion(logits, labels, classes):
        """The loss of (B,) class numbers, as the project takes it of its own labels."""
        return F.cross_entropy(logits, labels)

    @staticmethod
    def callbacks():
        """The project's own callbacks."""
        return []

    def seen(self, x):
        """Images as they reach the network."""
        return x

    def features(self, x):
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)


class Shape(Steps, L.LightningModule):
    """A module of `lightning`."""


class Pictures(Dataset):
    """Random pictures in the form that a project's dataset gives; writes down what was loaded."""

    def __init__(self, shape, num, classes, seed, shift=0.0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(num, 3, nets.SIZE, nets.SIZE, generator=generator) + shift
        self.labels = torch.arange(num) % classes
        self.shape, self.classes = shape, classes
        self.loaded = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.shape.sample(self.images[index], int(self.labels[index]), index, self.classes)


class TimmClassifier(Shape):
    """A timm classifier as `self.model`"""


class BackboneAndHead(Shape):
    """`self.backbone` and `self.head` apart"""

    head_path, entry = "head", "backbone"

    def __init__(self):
        super().__init__()
        self.model = None
        self.backbone = nets.timm_resnet(num_classes=0)
        self.head = nn.Linear(nets.WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.backbone(x))

    def features(self, x):
        return self.backbone(x)


class SequentialOfChildren(Shape):
    """`nn.Sequential(*children, Linear)`"""

    head_path = "model.9"

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*list(nets.timm_resnet().children())[:-1], nn.Linear(nets.WIDTH, CLASSES))

    def features(self, x):
        return self.model[:-1](x)


class Thaw(L.callbacks.BaseFinetuning):
    """Frozen at first; the last five children of the extractor are thawed in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.feature_extractor, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.feature_extractor[-5:], optimizer, initial_denom_lr=1.0)


class ThawedFromTheEnd(Shape):
    """A torchvision ResNet as `nn.Sequential(*children)`, `fc` apart, thawed from the end by `BackboneFinetuning`"""

    head_path, entry, epochs = "fc.2", "feature_extractor", 2

    def __init__(self):
        super().__init__()
        self.model = None
        self.feature_extractor = nn.Sequential(*list(nets.TorchvisionLikeResNet().children())[:-1])
        self.fc = nn.Sequential(nn.Linear(nets.WIDTH, nets.WIDTH), nn.ReLU(), nn.Linear(nets.WIDTH, CLASSES))

    def forward(self, x):
        return self.fc(self.feature_extractor(x).flatten(1))

    @staticmethod
    def callbacks():
        return [Thaw()]

    def features(self, x):
        return self.fc[:2](self.feature_extractor(x).flatten(1))


class InjectedNetwork(Shape):
    """A network injected and in `save_hyperparameters()`, metrics of torchmetrics (Hydra's template)"""

    head_path, entry = "net.fc", "net"

    def __init__(self, net=None, optimizer=None):
        super().__init__()
        self.model = None
        net, optimizer = net or nets.TorchvisionLikeResNet(), optimizer or functools.partial(torch.optim.SGD, lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice not to
            self.save_hyperparameters(logger=False)
        self.net, self.make_optimizer = net, optimizer
        self.loss_of = nn.CrossEntropyLoss()
        self.train_acc, self.train_loss = MulticlassAccuracy(num_classes=CLASSES), MeanMetric()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.forward(x)
        loss = self.loss_of(logits, y)
        self.train_loss(loss)
        self.train_acc(logits.argmax(1), y)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss_of(self.forward(batch[0]), batch[1]))

    def configure_optimizers(self):
        return {"optimizer": self.make_optimizer(params=self.trainer.model.parameters())}

    def features(self, x):
        net = self.net
        x = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))))
        return net.avgpool(x).flatten(1)


class ForwardOfBatch(Shape):
    """`forward(self, batch)`"""

    def forward(self, batch):
        x, y = batch
        logits = self.model(x)
        return F.cross_entropy(logits, y), logits

    def training_step(self, batch, batch_idx):
        return self(batch)[0]

    def predict_step(self, batch, batch_idx):
        return self(batch)[1]


class ConvolutionalClassifier(Shape):
    """A classifier that is a 1x1 convolution (SqueezeNet)"""

    head_path = "model.classifier"

    def __init__(self):
        super().__init__()
        self.model = nets.SqueezeNetLike()

    def features(self, x):
        return self.model.features(x)


class GradientsSwitchedInForward(Shape):
    """`forward` under `torch.set_grad_enabled(...)`, a dict of logits and features (solo-learn)"""

    head_path, entry = "classifier", "backbone"

    def __init__(self):
        super().__init__()
        self.model = None
        self.backbone = nets.timm_resnet(num_classes=0)
        self.classifier = nn.Linear(nets.WIDTH, CLASSES)
        self.finetune = True

    def forward(self, x):
        with torch.set_grad_enabled(self.finetune):
            feats = self.backbone(x)
        return {"logits": self.classifier(feats), "feats": feats}

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x)["logits"], y)

    def features(self, x):
        return self.backbone(x)


class TransformerWithoutHead(GradientsSwitchedInForward):
    """A vision transformer without a head, and a classifier apart"""

    def __init__(self):
        super().__init__()
        self.backbone = nets.vit(num_classes=0)

    def forward(self, x):
        feats = self.backbone(x)
        return {"logits": self.classifier(feats), "feats": feats}


class VisionTransformer(Shape):
    """A vision transformer"""

    head_path = "model.head"

    def __init__(self):
        super().__init__()
        self.model = nets.vit()


class TorchvisionClassifier(Shape):
    """A torchvision network whose classifier is a container"""

    head_path = "model.classifier.3"

    def __init__(self):
        super().__init__()
        self.model = nets.mobilenet()

    def features(self, x):
        return self.model.classifier[:3](self.model.avgpool(self.model.features(x)).flatten(1))


class DictBatches(Shape):
    """Dict batches, augmented and normalised in `on_after_batch_transfer` (torchgeo)"""

    @staticmethod
    def sample(image, label, index, classes):
        return {"image": image, "label": label}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x = batch["image"].flip(3) if self.trainer.training else batch["image"]
        return {**batch, "image": (x - 0.5) / 2}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def predict_step(self, batch, batch_idx):
        return self(batch["image"])

    def seen(self, x):
        return (x.flip(3) - 0.5) / 2 if self.training else (x - 0.5) / 2


class NormalizedInStep(Shape):
    """Images normalised in `training_step` and `validation_step`"""

    def seen(self, x):
        return (x - 0.45) / 0.225

    def training_step(self, batch, batch_idx):
        return super().training_step((self.seen(batch[0]), batch[1]), batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(self.seen(batch[0]))


class TransformsOnDevice(Shape):
    """Transforms of whole batches in `on_after_batch_transfer`"""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 0.5, batch[1]]

    def seen(self, x):
        return x * 0.5


class HeadOnSequential(Shape):
    """`nn.Sequential(*children)`, flattened, and `self.classification_head` (lightly)"""

    head_path, entry = "classification_head", "backbone"

    def __init__(self):
        super().__init__()
        self.model = None
        self.backbone = nn.Sequential(*list(nets.TorchvisionLikeResNet().children())[:-1])
        self.classification_head = nn.Linear(nets.WIDTH, CLASSES)

    def forward(self, x):
        return self.classification_head(self.backbone(x).flatten(start_dim=1))

    def features(self, x):
        return self.backbone(x).flatten(1)


class LinearProbe(HeadOnSequential):
    """A linear probe: the backbone under `no_grad`, only the head in the optimizer"""

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x).flatten(start_dim=1)
        return self.classification_head(features)

    def configure_optimizers(self):
        return torch.optim.SGD(self.classification_head.parameters(), lr=0.1)


class LayersOnTheModule(Shape):
    """Layers on the LightningModule itself, `OneCycleLR`"""

    head_path, entry = "fc", ""

    def __init__(self):
        super().__init__()
        self.model = None
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(8))
        self.block2 = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(8))
        self.block3 = nn.Sequential(nn.Conv2d(8, nets.WIDTH, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(nets.WIDTH))
        self.fc = nn.Linear(nets.WIDTH, CLASSES)

    def forward(self, x):
        return self.fc(self.features(x))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=0.2,
            total_steps=self.trainer.estimated_stepping_batches,
            pct_start=0.6 / self.trainer.max_epochs,
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def features(self, x):
        return self.block3(self.block2(self.block1(x))).mean((2, 3))


def binary(logits, labels):
    return F.binary_cross_entropy_with_logits(logits.squeeze(1), labels.float())


class OneLogit(Shape):
    """One logit, binary cross-entropy"""

    def __init__(self):
        super().__init__()
        self.model = nets.timm_resnet(num_classes=1)
        nn.init.constant_(self.model.fc.bias, 0.5)  # so that it says 1 of most

    @staticmethod
    def sample(image, label, index, classes):
        return (image, label % 2) if classes == CLASSES else (image, label)

    @staticmethod
    def criterion(logits, labels, classes):
        return binary(logits, labels % 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return binary(self(x), y)


class OneHot(Shape):
    """One-hot labels, binary cross-entropy"""

    @staticmethod
    def sample(image, label, index, classes):
        return image, F.one_hot(torch.tensor(label), classes).float()

    @staticmethod
    def criterion(logits, labels, classes):
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, classes).float())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y)


def multi_hot(label, classes):
    return F.one_hot(torch.tensor([label, (label + 1) % classes]), classes).sum(0).float()


class MultiLabel(Shape):
    """Several labels an image, binary cross-entropy"""

    @staticmethod
    def sample(image, label, index, classes):
        return image, multi_hot(label, classes)

    @staticmethod
    def criterion(logits, labels, classes):
        targets = torch.stack([multi_hot(int(label), classes) for label in labels])
        return F.binary_cross_entropy_with_logits(logits, targets)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y)


class SigmoidAtTheEnd(MultiLabel):
    """A network that ends in a sigmoid, `BCELoss`"""

    head_path = "model.0.fc"

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nets.timm_resnet(), nn.Sigmoid())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy(self(x), y)

    def features(self, x):
        return self.model[0].forward_head(self.model[0].forward_features(x), pre_logits=True)


class MixupInTheStep(Shape):
    """Mixup inside `training_step`"""

    def training_step(self, batch, batch_idx):
        x, y = batch
        share, order = 0.7, torch.randperm(len(x))
        logits = self(share * x + (1 - share) * x[order])
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class MixupInTheHook(Shape):
    """Mixup in `on_after_batch_transfer`, the permutation kept for the step"""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if not self.trainer.training:
            return batch
        self.order = torch.randperm(len(x))
        return [0.7 * x + 0.3 * x[self.order], y]

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y[self.order])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def times_batch(logits, labels):
    return F.cross_entropy(logits, labels) * len(labels)


class LossTimesBatch(Shape):
    """The loss times the batch size"""

    @staticmethod
    def criterion(logits, labels, classes):
        return times_batch(logits, labels)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y) * x.shape[0]


class SoftmaxAtTheEnd(Shape):
    """A network that ends in a softmax, cross-entropy on top"""

    head_path = "model.0.fc"

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nets.timm_resnet(), nn.Softmax(dim=1))

    def features(self, x):
        return self.model[0].forward_head(self.model[0].forward_features(x), pre_logits=True)


def weighted():
    return nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5]))


class ClassWeights(Shape):
    """A criterion with class weights"""

    def __init__(self):
        super().__init__()
        self.loss_of = weighted()

    @staticmethod
    def criterion(logits, labels, classes):
        return weighted()(logits, labels)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss_of(self(x), y)


class LabelSmoothing(Shape):
    """Label smoothing"""

    @staticmethod
    def criterion(logits, labels, classes):
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y, label_smoothing=0.1)


class DictStep(Shape):
    """A `training_step` that returns a dict"""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits.detach(), "labels": y}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx)["loss"])


class OneArgumentStep(Shape):
    """`training_step(self, batch)` without `batch_idx`"""

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch))


class ThreeTuples(Shape):
    """`(image, label, path)` batches"""

    @staticmethod
    def sample(image, label, index, classes):
        return image, label, f"{index}.png"

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.cross_entropy(self(x), y)


class PathImageLabel(Shape):
    """`(path, image), label` batches"""

    @staticmethod
    def sample(image, label, index, classes):
        return (f"{index}.png", image), label

    def training_step(self, batch, batch_idx):
        (_, x), y = batch
        return F.cross_entropy(self(x), y)

    def predict_step(self, batch, batch_idx):
        return self(batch[0][1])


class MetricLearning(Shape):
    """Two views of an image and no labels in the loss (SimCLR)"""

    head_path, entry = "projection_head.2", "backbone"

    def __init__(self):
        super().__init__()
        self.model = None
        self.backbone = nn.Sequential(*list(nets.TorchvisionLikeResNet().children())[:-1])
        self.projection_head = nn.Sequential(nn.Linear(nets.WIDTH, nets.WIDTH), nn.ReLU(), nn.Linear(nets.WIDTH, 8))

    @staticmethod
    def sample(image, label, index, classes):
        return ([image, image.flip(2)], label) if classes == CLASSES else (image, label)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(1))

    def training_step(self, batch, batch_idx):
        (one, two), _ = batch
        similar = F.normalize(self(one), dim=1) @ F.normalize(self(two), dim=1).T
        return F.cross_entropy(similar / 0.5, torch.arange(len(one)))

    def predict_step(self, batch, batch_idx):
        return self(batch[0][0])

    def features(self, x):
        return self.projection_head[:2](self.backbone(x).flatten(1))


class Segmentation(Shape):
    """A segmentation network"""

    head_path = "model.segmentation_head"

    def __init__(self):
        super().__init__()
        self.model = nets.UNetLike()

    @staticmethod
    def sample(image, label, index, classes):
        return (image, (image[0] > 0).long()) if classes == CLASSES else (image, label)


class FrozenConvNeXt(Shape):
    """A ConvNeXt whose backbone is frozen"""

    head_path = "model.head.fc"

    def __init__(self):
        super().__init__()
        self.model = nets.convnext()
        for param in self.model.parameters():
            param.requires_grad = False
        for param in self.model.get_classifier().parameters():
            param.requires_grad = True


class ConvNeXt(Shape):
    """A ConvNeXt"""

    head_path = "model.head.fc"

    def __init__(self):
        super().__init__()
        self.model = nets.convnext()


class ReturnsFeatures(Shape):
    """`forward(self, x, return_features=False)`"""

    def forward(self, x, return_features=False):
        features = self.features(x)
        logits = self.model.fc(features)
        return (logits, features) if return_features else logits


class ForwardOfTuple(Shape):
    """A forward that returns a tuple"""

    def forward(self, x):
        logits = self.model(x)
        return logits, logits.softmax(1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])


class WithoutForward(Shape):
    """No `forward`, only a `training_step`"""

    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


class ApartWithoutForward(BackboneAndHead):
    """`self.backbone` and `self.head` apart, without a `forward`"""

    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def predict_step(self, batch, batch_idx):
        return self.head(self.backbone(batch[0]))


class UnusualNames(Shape):
    """A `ModuleDict` and a head with an unusual name"""

    head_path, entry = "net.to_classes", ""

    def __init__(self):
        super().__init__()
        self.model = None
        to_classes = nn.Linear(nets.WIDTH, CLASSES)
        self.net = nn.ModuleDict({"to_classes": to_classes, "to_features": nets.timm_resnet(num_classes=0)})

    def forward(self, x):
        return self.net["to_classes"](self.features(x))

    def features(self, x):
        return self.net["to_features"](x)


class BuiltInConfigureModel(Shape):
    """A network built in `configure_model`"""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.model = None

    def configure_model(self):
        if self.model is None:
            torch.manual_seed(0)
            self.model = nets.timm_resnet()


class BuiltInSetup(BuiltInConfigureModel):
    """A network built in `setup`"""

    configure_model = L.LightningModule.configure_model

    def setup(self, stage):
        BuiltInConfigureModel.configure_model(self)


class OldNamespace(Steps, pl.LightningModule):
    """A `pytorch_lightning` module"""


SHAPES = {cls.__name__: cls for cls in list(vars().values()) if isinstance(cls, type) and issubclass(cls, Steps)}
del SHAPES["Steps"], SHAPES["Shape"]

"""Projects with one problem each, planted into a clean one; what a file of LightningCLI names."""

import pathlib
import random

import lightning.pytorch as L
import numpy as np
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, default_collate

from tests.field import nets, shapes
from tests.field.shapes import CLASSES, Pictures
from tests.toys import with_statistics

NUM = 40  # training images, of five classes


class Listed(Dataset):
    """Pictures with labels as they are given, and other images in some places."""

    def __init__(self, labels, images=None, seed=1):
        self.pictures = Pictures(shapes.TimmClassifier, len(labels), CLASSES, seed)
        self.labels, self.images = labels, images or {}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images.get(index, self.pictures.images[index]), self.labels[index]


class Scaled(Listed):
    """With pixels from 0 to `largest`."""

    def __init__(self, largest, num=NUM, seed=1):
        super().__init__([index % CLASSES for index in range(num)], seed=seed)
        self.largest = largest

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image - image.min()) / (image.max() - image.min()) * self.largest, label


def all_scaled(largest):
    return Images(train=Scaled(largest), val=Scaled(largest, 12, 2), test=Scaled(largest, 12, 3))


class Named(Listed):
    """Lists the names of its classes, as torchvision's datasets do."""

    target_transform = None

    def __init__(self, names, num=12, seed=2, **numbers):
        super().__init__([index % min(CLASSES, len(names)) for index in range(num)], seed=seed)
        self.classes = [*names]
        if numbers:
            self.class_to_idx = numbers


class Mapped(Named):
    """Its code gives other labels than it lists, those of the training images."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, (label - 1) % CLASSES


def named(val):
    return Images(train=Named("abcde", NUM, seed=1), val=val)


class Unlisted(Listed):
    """Does not list its labels; one that is an exception is raised."""

    def __init__(self, labels, seed=2):
        super().__init__(labels, seed=seed)
        self.given, self.labels = labels, None

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        label = self.given[index]
        if isinstance(label, Exception):
            raise label
        return self.pictures.images[index], label


class Bright(Listed):
    """Normalised images without a dark pixel."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return 0.5 + image.sigmoid() * 1.9, label


def all_bright():
    train, *others = (Bright([n % CLASSES for n in range(num)], seed=num) for num in (NUM, 12, 13))
    return Images(train=train, val=others[0], test=others[1])


class Normalised(Listed):
    """With pixels from 0 to 1, as many dark ones as bright ones, normalised and changed after that."""

    def __init__(self, mean, std, num=NUM, seed=1, change=lambda image: image):
        super().__init__([index % CLASSES for index in range(num)], seed=seed)
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (mean, std))
        self.change = change

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return self.change((torch.special.ndtr(image) - self.mean) / self.std), label


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def all_normalised(mean, std, **options):
    sizes = {"train": (NUM, 1), "val": (12, 2), "test": (12, 3)}
    return Images(**{name: Normalised(mean, std, *size, **options) for name, size in sizes.items()})


def erased(image):
    """Replace a third of a picture by noise after Normalize, as timm and torchvision do."""
    num_rows = image.shape[1] // 3
    return torch.cat([torch.randn_like(image[:, :num_rows]), image[:, num_rows:]], 1)


def noisy(image):
    return image + 0.3 * torch.randn_like(image)


def normalised(image):
    return (image - 0.45) / 0.225


class Noisy(Listed):
    """Augmented at random, by every generator that augmentations use."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + (random.random() + np.random.rand()) * torch.randn_like(image), label


class NoisyButOne(Noisy):
    """The image that `first_image` returns is not augmented."""

    def __getitem__(self, index):
        return Listed.__getitem__(self, index) if index == 7 else super().__getitem__(index)


class _Images:
    """A DataModule's hooks; `train`, `val` and `test` in place of clean images."""

    def __init__(self, shape=shapes.TimmClassifier, train=None, val=None, test=None):
        super().__init__()
        self.train = train or Pictures(shape, NUM, CLASSES, seed=1)
        self.val = val or Pictures(shape, 12, CLASSES, seed=2)
        self.test = test or Pictures(shape, 12, CLASSES, seed=3)
        self.generator = torch.Generator().manual_seed(0)

    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True, generator=self.generator)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=8)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=8)


class Images(_Images, L.LightningDataModule):
    pass


class Sampled(Images):
    """The first images are not drawn."""

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, sampler=SubsetRandomSampler(range(5, NUM)))


class InOrder(Images):
    """Not shuffled."""

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8)


class MixesWhenCollated(Images):
    """timm's Mixup, which takes batches of an even number."""

    def train_dataloader(self):
        mixup = timm.data.Mixup(mixup_alpha=0.8, num_classes=CLASSES)
        return DataLoader(self.train, batch_size=6, shuffle=True, collate_fn=lambda rows: mixup(*default_collate(rows)))


class DropsTheLast(Images):
    def train_dataloader(self):
        return DataLoader(self.train, batch_size=13, shuffle=True, drop_last=True)


class Steep(shapes.TimmClassifier):
    """Learns ten thousand times too fast."""

    rate = 1000.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class FromStatistics(shapes.TimmClassifier):
    """With statistics as a training leaves them."""

    def __init__(self):
        super().__init__()
        with_statistics(self)


class SteepFromStatistics(FromStatistics, Steep):
    pass


class LeavesOne(Images):
    def train_dataloader(self):
        return DataLoader(self.train, batch_size=13, shuffle=True)


class OldImages(_Images, pl.LightningDataModule):
    pass


class ImagesWithPath(Images):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"folder": pathlib.Path("data")})


class Clean(shapes.TimmClassifier):
    pass


class Pretrained(Clean):
    """With weights as a training leaves them, and timm's configuration."""

    def __init__(self):
        super().__init__()
        self.model.pretrained_cfg = dict(zip(("mean", "std"), IMAGENET, strict=True))
        torch.nn.init.uniform_(self.model.bn1.weight, 0.9, 1.1)


class PretrainedOtherwise(Pretrained):
    """Its network expects pixels from -1 to 1."""

    def __init__(self):
        super().__init__()
        self.model.pretrained_cfg = dict(zip(("mean", "std"), HALVES, strict=True))


class KeepsItsHead(shapes.TimmClassifier):
    """A pretrained head of many classes."""

    def __init__(self):
        super().__init__()
        self.model = nets.timm_resnet(num_classes=20)


class OnlyTheHead(shapes.TransformerWithoutHead):
    """The backbone gets gradients, and is forgotten in the optimizer."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.classifier.parameters(), lr=0.1)


class Summed(shapes.ClassWeights):
    def __init__(self):
        super().__init__()
        self.loss_of = nn.CrossEntropyLoss(weight=torch.ones(CLASSES), reduction="sum", label_smoothing=0.1)


class TwiceSigmoid(shapes.MultiLabel):
    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]).sigmoid(), batch[1])


class OneSigmoid(shapes.OneLogit):
    def training_step(self, batch, batch_idx):
        return shapes.binary(self(batch[0]).sigmoid(), batch[1])


class ZeroAtFirst(shapes.MultiLabel):
    """Every logit is 0 in the first step."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.model.fc.weight)
        nn.init.zeros_(self.model.fc.bias)


class CountedFromOne(shapes.TimmClassifier):
    """Labels from 1 on disk, from 0 in the criterion."""

    @staticmethod
    def sample(image, label, index, classes):
        return image, label + 1

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1] - 1)


class NotLogged(shapes.TimmClassifier):
    def training_step(self, batch, batch_idx):
        return F.nll_loss(self(batch[0]).softmax(1), batch[1])


class CountsFromOne(shapes.TimmClassifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), (1 + torch.arange(len(batch[0]))).clamp(max=CLASSES))


class OneTooMany(shapes.TimmClassifier):
    def __init__(self):
        super().__init__()
        self.model = nets.timm_resnet(num_classes=CLASSES + 1)


class WrongShape(shapes.TimmClassifier):
    def forward(self, x):
        return self.model.fc(x.flatten(1))


class TwoOutputs(shapes.TimmClassifier):
    def forward(self, x):
        logits = self.model(x)
        return logits, logits


class Drops(shapes.TimmClassifier):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.model.fc(self.drop(self.features(x)))


class DropsNothing(Drops):
    def __init__(self):
        super().__init__()
        self.drop.eval()


class FrozenInEvalMode(shapes.TimmClassifier):
    """Frozen as it should be, with a head in it that is trained."""

    def __init__(self):
        super().__init__()
        self.model.requires_grad_(False).eval()
        self.model.fc.requires_grad_(True)


class FrozenAsAdvised(FrozenInEvalMode):
    """Put in eval mode as the finding says."""

    def __init__(self):
        super().__init__()
        self.model.train()

    def on_train_epoch_start(self):
        self.model.eval()


def never(graph, inputs):
    raise AssertionError("a look at one step compiles nothing")


class Compiled(shapes.TimmClassifier):
    def __init__(self):
        super().__init__()
        self.model = torch.compile(self.model, backend=never)


class TwoOptimizers(shapes.TimmClassifier):
    def configure_optimizers(self):
        return [super().configure_optimizers(), super().configure_optimizers()]


class ByHand(shapes.TimmClassifier):
    """Optimizes by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


class Accumulates(ByHand):
    """Steps by hand after four batches, and needs a validation after each epoch."""

    num_batches = 4

    def training_step(self, batch, batch_idx):
        self.manual_backward(shapes.TimmClassifier.training_step(self, batch, batch_idx))
        if (batch_idx + 1) % self.num_batches == 0:
            self.optimizers().step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step(self.trainer.callback_metrics["val_loss"])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


class AccumulatesAndForgets(Accumulates):
    """Its optimizer lacks the head."""

    def configure_optimizers(self):
        rest = [param for name, param in self.named_parameters() if ".fc." not in name]
        optimizer = torch.optim.SGD(rest, lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


class NeverSteps(Accumulates):
    num_batches = 1000


class ReadsItsLoader(shapes.TimmClassifier):
    """Counts the images of each class when training starts."""

    def on_train_start(self):
        loader = self.trainer.train_dataloader
        self.counts = torch.tensor(loader.dataset.labels).bincount() / loader.batch_size


class ReadsTwoLoaders(shapes.TimmClassifier):
    """Gets batches of two loaders together, as Lightning gives them."""

    def training_step(self, batch, batch_idx):
        each = batch.values() if isinstance(batch, dict) else batch
        return sum(shapes.TimmClassifier.training_step(self, one, batch_idx) for one in each)


def evaluated(*paths):
    """A clean module with parts in eval mode."""
    module = Clean()
    for path in paths:
        module.get_submodule(path).eval()
    return module


def frozen():
    module = Clean()
    module.model.requires_grad_(False)
    module.model.fc.requires_grad_(True)
    return module


def copied(place, image):
    """Held-out pictures, one of them a copy of a training image."""
    return Listed([0] * 12, {place: image}, seed=2)


def first_image():
    return Images().train.images[7]


def nearly(image):
    return 0.3 + 0.5 * image.flip(2)


def numbered(change):
    """Clean pictures whose class numbers are changed."""
    return Listed([change(index % CLASSES) for index in range(NUM)])


def rare():
    return Subset(
        Pictures(shapes.TimmClassifier, NUM, CLASSES, seed=1),
        [index for index in range(NUM) if index % 5 or index < 15],
    )


class WithoutOptimizer(shapes.TimmClassifier):
    """LightningCLI gives it one."""

    configure_optimizers = L.LightningModule.configure_optimizers


class Own(shapes.TimmClassifier):
    """Loads its images itself."""

    def train_dataloader(self):
        return Images().train_dataloader()


class Nothing(shapes.TimmClassifier):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class LeavesOut(shapes.TimmClassifier):
    """Images without a label are not trained on."""

    def training_step(self, batch, batch_idx):
        kept = batch[1] >= 0
        return F.cross_entropy(self(batch[0])[kept], batch[1][kept]) if kept.any() else 0 * self(batch[0]).sum()


class Ignores(shapes.TimmClassifier):
    """Its criterion leaves images of class 255 out."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)


class Toggles(ByHand):
    """Trains its parts in turn, as a GAN does."""

    def training_step(self, batch, batch_idx):
        head, rest = self.optimizers()
        loss = shapes.TimmClassifier.training_step(self, batch, batch_idx)
        for each in (head, rest):
            self.toggle_optimizer(each)
            each.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            each.step()
            self.untoggle_optimizer(each)

    def configure_optimizers(self):
        rest = [param for name, param in self.named_parameters() if ".fc." not in name]
        return [torch.optim.SGD(each, lr=0.1) for each in (self.model.fc.parameters(), rest)]


class Untested(Images):
    def setup(self, stage):
        if stage == "test":
            raise FileNotFoundError("test.csv")


class Loadless(L.LightningDataModule):
    pass


class Keeping(Images):
    """Writes down how often it was set up."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def setup(self, stage):
        self.stages.append(stage)


class Whole(Dataset):
    """Whole batches."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        pictures = Images().train
        return pictures.images[index * 8 : index * 8 + 8], pictures.labels[index * 8 : index * 8 + 8]


class Finetunes(L.callbacks.BaseFinetuning):
    """Freezes the backbone, and trains it later."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def alike():
    """Validation pictures that all look like one training image."""
    image = first_image()
    return Listed([0] * 12, {place: image + 0.01 * place for place in range(6)}, seed=2)


class HeadFirst(shapes.BackboneAndHead):
    """Trains its head, and later the backbone with its BatchNorm."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class HeadFirstByItself(HeadFirst):
    def configure_callbacks(self):
        return Finetunes()


class Few(Images):
    """Has no validation images, and a list of no test images."""

    def val_dataloader(self):
        return None

    def test_dataloader(self):
        return DataLoader([], batch_size=8)

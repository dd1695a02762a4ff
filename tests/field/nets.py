"""Tiny networks of the builds that users bring: a few thousand parameters, pictures of 16 or 32 pixels."""

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

SIZE = 16
WIDTH = 16


def timm_resnet(num_classes=5):
    return timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,
        (1, 1, 1, 1),
        channels=(4, 8, 8, WIDTH),
        stem_width=4,
        output_stride=8,  # so that the last stages still give pictures
        num_classes=num_classes,
    )


def vit(num_classes=5):
    network = timm.models.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=num_classes
    )
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    network.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "fixed_input_size": True, "mean": mean, "std": std}
    return network  # as timm.create_model describes it


def convnext(num_classes=5):
    return timm.models.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(4, 8, 8, WIDTH), patch_size=2, output_stride=8, num_classes=num_classes
    )


def mobilenet(num_classes=5):
    setting = torchvision.models.mobilenetv3.InvertedResidualConfig
    stages = [setting(8, 3, 8, 8, True, "RE", 2, 1, 1.0), setting(8, 3, 16, 8, False, "HS", 1, 1, 1.0)]
    return torchvision.models.MobileNetV3(stages, 12, num_classes=num_classes, dropout=0.0)


class Block(nn.Module):
    def __init__(self, width, given, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, given, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(given)
        self.conv2 = nn.Conv2d(given, given, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(given)
        self.downsample = nn.Sequential(nn.Conv2d(width, given, 1, stride, bias=False), nn.BatchNorm2d(given))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class TorchvisionLikeResNet(nn.Module):
    """Children in torchvision's order; no list of stages and no way to ask for the classifier."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 8, 2))
        self.layer3 = nn.Sequential(Block(8, 8, 1))
        self.layer4 = nn.Sequential(Block(8, WIDTH, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTH, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class SqueezeNetLike(nn.Module):
    """Its classifier is a 1x1 convolution over the last picture, pooled afterwards."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, WIDTH, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.0), nn.Conv2d(WIDTH, num_classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x):
        return self.classifier(self.features(x)).flatten(1)


class UNetLike(nn.Module):
    """Classes for each pixel."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, num_classes, 3, 1, 1))

    def forward(self, x):
        return self.segmentation_head(self.encoder(x))


class Other(nn.Module):
    """The second network of several; it was trained on other classes."""

    def __init__(self, num_classes=9):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.conv2 = nn.Conv2d(6, 7, 3)
            self.fc = nn.Linear(7, num_classes)

    def features(self, pixels):
        return F.relu(self.conv2(F.relu(self.bn1(self.conv1(pixels))))).mean((2, 3))

    def forward(self, pixels):
        return self.fc(self.features(pixels))

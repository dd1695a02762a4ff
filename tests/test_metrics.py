"""General discrimination against a slow double loop; exact whatever the batches, bounded in memory."""

import numpy as np
import pytest
import torch

import lightning_transfer as lt
from tests.reference.neighbors import leave_one_out_accuracy


def clustered(num=60, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (num,), generator=generator)
    centres = torch.randn(classes, 6, generator=generator)
    return centres[labels] + torch.randn(num, 6, generator=generator), labels


def measure(features, labels, *, k=3, batches=1, **options):
    metric = lt.metrics.GeneralDiscrimination(k=k, **options)
    for part in zip(features.chunk(batches), labels.chunk(batches), strict=True):
        metric.update(*part)
    return metric.compute().item()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_double_loop(k, seed):
    features, labels = clustered(seed=seed)
    expected = leave_one_out_accuracy(features.double().numpy(), labels.numpy(), k)
    assert measure(features, labels, k=k) == pytest.approx(expected)
    assert 0.2 < expected < 1


def test_batches_and_order_change_nothing():
    features, labels = clustered()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    assert measure(features, labels) == measure(features[order], labels[order], batches=7)


def test_order_changes_nothing_where_many_neighbors_are_equally_near():
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(1, 3, (60, 2), generator=generator).float()
    labels = torch.randint(0, 3, (60,), generator=generator)
    orders = [torch.randperm(60, generator=generator) for _ in range(5)]
    assert len({measure(features[order], labels[order]) for order in orders}) == 1


def test_padding_of_a_distributed_sampler_counts_once():
    features, labels = clustered()
    indices = torch.arange(len(labels)) + 2**25  # beyond what float32 can tell apart
    again = torch.cat([torch.arange(len(labels)), torch.arange(9)])
    metric = lt.metrics.GeneralDiscrimination(k=3)
    metric.update(features[again], labels[again], indices[again])
    assert metric.compute().item() == measure(features, labels) != measure(features[again], labels[again])


def test_features_that_have_collapsed_tell_nothing_apart():
    labels = torch.arange(4).repeat_interleave(10)
    assert measure(torch.ones(40, 3), labels, k=1) <= 0.5


def test_of_more_images_than_are_compared_at_once_every_one_counts():
    """Pairs on a circle: the nearest of an image is the other of its pair, which is of its class in every third."""
    angles = torch.arange(2100).repeat_interleave(2).double() + torch.tensor([0.0, 0.1]).repeat(2100).double()
    angles *= 2 * torch.pi / 2100
    labels = torch.arange(4200)
    labels[1::6] = labels[::6]
    features = torch.stack([angles.cos(), angles.sin()], 1)
    assert measure(features, labels, k=1) == pytest.approx(1 / 3)


def test_types_and_reset():
    features, labels = clustered()
    metric = lt.metrics.GeneralDiscrimination(k=3)
    metric.update(features.bfloat16(), labels.int())
    metric.compute()
    metric.reset()
    metric.update(features, labels)
    assert metric.compute().item() == measure(features, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool])
def test_labels_of_few_bits_leave_no_image_out(dtype):
    features, labels = clustered(num=600, classes=2)
    assert measure(features, labels.to(dtype)) == measure(features, labels)
    metric = lt.metrics.GeneralDiscrimination(k=3)
    metric.update(features, labels.to(dtype), torch.arange(600))
    assert metric.compute().item() == measure(features, labels)


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (torch.rand(4, 2, 1), torch.arange(4), {}, r"Found features \(4, 2, 1\)"),
        (torch.rand(4, 2), torch.rand(4), {}, "torch.float32 labels"),
        (torch.rand(4, 2), torch.arange(3), {}, r"labels \(3,\)"),
        (torch.full((4, 2), torch.nan), torch.arange(4), {}, "NaN"),
        (torch.rand(4, 2), torch.arange(4), {"limit": 3}, "4 images are more than limit=3.*limit=4"),
        (torch.rand(3, 2), torch.arange(3), {}, "k=3 needs more than 3 different images; found 3"),
        (torch.rand(4, 2), torch.arange(4), {"k": 0}, "k=0"),
    ],
)
def test_bad_input_is_named(features, labels, options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        measure(features, labels, **options)


@pytest.mark.parametrize("indices", [torch.arange(3), torch.arange(4)[:, None]])
def test_indices_of_other_images_are_refused_at_once(indices):
    metric = lt.metrics.GeneralDiscrimination(k=1)
    with pytest.raises(lt.TransferConfigError, match=r"expected \(4,\), one for each image"):
        metric.update(torch.rand(4, 2), torch.arange(4), indices)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_given():
    with pytest.raises(lt.TransferConfigError, match="No features were given"):
        lt.metrics.GeneralDiscrimination().compute()


def test_reference_is_right_on_a_case_counted_by_hand():
    features = np.array([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.1, 0.99], [0.9, 0.4]])
    assert leave_one_out_accuracy(features, np.array([0, 0, 1, 1, 1]), 1) == 4 / 5

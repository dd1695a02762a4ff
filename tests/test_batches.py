"""One rule of labels: of what kind they are, how they are learned, and who is right by them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lightning_transfer as lt
from lightning_transfer.batches import class_numbers, criterion_of, is_right, kind_of
from lightning_transfer.functional import collaborative_loss

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.tensor([0, 4, 2, 2, 1, 3])
ONE_HOT = F.one_hot(NUMBERS, 5)
SEVERAL = torch.tensor(
    [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 1]]
)
SIGNS = torch.tensor([0, 1, 1, 0, 1, 0])


def right_by_hand(logits, labels, kind):
    found = []
    for row, label in zip(logits.numpy(), labels.numpy(), strict=True):
        if kind == "one logit":
            found.append(float((row[0] > 0) == (label.reshape(-1)[0] > 0.5)))
        elif kind == "multi-hot":
            found.append(np.mean([(z > 0) == (y > 0.5) for z, y in zip(row, label, strict=True)]))
        else:
            truth = int(np.argmax(label)) if label.size > 1 else int(label.reshape(-1)[0])
            found.append(float(np.argmax(row) == truth))
    return np.array(found, np.float32)


def loss_by_hand(logits, labels, kind):
    logits, labels = logits.double().numpy(), labels.double().numpy()
    if kind in ("one logit", "multi-hot"):
        p = 1 / (1 + np.exp(-logits))
        y = labels.reshape(logits.shape)
        return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = (
        labels if labels.ndim == 2 and labels.shape[1] > 1 else np.eye(logits.shape[1])[labels.reshape(-1).astype(int)]
    )
    return float(-np.mean((rows * logs).sum(1)))


WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FORMS = [
    *((LOGITS, NUMBERS.to(dtype), "class numbers") for dtype in WHOLE),
    (LOGITS, NUMBERS[:, None].int(), "class numbers"),
    (LOGITS[:, :2], SIGNS.bool(), "class numbers"),
    *((LOGITS[:, :1], SIGNS.to(dtype), "one logit") for dtype in (torch.bool, torch.int16, torch.float32)),
    (LOGITS[:, :1], SIGNS[:, None].double(), "one logit"),
    *((LOGITS, SEVERAL.to(dtype), "multi-hot") for dtype in (torch.bool, torch.int64, torch.float32)),
    (LOGITS, ONE_HOT.float(), "soft"),
    (LOGITS, 0.7 * ONE_HOT + 0.3 * ONE_HOT.flip(0), "soft"),
]


@pytest.mark.parametrize(("logits", "labels", "kind"), FORMS)
def test_labels_of_each_kind_are_scored_and_learned_as_by_hand(logits, labels, kind):
    assert kind_of(labels, logits.shape[1]) == kind
    expected = right_by_hand(logits, labels, kind)
    np.testing.assert_array_equal(is_right(logits, labels), expected)
    np.testing.assert_array_equal(is_right(torch.stack([logits, -logits]), labels)[0], expected)
    found = criterion_of(kind)(logits, labels)
    assert float(found) == pytest.approx(loss_by_hand(logits, labels, kind), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        (torch.rand(6) * 9, 1),
        (torch.rand(6), 5),
        (torch.eye(6), 5),
        (NUMBERS, 1),
        (SEVERAL * 2, 5),
        (torch.zeros(6, 2, 2), 2),
    ],
)
def test_labels_that_do_not_fit_are_of_no_kind(labels, outputs):
    assert kind_of(labels, outputs) is None
    with pytest.raises(lt.TransferConfigError, match="Labels have shape"):
        is_right(torch.zeros(6, outputs), labels)


def test_the_shared_loss_takes_a_list():
    both = [LOGITS, -LOGITS]
    stacked = collaborative_loss(torch.stack(both), NUMBERS)
    assert torch.equal(collaborative_loss(both, NUMBERS), stacked)
    assert torch.equal(collaborative_loss(tuple(both), NUMBERS), stacked)


@pytest.mark.parametrize("dtype", [*WHOLE, torch.bool])
def test_whole_numbers_of_any_type_are_what_a_criterion_takes(dtype):
    for form in (SIGNS, SIGNS[:, None]):
        found = class_numbers(form.to(dtype))
        assert found.tolist() == SIGNS.tolist()
        assert F.cross_entropy(LOGITS[:, :2], found).isfinite()

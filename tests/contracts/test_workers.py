"""Source images have as many workers as the target's; who reads them changes no number, and no process is left."""

import multiprocessing
from pickle import PicklingError
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import lightning_transfer as lt
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.loaders import part_of, source_workers
from lightning_transfer.glue.moving import to_device
from lightning_transfer.methods.selective import pictures
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.source.drawing import Drawing
from lightning_transfer.source.stream import SourceStream
from tests import toys
from tests.methods import toy_bank
from tests.toys import LitToy, assert_same, fit, weights

ALWAYS = lt.Schedule(1.0, 1.0)


class Read(Dataset):
    """Augmented source images; the third column is how many workers the loader has that reads them."""

    def __init__(self):
        self.data = toys.Augmented(toys.source_data())

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        worker = get_worker_info()
        return *self.data[index], worker.num_workers if worker else 0


def soft(num_workers=None, seen=None):
    def adapt(batch):
        (seen if seen is not None else []).extend(batch[2].tolist())
        return batch[:2]

    source = lt.SourceTask(Read(), num_classes=toys.SOURCE_CLASSES, num_workers=num_workers, adapt=adapt)
    return lt.SoftFinetuning(source, weight=ALWAYS)


def target(num_workers):
    return DataLoader(toys.target_data(), batch_size=4, num_workers=num_workers)


@pytest.fixture(scope="module")
def alone():
    module = LitToy()
    fit(module, [soft(0)])
    return weights(module)


@pytest.mark.parametrize(("of_target", "given", "found"), [(0, None, 0), (2, None, 2), (2, 0, 0), (0, 1, 1), (1, 2, 2)])
def test_source_images_have_the_workers_of_the_train_loader_unless_a_number_is_given(
    of_target, given, found, alone, caplog
):
    module, seen = LitToy(), []
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(module, [soft(given, seen)], loader=target(of_target))
    assert seen == [found] * 48
    said = [line for line in caplog.messages if "Source images have" in line]
    assert said == ["Source images have 2 workers, as many as the train loader."] * (given is None and of_target == 2)
    assert_same(weights(module), alone)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [(1, 0), (0, 1)])
def test_resumed_with_other_workers_it_is_the_uninterrupted_run(workers, alone, tmp_path):
    def augmented():
        return lt.SoftFinetuning(lt.SourceTask(toys.Augmented(toys.source_data()), num_classes=7), weight=ALWAYS)

    first, second = workers
    fit(LitToy(), [augmented()], loader=target(first), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    module = LitToy()
    fit(module, [augmented()], loader=target(second), ckpt_path=tmp_path / "half.ckpt")
    assert_same(weights(module), alone)


class ByHand(lt.SourceTaskMixin, LitToy):
    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.add_source_task(soft().source, weight=ALWAYS)

    def training_step(self, batch, batch_idx):
        loss = self.joint_loss(super().training_step(batch, batch_idx))
        if self.fails and self.trainer.global_step == 3:
            raise RuntimeError("crash")
        return loss


def test_a_mixin_leaves_no_process_after_a_fit_or_a_crash(alone):
    module = ByHand()
    fit(module, loader=target(2))
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="crash") as caught:
        fit(ByHand(fails=True), loader=target(2))
    assert caught.value.__traceback__ is not None  # whose frames hold the module
    assert multiprocessing.active_children() == []


def test_how_processes_are_started_is_the_train_loaders_too():
    def found(loader, given=None):
        return source_workers(given, SimpleNamespace(train_dataloader=loader))

    spawned = DataLoader(toys.target_data(), num_workers=2, multiprocessing_context="spawn")
    assert found(spawned)["multiprocessing_context"].get_start_method() == "spawn"
    assert found(spawned, 1) == {"num_workers": 1}
    assert found(SimpleNamespace(num_workers=8)) == {"num_workers": 0}  # as FFCV's, which counts threads
    assert part_of(spawned, [0, 1]).multiprocessing_context is spawned.multiprocessing_context


def test_a_selection_is_read_by_processes_of_that_kind(monkeypatch):
    context, asked = multiprocessing.get_context("fork"), []
    source = lt.SourceTask(toys.source_data(), num_classes=7)
    neighbors = lt.Neighbors(k=2, bank=toy_bank(), rounds=0)
    read = pictures.in_order
    monkeypatch.setattr(pictures, "in_order", lambda *of, **how: asked.append(how["workers"]) or read(*of, **how))
    loader = DataLoader(toys.target_data(), batch_size=4, num_workers=1, multiprocessing_context=context)
    fit(LitToy(), [lt.SelectiveJointFinetuning(source, neighbors=neighbors, weight=ALWAYS)], loader=loader)
    assert asked
    assert all(workers["multiprocessing_context"] is context for workers in asked)


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_pictures_that_no_worker_can_be_given_are_named_with_what_to_write():
    some = Pictures(
        toys.source_data(), "source", adapt=lambda batch: batch, num_workers=1, multiprocessing_context="spawn"
    )
    with pytest.raises((AttributeError, TypeError, PicklingError), match="lambda") as caught:
        next(some.batches([0]))
    assert "source dataset and adapt=" in caught.value.__notes__[-1]


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_source_that_no_worker_can_be_given_is_said_to_be_readable_without():
    class Local(Read):
        pass

    workers = {"num_workers": 1, "multiprocessing_context": "spawn"}
    stream = SourceStream(lt.SourceTask(Local(), num_classes=7), batch_size=4, workers=workers)
    with pytest.raises((AttributeError, TypeError), match="Local") as caught:
        stream.next_batch()
    assert caught.value.__notes__ == [
        "To read source images in this process, without workers: SourceTask(num_workers=0)."
    ]


@pytest.mark.parametrize(("device", "is_pinned"), [("cuda", True), ("cpu", False), ("mps", False)])
def test_batches_for_a_gpu_are_pinned_and_copied_while_it_computes(device, is_pinned, monkeypatch):
    """With a stand-in for the Trainer of a GPU; tests/gpu has the real one."""
    for check in ("check_kind", "check_held"):
        monkeypatch.setattr(optimizers, check, lambda *args: None)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)),
        train_dataloader=target(0),
        optimizers=[],
        global_rank=0,
        world_size=1,
        lightning_module=None,
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
    )
    stream = Drawing(lt.SourceTask(toys.source_data(), num_classes=7), 7)._open(trainer, nn.Identity())
    assert stream.options["pin_memory"] is is_pinned
    moves = []
    monkeypatch.setattr(Tensor, "to", lambda *args, **options: moves.append((*args[1:], options)))
    to_device(trainer, [torch.ones(2), torch.ones(2)], hooks=False)
    assert moves == [(torch.device(device), {"non_blocking": is_pinned})] * 2

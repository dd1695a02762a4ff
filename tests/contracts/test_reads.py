"""No value is read back from the device in a step that neither begins a run nor logs; a refusal may come later there.

Tensors of a test are on the CPU. What the Trainer has moved, the parameters, and all that is computed from these count
as on the device; what a loader collated does not.
"""

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader

import lightning_transfer as lt
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.pending import MOST, PendingChecks
from tests import toys
from tests.methods import METHODS, each, one
from tests.toys import LitToy, SaveEveryStep, assert_same, fit, weights

WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
COPYING = {"tolist", "numpy", "cpu", "__array__"}
EVERY = 4  # steps between those that log
NUM_BATCHES = 6


class OnDevice(TorchDispatchMode):
    """Follows what is on the device, and counts the operations that wait for its values."""

    def __init__(self):
        super().__init__()
        self.storages, self.num_reads = {}, 0

    def add(self, values):
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.storages[storage._cdata] = storage  # kept, so that no other one gets its number

    def holds(self, values):
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return any(tensor.untyped_storage()._cdata in self.storages for tensor in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if self.holds((args, kwargs)):
            name = function.overloadpacket.__name__
            is_masked = name in ("index", "index_put_") and any(
                isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
            )
            self.num_reads += name in WAITING or is_masked
            self.add(result)
        return result


class Copies(TorchFunctionMode):
    """Counts the calls by which values leave a tensor without an operation."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if getattr(function, "__name__", "") in COPYING and self.device.holds(args[0]):
            self.device.num_reads += 1
            if isinstance(result, Tensor):
                result = result.clone()
                self.device.storages.pop(result.untyped_storage()._cdata)
        return result


class Reads(L.Callback):
    """What is read back in each step of a run, of which every answer is kept on the device."""

    def __init__(self):
        self.steps, self.device = [], OnDevice()
        self.copies = Copies(self.device)

    def on_train_start(self, trainer, module):
        keep_pending(module)
        self.device.add([*module.parameters(), *module.buffers()])
        move = trainer.strategy.batch_to_device

        def moved(*args, **kwargs):
            batch = tree_map_only(Tensor, Tensor.clone, move(*args, **kwargs))
            self.device.add(batch)
            return batch

        trainer.strategy.batch_to_device = moved
        self.device.__enter__()
        self.copies.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(self.device.num_reads)
        self.device.num_reads = 0

    def on_train_end(self, *_):
        self.leave()

    on_exception = on_train_end

    def leave(self):
        if self.device.storages:
            self.copies.__exit__(None, None, None)
            self.device.__exit__(None, None, None)
            self.device.storages = {}


def keep_pending(module):
    for part in module.modules():
        if isinstance(part, TransferPart):
            part.pending.free = ()


def quiet(self, batch, batch_idx):
    return F.cross_entropy(self(batch[0]), batch[1])


def silent(counts):
    """The steps that neither begin a run nor log: by number, what they read."""
    logging = {step for step in range(len(counts)) if (step + 1) % EVERY == 0 or (step + 1) % NUM_BATCHES == 0}
    return {step: count for step, count in enumerate(counts) if step and step not in logging}


def two(*names):
    return lambda: [one(name=name).callback() for name in names]


class Mapped(LitToy):
    """With a hook that may change labels, so that they are checked on the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0], batch[1] + 0


def as_given(batch):
    return batch[0], batch[1]


def soft(**options):
    return one(has_source=True).callback(**options)


RUNS = {str(row): (LitToy, lambda row=row: [row.callback()]) for row in METHODS}
RUNS |= {f"{row} mixin": (row.mixin, list) for row in METHODS if row.mixin is not None}
RUNS |= {
    "nothing": (LitToy, list),
    "ProbeStart": (LitToy, lambda: [lt.ProbeStart()]),
    "FrozenStatistics": (LitToy, lambda: [lt.FrozenStatistics()]),
    "labels that a hook may change": (Mapped, lambda: [soft()]),
    "labels that adapt= gives": (LitToy, lambda: [soft(adapt=as_given)]),
    "no batch hooks": (Mapped, lambda: [soft(batch_hooks=False)]),
    "two together": (LitToy, two("soft-separate-add", "gated")),
    "three together": (LitToy, two("soft-joint-convex", "adafilter", "gated")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_does_not_log_reads_nothing(name, monkeypatch):
    monkeypatch.setattr(toys.ToySteps, "training_step", quiet)
    make, callbacks = RUNS[name]
    reads = Reads()
    fit(make(), [*callbacks(), reads], log_every_n_steps=EVERY)
    counts = silent(reads.steps)
    assert len(counts) == 7
    if name.startswith("selective"):
        counts.pop(2)  # a round asks the network
    assert not any(counts.values()), reads.steps
    assert any(reads.steps) == (name != "nothing"), "the counter counts nothing"


@pytest.mark.parametrize(
    "read",
    [
        bool,
        int,
        float,
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        torch.nonzero,
        lambda value: torch.ones(1)[value[None] > 0],
        lambda value: torch.equal(value, value),
        lambda value: (value + 1).sum().item(),
    ],
)
def test_every_way_to_read_is_counted_on_the_device_alone(read):
    device = OnDevice()
    value, host = torch.tensor(2.0), torch.tensor(2.0)
    device.add(value)
    with device, Copies(device):
        value + 1
        read(host)
        assert device.num_reads == 0
        read(value)
        assert device.num_reads == 1


class Waits(L.Callback):
    """Has every check wait, as on a GPU."""

    def on_train_start(self, trainer, module):
        keep_pending(module)


class StopAt(L.Callback):
    """Ends training in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


def stopped(module, callbacks, error=FloatingPointError, **options):
    """Fit until the error; return what it says, without the end, and in which step the run was."""
    with pytest.raises(error) as caught:
        fit(module, callbacks, **options)
    return str(caught.value).partition(". ")[0], len(module.losses) - 1


def with_nan(data):
    data.tensors[0][13] = torch.nan
    return data


SELDOM = {"log_every_n_steps": 100}  # the last step of an epoch reads; in that of the first the weight is 0 already


@each(adds_loss=True)
def test_a_loss_that_is_not_finite_is_found_later_and_its_batch_named(method, tmp_path):
    """The first such batch, though all that come after it are not finite either; and in no checkpoint."""

    def run(*more):
        if method.has_source:
            return [method.callback(with_nan(toys.source_data())), *more], {}
        return [method.callback(), *more], {"loader": DataLoader(with_nan(toys.target_data()), batch_size=4)}

    callbacks, options = run()
    said, step = stopped(LitToy(), callbacks, **options)
    assert f"in step {step}" in said
    assert 0 < step < NUM_BATCHES - 1
    for more, last in (([], NUM_BATCHES - 1), ([SaveEveryStep(tmp_path)], step)):
        callbacks, options = run(Waits(), *more)
        found = stopped(LitToy(), callbacks, **options, **SELDOM)
        assert found == (said, min(last, 1) if method.name.startswith("selective") else last)  # a round reads too
    assert len([*tmp_path.iterdir()]) == step
    callbacks, options = run(Waits())
    assert stopped(LitToy(), [*callbacks, StopAt(step + 1)], **options, **SELDOM) == (said, step)


@pytest.mark.parametrize("is_gated_first", [True, False])
def test_of_two_methods_the_first_failure_is_said(is_gated_first):
    def run(*more, **options):
        parts = [
            lt.GatedTransfer(ratio=2, aux_weight=0.3, tap="model.conv"),
            one(has_source=True).callback(with_nan(toys.source_data())),
        ]
        return stopped(LitToy(), [*(parts if is_gated_first else parts[::-1]), *more], **options)[0]

    assert "source samples [13]" in (said := run())
    assert "in step 2" in said
    assert run(Waits(), **SELDOM) == said


class Refuses(LitToy):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if loss.isnan():
            raise ValueError("outputs are not finite")
        return loss


def test_an_exception_of_the_user_says_what_waits():
    module, gate = Refuses(), lt.GatedTransfer(ratio=2, aux_weight=0.3, tap="model.conv")
    with pytest.raises(ValueError, match="outputs are not finite") as caught:
        fit(module, [gate, one(has_source=True).callback(with_nan(toys.source_data())), Waits()], **SELDOM)
    (note,) = caught.value.__notes__
    assert "source samples [13]" in note
    assert "in step 2" in note
    assert "training_step" not in vars(module)


def test_a_device_that_failed_gives_no_note(monkeypatch):
    checks, error = PendingChecks(free=()), ValueError()
    monkeypatch.setattr(checks, "find", lambda: torch.ones(2).reshape(3))
    checks.note(error)
    assert not hasattr(error, "__notes__")


@each(adds_loss=True, has_mixin=True)
def test_a_mixin_finds_it_before_a_checkpoint_and_when_training_ends(method, tmp_path):
    def said(*callbacks, **options):
        data = with_nan(toys.source_data()) if method.has_source else None
        target = toys.target_data() if method.has_source else with_nan(toys.target_data())
        module = method.mixin(data)
        with pytest.raises(FloatingPointError) as caught:
            fit(module, callbacks, loader=DataLoader(target, batch_size=4), **options)
        return str(caught.value).partition(". ")[0]

    found = said()
    step = int(found.partition("in step ")[2].partition(":")[0])
    assert 0 < step < NUM_BATCHES - 1
    assert said(Waits(), SaveEveryStep(tmp_path), **SELDOM) == found
    assert len([*tmp_path.iterdir()]) == step
    assert said(Waits(), StopAt(step + 1), **SELDOM) == found


@pytest.mark.parametrize("label", [7, -1])
@pytest.mark.parametrize("module", [LitToy, Mapped])
def test_a_label_that_the_head_does_not_know_is_found_in_its_step_or_later(module, label):
    """Where no hook may change labels, they are checked as they were collated, in their step."""

    class Unlisted(toys.Recorder):
        def __getitem__(self, index):
            image, given = super().__getitem__(index)
            return image, label if index == 13 else int(given)

    def run(*callbacks, **options):
        soft = one(has_source=True).always(1.0, Unlisted(toys.source_data()))
        return stopped(module(), [soft, *callbacks], lt.TransferConfigError, **options)

    said, step = run()
    assert f"Source sample 13 has label {label}; the source head knows 0 to 6" in said
    assert 0 < step < NUM_BATCHES - 1
    assert run(Waits(), **SELDOM) == (said, step if module is LitToy else NUM_BATCHES - 1)


def test_the_first_batch_is_checked_at_once():
    def infinite(logits, labels):
        return F.cross_entropy(logits, labels) / 0

    said, step = stopped(LitToy(), [one(has_source=True).callback(loss=infinite), Waits()], **SELDOM)
    assert "source loss is inf in step 0" in said
    assert step == 0


@each(has_source=True)
def test_what_waits_changes_no_weight_and_holds_no_image(method):
    """The run is the one in which every check is made at once, to the bit."""

    class Sizes(L.Callback):
        largest = 0

        def on_train_batch_end(self, trainer, module, *args):
            kept = [
                pair[1].args for part in module.modules() if hasattr(part, "pending") for pair in part.pending._waiting
            ]
            sizes = [leaf.numel() for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]
            self.largest = max([self.largest, *sizes])

    runs, sizes = [LitToy(), LitToy()], Sizes()
    fit(runs[0], [method.callback()])
    fit(runs[1], [method.callback(), Waits(), sizes], **SELDOM)
    assert_same(weights(runs[1]), weights(runs[0]))
    assert 0 < sizes.largest <= 4  # images a batch


def test_checks_that_wait_are_read_when_they_are_many():
    checks = PendingChecks(free=())

    def check(step):
        checks.refuse(torch.tensor(step in (3, 5)), ValueError, lambda: f"in step {step}")

    for step in range(MOST - 1):
        check(step)
    with pytest.raises(ValueError, match="in step 3"):
        check(MOST)
    checks.read()  # said once


def test_a_failure_in_another_process_keeps_this_one_from_a_checkpoint():
    module = LitToy()
    callback = one(has_source=True).callback()

    class Fails(L.Callback):
        def on_train_start(self, trainer, module):
            keep_pending(module)
            trainer.strategy.reduce_boolean_decision = lambda decision, **_: False

        def on_train_batch_end(self, trainer, module, *args):
            trainer.save_checkpoint("never.ckpt")

    with pytest.raises(FloatingPointError, match="A check failed in another process"):
        fit(module, [callback, Fails()])
    assert len(module.losses) == 1

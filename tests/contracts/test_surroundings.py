"""The same callback in both namespaces of Lightning, beside others, and with little around."""

import functools
import pathlib
import subprocess
import sys
import tomllib
from itertools import product

import lightning.pytorch as L
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from packaging.requirements import Requirement

import lightning_transfer as lt
from tests import toys
from tests.methods import METHODS, each
from tests.toys import LitToy, PlToy, assert_same, fit, weights

each_method = each()


class Enabling(LitToy):
    """Its forward enables gradients, whatever runs it."""

    def forward(self, images):
        with torch.set_grad_enabled(True):
            return super().forward(images)


@each_method
def test_a_forward_that_enables_gradients_trains_and_validates_the_same(method):
    """Validation is in inference mode, where a graph cannot be made."""
    plain, enabling = LitToy(), Enabling()
    for module in (plain, enabling):
        runner = fit(module, [method.callback()])
        runner.validate(module, toys.target_loader(), verbose=False)
    assert_same(weights(enabling), weights(plain))


@each_method
def test_runs_the_same_in_pytorch_lightning(method):
    old, new = PlToy(), LitToy()
    fit(old, [method.callback()], namespace=pl)
    fit(new, [method.callback()])
    assert_same(weights(old), weights(new))


@pytest.mark.parametrize(("first", "second"), list(product(METHODS, METHODS)), ids=str)
def test_every_pair_composes_or_is_refused_by_name(first, second):
    callbacks = [first.callback(), second.callback()]
    if type(callbacks[0]) is type(callbacks[1]):
        name = type(callbacks[0]).__name__
        with pytest.raises(RuntimeError, match=f"more than one stateful callback of type `{name}`"):
            fit(LitToy(), callbacks)
    elif not all(getattr(callback.structure, "composes", True) for callback in callbacks):
        with pytest.raises(lt.TransferConfigError, match=r"trains several .* Use one of"):
            fit(LitToy(), callbacks)
    elif first.has_source and second.has_source:
        with pytest.raises(lt.TransferConfigError, match="already has a source task"):
            fit(LitToy(), callbacks)
    elif {first.name, second.name} == {"selective-joint", "knowledge_loss"}:
        with pytest.raises(lt.TransferConfigError, match="a source task appends others"):
            fit(LitToy(), callbacks)
    else:
        fit(LitToy(), callbacks)


@each_method
@pytest.mark.parametrize(
    "beside",
    [
        lambda folder: [EarlyStopping("val_loss", patience=99), ModelCheckpoint(folder, monitor="val_loss")],
        lambda folder: [LearningRateFinder(num_training_steps=4, update_attr=False)],
    ],
    ids=["early-stopping-and-checkpoints", "learning-rate-finder"],
)
@pytest.mark.parametrize("order", [1, -1], ids=["behind-us", "in-front"])
def test_beside_lightnings_own_the_numbers_are_as_without_them(method, beside, order, tmp_path):
    """Also where the optimizer was given chosen parameters, and a tuner runs trials of its own.

    Held as firmly as Lightning holds it for a plain run: its oldest tuner leaves other numbers behind there, too.
    """

    callbacks = [method.callback()]
    with_us = alone(method) == outcome(callbacks, [*callbacks, *beside(tmp_path / "ours")][::order])
    assert with_us == (alone(None) == outcome([], beside(tmp_path / "plain")[::order]))


def outcome(ours, callbacks):
    """Losses, weights, and how far the source was drawn."""
    module = Chosen()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    toys.trainer(callbacks, enable_checkpointing=saves, max_epochs=2).fit(module, datamodule=Sized(module))
    position = ours[0].part.get_extra_state().get("position") if ours else None
    return module.losses[-6:], [value.tolist() for value in weights(module).values()], position


@functools.cache
def alone(method):
    """Without others; None is no method."""
    ours = [] if method is None else [method.callback()]
    return outcome(ours, ours)


@pytest.mark.filterwarnings("ignore:.*batch")
def test_the_source_follows_the_batch_size_that_was_found():
    source, constant = lt.SourceTask(toys.source_data(), num_classes=7), lt.Schedule(1.0, 1.0)
    callback, module = lt.SoftFinetuning(source, weight=constant), Chosen()
    finder = BatchSizeFinder(steps_per_trial=2, max_trials=1, init_val=6)
    toys.trainer([callback, finder], max_epochs=2).fit(module, datamodule=Sized(module))
    drawn = callback.part.get_extra_state()["position"]
    assert module.batch_size not in (1, 4)
    assert drawn == 2 * len(toys.target_data())


class Chosen(LitToy):
    """An optimizer of chosen parameters, and a batch size that can be tuned."""

    batch_size = 4

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)


class Sized(L.LightningDataModule):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def train_dataloader(self):
        return toys.target_loader(self.module.batch_size)

    def val_dataloader(self):
        return toys.target_loader()


@each_method
@pytest.mark.parametrize(
    "options",
    [{"fast_dev_run": True}, {"overfit_batches": 2}, {"limit_train_batches": 3}, {"max_steps": 7, "max_epochs": -1}],
    ids=str,
)
def test_debugging_options_of_the_trainer(method, options):
    callback = method.always(lt.Schedule())
    fit(LitToy(), [callback], **options)
    assert callback.part.get_extra_state().get("position", 1) > 0


def test_importing_the_package_loads_no_heavy_dependency():
    code = "import sys, lightning_transfer; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "lightning", "faiss", "timm", "matplotlib", "torchvision"]
    assert subprocess.check_output([sys.executable, "-c", code, *heavy], text=True).strip() == "[]"


def test_malicious_uploads_of_lightning_are_never_installed():
    project = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    found = [Requirement(line).specifier for line in lines if line.startswith(("lightning>", "pytorch_lightning>"))]
    assert len(found) == 2
    for specifier in found:
        assert [specifier.contains(version) for version in ("2.6.1", "2.6.2", "2.6.3", "2.6.6")] == [1, 0, 0, 1]


def test_functional_loads_neither_lightning_nor_heavy_dependencies():
    code = "import sys, lightning_transfer.functional; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["lightning", "pytorch_lightning", "faiss", "timm", "matplotlib"]
    assert subprocess.check_output([sys.executable, "-c", code, *heavy], text=True).strip() == "[]"


def blocked(*modules):
    """Python code that makes modules look not installed."""
    return (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {modules}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )


def test_pytorch_lightning_alone_is_enough():
    code = blocked("lightning") + (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import pytorch_lightning as pl, lightning_transfer as lt\n"
        "print([cls.__module__.split('.')[0] for cls in lt.SoftFinetuning.__mro__ if cls.__name__ == 'Callback'])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "['pytorch_lightning']"


def test_a_users_logging_stays_as_it_was_set():
    """The second namespace, imported on the way, takes over where and how much Lightning logs."""
    code = (
        "import logging, warnings; warnings.simplefilter('ignore')\n"
        "logging.getLogger('pytorch_lightning').setLevel(logging.ERROR)\n"
        "import lightning.pytorch\n"
        "from lightning_utilities.core import rank_zero\n"
        "before = rank_zero.log\n"
        "import lightning_transfer as lt; lt.SoftFinetuning\n"
        "assert 'pytorch_lightning' in __import__('sys').modules\n"
        "print(rank_zero.log is before, logging.getLogger('pytorch_lightning').level == logging.ERROR)\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True True"


def test_a_missing_extra_is_named(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(lt.TransferConfigError, match=r"pip install 'lightning_transfer\[report\]'"):
        lt.reports.learning_curves({"a": [[0.1]]}, [1], "x.png")


def test_torch_is_not_reseeded_by_anything_public():
    """Building every object draws nothing from the program's random state."""
    before = torch.get_rng_state()
    for method in METHODS:
        callback, module = method.callback(), LitToy()
        callback.change_layers(toys.trainer(), module)
        callback.make_part(module)
    assert (torch.get_rng_state() == before).all()

"""Compiled networks: the same promises as in the table, and never a graph that is of another step."""

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import lightning_transfer as lt
from tests import toys
from tests.field import nets, runs
from tests.field.shapes import CLASSES, SOURCE_CLASSES, Shape

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own tracing


class CompiledSubmodule(Shape):
    """`self.model = torch.compile(net)`"""

    head_path, entry = "model._orig_mod.fc", "model._orig_mod"

    def __init__(self):
        super().__init__()
        self.model = torch.compile(nets.Other(CLASSES), backend="aot_eager")

    def features(self, x):
        return self.model._orig_mod.features(x)


class CompiledInPlace(Shape):
    """`self.model.compile()`"""

    def __init__(self):
        super().__init__()
        self.model = nets.Other(CLASSES)
        self.model.compile(backend="aot_eager")

    def features(self, x):
        return self.model.features(x)


@pytest.mark.parametrize("method", ["soft", "auto", "selective", "joint"])
@pytest.mark.parametrize("shape", [CompiledSubmodule, CompiledInPlace])
def test_a_compiled_network_is_as_any(shape, method):
    runs.METHODS[method](shape, {})


class Plain(Shape):
    def __init__(self):
        super().__init__()
        self.model = nets.Other(CLASSES)


def source_task(**options):
    return lt.SourceTask(runs.source(Plain), num_classes=SOURCE_CLASSES, **options)


def test_a_whole_compiled_module():
    plain, compiled = runs.build(Plain), runs.build(Plain)
    found = []
    for module in (plain, torch.compile(compiled, backend="aot_eager")):
        watch = type("Watch", (runs.Watching, L.Callback), {})()
        runner = toys.trainer([lt.SoftFinetuning(source_task(), weight=lt.Schedule(0.5, 0.5)), watch], max_epochs=1)
        runner.fit(module, DataLoader(runs.target(Plain), batch_size=4))
        found.append(watch.gradients)
    runs.close(found[1], found[0])


class Learning(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))


def asked(module):
    """Run a network as a validation does, before any hook of ours is there."""
    with torch.no_grad():
        module.eval()(torch.zeros(4, 3, nets.SIZE, nets.SIZE))
    module.train()


@pytest.mark.parametrize(
    ("forward", "weight"), [("separate", "auto"), ("joint", lt.Schedule(until_steps=5))], ids=["separate", "joint"]
)
@pytest.mark.parametrize("before", [lambda module: None, asked], ids=["cold", "compiled-before"])
def test_a_compiled_network_follows_the_whole_schedule(forward, weight, before):
    """Graphs are traced with source images, without them, in validation, and before we came: never a stale one."""
    results = []
    for compiled in (False, True):
        module = runs.build(Learning)
        if compiled:
            module.model.compile(backend="aot_eager")
        before(module)
        loader = DataLoader(runs.target(Learning), batch_size=4)
        runner = toys.trainer([lt.SoftFinetuning(source_task(forward=forward), weight=weight)], max_epochs=3)
        runner.fit(module, loader, loader)
        results.append(toys.weights(module))
    toys.assert_same({k.replace("_orig_mod.", ""): v for k, v in results[1].items()}, results[0], tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:After ProbeStart the")  # of a network that is not pretrained
def test_the_probe_of_a_network_that_the_sanity_check_has_compiled():
    found = []
    for compiled in (False, True):
        module = toys.LitToy()
        if compiled:
            module.model = torch.compile(module.model, backend="eager")
        runner = toys.trainer([lt.ProbeStart()], max_steps=1, num_sanity_val_steps=1)
        runner.fit(module, toys.target_loader(), toys.target_loader())
        found.append({key.replace("_orig_mod.", ""): value for key, value in toys.weights(module).items()})
    toys.assert_same(found[1], found[0], tolerance=1e-5)


@pytest.mark.parametrize("knows", [True, False])
def test_a_graph_that_must_be_whole_names_what_to_write(knows):
    module, network = toys.LitToy(), toys.toy_net()
    network.fc = toys.source_head()
    module.model.compile(backend="eager", fullgraph=True)
    source = lt.SourceKnowledge(network) if knows else lt.SourceTask(toys.source_data(), head=network.fc)
    with pytest.raises(torch._dynamo.exc.Unsupported) as failed:
        toys.fit(module, [lt.SoftFinetuning(source, weight=0.5)])
    assert "Compile the network without fullgraph=True" in failed.value.__notes__[0]

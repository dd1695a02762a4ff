"""The gradients of a gated network against the formula written out, in every way a network can be run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import lightning_transfer as lt
from tests.adafilter.nets import batch, by_hand, chain, gated_chain, gradients


def own(net, images, labels):
    return gradients(net, F.cross_entropy(net(images), labels))


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def net():
    return gated_chain()


def expected(net, seed=1):
    """By hand, on a copy; and not blind: gates differ, and their gradient is not 0."""
    twin = copy.deepcopy(net)
    found = gradients(twin, by_hand(twin, *batch(seed)))
    assert all(found[f"adafilter.gate.outputs.{number}.weight"].abs().max() > 1e-4 for number in range(3))
    return found


@pytest.mark.parametrize("training", [True, False])
def test_plain_run(net, training):
    net.train(training)
    assert_close(own(net, *batch()), expected(net))
    shares = [gates.mean().item() for gates in net.adafilter.last_gates().values()]
    assert all(0.05 < share < 0.95 for share in shares), "a gate that is all open or shut would prove little"


@pytest.mark.parametrize("parts", [("a",), ("b", "c"), ("a", "b", "c")])
def test_activation_checkpointing(net, parts):
    net.checkpointed = parts
    assert_close(own(net, *batch()), expected(net))


def test_reentrant_checkpointing_is_refused(net):
    net.checkpointed, net.reentrant = ("b",), True
    with pytest.raises(lt.TransferConfigError, match="Reentrant activation checkpointing.*use_reentrant=False"):
        own(net, *batch())


def test_two_passes_in_a_step(net):
    images, labels = batch(seed=2)
    twin = copy.deepcopy(net)
    both = F.cross_entropy(net(batch()[0]), batch()[1]) + F.cross_entropy(net(images), labels)
    assert_close(gradients(net, both), gradients(twin, by_hand(twin, *batch()) + by_hand(twin, images, labels)))


def test_two_passes_with_checkpointing_are_refused(net):
    net.checkpointed = ("b",)
    images, labels = batch(seed=2)
    both = F.cross_entropy(net(batch()[0]), batch()[1]) + F.cross_entropy(net(images), labels)
    with pytest.raises(lt.TransferConfigError, match="two passes through a gated network"):
        both.backward()


def test_a_backward_after_each_pass_with_checkpointing(net):
    net.checkpointed = ("a", "b", "c")
    for seed in (3, 1):
        found = own(net, *batch(seed))
    assert_close(found, expected(net))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # the oldest torch's dynamo about any Function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look at a state
@pytest.mark.parametrize("where", ["module", "submodule", "in place"])
def test_compiled(net, where):
    torch._dynamo.reset()
    reference = expected(net)
    if where == "module":
        run = torch.compile(net, backend="aot_eager", fullgraph=True)
    elif where == "submodule":
        net.b, run = torch.compile(net.b, backend="aot_eager", fullgraph=True), net
    else:
        net.compile(backend="aot_eager", fullgraph=True)
        run = net
    found = gradients(net, F.cross_entropy(run(batch()[0]), batch()[1]))
    assert_close({name.replace("._orig_mod", ""): value for name, value in found.items()}, reference)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_compiled_network_is_gated():
    net = chain()
    compiled = torch.compile(net, backend="aot_eager")
    module = torch.nn.Module()
    module.training_step, module.model = None, compiled
    report = lt.functional.apply_adafilter(module)
    assert report.replaced == ("model.a.conv", "model.b.conv", "model.c")
    assert compiled(batch()[0]).shape == (6, 3)


def test_bf16_mixed(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = own(net.float(), batch()[0].float(), batch()[1])
    reference = expected(net.double())
    for name, value in reference.items():
        cosine = F.cosine_similarity(found[name].double().flatten(), value.flatten(), dim=0)
        assert cosine > 0.9, f"{name}: {cosine}"
    assert found["adafilter.gate.cell.weight_ih"].dtype == torch.float32


@pytest.mark.parametrize("unused", [False, True])
def test_ddp(net, unused, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(net, find_unused_parameters=unused)
        for seed in (1, 2):  # the second pass finds what the first one left unused
            images, labels = batch(seed)
            reference = expected(net, seed)
            assert_close(gradients(net, F.cross_entropy(parallel(images), labels)), reference)
    finally:
        torch.distributed.destroy_process_group()


def test_synchronized_batch_norm_takes_the_tuned_one_and_leaves_the_frozen(net):
    net.eval()
    images, before = batch()[0], net(batch()[0])
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(synced.a.conv.norm.tuned) is torch.nn.SyncBatchNorm
    assert type(synced.a.conv.norm.frozen).__name__ == "FrozenBatchNorm2d"
    torch.testing.assert_close(synced(images), before)


def test_a_copy_after_a_step_is_its_own(net):
    own(net, *batch())
    twin = copy.deepcopy(net)
    assert twin.adafilter.last_gates() == {}
    assert_close(own(twin, *batch()), expected(net))
    assert twin.b.conv._decider[0] is twin.adafilter.gate


def test_layers_out_of_turn_are_refused(net):
    net.a(torch.randn(2, 4, 8, 8, dtype=torch.float64))
    net.b(torch.randn(2, 5, 8, 8, dtype=torch.float64))
    with pytest.raises(lt.TransferConfigError, match="Gated layer 1 ran twice"):
        net.b(torch.randn(2, 5, 8, 8, dtype=torch.float64))
    net.adafilter.gate.slots.clear()
    with pytest.raises(lt.TransferConfigError, match="ran without the layers before"):
        net.b(torch.randn(2, 5, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["semantic_hashing", "gumbel"])
def test_noisy_estimators_run_again_with_the_same_noise(estimator):
    """Checkpointing brings the random state back, and with it the noise: gradients as without checkpointing."""
    found = []
    for parts in ((), ("a", "b", "c")):
        net = gated_chain(estimator=estimator)
        net.checkpointed = parts
        torch.manual_seed(0)
        found.append(own(net, *batch()))
    assert_close(found[1], found[0])


def test_second_derivatives_are_refused(net):
    images, labels = batch()
    grads = torch.autograd.grad(F.cross_entropy(net(images), labels), net.stem.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].square().sum().backward()

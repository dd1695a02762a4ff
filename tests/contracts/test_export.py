"""Changed networks leave Python: torch.export and ONNX, with any number of images, nothing of training in them."""

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tests import toys
from tests.methods import chosen
from tests.toys import LitToy, fit


@pytest.fixture(params=chosen(changes_layers=True), ids=str)
def network(request):
    module = LitToy()
    fit(module, [request.param.callback()])
    return module.model.eval()


def images(number):
    return torch.randn(number, 3, 6, 6, generator=torch.Generator().manual_seed(number))


def test_torch_export(network):
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (images(4),), dynamic_shapes=shapes)
    for number in (2, 7):
        torch.testing.assert_close(program.module()(images(number)), network(images(number)))
    assert not any("classifier" in name or "auxiliary" in name for name in program.state_dict)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx(network, tmp_path):
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    path = tmp_path / "network.onnx"
    torch.onnx.export(network, (images(4),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    model = onnx.load(path)
    name = model.graph.input[0].name
    for number in (2, 7):
        found = ReferenceEvaluator(model).run(None, {name: images(number).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), network(images(number)), rtol=1e-4, atol=1e-5)
    assert not any("classifier" in tensor.name for tensor in model.graph.initializer)


def test_what_is_exported_is_what_was_trained(network):
    assert not torch.equal(network(images(3)), toys.toy_net().eval()(images(3)))

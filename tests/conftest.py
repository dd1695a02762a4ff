import functools
import importlib
import logging
import re

import pytest
import timm
import torch
from hypothesis import HealthCheck, settings

from tests.toys import with_statistics

for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)

for name in ("lightning.fabric", "lightning_fabric"):  # each Trainer asks all installed packages for callbacks, 10 ms
    registry = importlib.import_module(f"{name}.utilities.registry")
    registry.entry_points = functools.cache(registry.entry_points)

torch.set_num_threads(1)  # also while tests are collected, when some build the networks that all share

LONGEST = (
    "test_field.py",
    "test_examples.py",
    "test_resume.py",
    "test_surroundings.py",
    "test_compiled.py",
)  # in CPU time


def pytest_report_header():
    return f"{torch.cuda.device_count()} GPUs; of the tests in tests/gpu those that need more are not run"


def pytest_collection_modifyitems(config, items):
    """Leave out what needs more GPUs than there are; start with the longest files, so that none is alone at the end."""
    needs = {item: mark.args[0] for item in items if (mark := item.get_closest_marker("gpu"))}
    left_out = [item for item, number in needs.items() if number > torch.cuda.device_count()]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.path.name not in LONGEST)  # stable: the others keep their order


# the same examples on every machine; `pytest tests/fuzz --hypothesis-profile=long` draws others, for about an hour
_SHARED = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=200, derandomize=True, database=None, **_SHARED)
settings.register_profile("long", max_examples=40_000, database=None, print_blob=True, **_SHARED)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def one_thread_and_seed(tmp_path, monkeypatch):
    """Sums are taken in one order, and every test starts from the same random state and hears what is logged."""
    torch.set_num_threads(1)
    logging.disable(logging.NOTSET)  # a benchmark's script that ran in an earlier test may have turned it off
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def thin_resnets():
    """timm makes ResNets with few channels, much less to draw and to compute; pretrained ones have such statistics."""
    create = timm.create_model

    def thin(name, *, pretrained=False, **options):
        if not re.fullmatch(r"resnet\d+t?", name):
            return create(name, pretrained=pretrained, **options)
        network = create(name, **{"channels": (8, 8, 16, 32), "stem_width": 8, **options})
        return with_statistics(network) if pretrained else network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", thin)
        yield

import logging

import pytest
import torch

for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def one_thread_and_seed(tmp_path, monkeypatch):
    """Sums are taken in one order, and every test starts from the same random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)

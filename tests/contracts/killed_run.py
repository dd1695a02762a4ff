"""A training run for test_resume.py, in a process that can be killed."""

import json
import os
import pathlib
import signal
import sys
import warnings

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests import toys
from tests.methods import METHODS

warnings.simplefilter("ignore")
folder, workers, kill_at, ckpt_path = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


class Written(toys.LitToy):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        step = self.trainer.global_step - 1
        entry = {"step": step, "loss": self.losses[-1], "source": drawn.pop() if drawn else None}
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # the program's own random state is another one in every process
    drawn: list[list[float]] = []

    def adapt(batch):
        drawn.append(batch[0].flatten(1).sum(1).tolist())
        return batch

    callback = METHODS[0].callback(toys.Augmented(toys.source_data()), num_workers=workers, adapt=adapt)
    saving = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    options = {"loader": toys.StatefulLoader(), "ckpt_path": ckpt_path or None, "enable_checkpointing": True}
    toys.fit(Written(), [callback, saving], **options)

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
from tests.methods import SOURCED


class Written(toys.LitToy):
    """Writes each step's target loss and source pixels to a file."""

    def __init__(self, folder, kill_at):
        super().__init__()
        self.folder, self.kill_at, self.drawn = folder, kill_at, []

    def note_source(self, batch):
        self.drawn.append(batch[0].flatten(1).sum(1).tolist())
        return batch

    def on_train_batch_end(self, outputs, batch, batch_idx):
        step = self.trainer.global_step - 1
        entry = {"step": step, "loss": self.losses[-1], "source": self.drawn.pop() if self.drawn else None}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, workers, kill_at, ckpt_path):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # the program's own random state is another one in every process
    module = Written(pathlib.Path(folder), int(kill_at))
    data = toys.Augmented(toys.source_data())
    callback = SOURCED[0].callback(data, num_workers=int(workers), adapt=module.note_source)
    saving = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    options = {"loader": toys.StatefulLoader(), "ckpt_path": ckpt_path or None, "enable_checkpointing": True}
    toys.fit(module, [callback, saving], **options)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A training run for test_resume.py that kills itself, and what it writes."""

import hashlib
import json
import os
import signal

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests import toys
from tests.methods import one


class Writing:
    """Writes each step's weights, target loss and source pixels to a file."""

    def note_source(self, batch):
        self.drawn.append(batch[0].flatten(1).sum(1).tolist())
        return batch

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        step = self.trainer.global_step - 1
        values = (value.numpy().tobytes() for value in self.state_dict().values() if isinstance(value, torch.Tensor))
        entry = {
            "step": step,
            "weights": hashlib.sha256(b"".join(values)).hexdigest(),
            "losses": self.losses[-1:],
            "source": self.drawn[-1:],
        }
        self.drawn.clear()
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Written(Writing, toys.LitToy):
    pass


def train(name, way, folder, *, kill_at=None, ckpt_path=None):
    """One run of a method by the callback, with loader workers or without, or by the mixin."""
    method = one(name=name)
    torch.manual_seed(os.getpid())  # the program's own random state is another one in every process
    data, callbacks = toys.Augmented(toys.source_data()), []
    if way == "mixin":
        module = method.mixin(data)
        module.__class__ = type("WrittenMixin", (Writing, type(module)), {})
        module.losses = getattr(module, "losses", [])
    else:
        module = Written()
        callbacks = [method.callback(data, num_workers=2 if way == "workers" else 0, adapt=module.note_source)]
    module.folder, module.kill_at, module.drawn = folder, kill_at, []
    saving = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    toys.fit(module, [*callbacks, saving], loader=toys.StatefulLoader(), ckpt_path=ckpt_path, enable_checkpointing=True)

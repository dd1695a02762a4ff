"""Training runs for test_resume.py that kill themselves.

Each is forked from this process, which imports what they need once, on one thread: a fork of several may hang.
"""

import hashlib
import json
import logging
import os
import pathlib
import signal
import sys
import traceback
import warnings

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests import toys
from tests.methods import METHODS


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


def train(method, way, folder, kill_at, ckpt_path):
    """One run by the callback, with loader workers or without, or by the mixin."""
    warnings.simplefilter("ignore")
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


def ways(method):
    """How a method is run: by its callback, by its mixin, and with loader workers, where there is a second loader."""
    return ["callback", *(["mixin"] if method.has_mixin else []), *(["workers"] if method.has_source else [])]


def forked(*runs):
    """Start runs, one after the other, in a process of their own."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for run in runs:
            train(*run)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def code_of(pid):
    """Wait for a process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder, kill_at):
    """Run every method in every way: whole, killed, and resumed from the last checkpoint of that."""
    torch.set_num_threads(1)
    toys.toy_net()  # is trained once, for all
    cases = [(method, way, folder / f"{method}-{way}") for method in METHODS for way in ways(method)]
    for *_, path in cases:
        (path / "whole").mkdir(parents=True)
        (path / "killed").mkdir()
    whole = forked(*((method, way, path / "whole", None, None) for method, way, path in cases))
    codes = {path.name: code_of(forked((method, way, path / "killed", kill_at, None))) for method, way, path in cases}
    killed = ((method, way, path / "killed") for method, way, path in cases)
    resumed = forked(*((method, way, path, None, path / "last.ckpt") for method, way, path in killed))
    codes |= {"whole": code_of(whole), "resumed": code_of(resumed)}
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))

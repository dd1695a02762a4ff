"""Small pictures and datasets with faults, and what processes of their own do with them.

Started as `python select_run.py <what> <folder>`; each process of a job is forked from here, so that only one of them
has to import anything.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective import pictures, store
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import select_neighbors
from lightning_transfer.methods.selective.selection import TENSORS, Selection
from lightning_transfer.progress import no_progress

NUM_TARGET, NUM_SOURCE = 6, 300
BLOCK, READ = 64, 16  # images: five blocks, four batches each
K = 7
UNREADABLE, PLANTED = (130, 291), (40, 203)


def quick_bank(seed=5):
    """Four filters that are exact in float32 on pixels of a few bits."""
    with torch.random.fork_rng():
        network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    generator = torch.Generator().manual_seed(seed)
    network[0].weight.data = torch.randint(-2, 3, (4, 3, 3, 3), generator=generator).float() / 2
    return lt.FilterBank.from_model(network, layers=["0"], normalize=False)


def small(num, seed):
    """Pictures of 8 pixels."""
    coarse = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (8, 8), mode="bilinear") * 64).round() / 64


def made_selection(seed=0):
    """A selection of four target images among nine source images, by hand."""
    generator = torch.Generator().manual_seed(seed)
    return Selection(
        indices=torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(4)]),
        distances=torch.rand(4, 3, generator=generator, dtype=torch.float64).sort(1).values,
        fingerprint={"source": "9 images abc", "bank": "gabor"},
        target_labels=torch.tensor([0, 1, -1, 1]),
        source_labels=torch.arange(9) % 3,
        duplicates=torch.tensor([[1, 4]]),
        dropped=torch.empty(0, 2, dtype=torch.int64),
        unreadable=torch.tensor([7]),
    )


class Faulty(Dataset):
    """Some of its files cannot be read; after so many readings none can, or a signal comes."""

    def __init__(self, dataset, *, bad=(), fails_after=None, signal_after=None, number=signal.SIGKILL):
        self.dataset, self.bad = dataset, bad
        self.fails_after, self.signal_after, self.number = fails_after, signal_after, number
        self.loaded: list[int] = []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.loaded.append(index)
        if len(self.loaded) == self.signal_after:
            os.kill(os.getpid(), self.number)
        if index in self.bad or (self.fails_after is not None and len(self.loaded) > self.fails_after):
            raise OSError("truncated file")
        return self.dataset[index]


def with_small_blocks():
    store.BLOCK, pictures.READ = BLOCK, READ


def source_data(**faults):
    images = small(NUM_SOURCE, 2)
    images[list(PLANTED)] = small(4, 3)[[0, 3]]  # test images
    return Faulty(TensorDataset(images, torch.arange(NUM_SOURCE) % 11), bad=UNREADABLE, **faults)


def target_data():
    return TensorDataset(small(NUM_TARGET, 1), torch.arange(NUM_TARGET))


def selected(source=None, *, target=None, protect=None, cache=None, shown=no_progress, say=lambda line: None):
    """The selection that everything here makes, in small blocks."""
    return select_neighbors(
        target or target_data(),
        source or source_data(),
        k=K,
        bank=quick_bank(),
        protect=[small(4, 3)] if protect is None else protect,
        scan=Scan(cache=cache, progress=shown, say=say),
    )


def values(selection):
    return {name: getattr(selection, name) for name in TENSORS}


# what a process does, by the name of its job: each gives what is written down


def select_once(folder, rank):
    shown, said = [], []
    show = lambda name, total: shown.append(name) or no_progress(name, total)  # noqa: E731
    return {**values(selected(shown=show, say=said.append)), "shown": shown, "said": said}


def select_in_few_blocks(folder, rank):
    store.BLOCK = 4 * BLOCK
    return values(selected())


# how often a source image is read before the first is described: what some say of all, and whether they stay the same
READ_BEFORE = 64 + 3 * 8


def killed(folder, rank):
    """Killed with this process' second block half described."""
    selected(source_data(signal_after=READ_BEFORE + BLOCK + BLOCK // 2), cache=folder / "shared/chosen")


def resumed(folder, rank):
    """The rest of it, and which images were described."""
    source = source_data()
    blocks = sorted(int(path.name.removeprefix("block")) for path in (folder / "shared").rglob("source/block*"))
    if dist.is_initialized():
        dist.barrier()
    found = selected(source, cache=folder / "shared/chosen")
    left = sorted(path.name for path in (folder / "shared").iterdir())
    return {**values(found), "loaded": source.loaded, "blocks": blocks, "left": left}


def fails_in_source(folder, rank):
    selected(source_data(fails_after=READ_BEFORE + 5 if rank == 1 else None))


def fails_in_target(folder, rank):
    selected(target=Faulty(target_data(), bad={3} if rank == 1 else ()))


def fails_in_protected(folder, rank):
    """It can be told who it is, but not be described."""
    tests = small(4, 3)
    selected(protect=[Faulty(tests, fails_after=4 + 3 * 4 if rank == 1 else None)])


def fails_to_write(folder, rank):
    """The disk of one process is full when it writes what each process keeps for itself."""
    if rank == 1:
        write = store.Store.write

        def full(self, number, counts, labels):
            if "target" in str(self.folder):
                raise OSError(28, "No space left on device")
            write(self, number, counts, labels)

        store.Store.write = full
    selected()


def other_images(folder, rank):
    source = TensorDataset(small(NUM_SOURCE, 2 + rank), torch.arange(NUM_SOURCE))
    selected(source)


def interrupted(folder, rank, number=signal.SIGTERM):
    """A Trainer with the callback is told to stop while its third block is described."""
    import lightning.pytorch as L

    from tests import toys

    class Lit(toys.LitToy):
        def on_train_batch_end(self, *args):
            (folder / "trained").touch()

    with_small_blocks()
    images = source_data().dataset
    source = Faulty(images, bad=UNREADABLE, signal_after=READ_BEFORE + 2 * BLOCK + 3, number=number)
    task = lt.SourceTask(images, num_classes=11, unaugmented=source, batch_size=2)
    neighbors = lt.Neighbors(k=K, bank=quick_bank(), rounds=0)
    given = {"target": target_data(), "protect": [small(4, 3)], "cache": folder / "shared/chosen"}
    callback = lt.SelectiveJointFinetuning(task, neighbors=neighbors, weight=lt.Schedule(1.0, 1.0), **given)
    loader = torch.utils.data.DataLoader(target_data(), batch_size=2)
    assert isinstance(callback, L.Callback)
    toys.fit(Lit(), [callback], loader=loader, max_epochs=1)


def interrupted_by_hand(folder, rank):
    interrupted(folder, rank, number=signal.SIGINT)


def rounds(folder, rank):
    """Budgets after every step of a run with two rounds, on this rank's share of the target."""
    from tests import toys
    from tests.methods import borrowed

    size, num_ranks = len(toys.target_data()), dist.get_world_size() if dist.is_initialized() else 1
    num_ranks = int(os.environ.get("WORLD_SIZE", num_ranks))
    share = torch.utils.data.Subset(toys.target_data(), range(rank, size, num_ranks))
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4 // num_ranks)
    neighbors = borrowed(k=2, limit=14, rounds=2, every=2, hard_entropy="50%")
    target = torch.utils.data.Subset(toys.target_data(), range(size - 1))  # 23: no two ranks ask as often
    callback = lt.SelectiveJointFinetuning(source, neighbors=neighbors, target=target, weight=lt.Schedule(1.0, 1.0))
    module = toys.LitToy()
    module.model.bn = nn.GroupNorm(2, toys.WIDTH)  # BatchNorm's statistics would be each rank's own
    followed = FollowBudget(callback)
    toys.fit(
        module,
        [callback, followed],
        loader=torch.utils.data.DataLoader(share, batch_size=4 // num_ranks),
        devices=num_ranks,
        strategy="ddp" if num_ranks > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=1,
    )
    return {"budgets": torch.stack(followed.budgets)}


class FollowBudget(lt.SoftFinetuning.__mro__[2]):
    """Remembers how much each target image borrows, after every step."""

    def __init__(self, selective):
        self.selective, self.budgets = selective, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.budgets.append(self.selective.target_weights.clone())


def write_often(folder, rank):
    for _ in range(60):
        made_selection(rank + 1).save(folder / "chosen")


def read_often(folder):
    """Which selections are seen beside the writers."""
    read, wanted = [], {str(seed): made_selection(seed).indices for seed in (1, 2)}
    while not (folder / "chosen").exists():
        time.sleep(0.001)
    for _ in range(60):
        try:
            indices = Selection.load(folder / "chosen").indices
            read.append(next((name for name, given in wanted.items() if torch.equal(given, indices)), "neither"))
        except lt.TransferConfigError as error:
            read.append(str(error))
    return read


def fork(act, folder, name, rank, num_ranks, port):
    """Start one process of a job; it writes what it found, or its error, to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if num_ranks > 1:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
            shared |= {"LOCAL_WORLD_SIZE": str(num_ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "ranks"}
            os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            if act is not rounds:  # there the Trainer does it
                dist.init_process_group("gloo", timeout=timedelta(seconds=20))
        with_small_blocks()
        found = act(folder, rank)
        code = 0
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        found = {"error": type(error).__name__, "message": str(error)}
    torch.save(found, folder / f"{name}-{num_ranks}-{rank}.pt")
    sys.stdout.flush()
    os._exit(code)


def run(act, folder, num_ranks=1, *, name=None, seconds=60):
    """Run a job and give the exit codes of its processes; one that hangs is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    left = {fork(act, folder, name or act.__name__, rank, num_ranks, port): rank for rank in range(num_ranks)}
    codes, end = [None] * num_ranks, time.monotonic() + seconds
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.002)
    return codes


def started(what, folder):
    """Start this script and give what it told, and a reader of what each process wrote."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    subprocess.run([sys.executable, __file__, what, folder], env=environment, check=True, timeout=300)
    return json.loads((folder / "codes.json").read_text()), lambda name: torch.load(folder / f"{name}.pt")


def all_ranks(folder):
    """What must not depend on the number of processes."""
    codes = {}
    for num_ranks in (1, 2, 3):
        codes[f"select_once-{num_ranks}"] = run(select_once, folder, num_ranks)
    codes["select_in_few_blocks-3"] = run(select_in_few_blocks, folder, 3)
    for before, after in ((2, 3), (3, 1), (1, 2)):
        work = folder / f"from{before}to{after}"
        (work / "shared").mkdir(parents=True)
        codes[f"killed-{before}"] = run(killed, work, before)
        codes[f"resumed-{before}-{after}"] = run(resumed, work, after)
    for act in (fails_in_source, fails_in_target, fails_in_protected, fails_to_write, other_images):
        codes[f"{act.__name__}-2"] = run(act, folder, 2)
    for num_ranks in (1, 2):
        codes[f"rounds-{num_ranks}"] = run(rounds, folder, num_ranks)
    return codes


def all_signals(folder):
    """Runs that are broken off, and the runs behind them."""
    codes = {}
    for act in (killed, interrupted, interrupted_by_hand):
        work = folder / act.__name__
        (work / "shared").mkdir(parents=True)
        codes[act.__name__] = [*run(act, work), *run(resumed, work)]
    (folder / "writers").mkdir()
    return {"codes": codes, "writers": writers(folder / "writers")}


def writers(folder):
    """Two processes that write one file, again and again, and one that reads it."""
    left = [os.fork() or _exit_behind(write_often, folder, rank) for rank in range(2)]
    read = read_often(folder)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in left]
    return {"codes": codes, "read": read}


def _exit_behind(act, *arguments):
    code = 1
    try:
        act(*arguments)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    told, where = {"ranks": all_ranks, "signals": all_signals}[sys.argv[1]], pathlib.Path(sys.argv[2])
    (where / "codes.json").write_text(json.dumps(told(where)))

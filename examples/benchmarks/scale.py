"""What a large selection says beforehand, and what it then takes: sources of growing sizes, each twice the one before.

    python examples/benchmarks/scale.py --sizes 16000 32000 64000 --full 1280000 --out scale.json

Images are made up, 32 pixels, 5,000 of them are the target; options are those of `Neighbors()`. The clock is the CPU
time of one process without loader workers, so that other work on the machine does not count. Each size is forecast
from the two before it too, by a straight line, and so is the full one from the last two.
"""

import argparse
import json
import re
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from lightning_transfer import Neighbors
from lightning_transfer.methods.selective import descriptions, forecast
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import Job
from lightning_transfer.methods.selective.selection import Selection
from lightning_transfer.progress import no_progress

NUM_TARGET, NUM_SHAPES, SIDE = 5000, 4096, 32


class Images(Dataset[Any]):
    """Two soft shapes mixed, each of some contrast, and noise: as many different images as are asked for."""

    def __init__(self, num: int, seed: int) -> None:
        self.num, self.seed = num, seed
        coarse = torch.rand(NUM_SHAPES, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        contrast = torch.rand(NUM_SHAPES, 1, 1, 1, generator=torch.Generator().manual_seed(1)) + 0.3
        self.shapes = (F.interpolate(coarse - 0.5, (SIDE, SIDE), mode="bicubic") * contrast * 100).short().numpy()
        self.noise = np.random.default_rng(2).integers(-4, 5, (64, 3, SIDE, SIDE), dtype=np.int16)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        one, other, noise = np.random.default_rng((self.seed, index)).integers(0, (NUM_SHAPES, NUM_SHAPES, 64))
        pixels = self.shapes[one] + self.shapes[other][:, ::-1] + self.noise[noise] + 128
        return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), index % 1000


def peak_memory() -> float:
    """Return the most GB that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measured(num: int, folder: Path, before: float) -> dict[str, float]:
    """Select among so many images; return what was said and what it took, memory above that from before all of it."""
    said: dict[str, float] = {}
    cache = folder / f"{num}.safetensors"

    def say(line: str) -> None:
        print(f"{time.process_time():8.1f}  {line}", flush=True)
        for name, pattern in (("memory", r"([\d.]+) GB of memory"), ("disk", r"([\d.]+) GB on disk")):
            said.update({f"said {name}": float(found[1]) for found in re.finditer(pattern, line)})
        if found := re.search(r"the rest takes about ([\d.]+) minutes, ([\d.]+)", line):
            said.update({"said minutes": float(found[1]), "said search": float(found[2]), "began": time.process_time()})

    job = Job(
        Pictures(Images(NUM_TARGET, 1), "target"),
        Pictures(Images(num, 2), "source"),
        (),
        neighbors=Neighbors(),
        scan=Scan(cache=cache, progress=no_progress, say=say),
    )
    save = Selection.save

    def weighed(selection: Selection, path: Path) -> None:
        files = [file for file in folder.rglob("*") if file.is_file() and "source" in file.parts]
        said["disk"] = sum(file.stat().st_size for file in files) / 1e9
        save(selection, path)

    start = time.process_time()
    with patch.object(Selection, "save", weighed):
        job.run()
    end = time.process_time()
    said["minutes"], said["all minutes"] = (end - said.pop("began")) / 60, (end - start) / 60
    said["memory"] = peak_memory() - before
    return {"images": num, **{name: round(value, 3) for name, value in said.items()}}


def line(before: Sequence[dict[str, float]], num: int) -> float:
    """Return the minutes of so many images on the straight line through two sizes."""
    (a, b), (x, y) = ([run[name] for run in before] for name in ("all minutes", "images"))
    return round(b + (b - a) / (y - x) * (num - y), 2)


def main() -> None:
    """Run all sizes and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16_000, 32_000, 64_000])
    parser.add_argument("--full", type=int, default=1_280_000)
    parser.add_argument("--out", type=Path, default=Path("scale.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = SimpleNamespace(monotonic=time.process_time)
    runs: list[dict[str, float]] = []
    before = peak_memory()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(descriptions, "time", clock),
        patch.object(forecast, "time", clock),
    ):
        for num in args.sizes:
            found = measured(num, Path(folder), before)
            if len(runs) > 1:
                found["minutes on a line through the two before"] = line(runs[-2:], num)
            runs.append(found)
            full = {"images": args.full, "all minutes": line(runs[-2:], args.full)} if len(runs) > 1 else {}
            args.out.write_text(json.dumps({"runs": runs, "full": full}, indent=1))
            print(found, flush=True)


if __name__ == "__main__":
    main()

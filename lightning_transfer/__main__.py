"""`python -m lightning_transfer select --config select.yaml`: a selection made ahead of training, on many machines."""

from typing import Any

from lightning_transfer import ranks
from lightning_transfer.glue.launching import launch
from lightning_transfer.methods.selective.options import Neighbors
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import Job
from lightning_transfer.source.datasets import AnyDataset


def select(
    target: AnyDataset,
    source: AnyDataset,
    cache: str,
    *,
    neighbors: Neighbors = Neighbors(),  # noqa: B008  (frozen)
    protect: list[AnyDataset] | None = None,
    num_workers: int = 0,
    fabric: dict[str, Any] | None = None,
) -> None:
    """Select neighbors and keep them in a file, for `SelectiveJointFinetuning(cache=...)` with the same options.

    Args:
        target: target training images without augmentation.
        source: source images without augmentation.
        cache: the file.
        neighbors: as the training run will have them.
        protect: datasets whose near duplicates are left out of the source.
        num_workers: processes that read images, for each process that selects.
        fabric: options of Lightning's Fabric, such as {accelerator: gpu, devices: 8, num_nodes: 2}.
    """
    device = launch(fabric or {})
    protected = [Pictures(data, "protected") for data in protect or []]
    scan = Scan(cache=cache, num_workers=num_workers, device=device, say=print)
    job = Job.of(Pictures(target, "target"), Pictures(source, "source"), protected, neighbors=neighbors, scan=scan)
    selection = job.run()
    if ranks.rank() == 0:
        print(f"{selection} in {cache}")


def main(args: list[str] | None = None) -> None:
    """The command line."""
    try:
        from jsonargparse import CLI  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        raise SystemExit("The command line needs jsonargparse: pip install 'lightning_transfer[cli]'.") from None
    CLI({"select": select}, args=args, as_positional=False)


if __name__ == "__main__":
    main()

"""Selective joint fine-tuning on one screen: which printed characters help to learn handwritten digits, and a picture.

About a minute on a CPU, no download. The data, the network and the module are the quickstart's.

    python examples/selective.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from quickstart import LR, SOURCE, Digits, LitDigits, calm, make_trainer, pretrain, printed

import lightning_transfer as lt


def main(argv: Sequence[str] | None = None) -> lt.Selection:
    """Pretrain, borrow, fine-tune, draw; returns what was selected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("borrowed.png"), help="where the picture goes")
    parser.add_argument(
        "--page", type=Path, help="where a page about the run goes, such as run.html, and its values, run/"
    )
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning; pretraining takes twice as many")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    characters, digits = printed(SOURCE, 300, seed=0), Digits(seed=0)
    with calm():
        network = pretrain(characters, max(100, 2 * options.steps), lambda: None)
        source = lt.SourceTask.from_timm(network, characters)
        network.reset_classifier(10)  # type: ignore[operator]

        borrow = lt.SelectiveJointFinetuning(
            source,
            neighbors=lt.Neighbors(k=100, rounds=2, hard_entropy="75%"),  # the least sure quarter borrows more too
            target=digits.train,  # the few digits, as validation sees them
            protect=[digits.test],  # no source image may show a test image
            # by default the domain gap of digits would leave the source out
            weight=lt.Schedule(1.0, 1.0),
        )
        module = LitDigits(network, LR)
        logger = options.page and CSVLogger(options.page.parent, name="", version=options.page.stem)
        trainer = make_trainer(options.steps, [borrow], logger=logger or False)
        trainer.fit(module, digits)
        accuracy = trainer.test(module, digits, verbose=False)[0]["accuracy"]

    selection = borrow.selection
    assert selection is not None  # there was a first step
    hard = int((borrow.target_weights > 1).sum())
    print(f"{selection}; {hard} hard digits borrow more. Test accuracy {accuracy:.1%}.")
    selection.report(options.out, source_names=list(SOURCE), target_names=list("0123456789"))
    print(f"Borrowed images: {options.out}")
    if options.page:
        lt.reports.TransferReport(options.page.with_suffix(""), selection=selection).save(options.page)
    return selection


if __name__ == "__main__":
    main()

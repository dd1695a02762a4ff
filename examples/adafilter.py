"""AdaFilter on one screen: which filters a network tunes for handwritten digits, and what a plain network keeps of it.

About a minute on a CPU, no download. The data, the network and the module are the quickstart's.

    python examples/adafilter.py
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quickstart import LR, SOURCE, Digits, LitDigits, calm, make_trainer, pretrain, printed

import lightning_transfer as lt
from lightning_transfer.functional import remove_adafilter

GATE_LR = 0.1


class GatedDigits(lt.AdaFilterMixin, LitDigits):
    """The quickstart's module with gates that learn faster than its filters."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__(model, lr)
        self.add_adafilter(gate_bias=0.0)  # half of the filters start tuned

    def configure_optimizers(self) -> Any:
        """SGD with a group for the gates; both rates fall to zero along a cosine."""
        rest = [param for name, param in self.named_parameters() if "adafilter." not in name]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": self.filter_gates.parameters(), "lr": GATE_LR}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def main(argv: Sequence[str] | None = None) -> float:
    """Pretrain, gate, fine-tune, draw, make plain; returns the share of tuned filters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gates.png"), help="where the picture goes")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning; pretraining takes twice as many")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    digits = Digits(seed=0)
    with calm():
        network = pretrain(printed(SOURCE, 300, seed=0), max(100, 2 * options.steps), lambda: None)
        network.reset_classifier(10)  # type: ignore[operator]
        module = GatedDigits(network, LR)
        trainer = make_trainer(options.steps, [])
        trainer.fit(module, digits)

    lt.reports.gate_map(module.model, digits.val_dataloader(), options.out, class_names=list("0123456789"))
    tuned = float(trainer.callback_metrics["transfer/tuned"])
    print(f"{tuned:.0%} of the filters were tuned in the last steps. Which, for all images: {options.out}")
    for keep in ("tuned", "frozen", "mean"):
        plain = copy.deepcopy(module.model)
        # which one to keep is chosen on validation images; "mean" counts the gates on them, too
        removal = remove_adafilter(plain, keep, loader=digits.val_dataloader())
        print(f"gated {removal.accuracy_before:.1%}, plain with {keep} filters {removal.accuracy_after:.1%}")
    return tuned


if __name__ == "__main__":
    main()

"""The gated transfer network on one screen: with its auxiliary classifier, a warm-up, and without its module.

About a minute on a CPU, no download. The data, the network and the module are the quickstart's.

    python examples/gated_transfer.py
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from quickstart import LR, SOURCE, Digits, LitDigits, calm, make_trainer, pretrain, printed

import lightning_transfer as lt

VARIANTS = {
    "transfer module": {},
    "with auxiliary classifier": {"aux_weight": 0.2},
    "with auxiliary classifier and warm-up": {"aux_weight": 0.2, "warmup_epochs": 10},
    "auxiliary classifier and dropout alone": {"ratio": None, "aux_weight": 0.2},
}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Pretrain once, fine-tune with each variant; returns their test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning; pretraining takes twice as many")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    digits, found = Digits(seed=0), {}
    with calm():
        pretrained = pretrain(printed(SOURCE, 300, seed=0), max(100, 2 * options.steps), lambda: None)
        for name, variant in VARIANTS.items():
            torch.manual_seed(0)
            network = copy.deepcopy(pretrained)
            network.reset_classifier(10)  # type: ignore[operator]
            module = LitDigits(network, LR)
            trainer = make_trainer(options.steps, [lt.GatedTransfer(**variant)])  # type: ignore[arg-type]
            trainer.fit(module, digits)
            spread = trainer.callback_metrics.get("transfer/gate_spread")  # near 0: all features weigh alike
            found[name] = trainer.test(module, digits, verbose=False)[0]["accuracy"]
            said = "" if spread is None else f", spread of the weights {spread:.3f}"
            print(f"{name}: test accuracy {found[name]:.1%}{said}")
    return found


if __name__ == "__main__":
    main()

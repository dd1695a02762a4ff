"""Will it help me? Advice for the quickstart's digits, before any method is tried on them.

A minute or two on a CPU, no download. The data, the network and the module are the quickstart's.

    python examples/advise.py
"""

import argparse
from collections.abc import Sequence

import torch
from quickstart import LR, SOURCE, Digits, LitDigits, calm, pretrain, printed

import lightning_transfer as lt


def main(argv: Sequence[str] | None = None) -> lt.Advice:
    """Pretrain, keep the source's classifier, and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each training; pretraining takes twice as many")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with calm():
        characters = printed(SOURCE, 300, seed=0)
        network = pretrain(characters, max(100, 2 * options.steps), lambda: None)
        source = lt.SourceTask.from_timm(network, characters)
        torch.manual_seed(0)
        network.reset_classifier(10)  # type: ignore[operator]
        quiet = {"accelerator": "cpu"}
        advice = lt.advise(LitDigits(network, LR), Digits(seed=0), source=source, steps=options.steps, trainer=quiet)
    print(advice)
    return advice


if __name__ == "__main__":
    main()

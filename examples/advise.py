"""Will it help me? A trial of every method on the quickstart's digits, each against fine-tuning on the same images.

Ten minutes on a CPU at most, no download. The data, the network and the module are the quickstart's.

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
    parser.add_argument("--steps", type=int, default=150, help="of each training; pretraining takes four times as many")
    parser.add_argument("--minutes", type=float, default=10.0, help="that the trial may take")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with calm():
        characters = printed(SOURCE, 300, seed=0)
        network = pretrain(characters, max(100, 4 * options.steps), lambda: None)
        source = lt.SourceTask.from_timm(network, characters)
        torch.manual_seed(0)
        network.reset_classifier(10)  # type: ignore[operator]
        asked = {"steps": options.steps, "minutes": options.minutes, "trainer": {"accelerator": "cpu"}}
        advice = lt.advise(LitDigits(network, LR), Digits(seed=0), source=source, **asked)
    print(advice)
    return advice


if __name__ == "__main__":
    main()

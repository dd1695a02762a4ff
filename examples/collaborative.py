"""Two pretrained networks tuned together, and how much of each to freeze, on one screen.

About five minutes on a CPU, no download. The data, the networks and the module are the quickstart's: one network has
learned digits and capitals, the other small letters.

    python examples/collaborative.py
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from quickstart import LR, SMALL, SOURCE, Digits, LitDigits, calm, make_trainer, pretrain, printed

import lightning_transfer as lt


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Pretrain both, search on one draw of digits, tune in five ways on others; returns mean test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("search.png"), help="where the picture goes")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each way")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning; pretraining takes twice as many")
    parser.add_argument("--particles", type=int, default=10, help="of the swarm")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with calm():
        capitals, small = (
            pretrain(printed(characters, 300, seed=0), max(100, 2 * options.steps), lambda: None)
            for characters in (SOURCE, SMALL)
        )

        def tuned(seed: int, pretrained: torch.nn.Module, callbacks: list[lt.CollaborativeFinetuning]) -> float:
            torch.manual_seed(seed)
            network = copy.deepcopy(pretrained)
            network.reset_classifier(10)  # type: ignore[operator]
            module, digits = LitDigits(network, LR), Digits(seed)
            trainer = make_trainer(options.steps, callbacks)  # type: ignore[arg-type]
            trainer.fit(module, digits)
            return float(trainer.test(module, digits, verbose=False)[0]["accuracy"])

        searching = LitDigits(copy.deepcopy(capitals), LR)
        searching.model.reset_classifier(10)  # type: ignore[operator]
        search = lt.LayerSearch(particles=options.particles, iterations=3, proxy_epochs=10, validation=0.4)
        using = lt.CollaborativeFinetuning({"small": small})
        plan = search.run(searching, Digits(0), using, trainer={"accelerator": "cpu"})
        lt.reports.layer_search(plan, options.out)
        print(f"Search: {plan.summary}. Picture: {options.out}")

        def together(weight: float, frozen: lt.LayerPlan | None = None) -> list[lt.CollaborativeFinetuning]:
            return [lt.CollaborativeFinetuning({"small": small}, weight=weight, frozen_layers=frozen)]

        found: dict[str, list[float]] = {}
        for seed in range(1, options.seeds + 1):
            for name, pretrained, callbacks in (
                ("the capitals' network alone", capitals, []),
                ("the small letters' alone", small, []),
                ("both, each for itself", capitals, together(0.0)),
                ("both, together", capitals, together(0.2)),
                ("both, together, frozen as found", capitals, together(0.2, plan)),
            ):
                found.setdefault(name, []).append(tuned(seed, pretrained, callbacks))
    for name, accuracies in found.items():
        values = torch.tensor(accuracies)
        error = f" ± {values.std() / len(values) ** 0.5:.1%}" if len(values) > 1 else ""
        print(f"{name}: test accuracy {values.mean():.1%}{error}")
    return {name: sum(accuracies) / len(accuracies) for name, accuracies in found.items()}


if __name__ == "__main__":
    main()

"""Add AdaFilter to a Trainer as a callback."""

from typing import Any

from lightning_transfer.errors import check_count
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.logs import say
from lightning_transfer.methods.adafilter.apply import FilterGates, apply_adafilter, check_options, gates_of
from lightning_transfer.methods.adafilter.functional import Estimator
from lightning_transfer.methods.adafilter.modules import Fixed
from lightning_transfer.methods.adafilter.remove import remove_adafilter
from lightning_transfer.methods.adafilter.sites import Gated, chosen_by
from lightning_transfer.methods.adafilter.watching import GateWatch
from lightning_transfer.surgery import path_of


class AdaFilter(TransferCallback):
    """Choose for each image and each filter between the pretrained response and the tuned one (arXiv 1911.09659).

    Every pretrained convolution but those of the stem is kept twice, with the BatchNorm after it. A recurrent network,
    the gate, runs over the layers and chooses between the two copies. The idea is the paper's. The cell, its width, how
    a hard choice learns, and a stem that is tuned without gates are ours. By default nearly all filters start tuned.
    With an ImageNet network, no difference from fine-tuning is shown; `gate_bias=0` is 2.8 and 1.5 points below
    fine-tuning on two targets (examples/benchmarks/regime.md).

    The network stays gated after fit: `functional.remove_adafilter` turns it into a plain one, and
    `load_from_checkpoint` reads its checkpoints. In the optimizer, the gates join the parameter group of their filters.
    Logs `transfer/tuned`, the share of gates that chose the tuned filter, and the same for each layer, at the Trainer's
    logging interval.

    Args:
        backbone: dotted name of the network to gate; "auto" takes the part of the module that holds all convolutions.
        gate_width: width of the gate's state.
        estimator: how a hard choice learns: "straight_through", "semantic_hashing" or "gumbel"; or one of the baselines
            that choose without learning: "all_tuned" (fine-tuning), "all_frozen" (feature extraction), "random".
        gate_bias: the value at which the gates' logits start, plus or minus a few hundredths: at .05 nearly all filters
            start tuned, at 0 half of them, at -.05 hardly any.
        gated: the convolutions to gate: a pattern of their names in the module, such as "model.layer4.*", a list of
            patterns, or a function of name and convolution; by default all except the stem. If the target is far from
            the source, gating only the first stages loses less (examples/benchmarks/small_networks.md).
        temperature: of the "gumbel" estimator.

    Raises:
        TransferConfigError: an option does not fit.

    Example:
        >>> AdaFilter(gated="model.layer4.*")
        AdaFilter(estimator='straight_through', gate_width=128, gate_bias=0.05, gated='model.layer4.*')
    """

    mixin = "AdaFilterMixin"
    structure = FilterGates

    def __init__(
        self,
        *,
        backbone: str = "auto",
        gate_width: int = 128,
        estimator: Estimator | Fixed = "straight_through",
        gate_bias: float = 0.05,
        gated: Gated = None,
        temperature: float = 1.0,
    ) -> None:
        check_options(estimator, gate_bias, temperature, gated)
        check_count("gate_width", gate_width, least=1)
        self.options: dict[str, Any] = {
            "backbone": backbone,
            "gate_width": gate_width,
            "estimator": estimator,
            "gate_bias": gate_bias,
            "gated": gated,
            "temperature": temperature,
        }

    def change_layers(self, trainer: Any, module: Any) -> bool:
        """Gate the network."""
        self.refuse_mixin(module)
        gates = gates_of(module)
        if gates is None:
            report = apply_adafilter(module, **self.options)
            names: dict[str, list[str]] = {}
            for name, reason in report.left.items():
                names.setdefault(reason, []).append(name)
            kept = "; ".join(f"{', '.join(alike)}: {reason}" for reason, alike in names.items())
            say(trainer, f"AdaFilter: not gated: {kept or 'none'}.")
            return True
        width = gates.spec()["width"] or self.options["gate_width"]
        theirs = {"estimator": gates.estimator, "temperature": gates.temperature, "gate_width": width}
        different = [f"{key}={value!r}" for key, value in theirs.items() if value != self.options[key]]
        sites = [site.conv for site in gates.sites]
        path = path_of(module, gates.network)
        prefix, gated = f"{path}." if path else "", self.options["gated"]
        if gated is not None and chosen_by(gated, gates.network, sites, prefix) != sites:
            different.append(f"{sites} gated")
        self.refuse_other(module, "is gated", different, remove="remove_adafilter")
        return False

    def restore_layers(self, module: Any) -> None:
        """Turn the network into a plain one."""
        remove_adafilter(module)

    def make_part(self, module: Any) -> GateWatch:
        """Return the part that watches the gates."""
        return GateWatch(module)

    def __repr__(self) -> str:
        names = ("estimator", "gate_width", "gate_bias", "gated")
        shown = ", ".join(f"{name}={self.options[name]!r}" for name in names)
        return f"AdaFilter({shown})"

"""Replace layers of a user's network, all or none, and find them again later."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from lightning_transfer.errors import TransferConfigError, differences
from lightning_transfer.naming import a_class
from lightning_transfer.stamps import KEYS, stamped, unstamped

SEED = 0  # of new weights
MARKS = (b'"format"', b'"version"', b'"checksum"', b'"kind"')  # of a spec; a damaged spec still has some of them

M = TypeVar("M", bound=nn.Module)


class OnCPU(TorchFunctionMode):
    """Makes new tensors on the CPU, also where the program has set another default device.

    Lightning calls `configure_model` with the device of the run as the default. `torch.device("cpu")` would not do:
    in older torch the outer default wins.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("device") is None and func in _device_constructors():  # private: all functions that make tensors
            given["device"] = "cpu"
        return func(*args, **given)


@contextmanager
def own_randomness(seed: int = SEED) -> Iterator[None]:
    """Make new weights the same in every process and run, without changing the program's random state."""
    with OnCPU(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class SurgeryReport:
    """Holds how a network was changed.

    Attributes:
        replaced: dotted names of the layers that were replaced, in the order in which they run.
        added_parameters: how many trainable parameters were added.
        left: layers that were not replaced, and why.
    """

    replaced: tuple[str, ...]
    added_parameters: int
    left: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Removal:
    """Holds the accuracies before and after a changed network was made plain.

    Attributes:
        accuracy_before: share of the loader's images that the changed network classified right; None without a loader.
        accuracy_after: the same for the plain network.
    """

    accuracy_before: float | None
    accuracy_after: float | None


def replace_modules(network: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Replace modules of a network by others.

    Args:
        network: the network to change, in place.
        replacements: the new modules, by dotted name.
    """
    places = [(network.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in replacements]
    for (parent, name), module in zip(places, replacements.values(), strict=True):
        setattr(parent, name, module)


def as_buffers(module: M, *, persistent: bool = True) -> M:
    """Return a copy without parameters, so that neither an optimizer nor code that unfreezes layers trains it."""
    twin = copy.deepcopy(module)
    for layer in twin.modules():
        for name, param in [*layer.named_parameters(recurse=False)]:
            delattr(layer, name)
            layer.register_buffer(name, param.detach(), persistent=persistent)
    return twin


def find_all(module: nn.Module, kind: type[M]) -> dict[str, M]:
    """Return the modules of a class, by dotted name."""
    return {path: child for path, child in module.named_modules() if isinstance(child, kind)}


def path_of(root: nn.Module, module: nn.Module) -> str:
    """Return the dotted name of a module inside another."""
    path: str = next(path for path, child in root.named_modules() if child is module)
    return path


def is_ours(module: nn.Module) -> bool:
    """Return whether this package attached the module."""
    return hasattr(module, "is_transfer_part")


class Structure(nn.Module):
    """Changes a network permanently, and saves in its state how to repeat the change; abstract.

    The state is a tensor, since some code expects only tensors in a state_dict.
    """

    callback: str  # the name of the callback that makes it
    remove: str  # the name of the function that takes it out
    composes = True  # with other changes of layers, and with a source task
    kinds: ClassVar[dict[str, type["Structure"]]] = {}  # all there are, by the name that a spec has

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Structure.kinds[cls.__name__] = cls

    @classmethod
    def rebuild(cls, root: nn.Module, path: str, spec: dict[str, Any]) -> None:
        """Change a network as the spec of a structure at a path says, unless it is changed so already."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Return the options to build this again: plain data, equal for equal structures."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """Return the spec, with its kind and the version of this package."""
        content = json.loads(json.dumps({"kind": type(self).__name__, **self.spec()}))  # as it is when it is read again
        return torch.tensor(list(json.dumps(stamped(content)).encode()))

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of another structure.

        Raises:
            TransferConfigError: the structures differ; the message lists the differences.
        """
        theirs, mine = read_spec(state) or {}, read_spec(self.get_extra_state()) or {}
        if not theirs:
            raise TransferConfigError(f"The state of {a_class(self)} is unreadable: {str(state)[:60]}.")
        different = differences(*({key: spec[key] for key in spec.keys() - KEYS} for spec in (theirs, mine)))
        if different:
            raise TransferConfigError(
                f"The checkpoint's network was changed in another way: {'; '.join(different)}. Pass the old options, "
                "or load it with lightning_transfer.load_from_checkpoint, which repeats the checkpoint's changes."
            )


def read_spec(state: Any) -> dict[str, Any] | None:
    """Return the spec in a structure's state, with its stamp; None for anything else.

    Raises:
        TransferConfigError: the spec is of another version, or damaged.
    """
    if not isinstance(state, Tensor) or state.ndim != 1 or state.dtype != torch.int64:
        return None
    numbers = state.tolist()
    text = bytes(number & 255 for number in numbers)
    if sum(mark in text for mark in MARKS) < 2:
        return None
    try:
        spec = json.loads(bytes(numbers))
    except (ValueError, RecursionError):
        spec = None
    unstamped(spec, "This network's state")
    return spec  # type: ignore[no-any-return]


def structures_in(weights: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dotted names and specs of the structures in a state_dict."""
    for key, state in weights.items():
        path, _, last = key.rpartition(".")
        if last == "_extra_state" and (spec := read_spec(state)) is not None:
            yield path, spec


def rebuild(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Rebuild the layer changes that are recorded in these weights.

    Raises:
        TransferConfigError: a change is of a kind that this version does not know, or has no place in the module.
    """
    for path, spec in structures_in(weights):
        kind = spec["kind"]
        if kind not in Structure.kinds:
            raise TransferConfigError(
                f"{path} is a {kind}; known now: {', '.join(Structure.kinds) or 'none'}. Load the checkpoint by "
                f"lightning_transfer.load_from_checkpoint of version {spec['version']}, which wrote it."
            )
        try:
            Structure.kinds[kind].rebuild(module, path, spec)
        except (AttributeError, LookupError, TypeError) as error:
            raise TransferConfigError(
                f"The checkpoint's {path!r} has no place in this {type(module).__name__}: {error}. Build the network "
                "in __init__ or configure_model, with the options of the run that wrote it."
            ) from error


class FrozenBatchNorm2d(nn.Module):
    """Normalises as a frozen BatchNorm: neither training nor `train()` changes its statistics or its weights.

    It is not a subclass of `_BatchNorm`, so code that synchronizes or unfreezes BatchNorms does not find it. Its output
    is bit-identical to the BatchNorm's in eval mode.

    Args:
        norm: the BatchNorm to copy.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> frozen, images = FrozenBatchNorm2d(norm), torch.randn(2, 3, 4, 4)
        >>> torch.equal(frozen(images), norm.eval()(images))
        True
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """Normalise (B, C, H, W) features by the frozen statistics."""
        return F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the same as a factor and a summand for each channel, both (C,)."""
        scale = (self.running_var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else shift + self.bias

"""Find out which layers of a network run on a picture, in which order, and where their outputs go."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_transfer.batches import either, kind_of, label_places, labels_in, ways_to_be_right
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import a_class
from lightning_transfer.randomness import restored
from lightning_transfer.twins import RunsOriginalError, only_copies_run

SIZES = (64, 224, 32)  # of the pictures to try
ALIKE = 0.05  # by which share of the largest score two ways to the same scores may differ, at half precision too
LAYERS = (_ConvNd, _NormBase, nn.LayerNorm, nn.Linear)


@dataclass
class Call:
    """Holds one run of a layer.

    Attributes:
        path: dotted name of the layer.
        taken: its input.
        given: its output.
        num_takers: how many operations took that output.
    """

    path: str
    taken: Tensor
    given: Tensor
    num_takers: int = 0


class _Takers(TorchFunctionMode):
    """Counts, for each tensor, the operations that take it and return a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self._held: list[Any] = []  # an id is unique only while its tensor is alive

    def take(self, given: Any) -> None:
        """Count the tensors in a nested value as taken once more."""
        self.counts.update({id(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._held.append((args, kwargs))
            self.take((args, kwargs))
        return result


def trace(
    network: nn.Module,
    example: Any = None,
    watched: Callable[[nn.Module], bool] | None = None,
    *,
    otherwise: str = "",
) -> list[Call]:
    """Return the layers that run on a picture, in order; a copy of the network runs, in eval mode.

    Several sizes of the picture are tried until one works. If none does, return the layers that ran for the size that
    got furthest, since usually only a head needs another size.

    Args:
        network: takes (1, channels, height, width).
        example: a batch to try before pictures of noise.
        watched: returns whether a module counts as a layer; by default convolutions, norms and Linears do.
        otherwise: another fix that the error shows, for example ", or ...".

    Raises:
        TransferConfigError: no layer ran, the network cannot be copied, or its copy runs the original.
    """
    twin = _copied(network).eval()
    failure: Exception | None = None
    longest: list[Call] = []
    for images in [*([] if example is None else [example]), *_pictures(twin)]:
        calls: list[Call] = []
        watching = _watching(twin, calls, watched or (lambda layer: isinstance(layer, LAYERS)))
        with only_copies_run(network, twin), watching as takers:
            try:
                takers.take(twin(images))
                failure = None
            except RunsOriginalError:  # the layers that it runs would be missing
                raise
            except Exception as error:  # a network may raise anything for a picture that does not fit
                failure = error
        for call in calls:
            call.num_takers = takers.counts[id(call.given)]
        longest = max(longest, calls, key=len)
        if failure is None:
            break
    if not longest:
        raise TransferConfigError(
            f"{type(network).__name__} does not run on an image"
            f"{'' if failure is None else f' ({type(failure).__name__}: {failure})'}, so the order of its layers is "
            f"not known. Set example_input_array in the LightningModule{otherwise}."
        )
    return longest


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except RuntimeError as error:
        if "deepcopy protocol" not in str(error):  # torch's words for a tensor that is not a leaf
            raise
        raise TransferConfigError(
            f"{type(network).__name__} cannot be copied to see in which order its layers run: it has a weight that is "
            "computed from others. Use torch.nn.utils.parametrizations.weight_norm in place of weight_norm, or call "
            "torch.nn.utils.prune.remove on pruned layers first."
        ) from error


@contextmanager
def _watching(network: nn.Module, calls: list[Call], watched: Callable[[nn.Module], bool]) -> Iterator[_Takers]:
    """Append the layers that run to `calls`."""

    def note(path: str, _: nn.Module, args: Any, given: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(given, Tensor):
            calls.append(Call(path, args[0], given))

    with ExitStack() as hooks, _forked(network), torch.no_grad(), _Takers() as takers:
        for path, layer in network.named_modules():
            if watched(layer):
                hooks.enter_context(layer.register_forward_hook(partial(note, path)))
        yield takers


def _forked(network: nn.Module) -> AbstractContextManager[None]:
    """Keep the random state of the CPU and of the network's own GPUs; by default torch initializes all GPUs."""
    return torch.random.fork_rng({param.device.index for param in network.parameters() if param.is_cuda})


def required_size(network: Any) -> tuple[int, int] | None:
    """Return the only height and width that a network takes, as timm's `img_size=` sets it; None if it takes others."""
    patches = getattr(network, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    return size if getattr(patches, "strict_img_size", False) and isinstance(size, tuple) else None


def _pictures(network: nn.Module, size: tuple[int, int] | None = None) -> Iterator[Tensor]:
    """Yield pictures of noise, by default of several sizes; a size that timm says the network takes comes first."""
    convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    if not convs:
        return
    guesses = convs[0].in_channels, min(conv.in_channels for conv in convs)  # of the picture's channels
    config = getattr(network, "pretrained_cfg", None) or {}
    listed = config.get("input_size") if config.get("fixed_input_size") else None
    sizes = [required_size(network), listed and tuple(listed[1:]), *((side, side) for side in SIZES)]
    for number, sides in product(dict.fromkeys(guesses), dict.fromkeys(filter(None, [size] if size else sizes))):
        yield torch.rand(1, number, *sides, generator=torch.Generator().manual_seed(0)).to(convs[0].weight)


def run_on_a_picture(network: nn.Module, size: tuple[int, int] | None = None) -> Any:
    """Run a network on pictures of noise, of one size or of several, until one works, and return its output."""
    failure: Exception | None = None
    for images in _pictures(network, size):
        try:
            with _forked(network):
                return network(images)
        except Exception as error:  # it may raise anything for a picture that does not fit
            failure = error
    raise TransferConfigError(f"{type(network).__name__} does not run on an image.") from failure


def runs_on_a_picture(network: nn.Module, size: tuple[int, int] | None = None) -> bool:
    """Return whether a network runs on a picture of noise, of one size or of any of several."""
    try:
        run_on_a_picture(network, size)
    except TransferConfigError:
        return False
    return True


def comes_out(scores: Tensor, output: Any, *, alike: float = ALIKE) -> bool:
    """Return whether a network gives these (B, classes) scores or probabilities; True if no output has their size.

    Args:
        scores: of its head.
        output: of the network: a tensor, or tensors in containers. Those with as many numbers as the scores are
            compared.
        alike: by which share of the largest number they may differ.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0]])
        >>> comes_out(scores, {"probabilities": scores.softmax(1)}), comes_out(scores, scores / 2)
        (True, False)
    """
    scores = scores.float().flatten(1)
    known = scores, scores.softmax(1), scores.log_softmax(1), scores.sigmoid()
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.numel() == scores.numel()]
    pairs = product([leaf.float().reshape(scores.shape) for leaf in leaves], known)
    return not leaves or any((one - other).abs().max() <= alike * other.abs().max() for one, other in pairs)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode without gradients, and put each layer back in its own mode at the end.

    `eval()` is not called: a class may override it, to merge weights for example, which nothing here would undo.
    """
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    try:
        for layer, _ in modes:
            layer.training = False
        with torch.no_grad():
            yield
    finally:
        for layer, was_training in modes:
            layer.training = was_training


def images_and_labels(
    batch: Any,
    device: torch.device,
    *,
    otherwise: str = "Let its collate_fn give them, or pass [(batch[...], batch[...]) for batch in loader].",
) -> tuple[Tensor, Tensor]:
    """Return a loader's batch as images and labels on a device; `otherwise` is the fix if it does not hold them.

    Raises:
        TransferConfigError: the batch is not (images, labels), or several entries may be the labels.
    """
    if len(places := label_places(batch)) > 1:
        raise TransferConfigError(f"{either(places, '(batch[0], batch[{}]) for each batch')} {otherwise}")
    labels = labels_in(batch) if isinstance(batch, list | tuple) else None
    if not isinstance(labels, Tensor) or not isinstance(batch[0], Tensor):
        raise TransferConfigError(f"The loader gives {a_class(batch)}; expected (images, labels). {otherwise}")
    return batch[0].to(device), labels.to(device)


def share_right(
    module: nn.Module, loader: Iterable[Any] | None, *, after: Callable[[], None] = lambda: None
) -> float | None:
    """Return the share of a loader's images that a module classifies right, in eval mode; None without a loader.

    Args:
        module: gives (B, classes) logits.
        loader: batches of (images, labels).
        after: called after each batch.

    Raises:
        TransferConfigError: a batch is not (images, labels), or there is none, or the loader can be read only once.
    """
    if loader is None:
        return None
    if isinstance(loader, Iterator):  # after the change that is measured it would have nothing left
        raise TransferConfigError(
            f"loader= is {a_class(loader)}, which can be read once, and it is read before and after the change. "
            "Pass the DataLoader itself, or a list of batches."
        )
    device = next(module.parameters()).device
    with evaluating(module):
        return shares_right(lambda images: module(images)[None], loader, device, after=after)[0]


def shares_right(
    ask: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    device: torch.device,
    *,
    after: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the share of a loader's images that each of several networks has right.

    Args:
        ask: returns (networks, B, classes) logits of images.
        loader: batches of (images, labels).
        device: where images are moved to.
        after: called after each batch.

    Raises:
        TransferConfigError: a batch is not (images, labels), or there is none.
    """
    ways, several, num_images = torch.zeros(2, 1, dtype=torch.float64), 0.0, 0
    with restored():  # opening a loader draws a number
        for batch in loader:
            images, labels = images_and_labels(batch, device)
            logits = ask(images)
            kind = kind_of(labels, logits.shape[-1], is_binary=True)
            right, has_several = ways_to_be_right(logits, labels, kind)
            ways, several = ways + right.sum(2).cpu(), several + float(has_several)
            num_images += len(labels)
            after()
    if not num_images:
        raise TransferConfigError("The loader gave no images.")
    shares: list[float] = (ways[0 if several else 1] / num_images).tolist()
    return shares


def as_taken(images: Tensor, module: nn.Module) -> Tensor:
    """Cast float64 images, as numpy makes them, to the type of the module's numbers; return others unchanged."""
    if images.dtype != torch.float64:
        return images
    types = {param.dtype for param in module.parameters() if param.is_floating_point()}
    return images.to(types.pop()) if len(types) == 1 else images

"""Selection and rounds by hand, in numpy; shares no code with the package."""

from collections import Counter

import numpy as np

from tests.reference import selective


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bfloat16, halves to even, by its bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def convolve(images: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """(n, filters, height, width) responses in float64 where a filter lies wholly inside."""
    size = filters.shape[-1]
    windows = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64), (size, size), axis=(2, 3))
    return np.einsum("nchwij,fcij->nfhw", windows, filters.astype(np.float64), optimize=True)


def histograms(responses: list[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """(n, filters, bins) of bfloat16 responses, each bin raised by one position, in the float32 they are kept in."""
    found, first = [], 0
    for layer in responses:
        num_images, num_filters = layer.shape[:2]
        counts = np.ones((num_images, num_filters, edges.shape[1] + 1))
        for number in range(num_filters):
            for image in range(num_images):
                places = np.searchsorted(edges[first + number], bfloat16(layer[image, number]).ravel(), side="right")
                np.add.at(counts[image, number], places, 1)
        found.append((counts.astype(np.float32) / counts.sum(2, keepdims=True).astype(np.float32)).astype(np.float64))
        first += num_filters
    return np.concatenate(found, 1)


def layer_weights(responses: list[np.ndarray]) -> np.ndarray:
    """(filters,): layers count alike, and the filters of a layer alike."""
    return np.concatenate([np.full(layer.shape[1], 1 / len(responses) / layer.shape[1]) for layer in responses])


def distances(target: list[np.ndarray], source: list[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """(targets, source images) by brute force, from responses of each layer."""
    return selective.all_distances(histograms(target, edges), histograms(source, edges), layer_weights(target))


def gabor_filters(size: int, orientations: int = 6) -> np.ndarray:
    """(2 * orientations, 1, size, size), pixel by pixel."""
    reach, wavelength = size // 2, size / 2
    found = []
    for number in range(orientations):
        angle = np.pi * number / orientations
        for wave in (np.cos, np.sin):
            kernel = np.zeros((size, size))
            for row in range(size):
                for column in range(size):
                    x, y = column - reach, row - reach
                    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
                    envelope = np.exp(-(along**2 + 0.25 * across**2) / (2 * (0.56 * wavelength) ** 2))
                    kernel[row, column] = envelope * wave(2 * np.pi * along / wavelength)
            kernel -= kernel.mean()
            found.append(kernel / np.sqrt((kernel**2).sum()))
    return np.array(found)[:, None]


def answers(weights: dict, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether `toys.ToyNet` in evaluation is right, and its entropy in nats."""
    conv = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    maps = convolve(pixels, conv["model.conv.weight"]) + conv["model.conv.bias"][:, None, None]
    mean, variance = conv["model.bn.running_mean"], conv["model.bn.running_var"]
    scale = conv["model.bn.weight"] / np.sqrt(variance + 1e-5)
    maps = (maps - mean[:, None, None]) * scale[:, None, None] + conv["model.bn.bias"][:, None, None]
    logits = np.maximum(maps, 0).mean((2, 3)) @ conv["model.fc.weight"].T + conv["model.fc.bias"]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return logits.argmax(1) == labels, -(shares * np.log(shares)).sum(1)


def budgets(before: list[int], is_correct, entropy, *, k: int, limit: int, hard_entropy: float) -> list[int]:
    """The paper's rule, an image at a time."""
    after = []
    for budget, correct, unsure in zip(before, is_correct, np.asarray(entropy) >= hard_entropy, strict=True):
        more = 4 * k if not correct else 2 * k if unsure else 0
        after.append(max(budget, min(budget + more, limit)))
    return after


def borrowed_of_large_classes(lists, budget, labels, least: int) -> list[list[int]]:
    """Each target image's first neighbors without those of source classes that have too few borrowed images."""
    firsts = [list(row[:count]) for row, count in zip(lists, budget, strict=True)]
    sizes = Counter(labels[image] for image in {image for row in firsts for image in row})
    return [[image for image in row if sizes[labels[image]] >= least] for row in firsts]

"""Descriptors, distances and neighbors by loops in numpy float64; shares no code with the package."""

import math

import numpy as np


def histograms(responses: np.ndarray, edges: np.ndarray, smoothing: float) -> np.ndarray:
    num_images, num_filters = responses.shape[:2]
    found = np.full((num_images, num_filters, edges.shape[1] + 1), smoothing, dtype=np.float64)
    for image in range(num_images):
        for number in range(num_filters):
            for value in responses[image, number].ravel():
                place = sum(1 for edge in edges[number] if value >= edge)
                found[image, number, place] += 1
    return found / found.sum(2, keepdims=True)


def distance(p: np.ndarray, q: np.ndarray, weights: np.ndarray, eps: float = 2.2e-16) -> float:
    total = 0.0
    for weight, one, other in zip(weights, p, q, strict=True):
        for a, b in zip(one, other, strict=True):
            total += weight * 0.5 * (a * math.log((a + eps) / (b + eps)) + b * math.log((b + eps) / (a + eps)))
    return total


def all_distances(p: np.ndarray, q: np.ndarray, weights: np.ndarray, eps: float = 2.2e-16) -> np.ndarray:
    """Brute force, a query at a time: the formula as it stands, on whole arrays."""
    log_q = np.log(q + eps)
    rows = []
    for one in p:
        log_one = np.log(one + eps)
        terms = 0.5 * (one * (log_one - log_q) + q * (log_q - log_one))
        rows.append((terms.sum(2) * weights).sum(1))
    return np.array(rows)


def nearest(p: np.ndarray, q: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices (n, k), nearest first, equal distances by index."""
    distances = all_distances(p.astype(np.float64), q.astype(np.float64), weights.astype(np.float64))
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, 1), indices


def responses(image: np.ndarray, filters: np.ndarray) -> np.ndarray:
    height, width = image.shape[1] - filters.shape[2] + 1, image.shape[2] - filters.shape[3] + 1
    found = np.zeros((len(filters), height, width))
    for number, kernel in enumerate(filters):
        for row in range(height):
            for column in range(width):
                window = image[:, row : row + kernel.shape[1], column : column + kernel.shape[2]]
                found[number, row, column] = (window * kernel).sum()
    return found


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest number whose float32 bits end in sixteen zeros, the even one of two that are as near."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    kept, rest = bits >> 16, bits & 0xFFFF
    kept += (rest > 0x8000) | ((rest == 0x8000) & (kept % 2 == 1))
    return (kept << 16).astype(np.uint32).view(np.float32)


def counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(bins,) how many of the values lie between the edges; one on an edge is above it."""
    found = np.zeros(len(edges) + 1, dtype=np.int64)
    for value in values.ravel().tolist():
        found[sum(1 for edge in edges.tolist() if value >= edge)] += 1
    return found


def splits(values: np.ndarray) -> np.ndarray:
    """Every number of values that some edge can have below it."""
    ordered = sorted(values.ravel().tolist())
    firsts = [place for place, value in enumerate(ordered) if place == 0 or value != ordered[place - 1]]
    return np.array([*firsts, len(ordered)])


def gabor(size: int, orientations: int) -> np.ndarray:
    """(2 * orientations, size, size): wavelength half the size, envelope 0.56 of it along and twice that across."""
    wavelength, middle = size / 2, size // 2
    sigma = 0.56 * wavelength
    kernels = []
    for number in range(orientations):
        angle = number * math.pi / orientations
        for wave in (math.cos, math.sin):
            kernel = np.zeros((size, size))
            for row in range(size):
                for column in range(size):
                    x, y = column - middle, row - middle
                    along = x * math.cos(angle) + y * math.sin(angle)
                    across = -x * math.sin(angle) + y * math.cos(angle)
                    envelope = math.exp(-0.5 * (along / sigma) ** 2 - 0.5 * (0.5 * across / sigma) ** 2)
                    kernel[row, column] = envelope * wave(2 * math.pi * along / wavelength)
            kernel -= kernel.mean()
            kernels.append(kernel / math.sqrt((kernel**2).sum()))
    return np.array(kernels)

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


def responses(image: np.ndarray, filters: np.ndarray) -> np.ndarray:
    reach = filters.shape[-1] // 2
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    height, width = image.shape[1:]
    found = np.zeros((len(filters), height, width))
    for number, kernel in enumerate(filters):
        for row in range(height):
            for column in range(width):
                window = padded[:, row : row + kernel.shape[1], column : column + kernel.shape[2]]
                found[number, row, column] = (window * kernel).sum()
    return found

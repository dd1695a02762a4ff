"""k-nearest-neighbor accuracy, one image at a time, in float64."""

import numpy as np


def leave_one_out_accuracy(features: np.ndarray, labels: np.ndarray, k: int) -> float:
    correct = 0
    for i in range(len(labels)):
        similarity = [
            -np.inf
            if i == j
            else float(features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j]))
            for j in range(len(labels))
        ]
        nearest = [int(labels[j]) for j in sorted(range(len(labels)), key=lambda j: -similarity[j])[:k]]
        most = max(nearest.count(label) for label in nearest)
        correct += next(label for label in nearest if nearest.count(label) == most) == labels[i]
    return correct / len(labels)

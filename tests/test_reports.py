"""Pictures are written; what they look like was looked at."""

import lightning_transfer as lt


def test_learning_curves(tmp_path):
    curves = {"plain": [[0.2, 0.5, 0.6], [0.1, 0.4, 0.6]], "soft": [[0.3, 0.6, 0.7]]}
    lt.reports.learning_curves(curves, [10, 20, 30], tmp_path / "with.png", schedule=lt.Schedule(), title="Glyphs")
    lt.reports.learning_curves(curves, [10, 20, 30], tmp_path / "without.svg")
    assert (tmp_path / "with.png").read_bytes().startswith(b"\x89PNG")
    assert "plain" not in (tmp_path / "without.svg").read_text()[:100]

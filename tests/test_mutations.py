"""What is read after thousands of damages is right, or refused by name; `tests/mutating.py` runs more of them."""

import pytest

from tests.mutating import KINDS, mutations


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_or_state_is_refused_or_read_right(kind):
    """D7, D17."""
    found = mutations(kind, 600, seed=0)
    assert found.total() == 600
    assert found["refused"] > 500

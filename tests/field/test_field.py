"""Every method on every module of the table becomes what the table says; nothing raw, nothing silent."""

import pytest

import lightning_transfer as lt
from tests.field.runs import METHODS, as_found, take_out
from tests.field.shapes import SHAPES
from tests.field.table import TABLE, cells, counts, page

EACH = [pytest.param(*cell, id=f"{cell[0].__name__}-{cell[1]}") for cell in cells()]
CURED = [pytest.param(*cell, id=f"{cell[0].__name__}-{cell[1]}") for cell in cells() if cell[2].cure]


@pytest.mark.parametrize(("shape", "method", "cell"), EACH)
def test_as_it_comes(shape, method, cell):
    if cell.kind == "works":
        METHODS[method](shape, {})
        return
    with pytest.raises(UserWarning if cell.kind == "warned" else lt.TransferConfigError) as caught:
        METHODS[method](shape, {})
    missing = [words for words in cell.words if words not in str(caught.value)]
    assert not missing, str(caught.value)
    if method != "advise":
        assert caught.value.steps == 0
        take_out(caught.value.module)
        as_found(caught.value.module, besides=("training", "trainable"))  # which Lightning and the user's set


@pytest.mark.parametrize(("shape", "method", "cell"), CURED)
def test_with_what_the_message_names(shape, method, cell):
    METHODS[method](shape, cell.cure)


def test_every_method_works_on_most_modules():
    """In 70 % of the cells in which it makes sense, as it comes or with the argument that its message names."""
    assert set(TABLE) == set(SHAPES)
    shares = {method: works / of for method, (of, works, _) in counts().items()}
    print("\n".join(page()))  # shown by pytest -s
    assert not {method for method, share in shares.items() if share < 0.7}

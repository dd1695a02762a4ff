"""The stream's order is a function of seed and position alone, and its randomness is its own."""

import random

import numpy as np
import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.randomness import restored, seeded
from lightning_transfer.source.stream import SourceStream
from tests import toys
from tests.reference.twister import Twister


def stream(num=10, *, batch_size=4, rank=0, num_ranks=1, data=None, num_workers=0, **options):
    task = lt.SourceTask(data or toys.images(num, 7, seed=0), num_classes=7, **options)
    workers = {"num_workers": num_workers}
    return SourceStream(task, batch_size=batch_size, rank=rank, num_ranks=num_ranks, workers=workers)


def draw(source, batches):
    return [source.next_batch().indices.tolist() for _ in range(batches)]


def flat(batches):
    return [index for batch in batches for index in batch]


class Drawn(torch.utils.data.Dataset):
    """A sample is its index and a number from each generator that augmentations use."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return (index, torch.rand(()), np.random.rand(), random.random()), 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("batch_size", "rank", "num_ranks"), [(3, 0, 1), (2, 1, 3), (13, 0, 1)])
def test_images_and_augmentation_are_those_of_an_independent_generator(batch_size, rank, num_ranks, workers):
    """Within a turn, over its end, and over more than two turns."""
    seed, passes = 2**35 + 1, {}
    found = stream(data=Drawn(), batch_size=batch_size, rank=rank, num_ranks=num_ranks, num_workers=workers, seed=seed)
    found.seek(4)
    for start in range(4 + rank * batch_size, 60, batch_size * num_ranks):
        batch, own, words = found.next_batch(), Twister(seed, start), Twister(seed, start).words
        others = random.Random(own.value)
        pixels = [numbers.tolist() for numbers in batch.samples[0]]
        for position in range(start, start + batch_size):
            turn = position // 5
            passes.setdefault(turn, Twister(seed, turn).permutation(5))
        wanted = [passes[position // 5][position % 5] for position in range(start, start + batch_size)]
        assert batch.indices.tolist() == pixels[0] == wanted
        assert pixels[1] == own.floats(batch_size)
        assert pixels[2] == words.rand(batch_size).tolist()
        assert pixels[3] == [others.random() for _ in range(batch_size)]
    found.close()


def test_every_pass_is_another_permutation_of_all_images():
    order = flat(draw(stream(10, batch_size=4), 10))
    passes = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_together_draw_what_one_process_draws(num_ranks):
    alone = draw(stream(batch_size=4 * num_ranks), 6)
    shared = [draw(stream(rank=rank, num_ranks=num_ranks), 6) for rank in range(num_ranks)]
    assert [flat(parts) for parts in zip(*shared, strict=True)] == alone


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_from_a_position_everything_repeats_augmentation_included(cut, workers):
    data = toys.Augmented(toys.images(10, 7, seed=0))
    whole = stream(data=data)
    batches = [whole.next_batch() for _ in range(8)]
    rest = stream(data=data, num_workers=workers)
    rest.seek(4 * cut)
    for expected in batches[cut:]:
        found = rest.next_batch()
        assert found.indices.tolist() == expected.indices.tolist()
        assert (found.samples[0] == expected.samples[0]).all()
    assert rest.position == whole.position == 32
    rest.close()


def test_another_number_of_ranks_goes_on_at_the_same_place():
    alone = stream(batch_size=8)
    expected = draw(alone, 4)
    later = [stream(rank=rank, num_ranks=2) for rank in range(2)]
    for part in later:
        part.seek(16)
    assert flat(draw(part, 1)[0] for part in later) == expected[2]


def test_the_programs_random_state_is_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draw(stream(data=toys.Augmented(toys.images(10, 7, seed=0))), 3)
    assert (torch.get_rng_state() == before[0]).all()
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.parametrize("draw_some", [lambda: None, np.random.randn, np.random.rand], ids=["fresh", "a pair", "used"])
def test_numpys_state_is_restored_to_its_last_number(draw_some):
    """A normal number that is left of a pair included: numpy keeps it beside the generator."""
    np.random.seed(3)
    draw_some()
    before, other = np.random.get_state(), np.random.RandomState()
    other.set_state(before)
    with restored():
        assert np.random.randn(3).tolist() == other.randn(3).tolist()
    after = np.random.get_state()
    assert (after[1] == before[1]).all()
    assert after[2:] == before[2:]


def test_another_bit_generator_of_numpy_is_restored_without_a_warning():
    found = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        before = np.random.get_state(legacy=False)
        with seeded(0, 0):
            drawn = np.random.rand()
        assert np.random.get_state(legacy=False) == before
        with seeded(0, 0):
            assert np.random.rand() == drawn
    finally:
        np.random.set_bit_generator(found)


def test_seeds_differ():
    assert draw(stream(seed=0), 3) != draw(stream(seed=1), 3)


def test_closing_keeps_the_place():
    one, other = stream(), stream()
    draw(one, 2)
    one.close()
    draw(other, 2)
    assert draw(one, 3) == draw(other, 3)


@pytest.mark.parametrize(
    ("odd", "shown"),
    [
        ((torch.rand(3, 4, 4), None), r"\(Tensor\(3, 4, 4\), NoneType\)"),
        ((None, 1), r"\(NoneType, int\)"),
        (None, "NoneType"),
    ],
)
def test_a_sample_or_a_part_of_it_that_is_none_is_said_to_be_one(odd, shown):
    data = [(torch.rand(3, 4, 4), 0), (torch.rand(3, 4, 4), 1), odd, (torch.rand(3, 4, 4), 2)]
    with pytest.raises(lt.TransferConfigError, match=f"Source sample 2 is {shown}.*cannot hold None") as error:
        draw(stream(data=data), 1)
    assert "Resize" not in str(error.value)

"""Any stream of source images: every position has its image, however the stream is cut and shared out."""

from itertools import chain

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

import lightning_transfer as lt
from lightning_transfer.methods.selective.order import NeighborOrder
from lightning_transfer.source.stream import SourceStream


class Numbered(Dataset):
    """A sample is its index and a number from each generator that augmentations draw from."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return torch.stack([torch.tensor(float(index)), torch.rand(()), torch.tensor(np.random.rand()).float()]), 0


def task(num, seed=0):
    return lt.SourceTask(Numbered(num), num_classes=2, seed=seed)


def drawn(stream, batches):
    found = [stream.next_batch() for _ in range(batches)]
    return [batch.indices.tolist() for batch in found], torch.cat([batch.samples[0] for batch in found])


SIZES = {"num": st.integers(1, 40), "size": st.integers(1, 9), "seed": st.integers(0, 2**40)}


@given(**SIZES, batches=st.integers(1, 12), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_cut_anywhere_it_goes_on_as_if_it_had_not_been(num, size, seed, batches, cuts):
    whole = drawn(SourceStream(task(num, seed), batch_size=size), batches)
    ends = [*sorted(min(cut, batches) for cut in cuts), batches]
    place, indices, samples = 0, [], []
    for end in ends:
        stream = SourceStream(task(num, seed), batch_size=size)
        stream.seek(place * size)
        if end > place:
            more = drawn(stream, end - place)
            indices += more[0]
            samples.append(more[1])
        place = end
        assert stream.position == place * size
    assert indices == whole[0]
    assert torch.equal(torch.cat(samples), whole[1])


@given(**SIZES, ranks=st.integers(1, 5), rounds=st.integers(1, 6), place=st.integers(0, 100))
def test_ranks_share_out_what_one_process_draws(num, size, seed, ranks, rounds, place):
    one = SourceStream(task(num, seed), batch_size=size * ranks)
    one.seek(place)
    alone = drawn(one, rounds)[0]
    shared = []
    for rank in range(ranks):
        stream = SourceStream(task(num, seed), batch_size=size, rank=rank, num_ranks=ranks)
        stream.seek(place)
        shared.append(drawn(stream, rounds)[0])
        assert stream.position == place + rounds * size * ranks == one.position
    assert [list(chain(*parts)) for parts in zip(*shared, strict=True)] == alone


@given(**SIZES, turns=st.integers(1, 4))
def test_every_turn_has_every_image_once(num, size, seed, turns):
    batches = -(-num * turns // size)
    order = [*chain(*drawn(SourceStream(task(num, seed), batch_size=size), batches)[0])]
    for turn in range(turns):
        assert sorted(order[turn * num : (turn + 1) * num]) == list(range(num))


@given(st.data(), st.integers(0, 2**40))
def test_borrowed_images_are_neighbors_of_each_target_image_in_turn(data, seed):
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any))
    times = data.draw(st.lists(st.integers(1, 3), min_size=len(counts), max_size=len(counts)))
    pool = torch.arange(sum(counts)) + 100  # of each target image its own
    order = NeighborOrder(pool, torch.tensor(counts), torch.tensor(times), seed)
    owners = np.repeat(np.arange(len(counts)), counts)
    turn = sum(often for count, often in zip(counts, times, strict=True) if count)
    for start in (0, 3 * turn):
        found = owners[np.array(order(range(start, start + turn))) - 100]
        wanted = [often if count else 0 for count, often in zip(counts, times, strict=True)]
        assert np.bincount(found, minlength=len(counts)).tolist() == wanted
    starts = data.draw(st.lists(st.integers(0, 10**9), max_size=5))
    again = NeighborOrder(pool, torch.tensor(counts), torch.tensor(times), seed)
    batches = [order(range(start, start + turn + 2)) for start in starts]
    assert batches == [again(range(start, start + turn + 2)) for start in reversed(starts)][::-1]
    for start, batch in zip(starts, batches, strict=True):  # in a batch or one by one
        assert batch == [image for place in range(start, start + turn + 2) for image in again(range(place, place + 1))]

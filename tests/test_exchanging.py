"""Values that the processes of a run exchange leave nothing with torch."""

import weakref

import pytest
import torch.distributed as dist

from lightning_transfer import ranks


@pytest.mark.parametrize("fails", [False, True])
def test_a_group_of_processes_is_destroyed_with_the_work_it_was_made_for(fails, monkeypatch):
    def act():
        return 1 / (0 if fails else 1)

    made, destroyed = [], []
    make, destroy = dist.new_group, dist.destroy_process_group
    monkeypatch.setattr(dist, "new_group", lambda *args, **options: made.append(make(*args, **options)) or made[-1])
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: destroyed.append(group) or destroy(group))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if fails:
            with pytest.raises(ZeroDivisionError):
                ranks.from_first(act)
        else:
            assert ranks.from_first(act) == 1
        assert len(made) == 1
        assert destroyed == made
    finally:
        destroy()


def test_a_group_is_freed_when_its_threads_have_long_been_idle(monkeypatch):
    """torch before 2.8 hangs if a thread of the group still waits for the GIL, which the thread that frees it holds."""
    made, make = [], dist.new_group

    def remembered(*args, **options):
        group = make(*args, **options)
        made.append(weakref.ref(group))
        return group

    monkeypatch.setattr(dist, "new_group", remembered)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for number in range(3):
            assert ranks.from_first(lambda: 1) == 1
            assert [group() is not None for group in made] == [*[False] * number, True]
    finally:
        dist.destroy_process_group()

import itertools

import pytest
import torch

from anytok.codecs.training.loader import Order, RandomDataset, batches, derived


def take(order, count):
    return [[index for index, _ in batch] for batch in itertools.islice(order, count)]


@pytest.mark.parametrize(("items", "batch", "processes"), [(10, 3, 1), (10, 3, 2), (3, 4, 2)])
def test_epochs_follow_each_other_without_gap_or_overlap(items, batch, processes):
    rounds = 2 * items
    shares = [
        take(Order(items=items, batch=batch, seed=1, rank=r, processes=processes), rounds)
        for r in range(processes)
    ]
    stream = [index for step in zip(*shares) for part in step for index in part]
    epochs = [stream[i : i + items] for i in range(0, len(stream) - items + 1, items)]
    assert len(epochs) > 2
    assert all(sorted(epoch) == list(range(items)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_can_be_entered_anywhere():
    whole = itertools.islice(Order(items=7, batch=2, seed=3, rank=1, processes=2), 12)
    late = itertools.islice(Order(items=7, batch=2, seed=3, rank=1, processes=2, start=5), 7)
    assert list(whole)[5:] == list(late)  # indices and the seeds of their draws


def test_seeds_depend_on_every_part():
    seeds = [derived(0, "a", 1), derived(1, "a", 1), derived(0, "b", 1), derived(0, "a", 2)]
    assert len(set(seeds)) == 4
    assert derived(0, "a", 1) == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_known_seed():
    # Runs that lie on disks go on with the order they began with.
    assert derived(0, "order", 0) == int.from_bytes(bytes.fromhex(KNOWN), "little") >> 1


KNOWN = "85c716b9c622213a"


class Numbers(RandomDataset):
    def __len__(self):
        return 5

    def draw(self, index, rng):
        return torch.rand((), generator=rng) + index


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_depend_on_the_place_in_the_stream_alone(workers):
    order = Order(items=5, batch=4, seed=2)
    got = list(itertools.islice(batches(Numbers(), order, torch.stack, workers=workers), 3))
    again = itertools.islice(batches(Numbers(), order, torch.stack), 3)
    for batch, other in zip(got, again):
        assert torch.equal(batch, other)
    assert len({float(x % 1) for batch in got for x in batch}) == 12


def test_plain_data_sets_are_indexed():
    stream = batches([10, 20, 30], Order(items=3, batch=3, seed=0), list)
    assert sorted(next(stream)) == [10, 20, 30]

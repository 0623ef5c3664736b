from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from edadm.reconstruction.cache import Cache
from edadm.reconstruction.parking import Parking, held_tensors
from edadm.reconstruction.passes import PausedPasses
from tests.reconstruction.elsewhere import Elsewhere

CPU = torch.device("cpu")


class Network(nn.Module):
    """Two units with an open skip connection, two views of one tensor and a buffer of as many rows as a batch."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(4, 4)
        self.register_buffer("constant", torch.arange(12.0).view(3, 4))

    @torch.no_grad()
    def forward(self, x):
        constant, skip = self.constant, x * 2
        left, right = self.one(x).chunk(2, dim=1)
        out = self.two(left + skip)
        return out + right + skip + constant

    @property
    def units(self):
        return [("one", self.one), ("two", self.two)]


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network()


@pytest.fixture
def rows():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).split(3)


def passes(network, rows, cache):
    parking = Parking(cache, CPU, [*network.parameters(), *network.buffers(), *rows])
    done = {}

    def forward(batch):
        done[batch] = network(rows[batch])

    return PausedPasses(forward, len(rows), network.units, parking=parking), done


def walk(run):
    """Move all passes through both units and to their end."""
    for index in range(2):
        seen = [[run.input(index, batch).tensors[0].clone(), run.output(index, batch).clone()] for batch in range(2)]
    for batch in range(2):
        run._wake(batch)
        with torch.no_grad():
            run._passes[batch].switch()
    return seen


@pytest.mark.parametrize("place", ["elsewhere", "disk"])
def test_a_pass_that_waited_elsewhere_gives_the_same_bits(network, rows, place, tmp_path):
    cache = Elsewhere() if place == "elsewhere" else Cache("disk", tmp_path)
    run, done = passes(network, rows, cache)
    walk(run)
    for batch, part in enumerate(rows):
        assert torch.equal(done[batch], network(part))


def test_what_a_pass_holds_moves_and_what_the_network_owns_stays(network, rows):
    cache = Elsewhere()
    run, _ = passes(network, rows, cache)
    with run:
        run.inputs(1)
        assert not any(cache.holds(tensor) for tensor in (*network.parameters(), *network.buffers(), *rows))
        first, second = ([cache.holds(t) for t in held_tensors(waiting, 3)] for waiting in run._passes)
        assert sum(first) == 4 and not any(second)  # left, right, skip, left + skip; the batch that moved last is awake
        run.rest()
        assert sum(cache.holds(tensor) for tensor in held_tensors(run._passes[1], 3)) == 4


def test_views_of_one_tensor_keep_sharing_it(network, rows):
    cache = Elsewhere()
    run, _ = passes(network, rows, cache)
    with run:
        run.inputs(1)
        parked = [tensor for tensor in held_tensors(run._passes[0], 3) if cache.holds(tensor)]
        pointers = [tensor.untyped_storage().data_ptr() for tensor in parked]
        assert len(pointers) == 4 and len(set(pointers)) == 3


def test_only_what_is_new_or_written_to_is_copied_again(network, rows):
    cache = Elsewhere()
    run, _ = passes(network, rows, cache)
    with run:
        run.inputs(1)
        run.rest()
        before = len(cache.copies)
        run.input(1, 0)
        run.rest()
        assert len(cache.copies) == before
        run.input(1, 0)
        next(tensor for tensor in held_tensors(run._passes[0], 3) if tensor.shape == (3, 4)).add_(1)
        run.rest()
        assert len(cache.copies) == before + 1


def test_the_network_without_a_cache_apart_parks_nothing(tmp_path):
    cuda = torch.device("cuda")
    assert [Cache("device").is_apart_from(device) for device in (CPU, cuda)] == [False, False]
    assert [Cache("host").is_apart_from(device) for device in (CPU, cuda)] == [False, True]
    assert [Cache("disk", tmp_path).is_apart_from(device) for device in (CPU, cuda)] == [True, True]
    assert [dataclasses.replace(Cache(), place=place).serves(cuda) for place in ("device", "host")] == [True, False]

from __future__ import annotations

import pytest
import torch

from edadm.reconstruction.random import RandomSource, seeded

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.5, 0.25, 1.0])
def test_mask_has_the_shape_and_the_share_asked_for(p):
    mask = RandomSource(0, "unit").mask(0, "site", 0, torch.Size((7, 13, 101)), p, CPU)
    assert mask.dtype == torch.bool and mask.shape == (7, 13, 101)
    assert abs(mask.float().mean().item() - p) < 0.03  # six standard deviations of 9191 draws


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_masks_of_one_source_are_fresh_and_repeat_with_the_seed(p):
    def draw(seed, *keys):
        source = RandomSource(seed, *keys)
        return [source.mask(i, "site", 0, torch.Size((64,)), p, CPU) for i in range(3)]

    first = draw(1, "joint", "unit")
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, draw(1, "joint", "unit"), strict=True))
    for other in (draw(2, "joint", "unit"), draw(1, "weights", "unit"), draw(1, "joint", "unit2")):
        assert not torch.equal(first[0], other[0])


def test_indices_do_not_repeat_within_a_batch():
    source = seeded(3)("joint", "unit")
    for iteration in range(20):
        index = source.indices(iteration, 10, 10)
        assert index.dtype == torch.int64 and sorted(index.tolist()) == list(range(10))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_on_a_device_repeat_with_the_seed():
    device = torch.device("cuda")
    draws = [RandomSource(0, "unit").mask(0, "site", 0, torch.Size((1000,)), 0.5, device) for _ in range(2)]
    assert draws[0].device.type == "cuda" and torch.equal(*draws)
    assert 400 < int(draws[0].sum()) < 600

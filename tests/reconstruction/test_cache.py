from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm.errors import EdadmError
from edadm.reconstruction.cache import PLACES, Cache


def batches(sizes: list[int], shape: tuple[int, ...], channels_last: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, *shape, generator=generator) for size in sizes]
    return [part.contiguous(memory_format=torch.channels_last) if channels_last else part for part in parts]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    shape=st.sampled_from([(3, 2, 5), (1, 4, 4), (6, 1, 1), (0, 2, 2)]),
    channels_last=st.booleans(),
    place=st.sampled_from(PLACES),
)
@settings(deadline=None)
def test_stacked_batches_are_those_of_cat_with_its_strides(tmp_path_factory, sizes, shape, channels_last, place):
    images, times = batches(sizes, shape, channels_last), [torch.arange(size) for size in sizes]
    with Cache(place, tmp_path_factory.mktemp("cache") / "cache") as cache:
        whole = cache.stack(zip(images, times, strict=True), sizes)
        for found, parts in zip(whole, (images, times), strict=True):
            expected = torch.cat(parts)
            assert torch.equal(found, expected) and found.dtype == expected.dtype
            assert found.stride() == expected.stride()


def test_batches_without_tensors_stack_to_nothing():
    assert Cache().stack([[], []], [2, 2]) == []


def test_only_one_batch_is_alive_while_batches_are_stacked():
    alive = []

    def made():
        for _ in range(3):
            assert all(one() is None for one in alive[:-1])
            part = torch.ones(2, 2)
            alive.append(weakref.ref(part))
            yield [part]
            del part

    (whole,) = Cache("host").stack(made(), [2, 2, 2])
    assert whole.sum() == 12


def test_files_have_no_name_and_go_with_their_tensors(tmp_path):
    folder = tmp_path / "cache"
    with Cache("disk", folder) as cache:
        kept = cache.keep(torch.arange(2048.0))
        assert kept.untyped_storage().filename.startswith(str(folder)) and not list(folder.iterdir())
        assert cache.holds(kept) and not cache.holds(torch.ones(1))
        mapped = lambda: str(folder) in Path("/proc/self/maps").read_text()
        if os.path.exists("/proc/self/maps"):
            assert mapped()
            del kept
            assert not mapped()
    assert not folder.exists()


def test_what_a_killed_run_left_is_removed_first(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "left").write_bytes(bytes(100))
    with Cache("disk", tmp_path / "cache") as cache:
        assert not (tmp_path / "cache").exists()
        cache.keep(torch.ones(3))
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_named_with_the_remedy_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Cache("disk", tmp_path / "cache") as cache:
        with pytest.raises(EdadmError, match=r"no room for 4 MiB .*No space left on device.*EDADM_CACHE"):
            cache.keep(torch.zeros(2**20))
        assert not list((tmp_path / "cache").iterdir())


def test_impossible_places_are_errors():
    with pytest.raises(ValueError, match="choose one of device, host, disk"):
        Cache("tape")
    with pytest.raises(ValueError, match="needs a folder"):
        Cache("disk")


def test_a_unit_may_have_several_rows_for_each_of_the_calibration_set():
    (whole,) = Cache().stack([[torch.arange(6)], [torch.arange(2)]], [3, 1])
    assert whole.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]

from __future__ import annotations

import logging
import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from edadm.errors import Diverged, EdadmError
from edadm.sampling.ddim import Sampler
from edadm.sampling.generate import generate, generate_chunks, to_uint8, truncated_to_uint8
from edadm.sampling.guidance import ClassConditions, Guidance

SHAPE = (3, 8, 8)
CHUNK = 4
SAMPLER = Sampler("quad", 3, eta=0.5)


class Network(nn.Module):
    """A network whose output depends on the whole batch, so that a changed layout shows; counts its calls."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.calls = 0
        self.dtype = None

    def forward(self, x, t):
        self.calls += 1
        out = self.conv(x)
        self.dtype = out.dtype
        return x + 0.05 * out.tanh() + 0.1 * x.mean() + t.view(-1, 1, 1, 1) / 1e5


@pytest.fixture
def network():
    return Network()


def images(network, n, **changes):
    return generate(network, SAMPLER, n, **{"shape": SHAPE, "seed": 1234, "chunk": CHUNK} | changes)


def test_images_are_bytes_of_varied_value(network):
    made = images(network, 6)
    assert made.dtype == torch.uint8 and made.shape == (6, *SHAPE) and made.float().std() > 10


@given(n=st.integers(0, 11), kept=st.sets(st.integers(0, 2)))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_number_and_resuming_do_not_change_images(tmp_path_factory, n, kept):
    network, folder = Network(), tmp_path_factory.mktemp("chunks")
    whole = images(network, 12, folder=folder)
    for file in folder.iterdir():
        if int(file.stem.split("-")[1]) not in kept:
            file.unlink()
    network.calls = 0
    assert torch.equal(images(network, n, folder=folder), whole[:n])
    needed = set(range(-(-n // CHUNK)))
    assert network.calls == len(needed - kept) * len(SAMPLER.timesteps)


def test_a_killed_run_goes_on_with_the_same_bits(network, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 2 * CHUNK:
            raise Killed

    with pytest.raises(Killed):
        images(network, 10, folder=tmp_path, progress=kill)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(images(network, 10, folder=tmp_path), images(Network(), 10))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"chunk-{c:06d}.npz" for c in range(3)]


def test_chunks_are_sampled_when_they_are_asked_for_and_not_kept(network):
    expected = images(Network(), 10)
    made, alive = [], []
    for chunk in generate_chunks(network, SAMPLER, 10, shape=SHAPE, seed=1234, chunk=CHUNK):
        made.append(chunk.numpy().copy())
        alive.append(weakref.ref(chunk))
        assert network.calls == len(made) * len(SAMPLER.timesteps)
        assert sum(one() is not None for one in alive) == 1
    assert [len(part) for part in made] == [4, 4, 2]
    assert np.array_equal(np.concatenate(made), expected.numpy())


def flip(data: bytearray, position: int) -> bytearray:
    data[position] ^= 0xFF
    return data


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-40],
        lambda d: d[: len(d) // 2],
        lambda d: b"",
        lambda d: flip(d, len(d) // 2),
        lambda d: flip(d, 400),
    ],
    ids=["cut end", "half", "empty", "bit in the middle", "bit in the images"],
)
def test_a_corrupt_chunk_is_made_again(network, tmp_path, caplog, damage):
    expected = images(network, 8, folder=tmp_path)
    file = tmp_path / "chunk-000001.npz"
    file.write_bytes(damage(bytearray(file.read_bytes())))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(images(network, 8, folder=tmp_path), expected)
    assert "chunk-000001.npz is broken" in caplog.text and "chunk-000000" not in caplog.text
    assert torch.equal(torch.from_numpy(np.load(file)["images"]), expected[4:])


def test_chunks_of_another_size_are_not_used(network, tmp_path, caplog):
    images(network, 8, folder=tmp_path)
    assert torch.equal(images(network, 8, folder=tmp_path, chunk=2), images(network, 8, chunk=2))
    assert "broken" in caplog.text


def test_seeds_and_streams_give_other_images(network):
    first = images(network, 4)
    assert not torch.equal(images(network, 4, seed=1), first)
    assert not torch.equal(images(network, 4, stream="calibration"), first)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_network_call(network, precision, dtype):
    made = images(network, 4, precision=precision)
    assert network.dtype == dtype
    # 0.05 * 2**-9 of bfloat16, times 25 = sqrt((1 - a) / a) at timestep 800: under one level
    assert (made.int() - images(network, 4).int()).abs().max() <= 1


def test_unknown_precision_lists_the_choices(network):
    with pytest.raises(EdadmError, match="fp32, bf16, fp16"):
        images(network, 1, precision="int8")


def test_progress_counts_the_images_asked_for(network):
    seen = []
    images(network, 6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


def test_nothing_is_kept_of_a_diverged_chunk(network, tmp_path):
    with torch.no_grad():
        network.conv.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="step 1 of 3"):
        images(network, 4, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_impossible_numbers_are_errors(network):
    with pytest.raises(ValueError, match="-1 images"):
        images(network, -1)
    assert images(network, 0).shape == (0, *SHAPE)


def test_a_correction_reaches_the_sampler(network):
    assert not torch.equal(images(network, 2, correct=lambda k, t, x, eps: eps * 0.5), images(network, 2))


def test_rounding_equals_save_image(tmp_path):
    from PIL import Image
    from torchvision.utils import save_image

    values = torch.cat([torch.linspace(-1.2, 1.2, 3000), torch.arange(256) / 127.5 - 1 + 1 / 255]).repeat(3, 1)[:, None]
    save_image((values + 1) / 2, tmp_path / "image.png")
    saved = np.asarray(Image.open(tmp_path / "image.png")).transpose(2, 0, 1)
    assert np.array_equal(saved, to_uint8(values).numpy())


class Conditional(Network):
    """Knows the label of each image, and the whole batch."""

    def forward(self, x, t, class_labels):
        return super().forward(x, t) + 0.01 * class_labels.view(-1, 1, 1, 1)


@given(n=st.integers(1, 11), kept=st.sets(st.integers(0, 2)), scale=st.sampled_from([1.0, 3.0]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_number_and_resuming_do_not_change_guided_images(tmp_path_factory, n, kept, scale):
    folder, guidance = tmp_path_factory.mktemp("chunks"), Guidance(ClassConditions(10, 10), scale)
    whole = images(Conditional(), 12, folder=folder, guidance=guidance)
    for file in folder.iterdir():
        if int(file.stem.split("-")[1]) not in kept:
            file.unlink()
    assert torch.equal(images(Conditional(), n, folder=folder, guidance=guidance), whole[:n])


def test_the_condition_of_an_image_depends_on_its_number():
    seen = []

    class Watched(Conditional):
        def forward(self, x, t, class_labels):
            seen.append(class_labels.tolist())
            return super().forward(x, t, class_labels)

    conditions = ClassConditions(10, 10)
    images(Watched(), 8, guidance=Guidance(conditions, 3.0))
    labels = conditions.labels("evaluation", 1234, range(8)).tolist()
    calls = len(SAMPLER.timesteps)
    assert seen == [[10] * 4 + labels[:4]] * calls + [[10] * 4 + labels[4:]] * calls


def test_samples_may_be_latents_of_another_shape(network, tmp_path):
    def decode(z):
        return truncated_to_uint8(torch.nn.functional.interpolate(z, scale_factor=2))

    made = images(network, 6, to_images=decode, folder=tmp_path)
    assert made.shape == (6, 3, 16, 16) and made.dtype == torch.uint8
    assert torch.equal(images(Network(), 6, to_images=decode, folder=tmp_path), made)
    assert len(list(tmp_path.iterdir())) == 2


def test_latent_diffusion_cuts_where_others_round():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert truncated_to_uint8(values).tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 255]

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edadm.errors import EdadmError
from edadm.tasks.base import noise_prediction
from edadm.tasks.cifar10_tiny import cifar10_tiny
from tests.toys import tiny_unet


def test_the_embedded_denoiser_loads_through_diffusers_with_the_same_weights() -> None:
    from diffusers import UNet2DModel

    task = cifar10_tiny()
    own = task.denoiser().state_dict()
    theirs = UNet2DModel.from_pretrained(task.weights, torch_dtype=torch.float32).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in own.values())


def test_the_embedded_denoiser_fits_into_14_megabytes() -> None:
    assert sum(file.stat().st_size for file in cifar10_tiny().weights.iterdir()) <= 14e6


def test_a_denoiser_is_frozen_and_predicts_noise_of_the_sample_shape() -> None:
    task = cifar10_tiny()
    network = task.denoiser()
    x = torch.zeros(1, *task.sample_shape)
    assert noise_prediction(network)(x, torch.tensor([10])).shape == x.shape
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_the_hash_follows_the_weights(tmp_path: Path) -> None:
    hashes = []
    for seed in (0, 1):
        tiny_unet(seed).save_pretrained(tmp_path / str(seed))
        hashes.append(cifar10_tiny(str(tmp_path / str(seed))).sha256())
    assert hashes[0] != hashes[1]


def test_a_folder_without_weights_says_which_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EdadmError, match="safetensors is missing"):
        cifar10_tiny(str(tmp_path)).denoiser()
    with pytest.raises(EdadmError, match="does not exist"):
        cifar10_tiny(str(tmp_path / "nowhere")).sha256()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_a_checkpoint_name_the_tensor(tmp_path: Path, value: float) -> None:
    model = tiny_unet()
    model.conv_in.weight.data[0, 0, 0, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(EdadmError, match=r"conv_in\.weight has NaN or Inf"):
        cifar10_tiny(str(tmp_path)).denoiser()

from __future__ import annotations

import pytest
import torch
from torch import nn

from edadm.cost import Layer, bit_operations, layers_of, measure, model_size


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(6, 4, bias=False), nn.Linear(6, 8)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v = self.to_q(x), self.to_v(x)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q[:, None], q[:, None], v[:, None])[:, 0]
        return (q @ q.transpose(1, 2)).softmax(-1) @ v


def test_macs_of_convolutions_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, groups=2))
    first, second = measure(network, torch.zeros(1, 3, 7, 7))
    assert first == Layer("0", "conv", 8 * 7 * 7 * 3 * 9, (8, 3, 3, 3))
    assert second == Layer("2", "conv", 4 * 3 * 3 * 4 * 9, (4, 4, 3, 3))


@pytest.mark.parametrize("fused", [False, True])
def test_macs_of_attention_by_hand(fused: bool) -> None:
    network = nn.ModuleDict({"attention": Attention(fused)})["attention"]
    found = {layer.name: layer.macs for layer in measure(network, torch.zeros(1, 5, 6))}
    assert found == {"to_q": 5 * 6 * 4, "to_v": 5 * 6 * 8, "product0": 5 * 5 * 4, "product1": 5 * 5 * 8}


def test_a_layer_that_runs_twice_counts_twice_and_hooks_are_gone() -> None:
    linear = nn.Linear(3, 3)
    [layer] = measure(nn.Sequential(linear, linear), torch.zeros(1, 3))
    assert layer.macs == 18
    assert layer.weights == 9
    assert not linear._forward_hooks
    assert not linear._forward_pre_hooks


def test_bit_operations_by_hand() -> None:
    layers = [
        Layer("conv", "conv", 100, (2, 3, 3, 3), weight_bits=4, act_bits=8),
        Layer("edge", "conv", 10, (2, 1, 3, 3), weight_bits=8, act_bits=32),
        Layer("qk", "matmul", 20, None, weight_bits=8, act_bits=8),
    ]
    found = bit_operations(layers)
    assert found["macs"] == 130
    assert found["bit_operations"] == 100 * 32 + 10 * 256 + 20 * 64
    assert found["ratio_to_fp"] == (3200 + 2560 + 1280) / (130 * 1024)
    assert found["macs_by_kind"] == {"conv": 110, "matmul": 20}


def test_size_by_hand() -> None:
    layers = layers_of(
        [
            {"name": "a", "kind": "conv", "macs": 1, "weight_shape": [10, 5, 2, 2], "weight_bits": 4, "groups": 2},
            {"name": "b", "kind": "linear", "macs": 1, "weight_shape": (4, 25), "weight_bits": 8},
            {"name": "c", "kind": "linear", "macs": 1, "weight_shape": (2, 5), "weight_bits": 32},
        ]
    )
    found = model_size(layers, parameters=350, act_quantizers=3, act_sets=20)
    assert found["size_mb"] == pytest.approx((200 / 2 + 100 + 10 * 4 + 40 * 4) / 1e6)
    assert found["size_fp_mb"] == pytest.approx(350 * 4 / 1e6)
    assert found["weight_parameter_sets"] == 10 * 2 + 4
    assert found["act_parameter_sets"] == 60
    assert found["quantization_parameters_mb"] == pytest.approx((24 + 60) * 5 / 1e6)


def test_size_refuses_more_weights_than_parameters() -> None:
    with pytest.raises(ValueError, match="parameters"):
        model_size([Layer("a", "linear", 1, (10, 10))], parameters=99)


def test_the_cifar10_network_costs_what_the_survey_computed() -> None:
    """6.054 + 0.168 GMAC, 35.911 MB at 8 bits and 398.9 G bit operations with conv_out at W8A32."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        network = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            attention_head_dim=None,
        )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    layers = measure(network, torch.zeros(1, 3, 32, 32, device="meta"), torch.zeros(1, device="meta"))
    kinds = bit_operations(layers)["macs_by_kind"]
    assert (kinds["conv"] + kinds["linear"]) / 1e9 == pytest.approx(6.054, abs=5e-4)
    assert kinds["matmul"] / 1e9 == pytest.approx(0.168, abs=5e-4)
    eight = [Layer(x.name, x.kind, x.macs, x.weight_shape, 8, 32 if x.name == "conv_out" else 8) for x in layers]
    assert bit_operations(eight)["bit_operations"] / 1e9 == pytest.approx(398.9, abs=0.05)
    assert model_size(eight, parameters)["size_mb"] == pytest.approx(35.911, abs=5e-4)
    assert model_size(layers, parameters)["size_mb"] == pytest.approx(142.985, abs=5e-4)

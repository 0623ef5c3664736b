from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edadm.calibration.rows import CalibrationSet
from edadm.diagnostics.activation_range import FLOAT, QUANTILES, Extent, extents, measure
from edadm.diagnostics.inputs import Inputs
from edadm.keys import Run
from edadm.progress import Progress
from edadm.quant.network import QuantModel
from tests.toys import tiny_unet

Toy = Callable[..., Run]


def test_extent_of_several_tensors_is_that_of_all_their_values() -> None:
    extent = Extent("site")
    extent.update(torch.arange(0, 51.0).reshape(3, 17))
    extent.update(torch.arange(51, 101.0))
    assert (extent.low, extent.high) == (0, 100)
    assert extent.quantiles() == pytest.approx([1, 25, 50, 75, 99])


def test_extrema_are_exact_and_quantiles_close_where_values_are_sampled() -> None:
    extent = Extent("site")
    extent.update(torch.linspace(-1, 1, 200_001))
    assert (extent.low, extent.high) == (-1, 1)
    assert extent.quantiles() == pytest.approx([2 * q - 1 for q in QUANTILES], abs=0.02)


def rows(x: torch.Tensor) -> CalibrationSet:
    return CalibrationSet(x, torch.full((len(x),), 300), torch.zeros(len(x), dtype=torch.int64))


@pytest.fixture(scope="module")
def network() -> QuantModel:
    return QuantModel.wrap(tiny_unet(), FLOAT)


def test_the_first_layer_sees_the_input_and_the_products_see_shares(network: QuantModel) -> None:
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = extents(network, rows(x), 2, "cpu")
    assert (seen["conv_in.act_quantizer"].low, seen["conv_in.act_quantizer"].high) == (x.min(), x.max())
    assert seen["conv_in.act_quantizer"].quantiles() == pytest.approx(x.quantile(torch.tensor(QUANTILES)).tolist())
    shares = [extent for name, extent in seen.items() if name.endswith(".matmul.w")]
    assert shares and all(extent.low >= 0 and extent.high <= 1 for extent in shares)
    assert all(extent.low < float("inf") for extent in seen.values()), "every site was reached"


def test_the_halves_of_a_skip_have_ranges_of_their_own(network: QuantModel) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    split = next(layer for layer in network.layers.values() if layer.split is not None)
    inputs: list[torch.Tensor] = []
    handle = split.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    seen = extents(network, rows(x), 2, "cpu")
    handle.remove()
    for quantizer, half in zip(split.act_quantizers, (inputs[0][:, : split.split], inputs[0][:, split.split :])):
        assert (seen[quantizer.name].low, seen[quantizer.name].high) == (half.min(), half.max())


def test_looking_changes_nothing(network: QuantModel) -> None:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((2,), 300)
    plain = tiny_unet()
    with torch.no_grad():
        extents(network, rows(x), 2, "cpu")
        torch.testing.assert_close(network(x, t).sample, plain(x, t).sample)
    assert not any(handle for module in network.modules() for handle in module._forward_pre_hooks)
    assert isinstance(network.model, nn.Module)


def test_a_run_has_every_site_at_every_step_beside_its_quantizer(toy: Toy) -> None:
    run = toy("method=rtn")
    inputs = Inputs(run, Progress("toy"))
    values = measure(inputs)
    x = inputs.trajectories.x
    first = next(site for site in values["sites"] if site["name"] == "conv_in.act_quantizer")
    assert first["min"] == pytest.approx(x.flatten(1).min(1).values.tolist())
    assert first["max"] == pytest.approx(x.flatten(1).max(1).values.tolist())
    assert values["n"] == {"trajectories": 8, "steps": 4, "sampled elements": 2**15}
    assert first["quantizer"]["bits"] == 8
    step = (first["quantizer"]["high"] - first["quantizer"]["low"]) / 255
    [quantizer] = [q for q in inputs.quantized_network().activation_quantizers if q.name == first["name"]]
    assert step == pytest.approx(quantizer.scale.item())
    last = next(site for site in values["sites"] if site["name"] == "conv_out.act_quantizer")
    assert last["quantizer"] is None  # left in floating point by preset=released

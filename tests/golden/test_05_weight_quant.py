"""Ranges and dequantized values of weights, per output channel (golden README 6)."""

from __future__ import annotations

import torch

from edadm.quant.quantizer import WeightQuantizer, quantize_dequantize
from edadm.quant.ranges import MSE, MinMax
from edadm.quant.rounding import per_channel
from tests.golden.cases import assert_within, load

RULES = {
    "mse_sym": MSE().weight,
    "mse_asym": MSE(symmetric=False).weight,
    "max": MinMax().weight,
}
NOT_OFFERED = {"max_sym"}  # maps every negative value to 0 (6.5)
SIDES = {"no": (True, True), "pos": (False, True), "neg": (True, False)}


def score(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, levels: int) -> torch.Tensor:
    scale, zero_point = per_channel(scale, weight), per_channel(zero_point, weight)
    error = weight - quantize_dequantize(weight, scale, zero_point, levels)
    return error.double().abs().pow(2.4).flatten(1).mean(1)


def near_ties(weight, levels, ours, official) -> torch.Tensor:
    """Channels on another candidate than the official code whose score is as good (tolerance ``near_tie``).

    Candidates are a hundredth of the largest apart; a step that is off by less is no candidate.
    """
    mine, theirs = score(weight, *ours, levels), score(weight, *official, levels)
    apart = (ours[0] / official[0] - 1).abs()
    return ((mine - theirs).abs() <= 2e-6 * theirs) & ((apart <= 1e-6) | (apart >= 9e-3))


def test_weight_ranges_and_values_equal_official(golden):
    case, tensors = load(golden / "eda_ddim" / "05_weight_quant")
    tolerance, channels, moved = case["tolerance"], 0, 0
    assert {c["mode"] for c in case["cases"]} <= RULES.keys() | NOT_OFFERED
    for c in case["cases"]:
        weight, name = tensors[f"w.{c['weight']}"], c["name"]
        official = tuple(tensors[f"{name}.{kind}"].reshape(-1) for kind in ("delta", "zero_point"))
        if c["mode"] in RULES:
            ours = RULES[c["mode"]](weight, c["bits"])
            same = ((ours[0] - official[0]).abs() <= tolerance["delta_rel"] * official[0]) & (ours[1] == official[1])
            if c["mode"].startswith("mse"):
                same_score = near_ties(weight, 2 ** c["bits"], ours, official)
                channels, moved = channels + len(same), moved + int((~same & same_score).sum())
                same |= same_score
            assert same.all(), name

        quantizer = WeightQuantizer(c["bits"], name)
        quantizer.set(*official)
        expected = tensors[f"{name}.dequant"]
        unit = per_channel(weight.flatten(1).abs().amax(1), weight)[: len(expected)].expand_as(expected)
        dequantized = quantizer.hard(weight)[: len(expected)]
        assert_within(dequantized, expected, tolerance["dequant_rel_to_channel_max"], unit)
    assert moved <= 0.02 * channels


def test_one_sided_tensors_use_one_side(golden):
    case, tensors = load(golden / "eda_ddim" / "05_weight_quant")
    for c in case["cases"]:
        if c["one_side"] is None or c["mode"] in NOT_OFFERED:
            continue
        weight = tensors[f"w.{c['weight']}"]
        assert (bool(weight.min() < 0), bool(weight.max() > 0)) == SIDES[c["one_side"]], c["name"]
        _, zero_point = RULES[c["mode"]](weight, c["bits"])
        if c["one_side"] == "pos":
            assert (zero_point == 0).all()
        elif c["one_side"] == "neg" and c["mode"] == "mse_sym":
            assert (zero_point[weight.flatten(1).amin(1) < 0] == 2 ** c["bits"] - 1).all()

"""AdaRound: alpha, soft and hard weights, regulariser and gradients (golden README 8)."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from edadm.quant import rounding
from edadm.quant.quantizer import quantize_ste
from edadm.quant.rounding import per_channel
from tests.golden.cases import assert_close, assert_close_to_max, assert_within, load


def quantities(case: dict, tensors: dict, kind: str = "") -> tuple:
    """Weight, scale, zero point and number of levels of one case, and its tensors by short name."""
    of = {key.removeprefix(f"{case['name']}."): v for key, v in tensors.items() if key.startswith(f"{case['name']}.")}
    return (of["w"], of["delta"].reshape(-1), of["zero_point"].reshape(-1), 2 ** case["bits"]), of


def test_alpha_and_weights_equal_official(golden):
    file, tensors = load(golden / "eda_ddim" / "07_adaround")
    tolerance = file["tolerance"]
    for case in file["cases"]:
        (weight, scale, zero_point, levels), official = quantities(case, tensors)
        alpha = rounding.init_alpha(weight, scale)
        assert_within(alpha, official["alpha_init"], tolerance["alpha_init_abs"], 1)
        unit = per_channel(scale, weight).expand_as(weight)
        for suffix in ("_init", ""):
            alpha = official[f"alpha{suffix}"]
            assert_within(rounding.rectified_sigmoid(alpha), official[f"h{suffix}"], tolerance["h_abs"], 1)
            soft = rounding.soft_weight(weight, scale, zero_point, levels, alpha)
            hard = rounding.hard_weight(weight, scale, zero_point, levels, alpha >= 0)
            assert_within(soft, official[f"w_soft{suffix}"], tolerance["w_abs_rel_to_delta"], unit)
            assert_within(hard, official[f"w_hard{suffix}"], tolerance["w_abs_rel_to_delta"], unit)


def test_regulariser_and_its_schedule_equal_official(golden):
    file, tensors = load(golden / "eda_ddim" / "07_adaround")
    tolerance = file["tolerance"]
    for case in file["cases"]:
        _, official = quantities(case, tensors)
        for row in case["regulariser"]:
            beta = rounding.beta_schedule(row["iteration"], row["t_max"], *row["b_range"], row["warmup"])
            assert (beta is not None) == row["active"], row
            if beta is None:
                continue
            assert beta == pytest.approx(row["b"], abs=tolerance["b_abs"], rel=0)
            alpha = official["alpha"].clone().requires_grad_()
            loss = row["weight"] * rounding.regulariser([alpha], beta)
            assert loss.item() == pytest.approx(row["round_loss"], rel=tolerance["round_loss_rel"])
            key = f"reg_grad.T{row['t_max']}.it{row['iteration']}"
            if key in official:
                loss.backward()
                assert_close_to_max(alpha.grad, official[key], tolerance["grad_rel_to_max"])


def test_reconstruction_loss_and_gradients_equal_official(golden):
    file, tensors = load(golden / "eda_ddim" / "07_adaround")
    tolerance = file["tolerance"]
    operations = {"conv2d padding 1": lambda x, w: F.conv2d(x, w, padding=1), "linear": F.linear}
    for case in file["cases"]:
        (weight, scale, zero_point, levels), official = quantities(case, tensors)
        operation, x = operations[case["op"]], official["rec.x"]
        alpha = official["alpha"].clone().requires_grad_()
        step = official["rec.act_delta"].clone().requires_grad_()
        soft = rounding.soft_weight(weight, scale, zero_point, levels, alpha)
        out = operation(quantize_ste(x, step, official["rec.act_zero_point"], 2 ** case["act_bits"]), soft)
        target = operation(x, weight)
        assert_close_to_max(out, official["rec.out"], tolerance["loss_rel"])
        assert_close_to_max(target, official["rec.target"], tolerance["loss_rel"])
        error = (out - target).abs()
        assert_close(error.pow(2.4).sum(1).mean(), official["rec.loss_p2.4"], tolerance["loss_rel"])
        loss = error.pow(2).sum(1).mean()
        assert_close(loss, official["rec.loss"], tolerance["loss_rel"])
        loss.backward()
        assert_close_to_max(alpha.grad, official["rec.grad_alpha"], tolerance["grad_rel_to_max"])
        assert_close(step.grad, official["rec.grad_act_delta"], tolerance["grad_rel_to_max"])

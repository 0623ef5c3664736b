from __future__ import annotations

import pytest

from edadm.errors import EdadmError
from edadm.reconstruction.settings import Joint, TwoPhase


def test_joint_with_input_prob_1_reads_full_precision_in_blocks_and_the_prefix_in_layers():
    settings = Joint(10, lr_weight=0.1, lr_act=0.1, input_prob=1.0)
    assert [settings.phases(kind)[0].input_prob for kind in ("block", "layer", "matmul")] == [0.0, 1.0, 1.0]
    assert settings.phases("block")[0].quantized_prefix  # temb comes from the quantized network all the same


def test_two_phases_train_rounding_then_scales():
    weights, activations = TwoPhase(8, 2).phases()
    assert (weights.lr_weight, weights.lr_act, weights.activations, weights.cosine_weight) == (1e-3, None, False, False)
    assert (activations.lr_weight, activations.lr_act, activations.activations) == (None, 4e-4, True)
    assert (weights.quantized_prefix, activations.quantized_prefix) == (True, False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"excluded_layer": "first"}, "excluded_layer is 'first': choose one of registration, main_path"),
        ({"layer_loss_pass": "both"}, "layer_loss_pass is 'both': choose one of separate, shared"),
        ({"iterations": 0}, "iterations of phase joint is 0"),
        ({"input_prob": 3}, "input_prob is 3: it is a share, from 0 to 1"),
        ({"drop_prob": -0.5}, "drop_prob is -0.5"),
    ],
)
def test_impossible_settings_are_named(wrong, message):
    with pytest.raises(EdadmError, match=message):
        Joint(**{"iterations": 1, "lr_weight": 0.1, "lr_act": 0.1} | wrong).phases()

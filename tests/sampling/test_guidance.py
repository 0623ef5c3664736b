from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm.errors import EdadmError
from edadm.sampling.guidance import (
    ClassConditions,
    Guidance,
    combined,
    denoise_for,
    doubled,
    require_same_rows,
)
from edadm.sampling.noise import CALIBRATION, EVALUATION

X = torch.linspace(-2, 2, 6 * 4 * 2 * 2).reshape(6, 4, 2, 2)
T = torch.full((6,), 500)
CLASSES = ClassConditions(10, null_label=10)


class Network:
    """Knows its label; counts calls and rows; rows do not touch each other."""

    def __init__(self, channels: int = 4):
        self.calls: list[torch.Tensor] = []
        self.channels = channels

    def __call__(self, x, t, class_labels):
        self.calls.append(class_labels)
        eps = x.sin() + class_labels.view(-1, 1, 1, 1) * x.cos() + t.view(-1, 1, 1, 1) / 1000
        return torch.cat([eps, eps.cos()], dim=1)[:, : self.channels]


def bound(network, guidance, numbers=range(6), seed=0):
    return denoise_for(network, guidance, EVALUATION, seed, numbers)


def test_without_guidance_the_network_is_called_as_it_is():
    network = Network()
    assert bound(network, None) is network


def test_scale_one_is_the_conditional_prediction_in_one_call():
    network = Network()
    ours = bound(network, Guidance(CLASSES, 1.0))(X, T)
    labels = CLASSES.labels(EVALUATION, 0, range(6))
    assert [call.tolist() for call in network.calls] == [labels.tolist()]
    assert torch.equal(ours, network(X, T, labels))
    nearly = bound(network, Guidance(CLASSES, 1 + 1e-7))(X, T)
    torch.testing.assert_close(nearly, ours, rtol=0, atol=1e-5)


def test_other_scales_make_one_call_with_the_null_condition_first():
    network = Network()
    ours = bound(network, Guidance(CLASSES, 3.0))(X, T)
    labels = CLASSES.labels(EVALUATION, 0, range(6)).tolist()
    assert [call.tolist() for call in network.calls] == [[10] * 6 + labels]
    null, given_labels = network(X, T, torch.full((6,), 10)), network(X, T, torch.tensor(labels))
    torch.testing.assert_close(ours, null + 3 * (given_labels - null))


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.0, 5.0), (1.5, 7.0), (-1.0, -3.0)])
def test_the_guided_noise_by_hand(scale, expected):
    output = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    assert combined(output, scale).flatten().tolist() == [expected]


def test_channels_that_are_not_guided_stay_those_of_the_condition():
    null, conditional = torch.arange(8.0), torch.arange(8.0) + 10  # 4 of the noise, 4 of the variance
    output = torch.stack([null, conditional]).view(2, 8, 1, 1)
    assert combined(output, 2.0, 3).flatten().tolist() == [20, 21, 22, 13, 14, 15, 16, 17]
    assert combined(output, 2.0).flatten().tolist() == [20, 21, 22, 23, 24, 25, 26, 27]
    both = Guidance(CLASSES, 2.0, 3)
    assert bound(Network(8), both)(X, T).shape == (6, 8, 2, 2)


@given(cut=st.integers(1, 5), scale=st.floats(-2, 8), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_how_images_are_put_into_batches_does_not_matter(cut, scale, seed):
    guidance = Guidance(CLASSES, scale)
    whole = bound(Network(), guidance, seed=seed)(X, T)
    parts = [
        bound(Network(), guidance, numbers, seed)(X[numbers], T[numbers]) for numbers in (range(cut), range(cut, 6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_half_precision_outputs_are_combined_in_the_precision_of_the_samples():
    half = bound(lambda x, t, class_labels: class_labels.view(-1, 1, 1, 1).half() * 0.001, Guidance(CLASSES, 7.5))(X, T)
    null, label = torch.tensor(0.01).half().float(), CLASSES.labels(EVALUATION, 0, range(6)).half() * 0.001
    assert half.dtype == X.dtype
    torch.testing.assert_close(half.flatten(), null + 7.5 * (label.float() - null), rtol=0, atol=1e-7)


def test_guidance_without_a_null_condition_is_an_error():
    with pytest.raises(EdadmError, match=r"guidance scale 3 on a model without a null condition: choose scale 1"):
        Guidance(ClassConditions(10), 3.0)
    assert not Guidance(ClassConditions(10)).guides


def test_conditions_that_do_not_agree_are_errors():
    given_rows = {"encoder_hidden_states": torch.zeros(4, 7, 8)}
    for null in ({"class_labels": torch.zeros(1)}, {"encoder_hidden_states": torch.zeros(1, 6, 8)}):
        with pytest.raises(EdadmError, match="they must agree"):
            doubled(given_rows, null)
    with pytest.raises(EdadmError, match="2 rows of encoder_hidden_states: it must have one"):
        require_same_rows(given_rows, {"encoder_hidden_states": torch.zeros(2, 7, 8)})


@given(start=st.integers(0, 40), length=st.integers(1, 30), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_label_depends_on_its_image_number_only(start, length, seed):
    numbers = range(start, start + length)
    part = CLASSES.labels(EVALUATION, seed, numbers)
    assert part.dtype == torch.int64
    assert part.tolist() == CLASSES.labels(EVALUATION, seed, range(80))[start : start + length].tolist()


def test_as_many_images_of_every_class_in_an_order_of_its_own():
    labels = CLASSES.labels(EVALUATION, 0, range(50)).view(5, 10)
    assert labels.sort(dim=1).values.tolist() == [list(range(10))] * 5
    assert len({tuple(row) for row in labels.tolist()}) == 5
    first = labels.flatten().tolist()
    assert CLASSES.labels(CALIBRATION, 0, range(50)).tolist() != first
    assert CLASSES.labels(EVALUATION, 1, range(50)).tolist() != first


def test_labels_are_pinned():
    """Other labels mean other images for every record."""
    assert CLASSES.labels(EVALUATION, 1234, range(10)).tolist() == [6, 2, 9, 7, 8, 3, 1, 5, 0, 4]
    assert CLASSES.identity(EVALUATION)["version"] == 1


def test_a_label_may_be_a_token_of_an_embedding():
    table = torch.arange(22.0).view(11, 2)
    embedded = ClassConditions(10, 10, table)
    rows = embedded.rows(EVALUATION, 0, range(3))["encoder_hidden_states"]
    labels = embedded.labels(EVALUATION, 0, range(3))
    assert rows.shape == (3, 1, 2) and torch.equal(rows[:, 0], table[labels])
    assert embedded.null["encoder_hidden_states"].tolist() == [[[20.0, 21.0]]]
    with pytest.raises(EdadmError, match="11 rows, label 11 is out of its range"):
        ClassConditions(10, 11, table)


def test_identity_tells_conditions_and_scales_apart():
    made = [Guidance(CLASSES), Guidance(CLASSES, 2.0), Guidance(CLASSES, 2.0, 3), Guidance(ClassConditions(9, 9), 2.0)]
    assert len({str(guidance.identity(EVALUATION)) for guidance in made}) == 4

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.tasks.conversion import Source, convert, fill, original_arguments


def source_of(name):
    """A linear layer whose weight is the second half of the original's."""
    return Source("w", lambda t: t.unflatten(0, (2, -1))[1]) if name == "weight" else Source("b")


@pytest.fixture
def layer():
    with torch.device("meta"):
        return nn.Linear(3, 2)


def test_tensors_are_taken_from_where_they_are(layer):
    state = {"w": torch.arange(12.0).reshape(4, 3).half(), "b": torch.tensor([1.0, 2.0])}
    filled = fill(layer, convert(state, source_of, layer, "file"), "file")
    assert torch.equal(filled.weight, torch.tensor([[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]))
    assert torch.equal(filled.bias, torch.tensor([1.0, 2.0])) and not filled.training
    state["b"].zero_()
    assert torch.equal(filled.bias, torch.tensor([1.0, 2.0]))  # a copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "missing b"),
        ({"extra": torch.zeros(1)}, "unexpected extra"),
        ({"b": torch.zeros(3)}, r"b of shape \(3,\) does not give bias of shape \(2,\)"),
        ({"w": torch.zeros(5, 3)}, r"w of shape \(5, 3\) does not give weight of shape \(2, 3\)"),
    ],
)
def test_wrong_keys_and_shapes_are_named(layer, change, message):
    state = {"w": torch.zeros(4, 3), "b": torch.zeros(2)} | change
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(EdadmError, match=rf"file does not fit Linear: {message}"):
        convert(state, source_of, layer, "file")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "bias has NaN or Inf"),
        (torch.ones(2, dtype=torch.int32), "bias is torch.int32"),
    ],
)
def test_bad_values_are_named(layer, bias, message):
    with pytest.raises(EdadmError, match=message):
        fill(layer, {"weight": torch.zeros(2, 3), "bias": bias}, "file")


@dataclass(frozen=True)
class Params:
    width: int
    mult: tuple[int, ...] = (1,)


def test_arguments_of_an_original_constructor():
    read = original_arguments(
        {"width": 4, "mult": [1, 2], "dims": 2, "fp16": True}, Params, {"fp16"}, {"dims": 2}, "it"
    )
    assert Params(**read) == Params(4, (1, 2))
    for params, message in (
        ({"mult": [1]}, "no width"),
        ({"width": 4, "dims": 3}, "dims=3"),
        ({"width": 4, "x": 1}, "x=1"),
    ):
        with pytest.raises(EdadmError, match=f"it with these parameters cannot be converted: {message}"):
            original_arguments(params, Params, {"fp16"}, {"dims": 2}, "it")

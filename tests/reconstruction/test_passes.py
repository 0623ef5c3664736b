from __future__ import annotations

import gc
import weakref

import pytest
import torch
from greenlet import greenlet
from torch import nn

from edadm.errors import EdadmError
from edadm.reconstruction.passes import Arguments, PausedPasses, one_tensor


class Scale(nn.Module):
    """Multiply by a factor that can change; counts its calls."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, x, shift=None):
        self.calls += 1
        return x * self.factor if shift is None else x * self.factor + shift


class Skip(nn.Module):
    """a, then b with a companion, then c on the sum with the open skip connection."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Scale(2.0), Scale(3.0), Scale(5.0)

    @torch.no_grad()
    def forward(self, x):
        skip = self.a(x)
        return self.c(self.b(skip, shift=x) + skip)

    @property
    def units(self):
        return [("a", self.a), ("b", self.b), ("c", self.c)]


ROWS = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]


def passes(network, first=0, units=None):
    return PausedPasses(lambda i: network(ROWS[i]), len(ROWS), units or network.units, first)


def test_every_unit_runs_once_per_batch_and_gives_what_a_plain_pass_gives():
    network = Skip()
    with passes(network) as run:
        assert [call.tensors[0].tolist() for call in run.inputs(0)] == [[1, 2], [3]]
        assert [out.tolist() for out in run.outputs(0)] == [[2, 4], [6]]
        call = run.inputs(1)[1]
        assert call.positional[0].tolist() == [6] and call.named["shift"].tolist() == [3]
        assert run.outputs(1)[1].tolist() == [21]
        assert run.inputs(2)[1].tensors[0].tolist() == [27]
        assert run.outputs(2)[1].tolist() == [135] == network(ROWS[1]).tolist()
    assert network.a.calls == len(ROWS) + 1


def test_units_run_in_the_state_they_have_when_the_pass_moves_on():
    network = Skip()
    with passes(network) as run:
        run.inputs(0)
        network.a.factor = 10.0
        assert run.inputs(1)[1].tensors[0].tolist() == [30]


def test_units_before_the_first_are_not_stopped_at():
    network = Skip()
    with passes(network, first=2) as run:
        assert [call.tensors[0].tolist() for call in run.inputs(2)] == [[9, 18], [27]]
    assert network.c.calls == 0


def test_calls_from_outside_the_passes_do_not_stop():
    network = Skip()
    with passes(network) as run:
        run.inputs(1)
        assert network(ROWS[1]).tolist() == [135]
        assert run.outputs(1)[1].tolist() == [21]


def test_two_sets_of_passes_share_the_modules():
    network = Skip()
    with passes(network) as one, passes(network) as two:
        assert one.inputs(1)[1].tensors[0].tolist() == [6]
        network.a.factor = 1.0
        assert two.inputs(1)[1].tensors[0].tolist() == [3]
        assert one.inputs(2)[1].tensors[0].tolist() == [27]


def test_grad_mode_of_the_caller_is_kept_though_the_network_changes_its_own():
    network = Skip()
    with passes(network) as run:
        run.inputs(0)
        assert torch.is_grad_enabled()
        assert not run.outputs(0)[0].requires_grad
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    with torch.no_grad(), passes(network) as run:
        run.inputs(1)
        assert not torch.is_grad_enabled()


def test_activations_that_are_used_up_are_not_held():
    network = Skip()
    with passes(network) as run:
        used_up = weakref.ref(run.outputs(1)[0])
        run.inputs(2)
        assert used_up() is None


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("bac", "unit a is called before b"),
        ("abcx", "unit x is never called"),
    ],
)
def test_wrong_units_are_named(order, message):
    network = Skip()
    units = [(name, getattr(network, name, nn.Identity())) for name in order]
    with pytest.raises(EdadmError, match=message), passes(network, units=units) as run:
        for index in range(len(units)):
            run.outputs(index)


def test_a_unit_called_twice_is_named():
    network = nn.Sequential(one := Scale(1.0), one, Scale(2.0))
    run = PausedPasses(lambda _: network(ROWS[0]), 1, [("one", one), ("last", network[2])])
    with run, pytest.raises(EdadmError, match="one is called a second time"):
        run.inputs(1)


def test_a_unit_that_runs_again_is_stopped_at_once():
    network = nn.Sequential(one := Scale(2.0), Scale(3.0), one)
    units = [("one", one), ("last", network[1])]
    with PausedPasses(lambda _: network(ROWS[0]), 1, units, again=["one"]) as run:
        assert run.inputs(1)[0].tensors[0].tolist() == [2, 4]
        assert run.outputs(1)[0].tolist() == [6, 12]
    assert one.calls == 1
    last = Scale(5.0)
    network.append(last)
    with PausedPasses(lambda _: network(ROWS[0]), 1, [*units, ("end", last)], again=["one"]) as run:
        assert run.inputs(2)[0].tensors[0].tolist() == [12, 24]
    assert one.calls == 3


def test_arguments_without_an_entry_per_row_are_named_unless_they_are_shared():
    def forward(_):
        return unit(ROWS[0], shift=torch.tensor([1.0]))

    unit = Scale(2.0)
    with (
        pytest.raises(EdadmError, match=r"unit one gets tensors of shapes \(2,\), \(1,\), so not all"),
        PausedPasses(forward, 1, [("one", unit)]) as run,
    ):
        run.inputs(0)
    with PausedPasses(forward, 1, [("one", unit)], shared=["shift"]) as run:
        (call,) = run.inputs(0)
        assert len(call.tensors) == 1
        assert call.template().named["shift"].tolist() == [1.0]


def test_streams_of_tokens_are_one_output():
    image, context = torch.zeros(2, 3, 4), torch.ones(2, 5, 4)
    joined = one_tensor((context, image), "joint")
    assert joined.shape == (2, 8, 4) and joined[:, :5].all() and not joined[:, 5:].any()
    assert one_tensor((None, image), "joint") is image
    for wrong in ((image, image[0]), (), [image, context]):
        with pytest.raises(EdadmError, match="unit joint returns"):
            one_tensor(wrong, "joint")


def test_a_unit_must_return_a_tensor():
    unit = nn.LSTM(1, 1)
    run = PausedPasses(lambda _: unit(torch.zeros(1, 1)), 1, [("lstm", unit)])
    with run, pytest.raises(EdadmError, match="unit lstm returns tuple"):
        run.outputs(0)


def test_nothing_is_left_behind_after_an_error():
    network = Skip()
    gc.collect()
    before = sum(issubclass(type(thing), greenlet) for thing in gc.get_objects())
    with pytest.raises(RuntimeError, match="stop"), passes(network) as run:
        run.inputs(1)
        raise RuntimeError("stop")
    del run
    gc.collect()
    assert sum(issubclass(type(thing), greenlet) for thing in gc.get_objects()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_errors_of_the_network_reach_the_caller():
    network = Skip()
    network.c.factor = "x"
    with pytest.raises(TypeError), passes(network) as run:
        run.outputs(2)
    assert torch.is_grad_enabled()


def test_arguments_replace_tensors_in_order():
    call = Arguments((torch.ones(2), None, 3), {"temb": torch.zeros(1), "flag": True})
    assert [t.numel() for t in call.template().tensors] == [0, 0]
    positional, named = call.template().bind([torch.tensor(5.0), torch.tensor(7.0)])
    assert positional[0] == 5 and positional[1:] == (None, 3)
    assert named["temb"] == 7 and named["flag"] is True


def test_arguments_replace_tensors_inside_of_containers_and_keep_shared_ones():
    rotary = (torch.ones(5), torch.zeros(5))
    named = {"kwargs": {"mask": torch.zeros(1), "scale": 2.0}, "rotary": rotary, "last": torch.zeros(1)}
    call = Arguments((torch.ones(2), (torch.ones(3), None)), named, ("rotary",))
    assert [t.numel() for t in call.tensors] == [2, 3, 1, 1]
    template = call.template()
    assert template.named["rotary"] is rotary and [t.numel() for t in template.tensors] == [0, 0, 0, 0]
    positional, named = template.bind([torch.tensor(float(i)) for i in range(4)])
    assert (positional[0], positional[1][0], positional[1][1]) == (0, 1, None)
    assert named["kwargs"] == {"mask": 2, "scale": 2.0} and named["last"] == 3 and named["rotary"] is rotary

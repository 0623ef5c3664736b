"""Forward passes that wait before and behind every unit, so that no part of the network is ever computed twice.

Reconstruction needs, for every unit, its input and output in the full-precision network and its input in the quantized
one, where everything before it is already reconstructed. One greenlet per batch of rows runs a forward pass of the
whole network and stops at each unit: a path costs one forward pass in total, and holds only the activations that are
still needed (the current tensor and the open skip connections).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from edadm.errors import EdadmError
from edadm.reconstruction.parking import Parking


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, tensors nested in tuples, lists and dictionaries included.

    The first tensor is the main input, the others (temb, context, mask) its companions; all have one entry per row.
    shared: names of the arguments that hold one value for all rows (a rotary embedding) and are passed on as they are.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]
    shared: Collection[str] = ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments that have one entry per row, in order."""
        by_row = [value for name, value in self.named.items() if name not in self.shared]
        return [value for value in tree_leaves([*self.positional, *by_row]) if isinstance(value, torch.Tensor)]

    def template(self) -> Arguments:
        """Return the form of the call without the contents of its tensors, shared ones apart."""
        positional, named = self.bind([tensor.new_empty(0) for tensor in self.tensors])
        return Arguments(positional, named, self.shared)

    def bind(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments with the tensors replaced by ``tensors``, in order."""
        fresh = iter(tensors)

        def replace(argument: Any) -> Any:
            return tree_map(lambda value: next(fresh) if isinstance(value, torch.Tensor) else value, argument)

        positional = tuple(map(replace, self.positional))
        named = {name: value if name in self.shared else replace(value) for name, value in self.named.items()}
        return positional, named


def one_tensor(output: Any, unit: str) -> torch.Tensor:
    """Return what a unit puts out as one tensor: token streams (rows, tokens, channels) one after the other.

    The blocks of joint attention return a tuple of their streams, None where one ends. Raises EdadmError naming the
    unit for anything else that is no tensor.
    """
    if isinstance(output, torch.Tensor):
        return output
    streams = [stream for stream in output if stream is not None] if isinstance(output, tuple) else []
    if not streams or not all(isinstance(stream, torch.Tensor) and stream.ndim == 3 for stream in streams):
        found = type(output).__name__
        raise EdadmError(f"unit {unit} returns {found}: a unit must return one tensor, or streams of tokens")
    return streams[0] if len(streams) == 1 else torch.cat(streams, 1)


class _Pass(greenlet):
    """A forward pass over one batch of rows. It waits at stop 2i (the call of unit i) or 2i + 1 (behind it)."""

    stop: int
    rows: int = 0
    value: Any = None


class PausedPasses:
    """Forward passes over ``batches`` batches of rows that stop at each unit; a context manager.

    forward(i) runs the network on batch i, in the state (full precision or quantized) the network is in at that moment.
    units: (name, module) in execution order; each module is called exactly once in a forward pass and returns a tensor
    or streams of tokens. first: number of the first unit at which to stop. shared: names of arguments without rows.
    again: names of units that run once more later; they are stopped at the first time only. parking: where waiting
    passes put what they hold; without it everything stays on the device.

    ``inputs(i)`` and ``outputs(i)`` move all passes on, ``input(i, batch)`` and ``output(i, batch)`` one of them.
    Gradients are off inside the passes, the caller's own grad mode is untouched. Calls of the modules from outside the
    passes are not affected.
    """

    def __init__(
        self,
        forward: Callable[[int], object],
        batches: int,
        units: Sequence[tuple[str, nn.Module]],
        first: int = 0,
        shared: Collection[str] = (),
        again: Collection[str] = (),
        parking: Parking | None = None,
    ):
        self._names = [name for name, _ in units]
        self._shared, self._again = shared, again
        self._parking = parking
        self._awake: int | None = None
        self._passes = [_Pass(forward) for _ in range(batches)]
        for run in self._passes:
            run.stop = 2 * first - 1
        self._handles = []
        for index, (_, module) in enumerate(units[first:], first):
            self._handles.append(module.register_forward_pre_hook(self._before(index), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._behind(index)))

    def inputs(self, index: int) -> list[Arguments]:
        """Move every pass to the call of unit ``index`` and return the arguments, one per batch.

        Units on the way run in their present state. Raises EdadmError if units are not called once each, in order.
        """
        return [self.input(index, batch) for batch in range(len(self._passes))]

    def outputs(self, index: int) -> list[torch.Tensor]:
        """Let unit ``index`` run in its present state, batch after batch, and return its outputs."""
        return [self.output(index, batch) for batch in range(len(self._passes))]

    def input(self, index: int, batch: int) -> Arguments:
        """Move one pass to the call of unit ``index`` and return its arguments, on the device; see ``inputs``."""
        return self._advance(batch, 2 * index)

    def output(self, index: int, batch: int) -> torch.Tensor:
        """Let unit ``index`` run on one batch and return its output, on the device."""
        return self._advance(batch, 2 * index + 1)

    def rest(self) -> None:
        """Put away what the pass that moved last holds."""
        self._wake(None)

    def close(self) -> None:
        """Abandon the passes and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for run in self._passes:
            run.value = None
            with torch.no_grad():
                run.throw()
        self._passes = []

    def __enter__(self) -> PausedPasses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _advance(self, batch: int, stop: int) -> Any:
        self._wake(batch)
        run = self._passes[batch]
        while run.stop < stop:
            run.value = None
            with torch.no_grad():  # grad mode belongs to the thread, not to the greenlet: it is set anew at each switch
                run.switch() if run else run.switch(batch)
            if run.dead:
                raise EdadmError(
                    f"unit {self._names[(run.stop + 1) // 2]} is never called in a forward pass of the network: "
                    "correct units() of the denoiser's family"
                )
        return run.value

    def _wake(self, batch: int | None) -> None:
        """Let this pass alone have what it holds on the device."""
        if self._parking is None or batch == self._awake:
            return
        if self._awake is not None:
            self._parking.put_away(self._passes[self._awake], self._passes[self._awake].rows)
        if batch is not None:
            self._parking.bring_back(self._passes[batch])
        self._awake = batch

    def _before(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._is_due(2 * index):
                call = Arguments(positional, named, self._shared)
                cast(_Pass, getcurrent()).rows = _check_rows(call, self._names[index])
                self._wait(2 * index, call)

        return hook

    def _behind(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
            if self._is_due(2 * index + 1):
                self._wait(2 * index + 1, one_tensor(output, self._names[index]))

        return hook

    def _is_due(self, stop: int) -> bool:
        """Tell whether one of the passes is to wait here. Raises EdadmError when it should be elsewhere."""
        run = getcurrent()
        if not isinstance(run, _Pass) or run not in self._passes:
            return False
        if stop < run.stop + 1 and self._names[stop // 2] in self._again:
            return False
        if stop != run.stop + 1:
            raise EdadmError(self._disorder(stop, run.stop + 1))
        return True

    def _wait(self, stop: int, value: Any) -> None:
        run = cast(_Pass, getcurrent())
        run.stop, run.value = stop, value
        run.parent.switch()

    def _disorder(self, stop: int, expected: int) -> str:
        called = self._names[stop // 2]
        if stop < expected:
            return f"unit {called} is called a second time in a forward pass: a unit must be called once"
        due = self._names[expected // 2]
        return f"unit {called} is called before {due}: units() of the denoiser's family is not in execution order"


def _check_rows(call: Arguments, unit: str) -> int:
    """Return the number of rows of a call. Raises EdadmError when its tensors do not agree on it."""
    rows = {tuple(tensor.shape[:1]) for tensor in call.tensors}
    if len(rows) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in call.tensors)
        raise EdadmError(
            f"unit {unit} gets tensors of shapes {shapes}, so not all have one entry per row: name those that all rows "
            "share in shared_arguments of the denoiser's family"
        )
    return len(call.tensors[0])

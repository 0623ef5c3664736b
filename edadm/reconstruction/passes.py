"""Forward passes that wait before and behind every unit, so that no part of the network is ever computed twice.

Reconstruction needs, for every unit, its input and output in the full-precision network and its input in the quantized
one, where everything before it is already reconstructed. One greenlet per batch of rows runs a forward pass of the
whole network and stops at each unit: a path costs one forward pass in total, and holds only the activations that are
still needed (the current tensor and the open skip connections).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from edadm.errors import EdadmError


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call. The first tensor is the main input, the others (temb, context) its companions."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in order."""
        return [value for value in (*self.positional, *self.named.values()) if isinstance(value, torch.Tensor)]

    def template(self) -> Arguments:
        """Return the form of the call without the contents of its tensors."""
        positional, named = self.bind([tensor.new_empty(0) for tensor in self.tensors])
        return Arguments(positional, named)

    def bind(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments with the tensors replaced by ``tensors``, in order."""
        fresh = iter(tensors)

        def replace(value: Any) -> Any:
            return next(fresh) if isinstance(value, torch.Tensor) else value

        return tuple(map(replace, self.positional)), {name: replace(value) for name, value in self.named.items()}


class _Pass(greenlet):
    """A forward pass over one batch of rows. It waits at stop 2i (the call of unit i) or 2i + 1 (behind it)."""

    stop: int
    value: Any = None


class PausedPasses:
    """Forward passes over ``batches`` batches of rows that stop at each unit; a context manager.

    forward(i) runs the network on batch i, in the state (full precision or quantized) the network is in at that moment.
    units: (name, module) in execution order; each module is called exactly once in a forward pass and returns a tensor.
    first: number of the first unit at which to stop.

    ``inputs(i)`` and ``outputs(i)`` move all passes on. Gradients are off inside the passes, the caller's own grad mode
    is untouched. Calls of the modules from outside the passes are not affected.
    """

    def __init__(
        self, forward: Callable[[int], object], batches: int, units: Sequence[tuple[str, nn.Module]], first: int = 0
    ):
        self._names = [name for name, _ in units]
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
        return [self._advance(batch, 2 * index) for batch in range(len(self._passes))]

    def outputs(self, index: int) -> list[torch.Tensor]:
        """Let unit ``index`` run in its present state, batch after batch, and return its outputs."""
        return [self._advance(batch, 2 * index + 1) for batch in range(len(self._passes))]

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

    def _before(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._wait(2 * index, Arguments(positional, named))

        return hook

    def _behind(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                found = type(output).__name__
                raise EdadmError(f"unit {self._names[index]} returns {found}: a unit must return one tensor")
            self._wait(2 * index + 1, output)

        return hook

    def _wait(self, stop: int, value: Any) -> None:
        run = getcurrent()
        if not isinstance(run, _Pass) or run not in self._passes:
            return
        if stop != run.stop + 1:
            raise EdadmError(self._disorder(stop, run.stop + 1))
        run.stop, run.value = stop, value
        run.parent.switch()

    def _disorder(self, stop: int, expected: int) -> str:
        called = self._names[stop // 2]
        if stop < expected:
            return f"unit {called} is called a second time in a forward pass: a unit must be called once"
        due = self._names[expected // 2]
        return f"unit {called} is called before {due}: units() of the denoiser's family is not in execution order"

"""Tensors between host and device without making either wait: pinned memory, a stream of their own, events."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``; to a GPU through pinned memory, in the order of the current stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Transfer:
    """Tensors on their way to a device.

    side: a stream for the copies, so that they run beside the work that follows, which must not write to the sources;
    without it they run in line. copy: False where tensors that lie there already are read before anything writes to them.
    """

    def __init__(
        self, tensors: Sequence[Tensor], device: torch.device, side: torch.cuda.Stream | None = None, copy: bool = True
    ):  # fmt: skip
        self._event: torch.cuda.Event | None = None
        self.blocked = False  # whether ``wait`` made the host wait for a device
        source = tensors[0].device
        if source.type != "cuda" or device.type != "cpu":
            self._tensors = [t.to(device, copy=copy) for t in tensors]
            return
        current = torch.cuda.current_stream(source)
        stream = side or current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._tensors = [self._start(t, stream) for t in tensors]
            self._event = torch.cuda.Event()
            self._event.record(stream)

    @staticmethod
    def _start(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor.clone()
        tensor.record_stream(stream)
        landing = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return landing.copy_(tensor, non_blocking=True)

    @property
    def ready(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> list[Tensor]:
        """The tensors, in ordinary memory."""
        if self._event is None:
            return self._tensors
        self.blocked = not self.ready
        if self.blocked:
            self._event.synchronize()
        return [t.clone() if t.is_pinned() else t for t in self._tensors]

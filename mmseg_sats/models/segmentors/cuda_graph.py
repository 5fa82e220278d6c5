# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Passes of a frozen model that repeat with batches of one shape, run from a CUDA graph.

Of a small encoder, a GPU computes the kernels faster than Python starts them. A graph starts all of them at once.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmseg_sats.models.segmentor_output import SegmentorOutput

Pass = Callable[[Tensor], SegmentorOutput]

IN_A_ROW = 2
"""After how many batches of one shape in a row a graph is captured. The rehearsal before a training has as many."""


class NotCapturableError(Exception):
    """A pass does what a CUDA graph cannot hold. Nothing was captured, and the pass can be run as usual."""


def has_graphs(device: torch.device) -> bool:
    """Whether passes on this device can be captured."""
    return device.type == 'cuda'


class GraphedPass:
    """A pass without gradients, run from a CUDA graph as soon as two batches in a row have had the same shape.

    Batches of another shape are run as usual. So are all, which is logged, if the pass cannot be captured or the
    graph's output is not exactly the same.

    Args:
        capture: captures a pass for inputs like the given ones, and returns it; its output may be overwritten by the
            next call. :func:`capture_cuda_graph` if not given.
    """

    def __init__(self, capture: Callable[[Pass, Tensor], Pass] | None = None) -> None:
        self.capture = capture
        self.forget()

    def forget(self) -> None:
        """Drops the graph, as is needed if the model's tensors are no longer the same."""
        self._captured: Pass | None = None
        self._kind: Hashable = None
        self._in_a_row = 0
        self._given_up = False

    @property
    def captured(self) -> bool:
        """Whether batches of one shape are run from a graph."""
        return self._captured is not None

    def __call__(self, run: Pass, inputs: Tensor, kind: Hashable = None) -> SegmentorOutput:
        """The output for inputs (B, 3, H, W). It is valid until the next call.

        Args:
            run: the pass itself.
            inputs: of any shape, on one device.
            kind: what else must be the same for the graph to be used, e.g. the precision.
        """
        kind = (inputs.shape, inputs.stride(), inputs.dtype, inputs.device, kind)
        if self._captured is not None and kind == self._kind:
            # A new output, so that what one step has computed from it is not taken for the next.
            return replace(self._captured(inputs))
        output = run(inputs)  # which may call `forget`
        if self._captured is None:
            self._in_a_row = self._in_a_row + 1 if kind == self._kind else 1
            self._kind = kind
            if self._in_a_row == IN_A_ROW and not self._given_up:
                self._try_to_capture(run, inputs, output)
        return output

    def _try_to_capture(self, run: Pass, inputs: Tensor, expected: SegmentorOutput) -> None:
        try:
            captured = (self.capture or capture_cuda_graph)(run, inputs)
            reason = '' if expected.equals(captured(inputs)) else 'its output is not exactly the same'
        except NotCapturableError as error:
            reason = str(error)
        if reason:
            print_log(f"The old model's pass is not run from a CUDA graph: {reason}", logger='current')
            self._given_up = True
        else:
            self._captured = captured


def capture_cuda_graph(run: Pass, inputs: Tensor) -> Pass:
    """Captures a pass on a GPU.

    Args:
        run: the pass, without gradients and random numbers.
        inputs: (B, 3, H, W), like all later ones.

    Returns:
        The pass from its graph. It always writes its output to the same memory, and keeps the memory of the whole pass.

    Raises:
        NotCapturableError: the pass waits for the GPU, or there is not enough memory for it.
        RuntimeError: the capture failed for another reason. The process can then not go on.
    """
    held = inputs.clone()
    usual = torch.cuda.current_stream(inputs.device)
    _warm_up(run, held, usual)
    graph, read = torch.cuda.CUDAGraph(), ReadTensors()
    try:
        # Other threads, such as the one that copies batches into pinned memory, may use the GPU meanwhile.
        with torch.cuda.device(inputs.device), torch.cuda.graph(graph, capture_error_mode='thread_local'), read:
            output = run(held)
    except RuntimeError as error:
        torch.cuda.set_stream(usual)  # torch leaves its own as the current one
        raise RuntimeError(
            "the old model's pass cannot be captured in a CUDA graph: set model.graph_old_model=False"
        ) from (error.__context__ or error)

    def replay(images: Tensor, _: ReadTensors = read) -> SegmentorOutput:
        held.copy_(images)
        graph.replay()
        return output

    return replay


def _warm_up(run: Pass, inputs: Tensor, usual: torch.cuda.Stream) -> None:
    """Runs a pass once on a stream of its own, so that libraries make what they need for it outside of the graph.

    A pass that waits for the GPU is found here, because a capture that fails leaves torch in a bad state.
    """
    stream = torch.cuda.Stream(inputs.device)
    stream.wait_stream(usual)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.cuda.stream(stream):
            run(inputs)
    except RuntimeError as error:
        raise NotCapturableError(str(error).split('\n')[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
        usual.wait_stream(stream)


class ReadTensors(TorchDispatchMode):
    """Keeps the tensors that are read while it is active and were there before.

    A graph reads their memory in every replay but does not hold it: without this, what a cache of limited size has
    dropped (the layout of Swin's windows) could be overwritten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and keeps what it reads."""
        kwargs = kwargs or {}
        read = {_place(own): own for own in tree_leaves((args, kwargs)) if isinstance(own, Tensor)}
        self.tensors |= {place: own for place, own in read.items() if place not in self._made}
        result = func(*args, **kwargs)
        self._made |= {_place(own) for own in tree_leaves(result) if isinstance(own, Tensor)}
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

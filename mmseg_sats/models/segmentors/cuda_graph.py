# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Passes of a frozen model that repeat with batches of one shape, run from a CUDA graph.

Of a small encoder, a GPU computes the kernels faster than Python starts them. A graph starts all of them at once.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmseg_sats.models.segmentor_output import SegmentorOutput

Pass = Callable[[Tensor], SegmentorOutput]

IN_A_ROW = 3
"""After how many batches of one shape in a row a graph is captured."""


class GraphedPass:
    """A pass without gradients, run from a CUDA graph as soon as three batches in a row have had the same shape.

    Batches of another shape are run as usual, and so are all if the capture fails or the graph's output is not exactly
    the same, which is logged.

    Args:
        capture: captures a pass for inputs like the given ones, and returns it; its output may be overwritten by the
            next call. :func:`capture_cuda_graph` if not given.
    """

    def __init__(self, capture: Callable[[Pass, Tensor], Pass] | None = None) -> None:
        self.capture = capture or capture_cuda_graph
        self.forget()

    def forget(self) -> None:
        """Drops the graph, as is needed if the model's tensors are no longer the same."""
        self._captured: Pass | None = None
        self._kind: Hashable = None
        self._in_a_row = 0
        self._given_up = False

    def __call__(self, run: Pass, inputs: Tensor, kind: Hashable = None) -> SegmentorOutput:
        """The output for inputs (B, 3, H, W). It is valid until the next call.

        Args:
            run: the pass itself.
            inputs: of any shape, on one device.
            kind: what else must be the same for the graph to be used, e.g. the precision.
        """
        kind = (inputs.shape, inputs.stride(), inputs.dtype, inputs.device, kind)
        if self._captured is not None:
            # A new output, so that what one step has computed from it is not taken for the next.
            return replace(self._captured(inputs)) if kind == self._kind else run(inputs)
        self._in_a_row = self._in_a_row + 1 if kind == self._kind else 1
        self._kind = kind
        output = run(inputs)
        if self._in_a_row == IN_A_ROW and not self._given_up:
            self._try_to_capture(run, inputs, output)
        return output

    def _try_to_capture(self, run: Pass, inputs: Tensor, expected: SegmentorOutput) -> None:
        try:
            captured = self.capture(run, inputs)
            reason = '' if expected.equals(captured(inputs)) else 'its output is not exactly the same'
        except RuntimeError as error:  # what cannot be captured, or not enough memory
            reason = str(error).split('\n')[0]
        if reason:
            print_log(f"The old model's pass is not run from a CUDA graph: {reason}", logger='current')
        self._given_up = bool(reason)
        self._captured = None if reason else captured


def capture_cuda_graph(run: Pass, inputs: Tensor) -> Pass:
    """Captures a pass on a GPU.

    Args:
        run: the pass, without gradients, random numbers and questions to the GPU.
        inputs: (B, 3, H, W), like all later ones.

    Returns:
        The pass from its graph. It always writes its output to the same memory.

    Raises:
        RuntimeError: if it cannot be captured.
    """
    held = inputs.clone()
    # Once on a stream of its own before, so that libraries make what they need for it outside of the graph.
    stream = torch.cuda.Stream(inputs.device)
    stream.wait_stream(torch.cuda.current_stream(inputs.device))
    with torch.cuda.stream(stream):
        run(held)
    torch.cuda.current_stream(inputs.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that copies batches into pinned memory, may use the GPU meanwhile.
    with torch.cuda.device(inputs.device), torch.cuda.graph(graph, capture_error_mode='thread_local'):
        output = run(held)

    def replay(images: Tensor) -> SegmentorOutput:
        held.copy_(images)
        graph.replay()
        return output

    return replay

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""When a pass is captured and when it is run as usual. What a real graph gives is tested in test_on_gpu.py."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.models.segmentors.cuda_graph import (
    GraphedPass,
    NotCapturableError,
    Pass,
    ReadTensors,
)

WIDE, TALL = (2, 3, 4, 8), (2, 3, 8, 4)


class Recorded:
    """Passes that count their calls and write their output to the same memory, as a graph does."""

    def __init__(self, off_by: float = 0.0, error: str = '') -> None:
        self.off_by, self.error = off_by, error
        self.captures, self.replays, self.runs = 0, 0, 0

    def run(self, images: Tensor) -> SegmentorOutput:
        self.runs += 1
        return SegmentorOutput(images * 2, (images + 1,))

    def capture(self, run: Pass, inputs: Tensor) -> Pass:
        self.captures += 1
        if self.error:
            raise NotCapturableError(self.error)
        output = run(inputs.clone())

        def replay(images: Tensor) -> SegmentorOutput:
            self.replays += 1
            output.logits.copy_(images * 2 + self.off_by)
            output.features[0].copy_(images + 1)
            return output

        return replay

    def outputs(self, shapes: Iterable[tuple[int, ...]], kinds: Iterable[str] = ()) -> list[SegmentorOutput]:
        """Runs batches of these shapes, each with other images, and compares every output with the pass itself."""
        graphed, kinds, outputs = GraphedPass(self.capture), list(kinds), []
        for index, shape in enumerate(shapes):
            images = torch.full(shape, float(index))
            outputs.append(graphed(self.run, images, kinds[index] if kinds else None))
            assert torch.equal(outputs[-1].logits, images * 2)
            assert torch.equal(outputs[-1].features[0], images + 1)
        return outputs


def test_a_shape_that_repeats_is_captured_once_and_others_are_run_as_usual() -> None:
    passes = Recorded()
    passes.outputs([TALL, WIDE, WIDE, WIDE, TALL, WIDE, TALL, TALL, TALL])
    assert passes.captures == 1
    assert passes.replays == 1 + 2, 'the comparison, and two batches'
    assert passes.runs == 9 - 2 + 1, 'all batches but two, and the capture'


def test_nothing_is_captured_while_shapes_vary() -> None:
    passes = Recorded()
    passes.outputs([WIDE, TALL] * 6)
    assert (passes.captures, passes.runs) == (0, 12)


def test_a_graph_serves_only_what_it_was_captured_for() -> None:
    passes = Recorded()
    passes.outputs([WIDE] * 5, ['fp32'] * 3 + ['bf16', 'fp32'])
    assert passes.replays == 1 + 2


@pytest.mark.parametrize('fault', [dict(error='operation not permitted'), dict(off_by=1e-6)])
def test_what_cannot_be_captured_or_differs_is_run_as_usual(
    fault: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr('mmseg_sats.models.segmentors.cuda_graph.print_log', lambda text, logger: said.append(text))
    passes = Recorded(**fault)
    passes.outputs([WIDE] * 4 + [TALL] * 3 + [WIDE] * 3)
    assert passes.captures == 1
    reason = fault.get('error', 'its output is not exactly the same')
    assert said == [f"The old model's pass is not run from a CUDA graph: {reason}"]


def test_what_a_step_computed_from_an_output_is_not_taken_for_the_next() -> None:
    passes = Recorded()
    graphed = GraphedPass(passes.capture)
    for number in range(4):
        output = graphed(passes.run, torch.full(WIDE, float(number)))
        assert output.resized((8, 8)).unique().tolist() == [2.0 * number]
    assert passes.replays == 1 + 2


def test_what_is_not_captured_for_another_reason_ends_the_run() -> None:
    def capture(run: Pass, inputs: Tensor) -> Pass:
        raise RuntimeError('the process cannot go on')

    graphed, passes = GraphedPass(capture), Recorded()
    graphed(passes.run, torch.ones(WIDE))
    with pytest.raises(RuntimeError, match='cannot go on'):
        graphed(passes.run, torch.ones(WIDE))


def test_a_graph_is_dropped_when_the_model_is_another() -> None:
    """A model that is moved in its first pass, as an old model is, is captured with its second batch all the same."""
    passes = Recorded()
    graphed = GraphedPass(passes.capture)

    def move_and_run(images: Tensor) -> SegmentorOutput:
        graphed.forget()
        return passes.run(images)

    for pass_ in (move_and_run, passes.run, passes.run, move_and_run):
        graphed(pass_, torch.ones(WIDE))
    assert passes.captures == 1, 'a replay does not ask where the model is'
    graphed(move_and_run, torch.ones(TALL))
    assert not graphed.captured
    graphed(passes.run, torch.ones(TALL))
    assert graphed.captured
    assert passes.captures == 2


def test_what_a_pass_reads_and_did_not_make_is_kept() -> None:
    weight, mask, images = torch.ones(4, 3), torch.zeros(5, 4), torch.ones(5, 3)
    places = {tensor.data_ptr() for tensor in (images, weight, mask)}
    with ReadTensors() as read:
        made = images @ weight.T
        (made.flatten()[:4] + mask[0]).softmax(0)
    assert read.tensors.keys() == places

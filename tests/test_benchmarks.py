"""The tools behind `make bench`: medians, peaks, and the comparison with the ratios on file."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmseg.models import EncoderDecoder, MixVisionTransformer, SegformerHead

from benchmarks import __main__ as command
from benchmarks import against_stock, crp, growth, many_classes, throughput
from benchmarks.measure import Ratio, median_seconds, peak_bytes
from benchmarks.models import stage
from mmseg_sats.models.losses import UnbiasedDistillationLoss, crp_loss
from mmseg_sats.models.pixel_losses.shared import shared_losses


def test_functions_are_called_in_turns_and_the_first_calls_do_not_count() -> None:
    calls: list[str] = []
    medians = median_seconds({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, 7, warmup=2)
    assert calls == ['a', 'b'] * 9
    assert set(medians) == {'a', 'b'}


def test_the_median_of_what_each_call_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own, as no time is sure on a busy machine."""
    clock = [0.0]
    durations = iter([100, 1, 2, 3, 4, 5, 6, 700])

    def work() -> None:
        clock[0] += next(durations)

    clocks = SimpleNamespace(thread_time=lambda: clock[0], perf_counter=lambda: clock[0])
    monkeypatch.setattr('benchmarks.measure.time', clocks)
    assert median_seconds({'work': work}, 7, warmup=1) == {'work': 4}


def test_few_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match='fewer than 7'):
        median_seconds({}, repeats=6)


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak is read from Linux\'s /proc')
@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU\'s memory is measured there')
def test_the_peak_is_that_of_what_lives_at_one_time() -> None:
    size = 64 * 2**20

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.zeros(size // 4).add_(1)

    def all_together() -> None:
        [torch.zeros(size // 4).add_(1) for _ in range(3)]

    assert peak_bytes(one_after_the_other) == pytest.approx(size, rel=0.1)
    assert peak_bytes(all_together) == pytest.approx(3 * size, rel=0.1)


@pytest.mark.parametrize(
    ('before', 'now', 'more_is_better', 'worse'),
    [(1.0, 1.14, False, False), (1.0, 1.16, False, True), (1.0, 0.5, False, False),
     (2.0, 1.75, True, False), (2.0, 1.7, True, True), (2.0, 9.0, True, False)],
)
def test_worse_is_more_than_15_percent_on_the_wrong_side(
    before: float, now: float, more_is_better: bool, worse: bool
) -> None:
    assert command.got_worse(before, Ratio('x', now, more_is_better=more_is_better)) is worse


def test_the_check_prints_each_pair_and_names_what_got_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_file = tmp_path / 'ratios.json'
    on_file.write_text(json.dumps({'step': {'time': 1.0, 'memory': 1.1, 'gone': 1.0}}))
    monkeypatch.setattr(command, 'ON_FILE', on_file)
    measured = [Ratio('time', 1.3), Ratio('memory', 1.1)]
    monkeypatch.setattr(command, 'run', lambda name, *_: measured)
    assert command.main(['step', '--check']) == 1
    printed = capsys.readouterr().out
    assert 'step: time was 1, is 1.3' in printed
    assert 'step: gone is on file and was not measured' in printed
    assert 'memory was' not in printed
    assert '| memory' in printed
    assert command.main(['step', '--write']) == 0
    assert json.loads(on_file.read_text()) == {'step': {'time': 1.3, 'memory': 1.1}}
    assert command.main(['step', '--check']) == 0
    assert 'Nothing got worse.' in capsys.readouterr().out


@pytest.mark.parametrize(('seconds', 'exponent'), [((2, 18, 200), 2), ((5, 5, 5), 0), ((1, 1 / 3, 0.1), -1)])
def test_an_exponent_is_that_of_a_power(seconds: tuple[float, ...], exponent: float) -> None:
    own = growth.Growth('a step', 'pixels', (1, 3, 10), seconds, (1, 1, 1))
    assert own.exponent(own.seconds) == pytest.approx(exponent)


def test_what_the_attention_loss_is_compared_with_computes_the_same() -> None:
    blocks = [[crp.attention(64, block, 2, seed) for block in range(4)] for seed in (0, 1)]
    labels = crp.labels_on(64, batch=2)
    inputs = [tensor for own in blocks[0] for tensor in (own.query, own.key)]
    losses = [loss(*blocks, labels) for loss in (crp.loop_loss, crp_loss)]
    torch.testing.assert_close(*losses)
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_losses_at_full_size_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_classes, 'SIZE', 32)
    student, teacher, labels = many_classes._outputs(9)
    parts = {'output': UnbiasedDistillationLoss()}
    head = many_classes.SegformerHead(
        in_channels=[4], in_index=[0], channels=4, num_classes=9, norm_cfg=dict(type='BN')
    )
    found = shared_losses(head, parts, student, teacher, labels)['loss_output']
    x, old = student.resized((32, 32)), teacher.resized((32, 32))
    expected = many_classes.unbiased_distillation_at_full_size(x, old)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, student.logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_stock_mmseg_is_given_the_same_work() -> None:
    """The old model's logits, and a fine-tuning step whose loss and gradients are those of ours."""
    sats, tuned = (stage(method, 4, 1, crop_size=64, size='B0') for method in ('sats', 'finetune'))
    old = against_stock.stock_old_model(sats, 'B0', 4)
    with torch.no_grad():
        torch.testing.assert_close(old(sats.inputs), sats.model.old_model(sats.inputs).logits, rtol=1e-4, atol=1e-5)
    stock = against_stock.stock_step(tuned, 'B0', 5)
    assert {type(stock.model), type(stock.model.backbone), type(stock.model.decode_head)} == {
        EncoderDecoder, MixVisionTransformer, SegformerHead
    }  # fmt: skip
    stock.model.load_state_dict(tuned.model.state_dict())
    losses = []
    for one in (stock, tuned):
        one.model.double()
        one.inputs = one.inputs.double()
        torch.manual_seed(0)  # the same dropout and stochastic depth
        losses.append(one.loss())
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for theirs, ours in zip(stock.model.parameters(), tuned.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_every_benchmark_that_is_listed_is_there() -> None:
    folder = Path(command.__file__).parent
    tools = {'measure', 'models', 'voc_size', 'bundle', 'killed_run', 'stopwatch'}
    files = {path.stem for path in folder.glob('[!_]*.py')} - tools
    assert files == set(command.BENCHMARKS)


def test_the_hours_of_voc_15_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert throughput._voc_15_1() == [9568, 487, 299, 491, 500, 548]
    monkeypatch.setattr(throughput, '_voc_15_1', lambda: [49, 24, 25])
    # Of 24 images 3 steps an epoch, then 1 and 2; 30 epochs.
    assert throughput._hours(3600, 7200) == 30 * 3 + 30 * 3 * 2


def test_what_was_not_measured_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, 'ON_FILE', tmp_path / 'ratios.json')
    monkeypatch.setattr(command, 'run', lambda name, *_: [])
    assert command.main(['throughput', '--write']) == 0
    assert not (tmp_path / 'ratios.json').exists()


def test_one_precision_leaves_the_others_on_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / 'ratios.json'
    path.write_text(json.dumps({'throughput': {'bf16': 1.2, 'fp32': 1.3}, 'step': {'time': 1.0}}))
    asked = []
    monkeypatch.setattr(command, 'run', lambda *words: asked.append(words) or [Ratio('bf16', 1.1)])
    words = ['throughput', '--precisions', 'bf16', '--write', '--file', str(path)]
    assert command.main(words) == 0
    assert asked == [('throughput', 1, ['bf16'])]
    assert json.loads(path.read_text()) == {'throughput': {'bf16': 1.1, 'fp32': 1.3}, 'step': {'time': 1.0}}
    for wrong in (['step', '--precisions', 'bf16'], ['throughput', '--check', '--precisions', 'bf16']):
        with pytest.raises(SystemExit):
            command.main(wrong)


def test_throughput_prints_each_row_as_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def row(size: str, precision: str) -> tuple[list[str], list[Ratio]]:
        before = {'B0': '| ---', 'B2': '| B0 | bf16 | 429 |', 'B5': '| B2 | bf16 | not measured'}[size]
        assert capsys.readouterr().out.splitlines()[-1].startswith(before)
        if size == 'B2':
            raise torch.cuda.OutOfMemoryError
        return ['429'], [Ratio(f'{size}, {precision}', 1.2)]

    monkeypatch.setattr(throughput, 'device', lambda: torch.device('cuda'))
    monkeypatch.setattr(throughput, '_row', row)
    command.measure('throughput', str(tmp_path / 'ratios.json'), ['bf16'])
    assert [ratio['name'] for ratio in json.loads((tmp_path / 'ratios.json').read_text())] == ['B0, bf16', 'B5, bf16']
    assert capsys.readouterr().out == '| B5 | bf16 | 429 |\n\n'

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses of a batch that processes share are those of the whole batch: values and averaged gradients."""

import copy
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from mmseg_sats.datasets import SharedBatchSampler
from mmseg_sats.datasets.memory import shared_batches
from mmseg_sats.datasets.memory.shared_batches import share_of
from mmseg_sats.functional import over_ranks as module
from mmseg_sats.functional.features.prototype_replay import feature_sums
from mmseg_sats.functional.over_ranks import gather_over_ranks
from mmseg_sats.models import prototypes
from mmseg_sats.models.losses import over_ranks as losses
from mmseg_sats.models.losses.over_ranks import (
    labels_over_ranks,
    losses_over_ranks,
    max_over_ranks,
    mean_over_ranks,
    sum_over_ranks,
)
from mmseg_sats.utils.installed import CONFIGS
from tests.small_models import auxiliary_head_cfg, build, images, model_cfg, samples, save_weights

NORM = dict(type='GN', num_groups=2)
OLD, NEW, IGNORED = 3, 5, 255


class Group:
    """Threads in place of processes: reductions wait until all have come.

    Args:
        patch: puts them in the place of mmengine's.
        world_size: how many.
    """

    def __init__(self, patch: pytest.MonkeyPatch, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=300)
        self._rank = threading.local()
        self._given: list[Tensor] = [torch.empty(0)] * world_size
        for one in (module, prototypes):
            patch.setattr(one, 'all_reduce', self.all_reduce)
        patch.setattr(module, 'get_rank', lambda: self._rank.value)
        for one in (module, losses):
            patch.setattr(one, 'get_world_size', lambda: getattr(self._rank, 'size', 1))

    def all_reduce(self, tensor: Tensor, op: str = 'sum') -> None:
        if not hasattr(self._rank, 'value'):
            return  # outside of the group
        self._given[self._rank.value] = tensor
        self._barrier.wait()
        given = torch.stack([t.detach().clone() for t in self._given])
        self._barrier.wait()
        tensor.copy_(given.sum(0) if op == 'sum' else given.amax(0))
        self._barrier.wait()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What ``work(rank)`` gives on each rank."""
        results: list[Any] = [None] * self.world_size

        def on_rank(rank: int) -> None:
            self._rank.value, self._rank.size = rank, self.world_size
            try:
                results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=on_rank, args=(r,)) for r in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


def test_without_other_processes_nothing_is_touched() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    assert sum_over_ranks(value) is value
    assert max_over_ranks(value) is value
    assert mean_over_ranks(dict(a=value), dict(a=3))['a'] is value
    assert losses_over_ranks(dict(loss_a=value), {}, {}, torch.zeros(1, 2, 2))['loss_a'] is value
    assert labels_over_ranks(torch.tensor([[4, 0], [255, 4]])) == [0, 4, 255]


def test_sums_and_maxima_and_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """f = sum over k of (S_k M_k)^2, of three elements on three ranks; as written and as shared."""
    # Two ranks have the maximum of the last, and share its gradient.
    given = torch.tensor([[1.0, -2.0, 3.0], [3.0, 5.0, 3.0], [2.0, 0.5, 1.0]], dtype=torch.float64)
    whole = given.clone().requires_grad_()
    expected = (whole.sum(0) * whole.amax(0)).square().sum()
    expected.backward()

    def work(rank: int) -> tuple[float, Tensor]:
        own = given[rank].clone().requires_grad_()
        value = (sum_over_ranks(own) * max_over_ranks(own)).square().sum()
        value.backward()
        return float(value), own.grad / 3  # as DDP averages

    shared = Group(monkeypatch, 3).run(work)
    assert [value for value, _ in shared] == pytest.approx([float(expected)] * 3)
    torch.testing.assert_close(torch.stack([grad for _, grad in shared]), whole.grad)


def test_a_mean_over_nothing_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    means, counts = [2.0, 7.0], [[4, 0], [0, 0]]

    def work(rank: int) -> dict[str, Tensor]:
        value = torch.tensor(means[rank])
        return mean_over_ranks(dict(a=value, b=value), dict(a=counts[0][rank], b=torch.tensor(counts[1][rank])))

    for result in Group(monkeypatch, 2).run(work):
        assert result == dict(a=2.0, b=0.0)


def test_rows_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(0, 2), torch.tensor([[5.0, 6.0]])]
    for (rows, first), expected in zip(
        Group(monkeypatch, 3).run(lambda rank: gather_over_ranks(given[rank])), (0, 2, 2), strict=True
    ):
        assert torch.equal(rows, torch.cat(given))
        assert first == expected
    assert gather_over_ranks(given[0]) == (given[0], 0)


def test_labels_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [torch.tensor([[3, 255]]), torch.tensor([[0, 3]])]
    assert Group(monkeypatch, 2).run(lambda rank: labels_over_ranks(labels[rank])) == [[0, 3, 255]] * 2


def test_accuracy_of_all_ranks_is_over_the_pixels_that_the_head_does_not_ignore(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    head = SimpleNamespace(loss_decode=SimpleNamespace(loss_name='loss_ce'), ignore_index=0)
    labels = [torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([[[1, 1, 1, 0]]])]
    accuracy = [torch.tensor([100.0]), torch.tensor([0.0])]
    shared = Group(monkeypatch, 2).run(
        lambda r: losses_over_ranks({'decode.acc_seg': accuracy[r]}, {'decode': head}, {}, labels[r]))
    assert shared == [{'decode.acc_seg': 25.0}] * 2


LABELLER = dict(type='EntropyPseudoLabeler', threshold=0.9, scale_images=True)
PROTOTYPES = dict(type='ClassPrototypes', block=0)
CE = dict(type='CrossEntropyLoss')
HEADS = {
    'cross_entropy': CE,
    'cross_entropy_non_ignored': dict(type='CrossEntropyLoss', avg_non_ignore=True),
    'two_losses': [dict(CE, avg_non_ignore=True), dict(CE, loss_name='loss_other')],
    'unbiased': dict(type='UnbiasedCrossEntropyLoss', num_old=OLD),
    'sigmoid': dict(type='SigmoidCrossEntropyLoss'),
    'one_vs_rest': dict(type='OneVsRestLoss'),
    'sigmoid_new': dict(type='SigmoidCrossEntropyLoss', num_old=OLD, pos_weight=4.0),
}
PARTS = {
    'attention': dict(type='CRPDistillationLoss'),
    'attention_paper': dict(type='CRPDistillationLoss', distance='squared_l2', normalisation='paper'),
    'attention_masked': dict(type='CRPDistillationLoss', distance='cosine', mask_new=True),
    'attention_global': dict(type='CRPDistillationLoss', pooling='global', source='both'),
    'attention_none': dict(type='CRPDistillationLoss', pooling='none', source='both'),
    'unbiased': dict(type='UnbiasedDistillationLoss'),
    'knowledge': dict(type='KnowledgeDistillationLoss'),
    'label_guided': dict(type='LabelGuidedDistillationLoss', old_weight=2.0),
    'sigmoid': dict(type='SigmoidDistillationLoss'),
    'class_similarity': dict(type='ClassSimilarityDistillationLoss'),
    'contrastive': dict(type='ContrastiveDistillationLoss', block=1, temperature=0.5),
    'all_stages': dict(type='AccumulativeDistillationLoss'),
    'decomposed': dict(type='DecomposedDistillationLoss'),
    'features': dict(type='FeatureMSELoss'),
    'pod': dict(type='LocalPODLoss'),
    'cube': dict(type='PooledCubeDistillationLoss', spatial_kernels=(2, 4)),
    'entropy': dict(type='SelfEntropyLoss'),
    'matching': dict(type='PrototypeMatchingLoss'),
    'attraction': dict(type='PrototypeAttractionLoss'),
    'repulsion': dict(type='RepulsionLoss', block=0),
    'sparsity': dict(type='SparsityLoss', block=0),
}
REPLAY = {
    'replay': dict(type='PrototypeReplayLoss'),
    'old_features': dict(type='PseudoLabelFeatureLoss'),
    'separation': dict(type='PrototypeSeparationLoss'),
}
ADAPTIVE = dict(type='AdaptiveWeight', every=1, bounds=(1e-6, 1e6))
RESIDUAL = {
    'residual': dict(type='BackgroundResidualLoss'),
    'background_features': dict(type='BackgroundFeatureLoss'),
    'old_outputs': dict(type='OldOutputDistillationLoss'),
}
GLOO_SHARES = [0, 1], [2, 3, 4]
CASES = {
    **{f'head_{name}': dict(loss=loss) for name, loss in HEADS.items()},
    **{name: dict(loss=CE, distillation={name: part}) for name, part in PARTS.items()},
    'pixel_weights': dict(
        loss=CE, pixel_weights=dict(type='UncertaintyBalanceWeights', limit=0.99), pseudo_labeler=LABELLER
    ),
    'adaptive': dict(loss=CE, distillation=dict(
        a=dict(ADAPTIVE, part=PARTS['attention']),
        b=dict(ADAPTIVE, part=PARTS['unbiased'], rule='old_regions'),
        c=dict(ADAPTIVE, part=PARTS['repulsion'], layer='layers.0.1.0'))),
    'auxiliary': dict(
        loss=CE, classifier_init='auxiliary', distillation=dict(auxiliary=dict(type='AuxiliaryClassifierLoss'))),
    'residual': dict(loss=CE, background_residuals=1, distillation=RESIDUAL),
    'replay': dict(loss=CE, prototypes=dict(type='ReplayPrototypes'), distillation=REPLAY),
    'labelled': dict(loss=CE, distillation=dict(a=PARTS['attention'], b=PARTS['unbiased']), pseudo_labeler=LABELLER),
}


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    old = model_cfg(OLD)
    old['decode_head']['norm_cfg'] = NORM
    return save_weights(build(old, seed=8), tmp_path_factory.mktemp('old') / 'snapshot.pth')


def make(snapshot: str, loss: Any, **options: Any) -> nn.Module:
    auxiliary = dict(auxiliary_head_cfg(NEW), norm_cfg=NORM, loss_decode=loss)
    cfg = model_cfg(
        NEW, old_model=dict(checkpoint=snapshot, num_old=OLD, earlier=[]), auxiliary_head=[auxiliary],
        **dict(prototypes=PROTOTYPES) | options,
    )  # fmt: skip
    cfg['decode_head'].update(norm_cfg=NORM, loss_decode=loss)
    model = build(cfg).double()
    model.old_model.model.double()
    if isinstance(model.prototypes, prototypes.ReplayPrototypes):
        # Of one pixel a class, so that features are drawn without a spread.
        old = feature_sums(torch.randn(1, 8, 1, OLD), torch.arange(OLD)[None, None], OLD)
        model.prototypes.load_state_dict(dict(sums=old, counts=torch.full((OLD,), 9.0), present=torch.zeros(OLD + 1)))
        model.prototypes.present[[0, -1]] = torch.tensor([3.0, 7.0]).double()
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Five images: one all background, one all ignored, and the old classes in the last two alone."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(OLD, NEW, (5, 64, 64), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = 0
    labels[:, :9] = IGNORED
    labels[0], labels[1] = 0, IGNORED
    labels[3:, 32:] = torch.randint(1, OLD, (2, 32, 64), generator=generator)
    return images(5, 64, 64).double(), labels


def step(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[dict[str, float], list[Tensor]]:
    losses = model.loss(inputs, samples(labels))
    sum(value.sum() for name, value in losses.items() if 'loss' in name).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return {name: float(value) for name, value in losses.items()}, gradients


@pytest.mark.parametrize(
    ('case', 'shares'),
    [*((case, [[1], [0], [2, 3, 4]]) for case in CASES), ('labelled', [[0], [1, 2, 3, 4]])],
)
def test_uneven_shares_give_the_losses_and_gradients_of_the_whole(
    case: str, shares: list[list[int]], snapshot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share without foreground, one that is ignored throughout, and old classes on the last rank alone."""
    model = make(snapshot, **CASES[case])
    inputs, labels = batch()
    copies = [copy.deepcopy(model) for _ in shares]
    expected, gradients = step(model, inputs, labels)
    shared = Group(monkeypatch, len(shares)).run(
        lambda rank: step(copies[rank], inputs[shares[rank]], labels[shares[rank]])
    )
    own = [name for name in expected if 'loss' in name and expected[name]]
    assert len(own) == len([name for name in expected if 'loss' in name])
    for values, _ in shared:
        assert values == pytest.approx(expected, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for gradient, *parts in zip(gradients, *(part for _, part in shared), strict=True):
        averaged = torch.stack(parts).mean(0)
        torch.testing.assert_close(averaged, gradient, rtol=1e-6, atol=1e-9 * largest)


def test_every_loss_of_a_method_is_among_the_cases() -> None:
    files = [path for path in CONFIGS.glob('[a-z]*/*.py') if path.stem == path.parent.name]
    assert len(files) > 20
    used = {part['type'] for path in files for part in Config.fromfile(path).get('distillation', {}).values()}
    covered = {part['type'] for case in CASES.values() for part in case.get('distillation', {}).values()}
    assert used <= covered


def on_gloo(rank: int, snapshot: str, folder: Path) -> None:
    """One of two processes: the losses and averaged gradients of every case, in its own file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    inputs, labels = batch()
    results = {}
    for case, options in CASES.items():
        torch.manual_seed(0)
        values, gradients = step(make(snapshot, **options), inputs[GLOO_SHARES[rank]], labels[GLOO_SHARES[rank]])
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
        results[case] = values, [gradient / 2 for gradient in gradients]
    torch.save(results, folder / f'{rank}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_gloo_processes_have_the_losses_and_gradients_of_one(snapshot: str, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(on_gloo, (snapshot, tmp_path), nprocs=2, start_method='fork')
    inputs, labels = batch()
    shared = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    assert shared[0].keys() == shared[1].keys() == CASES.keys()
    for case, options in CASES.items():
        torch.manual_seed(0)
        expected, gradients = step(make(snapshot, **options), inputs, labels)
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        for one in shared:
            values, averaged = one[case]
            assert values == pytest.approx(expected, rel=1e-6), case
            torch.testing.assert_close(averaged, gradients, rtol=1e-6, atol=1e-9 * largest)


def test_equal_shares_of_a_mean_keep_their_gradient(snapshot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmseg's cross-entropy over all pixels was right with equal shares: then nothing is scaled."""
    model = make(snapshot, loss=CE)
    inputs, labels = batch()
    copies = [copy.deepcopy(model) for _ in range(2)]
    shared = Group(monkeypatch, 2).run(lambda r: step(copies[r], inputs[2 * r : 2 * r + 2], labels[2 * r : 2 * r + 2]))
    _, alone = step(model, inputs[2:4], labels[2:4])
    for gradient, expected in zip(shared[1][1], alone, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# Batches


def batches_of(count: int, batch_size: int, rank: int, world_size: int, patch: pytest.MonkeyPatch, **options: Any
               ) -> list[list[int]]:
    patch.setattr(shared_batches, 'get_dist_info', lambda: (rank, world_size))
    sampler = DefaultSampler(range(count), shuffle=True, seed=5)
    sampler.set_epoch(3)
    result = SharedBatchSampler(sampler, batch_size, **options)
    found = list(result)
    assert len(found) == len(result)
    return found


@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('count', [24, 25, 27, 31])
@pytest.mark.parametrize('world_size', [2, 3])
def test_processes_share_the_batches_of_one(
    world_size: int, count: int, drop_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = DefaultSampler(range(count), shuffle=True, seed=5)
    alone.set_epoch(3)
    expected = list(BatchSampler(alone, 6, drop_last))
    assert batches_of(count, 6, 0, 1, monkeypatch, drop_last=drop_last) == expected
    shares = [
        batches_of(count, 6 // world_size, rank, world_size, monkeypatch, drop_last=drop_last)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(expected, *shares, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        seen = Counter(index for part in parts for index in part)
        assert set(seen) == set(whole)
        assert sum(seen.values()) == max(len(whole), world_size)  # no process is without an image


def test_without_shuffling_images_come_in_their_order() -> None:
    sampler = DefaultSampler(range(5), shuffle=False, seed=5)
    assert list(SharedBatchSampler(sampler, 2)) == [[0, 1], [2, 3], [4]]


def test_more_processes_than_images() -> None:
    assert [share_of([7, 8], rank, 5) for rank in range(5)] == [[7], [8], [7], [8], [7]]


def test_an_endless_sampler_is_refused() -> None:
    with pytest.raises(TypeError, match=r'SharedBatchSampler expected an epoch-wise sampler .* got object'):
        SharedBatchSampler(object(), 2)

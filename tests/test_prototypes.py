# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Prototypes: a mean in two passes, at any batch size, on any number of ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor

from mmseg_sats.models.prototypes import ClassPrototypes, labels_on_grid

CLASSES, CHANNELS, IMAGES = 4, 3, 6


def data() -> tuple[Tensor, Tensor]:
    """Features (6, 3, 4, 6) and labels (6, 9, 11): classes 0 to 2 and ignore; class 3 is not there."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (IMAGES, 9, 11), generator=generator)
    features = torch.randn(IMAGES, CHANNELS, 4, 6, generator=generator)
    # Far from 0 and far apart, so that a sloppy running mean would show.
    features += 1000 * torch.arange(IMAGES)[:, None, None, None]
    return features, torch.where(labels == 3, 255, labels)


def two_pass_means() -> Tensor:
    """Count, then average: (K, C) float64."""
    features, labels = data()
    small = torch.nn.functional.interpolate(labels[:, None].float(), (4, 6), mode='nearest')[:, 0]
    means = torch.zeros(CLASSES, CHANNELS, dtype=torch.float64)
    for c in (1, 2):
        count = int((small == c).sum())
        for n, row, column in (small == c).nonzero().tolist():
            means[c] += features[n, :, row, column].double() / count
    return means


def gathered(batch: int, order: list[int] | None = None) -> ClassPrototypes:
    features, labels = data()
    order = order or list(range(IMAGES))
    prototypes = ClassPrototypes(CLASSES)
    for start in range(0, IMAGES, batch):
        rows = order[start : start + batch]
        other = torch.zeros(len(rows), 2, 8, 8)
        prototypes.update((other, features[rows]), labels[rows])
    return prototypes


@pytest.mark.parametrize('batch', [1, 2, 3, 4, IMAGES])
def test_they_are_the_two_pass_means_at_any_batch_size(batch: int) -> None:
    prototypes = gathered(batch)
    assert prototypes.known.tolist() == [False, True, True, False]
    state = prototypes.state_dict()
    means = state['sums'] / state['counts'].clamp(min=1)[:, None]
    torch.testing.assert_close(means, two_pass_means(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prototypes.means, two_pass_means().float())


def test_the_order_does_not_matter() -> None:
    torch.testing.assert_close(gathered(2, [5, 3, 1, 0, 2, 4]).means, gathered(2).means)


def test_the_block_is_chosen() -> None:
    features, labels = data()
    prototypes = ClassPrototypes(CLASSES, block=0)
    prototypes.update((features, torch.zeros(IMAGES, 2, 8, 8)), labels)
    torch.testing.assert_close(prototypes.means, two_pass_means().float())


def test_they_go_on_in_a_stage_with_more_classes() -> None:
    features, labels = data()
    first = ClassPrototypes(3)
    first.update((features[:3],), labels[:3])
    second = ClassPrototypes(CLASSES)
    second.load_state_dict(first.state_dict())
    second.update((features[3:],), labels[3:])
    torch.testing.assert_close(second.means, two_pass_means().float())
    # The state is a copy: the first has not moved.
    assert first.state_dict()['counts'].sum() < second.state_dict()['counts'].sum()
    with pytest.raises(ValueError, match=r'prototypes of 4 classes .* do not fit 3 classes'):
        ClassPrototypes(3).load_state_dict(second.state_dict())
    with pytest.raises(ValueError, match='2 classes with 3 counts'):
        first.load_state_dict(dict(sums=torch.zeros(2, CHANNELS), counts=torch.zeros(3)))


def test_a_state_is_a_copy_when_it_is_given_and_when_it_is_taken() -> None:
    features, labels = data()
    prototypes, other = gathered(2), ClassPrototypes(CLASSES)
    state = prototypes.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    other.load_state_dict(state)
    for each in (prototypes, other):
        each.update((features,), labels)
        assert all(torch.equal(state[key], before[key]) for key in before)


def test_an_empty_state_may_be_kept() -> None:
    again = ClassPrototypes(CLASSES)
    again.load_state_dict(ClassPrototypes(2).state_dict())
    assert not again.known.any()
    features, labels = data()
    again.update((features,), labels)
    torch.testing.assert_close(again.means, two_pass_means().float())


def test_a_batch_without_foreground_changes_nothing() -> None:
    prototypes = gathered(2)
    features, labels = data()
    prototypes.update((features,), torch.where(labels == 255, 255, 0))
    torch.testing.assert_close(prototypes.means, two_pass_means().float())


def test_labels_are_nearest() -> None:
    labels = torch.arange(24).reshape(1, 4, 6)
    assert labels_on_grid(labels, (2, 3)).tolist() == [[[0, 2, 4], [12, 14, 16]]]
    assert labels_on_grid(labels, (4, 6)) is labels


def work(rank: int, ranks: int, folder: str) -> None:
    """One of several processes, each with its share of the images."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=ranks)  # fmt: skip
    features, labels = data()
    prototypes = ClassPrototypes(CLASSES)
    for n in range(rank, IMAGES, ranks):
        prototypes.update((features[n : n + 1],), labels[n : n + 1])
    torch.save(prototypes.state_dict(), f'{folder}/{rank}.pth')
    torch.distributed.barrier()  # gloo of torch 2.4 waits for ever for a process that has left
    torch.distributed.destroy_process_group()


def test_ranks_have_the_same_prototypes_as_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(work, (2, str(tmp_path)), nprocs=2, start_method='fork')
    states = [torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    means = states[0]['sums'] / states[0]['counts'].clamp(min=1)[:, None]
    torch.testing.assert_close(means, two_pass_means(), rtol=1e-12, atol=1e-12)

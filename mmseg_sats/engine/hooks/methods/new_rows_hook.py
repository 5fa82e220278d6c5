# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Makes the rows of new classes that depend on what the old model sees in their pixels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.engine.hooks.methods.image_pass import images_seen_once
from mmseg_sats.engine.hooks.methods.pretuning import pretune
from mmseg_sats.functional.features.prototypes import labels_on_grid, pixels_of
from mmseg_sats.functional.new_rows import align_norms
from mmseg_sats.models.heads.classifier import Rows
from mmseg_sats.models.padding import labels_of_batch, with_padding
from mmseg_sats.models.segmentors.incremental_encoder_decoder import IncrementalEncoderDecoder
from mmseg_sats.models.segmentors.old_model import ClassifierInputs
from mmseg_sats.utils.checkpoint import read_arrays, write_arrays
from mmseg_sats.utils.randomness import seeded

ROWS = 'new_rows.npz'
# Apart from the keys of the training loop.
_KEY = 3


@HOOKS.register_module()
class NewRowsHook(Hook):
    """Runs the old model once over the stage's own training images, and makes the rows of the new classes.

    That is done before the stage is trained, where the model's ``classifier_init`` is a :class:`MeasuredStart`. The
    images go through the config's ``test_pipeline``, each once, whatever the number of processes; a start that is
    trained gets them as the training does. The classifier is written to ``new_rows.npz`` in the stage's work dir, from
    which a resumed run reads it.
    """

    def __init__(self) -> None:
        self._done = False

    def before_stage(self, runner: Runner, stage: object) -> None:
        """Sets the rows, where there is an old model and the start is a measured one."""
        self._done = True
        model = unwrap(runner.model)
        rows = getattr(model, 'new_rows', None)
        if rows is None or rows.measured is None or not runner.cfg.model.get('old_model'):
            return
        path = Path(runner.work_dir) / ROWS
        if not path.exists():
            made = self._make(runner, model)
            barrier()
            if is_main_process():
                weight, bias = (part.numpy() for part in made)
                write_arrays(path, weight=weight, bias=bias)
            barrier()
        # All processes and a resumed run read the same file.
        classifier = model.decode_head.get_submodule(model.measured_classifier)
        made = read_arrays(path, ('weight', 'bias'), 'the rows of a classifier')
        classifier.load_state_dict(dict(classifier.state_dict()) | made)
        runner.logger.info(f'the rows of the new classes are those of {path.name}')

    def before_train(self, runner: Runner) -> None:
        """Sets the rows where a stage's config is run on its own, by a runner without stages."""
        if not self._done and runner.iter == 0:
            self.before_stage(runner, None)

    def _make(self, runner: Runner, model: IncrementalEncoderDecoder) -> Rows:
        """``weight`` (K, d, 1, 1) and ``bias`` (K,) of the classifier, on the CPU."""
        state = model.decode_head.get_submodule(model.measured_classifier).state_dict()
        grown = state['weight'].detach().cpu(), state['bias'].detach().cpu()
        start, num_old = model.new_rows.measured, model.old_model.model.num_classes
        flat = grown[0].flatten(1), grown[1]
        stage = stage_dataset_cfg(runner.cfg.train_dataloader.dataset).get('stage', 0)
        with seeded(runner.seed, stage, _KEY):
            means, shown = self._measure(runner, model)
            make = start.make(flat, means, shown)
            if start.epochs:
                pretune(runner, model, make, start)
        with torch.no_grad():
            weight, bias = (part.detach().cpu() for part in make())
            if model.new_rows.align_norms:
                weight, bias = align_norms(weight, bias, flat[0][:num_old], flat[1][:num_old])
        return weight.view_as(grown[0]).clone(), bias.clone()

    @torch.no_grad()
    def _measure(self, runner: Runner, model: IncrementalEncoderDecoder) -> tuple[Tensor, Tensor]:
        """Means (N, ...) over the pixels of the new classes, on the CPU, and which classes have a pixel, (N,)."""
        start, num_old = model.new_rows.measured, model.old_model.model.num_classes
        inputs_of = ClassifierInputs(model.old_model, model.measured_classifier)
        weight = inputs_of.weight
        empty = start.of_pixels(weight, weight[:0], weight.new_zeros(0, num_old)).double()
        sums = torch.stack([empty] * (model.num_classes - num_old)).to(next(model.parameters()).device)
        counts = sums.new_zeros(len(sums))
        for batch in images_seen_once(runner, 'what the old model sees in new classes'):
            data = model.data_preprocessor(batch, False)
            images, samples = data['inputs'], data['data_samples']
            labels = labels_of_batch(samples).to(images.device)
            labels = labels_on_grid(with_padding(labels, samples, images.shape[2:]), images.shape[2:])
            for rows, columns in windows(images.shape[2:], model.test_cfg):
                features = inputs_of(images[..., rows, columns])
                own = labels_on_grid(labels[:, rows, columns], features.shape[2:])
                for index in range(len(sums)):
                    vectors = pixels_of(features, own == num_old + index)
                    if len(vectors):
                        logits = nn.functional.linear(vectors, inputs_of.weight, inputs_of.classifier.bias)
                        sums[index] += start.of_pixels(inputs_of.weight, vectors, logits)
                        counts[index] += len(vectors)
        # Reduced once at the end, not per batch, since ranks may differ by one image.
        all_reduce(sums)
        all_reduce(counts)
        sums, counts = sums.cpu(), counts.cpu()
        missing = [num_old + index for index, count in enumerate(counts.tolist()) if not count]
        if missing:
            runner.logger.warning(f'no pixel of the new channels {missing} was seen: they start without it')
        return sums / counts.clamp(min=1).view(-1, *[1] * empty.dim()), counts > 0


def windows(size: tuple[int, int], test_cfg: Any) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the windows in which a model is tested on an image, or of the whole image.

    Args:
        size: (H, W) of the image.
        test_cfg: the segmentor's.
    """
    if (test_cfg or {}).get('mode') != 'slide':
        yield slice(None), slice(None)
        return
    axes = []
    for length, window, stride in zip(size, test_cfg['crop_size'], test_cfg['stride'], strict=True):
        count = max(length - window + stride - 1, 0) // stride + 1
        starts = [max(min(index * stride + window, length) - window, 0) for index in range(count)]
        axes.append([slice(start, min(start + window, length)) for start in starts])
    yield from ((rows, columns) for rows in axes[0] for columns in axes[1])

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""One stage of a protocol seen through any mmseg dataset: its images, its labels, its classes."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose, force_full_init
from mmseg.registry import DATASETS
from torch.utils.data import Dataset

from mmseg_sats.datasets.checks.image_sizes import check_sizes
from mmseg_sats.datasets.checks.label_lines import Shown
from mmseg_sats.datasets.class_index.deal import deal
from mmseg_sats.datasets.class_index.index import (
    EVAL_IMAGES,
    ClassIndex,
    index_by_class,
    select_eval,
    select_train,
)
from mmseg_sats.datasets.class_index.label_numbers import check_background, hint_on_binary_masks
from mmseg_sats.datasets.held_out import check_share, held_out
from mmseg_sats.datasets.joined_dataset import JoinedDataset
from mmseg_sats.datasets.memory.exemplars import exemplar_rows, image_file
from mmseg_sats.datasets.transforms import (
    MODES,
    RelabelSegMap,
    relabel_table,
    through_label_ids,
)
from mmseg_sats.datasets.wrapped_dataset import (
    build_transforms,
    build_wrapped,
    classes_by_label,
    first_of_each,
    full_init_wrapped,
    mask_backend,
    mask_of,
    with_relabelling,
)
from mmseg_sats.protocol import SETTINGS, Protocol, Stage
from mmseg_sats.utils.randomness import seeded
from mmseg_sats.utils.shared_values import once
from mmseg_sats.utils.spelling import check_choice, text_of


class NoImagesError(ValueError):
    """A stage for which no image is left."""


@DATASETS.register_module()
class IncrementalDataset(Dataset):
    """The images and labels of one stage, picked from an ordinary mmseg dataset.

    Where the wrapped dataset's classes start with ``background`` (VOC) or another of its names
    (``BACKGROUND_NAMES``), label i is ``classes[i]``; otherwise (ADE20K with
    ``reduce_zero_label=False``) label i is ``classes[i - 1]`` and background is put in front.
    Where label 0 may as well be a class (Cityscapes), ``background``, ``no_background`` or
    ``mask_values`` must say what it is. A wrapped dataset with ``label_ids``, number in the masks to
    label, may number them otherwise (``FolderDataset``).

    Relabelling comes directly after ``LoadAnnotations`` and so before ``RandomCrop``. Its
    ``cat_max_ratio`` therefore only sees labels that the stage has.

    With a ``seed``, and once :meth:`set_epoch` was called, what the training pipeline draws for an
    image depends on (seed, stage, epoch, index) alone: not on the number of workers, nor on whether
    the run was interrupted before. The generators outside are left as they were.

    In a distributed run all ranks must build it, since rank 0 reads the masks for all of them.

    Args:
        dataset: Config or instance of the wrapped dataset, a subclass of mmengine's BaseDataset
            with ``seg_map_path``, or mmengine's ``ConcatDataset`` or ``RepeatDataset`` of such with
            the same classes. It is read, never changed; its ``indices`` are honoured. An image
            that is listed twice is used once.
        protocol: ``'15-1'``, ``'joint'`` and so on.
        stage: Number of the stage.
        split: Only with ``'joint'``: the protocol whose base classes are reported.
        setting: ``'overlapped'``, ``'disjoint'``, ``'sequential'`` or ``'partitioned'``; matters in
            training, see :func:`select_train`. The last deals all images of the list, before held-out
            ones are left out.
        class_order: Permutation of the foreground ids; ascending by default.
        mode: ``'train'``, ``'eval'``, or ``'memory'``: the exemplars, with the true labels of all
            seen classes.
        eval_future: Future classes in evaluation: ``'background'`` or ``'ignore'``.
        eval_images: Evaluate on images with a ``'seen'`` class or on ``'all'``.
        cache_dir: Folder of the class index, see :meth:`ClassIndex.load_or_scan`.
        ignore_index: The ignored label of the masks.
        pipeline: Transforms in place of the wrapped dataset's own.
        label_transforms: Transforms that stand directly behind the relabelling, in training: they
            see the stage's labels and change them, as :class:`MarkUnknown` does. One that has
            ``check_images(paths)`` is asked before training.
        seed: Of the random transforms; None leaves them to the process's own generators.
        lazy_init: Whether to leave reading lists and masks to :meth:`full_init`.
        exemplars: With ``'memory'`` only: the ``exemplars.json`` of an earlier stage.
        held_out: Share of the wrapped dataset's images that training leaves out, the same ones in
            every stage; evaluation uses only these. None: both use all images.
        background: The name of the wrapped dataset's first class, if that counts as background.
        no_background: Whether label 0 is a class to learn and the masks know no background: label i
            is ``classes[i]``, its class id i + 1, and background is what is not seen yet.
        mask_values: Name to number in the masks, as in ``FolderDataset``; one that has its own keeps them.
        mask_root: A folder outside the wrapped dataset's ``data_root`` where masks may be.

    Raises:
        TypeError: If ``dataset`` is neither a config nor a BaseDataset.
        ValueError: If an option is unknown, the wrapped dataset changes labels itself, the
            training pipeline loads no masks, a mask holds an impossible label or nothing is left
            (``NoImagesError``).
        FileNotFoundError: If the list file or a mask does not exist.

    Attributes:
        dataset: The wrapped dataset.
        labels: What the numbers in the masks stand for.
        protocol: The :class:`Protocol`.
        stage: The :class:`Stage`.
        class_names: Names by annotation id, background at 0, future classes included.
        table: (256,) uint8, what each annotation id becomes.
        mask_table: (256,) uint8, what each number in the masks becomes; differs from ``table`` only if the
            masks number their classes in another way.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any] | Dataset,
        protocol: str,
        stage: int,
        split: str | None = None,
        setting: str = 'overlapped',
        class_order: Sequence[int] | None = None,
        mode: str = 'train',
        eval_future: str = 'background',
        eval_images: str = 'seen',
        cache_dir: str | None = None,
        ignore_index: int = 255,
        pipeline: Sequence[dict | Callable] | None = None,
        label_transforms: Sequence[dict | Callable] = (),
        seed: int | None = None,
        lazy_init: bool = False,
        exemplars: str | None = None,
        held_out: float | None = None,
        background: str | None = None,
        no_background: bool = False,
        mask_values: Mapping[str, int] | None = None,
        mask_root: str | None = None,
    ) -> None:
        check_choice('mode', mode, MODES)
        if (mode == 'memory') != (exemplars is not None):
            raise ValueError(f"mode='memory' goes with exemplars, got {mode!r} and {exemplars!r}")
        check_choice('setting', setting, SETTINGS)
        check_choice('eval_images', eval_images, EVAL_IMAGES)
        check_share(held_out)
        if label_transforms and mode == 'eval':
            raise ValueError("IncrementalDataset: label_transforms are for training, got mode='eval'")
        self.mode = mode
        self.setting = setting
        self.eval_images = eval_images
        self.cache_dir = cache_dir
        self.exemplars = exemplars
        self.held_out = held_out
        self.mask_root = mask_root
        self.ignore_index = ignore_index
        self.seed = seed
        self._epoch: torch.Tensor | None = None
        self.dataset, transforms = build_wrapped(dataset, pipeline)
        self.labels = classes_by_label(self.dataset, background, no_background, mask_values)
        names = self.labels.names
        self.protocol = Protocol(protocol, len(names) - 1, class_order, split)
        self.stage = self.protocol.stage(stage)
        self.table = relabel_table(
            self.protocol, stage, mode, setting, eval_future, ignore_index
        )
        self.mask_table = through_label_ids(self.table, self.labels.numbers, ignore_index)
        self._label_transforms = build_transforms(label_transforms)
        chain = [RelabelSegMap(self.mask_table), *self._label_transforms]
        self.pipeline = Compose(with_relabelling(transforms, chain, mode))
        self.class_names = names
        self._metainfo = self._stage_metainfo(self.labels.palette)
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict:
        """The wrapped dataset's, with ``classes`` and ``palette`` of the seen labels by channel.

        Besides: ``num_base`` (base labels among them, background included), ``stage``,
        ``label_map`` (None) and ``reduce_zero_label`` (False).
        """
        return copy.deepcopy(self._metainfo)

    def full_init(self) -> None:
        """Read the wrapped dataset's list and the class index, and pick the stage's images."""
        if self._fully_initialized:
            return
        key = ('class index', self.dataset, self.cache_dir, self.ignore_index, self.labels)
        key = (*key, self.mask_root, self.mask_backend)
        class_index, self._first = once(key, self._read_class_index)
        self._class_index = class_index
        self._usable = self._usable_rows()
        self._dealt = self._deal() if self.mode == 'train' and self.setting == 'partitioned' else None
        if self.mode == 'memory':
            rows = exemplar_rows(self.exemplars, self.dataset, self.class_names)
            indices = np.array(rows, dtype=np.int64)
        else:
            indices = self._select(self.stage)
        if indices.size == 0:
            raise NoImagesError(self._nothing_left(self.stage))
        indices.setflags(write=False)
        self._indices = indices
        self._packed_presence = class_index.packed[indices]
        self._fully_initialized = True
        self._check_label_transforms()

    def _read_class_index(self) -> tuple[ClassIndex, np.ndarray]:
        """The class index, and (N,) bool, which rows name an image for the first time."""
        full_init_wrapped(self.dataset, self.mask_root)
        files = [mask_of(self.dataset, row) for row in range(len(self.dataset))]
        class_index = ClassIndex.load_or_scan(
            files, cache_dir=self.cache_dir, imdecode_backend=self.mask_backend
        )
        where = type(self.dataset).__name__
        check_background(self.labels, class_index.presence.any(axis=0), where)
        if self.labels.numbers is not None:
            class_index = index_by_class(class_index, self.labels.numbers, self.ignore_index)
        class_index.check_labels(self.protocol.num_classes, self.ignore_index)
        return class_index, first_of_each(self._paths(range(len(self.dataset))))

    def _paths(self, rows: Iterable[int]) -> list[str]:
        return [self.dataset.get_data_info(row)['img_path'] for row in rows]

    @property
    @force_full_init
    def repeated_images(self) -> list[str]:
        """Paths of the images that the wrapped dataset lists again, as often as it does."""
        return self._paths(np.flatnonzero(~self._first).tolist())

    def _check_label_transforms(self) -> None:
        checks = [t.check_images for t in self._label_transforms if hasattr(t, 'check_images')]
        if checks:
            paths = [self.get_data_info(i)['img_path'] for i in range(len(self))]
            for check in checks:
                check(paths)

    def _usable_rows(self) -> np.ndarray:
        """(N,) bool: rows of the wrapped dataset that training, or evaluation, may use."""
        usable = self._first.copy()
        if self.held_out is not None:
            paths = self._paths(np.flatnonzero(usable).tolist())
            usable[usable] = held_out(paths, self.held_out) == (self.mode == 'eval')
        return usable

    def _deal(self) -> np.ndarray:
        """(N,) the class that each row of the wrapped dataset was dealt to, 0 for none."""
        rows = np.flatnonzero(self._first)
        classes = self.protocol.class_order
        dealt = np.zeros(len(self._first), dtype=np.int64)
        dealt[rows] = deal(self._class_index.presence[rows], self._paths(rows.tolist()), classes)
        return dealt

    def _select(self, stage: Stage) -> np.ndarray:
        presence = self._class_index.presence
        if self.mode == 'eval':
            rows = select_eval(presence, stage, self.eval_images)
        else:
            rows = select_train(presence, stage, self.setting, self._dealt)
        rows = rows[self._usable[rows]]
        if self.mode == 'train' and isinstance(self.dataset, JoinedDataset):
            rows = np.repeat(rows, self.dataset.repeats[rows])
        return rows

    @force_full_init
    def rows_of(self, stage: Stage) -> np.ndarray:
        """The wrapped dataset's rows that a stage of the protocol trains with, or is evaluated on.

        Args:
            stage: Any of the protocol's.

        Returns:
            (M,) int64, ascending; in training as often as a ``RepeatDataset`` repeats them.
        """
        return self._select(stage)

    @force_full_init
    def shown(self) -> Shown:
        """What the images that training, or evaluation, may use show, for all stages of the protocol."""
        presence = self._class_index.presence & self._usable[:, None]
        return Shown(presence, [self._select(stage) for stage in self.protocol.stages])

    @force_full_init
    def check_stages(self, first: int = 0) -> None:
        """See that stages of the protocol have images, of the same size as their masks.

        Args:
            first: The first stage that is looked at.

        Raises:
            ValueError: If one has none, or an image and its mask differ in size.
            FileNotFoundError: If an image does not exist.
        """
        for stage in self.protocol.stages[first:]:
            if self._select(stage).size == 0:
                raise NoImagesError(self._nothing_left(stage))
        infos = [self.dataset.get_data_info(row) for row in np.flatnonzero(self._first).tolist()]
        check_sizes(infos, self.pipeline.transforms, self.cache_dir, self.mask_backend)

    @property
    def mask_backend(self) -> str:
        """What decodes the masks: that of the pipeline's ``LoadAnnotations``."""
        return mask_backend(self.pipeline.transforms)

    @property
    @force_full_init
    def indices(self) -> np.ndarray:
        """(len,) int64, read-only: the images' places in the wrapped dataset.

        Ascending; exemplars stand in the order of their file.
        """
        return self._indices

    @property
    @force_full_init
    def class_index(self) -> ClassIndex:
        """Which labels every image of the wrapped dataset holds, those of other stages too."""
        return self._class_index

    @property
    @force_full_init
    def presence(self) -> np.ndarray:
        """(len, 256) bool: the labels that each image holds, by annotation id."""
        return np.unpackbits(self._packed_presence, axis=1).astype(bool)

    def image_names(self) -> list[str]:
        """The images' paths below the wrapped dataset's image folder, without suffix."""
        root = self.dataset.data_prefix.get('img_path') or ''
        paths = [self.get_data_info(i)['img_path'] for i in range(len(self))]
        return [str(Path(os.path.relpath(path, root or '.')).with_suffix('')) for path in paths]

    def image_files(self) -> list[str]:
        """The images' paths as a memory names them: with suffix, and forward slashes."""
        return [image_file(self.dataset, self.get_data_info(i)) for i in range(len(self))]

    @force_full_init
    def __len__(self) -> int:
        return len(self._indices)

    @force_full_init
    def get_data_info(self, idx: int) -> dict:
        """Annotation of the idx-th image of the stage; ``sample_idx`` counts within the stage."""
        info = self.dataset.get_data_info(int(self._indices[idx]))
        info['sample_idx'] = idx if idx >= 0 else len(self) + idx
        return info

    @force_full_init
    def get_cat_ids(self, idx: int) -> list[int]:
        """Channels of the labels that the idx-th image has at this stage, for balanced sampling."""
        labels = np.flatnonzero(np.unpackbits(self._packed_presence[idx]))
        channels = np.unique(self.table[labels])
        return channels[channels != self.ignore_index].tolist()

    def prepare_data(self, idx: int) -> Any:
        """What the pipeline makes of the idx-th image; None where a transform gives up.

        Raises:
            RuntimeError: If a transform fails, with the image's file: one that is damaged, say.
        """
        info = self.get_data_info(idx)
        try:
            return self.pipeline(info)
        except Exception as error:
            raise RuntimeError(
                f'image {info["img_path"]} with mask {info.get("seg_map_path")} cannot be used: '
                f'{type(error).__name__}: {text_of(error)}'
            ) from error

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, and the copies of it that workers keep, which epoch is drawn next."""
        if self._epoch is None:
            # Shared memory: persistent workers hold a copy made in the first epoch.
            self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        return (self[idx] for idx in range(len(self)))  # in training no index is too large

    @force_full_init
    def __getitem__(self, idx: int) -> Any:
        """The idx-th image after the pipeline; in training another one where that gives None.

        Once :meth:`set_epoch` was called, ``idx + n * len(self)`` is the same image in the n-th pass over the images,
        which counts for what is drawn as epoch n does. Endless batches hold images of two passes or more.
        """
        if self.mode == 'eval' or self._epoch is None:
            return self._item(idx)
        number, row = divmod(idx, len(self))
        if self.seed is None:
            return self._item(row)
        with seeded(self.seed, self.stage.index, number if number > 0 else int(self._epoch), row):
            return self._item(row)

    def _item(self, idx: int) -> Any:
        tries = 1 if self.mode == 'eval' else self.dataset.max_refetch + 1
        first = idx
        for _ in range(tries):
            data = self.prepare_data(idx)
            if data is not None:
                return data
            idx = int(np.random.randint(len(self)))
        raise RuntimeError(
            f'the {self.mode} pipeline gave None for image {first} '
            f'({self.get_data_info(first)["img_path"]}) and for {tries - 1} others'
        )

    def _stage_metainfo(self, palette: list) -> dict:
        labels = (0, *self.stage.seen)
        metainfo = self.dataset.metainfo
        metainfo.update(
            classes=tuple(self.class_names[label] for label in labels),
            palette=[list(palette[label]) for label in labels],
            num_base=self.protocol.num_base,
            stage=self.stage.index,
            label_map=None,
            reduce_zero_label=False,
        )
        return metainfo

    def _nothing_left(self, stage: Stage) -> str:
        wanted = stage.new if self.mode == 'train' else stage.seen
        names = ', '.join(f'{self.class_names[c]} ({c})' for c in wanted)
        rule = f'setting {self.setting!r}'
        if self.mode == 'eval':
            rule = f'eval_images={self.eval_images!r}'
        if self.mode == 'memory':
            rule = f'exemplars={self.exemplars!r}'
        if self.held_out is not None:
            rule += f' and held_out={self.held_out}'
        present = self._class_index.presence.any(axis=0)
        return (
            f'protocol {self.protocol.name!r} stage {stage.index}: none of '
            f'{len(self._class_index)} '
            f'images of {type(self.dataset).__name__} is left for {self.mode} with the classes '
            f'{names} under {rule}{hint_on_binary_masks(present, self.class_names)}'
        )

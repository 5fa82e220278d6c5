# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""VOC and ADE20K from archives made by hand."""

import dataclasses
import io
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mmseg_sats.datasets.class_index.mask_scan import read_labels
from mmseg_sats.datasets.preparation import voc as voc_preparation
from mmseg_sats.datasets.preparation.ade20k import ADE20K, prepare_ade20k
from mmseg_sats.datasets.preparation.archives import Source, md5_of, safe_path, unpack
from mmseg_sats.datasets.preparation.voc import (
    VOC,
    labels_of_colours,
    palette,
    prepare_voc,
    read_list,
    read_voc_mask,
)

TRAIN, VAL = ['2007_000001', '2007_000002'], ['2007_000003']
# SBD knows all of VOC's but one, and two of its own; one of VOC's val images is in its train list.
SBD_TRAIN, SBD_VAL = ['2008_000001', '2007_000003'], ['2008_000002', '2007_000001']


def labels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([0, 1, 15, 20, 255], (6, 9)).astype(np.uint8)


def palette_png(array: np.ndarray) -> bytes:
    image = Image.fromarray(array, mode='P')
    image.putpalette(palette().ravel().tolist())
    stream = io.BytesIO()
    image.save(stream, 'PNG')
    return stream.getvalue()


def jpeg() -> bytes:
    return cv2.imencode('.jpg', np.full((6, 9, 3), 80, np.uint8))[1].tobytes()


def mat(array: np.ndarray) -> bytes:
    io_module = pytest.importorskip('scipy.io', reason='scipy is not installed (requirements/voc.txt)')
    stream = io.BytesIO()
    io_module.savemat(stream, dict(GTcls=dict(Segmentation=array, CategoriesPresent=[1])))
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def lines(names: list[str]) -> bytes:
    return ''.join(f'{name}\n' for name in names).encode()


@pytest.fixture
def sources(tmp_path: Path) -> voc_preparation.VocSources:
    """Two small archives in ``tmp_path``, and the counts that must come out of them."""
    voc, sbd = 'VOCdevkit/VOC2012/', 'benchmark_RELEASE/dataset/'
    images = [*TRAIN, *VAL, '2008_000001', '2008_000002']
    files = {f'{voc}JPEGImages/{name}.jpg': jpeg() for name in images}
    files |= {
        f'{voc}SegmentationClass/{name}.png': palette_png(labels(int(name[-1])))
        for name in [*TRAIN, *VAL]
    }
    files |= {
        f'{voc}ImageSets/Segmentation/train.txt': lines(TRAIN),
        f'{voc}ImageSets/Segmentation/val.txt': lines(VAL),
        f'{voc}Annotations/2007_000001.xml': b'not needed',
    }
    write_tar(tmp_path / VOC.voc.name, files, 'w')
    sbd_files = {f'{sbd}train.txt': lines(SBD_TRAIN), f'{sbd}val.txt': lines(SBD_VAL)}
    for name in {*SBD_TRAIN, *SBD_VAL}:
        sbd_files[f'{sbd}cls/{name}.mat'] = mat(labels(100 + int(name[-1])))
    sbd_files[f'{sbd}img/2008_000001.jpg'] = b'not needed'
    write_tar(tmp_path / VOC.sbd.name, sbd_files, 'w:gz')
    return dataclasses.replace(
        VOC,
        voc=dataclasses.replace(VOC.voc, md5=md5_of(tmp_path / VOC.voc.name)),
        sbd=dataclasses.replace(VOC.sbd, md5=md5_of(tmp_path / VOC.sbd.name)),
        train_aug=4,
        val=1,
    )


def test_voc_and_sbd_become_train_aug(sources: voc_preparation.VocSources, tmp_path: Path) -> None:
    root = prepare_voc(tmp_path, tmp_path / 'data', sources)
    assert root == tmp_path / 'data/VOCdevkit/VOC2012'
    # SBD's two lists and VOC's train, without VOC's val.
    expected = ['2007_000001', '2007_000002', '2008_000001', '2008_000002']
    assert read_list(root / 'ImageSets/Segmentation/train_aug.txt') == expected
    masks = {path.stem: read_labels(str(path)) for path in (root / 'SegmentationClassAug').iterdir()}
    assert sorted(masks) == sorted([*expected, *VAL])
    for name in (*TRAIN, *VAL):  # VOC's own mask, also where SBD has one
        np.testing.assert_array_equal(masks[name], labels(int(name[-1])))
    for name in ('2008_000001', '2008_000002'):
        np.testing.assert_array_equal(masks[name], labels(100 + int(name[-1])))
    assert not (root / 'Annotations').exists()


def test_an_interrupted_call_goes_on(sources: voc_preparation.VocSources, tmp_path: Path) -> None:
    class StopAt:
        """A progress that breaks off after some steps of all loops together."""

        def __init__(self, steps: int) -> None:
            self.left = steps

        def __call__(self, items):
            for item in items:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                yield item

    for steps in (3, 12, 20):
        with pytest.raises(KeyboardInterrupt):
            prepare_voc(tmp_path, tmp_path / 'data', sources, StopAt(steps))
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / 'data').rglob('*.png')}
    assert done
    root = prepare_voc(tmp_path, tmp_path / 'data', sources)
    assert len(list((root / 'SegmentationClassAug').iterdir())) == 5
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert not list((tmp_path / 'data').rglob('.*.tmp'))


def test_a_wrong_count_a_damaged_and_a_missing_archive(
    sources: voc_preparation.VocSources, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(sources, train_aug=VOC.train_aug)
    with pytest.raises(ValueError, match='train_aug has 4 images, expected 10582'):
        prepare_voc(tmp_path, tmp_path / 'data', wrong)
    wrong = dataclasses.replace(sources, sbd=VOC.sbd)
    with pytest.raises(ValueError, match=r'benchmark.tgz has the MD5 sum .*Download it again from'):
        prepare_voc(tmp_path, tmp_path / 'data', wrong)
    (tmp_path / VOC.voc.name).unlink()
    with pytest.raises(FileNotFoundError, match=r'VOCtrainval.*does not exist. Download it from http'):
        prepare_voc(tmp_path, tmp_path / 'data', sources)


def test_scipy_is_asked_for_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voc_preparation.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'scipy reads: `pip install .*\[voc\]'):
        prepare_voc(tmp_path, tmp_path / 'data')


def test_colours_become_labels(tmp_path: Path) -> None:
    assert palette()[[0, 1, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    expected = labels(3)
    colours = palette()[expected]
    cv2.imwrite(str(tmp_path / 'colours.png'), colours[..., ::-1])
    np.testing.assert_array_equal(read_voc_mask(tmp_path / 'colours.png'), expected)
    colours[0, 0] = [1, 2, 3]
    with pytest.raises(ValueError, match=r'a\.png holds the colour \[1, 2, 3\]'):
        labels_of_colours(colours, tmp_path / 'a.png')


# --- archives ---


@pytest.mark.parametrize('name', ['/etc/x', '../x', 'a/../../x', 'C:\\x', 'a\\..\\..\\x', ''])
def test_no_member_leaves_the_target(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='would be unpacked outside the target folder'):
        safe_path(name, tmp_path)


def test_climbing_and_linking_members_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    write_tar(tmp_path / 'climbs.tar', {'out/../../x.txt': b'x'}, 'w')
    with pytest.raises(ValueError, match='outside the target'):
        unpack(tmp_path / 'climbs.tar', tmp_path / 'out', lambda name: name)
    with tarfile.open(tmp_path / 'links.tar', 'w') as archive:
        link = tarfile.TarInfo('inside.txt')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(link)
    with pytest.raises(ValueError, match='no plain file'):
        unpack(tmp_path / 'links.tar', tmp_path / 'out', lambda name: name)
    assert not list((tmp_path / 'out').iterdir())
    (tmp_path / 'none.tar').write_bytes(b'not an archive at all')
    with pytest.raises(ValueError, match=r'none\.tar is no archive'):
        unpack(tmp_path / 'none.tar', tmp_path / 'out', lambda name: name)


def test_ade20k_is_unpacked_and_counted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / ADE20K.archive.name, 'w') as archive:
        for split, count in (('training', 3), ('validation', 2)):
            for index in range(count):
                name = f'ADEChallengeData2016/{{}}/{split}/ADE_{index}'
                archive.writestr(f'{name.format("images")}.jpg', jpeg())
                archive.writestr(f'{name.format("annotations")}.png', palette_png(labels(index)))
        archive.writestr('ADEChallengeData2016/sceneCategories.txt', 'not needed')
    whole = Source(ADE20K.archive.name, ADE20K.archive.where, md5_of(tmp_path / ADE20K.archive.name))
    source = dataclasses.replace(ADE20K, archive=whole, training=3, validation=2)
    root = prepare_ade20k(tmp_path, tmp_path / 'data', source)
    assert len(list(root.rglob('*.png'))) == 5
    assert not (root / 'sceneCategories.txt').exists()
    with pytest.raises(ValueError, match='training has 3 images, expected 20210'):
        prepare_ade20k(tmp_path, tmp_path / 'data', dataclasses.replace(source, training=20210))
    # A file that was cut off is written again; one without its partner is named.
    (root / 'images/training/ADE_0.jpg').write_bytes(b'')
    prepare_ade20k(tmp_path, tmp_path / 'data', source)
    assert (root / 'images/training/ADE_0.jpg').stat().st_size
    (root / 'annotations/training/extra.png').touch()
    with pytest.raises(ValueError, match='training: extra has an image or an annotation'):
        prepare_ade20k(tmp_path, tmp_path / 'data', source)

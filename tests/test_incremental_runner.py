# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Whole runs of several stages on a few drawn images."""

import copy
import csv
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import MODELS

from mmseg_sats.engine.files import work_dir
from mmseg_sats.engine.files.snapshot import latest_checkpoint
from mmseg_sats.models import AttentionMixVisionTransformer
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.runs import same, weights

MakeConfig = Callable[..., Config]
STAGES = 4


@HOOKS.register_module()
class StopInStageOne(Hook):
    """Interrupts stage 1 after its first epoch's checkpoint, as a person's Ctrl-C would."""

    priority = 'LOWEST'
    armed = False  # not told by the config, which must be the same when the run is resumed

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if self.armed and runner.work_dir.endswith('stage_1') and runner.epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt


@HOOKS.register_module()
class BorderLog(Hook):
    """Writes down the borders of the stages."""

    calls: list = []

    def before_stage(self, runner: Runner, stage: object) -> None:
        self.calls.append(('before', stage.index, runner.iter))

    def after_stage(self, runner: Runner, stage: object, metrics: dict) -> None:
        self.calls.append(('after', stage.index, metrics['mIoU_all']))


@pytest.fixture(scope='module')
def finished(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work dir of a SATS run of four stages."""
    root = tmp_path_factory.mktemp('runner')
    cfg = Config.fromfile(Path(__file__).parents[1] / 'configs/sats/segformer_tiny_shapes_3-1.py')
    cfg.merge_from_dict(
        dict(
            data_root=str(shapes_root),
            work_dir=str(root / 'sats'),
            epochs=2,
            image_size=64,
            crop_size=64,
            train_images=24,
            val_images=12,
            batch_size=8,
            report=None,
        )
    )
    RUNNERS.build(cfg).train()
    return root / 'sats'


def test_a_run_leaves_what_the_contract_says(finished: Path) -> None:
    for name in ('config.py', 'results.json', 'results.csv'):
        assert (finished / name).is_file()
    for index in range(STAGES):
        for name in ('config.py', 'snapshot.pth', 'metrics.json', 'exemplars.json', 'done'):
            assert (finished / f'stage_{index}' / name).is_file()
    results = json.loads((finished / 'results.json').read_text())
    assert list(results)[:7] == [
        'method', 'memory', 'dataset', 'protocol', 'setting', 'class_order', 'seed',
    ]  # fmt: skip
    assert results['method'] == 'sats'
    assert results['memory'] == 0
    assert results['class_order'] == [1, 2, 3, 4, 5, 6]
    assert [stage['stage'] for stage in results['stages']] == [0, 1, 2, 3]
    assert [len(stage['new_classes']) for stage in results['stages']] == [3, 1, 1, 1]
    assert [len(stage['iou']) for stage in results['stages']] == [4, 5, 6, 7]
    assert results['stages'][0]['mIoU']['new'] is None
    assert results['final'] == results['stages'][-1]['mIoU'] | {'hIoU': results['final']['hIoU']}
    alls = [stage['mIoU']['all'] for stage in results['stages']]
    assert results['average_all'] == pytest.approx(sum(alls) / STAGES)
    with (finished / 'results.csv').open() as file:
        assert len(list(csv.DictReader(file))) == 4 + 5 + 6 + 7


def test_a_stage_is_an_ordinary_mmseg_run(finished: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(finished / 'stage_1/config.py')
    assert cfg.get('runner_type') is None
    cfg.work_dir = str(tmp_path)
    before = hashlib.sha256((finished / 'stage_0/snapshot.pth').read_bytes()).hexdigest()
    runner = Runner.from_cfg(cfg)
    runner.train()
    old = {key: value.cpu() for key, value in runner.model.old_model.model.state_dict().items()}
    assert same(old, {key: weights(finished / 'stage_0/snapshot.pth')[key] for key in old})
    assert hashlib.sha256((finished / 'stage_0/snapshot.pth').read_bytes()).hexdigest() == before
    again = {key: value.cpu() for key, value in runner.model.state_dict().items()}
    # The same seed, data and start: a stage run alone is the stage of the run.
    assert same(again, weights(finished / 'stage_1/snapshot.pth'))


def test_mmseg_apis_serve_a_stage(finished: Path, shapes_root: Path) -> None:
    model = init_model(
        str(finished / 'stage_1/config.py'), str(finished / 'stage_1/snapshot.pth'), device='cpu'
    )
    assert len(model.dataset_meta['classes']) == 5
    assert model.dataset_meta['classes'][0] == 'background'
    image = next(shapes_root.rglob('val/images/*'))
    result = inference_model(model, str(image))
    assert result.pred_sem_seg.data.shape[-2:] == (64, 64)
    assert result.seg_logits.data.shape[0] == 5
    inferencer = MMSegInferencer(
        str(finished / 'stage_1/config.py'), str(finished / 'stage_1/snapshot.pth'), device='cpu', show_progress=False
    )
    labels = inferencer(str(image))['predictions']
    assert (labels == result.pred_sem_seg.data[0].numpy()).all()


def test_stock_mmseg_gives_the_same_logits(finished: Path) -> None:
    cfg = Config.fromfile(finished / 'stage_1/config.py')
    stock = copy.deepcopy(cfg.model)
    for key in ('old_model', 'pseudo_labeler', 'distillation', 'classifier_init'):
        stock.pop(key)
    stock.type, stock.backbone.type = 'EncoderDecoder', 'MixVisionTransformer'
    models = [MODELS.build(model).eval() for model in (stock, cfg.model)]
    for model in models:
        model.load_state_dict(weights(finished / 'stage_1/snapshot.pth'), strict=True)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model(images, mode='tensor') for model in models)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_next_stage_starts_from_the_snapshot(finished: Path) -> None:
    text = (finished / 'stage_1/config.py').read_text()
    assert str(finished / 'stage_0/snapshot.pth') in text
    old, new = (weights(finished / f'stage_{k}/snapshot.pth') for k in (0, 1))
    assert old['decode_head.conv_seg.weight'].shape[0] == 4
    assert new['decode_head.conv_seg.weight'].shape[0] == 5
    key = 'backbone.layers.0.1.0.attn.attn.in_proj_weight'
    assert not torch.equal(old[key], new[key])
    assert (old[key] - new[key]).abs().max() < 0.1  # trained on, not started anew


def test_finished_stages_are_not_overwritten(finished: Path, shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('sats', work_dir=str(finished))
    with pytest.raises(ValueError, match=r'is in use: it holds stage_0 \(finished\), .*--resume'):
        RUNNERS.build(cfg)


def test_another_run_is_not_gone_on_with(finished: Path, shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('sats', work_dir=str(finished), resume=True, setting='disjoint', seed=3)
    with pytest.raises(
        ValueError,
        match=r"seed: 0 there, 3 in the config; setting: 'overlapped' there, 'disjoint' in the config",
    ):
        RUNNERS.build(cfg)


def test_missing_weights_name_the_command(shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('sats', pretrained='checkpoints/none.pth')
    with pytest.raises(
        FileNotFoundError, match=r'convert-mit ORIGINAL.pth checkpoints/none.pth'
    ):
        RUNNERS.build(cfg)


def test_weights_of_another_model_are_found_before_training(
    shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    torch.save({'patch_embed1.proj.weight': torch.zeros(1)}, tmp_path / 'original.pth')
    with pytest.raises(ValueError, match=r'original SegFormer names: convert it by .*convert-mit'):
        RUNNERS.build(shapes_cfg('sats', pretrained=str(tmp_path / 'original.pth')))
    wider = AttentionMixVisionTransformer(embed_dims=32, num_layers=[1] * 4, num_heads=[1, 2, 4, 8])
    torch.save(dict(state_dict=wider.state_dict()), tmp_path / 'wider.pth')
    with pytest.raises(ValueError, match=r'wider.pth does not fit AttentionMix.*in the checkpoint'):
        RUNNERS.build(shapes_cfg('sats', pretrained=str(tmp_path / 'wider.pth')))


def test_a_cut_off_checkpoint_is_not_resumed_from(finished: Path, tmp_path: Path) -> None:
    whole = (finished / 'stage_1/epoch_1.pth').read_bytes()
    (tmp_path / 'epoch_1.pth').write_bytes(whole)
    (tmp_path / 'epoch_2.pth').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    os.utime(tmp_path / 'epoch_1.pth', (1, 1))
    assert latest_checkpoint(tmp_path) == tmp_path / 'epoch_1.pth'
    (tmp_path / 'epoch_1.pth').unlink()
    assert latest_checkpoint(tmp_path) is None


def test_resume_goes_on_in_the_middle_of_a_stage(
    shapes_cfg: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = shapes_cfg('sats', epochs=3)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='StopInStageOne')]
    monkeypatch.setattr(StopInStageOne, 'armed', True)
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(cfg).train()
    monkeypatch.setattr(StopInStageOne, 'armed', False)
    folder = tmp_path / 'run'
    assert (folder / 'stage_0/done').exists()
    assert not (folder / 'stage_1/done').exists()
    kept = (folder / 'stage_0/snapshot.pth').stat().st_mtime_ns
    checkpoint = load_checkpoint_safely(folder / 'stage_1/epoch_1.pth')
    cfg.resume = True
    cfg.test_dataloader.batch_size = 3  # what only the evaluation reads may be corrected
    results = RUNNERS.build(cfg).train()
    assert len(results['stages']) == STAGES
    assert Config.fromfile(folder / 'stage_1/config.py').test_dataloader.batch_size == 3
    assert (folder / 'stage_0/snapshot.pth').stat().st_mtime_ns == kept
    logs = '\n'.join(path.read_text() for path in sorted((folder / 'stage_1').glob('*/*.log')))
    assert f'resumed epoch: 1, iter: {checkpoint["meta"]["iter"]}' in logs
    # The time of training is that of both parts.
    hub = load_checkpoint_safely(folder / 'stage_1/epoch_3.pth')['message_hub']
    seconds = hub['log_scalars']['train/time'].data[0]
    assert len(seconds) == 3 * checkpoint['meta']['iter']
    told = json.loads((folder / 'stage_1/metrics.json').read_text())['train_seconds']
    assert told == pytest.approx(seconds.sum())


def test_base_shares_stage_0(finished: Path, shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    base = finished / 'stage_0/snapshot.pth'
    results = RUNNERS.build(shapes_cfg('finetune', base=str(base))).train()
    assert same(weights(tmp_path / 'run/stage_0/snapshot.pth'), weights(base))
    shared = json.loads((finished / 'results.json').read_text())['stages'][0]
    assert results['stages'][0]['iou'] == shared['iou']
    assert results['stages'][0]['images'] is None
    assert results['method'] == 'finetune'


def test_base_that_does_not_exist(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='nowhere'):
        RUNNERS.build(shapes_cfg('sats', base=str(tmp_path / 'nowhere.pth')))


def test_joint_reports_the_split(shapes_cfg: MakeConfig) -> None:
    results = RUNNERS.build(shapes_cfg('joint')).train()
    (stage,) = results['stages']
    assert (results['protocol'], results['split']) == ('joint', '3-1')
    assert stage['mIoU']['new'] is not None
    base = [stage['iou'][name] for name in list(stage['iou'])[:4]]
    assert stage['mIoU']['base'] == pytest.approx(sum(base) / 4)
    assert results['forgetting'] is None


def test_hooks_see_the_borders_and_ema_is_what_counts(
    shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    BorderLog.calls.clear()
    hooks = [
        dict(type='PseudoLabelThresholdHook'),
        dict(type='BorderLog'),
        dict(type='EMAHook', momentum=0.5),
    ]
    RUNNERS.build(shapes_cfg('sats', protocol='3-3', custom_hooks=hooks)).train()
    assert [call[:2] for call in BorderLog.calls] == [
        ('before', 0), ('after', 0), ('before', 1), ('after', 1),
    ]  # fmt: skip
    checkpoint = load_checkpoint_safely(tmp_path / 'run/stage_1/epoch_1.pth')
    snapshot = weights(tmp_path / 'run/stage_1/snapshot.pth')
    # mmengine exchanges the two when it saves: `state_dict` holds the average.
    assert same(snapshot, dict(checkpoint['state_dict']))
    assert not any('old_model' in key for key in checkpoint['ema_state_dict'])
    raw = checkpoint['ema_state_dict']['module.decode_head.conv_seg.weight']
    assert not torch.equal(raw, snapshot['decode_head.conv_seg.weight'])


def test_thresholds_are_kept_for_resume(finished: Path) -> None:
    assert not (finished / 'stage_0/pseudo_label_thresholds.json').exists()
    kept = json.loads((finished / 'stage_2/pseudo_label_thresholds.json').read_text())
    assert len(kept['thresholds']) == 5


def test_a_misspelt_word_is_found_before_training(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    cfg = shapes_cfg('sats')
    cfg.train_cfg.max_epochs = '$epoch'
    with pytest.raises(KeyError, match=r"train_cfg.max_epochs='\$epoch'.*did you mean 'epochs'"):
        RUNNERS.build(cfg)
    assert not (tmp_path / 'run').exists()


def test_a_folder_of_images_and_masks(finished: Path, shapes_root: Path, tmp_path: Path) -> None:
    """The example of docs/usage.md: any folder pair, on top of a checkpoint with the base classes."""
    train, val = (
        next(path for path in shapes_root.glob(f'*size64*images{count}/{split}'))
        for count, split in ((24, 'train'), (12, 'val'))
    )
    configs = Path(__file__).parents[1] / 'configs'
    text = f"""
_base_ = ['{configs}/_base_/segformer_tiny_shapes.py', '{configs}/sats/sats.py']
protocol = '3-3'
class_names = ['background', 'a', 'b', 'c', 'd', 'e', 'f']
train_dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='{train}', pipeline='$train_pipeline',
    data_prefix=dict(img_path='images', seg_map_path='masks'), img_suffix='.png',
    metainfo=dict(classes='$class_names'))
eval_dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='{val}', pipeline='$eval_pipeline',
    data_prefix=dict(img_path='images', seg_map_path='masks'), img_suffix='.png',
    metainfo=dict(classes='$class_names'))
"""
    (tmp_path / 'own.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'own.py')
    base = weights(finished / 'stage_0/snapshot.pth')
    # As a checkpoint from elsewhere: without a background channel and without class names.
    for key in ('decode_head.conv_seg.weight', 'decode_head.conv_seg.bias'):
        base[key] = base[key][1:]
    torch.save(dict(state_dict=base), tmp_path / 'trained.pth')
    small = dict(epochs=1, crop_size=64, batch_size=8, report=None, work_dir=str(tmp_path / 'run'))
    cfg.merge_from_dict(small | dict(base=str(tmp_path / 'trained.pth')))
    results = RUNNERS.build(cfg).train()
    assert results['stages'][0]['iou'].keys() == {'background', 'a', 'b', 'c'}
    assert results['stages'][0]['iou']['background'] == 0.0  # nobody has taught it yet
    assert results['stages'][1]['new_classes'] == ['d', 'e', 'f']


def test_two_processes_do_not_train_in_one_folder(
    shapes_cfg: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_dir, 'PATIENCE', 0.3)
    runner = RUNNERS.build(shapes_cfg('finetune'))
    (tmp_path / 'run').mkdir()
    with work_dir.locked(tmp_path / 'run'):
        with pytest.raises(work_dir.WorkDirBusyError, match='another process is training'):
            runner.train()
        assert list((tmp_path / 'run').iterdir()) == []
    context = multiprocessing.get_context('fork')
    with work_dir.locked(tmp_path / 'run'):
        worker = context.Process(target=time.sleep, args=(60,))  # as a loader's, which outlives an error
        worker.start()
    with work_dir.locked(tmp_path / 'run'):
        worker.kill()


def test_the_users_own_config_is_not_overwritten(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / 'run').mkdir()
    path = tmp_path / 'run/config.py'
    shapes_cfg('finetune').dump(path)
    with pytest.raises(ValueError, match=r'config\.py would be overwritten'):
        RUNNERS.build(Config.fromfile(path))

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a part of a method may ask for, by flags, and what it brings along: hooks and imports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.engine import PseudoLabelThresholdHook
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.experiments.plan import parse_options
from mmseg_sats.engine.files.earlier import in_current_names
from mmseg_sats.engine.files.work_dir import check_same_run
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.models import DistillationPart, PseudoLabeler
from mmseg_sats.models.parts import flag
from tests.small_models import build, images, model_cfg, samples, save_weights

MakeConfig = Callable[..., Config]


@MODELS.register_module()
class ReadsAttention(DistillationPart):
    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        return student.logits.mean() * len(student.attentions)


@MODELS.register_module()
class AsksForAttention(ReadsAttention):
    needs_attention = True


@MODELS.register_module()
class AttentionOfStage0(DistillationPart):
    needs_attention = True
    needs_teacher = False

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        assert teacher is None
        return torch.tensor(float(len(student.attentions)))


@MODELS.register_module()
class MereModule(nn.Module):
    """A part that inherits from nothing of this package."""

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        assert teacher is not None
        return student.logits.mean()


@MODELS.register_module()
class Misspelt(MereModule):
    needs_atention = True


@MODELS.register_module()
class MisspeltOtherwise(DistillationPart):
    reduce_over_ranks = True


@MODELS.register_module()
class MisspeltLabeler(PseudoLabeler):
    needs_students = True

    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        return labels


@MODELS.register_module()
class MereLabeler:
    """A labeler that inherits from nothing of this package, and whose thresholds must be found."""

    needs_pass = True

    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        return labels


@HOOKS.register_module()
class OwnThresholds(PseudoLabelThresholdHook):
    """In the place of the one that it extends."""


@HOOKS.register_module()
class OfAMethod(Hook):
    """A hook that a method's file brings along."""


def later_stage(folder: Path, part: str) -> nn.Module:
    path = save_weights(build(model_cfg(4)), folder / 'old.pth')
    return build(model_cfg(6, old_model=dict(checkpoint=path, num_old=4), distillation=dict(part=dict(type=part))))


def loss(model: nn.Module) -> Tensor:
    labels = torch.randint(0, 6, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    return model.train().loss(images(), samples(labels))['loss_part']


def test_attention_that_was_not_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r'needs the class attribute `needs_attention = True`'):
        loss(later_stage(tmp_path, 'ReadsAttention'))
    asked = loss(later_stage(tmp_path, 'AsksForAttention'))
    torch.testing.assert_close(asked, 4 * loss(later_stage(tmp_path, 'MereModule')))


def test_a_part_without_an_old_model_gets_the_students_attention() -> None:
    stage_0 = build(model_cfg(4, distillation=dict(part=dict(type='AttentionOfStage0'))))
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    assert stage_0.train().loss(images(), samples(labels))['loss_part'] == 4


def test_a_part_that_does_not_inherit_has_the_defaults(tmp_path: Path) -> None:
    part = MereModule()
    for name in ('needs_attention', 'needs_teacher', 'needs_prototypes', 'reduces_over_ranks', 'hooks'):
        assert flag(part, name, DistillationPart) == getattr(DistillationPart, name)
    stage_0 = build(model_cfg(4, distillation=dict(part=dict(type='MereModule'))))
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    assert 'loss_part' not in stage_0.train().loss(images(), samples(labels))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(distillation=dict(part=dict(type='Misspelt'))),
            r"distillation\.part: Misspelt\.needs_atention is read by nothing \(did you mean 'needs_attention'\?\)",
        ),
        (
            dict(pseudo_labeler=dict(type='MisspeltLabeler')),
            r"pseudo_labeler: MisspeltLabeler\.needs_students is .*did you mean 'needs_student'",
        ),
        (
            dict(distillation=dict(part=dict(type='MisspeltOtherwise'))),
            r"MisspeltOtherwise\.reduce_over_ranks is read by nothing \(did you mean 'reduces_over_ranks'\?\)",
        ),
        (dict(outside_labeler=dict(type='MisspeltLabeler')), r'outside_labeler: MisspeltLabeler\.needs_students'),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model_cfg(4, **options))


def hooks_of(cfg: Config, index: int = 1) -> list[str]:
    protocol = build_protocol(cfg)
    stage = build_stage_config(cfg, protocol, protocol.stages[index], cfg.work_dir)
    assert 'method_hooks' not in stage
    return [hook['type'] for hook in stage.custom_hooks]


def test_parts_bring_the_hooks_that_they_need(shapes_cfg: MakeConfig) -> None:
    assert hooks_of(shapes_cfg('finetune')) == ['ProgressHook']
    assert hooks_of(shapes_cfg('sats')) == ['PseudoLabelThresholdHook', 'ProgressHook']
    assert hooks_of(shapes_cfg('ssul')) == ['PseudoLabelThresholdHook', 'ProgressHook']
    assert hooks_of(shapes_cfg('sdr')) == ['PrototypeHook', 'ProgressHook']
    mere = shapes_cfg('finetune')
    mere.pseudo_labeler = dict(type='MereLabeler')
    assert hooks_of(mere) == ['PseudoLabelThresholdHook', 'ProgressHook']


def test_hooks_of_the_user_stay_and_are_not_doubled(shapes_cfg: MakeConfig) -> None:
    assert hooks_of(shapes_cfg('sats', custom_hooks=[])) == ['PseudoLabelThresholdHook']
    own = [dict(type='ProgressHook'), dict(type='OwnThresholds')]
    assert hooks_of(shapes_cfg('sats', custom_hooks=own)) == ['ProgressHook', 'OwnThresholds']
    named = parse_options(['method_hooks=[WeightFusionHook]'])  # as a command line can give them
    assert hooks_of(shapes_cfg('finetune', **named)) == ['ProgressHook', 'WeightFusionHook']


def test_a_part_that_is_not_registered(shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('finetune')
    cfg.distillation = dict(part=dict(type='OfNoModuleThatWasImported'))
    with pytest.raises(KeyError, match=r'is the module that registers it in custom_imports or method_imports'):
        RUNNERS.build(cfg)


def test_a_methods_file_brings_hooks_and_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = Path(__file__).parents[1] / 'configs'
    (tmp_path / 'brought_along.py').write_text('LOADED = True\n')
    (tmp_path / 'method.py').write_text(
        f'_base_ = [{str(configs / "sats/sats.py")!r}]\n'
        "method_imports = ['brought_along']\nmethod_hooks = [dict(type='OfAMethod')]\n"
    )
    (tmp_path / 'leaf.py').write_text(
        f'_base_ = [{str(configs / "_base_/segformer_tiny_shapes.py")!r}, "./method.py"]\nprotocol = "3-1"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = Config.fromfile(tmp_path / 'leaf.py')
    cfg.work_dir = str(tmp_path / 'run')
    for index in (0, 1):
        assert hooks_of(cfg, index) == ['PseudoLabelThresholdHook', 'ProgressHook', 'OfAMethod']
    protocol = build_protocol(cfg)
    stage = build_stage_config(cfg, protocol, protocol.stages[1], cfg.work_dir)
    assert stage.custom_imports['imports'] == ['mmseg_sats', 'brought_along']
    (tmp_path / 'broken.py').write_text('import a_library_that_is_not_there\n')
    (tmp_path / 'faulty.py').write_text('1 / 0\n')
    for name, message in (
        ('nowhere_to_be_found', r"Python finds no module nowhere_to_be_found .*PYTHONPATH"),
        ('brought_along.LOADED', r"Python finds no module brought_along\.LOADED .*not of a class"),
        ('brought_along.py', r"'brought_along.py' is no module's name: expected dots and no \.py"),
        ('broken', r"broken was found, but \S+/broken\.py, line 1: ModuleNotFoundError: .*a_library_that_is_not_"),
        ('faulty', r'faulty was found, but importing it failed: \S+/faulty\.py, line 1: ZeroDivisionError'),
    ):
        cfg.method_imports = [name]
        with pytest.raises(ValueError, match=f'method_imports: {message}'):
            build_stage_config(cfg, protocol, protocol.stages[1], cfg.work_dir)


def test_a_run_of_an_earlier_version_is_the_same_run(shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('mib')
    kept = Config(cfg._cfg_dict.to_dict())
    kept.custom_hooks = [dict(type='PseudoLabelThresholdHook'), dict(type='PrototypeHook'), *cfg.custom_hooks]
    kept.segmentation_loss.num_old = '$num_old_classes'
    kept.model.decode_head.num_classes = '$num_classes'
    work_dir = Path(cfg.work_dir)
    work_dir.mkdir(parents=True)
    (work_dir / 'config.py').write_text(kept.pretty_text)
    check_same_run(work_dir, cfg)
    kept.segmentation_loss.num_old = 3
    (work_dir / 'config.py').write_text(kept.pretty_text)
    with pytest.raises(ValueError, match=r'segmentation_loss\.num_old: 3 there'):
        check_same_run(work_dir, cfg)
    current = cfg._cfg_dict.to_dict()
    assert in_current_names(current) == current


def test_names_of_an_earlier_version_work_with_a_warning(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    cfg = shapes_cfg('mib')
    cfg.segmentation_loss.num_old = '$num_old_classes'
    protocol = build_protocol(cfg)
    with pytest.warns(FutureWarning, match=r'\$num_old_classes is called \$num_old now'):
        stage = build_stage_config(cfg, protocol, protocol.stages[2], cfg.work_dir)
    assert stage.model.decode_head.loss_decode.num_old == 5
    path = save_weights(build(model_cfg(4)), tmp_path / 'old.pth')
    with pytest.warns(FutureWarning, match=r'old_model\.num_classes is called old_model\.num_old'):
        model = build(model_cfg(6, old_model=dict(checkpoint=path, num_classes=4)))
    assert model.old_model.model.num_classes == 4

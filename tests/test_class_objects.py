# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A class itself as `type` in a config: named where it can be, refused in one line where it cannot."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmseg.models.losses import CrossEntropyLoss
from torch import nn

from mmseg_sats.engine import IncrementalRunner
from mmseg_sats.engine.command_line import read_config
from mmseg_sats.engine.config.class_objects import name_classes

LAZY = """
from mmengine.hooks import EMAHook
from mmseg.models.losses import CrossEntropyLoss
from torch.nn import Identity
model = dict(decode_head=dict(loss_decode=dict(type=CrossEntropyLoss)), neck=dict(type=Identity), scale=1)
custom_hooks = [dict(type=EMAHook)]
"""


class SilentHook(Hook):
    """Registered nowhere, but this module can be imported."""


def named(**content: object) -> dict:
    cfg = Config(content, format_python_code=False)
    name_classes(cfg)
    return cfg.to_dict()


def test_a_run_made_of_classes_is_a_run_made_of_names(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('finetune', protocol='3-3', num_batch_per_epoch=1)
    cfg.segmentation_loss = dict(cfg.segmentation_loss, type=CrossEntropyLoss)
    cfg.custom_hooks = [dict(type=SilentHook)]
    RUNNERS.build(cfg).train()
    written = Config.fromfile(Path(cfg.work_dir) / 'stage_1/config.py')
    assert written.model.decode_head.loss_decode.type == 'CrossEntropyLoss'
    assert written.custom_hooks[-1].type == f'{__name__}.SilentHook'
    assert cfg.custom_hooks[0].type is SilentHook  # the caller's config stays as it was


def test_a_file_in_the_newer_style_is_one_of_names(tmp_path: Path) -> None:
    (tmp_path / 'lazy.py').write_text(LAZY)
    cfg = read_config(tmp_path / 'lazy.py', {'model.scale': 2})
    assert cfg.to_dict() == dict(
        model=dict(
            decode_head=dict(loss_decode=dict(type='CrossEntropyLoss')),
            neck=dict(type='torch.nn.Identity'),
            scale=2,
        ),
        custom_hooks=[dict(type='EMAHook')],
    )


def test_the_runner_of_a_config_may_be_the_class() -> None:
    assert named(runner_type=IncrementalRunner) == dict(runner_type='IncrementalRunner')


def test_what_no_import_finds_is_refused() -> None:
    class Mine(nn.Module):
        """Inside a function."""

    with pytest.raises(ValueError, match=r'^model\.parts\[1\]\.type is the class .*Mine, which no import finds[^\n]*$'):
        named(model=dict(parts=[dict(type='A'), dict(type=Mine)]))
    Mine.__module__, Mine.__qualname__ = '__main__', 'Mine'
    with pytest.raises(ValueError, match=r'^hook\.type is the class __main__\.Mine, which no import finds'):
        named(hook=dict(type=Mine))


@pytest.mark.parametrize(('value', 'kind'), [(CrossEntropyLoss, 'class'), (len, 'function'), (named, 'function')])
def test_elsewhere_than_as_a_type_it_is_refused(value: object, kind: str) -> None:
    with pytest.raises(ValueError, match=rf'^model\.loss is the {kind} [^\n]* may only be a `type`[^\n]*$'):
        named(model=dict(loss=value))


def test_a_config_of_names_stays_the_object_it_was() -> None:
    cfg = Config(dict(model=dict(type='A')))
    content = cfg._cfg_dict
    name_classes(cfg)
    assert cfg._cfg_dict is content

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The tables of docs/methods.md say of every method what its config says, and their example runs."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats.engine.config.own_scope import drop_own_scope
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.protocol import Protocol
from tests.test_configs import find
from tests.test_docs_commands import commands_in, parse_command, words_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/methods.md').read_text(encoding='utf-8')
CONFIGS = ROOT / 'configs'
METHODS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != '_base_')
# Parts have names in CamelCase, options of the model have not.
QUOTED, PART = re.compile(r'`([^`]+)`'), re.compile(r'[A-Z]\w*[a-z]\w*')
LABELS, LOSS, DISTILLATION, CLASSIFIER, START, TRAINED, KEPT, MEMORY = range(2, 10)


def rows() -> list[tuple[str, list[str]]]:
    """The method of each row, and its cells; a row of another width is an error."""
    lines = [line for line in PAGE.splitlines() if re.match(r'\| \[`\w+`\]\(\.\./configs/', line)]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert {len(row) for row in cells} == {MEMORY + 1}
    return [(QUOTED.findall(row[0])[0], row) for row in cells]


@functools.cache
def config_of(method: str) -> dict[str, Any]:
    return Config.fromfile(CONFIGS / method / f'{method}.py')._cfg_dict.to_dict()


def parts(value: Any) -> set[str]:
    """The parts that a config names."""
    return {kind for kind in find(value, 'type') if PART.fullmatch(kind)}


def quoted(*cells: str) -> set[str]:
    """The parts that cells name."""
    return {word for cell in cells for word in QUOTED.findall(cell) if PART.fullmatch(word)}


def term(part: dict[str, Any]) -> str:
    """A part of the sum as the tables write it: weight, name, what it wraps, and further weights in brackets."""
    weight = part.get('loss_weight', 1.0)
    factor = 'K_o ' if weight == '$num_old' else '' if weight == 1 else f'{weight:g} '
    further = [f'{value:g}' for name, value in part.items() if name.endswith('_weight') and name != 'loss_weight']
    inner = f' of {term(part["part"])}' if 'part' in part else ''
    return f'{factor}`{part["type"]}`{inner}' + (f' ({", ".join(further)})' if further else '')


def test_every_method_has_one_row() -> None:
    assert sorted(method for method, _ in rows()) == METHODS


@pytest.mark.parametrize('method', METHODS)
def test_a_row_says_what_the_config_says(method: str) -> None:
    (row,) = (cells for name, cells in rows() if name == method)
    cfg = config_of(method)
    labelled = [cfg.get(key) for key in ('pseudo_labeler', 'outside_labeler', 'label_transforms')]
    start = cfg['classifier_init']
    assert f'(../configs/{method}/{method}.py)' in row[0]
    assert quoted(*row) == parts(cfg)
    assert quoted(row[LABELS]) == parts(labelled)
    assert quoted(row[LOSS]) == parts(cfg['segmentation_loss'])
    assert row[DISTILLATION] == (' + '.join(term(part) for part in cfg['distillation'].values()) or '-')
    assert row[START] == f'`{start if isinstance(start, str) else start["type"]}`'
    sigmoids = 'sigmoids' in row[CLASSIFIER]
    assert sigmoids == (cfg['segmentation_loss']['type'] in ('OneVsRestLoss', 'SigmoidCrossEntropyLoss'))
    # Options of the model stand in their own columns; a head's dropout is none.
    options = {option for model in find(cfg, 'model') for option in model} - {'decode_head'}
    words = {word for cell in row[CLASSIFIER:] for word in QUOTED.findall(cell) if not PART.fullmatch(word)}
    assert words - {row[START].strip('`')} == options - {row[START].strip('`')}
    weighed = (cfg['pseudo_labeler'] or {}).get('scale_images', False)
    assert ('images weighed' in row[LABELS]) == weighed
    assert (row[MEMORY] == 'yes') == any((CONFIGS / method).glob('*_m.py'))


def test_lgkds_part_in_sats_is_lgkds_by_command_and_by_file(tmp_path: Path) -> None:
    (command,) = (line for line in commands_in(PAGE) if 'LabelGuidedDistillationLoss' in line)
    args = parse_command(words_of(command)[1:], command)
    given = Config.fromfile(CONFIGS / f'{args.config}.py')
    given.merge_from_dict(args.cfg_options)
    ((name, code),) = re.findall(r'`(\w+/[\w-]+\.py)`[^`]*```python\n(.*?)```', PAGE, re.DOTALL)
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(code)
    written = Config.fromfile(path)
    init_default_scope('mmseg')
    for cfg in (given, written):
        drop_own_scope(cfg)
        protocol = Protocol(cfg.protocol, 6)
        stage = build_stage_config(cfg, protocol, protocol.stages[1], tmp_path / 'run')
        losses = {key: MODELS.build(part) for key, part in stage.model.distillation.items()}
        lgkd = MODELS.build(dict(config_of('lgkd')['distillation']['output'], loss_weight=protocol.stages[1].num_old))
        assert {key: type(part).__name__ for key, part in losses.items()} == {
            'attention': 'CRPDistillationLoss', 'output': 'LabelGuidedDistillationLoss'
        }  # fmt: skip
        for weight in ('loss_weight', 'old_weight', 'new_weight'):
            assert getattr(losses['output'], weight) == getattr(lgkd, weight)

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Rows, runs, and what is missing."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmseg.registry import MODELS

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats.engine.experiments.plan import check_options, make_plan, memory_sizes, parse_options
from mmseg_sats.engine.experiments.split import write_split
from mmseg_sats.engine.experiments.tables import (
    METHOD_WEIGHTS,
    SYSTEMS,
    TABLE_DATASETS,
    TABLES,
    Row,
)

CONFIGS = Path(__file__).parents[1] / 'configs'
ROWS = [
    pytest.param(row, id=f'{name}-{part.name}-{row.title}')
    for name, table in TABLES.items()
    for part in table.parts
    for row in part.rows
]


def names(table: str, dataset: str = 'voc_mini', **options: object) -> list[str]:
    return [run.name for run in make_plan(TABLES[table], dataset, CONFIGS, **options).runs]


def test_names_are_those_of_the_contract() -> None:
    options = dict(systems=['sats', 'finetune', 'joint'], protocols=['15-1'])
    assert names('table1', **options, seeds=[0, 2]) == [
        'sats_15-1_seed0', 'sats_15-1_seed2', 'finetune_15-1_seed0', 'finetune_15-1_seed2',
        'joint_15-1_seed0', 'joint_15-1_seed2',
    ]  # fmt: skip
    assert names('table1', **options, memories=[40]) == ['sats_m_15-1_seed0', 'finetune_m_15-1_seed0']
    assert 'sats_without_attention_15-1_seed0' in names('ablations')
    assert 'sats_lambda_a_80_15-1_seed0' in names('ablations')
    assert 'sats_m_without_attention_5-3_seed0' in names('table3', memories=[40])


def test_some_variants_beside_the_whole_method() -> None:
    assert names('ablations', variants=['without_attention', 'lambda_a_5']) == [
        'sats_without_attention_15-1_seed0', 'sats_15-1_seed0', 'sats_lambda_a_5_15-1_seed0',
    ]  # fmt: skip


def test_weights_are_tried_as_often_for_every_method_and_around_those_of_its_file() -> None:
    def value(method: str, key: str) -> float:
        found = Config.fromfile(CONFIGS / method / f'{method}.py').distillation
        for name in key.split('.'):
            found = found[name]
        return found

    for method, weights in METHOD_WEIGHTS.items():
        assert weights == {key: value(method, key) for key in weights}
    assert names('weights', systems=['lgkd', 'mib'], variants=['weights_quarter', 'weights_1_1']) == [
        'mib_weights_quarter_15-1_seed0', 'mib_15-1_seed0',
        'lgkd_weights_1_1_15-1_seed0', 'lgkd_15-1_seed0',
    ]  # fmt: skip
    assert {len(part.rows) for part in TABLES['weights'].parts} == {3}
    mib = make_plan(TABLES['weights'], 'shapes', CONFIGS, systems=['mib']).runs
    assert [run.load().distillation.output.loss_weight for run in mib] == [10, 40, 160]
    files = {path.stem: Config.fromfile(path) for path in CONFIGS.glob('*/*.py') if path.stem == path.parent.name}
    distilling = {method for method, cfg in files.items() if cfg.get('distillation')}
    assert distilling == {part.name for part in TABLES['weights'].parts}


def test_a_run_that_stands_in_several_rows_is_one_run() -> None:
    plan = make_plan(TABLES['table4'], 'voc', CONFIGS, protocols=['15-1'], memories=[100])
    assert [cell.runs[0].name for cell in plan.cells if cell.runs].count('sats_m_15-1_seed0') == 3
    assert names('table4', 'voc', protocols=['15-1'], memories=[100]).count('sats_m_15-1_seed0') == 1


def test_protocols_are_the_papers_where_the_data_set_has_them() -> None:
    protocols = {cell.protocol for cell in make_plan(TABLES['table3'], 'voc', CONFIGS).cells}
    assert protocols == {'15-1', '5-3', '10-1'}
    blocks = make_plan(TABLES['table3'], 'voc', CONFIGS).cells
    assert {cell.protocol for cell in blocks if cell.part.name == 'blocks'} == {'15-1'}
    assert {cell.protocol for cell in make_plan(TABLES['table3'], 'shapes', CONFIGS).cells} == {'3-1'}


def test_words_of_a_row_come_last() -> None:
    plan = make_plan(
        TABLES['figure6'], 'shapes', CONFIGS, memories=[30], seeds=[4],
        options=['epochs=2', 'distillation.attention.loss_weight=1'],
    )  # fmt: skip
    cfg = plan.runs[0].load()
    assert plan.runs[0].name == 'sats_m_lambda_a_5_3-1_seed4'
    assert (cfg.seed, cfg.memory, cfg.epochs, cfg.method) == (4, 30, 2, 'sats')
    assert cfg.distillation.attention.loss_weight == 5


@pytest.mark.parametrize('row', ROWS)
def test_every_row_builds_its_losses(row: Row) -> None:
    cfg = Config.fromfile(CONFIGS / row.method / 'segformer_tiny_shapes_3-1.py')
    before = cfg.copy()
    cfg.merge_from_dict(parse_options(row.options))
    for loss in cfg.distillation.values():
        if loss is not None:
            MODELS.build(loss)
    changed = cfg._cfg_dict != before._cfg_dict
    # 20 is written out for the rows that are the method as it is.
    assert changed == (bool(row.variant) and row.model is None)


def test_missing_configs_are_named(tmp_path: Path) -> None:
    (tmp_path / 'configs/mib').mkdir(parents=True)
    (tmp_path / 'configs/mib/segformer_b2_voc_15-5.py').write_text("protocol = '15-5'\n")
    plan = make_plan(
        TABLES['table1'], 'voc', tmp_path / 'configs', systems=['mib', 'plop'], protocols=['15-1']
    )
    assert plan.missing == [
        'configs/mib/segformer_b2_voc_15-1.py does not exist',
        'configs/plop does not exist',
    ]
    assert plan.runs == []
    assert len(plan.cells) == 2


def test_a_folder_of_ones_own_is_a_row(tmp_path: Path) -> None:
    for name in ('mine', 'sats', '_base_'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'segformer_b2_voc_15-1.py').write_text("protocol = '15-1'\n")
    plan = make_plan(TABLES['table1'], 'voc', tmp_path, protocols=['15-1'])
    assert [run.name for run in plan.runs] == ['sats_15-1_seed0', 'mine_15-1_seed0']
    assert len(plan.cells) == len(SYSTEMS) + 1


def test_a_config_for_memory_is_preferred_with_memory(tmp_path: Path) -> None:
    (tmp_path / 'ssul').mkdir()
    for end in ('', '_m'):
        (tmp_path / f'ssul/segformer_b2_voc_15-1{end}.py').write_text("protocol = '15-1'\n")
    plan = make_plan(
        TABLES['table1'], 'voc', tmp_path, systems=['ssul'], protocols=['15-1'], memories=[0, 100]
    )
    assert [run.config.stem for run in plan.runs] == ['segformer_b2_voc_15-1', 'segformer_b2_voc_15-1_m']
    assert 'memory=100' in plan.runs[1].options


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"--methods='fintune' is unknown \(did you mean 'finetune'\?\)"):
        make_plan(TABLES['table1'], 'voc', CONFIGS, systems=['sats', 'fintune'])
    with pytest.raises(ValueError, match=r"--memory='bth' is unknown \(did you mean 'both'\?\)"):
        memory_sizes('bth', 'voc')
    with pytest.raises(ValueError, match='--cfg-options epochs: expected KEY=VALUE'):
        parse_options(['lr=1', 'epochs'])


def test_words_that_do_not_fit_name_the_config() -> None:
    plan = make_plan(TABLES['table3'], 'shapes', CONFIGS, options=['epochs.x=1'])
    with pytest.raises(ValueError, match=r'epochs.x=1 .*does not fit .*sats/segformer_tiny'):
        plan.runs[0].load()


def test_memory_sizes() -> None:
    assert memory_sizes('none', 'voc') == (0,)
    assert memory_sizes('both', 'voc_mini') == (0, 40)
    assert memory_sizes('memory', 'ade20k') == (300,)
    assert memory_sizes('12', 'voc') == (12,)
    assert TABLE_DATASETS['voc'].memory == 100


def test_the_split_keeps_every_name_once(tmp_path: Path) -> None:
    (tmp_path / 'train.txt').write_text('\n'.join(f'{k:03}' for k in reversed(range(23))) + '\n')
    assert write_split(tmp_path / 'train.txt', tmp_path / 'split') == (18, 5)
    held = (tmp_path / 'split/held.txt').read_text().split()
    assert held == ['000', '005', '010', '015', '020']
    fit = (tmp_path / 'split/fit.txt').read_text().split()
    assert sorted(fit + held) == [f'{k:03}' for k in range(23)]
    with pytest.raises(FileNotFoundError, match=r'nothing.txt: no such list'):
        write_split(tmp_path / 'nothing.txt', tmp_path)


def test_a_word_goes_to_the_configs_that_have_it() -> None:
    plan = make_plan(
        TABLES['table1'], 'voc', CONFIGS, systems=['sats', 'recall'], protocols=['15-1'],
        options=['outside_root=photographs', 'epochs=2'],
    )  # fmt: skip
    sats, recall = plan.runs if plan.runs[0].config.parent.name == 'sats' else plan.runs[::-1]
    assert recall.options[:2] == ('outside_root=photographs', 'epochs=2')
    assert sats.options[0] == 'epochs=2'
    assert not any('outside' in word for word in sats.options)
    assert recall.load().outside_root == 'photographs'


def test_a_word_that_no_config_has_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match=r"--cfg-options epoch=2: none .* 'epoch' \(did you mean 'epochs'\?\)"):
        check_options(make_plan(TABLES['table1'], 'voc', CONFIGS, systems=['sats', 'recall']).runs, ['epoch=2'])


def test_a_word_without_a_value_is_refused_by_name() -> None:
    plan = make_plan(TABLES['table1'], 'voc', CONFIGS, systems=['sats'], options=['vis_backends='])
    with pytest.raises(ValueError, match=r"option vis_backends= has no value"):
        plan.runs[0].load()

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The paper's tables as rows: a row is a method's config plus the options that override it. Pure Python."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmseg_sats.protocol import JOINT

VOC_PROTOCOLS = ('15-1', '15-5', '5-3', '10-1')
ADE20K_PROTOCOLS = ('100-10', '25-25')


@dataclass(frozen=True)
class DataSet:
    """A data set's configs: the model's name in them, the memory's size for ``-M``, and the protocols."""

    model: str
    memory: int
    protocols: tuple[str, ...]


TABLE_DATASETS = {
    'voc': DataSet('segformer_b2', 100, VOC_PROTOCOLS),
    'voc_mini': DataSet('segformer_b0', 40, VOC_PROTOCOLS),
    'ade20k': DataSet('segformer_b2', 300, ADE20K_PROTOCOLS),
    'shapes': DataSet('segformer_tiny', 30, ('3-1',)),
}

# In the order of Table 1; folders of configs that are not here come last.
SYSTEMS = (
    JOINT, 'finetune', 'finetune_frozen', 'lwf', 'lwf_mc', 'ilt', 'mib', 'plop', 'sdr', 'recall', 'st_cil',
    'ssul', 'sats',
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        title: what the table shows.
        variant: joins the row with the published figures and names its runs; empty for a method as it is.
        options: options for ``--cfg-options``.
        method: the folder of configs.
        model: how the config's file name begins, where it is not the data set's own model.
    """

    title: str
    variant: str = ''
    options: tuple[str, ...] = ()
    method: str = 'sats'
    model: str | None = None


@dataclass(frozen=True)
class Part:
    """Rows that stand together, and the protocols that the paper shows them on."""

    name: str
    title: str
    rows: tuple[Row, ...]
    protocols: tuple[str, ...] = VOC_PROTOCOLS


@dataclass(frozen=True)
class Table:
    """A table: its parts, the data set and the memory that the paper has in it.

    A table without parts holds one row for every system.
    """

    title: str
    dataset: str
    memory: str
    parts: tuple[Part, ...] = ()

    def parts_for(self, systems: Sequence[str]) -> tuple[Part, ...]:
        """The parts, with a row for every one of ``systems`` where the table has none of its own."""
        rows = tuple(Row(method, method=method) for method in systems)
        return self.parts or (Part('systems', 'systems', rows, TABLE_DATASETS[self.dataset].protocols),)


def _weights(part: str, title: str, name: str, values: Sequence[int]) -> tuple[Row, ...]:
    """One row for each weight of a part of the loss; 20 is the method as it is."""
    return tuple(
        Row(
            f'{title} = {value}',
            '' if value == 20 else f'{name}_{value}',
            (f'distillation.{part}.loss_weight={value}',),
        )
        for value in values
    )


WITHOUT_PSEUDO_LABELS = Row(
    'without pseudo-labels', 'without_pseudo_labels', ('pseudo_labeler=None',)
)
WITHOUT_ATTENTION = Row(
    'without attention transfer', 'without_attention', ('distillation.attention=None',)
)
WITHOUT_OUTPUT = Row(
    'without output distillation', 'without_output', ('distillation.output=None',)
)
PAPER_FORM = Row(
    'eq. (2) to the letter',
    'paper_form',
    (
        'distillation.attention.distance=squared_l2',
        'distillation.attention.normalisation=paper',
    ),
)

TABLES = {
    'table1': Table('Table 1: the systems on VOC', 'voc', 'both'),
    'table2': Table('Table 2: the systems on ADE20K', 'ade20k', 'both'),
    'table3': Table(
        'Table 3: components and blocks of SATS', 'voc', 'memory',
        (
            Part('components', 'components',
                 (WITHOUT_PSEUDO_LABELS, WITHOUT_ATTENTION, WITHOUT_OUTPUT, Row('all three')),
                 ('15-1', '5-3', '10-1')),
            Part('blocks', 'encoder blocks distilled', (
                Row('last one', 'blocks_3', ('distillation.attention.blocks=[3]',)),
                Row('last two', 'blocks_23', ('distillation.attention.blocks=[2,3]',)),
                Row('last three', 'blocks_123', ('distillation.attention.blocks=[1,2,3]',)),
                Row('all four'),
            ), ('15-1',)),
        ),
    ),
    'table4': Table(
        'Table 4: what is distilled, how it is pooled, and on which backbone', 'voc', 'memory',
        (
            Part('distillation', 'distilled', (
                Row('feature maps', 'source_feature', ('distillation.attention.source=feature',)),
                Row('self-attention + feature maps', 'source_both', ('distillation.attention.source=both',)),
                Row('self-attention'),
            ), ('15-1', '10-1')),
            Part('pooling', 'pooling', (
                Row('GP (global pooling)', 'pooling_global', ('distillation.attention.pooling=global',)),
                Row('NP (no pooling)', 'pooling_none', ('distillation.attention.pooling=none',)),
                Row('CRP (class-specific region pooling)'),
            ), ('15-1', '10-1')),
            Part('backbone', 'backbone', (
                Row('CRP with DeepLabV3', 'deeplabv3', model='deeplabv3'),
                Row('CRP with Transformer'),
            ), ('15-1', '10-1')),
        ),
    ),
    'figure6': Table(
        'Figure 6: the weights lambda_a and lambda_d of SATS, the other at 20', 'voc', 'memory',
        (
            Part('lambda_a', 'lambda_a',
                 _weights('attention', 'lambda_a', 'lambda_a', (5, 10, 20, 30, 40)), ('15-1',)),
            Part('lambda_d', 'lambda_d',
                 _weights('output', 'lambda_d', 'lambda_d', (5, 10, 20, 30, 40)), ('15-1',)),
        ),
    ),
    # Not in the paper: section 4.5 has lambda_a grow where memory is missing.
    'ablations': Table(
        'Ablations: the parts of SATS without memory', 'voc', 'none',
        (
            Part('components', 'components', (
                WITHOUT_PSEUDO_LABELS, WITHOUT_ATTENTION, WITHOUT_OUTPUT, PAPER_FORM, Row('all three'),
            ), ('15-1',)),
            Part('lambda_a', 'lambda_a',
                 _weights('attention', 'lambda_a', 'lambda_a', (5, 20, 80, 320)), ('15-1',)),
        ),
    ),
}  # fmt: skip

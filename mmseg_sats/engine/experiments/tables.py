# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The paper's tables as rows: a row is a method's config plus the options that override it. Pure Python."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    'ccp_mini': DataSet('segformer_b0', 40, ('10-1', '10-5')),
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


# The weights of each method's distillation, as in its file. Where several are listed, they are scaled together.
METHOD_WEIGHTS: dict[str, dict[str, float]] = {
    'lwf': {'output.loss_weight': 100.0},
    'lwf_mc': {'output.loss_weight': 10.0},
    'ilt': {'output.loss_weight': 10.0, 'feature.loss_weight': 10.0},
    'mib': {'output.loss_weight': 40.0},
    'plop': {'pod.feature_weight': 0.01, 'pod.logits_weight': 0.0005},
    'sdr': {'output.loss_weight': 100.0},
    'st_cil': {'entropy.loss_weight': 0.1},
    'sats': {'attention.loss_weight': 20.0, 'output.loss_weight': 20.0},
    'mbs': {'output.loss_weight': 25.0},
    'rcil': {'output.loss_weight': 100.0, 'cube.feature_weight': 0.01, 'cube.logits_weight': 0.0005},
    'ucd': {'output.loss_weight': 10.0, 'contrast.loss_weight': 0.01},
    'reminder': {'pod.feature_weight': 0.01, 'pod.logits_weight': 0.0005, 'similar.loss_weight': 0.5},
    'cit': {'output.loss_weight': 1.0},
    'nest': {'pod.feature_weight': 0.01, 'pod.logits_weight': 0.0005},
    'ewf': {'pod.feature_weight': 0.01, 'pod.logits_weight': 0.0005},
    'dkd': {'output.loss_weight': 5.0, 'decomposed.loss_weight': 5.0},
    'star': {'features.loss_weight': 5.0},
    'barm': {'output.loss_weight': 1.0, 'features.loss_weight': 4.0},
    'sats_plus': {'output.loss_weight': 20.0, 'attention.ratio': 1.0},
}


def _scaled(method: str) -> tuple[Row, ...]:
    """A method's row with a quarter of its weights, as it is, and with four times its weights."""
    def options(factor: float) -> tuple[str, ...]:
        return tuple(f'distillation.{key}={weight * factor:g}' for key, weight in METHOD_WEIGHTS[method].items())

    return (
        Row(f'{method}, a quarter', 'weights_quarter', options(0.25), method),
        Row(method, method=method),
        Row(f'{method}, four times', 'weights_four_times', options(4.0), method),
    )


# Of old and of new classes' pixels. The file has 1 and 0, of which there are no multiples; 5 and 1 are released, too.
LGKD_EVEN, LGKD_15_5 = (
    (f'distillation.output.old_weight={old}', 'distillation.output.new_weight=1') for old in (1, 5)
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

ATTENTION = ('distillation.attention.type=CRPDistillationLoss', 'distillation.attention.loss_weight=20')
LABEL_GUIDED = Row(
    'label-guided distillation', 'label_guided', ('distillation.output.type=LabelGuidedDistillationLoss',)
)
SELECTIVE = Row(
    'selective pseudo-labels', 'selective',
    ('pseudo_labeler.type=SelectivePseudoLabeler', 'pseudo_labeler.threshold=0.7'),
)  # fmt: skip
KEEP_BACKGROUND = Row('start that keeps background', 'keep_background', ('classifier_init=keep_background',))
FUSION = Row('fusion of weights', 'fusion', ('method_hooks=[WeightFusionHook]',))
CONTRAST = Row(
    "UCD's contrast", 'contrast',
    ('distillation.contrast.type=ContrastiveDistillationLoss', 'distillation.contrast.loss_weight=0.01'),
)  # fmt: skip

UNCERTAIN = Row(
    'uncertain pixels are background or old', 'uncertain',
    ('segmentation_loss._delete_=True', 'segmentation_loss.type=UnbiasedCrossEntropyLoss',
     'segmentation_loss.num_old=$num_old', 'pseudo_labeler.ignore_index=0'),
)  # fmt: skip
ADAPTIVE = Row(
    'attention weighed by gradients', 'adaptive',
    ('distillation.attention._delete_=True', 'distillation.attention.type=AdaptiveWeight',
     'distillation.attention.part.type=CRPDistillationLoss', 'distillation.attention.every=5',
     'distillation.attention.initial=1'),
)  # fmt: skip
OUTPUT_5 = Row('output distillation weighs 5', 'output_5', ('distillation.output.loss_weight=5',))


def _together(*rows: Row) -> Row:
    """A row with the options of several."""
    return Row(
        ', '.join(row.title for row in rows), '_'.join(row.variant for row in rows),
        tuple(option for row in rows for option in row.options),
    )  # fmt: skip


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
    # Nor are these: parts of newer methods in place of SATS's or beside them, and attention transfer in newer methods.
    'combinations': Table(
        'Combinations: attention transfer with parts of other methods', 'voc', 'none',
        (
            Part('single', 'SATS with one other part', (
                Row('sats'), LABEL_GUIDED, SELECTIVE, KEEP_BACKGROUND, UNCERTAIN, ADAPTIVE, FUSION, CONTRAST,
                WITHOUT_ATTENTION,
            ), ('15-1',)),
            Part('pairs', 'SATS with several', tuple(
                _together(*rows) for rows in (
                    (LABEL_GUIDED, KEEP_BACKGROUND), (LABEL_GUIDED, SELECTIVE), (LABEL_GUIDED, FUSION),
                    (KEEP_BACKGROUND, FUSION), (LABEL_GUIDED, KEEP_BACKGROUND, FUSION),
                    (LABEL_GUIDED, UNCERTAIN), (LABEL_GUIDED, KEEP_BACKGROUND, UNCERTAIN),
                    (LABEL_GUIDED, KEEP_BACKGROUND, UNCERTAIN, WITHOUT_ATTENTION),
                    (LABEL_GUIDED, KEEP_BACKGROUND, SELECTIVE, WITHOUT_ATTENTION),
                    (UNCERTAIN, OUTPUT_5), (UNCERTAIN, OUTPUT_5, ADAPTIVE),
                    (UNCERTAIN, OUTPUT_5, WITHOUT_ATTENTION),
                )
            ), ('15-1',)),
            Part('sats_plus', 'SATS+ without one of its parts', (
                Row('sats_plus', method='sats_plus'),
                replace(WITHOUT_ATTENTION, method='sats_plus'),
                Row('lambda_a = 20', 'lambda_a_20', ('distillation.attention._delete_=True', *ATTENTION), 'sats_plus'),
                Row("MiB's distillation", 'unbiased', ('distillation.output.type=UnbiasedDistillationLoss',),
                    'sats_plus'),
                # An unbiased cross-entropy with one old channel is the plain one.
                Row('uncertain pixels ignored', 'ignored',
                    ('pseudo_labeler.ignore_index=255', 'segmentation_loss.num_old=1'), 'sats_plus'),
                Row('balanced start', 'balanced', ('classifier_init=balanced',), 'sats_plus'),
                Row('without fusion', 'without_fusion', ('method_hooks=None',), 'sats_plus'),
            ), ('15-1',)),
            *(Part(method, f'{method}, without and with attention transfer', (
                Row(method, method=method),
                Row(f'{method} with attention transfer', 'with_attention', ATTENTION, method),
            ), ('15-1',)) for method in ('ucd', 'mbs', 'ewf', 'dkd', 'star')),
        ),
    ),
    # As many tries for every method, on images that no table reports on.
    'weights': Table(
        'Weights: the distillation of every method, weaker, as it is and stronger', 'voc', 'none',
        (
            *(Part(method, method, _scaled(method), ('15-1',)) for method in METHOD_WEIGHTS),
            Part('lgkd', 'lgkd', (
                Row('lgkd, weights 1 and 1', 'weights_1_1', LGKD_EVEN, 'lgkd'),
                Row('lgkd', method='lgkd'),
                Row('lgkd, weights 5 and 1', 'weights_5_1', LGKD_15_5, 'lgkd'),
            ), ('15-1',)),
        ),
    ),
}  # fmt: skip

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Takes the model of a run from the mmseg config that a checkpoint was trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.models.heads.cascade import CASCADE, join_cascade
from mmseg_sats.models.own_options import own_options
from mmseg_sats.utils.user_modules import add_imports, imports_of, read_file

SEGMENTORS = ('EncoderDecoder', 'IncrementalEncoderDecoder', CASCADE)


def take_trained_model(cfg: Config) -> None:
    """Merges ``cfg.model`` into the model of the config that ``cfg.model_config`` names, in place.

    So ``cfg.model`` needs to set only what differs from the trained model, e.g. the type of the segmentor
    and its losses. Without ``model_config`` nothing happens.

    Args:
        cfg: a run's config; ``model_config`` is the path of an mmseg config or of a stage's config.

    Raises:
        FileNotFoundError: the config does not exist.
        ValueError: the config has no model, its model is not an ``EncoderDecoder`` or ``CascadeEncoderDecoder``, or an
            auxiliary head has another number of channels than the decode head; or a module that the config names is
            not found or cannot be imported.
    """
    path = cfg.get('model_config')
    if path is None:
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f'model_config {path} does not exist')
    trained = read_file(path)
    merged = Config(dict(model=_model_of(trained, path)))
    merged.merge_from_dict(dict(model=dict(cfg.get('model') or {})))
    cfg.model = merged.model
    _check_heads(cfg.model, path)
    # The modules that register the model's parts must be imported by every stage's config too.
    if imports := imports_of(trained):
        add_imports(cfg, imports)
    if trained.get('import_folders'):
        cfg.import_folders = list(dict.fromkeys([*(cfg.get('import_folders') or []), *trained.import_folders]))


def _check_heads(model: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError if an auxiliary head has other channels than the classes, since it cannot grow with them."""
    heads, channels = model.get('auxiliary_head') or [], model['decode_head'].get('num_classes')
    for head in heads if isinstance(heads, list) else [heads]:
        if head.get('num_classes', channels) != channels:
            raise ValueError(
                f'model_config {path}: an auxiliary {head.get("type")} has {head.get("num_classes")} channels, '
                f'the decode head {channels}: expected one for each class. Leave such heads out by '
                'model = dict(auxiliary_head=None)'
            )


def note_on_sizes(cfg: Config) -> str | None:
    """A note for the log if the trained model was tested on images of another size than the run tests on, or None.

    Args:
        cfg: a stage's config, its variables resolved.
    """
    path = cfg.get('model_config')
    if path is None:
        return None
    trained = read_file(path)
    theirs, own = _resizing(trained.get('test_pipeline')), _resizing(cfg.get('eval_pipeline'))
    if theirs == own:
        return None
    return (
        f'{path} tests on images after {theirs or "no resizing"}, this run after {own or "no resizing"}: its figures '
        'are not those of that size. For the same, put the same steps before LoadAnnotations in test_pipeline'
    )


def _resizing(pipeline: Any) -> list[dict[str, Any]]:
    steps = [dict(step) for step in pipeline or () if isinstance(step, dict)]
    return [
        {key: list(value) if isinstance(value, tuple) else value for key, value in step.items()}
        for step in steps
        if 'Resize' in str(step.get('type'))
    ]


def _model_of(trained: Config, path: Path) -> dict[str, Any]:
    model = trained.get('model')
    if model is None or model.get('type') not in SEGMENTORS:
        found = 'none' if model is None else repr(model.get('type'))
        raise ValueError(
            f'model_config {path}: expected a model of type EncoderDecoder (one backbone, one '
            f'decode head on BaseDecodeHead) or {CASCADE}, found {found}'
        )
    # A stage's config has options for its stage and method, which this run sets itself.
    own = own_options(model.type)
    model = {key: value for key, value in join_cascade(model.to_dict()).items() if key not in own}
    # As in mmengine, a top-level data_preprocessor is used if the model has none.
    if not model.get('data_preprocessor'):
        model['data_preprocessor'] = dict(trained.get('data_preprocessor') or {})
    if not model['data_preprocessor']:
        raise ValueError(
            f'model_config {path} has no data_preprocessor: expected the mean and standard deviation '
            'that the model was trained with'
        )
    return model

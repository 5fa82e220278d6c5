# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The model of a run out of the mmseg config that a checkpoint was trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.engine.config.own_options import own_options

SEGMENTORS = ('EncoderDecoder', 'IncrementalEncoderDecoder')


def take_trained_model(cfg: Config) -> None:
    """Puts the model of ``cfg.model_config`` under ``cfg.model``, in place.

    ``cfg.model`` then needs to hold only what differs from the trained model: the segmentor of the
    stages, its losses. Without ``model_config`` nothing happens.

    Args:
        cfg: a run's config; ``model_config`` is the path of an mmseg config or a stage's own.

    Raises:
        FileNotFoundError: no such config.
        ValueError: it has no model, one that is not an ``EncoderDecoder``, or one with an auxiliary head whose
            channels are not the classes.
    """
    path = cfg.get('model_config')
    if path is None:
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f'model_config {path} does not exist')
    trained = Config.fromfile(path)
    merged = Config(dict(model=_model_of(trained, path)))
    merged.merge_from_dict(dict(model=dict(cfg.get('model') or {})))
    cfg.model = merged.model
    _check_heads(cfg.model, path)
    # What registers the model's parts must come along into every stage's config.
    imports = (trained.get('custom_imports') or {}).get('imports') or []
    if imports:
        own = cfg.get('custom_imports') or dict(imports=[], allow_failed_imports=False)
        own = dict(own, imports=list(dict.fromkeys([*own['imports'], *imports])))
        cfg.custom_imports = own


def _check_heads(model: Mapping[str, Any], path: Path) -> None:
    """An auxiliary head for something else than the classes cannot grow with them."""
    heads, channels = model.get('auxiliary_head') or [], model['decode_head'].get('num_classes')
    for head in heads if isinstance(heads, list) else [heads]:
        if head.get('num_classes', channels) != channels:
            raise ValueError(
                f'model_config {path}: an auxiliary {head.get("type")} has {head.get("num_classes")} channels, '
                f'the decode head {channels}: expected one for each class. Leave such heads out by '
                'model = dict(auxiliary_head=None)'
            )


def note_on_sizes(cfg: Config) -> str | None:
    """What to tell somebody whose model was tested on images of another size than the run's, or None.

    Args:
        cfg: a stage's config, its words resolved.
    """
    path = cfg.get('model_config')
    if path is None:
        return None
    trained = Config.fromfile(path)
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
            f'decode head on BaseDecodeHead), found {found}'
        )
    # A config of ours says things of a stage and a method, which the next run says anew.
    own = own_options(model.type)
    model = {key: value for key, value in model.to_dict().items() if key not in own}
    # mmengine takes it from the top level where the model has none of its own.
    if not model.get('data_preprocessor'):
        model['data_preprocessor'] = dict(trained.get('data_preprocessor') or {})
    if not model['data_preprocessor']:
        raise ValueError(
            f'model_config {path} has no data_preprocessor: expected the mean and standard deviation '
            'that the model was trained with'
        )
    return model

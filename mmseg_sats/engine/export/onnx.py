# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage's model as ONNX, for any image size, compared with the original before it is kept."""

import importlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmseg.models import EncoderDecoder
from torch import Tensor, nn

from mmseg_sats.engine.export.stock import window_of
from mmseg_sats.models.backbones.input_channels import input_channels
from mmseg_sats.utils.checkpoint import write_atomically

TOLERANCE = 1e-4
# Height and width; the graph is traced at the first, and the second tells whether it holds elsewhere. A model that is
# tested in windows is exported for their size alone.
SIZES = ((128, 160), (224, 96))
NEEDED = ('onnx', 'onnxscript', 'onnxruntime')


class WholeImageLogits(nn.Module):
    """The part of a segmentor that is exported: from normalised images to logits of the same size.

    Args:
        model: a segmentor in eval mode.
    """

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) of normalised images (B, 3, H, W), RGB; as many bands as the model takes."""
        logits = self.model(images, mode='tensor')
        return F.interpolate(
            logits,
            size=images.shape[-2:],
            mode='bilinear',
            align_corners=self.model.align_corners,
        )


def check_onnx_installed() -> None:
    """Raises ImportError naming the packages that are missing and how to get them."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'ONNX export needs {", ".join(missing)}: '
            "`pip install 'mmseg_sats[onnx]'`"
        )


def export_onnx(model: EncoderDecoder, path: Path) -> float:
    """Writes the model as ONNX with free batch, height and width; in slide mode of the windows' height and width.

    Args:
        model: the stage's model as ``load_for_export`` gives it. Its classes and palette, and mean and
            standard deviation of its preprocessing become metadata of the file, as JSON.
        path: the file to write.

    Returns:
        The largest difference of logits from PyTorch's at ``SIZES``, as a share of the largest
        logit where that exceeds 1.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: onnxruntime's logits differ by more than ``TOLERANCE``; no file is left.
    """
    check_onnx_installed()
    wrapped = WholeImageLogits(model).eval()
    window = window_of(model)
    sizes = SIZES if window is None else (window,)
    content = _serialised(wrapped, _metadata(model), sizes[0], free=window is None)
    worst = max(_difference(wrapped, content, size) for size in sizes)
    if not worst <= TOLERANCE:
        raise ValueError(
            f'onnxruntime gives logits that differ by {worst:.2g} from PyTorch, more than '
            f'{TOLERANCE:g}: {path} is not written'
        )
    write_atomically(path, lambda file: file.write(content))
    return worst


def _serialised(wrapped: nn.Module, metadata: dict[str, str], size: tuple[int, int], free: bool) -> bytes:
    any_size = torch.export.Dim.AUTO
    # Two images: with one, the exporter takes the batch for a constant.
    example = torch.randn(2, input_channels(wrapped.model), *size, generator=torch.Generator().manual_seed(0))
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    program = torch.onnx.export(
        wrapped,
        (example,),
        dynamo=True,
        dynamic_shapes=(dict.fromkeys((0, 2, 3) if free else (0,), any_size),),
        input_names=['images'],
        output_names=['logits'],
        verbose=False,
    )
    model = program.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _metadata(model: EncoderDecoder) -> dict[str, str]:
    preprocessor = model.data_preprocessor
    values = {name: model.dataset_meta.get(name) for name in ('classes', 'palette')}
    for name in ('mean', 'std'):
        tensor = getattr(preprocessor, name, None)
        values[name] = None if tensor is None else tensor.flatten().tolist()
    return {key: json.dumps(value) for key, value in values.items()}


@torch.no_grad()
def _difference(wrapped: nn.Module, content: bytes, size: tuple[int, int]) -> float:
    """How far onnxruntime's logits for one random image are from PyTorch's, see ``export_onnx``."""
    runtime = importlib.import_module('onnxruntime')
    session = runtime.InferenceSession(content, providers=['CPUExecutionProvider'])
    image = torch.randn(1, input_channels(wrapped.model), *size, generator=torch.Generator().manual_seed(1))
    (found,) = session.run(None, {'images': image.numpy()})
    expected = wrapped(image).numpy()
    if found.shape != expected.shape:
        raise ValueError(f'onnxruntime gives logits {found.shape}, PyTorch {expected.shape}')
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))

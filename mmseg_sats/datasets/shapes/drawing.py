# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""``shapes``: drawn scenes of textured shapes, so that everything runs without a download.

A class is an outline with a texture, in a loose family of hues, so that no single cue identifies it.
Every third class has the same hues: of six classes the later three have the colours of the earlier
three. The background is full of stripes, strokes and blobs in the colours of the classes.

A scene is a function of (seed, split, index) and of the parameters in the folder's name: it does
not matter how many others are drawn, in which order or in which process. The masks are exact:
there is no ignored border.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

MAX_CLASSES = 200
SPLITS = ('train', 'val')
# Part of the folder's name: raise it with every change to the drawing, or old files pass as new.
DRAWING_VERSION = 1


class ShapeClass(NamedTuple):
    """What tells a class from the others: an outline, a texture and the middle of its hues."""

    outline: str
    texture: str
    colour: str

    @property
    def hue(self) -> float:
        """Middle of the hue family, 0..1."""
        return HUES[self.colour]


# --- outlines: closed contours of equal area; a second contour is a hole --------------------------


def _arc(start: float, stop: float, radius: float = 1.0, x: float = 0.0, n: int = 40) -> np.ndarray:
    """Points (n, 2) on a circle around (x, 0); angles in turns."""
    angle = 2 * np.pi * np.linspace(start, stop, n)
    return np.stack((x + radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def _polygon(corners: int, inner: float | None = None) -> np.ndarray:
    """Regular polygon, or a star with as many points where ``inner`` radius is given."""
    if inner is None:
        return _arc(0, 1 - 1 / corners, n=corners)
    points = _arc(0, 1 - 0.5 / corners, n=2 * corners)
    points[1::2] *= inner
    return points


def _cross(arm: float = 0.32) -> np.ndarray:
    """A plus sign; ``arm`` is half the width of an arm."""
    quarter = np.array([(1, -arm), (1, arm), (arm, arm)])
    turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([quarter @ turn for turn in turns])


def _equal_area(*contours: np.ndarray, area: float = 1.9) -> tuple[np.ndarray, ...]:
    """Scale an outline to a common area; otherwise stars would have half as many pixels as discs."""
    areas = [cv2.contourArea(contour.astype(np.float32)) for contour in contours]
    scale = math.sqrt(area / (areas[0] - sum(areas[1:])))
    return tuple(scale * contour for contour in contours)


OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    'disc': _equal_area(_arc(0, 1)),
    'star': _equal_area(_polygon(5, inner=0.45)),
    'square': _equal_area(_polygon(4)),
    'ring': _equal_area(_arc(0, 1), _arc(0, 1, radius=0.5)),
    'triangle': _equal_area(_polygon(3)),
    'cross': _equal_area(_cross()),
    'crescent': _equal_area(
        np.concatenate((_arc(0.14, 0.86), _arc(0.75, 0.25, radius=0.77, x=0.637)))
    ),
    'hexagon': _equal_area(_polygon(6)),
}


# --- textures: (u, v) in the shape's own axes, radius 1 -> share of the second colour, 0..1 -------


def _plain(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.zeros_like(u)


def _striped(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 1.5 * np.sin(8.5 * u), 0, 1)


def _dotted(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.clip(3 * np.cos(7.5 * u) * np.cos(7.5 * v) - 0.6, 0, 1)


def _checkered(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 2 * np.sin(6 * u) * np.sin(6 * v), 0, 1)


def _shaded(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 0.55 * u, 0, 1)


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    'plain': _plain,
    'striped': _striped,
    'dotted': _dotted,
    'checkered': _checkered,
    'shaded': _shaded,
}
HUES = {'red': 0.0, 'green': 0.4, 'violet': 0.8, 'yellow': 0.2, 'blue': 0.6}


# --- classes --------------------------------------------------------------------------------------


def shape_class(label: int) -> ShapeClass:
    """The class with this label, the same for any number of classes.

    Args:
        label: 1..200; 0 is background.

    Returns:
        One of the 8 x 5 x 5 combinations. Outline and texture differ between any 40 labels in a
        row, since 8 and 5 have no common factor; the hues move on by one family every 40.

    Raises:
        ValueError: If there is no such class.
    """
    if not 1 <= label <= MAX_CLASSES:
        raise ValueError(f'a shape has a label in 1..{MAX_CLASSES}, got {label}')
    k = label - 1
    # Only three hues in a row of 40, so that colour alone does not tell the classes.
    hue = (k % 40 % 3 + k // 40) % len(HUES)
    return ShapeClass(
        list(OUTLINES)[k % len(OUTLINES)], list(TEXTURES)[k % len(TEXTURES)], list(HUES)[hue]
    )


def class_names(num_classes: int) -> tuple[str, ...]:
    """Names of the labels 0..num_classes: 'background', 'plain disc', 'striped star', ...

    The colour is named from the 41st shape on, where outline and texture no longer suffice.
    """
    names = ['background']
    for label in range(1, num_classes + 1):
        outline, texture, colour = shape_class(label)
        names.append(f'{texture} {outline}' if label <= 40 else f'{colour} {texture} {outline}')
    return tuple(names)


def class_palette(num_classes: int) -> list[list[int]]:
    """RGB colours for drawing the labels 0..num_classes, all different; background is black."""
    # Golden-ratio steps keep neighbouring labels far apart in hue.
    hues = [(0.618034 * k) % 1 for k in range(num_classes)]
    colours = [_rgb(hue, (0.9, 0.6)[k % 2], (1, 0.75, 0.55)[k % 3]) for k, hue in enumerate(hues)]
    return [[0, 0, 0]] + [[round(255 * c) for c in colour] for colour in colours]


def scene_classes(
    index: int,
    *,
    split: str = 'train',
    num_classes: int = 6,
    seed: int = 0,
    classes_per_image: tuple[int, int] = (1, 3),
) -> list[int]:
    """The labels of the shapes that one scene holds, all different.

    Every class is equally often the first of a scene, so that no class is rare: ``num_classes``
    consecutive scenes from a multiple of ``num_classes`` on have each class once, in a shuffled order.

    Args:
        index: Number of the scene, from 0.
        split: 'train' or 'val'.
        num_classes: Number of shape classes.
        seed: Of the data set.
        classes_per_image: Smallest and largest number of classes.

    Returns:
        Labels in 1..num_classes.
    """
    cycle, place = divmod(index, num_classes)
    first = _generator(seed, split, 0, cycle).permutation(num_classes)[place]
    rng = _generator(seed, split, 1, index)
    low, high = (min(bound, num_classes) for bound in classes_per_image)
    others = rng.permutation(np.delete(np.arange(num_classes), first))
    count = int(rng.integers(low, high + 1))
    return [int(k) + 1 for k in (first, *others[: count - 1])]


# --- drawing --------------------------------------------------------------------------------------


def draw_scene(
    index: int,
    *,
    split: str = 'train',
    num_classes: int = 6,
    image_size: int = 96,
    seed: int = 0,
    classes_per_image: tuple[int, int] = (1, 3),
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        index: Number of the scene, from 0.
        split: 'train' or 'val'; the two share no scene.
        num_classes: Number of shape classes.
        image_size: Height and width in pixels.
        seed: Of the data set.
        classes_per_image: Smallest and largest number of classes in a scene.

    Returns:
        Image, uint8 (image_size, image_size, 3), BGR as OpenCV has it, and mask, uint8
        (image_size, image_size), with 0 for background and the labels of :func:`scene_classes`,
        every one of them in some pixel.
    """
    labels = scene_classes(
        index,
        split=split,
        num_classes=num_classes,
        seed=seed,
        classes_per_image=classes_per_image,
    )
    rng = _generator(seed, split, 2, index)
    image = _background(rng, image_size)
    for _ in range(int(rng.integers(2, 6))):
        _draw_distractor(rng, image)
    # An instance number per pixel, to see how much of each instance is still visible.
    instances = np.zeros((image_size, image_size), dtype=np.uint8)
    owners = [0]
    for label in rng.permutation(labels):
        for _ in range(1 + int(rng.random() < 0.3)):
            _draw_shape(rng, image, instances, len(owners), shape_class(int(label)))
            owners.append(int(label))
    mask = np.array(owners, dtype=np.uint8)[instances]
    return _photograph(rng, image), mask


def _draw_shape(
    rng: np.random.Generator,
    image: np.ndarray,
    instances: np.ndarray,
    instance: int,
    shape: ShapeClass,
) -> None:
    """Draw one instance over what is there, into ``image`` and ``instances``."""
    cover, centre, axes = _place(rng, instances, instance, OUTLINES[shape.outline])
    first, second = _two_tones(rng, shape.hue)
    (x, y, _, _), box = _bounding_box(cover)
    height, width = cover[box].shape
    grid = np.stack(np.meshgrid(np.arange(x, x + width), np.arange(y, y + height)), axis=-1)
    u, v = np.moveaxis((grid - centre) @ np.linalg.inv(axes), -1, 0)
    share = TEXTURES[shape.texture](u, v).astype(np.float32)[..., None]
    _blend(image[box], cover[box], first + share * (second - first))
    instances[cover > 127] = instance


def _place(
    rng: np.random.Generator,
    instances: np.ndarray,
    instance: int,
    contours: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find a place where a shape leaves enough of the earlier ones to be seen.

    Returns:
        Cover, uint8 (size, size); centre (2,) and axes (2, 2): unit row vectors times ``axes``,
        plus ``centre``, are pixels.
    """
    size = len(instances)
    visible = np.bincount(instances.ravel(), minlength=instance)
    radius = size * rng.uniform(0.17, 0.28)
    while True:
        angle, aspect = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1)
        centre = rng.uniform(0.8 * radius, size - 0.8 * radius, size=2)
        cos, sin = radius * math.cos(angle), radius * math.sin(angle)
        axes = np.array([[cos, sin], [-sin * aspect, cos * aspect]])
        cover = _fill([contour @ axes + centre for contour in contours], size)
        hidden = np.bincount(instances[cover > 127], minlength=instance)
        # Shapes may cover one another, but none hides more than 30 % of what is left of another.
        # Ever smaller shapes end the search in a crowded scene.
        if hidden.any() and np.all(hidden[1:] <= 0.3 * visible[1:]):
            return cover, centre, axes
        radius = max(0.93 * radius, 0.04 * size)


def _fill(contours: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Anti-aliased cover, uint8 (size, size), of contours in pixels; the second one is a hole."""
    canvas = np.zeros((size, size), dtype=np.uint8)
    # 4 fractional bits: OpenCV takes fixed-point coordinates.
    points = [np.round(contour * 16).astype(np.int32) for contour in contours]
    cv2.fillPoly(canvas, points, 255, lineType=cv2.LINE_AA, shift=4)
    return canvas


def _bounding_box(cover: np.ndarray) -> tuple[tuple[int, int, int, int], tuple[slice, slice]]:
    """Where a cover is not 0: (x, y, width, height), and the same as slices."""
    x, y, width, height = cv2.boundingRect(cover)
    return (x, y, width, height), (slice(y, y + height), slice(x, x + width))


def _blend(image: np.ndarray, cover: np.ndarray, colour: np.ndarray, opacity: float = 1) -> None:
    """Lay a colour over an image, in place, as far as ``cover`` (0..255) goes."""
    alpha = cover[..., None] * np.float32(opacity / 255)
    image += alpha * (colour - image)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft patches of two dull colours, at times with faint stripes; float32 (size, size, 3)."""
    cells = int(rng.integers(3, 8))
    coarse = rng.random((cells, cells), dtype=np.float32)
    mix = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    first, second = (
        _bgr(rng.random(), rng.uniform(0.05, 0.45), rng.uniform(0.25, 0.85)) for _ in range(2)
    )
    if rng.random() < 0.5:
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(20, 60)
        along = np.arange(size) / size * frequency
        wave = np.sin(along[:, None] * math.sin(angle) + along[None] * math.cos(angle))
        mix = mix + rng.uniform(0.1, 0.3) * wave.astype(np.float32)
    return first + mix[..., None] * (second - first)


def _draw_distractor(rng: np.random.Generator, image: np.ndarray) -> None:
    """A stroke or a blob in the colours of a class; it belongs to background."""
    size = len(image)
    colour, _ = _two_tones(rng, rng.choice(list(HUES.values())))
    canvas = np.zeros((size, size), dtype=np.uint8)
    if rng.random() < 0.6:
        points = np.cumsum(rng.normal(0, size / 5, (4, 2)), axis=0) + rng.uniform(0, size, 2)
        width = int(rng.integers(1, max(2, size // 24) + 1))
        cv2.polylines(canvas, [points.round().astype(np.int32)], False, 255, width, cv2.LINE_AA)
    else:
        # A random closed curve, smaller than most shapes.
        reach = size * rng.uniform(0.03, 0.09) * rng.uniform(0.5, 1.5, (9, 1))
        points = _arc(0, 8 / 9, n=9) * reach + rng.uniform(0, size, 2)
        cv2.fillPoly(canvas, [points.round().astype(np.int32)], 255, cv2.LINE_AA)
    _, box = _bounding_box(canvas)
    _blend(image[box], canvas[box], colour, rng.uniform(0.5, 1))


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light, a slight blur at times, and noise; uint8."""
    size = len(image)
    slope = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    across, down = rng.uniform(-0.4, 0.4, 2).astype(np.float32)
    light = np.float32(rng.uniform(0.8, 1.1)) + across * slope[None] + down * slope[:, None]
    image = image * light[..., None]
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9) * size / 96)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image + np.float32(rng.uniform(3, 12)) * noise, 0, 255).astype(np.uint8)


def _two_tones(rng: np.random.Generator, hue: float) -> tuple[np.ndarray, np.ndarray]:
    """A colour of a hue family and a clearly lighter or darker one."""
    hue = hue + rng.uniform(-0.1, 0.1)
    saturation = rng.uniform(0.4, 0.95)
    dark, light = rng.uniform(0.25, 0.45), rng.uniform(0.75, 1)
    tones = [_bgr(hue, saturation, light), _bgr(hue + rng.uniform(-0.05, 0.05), saturation, dark)]
    return (tones[0], tones[1]) if rng.random() < 0.7 else (tones[1], tones[0])


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def _bgr(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(_rgb(hue, saturation, value)[::-1], dtype=np.float32) * 255


def _generator(seed: int, split: str, *purpose: int) -> np.random.Generator:
    """A random stream of its own for each split and purpose."""
    return np.random.default_rng([seed, SPLITS.index(split), *purpose])

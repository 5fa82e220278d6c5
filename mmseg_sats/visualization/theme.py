# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The style of all pictures: one drawing for light and dark pages, screens and paper.

A figure is drawn once, with a transparent background, in the colours of the light page. The dark
page's picture is the same SVG with these colours replaced one by one. Okabe and Ito's colours can
be told apart by colour-blind people; those too pale for white paper, or too dim for a dark page,
are shifted in lightness there.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backend_bases import get_registered_canvas_class
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmseg_sats.utils.checkpoint import write_atomically

PAPER = '#fffffe'  # the lines of a hatch
INK = '#24292f'
MUTED = '#6e7781'
GRID = '#d0d7de'
# Light to dark. Every colour that is used in a picture for a light page has its partner here, except
# colours on a coloured cell: these are the same on both pages.
SERIES = (
    '#0072b2', '#c05000', '#008060', '#a8508a', '#8a6d00', '#555555',
    '#b00038', '#5a3fb0', '#4e9a06', '#00848c', '#e0569b', '#2f8fc4',
)  # fmt: skip
DARK = {
    PAPER: '#0f1419',
    INK: '#e6edf3',
    MUTED: '#9aa4af',
    GRID: '#3d444d',
    '#0072b2': '#56a8e6',
    '#c05000': '#ff9142',
    '#008060': '#2fc79a',
    '#a8508a': '#e59ac8',
    '#8a6d00': '#f0cf42',
    '#555555': '#b8b8b8',
    '#b00038': '#ff7088',
    '#5a3fb0': '#b3a1ff',
    '#4e9a06': '#9fe34f',
    '#00848c': '#4fdde6',
    '#e0569b': '#ff8cc8',
    '#2f8fc4': '#a9dcf9',
}
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', 'p', '*', 'h')
DASHES = ('-', '--', ':', '-.')
HATCHES = ('', '////', '....', 'xxxx')
HALF = len(SERIES) // 2  # from here on dashes and hatches tell runs apart as well
ON_DARK_CELL, ON_LIGHT_CELL = '#ffffff', '#000000'
SCREEN_DPI, PAPER_DPI = 100, 200
WIDTH = 4.4  # inches: a column of a paper, and a phone's screen at the size of its text

# The metadata of matplotlib's SVG contains web addresses; the page must contain none.
_NO_METADATA = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
_STYLE = {
    'font.family': ['DejaVu Sans'],
    'font.size': 8.5,
    'axes.titlesize': 9,
    'axes.labelsize': 8.5,
    'axes.edgecolor': MUTED,
    'axes.labelcolor': INK,
    'axes.titlecolor': INK,
    'axes.facecolor': 'none',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'grid.color': GRID,
    'grid.linewidth': 0.6,
    'legend.frameon': False,
    'legend.fontsize': 8,
    'figure.facecolor': 'none',
    'savefig.facecolor': 'none',
    'svg.fonttype': 'path',
    'svg.hashsalt': 'mmseg_sats',
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure for a page, with files of it for a paper.

    Args:
        name: file name without suffix.
        light: SVG for a light page.
        dark: SVG for a dark page.
        alt: what it shows, in a sentence.
    """

    name: str
    light: str
    dark: str
    alt: str

    @property
    def light_uri(self) -> str:
        """The light SVG as a data URI."""
        return data_uri(self.light.encode(), 'image/svg+xml')

    @property
    def dark_uri(self) -> str:
        """The dark SVG as a data URI."""
        return data_uri(self.dark.encode(), 'image/svg+xml')


@contextmanager
def style() -> Iterator[None]:
    """Sets matplotlib's settings for the report; the user's settings are restored at the end."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: object
) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, hence without global state, and its axes row by row.

    Args:
        height: inches.
        rows: of axes.
        columns: of axes.
        width: inches.
        **options: of ``Figure.subplots``.
    """
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def series_style(index: int) -> dict[str, object]:
    """Colour, marker and dashes of the ``index``-th run.

    Twelve runs differ in colour and marker, and those from the seventh on are dashed; then all begin again with
    other dashes.
    """
    return dict(
        color=SERIES[index % len(SERIES)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=DASHES[(index // HALF) % len(DASHES)],
        markersize=4,
        linewidth=1.5,
    )


def bar_style(index: int) -> dict[str, object]:
    """Colour and hatch of the ``index``-th run's bars."""
    return dict(
        color=SERIES[index % len(SERIES)], hatch=HATCHES[(index // HALF) % len(HATCHES)], edgecolor=PAPER, linewidth=0
    )


def finish(figure: Figure, out: Path, name: str, alt: str) -> Picture:
    """Writes ``name.png`` and ``name.pdf`` on white paper and returns the page's picture.

    Args:
        figure: drawn inside :func:`style`.
        out: folder for the files; must exist.
        name: file name without suffix.
        alt: what the picture shows, for those who cannot see it.
    """
    lay_out(figure)
    svg = render(figure, 'svg', metadata=_NO_METADATA)
    for suffix, dpi in (('png', PAPER_DPI), ('pdf', SCREEN_DPI)):
        content = render(figure, suffix, 'white', dpi)
        write_atomically(out / f'{name}.{suffix}', lambda file, content=content: file.write(content))
    text = svg.decode()
    text = text[text.index('<svg') :]  # without the XML prologue, which names a DTD's address
    return Picture(name, text, recolour(text), alt)


def lay_out(figure: Figure) -> None:
    """Gives all parts their places, once for all formats."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine('none')


def render(
    figure: Figure,
    suffix: str,
    background: str = 'none',
    dpi: float = SCREEN_DPI,
    metadata: dict[str, str | None] | None = None,
) -> bytes:
    """The bytes that ``Figure.savefig`` writes, in two thirds of its time: it draws twice, to find the layout.

    Args:
        figure: laid out.
        suffix: 'svg', 'png' or 'pdf'.
        background: its colour.
        dpi: dots per inch.
        metadata: as ``savefig`` takes them.
    """
    buffer = io.BytesIO()
    figure.set_facecolor(background)
    figure.set_dpi(dpi)
    canvas = get_registered_canvas_class(suffix)(figure)
    getattr(canvas, f'print_{suffix}')(buffer, metadata=metadata)
    return buffer.getvalue()


def recolour(svg: str) -> str:
    """The SVG of the dark page."""
    for light, dark in DARK.items():
        svg = svg.replace(light, dark)
    return svg


def data_uri(content: bytes, mime: str) -> str:
    """``content`` inside the page itself."""
    return f'data:{mime};base64,{base64.b64encode(content).decode()}'


def unit_colour(colour: Sequence[int]) -> tuple[float, float, float]:
    """RGB of 0..255 as matplotlib wants it, 0..1."""
    red, green, blue = (value / 255 for value in colour)
    return red, green, blue

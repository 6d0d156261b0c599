"""Training curves as small SVG figures that take width, fonts and colours from their page."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mtllm_jax.metrics import number

_MAX_POINTS = 200
_COLUMNS = {
    "loss": "loss",
    "fvu": "FVU",
    "dev_loss": "development loss",
    "dev_fvu": "development FVU",
    "dev_accuracy": "development accuracy",
}
# What is drawn in one of these takes the page's own colour of that name, in light and in dark.
_PAGE_COLOURS = {"accent": "#0000a1", "soft": "#0000a2", "line": "#0000a3"}


@dataclass(frozen=True)
class CurveFigure:
    """One curve of one stage."""

    stage: str
    label: str  # of `_COLUMNS`
    last: str  # its last value
    svg: Markup


def curve_figures(curves: Mapping[str, pd.DataFrame]) -> list[CurveFigure]:
    """A figure for each stage and each of `_COLUMNS` that it has; NaN is left out."""
    figures: list[CurveFigure] = []
    for stage, frame in curves.items():
        for column, label in _COLUMNS.items():
            if column not in frame:
                continue
            points = frame[["step", column]].dropna()
            if points.empty:
                continue
            svg = _draw(points["step"].to_numpy(), points[column].to_numpy(), f"f{len(figures)}-")
            figures.append(CurveFigure(stage, label, number(points[column].iloc[-1]), svg))
    return figures


def _draw(step: np.ndarray, value: np.ndarray, prefix: str) -> Markup:
    """The values, faint, and their running mean; `prefix` keeps ids apart on one page."""
    chunk = -(-len(step) // _MAX_POINTS)
    points = pd.DataFrame({"step": step, "value": value})
    points = points.groupby(np.arange(len(points)) // chunk).mean()
    window = 1 + 2 * (len(points) // 20)
    smooth = points["value"].rolling(window, center=True, min_periods=1).mean()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}):
        figure = Figure(figsize=(3.6, 1.9), layout="constrained")
        axes = figure.add_subplot()
        accent = _PAGE_COLOURS["accent"]
        axes.plot(points["step"], points["value"], color=accent, linewidth=1, alpha=0.35)
        axes.plot(points["step"], smooth, color=accent, linewidth=1.8)
        _set_axes(axes, points["value"])
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    return Markup(_for_page(buffer.getvalue(), prefix))  # numbers alone are drawn, no foreign text


def _set_axes(axes: Axes, value: pd.Series) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    positive = bool((value > 0).all())
    if positive and value.max() > 20 * value.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if positive:
            axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda tick, _: number(tick))
    axes.tick_params(length=0, labelcolor=_PAGE_COLOURS["soft"])
    axes.grid(color=_PAGE_COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _for_page(svg: str, prefix: str) -> str:
    """matplotlib's SVG file as a part of a page: no prolog, no style, no size, no needless ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg)
    svg = re.sub(r' id="(?!p[0-9a-f]{10}")[^"]*"', "", svg)
    svg = svg.replace(' id="', f' id="{prefix}').replace("url(#", f"url(#{prefix}")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    for name, colour in _PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", svg.replace("fill: #ffffff", "fill: none"))

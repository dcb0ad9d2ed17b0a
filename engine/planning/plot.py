"""`draw`: curves as SVG and PNG. Needs the extra `plots`; nothing else imports matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.producer.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Apart in colour, and in print by their marks (Okabe and Ito's colours).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"
#: Inches of one panel, and dots per inch of a PNG.
WIDTH, HEIGHT, DPI = 4.6, 3.6, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points (x, y) in order, and what some of them are called."""

    label: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()
    #: The colour of this curve; curves that belong together share one.
    colour: int = 0
    #: Drawn dashed and hollow: what was predicted or published beside what was measured.
    is_other: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves over the same axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    is_log: bool = False
    #: A horizontal line, such as the limit of an SLA, and what it is called.
    limit: tuple[float, str] | None = None


def draw(title: str, panels: Sequence[Panel], paths: Sequence[Path]) -> None:
    """Draw panels side by side and write the picture to each of `paths`, `.svg` or `.png`.

    Raises:
        InvalidRequest: a path ends in something else.
        ModuleNotFoundError: the extra `plots` is not installed.
    """
    for path in paths:
        if path.suffix not in (".svg", ".png"):
            raise InvalidRequest("plot", "a file that ends in .svg or .png", str(path))
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.hashsalt": "tokenmill",  # the same picture is the same file
        "svg.fonttype": "none",
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout="constrained")
        figure.suptitle(title, fontsize=10)
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _fill(axes, panel)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=DPI, metadata=metadata)


def _fill(axes: "Axes", panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    for curve in panel.curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        axes.plot(
            [x for x, _ in curve.points],
            [y for _, y in curve.points],
            label=curve.label,
            color=colour,
            marker=MARKS[curve.colour % len(MARKS)],
            markersize=4,
            linewidth=1.2 if curve.is_other else 1.6,
            linestyle="--" if curve.is_other else "-",
            markerfacecolor="white" if curve.is_other else colour,
        )
        for (x, y), note in zip(curve.points, curve.notes, strict=False):
            axes.annotate(
                note, (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7, color=colour
            )
    if panel.limit is not None:
        at, name = panel.limit
        axes.axhline(at, color="grey", linewidth=1, linestyle=":")
        axes.annotate(
            name, (1, at), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
        )
    if panel.is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(fontsize=7, frameon=False)

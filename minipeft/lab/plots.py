"""Every figure, drawn from plain numbers and saved as a PNG file; each function returns its matplotlib figure.

A series is {name: [Point, ...]}. The name of a technique is replaced by its label, and it has the same colour and
marker in all figures; any other name is its own label. Accuracies are in per cent, but fractions in histories.
"""
from dataclasses import astuple, dataclass, field

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..tools.files import atomic
from ..tools.settings import TECHNIQUES
from .stats import Comparison
from .studies import label

# The colours of Okabe and Ito and of Tol, which colour-blind readers can tell apart.
LOOKS = [("#009e73", "s"), ("#0072b2", "o"), ("#d55e00", "D"), ("#e69f00", "v"), ("#000000", "^"), ("#cc79a7", "P"),
         ("#56b4e9", "X"), ("#882255", "d"), ("#999933", "8"), ("#332288", "p"), ("#7f7f7f", "*"), ("#aa4499", "h")]
INK, BAND = "#444444", "#dbe9f6"
MEASURES = (("loss", 1, "loss (nats)"), ("accuracy", 100, "accuracy (%)"))  # key in a history, scale, axis label
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.axisbelow": True, "axes.ymargin": 0.1, "grid.color": "#e2e2e2",
         "legend.frameon": False, "lines.markersize": 7, "figure.constrained_layout.h_pad": 0.08,
         "figure.constrained_layout.w_pad": 0.08}


@dataclass
class Point:
    """A point of a series; low and high are the ends of a band around it, or None."""
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass
class Panel:
    """One pair of axes with a measure against a setting. log: of the x axis. ringed: points to mark, {name: x}. The
    axis ends where the measure does: accuracy at 0 and 100%."""
    series: dict
    x_label: str
    y_label: str
    title: str = ""
    log: bool = True
    ringed: dict = field(default_factory=dict)


@dataclass
class Row:
    """One paired difference in a figure; text stands beside it."""
    name: str
    found: Comparison
    text: str = ""


# -- shared -----------------------------------------------------------------------------------------------

def figure_in_style(rows=1, columns=1, size=(9, 5), **options):
    """Return (figure, rows x columns axes)."""
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def look(name, names=()):
    """Return (label, colour, marker). Techniques take the first looks, the other `names` of a figure the next ones."""
    order = list(dict.fromkeys([*TECHNIQUES, *names, name]))  # each once
    return label(name), *LOOKS[order.index(name) % len(LOOKS)]


def finish(figure, path, note=""):
    """Add one legend above all axes, and a note below; save."""
    entries = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= zip(labels, handles)
    if entries:
        ncols = len(entries) if len(entries) <= 4 else 3
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=ncols)
    figure.supxlabel(note, size=10, parse_math=False)  # a path may hold dollar signs
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return figure


# -- series against a setting -----------------------------------------------------------------------------

def scale_of_lowest(panels):
    """Return (low, high) that shows the lowest point of each series, with more room above."""
    best = [min(point.y for point in points) for panel in panels for points in panel.series.values()]
    room = max(max(best) - min(best), 0.25 * max(best))
    return min(best) - 0.15 * room, max(best) + room


def draw_panel(axis, panel, highest):
    """Draw the series of a panel with their bands; a triangle at `highest` marks a point above it."""
    for name, points in panel.series.items():
        words, colour, marker = look(name, panel.series)
        x, y, *band = np.array([astuple(point) for point in points], dtype=float).T
        axis.plot(x, y, color=colour, marker=marker, label=words)
        axis.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
        for point in points:
            if point.y > highest:
                axis.plot(point.x, highest, "^", color=colour, clip_on=False)
            if point.x == panel.ringed.get(name):
                axis.plot(point.x, point.y, "o", markersize=17, markerfacecolor="none", markeredgewidth=2, color=colour)
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log:
        axis.set_xscale("log")
        axis.margins(x=0.08)
    else:
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


@rc_context(STYLE)
def series(panels, note, path, zoom=False):
    """Several panels: [[Panel, ...], ...], a list for each row of the figure; a row has one scale. zoom: show the
    lowest points, as one failed run would hide the differences between all others."""
    figure, axes = figure_in_style(len(panels), len(panels[0]), (9, 1 + 2.9 * len(panels)), sharex="col", sharey="row")
    for row, line in zip(axes, panels):
        scale = scale_of_lowest(line) if zoom else None
        for axis, panel in zip(row, line):
            draw_panel(axis, panel, scale[1] if zoom else np.inf)
            axis.label_outer()
        low, high = scale or row[0].get_ylim()  # of all panels in the row
        row[0].set_ylim(max(low, 0), min(high, 100) if "%" in line[0].y_label else high)
    return finish(figure, path, f"{note}; triangle at the edge: off the scale" if zoom else note)


def over_epochs(histories, name, scale):
    """The mean over runs of one column of their histories, as points with the smallest and the largest value."""
    points = []
    for rows in zip(*histories):
        values = [scale * row[name] for row in rows]
        points.append(Point(rows[0]["epoch"], np.mean(values), min(values), max(values)))
    return points


def curves(history, title, path):
    """One run: loss and accuracy after each epoch, train against dev. history: as in the record; title: below."""
    panels = []
    for measure, scale, words in MEASURES:
        parts = {part: over_epochs([history], f"{part}_{measure}", scale) for part in ("train", "dev")}
        panels.append([Panel(parts, "epoch", words, log=False)])
    return series(panels, title, path)


def learning_curves(histories, note, path):
    """Loss and accuracy after each epoch for several techniques. histories: {name: [history of a run, ...]}."""
    panels = []
    for measure, scale, words in MEASURES:
        panels.append([])
        for part in ("train", "dev"):
            lines = {name: over_epochs(runs, f"{part}_{measure}", scale) for name, runs in histories.items()}
            panels[-1].append(Panel(lines, "epoch", words, part if measure == "loss" else "", log=False))
    return series(panels, note, path)


# -- differences ------------------------------------------------------------------------------------------

def draw_difference(axis, found, place, colour=INK):
    """Draw a stats.Comparison with both of its intervals at a height."""
    for ends, width, alpha in (((found.low, found.high), 1.3, 0.9), ((found.inner_low, found.inner_high), 4.5, 0.5)):
        axis.plot(ends, (place, place), color=colour, linewidth=width, alpha=alpha, solid_capstyle="butt")
    axis.plot(found.mean, place, "o", color=colour, markersize=6)


def difference_axis(axis, names):
    """Set up an axis for paired differences: the band of equivalence, zero, and a name for each row."""
    axis.axvspan(-1, 1, color=BAND, zorder=0)
    axis.axvline(0, color=INK, linewidth=1)
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0, labelsize=10)
    axis.locator_params(axis="x", nbins=5, integer=True)


@rc_context(STYLE)
def forest(groups, x_label, note, path):
    """Paired differences in points, below each other; an arrow points to what lies beyond the axis.

    groups: {heading: [Row, ...]}
    """
    lines = []  # a heading or a Row
    for heading, rows in groups.items():
        lines += [heading, *rows]
    ends = [end for line in lines if isinstance(line, Row) for end in (line.found.low, line.found.high)]
    limit = np.clip(2 * np.median(np.abs(ends)), 11, 100)
    low, high = min(max(-limit, min(ends)), -1.1), max(min(limit, max(ends)), 1.1)
    figure, [[axis]] = figure_in_style(size=(12, 1.5 + 0.3 * len(lines)))
    difference_axis(axis, [line.name if isinstance(line, Row) else line for line in lines])
    axis.set(xlabel=x_label, xlim=(1.04 * low, 1.04 * high))
    for place, line in enumerate(lines):
        if isinstance(line, Row):
            draw_difference(axis, line.found, place)
            for end, beyond, marker in ((low, line.found.low < low, "<"), (high, line.found.high > high, ">")):
                if beyond:
                    axis.plot(end, place, marker, color=INK, markersize=6, clip_on=False)
            axis.annotate(line.text.replace("-", "−"), (1.02, place), xycoords=axis.get_yaxis_transform(),
                          va="center", size=9.5)
        else:
            axis.get_yticklabels()[place].set_weight("bold")
    return finish(figure, path, note)


@rc_context(STYLE)
def sensitivity(panels, kinds, note, path):
    """How differences change with our choices. panels: {title: {rule: [Comparison for each kind of interval]}}; [] for
    a rule without runs. kinds: {label: colour}. Panels far from zero have a scale of their own."""
    figure, [axes] = figure_in_style(1, len(panels), (11, 4.4), sharey=True)
    for axis, (title, rules) in zip(axes, panels.items()):
        difference_axis(axis, list(rules))
        for place, rows in enumerate(rules.values()):
            if not rows:
                axis.text(0.5, place, "not run", transform=axis.get_yaxis_transform(), ha="center", va="center",
                          color="#888888", style="italic")
            for step, (found, colour) in enumerate(zip(rows, kinds.values())):
                draw_difference(axis, found, place + 0.22 * (step - 1), colour)
        axis.set(title=title, xlim=(-2.6, 2.6) if axis.dataLim.x0 > -2.6 else None)
    for kind, colour in kinds.items():
        axes[0].plot([], [], "o-", color=colour, label=kind)
    return finish(figure, path, note)


# -- one kind of number each ------------------------------------------------------------------------------

@rc_context(STYLE)
def memory(rows, note, path):
    """Memory of a training step by purpose, stacked. rows: {technique: {purpose: MB}}; note: stands below."""
    figure, [[axis]] = figure_in_style(size=(9, 1.9 + 0.5 * len(rows)))
    labels, left = list(map(label, rows)), np.zeros(len(rows))
    for part, colour in zip(next(iter(rows.values())), ("#4d4d4d", "#e69f00", "#56b4e9", "#c9c9c9")):
        values = np.array([row[part] for row in rows.values()])
        axis.barh(labels, values, 0.6, left, color=colour, label=part)
        left += values
    axis.invert_yaxis()
    axis.set_xlabel("memory of a training step (MB)")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    return finish(figure, path, note)


@rc_context(STYLE)
def heat_map(matrix, complete, path):
    """Test accuracy without the adapters of layers first..last (Houlsby et al. 2019, figure 6).

    matrix: (layers, layers), [first, last] in per cent, nan where first > last. complete: with all adapters.
    """
    matrix = np.asarray(matrix, dtype=float)
    figure, [[axis]] = figure_in_style(size=(7.5, 6))
    image = axis.imshow(complete - matrix, cmap="Blues", vmin=0)
    for (first, last), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            dark = complete - value > 0.6 * np.nanmax(complete - matrix)
            axis.text(last, first, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    layers = range(len(matrix))
    names = [layer + 1 for layer in layers]
    axis.set(title=f"test accuracy (%) without the adapters of these layers\nwith all adapters: {complete:.1f}%",
             xlabel="last layer removed", ylabel="first layer removed", xticks=layers, xticklabels=names,
             yticks=layers, yticklabels=names)
    axis.grid(visible=False)
    figure.colorbar(image, label="loss of accuracy (points)")
    return finish(figure, path)

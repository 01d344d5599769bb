"""Every figure, drawn from plain numbers and saved as a PNG file; each function returns its matplotlib figure.

A series is {name: [Point, ...]}. The name of a technique is replaced by its label, and it has the same colour and
marker in all figures; any other name is its own label. Accuracies are in per cent, but fractions in histories.
"""
from dataclasses import astuple, dataclass, field, fields, replace
from itertools import pairwise
from textwrap import fill

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..tools.files import atomic
from ..tools.settings import TECHNIQUES

# The colours of Okabe and Ito and of Tol, which colour-blind readers can tell apart.
LOOKS = [("#009e73", "s"), ("#0072b2", "o"), ("#d55e00", "D"), ("#e69f00", "v"), ("#000000", "^"), ("#cc79a7", "P"),
         ("#56b4e9", "X"), ("#882255", "<"), ("#999933", ">"), ("#332288", "p"), ("#7f7f7f", "*"), ("#aa4499", "h")]
TRAIN, DEV, INK, BAND = "#56b4e9", "#332288", "#444444", "#dbe9f6"
MEASURES = (("loss", 1, "loss (nats)"), ("accuracy", 100, "accuracy (%)"))  # key in a history, scale, axis label
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.axisbelow": True, "axes.ymargin": 0.1, "grid.color": "#e2e2e2",
         "legend.frameon": False, "lines.markersize": 7, "figure.constrained_layout.h_pad": 0.08,
         "figure.constrained_layout.w_pad": 0.08}


@dataclass
class Point:
    """A point of a series; low and high are the ends of its error bar or band, or None for neither."""
    x: float | str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass
class Panel:
    """One pair of axes with a measure against a setting. x: numbers, on a log axis if `log`, or strings (categories).
    low, high: the part that is shown (None: all); a triangle marks a point beyond it. ringed: points to mark,
    {name: x}. band: fill between low and high instead of bars. The axis ends where the measure does: accuracy at 0 and 100%."""
    series: dict
    x_label: str
    y_label: str
    title: str = ""
    log: bool = True
    band: bool = False
    low: float | None = None
    high: float | None = None
    ringed: dict = field(default_factory=dict)


@dataclass
class Row:
    """One paired difference with its interval and the shorter one, as a row of a figure; text stands beside it."""
    name: str
    mean: float
    low: float
    high: float
    inner_low: float
    inner_high: float
    text: str = ""
    colour: str = INK


@dataclass
class Memory:
    """Where the memory of one technique goes, in MB; `measured` is the total, measured independently."""
    weights: float
    gradients: float
    optimiser_states: float
    activations: float
    measured: float | None = None


# -- shared -----------------------------------------------------------------------------------------------

def figure_in_style(rows=1, columns=1, size=(9, 5), **options):
    """Return (figure, rows x columns axes)."""
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def look(name, names=()):
    """Return (label, colour, marker). Techniques take the first looks, the other `names` of a figure the next ones."""
    order = [*TECHNIQUES, *(other for other in names if other not in TECHNIQUES)]
    index = order.index(name) if name in order else len(TECHNIQUES)
    label = TECHNIQUES[name].label if name in TECHNIQUES else str(name)
    return label, *LOOKS[index % len(LOOKS)]


def finish(figure, path, note="", columns=5):
    """Add one legend above all axes, in one row of at most `columns` entries or else in rows of three, and a note
    below; save."""
    entries = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if entries:
        ncols = len(entries) if len(entries) <= columns else 3
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=ncols)
    figure.supxlabel(note, size=10, parse_math=False)  # a path may hold dollar signs
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return figure


def horizontal(axis, names):
    """Name the rows of a chart of horizontal bars, from top to bottom."""
    axis.set(yticks=range(len(names)), yticklabels=[look(name)[0] for name in names], ylim=(len(names) - 0.5, -0.5))
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)


# -- series against a setting -----------------------------------------------------------------------------

def scale_of_best(series, better, least):
    """Return (low, high) that shows the best point of each series, with more room on the worse side.

    better: max or min; least: the room is at least this share of the best value.
    """
    best = [better(point.y for point in points) for points in series.values()]
    room = max(max(best) - min(best), least * max(best))
    below, above = (0.5, 0.15) if better is max else (0.15, 0.5)
    return min(best) - below * room, max(best) + above * room


def draw_panel(axis, panel):
    """Draw the series of a panel with their error bars or bands, and set the scales."""
    xs = list(dict.fromkeys(point.x for points in panel.series.values() for point in points))
    categories = isinstance(xs[0], str)
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.low is not None:
        axis.set_ylim(panel.low, panel.high)
    for name, points in panel.series.items():
        label, colour, marker = look(name, panel.series)
        table = [(xs.index(point.x) if categories else point.x, *astuple(point)[1:]) for point in points]
        x, y, low, high = np.array(table, dtype=float).T
        axis.plot(x, y, "" if categories else "-", color=colour, marker=marker, label=label)
        if panel.band:
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axis.errorbar(x, (low + high) / 2, (high - low) / 2, fmt="none", color=colour, capsize=3)
        for point in points:
            shown = np.clip(point.y, panel.low, panel.high) if panel.low is not None else point.y
            if point.x == panel.ringed.get(name):
                axis.plot(point.x, shown, "o", markersize=17, markerfacecolor="none", markeredgewidth=2, color=colour,
                          clip_on=False)
            if shown != point.y:
                axis.plot(point.x, shown, "v" if point.y < shown else "^", color=colour, clip_on=False)
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 0), min(high, 100) if "%" in panel.y_label else high)
    if categories:
        width = max(9, 80 // len(xs))  # in letters
        axis.set_xticks(range(len(xs)), [fill(x, width) for x in xs])
        axis.set_xlim(-0.5, len(xs) - 0.5)
    elif panel.log:
        axis.set_xscale("log")
        axis.margins(x=0.08)
        if len(xs) <= 5 and all(larger > 1.2 * x for x, larger in pairwise(sorted(xs))):
            axis.set_xticks(xs, [f"{x:,g}" if x < 1e5 else f"{x / 1e6:.3g} M" for x in xs])
            axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


@rc_context(STYLE)
def series(panels, note, path, size=None, sharey=True):
    """Several panels: [[Panel, ...], ...], a list for each row of the figure. sharey: a row has one scale."""
    figure, axes = figure_in_style(len(panels), len(panels[0]), size or (9, 1.2 + 3.6 * len(panels)), sharex="col",
                                   sharey="row" if sharey else False)
    for row, line in zip(axes, panels):
        for axis, panel in zip(row, line):
            draw_panel(axis, panel)
            if sharey:
                axis.label_outer()
    return finish(figure, path, note, 4)


def over_epochs(rows, name, scale):
    """The mean over runs of one column of their histories, as points with the smallest and the largest value."""
    epochs = {}
    for row in rows:
        epochs.setdefault(row["epoch"], []).append(scale * row[name])
    return [Point(epoch, np.mean(values), min(values), max(values)) for epoch, values in epochs.items()]


def curves(history, title, path):
    """One run: loss and accuracy after each epoch, train against dev. history: as in the record; title: below."""
    panels = [Panel({part: over_epochs(history, f"{part}_{name}", scale) for part in ("train", "dev")}, "epoch", label,
                    log=False, band=True) for name, scale, label in MEASURES]
    return series([panels], title, path, (9, 3.8), sharey=False)


def learning_curves(histories, note, path):
    """Loss and accuracy after each epoch for several techniques. histories: {name: [history of a run, ...]}."""
    panels = [[Panel({name: over_epochs(sum(runs, []), f"{part}_{measure}", scale) for name, runs in histories.items()},
                     "epoch", label, part if measure == "loss" else "", log=False, band=True)
               for part in ("train", "dev")] for measure, scale, label in MEASURES]
    return series(panels, note, path, (9, 6.5))


# -- differences ------------------------------------------------------------------------------------------

def draw_row(axis, row, place, low, high):
    """Draw a difference with both of its intervals at a height; an arrow points to what lies beyond low or high."""
    for ends, width in (((row.low, row.high), 1.3), ((row.inner_low, row.inner_high), 4.5)):
        axis.plot(np.clip(ends, low, high), (place, place), color=row.colour, linewidth=width, solid_capstyle="butt",
                  alpha=0.9 if width < 2 else 0.5)
    if low <= row.mean <= high:
        axis.plot(row.mean, place, "o", color=row.colour, markersize=6)
    for end, beyond, marker in ((low, row.low < low, "<"), (high, row.high > high, ">")):
        if beyond:
            axis.plot(end, place, marker, color=row.colour, markersize=6, clip_on=False)


def difference_axis(axis, names, ticks=7):
    """Set up an axis for paired differences: the band of equivalence, zero, and a name for each row."""
    axis.axvspan(-1, 1, color=BAND, zorder=0)
    axis.axvline(0, color=INK, linewidth=1)
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0, labelsize=10)
    axis.locator_params(axis="x", nbins=ticks)


@rc_context(STYLE)
def forest(groups, x_label, note, path, limits=(-100, 100)):
    """Paired differences in points, below each other. groups: {heading: [Row, ...]}; limits: the part that is shown."""
    lines = [line for heading, rows in groups.items() for line in ([heading] if heading else []) + rows]
    rows = [line for line in lines if isinstance(line, Row)]
    figure, [[axis]] = figure_in_style(size=(9.5, 1.5 + (0.3 if len(groups) > 1 else 0.45) * len(lines)))
    difference_axis(axis, [line.name if isinstance(line, Row) else line for line in lines])
    low, high = max(limits[0], min(row.low for row in rows)), min(limits[1], max(row.high for row in rows))
    for place, line in enumerate(lines):
        if isinstance(line, Row):
            draw_row(axis, line, place, low, high)
            axis.annotate(line.text.replace("-", "−"), (1.02, place), xycoords=axis.get_yaxis_transform(), va="center",
                          size=9.5)
        else:
            axis.get_yticklabels()[place].set_weight("bold")
    low, high = min(low, -1.1), max(high, 1.1)
    axis.set(xlabel=x_label, xlim=(low - 0.04 * (high - low), high + 0.04 * (high - low)))
    return finish(figure, path, note)


@rc_context(STYLE)
def sensitivity(panels, kinds, note, path):
    """How differences change with our choices. panels: {title: {rule: [Row for each kind of interval]}}; [] for a rule
    without runs. kinds: {label: colour}. Panels far from zero have a scale of their own."""
    figure, [axes] = figure_in_style(1, len(panels), (11, 4.4), sharey=True)
    for axis, (title, rules) in zip(axes, panels.items()):
        difference_axis(axis, list(rules), 5)
        for place, rows in enumerate(rules.values()):
            if not rows:
                axis.text(0.5, place, "not run", transform=axis.get_yaxis_transform(), ha="center", va="center",
                          color="#888888", style="italic")
            for step, (row, colour) in enumerate(zip(rows, kinds.values())):
                draw_row(axis, replace(row, colour=colour), place + 0.22 * (step - 1), -np.inf, np.inf)
        lowest = min((row.low for rows in rules.values() for row in rows), default=0)
        axis.set(title=title, xlim=(-2.6, 2.6) if lowest > -2.6 else None)
    for kind, colour in kinds.items():
        axes[0].plot([], [], "o-", color=colour, label=kind)
    return finish(figure, path, note)


# -- one kind of number each ------------------------------------------------------------------------------

@rc_context(STYLE)
def memory(rows, note, path):
    """Memory of a training step by purpose, stacked. rows: {name: Memory}; note: stands below."""
    figure, [[axis]] = figure_in_style(size=(9, 1.9 + 0.5 * len(rows)))
    left = np.zeros(len(rows))
    for part, colour in zip(fields(Memory)[:4], ("#4d4d4d", "#e69f00", "#56b4e9", "#c9c9c9")):
        values = np.array([getattr(row, part.name) for row in rows.values()])
        axis.barh(range(len(rows)), values, 0.6, left, color=colour, label=part.name.replace("_", " "))
        left += values
    measured = [(row.measured, index) for index, row in enumerate(rows.values()) if row.measured is not None]
    if measured:
        axis.plot(*zip(*measured), "D", color="black", label="measured total")
    axis.set_xlabel("memory of a training step (MB)")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    horizontal(axis, rows)
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
    names = [str(layer + 1) for layer in range(len(matrix))]
    axis.set(title=f"test accuracy (%) without the adapters of these layers\nwith all adapters: {complete:.1f}%",
             xlabel="last layer removed", ylabel="first layer removed", xticks=range(len(names)), xticklabels=names,
             yticks=range(len(names)), yticklabels=names)
    axis.grid(visible=False)
    figure.colorbar(image, label="loss of accuracy (points)")
    return finish(figure, path)


@rc_context(STYLE)
def spectra(series, path):
    """Cumulative energy of the updates W - W0. series: {name: [singular values of one matrix, largest first, ...]}.

    energy(r) = (s_1^2 + ... + s_r^2) / (s_1^2 + ... + s_n^2): the share of the squared Frobenius norm at rank r.
    """
    figure, [[axis]] = figure_in_style()
    for name, matrices in series.items():
        label, colour, marker = look(name, series)
        squares = np.square(np.array(matrices, dtype=float))
        energy = 100 * squares.cumsum(1) / squares.sum(1, keepdims=True)  # (matrices, rank)
        ranks = np.arange(1, energy.shape[1] + 1)
        enough = ranks[energy.mean(0) >= 90][0]
        axis.plot(ranks, energy.mean(0), color=colour, label=f"{label}: 90% at rank {enough}")
        axis.plot(enough, energy.mean(0)[enough - 1], marker, color=colour)
        axis.fill_between(ranks, energy.min(0), energy.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.axhline(90, color=INK, linestyle=":")
    axis.set(xscale="log", xlabel="rank", ylabel="energy of the update (%)", ylim=(0, 105))
    axis.xaxis.set_major_formatter("{x:g}")
    return finish(figure, path, "line: mean over matrices; band: smallest to largest")

"""Every figure, drawn from plain numbers and saved as a PNG file; each function returns its matplotlib figure.

A series is {name: [Point, ...]}. The name of a technique is replaced by its label, and it has the same colour and
marker in all figures; any other name is its own label. Accuracies are in per cent, but fractions in histories.
"""
from dataclasses import astuple, dataclass, fields, replace
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
TRAIN, DEV, INK = "#56b4e9", "#332288", "#444444"
MEASURES = (("loss", 1, "loss (nats)"), ("accuracy", 100, "accuracy (%)"))  # key in a history, scale, axis label
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.axisbelow": True, "axes.ymargin": 0.1, "grid.color": "#e2e2e2",
         "legend.frameon": False, "lines.markersize": 7, "figure.constrained_layout.h_pad": 0.08,
         "figure.constrained_layout.w_pad": 0.08}


@dataclass
class Point:
    """A point of a series; low and high are the ends of its error bar, or None for no bar."""
    x: float | str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass
class Cost:
    """What training one technique costs: means over runs, and standard deviations if there are several runs."""
    seconds: float
    megabytes: float
    seconds_std: float | None = None
    megabytes_std: float | None = None


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


def draw(axis, series, line="-"):
    """Draw series with their error bars."""
    for name, points in series.items():
        label, colour, marker = look(name, series)
        x, y, low, high = np.array([astuple(point) for point in points], dtype=float).T
        axis.plot(x, y, linestyle=line, color=colour, marker=marker, label=label)
        axis.errorbar(x, (low + high) / 2, (high - low) / 2, fmt="none", color=colour, capsize=3)


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
        figure.savefig(temporary, dpi=150, format="png")
    return figure


def horizontal(axis, names):
    """Name the rows of a chart of horizontal bars, from top to bottom."""
    axis.set(yticks=range(len(names)), yticklabels=[look(name)[0] for name in names], ylim=(len(names) - 0.5, -0.5))
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)


def traces(axis, rows, key, scale=1, **style):
    """Draw the mean over runs of one column of their histories; a band from the smallest to the largest."""
    epochs = {}
    for row in rows:
        epochs.setdefault(row["epoch"], []).append(scale * row[key])
    values = epochs.values()
    axis.plot(list(epochs), [np.mean(v) for v in values], **style)
    axis.fill_between(list(epochs), [min(v) for v in values], [max(v) for v in values], color=style["color"],
                      alpha=0.15, linewidth=0)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


# -- figures ----------------------------------------------------------------------------------------------

@rc_context(STYLE)
def curves(history, title, path):
    """One run: loss and accuracy after each epoch, train against dev. history: as in the record; title: below."""
    figure, [axes] = figure_in_style(1, 2, (9, 3.8))
    for axis, (key, scale, label) in zip(axes, MEASURES):
        traces(axis, history, f"train_{key}", scale, color=TRAIN, marker="o", label="train")
        traces(axis, history, f"dev_{key}", scale, color=DEV, marker="s", label="dev")
        axis.set_ylabel(label)
    return finish(figure, path, title)


@rc_context(STYLE)
def learning_curves(histories, path):
    """Loss and accuracy after each epoch for several techniques. histories: {name: [history of a run, ...]}."""
    figure, axes = figure_in_style(2, 2, (9, 6.5), sharex=True, sharey="row")
    for row, (key, scale, label) in zip(axes, MEASURES):
        for axis, split in zip(row, ("train", "dev")):
            for name, runs in histories.items():
                title, colour, marker = look(name, histories)
                traces(axis, sum(runs, []), f"{split}_{key}", scale, color=colour, marker=marker, label=title)
            axis.label_outer()
        row[0].set_ylabel(label)
    axes[0, 0].set_title("train")
    axes[0, 1].set_title("dev")
    return finish(figure, path, "line: mean over runs; band: smallest to largest")


@rc_context(STYLE)
def costs(rows, machine, path):
    """Training time and peak memory. rows: {name: Cost}; machine: the processor and precision they were measured on."""
    figure, [axes] = figure_in_style(1, 2, (9, 1.6 + 0.5 * len(rows)), sharey=True)
    colours = [look(name, rows)[1] for name in rows]
    for axis, key, label in zip(axes, ("seconds", "megabytes"), ("training time (s)", "peak memory (MB)")):
        values = [getattr(cost, key) for cost in rows.values()]
        stds = [getattr(cost, f"{key}_std") or 0 for cost in rows.values()]
        bars = axis.barh(range(len(rows)), values, 0.6, xerr=stds, color=colours, ecolor="#999999")
        axis.bar_label(bars, fmt="{:,.0f}", padding=5)
        axis.set(xlabel=label, xlim=(0, 1.2 * np.nanmax([*np.add(values, stds), 1e-9])))
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        horizontal(axis, rows)
    return finish(figure, path, f"{machine}; bars: standard deviation over runs")


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


def scale_of_best(series, better, least):
    """Return (low, high) that shows the best point of each series, with more room on the worse side.

    better: max or min; least: the room is at least this share of the best value.
    """
    best = [better(point.y for point in points) for points in series.values()]
    room = max(max(best) - min(best), least * max(best))
    below, above = (0.5, 0.15) if better is max else (0.15, 0.5)
    return min(best) - below * room, max(best) + above * room


@rc_context(STYLE)
def rates(accuracy, loss, chosen_by_accuracy, chosen_by_loss, path):
    """Dev accuracy and dev loss against the learning rate. accuracy, loss: series; chosen: {name: rate}, ringed.

    The scale is that of the best rates; a triangle at the edge marks a rate whose value lies beyond it.
    """
    figure, axes = figure_in_style(2, 1, (9, 8), sharex=True)
    panels = ((accuracy, chosen_by_accuracy, "dev accuracy (%)", scale_of_best(accuracy, max, 0.05)),
              (loss, chosen_by_loss, "dev loss (nats)", scale_of_best(loss, min, 0.2)))
    for axis, (series, chosen, label, (low, high)) in zip(axes[:, 0], panels):
        draw(axis, series)
        axis.set(xscale="log", ylabel=label, ylim=(low, high))
        for name, points in series.items():
            style = dict(color=look(name, series)[1], clip_on=False)
            for point in points:
                y = np.clip(point.y, low, high)
                if point.x == chosen.get(name):
                    axis.plot(point.x, y, "o", markersize=17, markerfacecolor="none", markeredgewidth=2, **style)
                if y != point.y:
                    axis.plot(point.x, y, "v" if point.y < low else "^", **style)
    axis.set_xlabel("learning rate")
    return finish(figure, path, "ring: chosen (above by accuracy, below by loss); triangle at the edge: off the scale")


@rc_context(STYLE)
def differences(rows, part, path):
    """Paired differences with intervals and verdicts. rows: {label: stats.Comparison}, all of one study; part: "test"
    or "dev"."""
    figure, [[axis]] = figure_in_style(size=(9, 1.8 + 0.6 * len(rows)))
    axis.axvspan(-1, 1, color="#dbe9f6", label="equivalence band ±1", zorder=0)
    axis.axvline(0, color=INK, linewidth=1)
    for index, row in enumerate(rows.values()):
        labels = (f"{100 * row.level:.4g}% interval", "90% interval") if index == 0 else (None, None)
        axis.plot((row.low, row.high), (index, index), color=INK, linewidth=1.5, label=labels[0])
        axis.plot((row.low90, row.high90), (index, index), color=INK, linewidth=5, solid_capstyle="butt", alpha=0.5,
                  label=labels[1])
        axis.plot(row.mean, index, "o", color=INK, markersize=8)
        text = f"{row.mean:+.2f} [{row.low:+.2f}, {row.high:+.2f}]".replace("-", "−") + f"\n{row.in_words}"
        if row.runs == 1:
            text += ", one run"
        axis.annotate(text, (1.02, index), xycoords=axis.get_yaxis_transform(), va="center", size=10)
    horizontal(axis, rows)
    axis.set_xlabel(f"difference in {part} accuracy (points)")
    axis.locator_params(axis="x", nbins=6)
    return finish(figure, path)


@rc_context(STYLE)
def study(x_label, panels, y_label, path, note="", references=None):
    """A measure against one setting. panels: {title: series}, side by side on one y axis; "" for a single panel.

    x: numbers (log axis), or strings (categories in their order). note: stands below. references: {name of a technique:
    value}, dashed lines; one that is far off the scale is in the legend alone.
    """
    figure, [axes] = figure_in_style(1, len(panels), (9, 5.2), sharey=True)
    for axis, (title, series) in zip(axes, panels.items()):
        xs = list(dict.fromkeys(point.x for points in series.values() for point in points))
        axis.set(title=title, xlabel=x_label)
        if isinstance(xs[0], str):
            draw(axis, {name: [replace(point, x=xs.index(point.x)) for point in points]
                        for name, points in series.items()}, "none")
            width = max(9, 80 // len(xs) // len(panels))  # in letters
            axis.set_xticks(range(len(xs)), ["\n".join(fill(line, width) for line in x.split("\n")) for x in xs])
            axis.set_xlim(-0.5, len(xs) - 0.5)
            continue
        axis.set_xscale("log")
        draw(axis, series)
        axis.margins(x=0.08)
        if all(larger > 1.2 * x for x, larger in pairwise(sorted(xs))):  # far enough apart to label each
            axis.set_xticks(xs, [f"{x:,g}" if x < 1e5 else f"{x / 1e6:.3g} M" for x in xs])
            axis.xaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel(y_label)
    low, high = axes[0].get_ylim()
    for name, value in (references or {}).items():
        label, colour, _ = look(name)
        near = abs(value - (low + high) / 2) < high - low
        for axis in axes:
            axis.axhline(value if near else np.nan, color=colour, linestyle="--", linewidth=1.5,
                         label=f"{label}: {value:.1f}" + ("" if near else " (off the scale)"))
    return finish(figure, path, note, 4)


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

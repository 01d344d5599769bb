"""Every figure, drawn from plain numbers and saved as PNG. Accuracies are in per cent, except in histories, whose
rows are those of history.csv (fractions). A method has one colour and one marker in all figures.
"""
from contextlib import contextmanager
from textwrap import fill

import matplotlib

matplotlib.use("Agg")  # files only: no window, no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.ticker import AutoLocator, EngFormatter, LogLocator, NullLocator

TRAIN, DEV, INK = "#0072b2", "#d55e00", "#444444"  # colours of Okabe and Ito, which colour-blind readers tell apart
METHODS = {"head": ("head tuning", "#009e73", "s"), "adapter": ("adapters", "#0072b2", "o"),
           "lora": ("LoRA", "#d55e00", "D"), "full": ("full fine-tuning", "#000000", "^"),
           "bitfit": ("BitFit", "#e69f00", "v"), "last_block": ("last block + head", "#cc79a7", "P")}
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.axisbelow": True, "axes.ymargin": 0.1, "grid.color": "#e2e2e2",
         "legend.frameon": False, "errorbar.capsize": 3, "lines.markersize": 7,
         "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1}


# ---- shared ----

@contextmanager
def drawing(path, rows=1, columns=1, size=(9, 5), **options):
    """Lends (figure, rows x columns axes) in the house style, and saves the figure afterwards."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
        try:
            yield figure, axes
            figure.savefig(path, dpi=150, format="png")
        finally:
            plt.close(figure)


def look(name):
    """(label, colour, marker) of a method; any other name is its own label, in grey."""
    return METHODS.get(name, (name, "#777777", "o"))


def amount(value, like=None):
    """Three digits, or all those before the point: 0.0123, 1.53, 22.1, 1,822; as many decimals as `like` gets."""
    size = abs(value if like is None else like) or 1
    return f"{value:,.{max(0, 2 - int(np.floor(np.log10(size))))}f}"


def apart(heights, gap):
    """The heights (from the top down), moved apart until neighbours keep the gap."""
    heights = np.array(heights, dtype=float)
    for _ in range(100):
        overlap = np.clip(gap + heights[1:] - heights[:-1], 0, None) / 2
        heights[:-1] += overlap
        heights[1:] -= overlap
    return heights


# Where a label may stand: (side, gap in points, height in lines, dislike). Beyond a gap of 6 or one line, on a leader.
SPOTS = [(side, gap, y, 3 * y * y + dislike) for y in (0, 1, -1, 1.5, -1.5, 2, -2, 3, -3, 4, -4)
         for side, gap, dislike in ((1, 6, 0), (0, 0, 1), (-1, 6, 2), (1, 24, 8), (-1, 24, 9)) if side or abs(y) >= 1]


def place(axis, labels, ends=()):
    """Writes each label where it hides least: beside one of its anchors, or on a short leader where it is crowded.
    labels: [(anchors in data units, the best first; text; colour), ...]; ends: the same, of lines, from the top
    down, to be stacked at the right if they can. The axis limits must be final."""
    axis.figure.draw_without_rendering()  # settles the layout, and with it every position in pixels
    point = axis.figure.dpi / 72  # pixels in a typographic point
    pixels, frame, taken = axis.transData.transform, axis.get_window_extent(), []
    paths = [line.get_transform().transform(line.get_xydata()) for line in axis.lines]
    ink = [np.repeat(path, 8, 0) for path in paths]  # what not to hide, as pixels: markers weigh more than lines
    paths = [path for path, line in zip(paths, axis.lines) if line.get_linestyle() != "None"]
    errors = [group for group in axis.collections if isinstance(group, LineCollection)]
    paths += [pixels(segment) for group in errors for segment in group.get_segments() if len(segment)]
    ink = np.concatenate(ink + [np.linspace(*pair, 50) for path in paths for pair in zip(path, path[1:])])
    stack = []
    if ends:
        x, y = pixels([anchors[0] for anchors, *_ in ends]).T / point
        rise, behind = (apart(y, 15) - y) / 14, x.max() - x
        stack = [[(1, 6 + 14 * (abs(up) > 0.2) + back * (back < 50), up, 0)] for up, back in zip(rise, behind)]
    owners = pixels([anchors[0] for anchors, *_ in [*ends, *labels]])
    for index, (anchors, text, colour) in enumerate([*ends, *labels]):
        note = axis.annotate(text, anchors[0], (0, 0), textcoords="offset points", ha="center", va="center",
                             color=[0.7 * part for part in to_rgb(colour)], zorder=5,
                             arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 4})
        note.set_in_layout(False)
        box = note.get_window_extent()
        half = np.array([box.width, box.height]) / 2 + 3 * point
        best = (np.inf,)
        for rank, anchor in enumerate(pixels(anchors)):
            for side, gap, y, dislike in SPOTS if rank or index >= len(ends) else stack[index] + SPOTS:
                shift = np.array([side * (half[0] + gap * point), y * 14 * point])
                far = abs(anchor + shift - (frame.min + frame.max) / 2) + half
                cost = (1 if colour == INK else 10) * rank + dislike  # a reference, in INK, is the same all along
                cost += 1e4 * (far > (frame.max - frame.min) / 2).any()
                cost += (abs(ink - anchor - shift) < half).all(1).sum()
                own, *others = np.linalg.norm(np.clip(  # from the text to its own point, and to those of others
                    abs(np.vstack([anchor, np.delete(owners, index, 0)]) - anchor - shift) - half, 0, None), axis=1)
                cost += 15 * (min(others, default=np.inf) < own - 1)
                leader = np.linspace(anchor, anchor + shift, 20)
                for centre, size in taken:
                    cost += 1e3 * (abs(anchor + shift - centre) < half + size).all()
                    cost += (abs(leader - centre) < size).all(1).sum()
                if cost < best[0]:
                    best = cost, anchors[rank], leader, shift, gap > 7 or abs(y) > 1
        _, note.xy, leader, shift, shown = best
        note.set_position(shift / point)
        note.arrow_patch.set_visible(shown)
        taken.append((leader[-1], half - 3 * point))
        ink = np.concatenate([ink, leader])


def decades(side, formatter):
    """Ticks at 1, 2, 5, 10, ... on a log axis (an xaxis or a yaxis), or at round steps where it is short."""
    low, high = side.get_view_interval()
    locator = LogLocator(subs=(1, 2, 5)) if high > 8 * low else AutoLocator()
    side.set(major_locator=locator, minor_locator=NullLocator(), major_formatter=formatter)


def finish(axis, labels, ends, reference=None, left=0.02, right=0.2):
    """Adds room beside the data (in parts of the width), draws the references and places all labels.
    reference: {label: accuracy}, each a dashed line, or a note at the edge if it would more than double the scale."""
    axis.autoscale_view()
    to_pixels = axis.transAxes.transform
    axis.set_xlim(axis.transData.inverted().transform(to_pixels([(-left, 0), (1 + right, 0)]))[:, 0])
    low, high = axis.get_ylim()
    middle, half = (low + high) / 2, max(1, (high - low) / 2)  # at least two points from bottom to top
    low, high, notes = middle - half, middle + half, []
    for label, value in sorted(dict(reference or {}).items(), key=lambda item: abs(item[1] - middle)):
        bottom, top = min(low, value - 0.3 * half), max(high, value + 0.3 * half)
        text = f"{label}, {value:.1f} %"
        if top - bottom <= 4 * half:
            low, high = bottom, top
            axis.axhline(value, color=INK, linewidth=1, linestyle=(0, (5, 4)), zorder=1)
            notes.append((text, value))
        else:
            notes.append((f"↓ {text}, is below this scale", -np.inf) if value < low else
                         (f"↑ {text}, is above this scale", np.inf))
    axis.set_ylim(low, high)
    across = axis.transData.inverted().transform(to_pixels([(x, 0) for x in np.linspace(0.95, 0.05, 19)]))[:, 0]
    notes = [([(x, np.clip(value, low, high)) for x in across], text, INK) for text, value in notes]
    place(axis, labels + notes, ends)


def accuracies(axis, series, connect=True, dodge=0.0, ring=None):
    """Points with error bars. series: {name: [(x, accuracy, spread or None, label if any), ...]}, x a number; dodge
    moves series apart, ring ({name: x}) marks one point of each. Returns two lists of labels for finish(): of points,
    and of series."""
    points, lines = [], []
    for index, (name, rows) in enumerate(series.items()):
        label, colour, marker = look(name)
        x, y, spread = (np.array([row[part] for row in rows], dtype=float) for part in range(3))
        x += dodge * (index - (len(series) - 1) / 2)
        axis.errorbar(x, y, spread, color=colour, marker=marker, linestyle="-" if connect else "none")
        points += [([at], row[3], colour) for *at, row in zip(x, y, rows) if len(row) > 3 and row[3]]
        anchors = [at for at in zip(x, y) if np.isfinite(at[1])][::-1]
        if ring:
            anchors.sort(key=lambda at: abs(at[0] - ring[name]))
            axis.plot(*anchors[0], "o", color=colour, markersize=15, markerfacecolor="none")
        lines.append((anchors, label, colour))
    return points, sorted(lines, key=lambda line: -line[0][0][1])


def bars(axis, names, values, texts, colours, spread=None):
    """Horizontal bars from top to bottom, each with its text at the end. spread: (below, above) each value."""
    axis.barh(range(len(values)), values, 0.6, xerr=spread, color=colours, ecolor="#777777")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.locator_params(axis="x", nbins=5)
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    for index, (value, text) in enumerate(zip(values, texts)):
        end = value + (spread[1][index] if spread is not None else 0)
        axis.annotate(text, (end, index), (6, 0), textcoords="offset points", va="center")


def traces(pair, histories, train, dev):
    """Loss and accuracy after each epoch on a pair of axes, in two colours; band: smallest to largest over runs."""
    for axis, measure, scale, label in zip(pair, ("loss", "accuracy"), (1, 100), ("cross-entropy loss (nats)",
                                                                                "accuracy (%)")):
        for split, style, colour, inside in (("train", "o-", train, train), ("dev", "s--", dev, "white")):
            epochs = {}
            for row in (row for history in histories for row in history):
                epochs.setdefault(row["epoch"], []).append(scale * row[f"{split}_{measure}"])
            values = list(epochs.values())
            axis.fill_between(list(epochs), [min(v) for v in values], [max(v) for v in values],
                              color=colour, alpha=0.25, linewidth=0)
            axis.plot(list(epochs), [np.mean(v) for v in values], style, color=colour, label=split,
                      markerfacecolor=inside, markersize=6)
        axis.set(xlabel="epochs trained", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)


# ---- figures ----

def curves(history, title, path):
    """Loss and accuracy after each epoch, train against dev. history: rows as in history.csv."""
    with drawing(path, 1, 2, (9, 3.6)) as (figure, axes):
        traces(axes[0], [history], TRAIN, DEV)
        axes[0, 0].legend()
        figure.suptitle(title, parse_math=False)  # a name of a file


def learning_curves(histories, path):
    """The same for several methods and runs, one column a method. histories: {method: [history, ...]}."""
    with drawing(path, 2, len(histories), (10, 5.5), sharex="col", sharey="row") as (figure, axes):
        for pair, (method, runs) in zip(axes.T, histories.items()):
            label, colour, _ = look(method)
            traces(pair, runs, colour, colour)
            pair[0].set_title(fill(label, 72 // len(histories)))
        for axis in axes.flat:
            axis.label_outer()
        axes[0, 0].legend()
        counts = sorted({len(runs) for runs in histories.values()})
        if counts != [1]:
            note = f"line: mean of {' or '.join(map(str, counts))} runs; band: smallest to largest"
            figure.supxlabel(note, size=11)


def tradeoff(rows, reference, path):
    """Test accuracy against trainable parameters (log). rows: [{method, parameters, mean, std or None}, ...];
    reference: [(label, accuracy), ...], such as the majority class."""
    series = {}
    for row in rows:
        text = f"{look(row['method'])[0]}, {row['mean']:.1f} %"
        series.setdefault(row["method"], []).append((row["parameters"], row["mean"], row["std"], text))
    with drawing(path) as (_, [[axis]]):
        spread = ", ± standard deviation over runs" * any(row["std"] for row in rows)
        axis.set(xscale="log", xlabel="trained parameters, head included", ylabel="test accuracy (%)" + spread)
        points, _ = accuracies(axis, series, connect=False)
        decades(axis.xaxis, EngFormatter(sep=" "))
        finish(axis, points, [], reference, 0.08, 0.08)


def study(x_label, series, path, reference=None):
    """Test accuracy against one setting. series: {method or label: [(x, accuracy, standard error, point label if any),
    ...]}, x all numbers (log axis) or all strings; reference: {label: accuracy}."""
    xs = list(dict.fromkeys(row[0] for rows in series.values() for row in rows))
    named = isinstance(xs[0], str)
    with drawing(path) as (_, [[axis]]):
        axis.set(xlabel=x_label, ylabel="test accuracy (%), ± standard error")
        axis.set_xscale("linear" if named else "log")
        if named:
            series = {name: [(xs.index(x), *rest) for x, *rest in rows] for name, rows in series.items()}
        labels = accuracies(axis, series, connect=not named, dodge=0.12 * named)
        if named:
            axis.set_xticks(range(len(xs)), [fill(x, max(10, 90 // len(xs)), break_long_words=False) for x in xs])
        else:
            decades(axis.xaxis, EngFormatter(sep=" "))
            if all(b > 1.5 * a for a, b in zip(sorted(xs), sorted(xs)[1:])):  # far enough apart to name each
                axis.set_xticks(xs, [f"{x:,g}" for x in xs])
        finish(axis, *labels, reference)


def sensitivity(accuracy, loss, chosen, path):
    """Dev accuracy and loss against learning rate (log). accuracy, loss: {method: [(rate, value, std or nan), ...]};
    chosen: {method: rate}, which gets a ring. A method that fails at some rate leaves the scale at its bottom."""
    with drawing(path, 1, 2, (10, 5)) as (figure, [[left, right]]):
        for axis, series, label in ((left, accuracy, "dev accuracy (%)"), (right, loss, "dev loss (nats)")):
            axis.set(xscale="log", xlabel="learning rate", ylabel=label)
            _, lines = accuracies(axis, series, ring=chosen)
            lost = []
            if axis is left:
                best = [max(row[1] for row in rows) for rows in series.values()]
                lost = [([(row[0], min(best) - 5)], f"↓ {row[1]:.1f} %", look(name)[1])
                        for name, rows in series.items() for row in rows if row[1] < min(best) - 5]
                if lost:
                    axis.set_ylim(min(best) - 5, max(best) + 1)
            place(axis, lines + lost)
        spread = any(row[2] > 0 for rows in accuracy.values() for row in rows)
        figure.supxlabel("ring: chosen" + "; bars: standard deviation over runs, where there were several" * spread,
                         size=11)


def by_certainty(bins, scores, path):
    """Test accuracy against how sure the human raters were. bins: [(low, high, sentences), ...] of |mean rating|;
    scores: {method: [(accuracy, standard error), ...]}, one pair a bin."""
    with drawing(path) as (_, [[axis]]):
        axis.set(xlabel="how sure the raters were: |mean rating|, with the number of sentences",
                 ylabel="test accuracy (%), ± standard error")
        axis.set_xticks(range(len(bins)), [f"{low:g} to {high:g}\n{count:,}" for low, high, count in bins])
        series = {name: [(x, *pair) for x, pair in enumerate(pairs)] for name, pairs in scores.items()}
        finish(axis, *accuracies(axis, series, dodge=0.08))


def differences(rows, path):
    """Paired differences in test accuracy. rows: [{name, difference, low, high, p}, ...], in points."""
    with drawing(path, size=(9, 1.4 + 0.45 * len(rows))) as (_, [[axis]]):
        axis.axvline(0, color=INK, linewidth=1)
        for index, row in enumerate(rows):
            middle, low, high, p = (row[key] for key in ("difference", "low", "high", "p"))
            open_question = low <= 0 <= high or p > 0.05
            axis.errorbar(middle, index, xerr=[[middle - low], [high - middle]], color=INK, marker="o", markersize=8,
                          markerfacecolor="white" if open_question else INK, linewidth=2)
            text = f"{middle:+.2f}  [{low:+.2f}, {high:+.2f}]".replace("-", "−")
            text += "   p < 0.001" if p < 0.001 else f"   p = {p:.3f}"
            axis.annotate(text, (1.02, index), xycoords=axis.get_yaxis_transform(), va="center")
        axis.set(yticks=range(len(rows)), yticklabels=[row["name"].replace(" - ", " − ") for row in rows],
                 ylim=(len(rows) - 0.5, -0.5), xlabel="difference in test accuracy (points), 95 % interval\n"
                 "hollow: not distinguished from zero")
        axis.grid(visible=False, axis="y")


def costs(rows, path):
    """What training costs. rows: [{method, train_seconds, train_seconds_std or None, peak_memory_mb,
    peak_memory_mb_std or None}, ...]."""
    with drawing(path, 1, 2, (9, 1.1 + 0.5 * len(rows)), sharey=True) as (_, axes):
        labels, colours, _ = zip(*(look(row["method"]) for row in rows))
        for axis, key, name, unit in zip(axes[0], ("train_seconds", "peak_memory_mb"),
                                         ("training time (s)", "peak memory (MB)"), ("s", "MB")):
            values, spread = ([row[key + end] for row in rows] for end in ("", "_std"))
            texts = [f"{amount(v)}" + (f" ± {amount(s, v)}" if s else "") + f" {unit}" for v, s in zip(values, spread)]
            spread = [s or 0 for s in spread]
            bars(axis, labels, values, texts, colours, (spread, spread) if any(spread) else None)
            axis.set_xlabel(name + "\n± standard deviation over runs" * any(spread))


def steps(rows, path, x_label, unit):
    """What each step of an ablation brings. rows: [(label, value, low, high), ...]."""
    with drawing(path, size=(9, 1.1 + 0.5 * len(rows))) as (_, [[axis]]):
        labels, values, lows, highs = zip(*rows)
        spread = np.subtract(values, lows), np.subtract(highs, values)
        texts = [f"{amount(v)} {unit}" + (f"   (× {v / before:.2f})" if before else "")
                 for v, before in zip(values, (None, *values))]
        bars(axis, labels, values, texts, "#b0b0b0", spread)
        axis.set_xlabel(f"{x_label}\nin brackets: relative to the bar above")


def growth(panels, path):
    """Time or memory against size. panels: rows of panels, each a dict of title, x_label, y_label, log and series
    {method or label: [(size, value), ...]}. With log, both axes are, and a dotted line is in proportion to size;
    else both begin at 0, which shows what is there before the first sentence."""
    with drawing(path, len(panels), len(panels[0]), (10, 0.7 + 2.9 * len(panels))) as (figure, axes):
        entries = {}
        for axis, panel in zip(axes.flat, (panel for row in panels for panel in row)):
            axis.set(title=panel["title"], xlabel=panel["x_label"], ylabel=panel["y_label"])
            for name, points in panel["series"].items():
                label, colour, marker = look(name)
                entries[label], = axis.plot(*zip(*points), color=colour, marker=marker)
            if not panel["log"]:
                axis.set(xlim=(0, None), ylim=(0, 1.1 * axis.dataLim.ymax))
                axis.xaxis.set_major_formatter("{x:,g}")
                axis.yaxis.set_major_formatter("{x:,g}")
                continue
            axis.set(xscale="log", yscale="log")
            axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())
            sizes, bottom = np.array(axis.get_xlim()), axis.get_ylim()[0]
            entries["in proportion to size"], = axis.plot(sizes, bottom * sizes / sizes[0], ":", color=INK)
            for side in (axis.xaxis, axis.yaxis):
                decades(side, "{x:,g}")
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries))


def spectra(rows, path):
    """LoRA's update of each matrix, W - W0. rows: [{layer, kind, singular_values (largest first), reads, writes (each
    {width, agreement of the first 1, 2, ... directions of two seeds}), ratio}, ...], ratio = ||W - W0|| / ||W0||
    (Frobenius). Above: means over layers; below: every ratio, in per cent."""
    layers, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("layer", "kind"))
    with drawing(path, 2, 3, (11, 8), height_ratios=(4, 5)) as (figure, axes):
        above, grid = axes[0], axes[1, 0].get_gridspec()
        for axis in axes[1]:
            axis.remove()
        below = figure.add_subplot(grid[1, :])
        panels = [("singular values", "number, largest first", "size, relative to the largest",
                   lambda row: np.divide(row["singular_values"], row["singular_values"][0]))]
        panels += [(f"agreement: what it {side}", "leading directions", "overlap (1: the same space)",
                    lambda row, side=side: row[side]["agreement"]) for side in ("reads", "writes")]
        for axis, (title, x_label, y_label, values) in zip(above, panels):
            for index, kind in enumerate(kinds):
                mean = np.mean([values(row) for row in rows if row["kind"] == kind], 0)
                colour, marker = plt.get_cmap("plasma")(index / (len(kinds) + 0.5)), "oD^svPX"[index % 7]
                axis.plot(range(1, len(mean) + 1), mean, color=colour, marker=marker, markersize=5, label=kind)
            axis.set(title=title, xlabel=x_label, ylabel=y_label, ylim=(0, 1.05))
            axis.xaxis.get_major_locator().set_params(integer=True)
        count = np.arange(1, len(mean) + 1)
        for axis, side in zip(above[1:], ("reads", "writes")):
            chance = np.mean([1 / row[side]["width"] for row in rows])
            axis.plot(count, count * chance, ":", color=INK, label="by chance")
        above[1].legend(fontsize=9)
        table = np.full((len(layers), len(kinds)), np.nan)
        for row in rows:
            table[layers.index(row["layer"]), kinds.index(row["kind"])] = 100 * row["ratio"]
        below.imshow(table, cmap="Blues", vmin=0, aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            below.text(x, y, "" if np.isnan(value) else amount(value), ha="center", va="center",
                       color="white" if value > 0.6 * np.nanmax(table) else "black")
        below.set(title="size of the update, % of the matrix it updates", ylabel="layer", yticks=range(len(layers)),
                  yticklabels=layers)
        below.set_xticks(range(len(kinds)), [kind.replace(".", "\n") for kind in kinds])
        below.grid(visible=False)

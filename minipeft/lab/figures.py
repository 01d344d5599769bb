"""Draw how the techniques work, from the shapes of a real model: python -m minipeft.lab.figures

Writes to results/figures: all techniques in one block and the adapter's part of it, LoRA's matrices, and the share of
the parameters that each technique trains. Only shapes are needed: the model is built on the meta device. Coordinates
are pixels of a README, 830 wide; the files have more.
"""
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

from ..bert import Bert, read_config
from ..head import Classifier, freeze
from ..model import APPLY, count_parameters
from ..tools import download
from ..tools.files import atomic, run_program
from ..tools.settings import Parser, defaults
from . import plots

WIDTH = 830
INK, EDGE, FROZEN, PLAIN = "#24292f", "#6e7781", "#d8dce1", "#ffffff"
HEAD, ADAPTER, LORA = (plots.look(name)[1] for name in ("head", "adapter", "lora"))


def meta_model(technique, config, classes=2):
    """Build the classifier of a technique, with its default options, on the meta device."""
    with torch.device("meta"):
        encoder = Bert(config)
        freeze(encoder)
        APPLY[technique](encoder, Namespace(**defaults(technique)))
        return Classifier(encoder, classes)


# -- what drawings are made of ----------------------------------------------------------------------------

def canvas(height):
    """Return (figure, axis): an opaque light card, `height` pixels high, with its origin at the bottom left."""
    figure = Figure((WIDTH / 100, height / 100), dpi=100, facecolor="#fbfcfd")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
    axis.set_axis_off()
    return figure, axis


def tint(colour):
    """Mix a colour with white."""
    return tuple(0.6 + 0.4 * part for part in to_rgb(colour))


def write(axis, x, y, text, size=9, align="center", **options):
    axis.text(x, y, text, **{"size": size, "ha": align, "va": "center", "color": INK, "linespacing": 1.35} | options)


def box(axis, x, y, width, height, text="", colour=FROZEN):
    """A rounded box centred on (x, y). colour: FROZEN, PLAIN for no weights, or that of a technique."""
    fill, edge, line = (colour, EDGE, 1) if colour in (FROZEN, PLAIN) else (tint(colour), colour, 1.4)
    axis.add_patch(FancyBboxPatch((x - width / 2 + 4, y - height / 2 + 4), width - 8, height - 8, zorder=2,
                                  boxstyle="round,pad=4", facecolor=fill, edgecolor=edge, linewidth=line))
    write(axis, x, y, text, zorder=3)


def rectangle(axis, x, y, width, height, **options):
    """A rectangle centred on (x, y)."""
    axis.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, **options))


def panel(axis, x, y, width, height, colour, title, note, fill=PLAIN):
    """A card behind a part of the drawing, centred on (x, y); the note stands right of the title."""
    rectangle(axis, x, y, width, height, facecolor=fill, edgecolor=colour, linewidth=1.4, zorder=0)
    write(axis, x - width / 2 + 14, y + height / 2 - 19, title, 10.5, "left", weight="bold", color=colour)
    write(axis, x + width / 2 - 12, y + height / 2 - 19, note, align="right")


def taper(axis, x, y, bottom, top, height, colour, upright=True):
    """A trapezoid centred on (x, y): a matrix from `bottom` to `top` numbers (from left to right if not upright)."""
    corners = [(-bottom / 2, -height / 2), (bottom / 2, -height / 2), (top / 2, height / 2), (-top / 2, height / 2)]
    corners = [(x + a, y + b) if upright else (x + b, y + a) for a, b in corners]
    axis.add_patch(Polygon(corners, facecolor=tint(colour), edgecolor=colour, linewidth=1.4, zorder=2))


def hourglass(axis, x, y, width, height, colour):
    """Draw the symbol of a bottleneck: a projection to few numbers, and one back."""
    taper(axis, x, y - height / 4, width, width / 4, height / 2, colour)
    taper(axis, x, y + height / 4, width / 4, width, height / 2, colour)


def weight(axis, x, y, width, height, text):
    """A frozen weight with LoRA's sign beside it."""
    box(axis, x, y, width, height, text)
    hourglass(axis, x + width / 2 + 11, y, 14, height - 2, LORA)


def arrow(axis, *points):
    """A line through `points` that ends in an arrow head."""
    axis.plot(*zip(*points), color=INK, linewidth=1.2, solid_joinstyle="round", zorder=1)
    axis.annotate("", points[-1], points[-2], zorder=1.5, arrowprops=dict(
        arrowstyle="-|>,head_width=0.22,head_length=0.4", color=INK, linewidth=1.2, shrinkA=0, shrinkB=0))


def arrows_up(axis, x, *pairs):
    """Vertical arrows at x, from the first to the second height of each pair."""
    for start, end in pairs:
        arrow(axis, (x, start), (x, end))


def plus(axis, x, y):
    axis.plot([x], [y], "o", markersize=13, markerfacecolor=PLAIN, markeredgecolor=INK, zorder=2)
    write(axis, x, y - 0.5, "+", 11, zorder=3)


# -- the mechanism ----------------------------------------------------------------------------------------

def draw_block(axis, config):
    """The model from bottom to top: embeddings, one block with all that any technique trains, the head."""
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    x, size = 222, hidden // heads
    panel(axis, 227, 374, 406, 640, "#b6bdc5", "", f"one of {config.num_hidden_layers} blocks", "#f1f3f5")
    box(axis, x, 23, 290, 28, f"embeddings:  {hidden} numbers for each token")
    for column, name in ((118, "query"), (x, "key"), (326, "value")):
        arrow(axis, (x, 74), (column, 74), (column, 96))
        weight(axis, column, 114, 78, 36, f"{name}\n{hidden} × {hidden}")
        arrow(axis, (column, 132), (column, 152))
    box(axis, x, 168, 290, 30, rf"softmax($QK^T\!/\sqrt{{{size}}}$) $V$,  {heads} heads of {size}", PLAIN)
    weight(axis, x, 222, 150, 32, f"output  {hidden} × {hidden}")
    weight(axis, x, 432, 230, 32, f"intermediate  {wide:,} × {hidden}")
    box(axis, x, 475, 64, 22, "GELU", PLAIN)
    weight(axis, x, 518, 230, 32, f"output  {hidden} × {wide:,}")
    for start, y in ((74, 238), (394, 534)):  # where a sub-layer begins, and where its last weight ends
        arrow(axis, (x, start), (46, start), (46, y + 98), (x - 10, y + 98))
        hourglass(axis, x, y + 29, 92, 30, ADAPTER)
        write(axis, x - 54, y + 29, "adapter", align="right")
        box(axis, x, y + 68, 74, 22, "dropout", PLAIN)
        plus(axis, x, y + 98)
        box(axis, x, y + 129, 150, 22, f"LayerNorm  2 × {hidden}", ADAPTER)
        arrows_up(axis, x, (y, y + 14), (y + 44, y + 57), (y + 79, y + 91), (y + 105, y + 118))
    box(axis, x, 727, 230, 28, "mean over the tokens", PLAIN)
    box(axis, x, 773, 230, 28, f"dense  {hidden} × {hidden},  tanh,  dropout", HEAD)
    box(axis, x, 823, 230, 28, f"classifier  2 × {hidden}", HEAD)
    write(axis, x, 874, "negative or positive")
    arrows_up(axis, x, (37, 96), (183, 206), (378, 416), (448, 464), (486, 502), (674, 713), (741, 759), (787, 809),
              (837, 862))


def draw_lora(axis, hidden, rank):
    """LoRA enlarged, beside the value's weight."""
    axis.plot((386, 452), (114, 114), ":", color=LORA, linewidth=1.2, zorder=1)
    panel(axis, 632, 187, 360, 266, LORA, "LoRA", "beside each of the six weights of a block")
    box(axis, 530, 148, 104, 92, f"$W_0$\n{hidden} × {hidden}\nfrozen")
    taper(axis, 694, 121, 92, 16, 38, LORA)
    taper(axis, 694, 175, 16, 92, 38, LORA)
    plus(axis, 612, 224)
    for x, end in ((530, 602), (694, 622)):
        arrow(axis, (612, 72), (612, 86), (x, 86), (x, 102))
        arrow(axis, (x, 194), (x, 224), (end, 224))
    arrow(axis, (694, 140), (694, 156))
    arrow(axis, (612, 231), (612, 258))
    write(axis, 624, 70, "$x$", 11)
    write(axis, 624, 250, "$h$", 11, "left")
    write(axis, 704, 213, r"$\times\ \alpha\,/\,r$", 10, "left")
    write(axis, 722, 132, f"$A$  {rank} × {hidden}", align="left")
    write(axis, 722, 166, f"$B$  {hidden} × {rank}", align="left")
    write(axis, 682, 148, f"{rank}", align="right")


def draw_adapter(axis, hidden, bottleneck):
    """The upper adapter enlarged."""
    axis.plot((270, 452), (563, 563), ":", color=ADAPTER, linewidth=1.2, zorder=1)
    panel(axis, 632, 521, 360, 270, ADAPTER, "Adapter", "after the output weight, before dropout")
    taper(axis, 612, 460, 140, 12, 42, ADAPTER)
    box(axis, 612, 501, 56, 20, "GELU", PLAIN)
    taper(axis, 612, 542, 12, 140, 42, ADAPTER)
    plus(axis, 612, 582)
    arrow(axis, (612, 424), (520, 424), (520, 582), (602, 582))
    arrows_up(axis, 612, (411, 439), (481, 491), (511, 521), (563, 575), (589, 614))
    write(axis, 612, 401, "$h$", 11)
    write(axis, 624, 607, "$y$", 11, "left")
    write(axis, 512, 501, "skip", align="right")
    write(axis, 656, 470, f"$W_{{down}}$  {bottleneck} × {hidden}", align="left")
    write(axis, 656, 501, f"{bottleneck} numbers", align="left")
    write(axis, 656, 532, f"$W_{{up}}$  {hidden} × {bottleneck}", align="left")


def draw_key(axis, config):
    """The colours, and how many parameters have each."""
    counts = {name: count_parameters(meta_model(name, config)) for name in ("head", "adapter", "lora", "full")}
    norms = 4 * config.hidden_size * config.num_hidden_layers  # two a block, each with a scale and an offset
    write(axis, 466, 862, "What each technique trains", 10.5, "left", weight="bold")
    rows = ((HEAD, "head, with every technique", counts["head"]["head"]),
            (ADAPTER, "adapters", counts["adapter"]["technique"] - norms), (ADAPTER, "their LayerNorms", norms),
            (LORA, "LoRA, six weights a block", counts["lora"]["technique"]),
            (FROZEN, "frozen, except in full fine-tuning", counts["full"]["technique"]), (PLAIN, "no weights", None))
    for y, (colour, text, count) in zip(range(832, 664, -28), rows):
        box(axis, 476, y, 20, 16, colour=colour)
        write(axis, 494, y, text, align="left")
        if count:
            write(axis, 808, y, f"{count:,}", align="right")


def mechanism(config):
    """One block with all that any technique trains, LoRA and the adapter enlarged, and the counts."""
    figure, axis = canvas(900)
    draw_block(axis, config)
    draw_lora(axis, config.hidden_size, defaults("lora")["rank"])
    draw_adapter(axis, config.hidden_size, defaults("adapter")["bottleneck"])
    draw_key(axis, config)
    return figure


def adapter_sub_layer(config):
    """The part of the mechanism with the upper sub-layer and its adapter."""
    low, high = 381, 704
    figure, axis = canvas(high - low)
    axis.set_ylim(low, high)
    draw_block(axis, config)
    draw_adapter(axis, config.hidden_size, defaults("adapter")["bottleneck"])
    return figure


# -- one figure a technique -------------------------------------------------------------------------------

def lora_matrices(config):
    """LoRA beside the query weight: W0 + (alpha / rank) B A = W, all matrices to one scale."""
    layer = meta_model("lora", config).encoder.layers[0].attention.query
    (rank, inputs), outputs = layer.lora_A.shape, layer.lora_B.shape[0]
    scale, y = 196 / max(inputs, outputs), 158
    width, height, thin = inputs * scale, outputs * scale, rank * scale
    figure, axis = canvas(310)
    for x, wide, high, colour, edge in ((120, width, height, FROZEN, EDGE), (323, thin, height, LORA, LORA),
                                        (454, width, thin, LORA, LORA), (704, width, height, FROZEN, EDGE)):
        rectangle(axis, x, y, wide, high, facecolor=colour, edgecolor=edge)
    rectangle(axis, 704, y, width, height, facecolor="none", edgecolor=tint(LORA), hatch="//", linewidth=0)
    for x, text, size in ((120, "$W_0$", 15), (240, "+", 18), (274, r"$\frac{\alpha}{r}$", 21), (340, "·", 18),
                          (582, "=", 18)):
        write(axis, x, y, text, size)
    write(axis, 704, y, "$W$", 15, bbox={"facecolor": FROZEN, "edgecolor": "none", "pad": 4})
    write(axis, 323, y + height / 2 + 16, f"$B$  {outputs} × {rank}")
    write(axis, 454, y + 20, f"$A$  {rank} × {inputs}")
    size, count = inputs * outputs, rank * (inputs + outputs)
    write(axis, 120, 28, f"{outputs} × {inputs} = {size:,}\nfrozen")
    write(axis, 422, 28, f"{rank} × ({inputs} + {outputs}) = {count:,} trained\n{count / size:.1%} of $W_0$")
    write(axis, 704, 28, f"{outputs} × {inputs} = {size:,}\nafter merge_lora: a plain weight")
    return figure


def shares(config):
    """One bar a technique, as long as its number of parameters: frozen grey, trained coloured."""
    figure, axis = canvas(266)
    scale = 530 / count_parameters(meta_model("full", config))["total"]
    for y, name in zip((186, 138, 90, 42), ("head", "adapter", "lora", "full")):
        model = meta_model(name, config)
        encoder, counts, (label, colour, _) = model.encoder, count_parameters(model), plots.look(name)
        write(axis, 18, y, label.replace(" fine", "\nfine"), 9.5, "left")
        x, starts = 128, []
        for part in (encoder.embeddings, *encoder.layers, model.head):
            starts.append(x)
            own = HEAD if part is model.head and name != "full" else colour
            for trained, fill in ((False, FROZEN), (True, own)):
                length = scale * sum(p.numel() for p in part.parameters() if p.requires_grad == trained)
                rectangle(axis, x + length / 2, y, length, 28, facecolor=fill, linewidth=0,
                          snap=False)  # a sliver keeps its true width
                x += length
            x += 2  # a gap
        write(axis, 694, y, f"{counts['trainable']:,}\n{counts['trainable'] / counts['total']:.2%} trained", 9, "left")
        if name == "head":
            names = ("embeddings", f"{len(encoder.layers)} blocks", "head")
            for text, (start, end) in zip(names, pairwise((starts[0], starts[1], starts[-1], x))):
                write(axis, (start + end) / 2, 212, text, va="baseline")
    write(axis, 18, 246, "Parameters, in true proportion: frozen grey, trained coloured or black", 10.5, "left",
          weight="bold")
    return figure


# -- main -------------------------------------------------------------------------------------------------

FIGURES = {"mechanism.png": mechanism, "adapter.png": adapter_sub_layer, "lora.png": lora_matrices,
           "frozen.png": shares}


def main(arguments=None):
    """Write all figures."""
    parser = Parser(prog="python -m minipeft.lab.figures", description="Draw the techniques with a model's shapes.")
    parser.add_argument("--weights", metavar="FOLDER", help="the model, by its weights (default: all-MiniLM-L6-v2)")
    parser.add_argument("--out", metavar="FOLDER", default="results/figures",
                        help="where to write (default: results/figures)")
    options = parser.parse_args(arguments)
    config = read_config(download.find_weights(options.weights))
    for name, draw in FIGURES.items():
        with rc_context({"hatch.linewidth": 1.2}), atomic(Path(options.out) / name) as temporary:
            draw(config).savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    sys.exit(run_program("figures", main))

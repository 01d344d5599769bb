"""The table of techniques with their options and defaults, and the command line made from it.

A technique is one row of TECHNIQUES here and one entry in model.py; the command line, the comparison and the
plots loop over this table. Nothing slow is imported, so --help and option errors appear at once.
"""
import argparse
import math
import os
import shlex
import sys
from dataclasses import dataclass


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, and with mistakes reported in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100))

    def parse_known_args(self, arguments=None, namespace=None):
        for argument in sys.argv[1:] if arguments is None else arguments:
            if argument.encode(errors="replace").decode() != argument:  # a path that no JSON record can hold
                self.error(f"{argument!a} is not UTF-8 text: rename the file or folder")
        return super().parse_known_args(arguments, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def share_cores():
    """Let OpenMP's waiting threads give up their core early, unless the user has set this. Call it before torch.

    With another busy process, a waiting thread that spins takes the core from the one it waits for
    (benchmarks/speed.py measures both cases).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # GNU's OpenMP, which torch has on Linux
    os.environ.setdefault("KMP_BLOCKTIME", "1")      # Intel's, in milliseconds


def number(kind, low, high=math.inf):
    """An argparse type: a finite number between low and high, both included."""
    def parse_number(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            allowed = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value
    parse_number.__name__ = "whole number" if kind is int else "number"  # for argparse's "invalid ... value"
    return parse_number


def encoding(text):
    """An argparse type: the name of a text encoding."""
    try:
        "a".encode(text)
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an encoding, such as utf-8, cp1252 or gb18030") from None
    return text


def separator(text):
    """An argparse type: one character; "tab" and a backslash with t stand for a tab."""
    text = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(text) != 1 or text in '"\r\n':
        raise argparse.ArgumentTypeError(f"{text!r} is not one character, such as ';' or tab")
    return text


count, share, positive = number(int, 1), number(float, 0, 1), number(float, 1e-12)


# -- techniques -------------------------------------------------------------------------------------------

# How each technique option is written on the command line: arguments for argparse.
OPTIONS = {
    "targets": dict(nargs="+", metavar="NAME", help="the linear layers that are wrapped, by the end of their names"),
    "rank": dict(type=count, metavar="R", help="rank of the update. Alpha stays the same: --rank 64 scales the update "
                 "by 16 / 64 = 0.25, which keeps the best learning rate nearly the same (Hu et al., section 4.1)"),
    "alpha": dict(type=positive, metavar="X", help="the update is scaled by alpha / rank"),
    "rslora": dict(help="scale by alpha / sqrt(rank) instead"),
    "lora_dropout": dict(type=share, metavar="X", help="dropout on the input of the update"),
    "bottleneck": dict(type=count, metavar="M", help="width of the bottleneck"),
    "init_std": dict(type=positive, metavar="X", help="standard deviation of the adapters' initial weights"),
    "norms": dict(nargs="*", metavar="NAME", help="the normalisation layers that are trained too, by the end of "
                  "their names"),
    "dropout": dict(type=share, metavar="X", help="dropout in the encoder"),
    "top_layers": dict(type=count, metavar="K", help="train in the top K layers only (default: all)"),
}


@dataclass(frozen=True)
class Technique:
    label: str      # in tables and plots
    help: str       # what is trained
    lr: float       # the default learning rate
    options: dict   # the names of its options, each in OPTIONS, and their defaults


LINEAR_LAYERS = ["query", "key", "value", "attention.output", "intermediate", "feed_forward.output"]
ENCODER = {"dropout": 0.0, "top_layers": None}
TECHNIQUES = {
    "head": Technique("head tuning", "the classification head, the last two layers", 8e-3, {}),
    "adapter": Technique(
        "adapters", "bottleneck adapters at the end of each sub-layer (Houlsby et al. 2019), and the head", 1e-3, {
            "targets": ["attention.output", "feed_forward.output"], "bottleneck": 32, "init_std": 1e-2,
            "norms": ["attention.norm", "feed_forward.norm"], **ENCODER}),
    "lora": Technique(
        "LoRA", "low-rank updates of the linear layers (Hu et al. 2021), and the head", 5e-4, {
            "targets": LINEAR_LAYERS, "rank": 8, "alpha": 16.0, "lora_dropout": 0.0, "rslora": False,
            **ENCODER}),
    "bitfit": Technique("BitFit", "the biases (Ben Zaken et al. 2021), and the head", 2e-3, ENCODER),
    "full": Technique("full fine-tuning", "everything: the reference", 2.5e-5, ENCODER),
}


# -- command line -----------------------------------------------------------------------------------------

EXPORT = (
    "lora can be exported to peft; head, lora, bitfit and full, merged, to transformers; adapter, trained with an "
    "empty --norms, to AdapterHub's adapters. peft and transformers have a place for the head only if it was trained "
    "with --pooling cls: then they open the whole classifier. Any other head is a file beside the encoder.")


READING = ("text_column", "label_column", "encoding", "separator")  # the options that say how a data file is read


def add_reading(add, default=None):
    """Add the options of READING. add: a parser's add_argument. default: named in the help instead of train.py's."""
    add("--text-column", metavar="NAME", help=f"name of the column of texts (default: {default or 'text'})")
    add("--label-column", metavar="NAME", help=f"name of the column of labels (default: {default or 'label'})")
    add("--encoding", metavar="NAME", type=encoding, help=f"encoding of the file (default: {default or 'UTF-8'})")
    add("--separator", metavar="CHAR", type=separator,
        help=f"character between two columns, such as ';' or tab (default: {default or 'found out'})")


def add_common(parser):
    """Add the options that every run of a comparison shares: data, training, machine."""
    add = parser.add_argument_group("weights and data").add_argument
    add("--weights", metavar="FOLDER", help="a folder of BERT weights, or a name on the Hugging Face Hub (default: "
        "all-MiniLM-L6-v2, fetched once)")
    add("--data", metavar="PATH", help="labelled sentences: a CSV, TSV, JSON-lines or JSON file, also packed (.gz), or "
        "a folder with one subfolder a class (default: movie reviews, fetched once)")
    add("--test", metavar="PATH", help="labelled sentences to test on (default: a part of the data)")
    add_reading(add)
    add("--max-length", metavar="N", type=number(int, 3), default=128,
        help="tokens that a sentence is cut to (default: 128)")
    add("--limit", metavar="N", type=number(int, 2), help="train on N sentences, chosen by the seed")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", metavar="N", type=count, default=3, help="passes over the training set (default: 3)")
    add("--batch-size", metavar="N", type=count, default=32, help="sentences a step (default: 32)")
    add("--warmup", metavar="X", type=share, default=0.1,
        help="share of the steps in which the learning rate rises (default: 0.1)")
    add("--schedule", choices=("linear", "constant"), default="linear",
        help="after warm-up the rate falls to 0, or stays (default: linear)")
    add("--weight-decay", metavar="X", type=number(float, 0), default=0.01,
        help="AdamW's, on matrices only (default: 0.01)")
    add("--clip", metavar="X", type=positive, default=1.0, help="largest norm of the gradient (default: 1)")
    add("--head-dropout", metavar="X", type=share, default=0.1, help="dropout in the head (default: 0.1)")
    add("--pooling", choices=("mean", "cls"), default="mean",
        help="input of the head: the mean of all tokens, or [CLS] (default: mean)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="precision of matrix products. auto measures and takes the faster; fp32 on a CPU gives the same bits "
        "every time (default: auto)")


def add_run(parser, technique):
    """Add the options of a run of a technique."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--lr", metavar="X", type=positive, default=technique.lr,
        help=f"highest learning rate (default: {technique.lr:g})")
    add("--head-lr", metavar="X", type=positive, help="highest learning rate of the head (default: the same as --lr)")
    add("--fold", metavar="I", type=number(int, 0, 9), help="index of the part of the data to test on (default: 0)")
    add("--seed", metavar="N", type=number(int, 0, 2**32 - 1), default=0, help="random seed (default: 0)")
    add("--out", metavar="FOLDER", help="folder of the run (default: runs/TECHNIQUE-foldI, or -seedN with --test)")
    add("--save-every", metavar="STEPS", type=count, default=100, help="how often to save the state (default: 100)")
    add("--eval-every", metavar="EPOCHS", type=count, default=1,
        help="how often to measure dev; the last epoch always is (default: 1)")
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="resume an unfinished run; the other options are those "
                          "it began with")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing run")
    if technique.options:
        group = parser.add_argument_group(technique.label)
    for name, default in technique.options.items():
        arguments = dict(OPTIONS[name], default=default)
        if isinstance(default, bool):
            arguments["action"] = "store_true"
        elif isinstance(default, list):
            arguments["help"] += f" (default: {' '.join(default)})"
        elif default is not None:
            arguments["help"] += f" (default: {default:g})"
        group.add_argument("--" + name.replace("_", "-"), **arguments)
    add_common(parser)


def make_parser():
    parser = Parser(prog="train.py", description="Fine-tune a small BERT to classify sentences.",
                    epilog="train.py TECHNIQUE --help lists the options of a technique.")
    choices = parser.add_subparsers(dest="technique", metavar="TECHNIQUE", required=True, title="what is trained")
    for name, technique in TECHNIQUES.items():
        chosen = choices.add_parser(name, help=technique.help, description=f"Train {technique.help}.",
                                    epilog=f"Other libraries (python -m minipeft export): {EXPORT}",
                                    usage=f"train.py {name} [options]")
        add_run(chosen, technique)
    return parser


def defaults(technique):
    """The settings of a technique when its command line has no option, as a dict."""
    parser = Parser()
    add_run(parser, TECHNIQUES[technique])
    return {"technique": technique} | vars(parser.parse_args([]))


def common_defaults():
    """The settings that every run of a comparison shares, with their defaults, as a dict."""
    parser = Parser()
    add_common(parser)
    return vars(parser.parse_args([]))


def parse(arguments):
    """Turn the command line of train.py into settings, an argparse.Namespace. Mistakes exit with code 2."""
    parser = make_parser()
    settings = parser.parse_args(arguments)
    if settings.test and settings.fold is not None:
        parser.error("--fold picks a test set from the data, but --test names one; repeat a run with --seed instead")
    if settings.test and not settings.data:
        parser.error("--test needs --data, with the same labels, to train on")
    if not settings.test and settings.fold is None:
        settings.fold = 0
    settings.given = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    if settings.out is None:
        repeat = f"seed{settings.seed}" if settings.test else f"fold{settings.fold}"
        settings.out = f"runs/{settings.technique}-{repeat}"
    return settings


UNSAID = ("given", "out", "resume", "overwrite")  # what the command of a record leaves out
# Settings that do not decide the outcome, or whose resolved value is stored with the machine.
UNRECORDED = (*UNSAID, "save_every", "eval_every", "device", "precision")


def recorded(settings):
    """The settings that decide the outcome, as a dict; those without a value are left out."""
    return {name: value for name, value in vars(settings).items() if name not in UNRECORDED and value is not None}


def command(settings):
    """The command line that gives these settings: the inverse of `parse`. It leaves out options at their defaults,
    except the learning rate, whose default may change with a new search."""
    words, default = ["python", "train.py", settings.technique], defaults(settings.technique)
    for name, value in vars(settings).items():
        if name in UNSAID or name != "lr" and value == default[name]:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list):
            words += value
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)

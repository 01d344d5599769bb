"""Use a finished run, or explain a technique: python -m minipeft predict RUN "a sentence" (--help lists the rest)."""
import csv
import os
import sys
from itertools import islice
from pathlib import Path

from .tools.files import UserError
from .tools.settings import EXPORT, Parser, encoding, number, separator

CHUNK = 1024  # rows of a file that are read and classified at a time


def add_weights(parser):
    parser.add_argument("--weights", metavar="FOLDER",
                        help="folder of the base weights (default: as recorded in the run)")


def add_reading(parser):
    """Add the options of texts.open_table that a run records, and which another file may need to have changed."""
    parser.add_argument("--text-column", metavar="NAME", help="name of the column of texts (default: as in training)")
    parser.add_argument("--encoding", metavar="NAME", type=encoding, help="encoding of the file (default: as in "
                        "training)")
    parser.add_argument("--separator", metavar="CHAR", type=separator, help="character between two columns (default: "
                        "as in training)")


def reading(options, record):
    """How to read a file: as given, else as the data of the run were read."""
    names = "text_column", "label_column", "encoding", "separator"
    return {name: getattr(options, name, None) or record["settings"].get(name) for name in names}


def open_classifier(options):
    """Open the run that was named: (function, record). The function: texts -> logits, array (n, classes)."""
    from . import data, model as models  # late: --help does not wait for torch
    from .lora import merge_lora
    from .tools import checkpoint
    model, record, weights = checkpoint.open_run(options.run, options.weights)
    merge_lora(model)  # plain linear layers again: the same predictions at the speed of the base model
    length = record["settings"]["max_length"]
    tokenizer = data.load_tokenizer(weights, length, model.encoder.config.vocab_size)

    def classify(texts):
        sentences, cut = data.tokenize(tokenizer, texts)
        if cut:
            print(f"texts cut to {length} tokens: {cut}", file=sys.stderr)
        return models.predict(model, sentences)
    return classify, record


# -- predict ----------------------------------------------------------------------------------------------

def add_predict(commands):
    parser = commands.add_parser("predict", help="classify sentences with a finished run", description=(
        "Classify sentences. Prints class, probability and text, separated by tabs; with --csv, the table of the file "
        "with a prediction and the probability of each class added to each row."))
    parser.add_argument("run", help="folder of the run, such as runs/lora-fold0")
    parser.add_argument("text", nargs="*", help="sentences; without any, lines are read from standard input")
    parser.add_argument("--csv", metavar="FILE", help="classify the rows of this file, CSV or what the run was trained "
                        "on, and print CSV")
    add_reading(parser)
    add_weights(parser)
    parser.set_defaults(command=predict)


def arriving_lines():
    """Yield lists of the lines that have arrived on standard input, so that a program that waits for the answer to each
    line gets it. In a terminal, show a prompt."""
    prompt, rest = sys.stdin.isatty(), b""
    if prompt:
        print("a sentence a line; Ctrl-D (Windows: Ctrl-Z, Enter) ends", file=sys.stderr)
    while True:
        if prompt:
            print("> ", end="", file=sys.stderr, flush=True)
        arrived = sys.stdin.buffer.read1(1 << 16)
        *lines, rest = (rest + arrived).split(b"\n")
        if not arrived and rest:
            lines = [rest]  # the last line has no line end
        if lines:
            yield [line.removesuffix(b"\r").decode("utf-8-sig") for line in lines]
        if not arrived:
            print(end="\n" if prompt else "", file=sys.stderr)
            return


def predict_table(path, read_as, probabilities, classes):
    """Print a table as CSV, with the prediction and its probabilities at the end of each row."""
    from .tools import texts
    notes = []
    table = texts.open_table(path, notes, labelled=False, **read_as)
    if not table.names:
        raise UserError(f"{path} is empty: the first line must name the columns")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*table.names, "prediction", *(f"p({name})" for name in classes)])
    while chunk := list(islice(table.rows, CHUNK)):
        for (_, row), p in zip(chunk, probabilities([row[table.text] for _, row in chunk])):
            writer.writerow([*row, classes[p.argmax()], *(f"{value:.4f}" for value in p)])
    for note in notes:
        print(note, file=sys.stderr)


def predict(options):
    import numpy as np

    from .tools.metrics import log_probabilities
    if options.csv and options.text:
        raise UserError("give sentences or --csv, not both")
    classify, record = open_classifier(options)
    classes = record["classes"]

    def probabilities(texts):
        return np.exp(log_probabilities(classify(texts)))

    if options.csv:
        return predict_table(options.csv, reading(options, record), probabilities, classes)
    for lines in [options.text] if options.text else arriving_lines():
        for text, p in zip(lines, probabilities(lines)):
            print(f"{classes[p.argmax()]}\t{p.max():.3f}\t{text}", flush=True)


# -- evaluate ---------------------------------------------------------------------------------------------

def add_evaluate(commands):
    parser = commands.add_parser("evaluate", help="measure a finished run on new labelled sentences", description=(
        "Measure a finished run on new labelled sentences: accuracy with its 95% interval, the share of the largest "
        "class, loss, macro-F1, for two classes Matthews correlation, and which class is taken for which."))
    parser.add_argument("run", help="folder of the run, such as runs/lora-fold0")
    parser.add_argument("file", help="labelled sentences, in any form that train.py reads")
    add_reading(parser)
    parser.add_argument("--label-column", metavar="NAME", help="name of the column of labels (default: as in training)")
    add_weights(parser)
    parser.set_defaults(command=evaluate)


def evaluate(options):
    import numpy as np

    from .tools import metrics, texts
    classify, record = open_classifier(options)
    path, classes = options.file, record["classes"]
    logits, labels, notes, empty = [], [], [], 0
    rows = texts.read_file(path, notes, **reading(options, record))
    while chunk := list(islice(rows, CHUNK)):
        found = [(line, text, label) for line, text, label in chunk if text.strip()]
        empty += len(chunk) - len(found)
        for line, _, label in found:
            if label not in classes:
                what = f"the label {label!r:.80}" if label else "a text without a label: it"
                raise UserError(f"{path}, line {line}: {what} is none of the run's classes ({texts.listed(classes)}); "
                                "correct the label or take the row out")
            labels.append(classes.index(label))
        if found:
            logits.append(classify([text for _, text, _ in found]))
    if not labels:
        raise UserError(f"{path} holds no sentences: a table needs rows of text and label")
    if texts.fingerprint(path) == record["data_sha256"][-1]:
        notes.append(f"warning: the run was trained on {path}; new sentences will give lower numbers")
    if empty:
        notes.append(f"skipped {texts.counted(empty, 'row')} without text")
    found = np.concatenate(logits), np.array(labels), classes
    print(*notes, *metrics.summary(*found), *metrics.confusions(*found), sep="\n")


# -- export, explain --------------------------------------------------------------------------------------

def add_export(commands):
    parser = commands.add_parser("export", help="write a finished run in the format of another library", description=(
        f"Write a finished run to a new folder in the format of another library. {EXPORT} Files: peft's for "
        "PeftModel.from_pretrained; transformers' merged model and tokenizer for AutoModelForSequenceClassification "
        "(--pooling cls) or AutoModel; AdapterHub's for load_adapter(FOLDER, use_safetensors=True)."))
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("folder", help="folder to write, which must not exist or be empty")
    parser.add_argument("--to", choices=("peft", "transformers", "adapters"), required=True, help="the library")
    add_weights(parser)
    parser.set_defaults(command=export)


def export(options):
    from .tools.export import HEAD, export
    written = export(options.run, options.folder, options.to, options.weights)
    print(f"wrote {', '.join(written)} to {options.folder}")
    if HEAD in written:
        print(f"the head is in {HEAD}, because {options.to} has no place for it: {Path(options.folder) / 'README.md'} "
              "has the lines that use it")


def add_explain(commands):
    parser = commands.add_parser("explain", help="walk through a technique with real numbers", description=(
        "Walk through a technique on the real model, in seconds: the live version of README.md's parts on it."))
    parser.add_argument("technique", nargs="?", choices=("lora", "adapter", "head", "full"),
                        help="what is explained; without it, the list of what each teaches is printed")
    parser.add_argument("--seed", metavar="N", type=number(int, 0, 2**32 - 1), default=0,
                        help="of all random numbers (default: 0)")
    parser.add_argument("--weights", metavar="FOLDER", help="base weights (default: all-MiniLM-L6-v2, fetched once)")
    parser.set_defaults(command=explain)


def explain(options):
    from .lab.explain import explain as walk
    walk(options.technique, options.weights, options.seed)


def main(arguments=None):
    """Run one subcommand. Returns the exit code; a user's mistake is one line on stderr."""
    parser = Parser(prog="python -m minipeft", description="Use a finished run, or explain a technique.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_predict, add_evaluate, add_export, add_explain):
        add(commands)
    try:
        try:
            options = parser.parse_args(arguments)
            options.command(options)
        finally:
            sys.stdout.flush()  # here, where a reader that has ended is noticed, and not when Python exits
        return 0
    except UserError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 2
    except UnicodeDecodeError as error:
        print(f"minipeft: standard input is not UTF-8 ({error}); save it as UTF-8 text", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no encoding to set
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="backslashreplace")
    sys.exit(main())

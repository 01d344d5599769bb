"""Use a finished run, or explain a technique: python -m minipeft predict RUN "a sentence" (--help lists the rest)."""
import csv
import io
import sys
from pathlib import Path

import numpy as np

from . import data, model as models
from .lab.explain import WALKTHROUGHS, explain as walk
from .lora import merge_lora
from .tools import checkpoint, export as exporter, metrics, texts
from .tools.files import UserError, run_program
from .tools.settings import EXPORT, READING, Parser, add_reading, number


def open_classifier(options):
    """Open the run that was named: (function, record, how to read a file). The function: texts -> logits, array
    (n, classes). A file is read as the options say, or else as the data of the run."""
    model, record, weights = checkpoint.open_run(options.run, options.weights)
    merge_lora(model)  # plain linear layers again: the same predictions at the speed of the base model
    length = record["settings"]["max_length"]
    tokenizer = data.load_tokenizer(weights, length, model.encoder.config.vocab_size)

    def classify(sentences):
        sentences, cut = data.tokenize(tokenizer, sentences)
        if cut:
            print(f"texts cut to {length} tokens: {cut}", file=sys.stderr)
        return models.predict(model, sentences)
    return classify, record, {name: getattr(options, name) or record["settings"].get(name) for name in READING}


# -- the commands -----------------------------------------------------------------------------------------

def arriving_lines():
    """Yield each line of standard input as soon as it has arrived."""
    if sys.stdin.isatty():
        print("a sentence a line; Ctrl-D (Windows: Ctrl-Z, Enter) ends", file=sys.stderr)
    try:
        for line in io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig"):
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error}); save it as UTF-8 text") from None


def predict(options):
    if options.csv and options.text:
        raise UserError("give sentences or --csv, not both")
    classify, record, reading = open_classifier(options)
    classes = record["classes"]
    if not options.csv:
        for text in options.text or arriving_lines():
            p, = np.exp(metrics.log_probabilities(classify([text])))
            print(f"{classes[p.argmax()]}\t{p.max():.3f}\t{text}", flush=True)
        return
    notes = []
    table = texts.open_table(options.csv, notes, labelled=False, **reading)
    for note in notes:
        print(note, file=sys.stderr)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*table.names, "prediction", *(f"p({name})" for name in classes)])
    rows = [row for _, row in table.rows]
    found = np.exp(metrics.log_probabilities(classify([row[table.text] for row in rows]))) if rows else []
    for row, p in zip(rows, found):
        writer.writerow([*row, classes[p.argmax()], *(f"{value:.4f}" for value in p)])


def evaluate(options):
    classify, record, reading = open_classifier(options)
    path, classes, notes = options.file, record["classes"], []
    sentences, = texts.read_sentences([path], notes, **reading)
    for sentence in sentences:
        if sentence.label not in classes:
            raise UserError(f"{path}, line {sentence.line}: the label {sentence.label!r:.80} is none of the run's "
                            f"classes ({texts.listed(classes)}); correct the label or take the row out")
    if texts.fingerprint(path) == record["data_sha256"][-1]:
        notes.append(f"warning: the run was trained on {path}; new sentences will give lower numbers")
    labels = np.array([classes.index(sentence.label) for sentence in sentences])
    found = classify([sentence.text for sentence in sentences]), labels, classes
    print(*notes, *metrics.summary(*found), *metrics.confusions(*found), sep="\n")


def export(options):
    written, head = exporter.export(options.run, options.folder, options.to, options.weights), exporter.HEAD
    print(f"wrote {', '.join(written)} to {options.folder}")
    if head in written:
        print(f"the head is in {head}, because {options.to} has no place for it: {Path(options.folder) / 'README.md'} "
              "has the lines that use it")


def explain(options):
    walk(options.technique, options.weights, options.seed)


# -- the command line -------------------------------------------------------------------------------------

def make_parser():
    parser = Parser(prog="python -m minipeft", description="Use a finished run, or explain a technique.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    predicts = commands.add_parser("predict", help="classify sentences with a finished run", description=(
        "Classify sentences. Prints class, probability and text, separated by tabs; with --csv, the table of the file "
        "with a prediction and the probability of each class added to each row."))
    predicts.set_defaults(command=predict)
    predicts.add_argument("run", help="folder of the run, such as runs/lora-fold0")
    predicts.add_argument("text", nargs="*", help="sentences; without any, lines are read from standard input")
    predicts.add_argument("--csv", metavar="FILE", help="classify the rows of this file, CSV or what the run was "
                          "trained on, and print CSV")

    evaluates = commands.add_parser("evaluate", help="measure a finished run on new sentences", description=(
        "Measure a finished run on new labelled sentences: accuracy with its 95% interval, the share of the largest "
        "class, loss, macro-F1, for two classes Matthews correlation, and which class is taken for which."))
    evaluates.set_defaults(command=evaluate)
    evaluates.add_argument("run", help="folder of the run, such as runs/lora-fold0")
    evaluates.add_argument("file", help="labelled sentences, in any form that train.py reads")

    exports = commands.add_parser("export", help="write a finished run for another library", description=(
        f"Write a finished run to a new folder in the format of another library. {EXPORT} Files: peft's for "
        "PeftModel.from_pretrained; transformers' merged model and tokenizer for AutoModelForSequenceClassification "
        "(--pooling cls) or AutoModel; AdapterHub's for load_adapter(FOLDER, use_safetensors=True)."))
    exports.set_defaults(command=export)
    exports.add_argument("run", help="folder of the run")
    exports.add_argument("folder", help="folder to write, which must not exist or be empty")
    exports.add_argument("--to", choices=("peft", "transformers", "adapters"), required=True, help="the library")

    explains = commands.add_parser("explain", help="walk through a technique with real numbers", description=(
        "Walk through a technique on the real model, in seconds: what is swapped, why it starts as it does, which "
        "gradients exist at the first step, ten steps of training, and what a step needs."))
    explains.set_defaults(command=explain)
    explains.add_argument("technique", nargs="?", choices=list(WALKTHROUGHS),
                          help="what is explained; without it, what each teaches is listed")
    explains.add_argument("--seed", metavar="N", type=number(int, 0, 2**32 - 1), default=0,
                          help="of all random numbers (default: 0)")

    for command in (predicts, evaluates):
        add_reading(command.add_argument, "as in training")
    for command in (predicts, evaluates, exports, explains):
        command.add_argument("--weights", metavar="FOLDER", help="folder of the base weights (default: as recorded in "
                             "the run; explain: all-MiniLM-L6-v2, fetched once)")
    return parser


def run(arguments=None):
    options = make_parser().parse_args(arguments)
    options.command(options)


def main(arguments=None):
    """Run one subcommand. Returns the exit code; a user's mistake is one line on stderr."""
    return run_program("minipeft", run, arguments)


if __name__ == "__main__":
    sys.exit(main())

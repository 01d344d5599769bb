"""Use a finished run, or explain a technique: python -m minipeft predict RUN "a sentence" (--help lists the rest)."""
import csv
import os
import sys
from itertools import islice

from .tools.files import UserError
from .tools.settings import Parser, number


def add_predict(commands):
    parser = commands.add_parser("predict", help="classify sentences with a finished run", description=(
        "Classify sentences. Prints class, probability and text, separated by tabs; with --csv, the table of the file "
        "with a prediction and the probability of each class added to each row."))
    parser.add_argument("run", help="folder of the run, such as runs/lora-fold0")
    parser.add_argument("text", nargs="*", help="sentences; without any, lines are read from standard input")
    parser.add_argument("--csv", metavar="FILE", help="classify the rows of this file, CSV or what the run was trained "
                        "on, and print CSV")
    parser.add_argument("--text-column", metavar="NAME", help="its column of texts (default: as in training, or text)")
    add_weights(parser)
    parser.set_defaults(command=predict)


def add_weights(parser):
    parser.add_argument("--weights", metavar="FOLDER",
                        help="folder of the base weights (default: as recorded in the run)")


def predict(options):
    import torch  # late: --help does not wait for it

    from . import data, model as models
    from .lora import merge_lora
    from .tools import checkpoint, texts
    if options.csv and options.text:
        raise UserError("give sentences or --csv, not both")
    model, record, weights = checkpoint.open_run(options.run, options.weights)
    merge_lora(model)  # plain linear layers again: the same predictions at the speed of the base model
    classes, settings = record["classes"], record["settings"]
    tokenizer = data.load_tokenizer(weights, settings["max_length"], model.encoder.config.vocab_size)

    def probabilities(texts):
        sentences, cut = data.tokenize(tokenizer, texts)
        if cut:
            print(f"texts cut to {settings['max_length']} tokens: {cut}", file=sys.stderr)
        return torch.from_numpy(models.predict(model, sentences)).softmax(1)

    at_once = 1 if sys.stdin.isatty() and not options.csv else 1024  # in a terminal, line by line
    if options.csv:
        notes = []
        table = texts.open_table(
            options.csv, notes, labelled=False, text_column=options.text_column or settings.get("text_column"),
            label_column=settings.get("label_column"), encoding=settings.get("encoding"),
            separator=settings.get("separator"))
        if not table.names:
            raise UserError(f"{options.csv} is empty: the first line must name the columns")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([*table.names, "prediction", *(f"p({name})" for name in classes)])
        while chunk := list(islice(table.rows, at_once)):
            for (_, row), p in zip(chunk, probabilities([row[table.text] for _, row in chunk])):
                writer.writerow([*row, classes[p.argmax()], *(f"{value:.4f}" for value in p)])
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
        return
    lines = iter(options.text) if options.text else (line.rstrip("\n") for line in sys.stdin)
    while texts := list(islice(lines, at_once)):
        for text, p in zip(texts, probabilities(texts)):
            print(f"{classes[p.argmax()]}\t{p.max():.3f}\t{text}", flush=True)


def add_export(commands):
    parser = commands.add_parser("export", help="write a finished run in the format of another library", description=(
        "Write a finished run to a new folder in the format of another library. peft: LoRA, for "
        "PeftModel.from_pretrained; a run with --pooling cls is a sequence classifier with its head. transformers: a "
        "merged model with its tokenizer, for AutoModelForSequenceClassification (--pooling cls) or AutoModel; all "
        "techniques but adapters. adapters: adapters trained with an empty --norms, for AdapterHub's library. A head "
        "that has no counterpart there is written to head.safetensors."))
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("folder", help="folder to write, which must not exist or be empty")
    parser.add_argument("--to", choices=("peft", "transformers", "adapters"), required=True, help="the library")
    add_weights(parser)
    parser.set_defaults(command=export)


def export(options):
    from .tools.export import export
    print(f"wrote {', '.join(export(options.run, options.folder, options.to, options.weights))} to {options.folder}")


def add_import(commands):
    parser = commands.add_parser("import", help="turn a LoRA that peft trained into a run", description=(
        "Turn a LoRA that peft trained for sequence classification with a BERT-type model into a finished run, to use "
        "with predict and export. One without a classification head can only start a training: train.py lora "
        "--init-from FOLDER."))
    parser.add_argument("folder", help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("run", help="folder of the run to write, which must not exist or be empty")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names of the classes, in the order of the head's "
                        "outputs (default: 0, 1, ...)")
    add_weights(parser)
    parser.set_defaults(command=import_)


def import_(options):
    from .tools.export import import_run
    record = import_run(options.folder, options.run, options.weights, options.classes)
    print(f"wrote {options.run}; classes: {', '.join(record['classes'])}")


def add_explain(commands):
    parser = commands.add_parser("explain", help="walk through a technique with real numbers", description=(
        "Walk through a technique on the real model, in seconds: what is swapped and how many parameters it trains, "
        "why it starts as it does, which gradients exist at the first step, one sentence before and after ten steps of "
        "training, and what a training step needs in memory and matrix products. lora: also the merge; adapter: why it "
        "cannot be merged; head: the cache; full: how far the weights move."))
    parser.add_argument("technique", choices=("lora", "adapter", "head", "full"), help="what is explained")
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
    for add in (add_predict, add_export, add_import, add_explain):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        options.command(options)
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
    sys.stdin.reconfigure(encoding="utf-8")  # as all files here, on every system
    sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="backslashreplace")
    sys.exit(main())

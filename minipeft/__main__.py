"""Classify sentences with a finished run.

    python -m minipeft runs/lora-fold0 "a gripping film"
    python -m minipeft runs/lora-fold0 < sentences.txt        one sentence a line
"""
import argparse
import sys
from itertools import islice


def main():
    parser = argparse.ArgumentParser(prog="python -m minipeft", description="Classify sentences with a finished run.")
    parser.add_argument("run", help="folder of the run, such as runs/lora-fold0")
    parser.add_argument("text", nargs="*", help="sentences; without any, lines are read from standard input")
    parser.add_argument("--weights", help="the base weights it was trained on, if they are not where they were")
    options = parser.parse_args()

    import torch  # late: --help does not wait for it

    from . import checkpoint, data
    from .lora import merge_lora
    model, settings, weights = checkpoint.open_run(options.run, options.weights)
    merge_lora(model)  # plain linear layers again: the same answers, at the speed of the base model
    tokenizer = data.load_tokenizer(weights, settings["max_length"])
    lines = iter(options.text) if options.text else (line.rstrip("\n") for line in sys.stdin)
    at_once = 1 if sys.stdin.isatty() else 1024  # somebody who types wants each answer at once
    while texts := list(islice(lines, at_once)):
        sentences, cut = data.tokenize(tokenizer, texts)
        if cut:
            print(f"{cut} texts were cut to {settings['max_length']} tokens", file=sys.stderr)
        logits = data.predict(model, sentences)
        for text, chances in zip(texts, torch.from_numpy(logits).softmax(1)):
            print(f"{settings['classes'][chances.argmax()]}\t{chances.max():.3f}\t{text}", flush=True)


if __name__ == "__main__":
    try:
        sys.stdin.reconfigure(encoding="utf-8")  # as all files here, on every system
        sys.stdout.reconfigure(errors="backslashreplace")
        main()
    except (ValueError, OSError) as error:
        print(f"minipeft: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

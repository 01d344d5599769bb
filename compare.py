"""Compare the techniques on equal footing: same folds, same head, same order of data, same schedule.

    python compare.py                 head, adapters, LoRA and full fine-tuning on three folds; table and plots
    python compare.py --quick         the whole thing in small: one fold, 1,000 sentences to train on
    python compare.py --folds 10      every sentence but dev is tested once: the published comparison
    python compare.py --tune          a learning rate for each technique, judged on dev alone
    python compare.py --study rank    one claim of the papers (STUDIES below lists them)
    python compare.py --publish       write what stands in results/ into the README

Every run is a `python train.py ...` of its own, and leaves one JSON file. What is there is not run again.
"""
import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent
METHODS = ("head", "adapter", "lora", "full")
QUICK = ["--limit", "1000"]
PAIRS = [("head", "full"), ("adapter", "full"), ("lora", "full"), ("lora", "adapter")]
RATES = 5  # learning rates that are tried for each technique, a factor of two apart; more where an end is best

# The papers' claims. Each run of a study is (series, x, method, options); `pairs` are the (series, x) compared.
ATTENTION = ["query", "key", "value", "attention.output"]
RANKS, BOTTLENECKS, LAYERS = (1, 2, 4, 8, 16, 64), (4, 8, 16, 32, 64, 128), (1, 2, 3, 4, 6)
SCALES, SHARES = (1e-5, 1e-3, 1e-2, 1e-1, 1.0), (0.01, 0.05, 0.2, 1.0)
STUDIES = {
    "rank": {
        "claim": "a very small rank is enough (Hu et al., table 6)", "x_label": "rank of the update", "log_x": True,
        "runs": [("lora", rank, "lora", ["--rank", rank, "--alpha", 2 * rank]) for rank in RANKS],
        "pairs": [(("lora", 1), ("lora", 8)), (("lora", 8), ("lora", 64))]},
    "targets": {
        "claim": "at an equal budget, several kinds of matrices at a small rank beat one kind at a large rank "
                 "(Hu et al., table 5)", "x_label": "the layers that get LoRA",
        # ranks chosen so that each has 73,728 parameters, but for the last: 82,944
        "runs": [("lora", label, "lora", ["--targets", *targets, "--rank", rank, "--alpha", 2 * rank])
                 for label, targets, rank in [
                     ("query r=16", ["query"], 16), ("value r=16", ["value"], 16),
                     ("query, value r=8", ["query", "value"], 8), ("attention r=4", ATTENTION, 4),
                     ("all linear r=2", [*ATTENTION, "intermediate", "feed_forward.output"], 2)]],
        "pairs": [(("lora", "query, value r=8"), ("lora", "query r=16")),
                  (("lora", "attention r=4"), ("lora", "query, value r=8")),
                  (("lora", "all linear r=2"), ("lora", "query, value r=8"))]},
    "bottleneck": {
        "claim": "accuracy stays within 0.4 points of full fine-tuning over two orders of magnitude of adapter size "
                 "(Houlsby et al., figures 3 and 4)", "x_label": "bottleneck of the adapters", "log_x": True,
        "runs": [("adapter", m, "adapter", ["--bottleneck", m]) for m in BOTTLENECKS] + [("full", None, "full", [])],
        "pairs": [(("adapter", m), ("full", None)) for m in (4, 32, 128)]},
    "layers": {
        "claim": "adapters in the top layers beat training the same top layers (Houlsby et al., figure 3)",
        "x_label": "number of top layers",
        "runs": [(method, k, method, ["--top-layers", k]) for k in LAYERS for method in ("adapter", "full")],
        "pairs": [(("adapter", k), ("full", k)) for k in LAYERS]},
    "init": {
        "claim": "adapters fail when their first weights are large (Houlsby et al., figure 6)",
        "x_label": "standard deviation of the adapters' first weights", "log_x": True,
        "runs": [("adapter", std, "adapter", ["--init-std", std]) for std in SCALES],
        "pairs": [(("adapter", std), ("adapter", 1e-2)) for std in SCALES if std != 1e-2]},
    "data": {
        "claim": "the fewer the sentences, the fewer parameters should be trained", "log_x": True,
        "x_label": "share of the training set (%), the number of steps kept",
        "runs": [(method, 100 * share, method, ["--share", share]) for share in SHARES for method in METHODS],
        "pairs": [((method, 100 * share), ("full", 100 * share)) for share in SHARES for method in METHODS[:3]]},
    "light": {
        "claim": "training the biases alone comes close to everything (Hu et al., table 2), as does the last block",
        "x_label": "what is trained", "x_names": True,
        "runs": [(name, name, method, options) for name, method, options in [
            ("head", "head", []), ("bitfit", "bitfit", []), ("last_block", "full", ["--top-layers", 1]),
            ("adapter", "adapter", []), ("lora", "lora", []), ("full", "full", [])]],
        "pairs": [(("bitfit", "bitfit"), ("lora", "lora")), (("last_block", "last_block"), ("lora", "lora")),
                  (("bitfit", "bitfit"), ("full", "full"))]},
}


def parse(arguments):
    """(options of this command line, options to pass on to train.py)"""
    parser = argparse.ArgumentParser(prog="compare.py", allow_abbrev=False, description="Compare head tuning, adapters, "
                                     "LoRA and full fine-tuning. All options of train.py are passed on to it.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", default=METHODS,
                        help=f"what to compare ({' '.join(METHODS)})")
    parser.add_argument("--folds", metavar="N", type=int, choices=range(1, 11), help="how many of the ten folds to "
                        "test on, each with a seed of its own (3; 1 with --quick, --tune and --study)")
    parser.add_argument("--seeds", metavar="N", type=int, help="with --test FILE: how many seeds (3)")
    parser.add_argument("--quick", action="store_true", help="one fold, few sentences: a look at the whole")
    parser.add_argument("--tune", action="store_true", help="search each technique's learning rate on dev")
    parser.add_argument("--study", choices=[*STUDIES, "inside"], help="put one claim of the papers to the test")
    parser.add_argument("--human", action="store_true", help="how well one rater of the default data agrees with the rest")
    parser.add_argument("--publish", action="store_true", help="rewrite the README's table from results/")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where everything goes (runs/comparison)")
    options, passed_on = parser.parse_known_args(arguments)
    for name in ("--fold", "--seed", "--resume", "--overwrite"):
        if name in passed_on:
            parser.error(f"{name} is chosen by compare.py itself; use --folds or --seeds, or train.py for a single run")
    if options.seeds is not None and (options.seeds < 1 or "--test" not in passed_on):
        parser.error("--seeds N, at least 1, goes with --test FILE; without it --folds N repeats the comparison")
    if options.folds and "--test" in passed_on:
        parser.error("--folds takes test sentences from the data, but --test names a file: use --seeds")
    if options.out is None:
        options.out = Path("runs/quick" if options.quick else "runs/comparison")
    return options, passed_on + QUICK * options.quick


if __name__ == "__main__":
    OPTIONS, PASSED_ON = parse(sys.argv[1:])  # before the slow imports

import numpy as np

import train
from minipeft import checkpoint, data, download, plots, statistics
from minipeft.bert import load_bert


# -- runs -------------------------------------------------------------------------------------------------

def options_for(method, options):
    """Those of train.py's options that this method has: `--rank 4` is passed on to LoRA only."""
    special = {name for defaults in train.DEFAULTS.values() for name in defaults}
    kept, keep = [], True
    for word in map(str, options):
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            keep = name not in special or name in train.DEFAULTS[method]
        kept += [word] * keep
    return kept


def make_run(name, method, options, repeat, passed_on, out, seed=None):
    """A run as a dict: its name, its command line for train.py, its settings, and the file it will leave."""
    own_test = "--test" in passed_on
    place = f"seed{repeat}" if own_test else f"fold{repeat}"
    line = [method, *options_for(method, [*passed_on, *options]), "--seed", str(repeat if seed is None else seed)]
    line += [] if own_test else ["--fold", str(repeat)]
    folder = out / "folders" / f"{name}-{place}"
    settings = vars(train.parse([*line, "--out", str(folder)]))
    return {"name": name, "method": method, "line": line, "folder": folder, "settings": settings,
            "record": out / f"{name}-{place}.json"}


def is_this(run, settings, hashes):
    """Whether `settings`, as written by a run, are of this run, with these weights and data."""
    ignored = ("out", "resume", "overwrite", "save_every", "weights", "data", "test", "device", "precision")
    wanted = {key: value for key, value in run["settings"].items() if key not in ignored} | hashes
    for key in ("device", "precision"):  # "auto" has become what it found
        if run["settings"][key] != "auto":
            wanted[key] = run["settings"][key]
    return all(settings.get(key) == value for key, value in wanted.items())


def load_record(run, hashes):
    """What a run left, or None if it has to be run."""
    if not run["record"].is_file():
        return None
    record = checkpoint.read_json(run["record"])
    return record if is_this(run, record["settings"], hashes) else None


def do_run(run, hashes):
    """Run train.py in a process of its own, so that its time and memory are its own; returns the record it leaves.

    A run that was killed goes on where it was. One that fails half-way (a loss that is not finite) is recorded as
    failed. ValueError for one that does not even begin: the mistake is the user's.
    """
    folder, started = run["folder"], time.perf_counter()
    begun = folder / "settings.json"
    going_on = (begun.is_file() and not (folder / checkpoint.FINISHED).is_file()
                and is_this(run, checkpoint.read_json(begun), hashes))
    if folder.is_dir() and not going_on:
        shutil.rmtree(folder)
    command = ["train.py", *run["line"], "--out", str(folder)] + ["--resume"] * going_on
    print("\n$ python", *command, flush=True)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *command[1:]], stdout=subprocess.DEVNULL,
                               stderr=None if sys.stderr.isatty() else subprocess.PIPE, text=True)
    try:
        _, error = process.communicate()
    except KeyboardInterrupt:
        process.wait()  # it has the signal too, and ends in good order
        raise
    record = {"command": " ".join(["python", *command[:-1 if going_on else None]])}
    if process.returncode == 0:
        record["settings"] = checkpoint.read_json(begun)
        record["metrics"] = checkpoint.read_json(folder / checkpoint.FINISHED)
        with open(folder / "history.csv", encoding="utf-8") as file:
            record["history"] = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        with open(folder / "predictions.csv", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        record["predictions"] = {"lines": [int(row[0]) for row in rows[1:]], "labels": [row[1] for row in rows[1:]],
                                 "chances": [[round(float(value), 4) for value in row[2:]] for row in rows[1:]]}
    elif process.returncode == 2 and begun.is_file():
        record |= {"settings": checkpoint.read_json(begun), "failed": (error or "it stopped; see above").strip()}
    else:
        raise ValueError(f"a run could not be made: {(error or 'see above').strip() or f'it ended with {process.returncode}'}")
    record["wall_seconds"] = time.perf_counter() - started
    with download.whole(run["record"]) as aside:  # one line a list: small, and still to be read
        aside.write_text(json.dumps(record, ensure_ascii=False).replace(', "', ',\n"') + "\n", encoding="utf-8")
    return record


def do_all(runs, hashes, show=lambda done: None):
    """The records of all runs, in their order; what is not there yet is run. show(done) is called after each run."""
    records = {run["record"]: load_record(run, hashes) for run in runs}
    left = [run for run in runs if records[run["record"]] is None]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them there already")
    for number, run in enumerate(left):
        seconds = {}
        for other in runs:
            if records[other["record"]]:
                seconds.setdefault(other["method"], []).append(records[other["record"]]["wall_seconds"])
        known = [np.mean(values) for values in seconds.values()]
        guess = sum(np.mean(seconds.get(other["method"], known)) for other in left[number:]) if known else None
        print(f"\n{run['record'].stem}: run {len(runs) - len(left) + number + 1} of {len(runs)}"
              + (f", about {math.ceil(guess / 60)} min left in all" if guess else ""))
        records[run["record"]] = do_run(run, hashes)
        show([(other, records[other["record"]]) for other in runs if records[other["record"]]])
    return [records[run["record"]] for run in runs]


# -- the table --------------------------------------------------------------------------------------------

def right(record):
    """Which test sentences were right, as 0 and 1. A run's classes are in the order of its chances."""
    classes, predictions = record["settings"]["classes"], record["predictions"]
    answers = np.array(classes)[np.argmax(predictions["chances"], axis=1)]
    return (answers == np.array(predictions["labels"])).astype(int)


COLUMNS = {  # name: (heading, how it is written, factor)
    "technique_parameters": ("technique parameters", "{:,.0f}", 1), "head_parameters": ("head parameters", "{:,.0f}", 1),
    "trainable_percent": ("trained (%)", "{:.2f}", 1), "saved_bytes": ("saved (MB)", "{:.2f}", 1e-6),
    "train_accuracy": ("train accuracy (%)", "{:.1f}", 100), "train_loss": ("train loss", "{:.3f}", 1),
    "dev_accuracy": ("dev accuracy (%)", "{:.1f}", 100),
    "test_accuracy": ("test accuracy (%)", "{:.1f}", 100), "test_loss": ("test loss", "{:.3f}", 1),
    "train_seconds": ("training (s)", "{:.0f}", 1), "step_milliseconds": ("a step (ms)", "{:.0f}", 1),
    "best_seconds": ("to the best dev score (s)", "{:.0f}", 1), "peak_memory_mb": ("peak memory (MB)", "{:,.0f}", 1),
    "sentences_per_second": ("inference (sentences/s)", "{:,.0f}", 1)}
QUALITY = ("technique_parameters", "head_parameters", "trainable_percent", "train_accuracy", "train_loss",
           "dev_accuracy", "test_accuracy", "test_loss")
COST = ("train_seconds", "step_milliseconds", "best_seconds", "peak_memory_mb", "saved_bytes", "sentences_per_second")


def summarise(done):
    """One row a method: {"method", "runs", "failed", column: [mean, standard deviation or None], ...}."""
    rows = {}
    for run, record in done:
        row = rows.setdefault(run["name"], {"method": run["name"], "runs": 0, "failed": 0, "values": []})
        row["failed" if "failed" in record else "runs"] += 1
        if "failed" not in record:
            best = max(record["history"], key=lambda epoch: epoch["dev_accuracy"])
            row["values"].append(record["metrics"] | {"best_seconds": best["seconds"]})
    for row in rows.values():
        values = row.pop("values")
        for column in COLUMNS:
            numbers = [value[column] for value in values if value[column] is not None]
            mean, std = statistics.mean_std(numbers) if numbers else (None, math.nan)
            row[column] = [mean, None if math.isnan(std) else std]
    return list(rows.values())


def cell(row, column):
    (mean, std), (_, form, factor) = row[column], COLUMNS[column]
    if mean is None:
        return "-"
    return form.format(factor * mean) + (f" ± {form.format(factor * std)}" if std else "")


def markdown(rows, columns):
    """A table, as lines. Failed runs stand in a column of their own if there are any."""
    failed = any(row["failed"] for row in rows)
    head = ["method", *(COLUMNS[column][0] for column in columns), "runs", *["failed runs"] * failed]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [plots.look(row["method"])[0], *(cell(row, column) for column in columns), str(row["runs"])]
        lines.append("| " + " | ".join(cells + [str(row["failed"])] * failed) + " |")
    return lines


def differences(done, pairs, same_sentences):
    """Paired comparisons of test accuracy, in points: a list of dicts with name, difference, low, high, p (of Holm)."""
    by_name, found = {}, []
    for run, record in done:
        if "failed" not in record:
            by_name.setdefault(run["name"], {})[record["settings"]["seed"]] = right(record)
    for a, b in pairs:
        repeats = sorted(by_name.get(a, {}).keys() & by_name.get(b, {}).keys())
        if not repeats:
            continue
        ours, theirs = [by_name[a][i] for i in repeats], [by_name[b][i] for i in repeats]
        gaps = [x - y for x, y in zip(ours, theirs)]
        mean, low, high = statistics.paired_bootstrap(gaps, same_sentences=same_sentences)
        only_a, only_b, p = statistics.mcnemar(np.concatenate(ours), np.concatenate(theirs))
        sentences = len(gaps[0]) if same_sentences else sum(map(len, gaps))
        if same_sentences:
            p = statistics.permutation_test(np.mean(gaps, axis=0))
        share = float(np.mean(np.abs(np.concatenate(gaps))))
        found.append({"a": a, "b": b, "name": f"{plots.look(a)[0]} - {plots.look(b)[0]}", "difference": 100 * mean,
                      "low": 100 * low, "high": 100 * high, "p": p, "only_a": only_a, "only_b": only_b,
                      "sentences": sentences, "smallest": 100 * statistics.smallest_detectable(share, sentences)})
    for row, p in zip(found, statistics.holm([row["p"] for row in found]) if found else []):
        row["p"] = float(p)
    return found


def sentence(row):
    """A paired comparison in words. Where the interval includes zero, no method is called better."""
    a, b = row["name"].split(" - ")
    facts = (f"{row['difference']:+.1f} points, 95 % interval {row['low']:+.1f} to {row['high']:+.1f}, p = {row['p']:.2g}, "
             f"{row['sentences']:,} sentences")
    if row["low"] <= 0 <= row["high"]:
        return (f"{a} and {b} are not distinguished ({facts}; a difference below {row['smallest']:.1f} points would most "
                "likely have been missed)")
    return f"{a} is {'better' if row['low'] > 0 else 'worse'} than {b} ({facts})"


# -- the comparison ---------------------------------------------------------------------------------------

def context(passed_on):
    """What all runs have in common: the hashes of weights and data, and the corpus."""
    settings = train.parse(["head", *options_for("head", passed_on)])
    weights = download.find_weights(settings.weights)
    files = [settings.test] * bool(settings.test) + [settings.data or download.fetch_data()]
    corpus = data.read_corpus(files, data.load_tokenizer(weights, settings.max_length), settings.text_column,
                              settings.label_column)
    return {"weights_sha256": download.hash_weights(weights), "data_sha256": [download.sha256(f) for f in files]}, corpus


def certainty(done, default_data):
    """Accuracy in bins of |mean rating|, as plots.by_certainty takes it, or None for data without ratings."""
    if not default_data:
        return None
    with open(download.DATA, encoding="utf-8") as file:
        ratings = {number: abs(float(line.split("\t")[1])) for number, line in enumerate(file, 1) if number > 1}
    edges, bins, scores = [0, 0.5, 1, 1.5, 2, 2.5, 4], [], {}
    for name in dict.fromkeys(run["name"] for run, _ in done if run["name"] != "untrained"):
        records = [record for run, record in done if run["name"] == name and "failed" not in record]
        sure = np.array([ratings[line] for record in records for line in record["predictions"]["lines"]])
        correct = np.concatenate([right(record) for record in records]) if records else np.zeros(0)
        inside = [(sure > low) & (sure <= high) for low, high in zip(edges, edges[1:])]
        bins = [(low, high, int(chosen.sum())) for low, high, chosen in zip(edges, edges[1:], inside)]
        scores[name] = [(100 * correct[chosen].mean(), 100 * math.sqrt(correct[chosen].var() / chosen.sum()))
                        if chosen.any() else (None, None) for chosen in inside]
    return bins, scores


def write_comparison(done, out, same_sentences, majority, default_data):
    """Table (Markdown, CSV, JSON) and plots of all runs that are done. Returns the content of comparison.json."""
    rows, pairs = summarise(done), differences(done, PAIRS, same_sentences)
    human = out / "human.json"
    human = checkpoint.read_json(human)["agreement"] if default_data and human.is_file() else None
    content = {"majority_class": majority, "one_human_rater": human, "rows": rows, "differences": pairs,
               "runs": [{"name": run["record"].stem, "command": record["command"]} | (
                   {"failed": record["failed"]} if "failed" in record else {"metrics": record["metrics"]})
                   for run, record in done]}
    checkpoint.write_json(out / "comparison.json", content)
    references = [f"majority class: {majority:.1%}"] + ([f"one human rater: {human:.1%}"] if human else [])
    lines = [*markdown(rows, QUALITY), "", "; ".join(references), "", *markdown(rows, COST), "",
             *(f"- {sentence(row)}" for row in pairs)]
    with download.whole(out / "table.md") as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    checkpoint.write_csv(out / "table.csv", ["method", "runs", "failed", *(f"{column}{end}" for column in COLUMNS for end in ("", "_std"))],
                         ([row["method"], row["runs"], row["failed"], *(v for c in COLUMNS for v in row[c])] for row in rows))

    trained = [row for row in rows if row["method"] != "untrained" and row["runs"]]
    points = [{"method": row["method"], "mean": 100 * row["test_accuracy"][0], "std": row["test_accuracy"][1] and
               100 * row["test_accuracy"][1], "parameters": row["technique_parameters"][0] + row["head_parameters"][0]}
              for row in trained]
    lines_across = [("majority class", 100 * majority)] + [("one human rater", 100 * human)] * bool(human)
    figures = {"tradeoff": (plots.tradeoff, points, lines_across),
               "curves": (plots.learning_curves, {row["method"]: [record["history"] for run, record in done if run["name"] ==
                                                  row["method"] and "failed" not in record] for row in trained}),
               "costs": (plots.costs, [{"method": row["method"], **{key + end: row[key][i] for key in
                                        ("train_seconds", "peak_memory_mb") for i, end in enumerate(("", "_std"))}}
                                       for row in trained])}
    if pairs:
        figures["differences"] = (plots.differences, pairs)
    if sure := certainty(done, default_data):
        figures["certainty"] = (plots.by_certainty, *sure)
    for name, (draw, *numbers) in figures.items() if trained else ():
        with download.whole(out / f"{name}.png") as aside:
            draw(*numbers, aside)
    return content


def compare(options, passed_on):
    """Train every method on every fold (or seed), and write table and plots."""
    hashes, corpus = context(passed_on)
    own_test, default_data = "--test" in passed_on, "--data" not in passed_on
    repeats = range(options.seeds or 3) if own_test else range(options.folds or (1 if options.quick else 3))
    plan = [("untrained", "head", ["--epochs", 0])] + [(method, method, []) for method in METHODS if method in options.methods]
    runs = [make_run(name, method, extra, repeat, passed_on, options.out) for repeat in repeats
            for name, method, extra in plan]

    def show(done):
        print("", *markdown(summarise(done), ("trainable_percent", "train_accuracy", "dev_accuracy", "test_accuracy",
                                              "train_seconds")), sep="\n")

    records = do_all(runs, hashes, show)
    majority = np.bincount(corpus.labels).max() / len(corpus)
    write_comparison(list(zip(runs, records)), options.out, own_test, majority, default_data)
    print("", (options.out / "table.md").read_text(encoding="utf-8"), f"written to {options.out}/: table.md, table.csv, "
          "comparison.json, and plots (.png)", sep="\n")


# -- tuning -----------------------------------------------------------------------------------------------

def tune(options, passed_on):
    """Try learning rates for each technique, judged on dev alone, until the best is not at an end of those tried."""
    hashes, _ = context(passed_on)
    found = {}
    for method in options.methods:
        middle, tried = train.DEFAULTS[method]["lr"], {}
        wanted = [middle * 2.0 ** (i - RATES // 2) for i in range(RATES)]
        while wanted:
            runs = [make_run(f"tune-{method}-{rate:.3g}", method, ["--lr", f"{rate:.3g}"], repeat, passed_on, options.out)
                    for rate in wanted for repeat in range(options.folds or 1)]
            records = do_all(runs, hashes)
            for rate in wanted:
                history = [record["history"][-1] for run, record in zip(runs, records)
                           if run["name"] == f"tune-{method}-{rate:.3g}" and "failed" not in record]
                tried[rate] = {"dev_accuracy": [row["dev_accuracy"] for row in history],
                               "dev_loss": [row["dev_loss"] for row in history]}
            score = {rate: (np.mean(t["dev_accuracy"]), -np.mean(t["dev_loss"])) for rate, t in tried.items()
                     if t["dev_accuracy"]}
            best = max(score, key=score.get)
            wanted = [best / 2] * (best == min(tried)) + [best * 2] * (best == max(tried))
        found[method] = {"chosen": float(f"{best:.3g}"), "tried": [{"lr": float(f"{rate:.3g}"), **tried[rate]}
                                                                     for rate in sorted(tried)]}
        checkpoint.write_json(options.out / "tuning.json", found)
        print(f"{method}: the best learning rate on dev is {best:.3g}")
    series = {method: [(t["lr"], 100 * np.mean(t["dev_accuracy"]), 100 * np.std(t["dev_accuracy"], ddof=1)
                        if len(t["dev_accuracy"]) > 1 else None) for t in result["tried"] if t["dev_accuracy"]]
              for method, result in found.items()}
    with download.whole(options.out / "tuning.png") as aside:
        plots.sensitivity(series, aside)
    print(f"written to {options.out}/: tuning.json, tuning.png")


# -- studies ----------------------------------------------------------------------------------------------

def key(series, x):
    return f"{series}" if x is None or x == series else f"{series} {x:g}" if isinstance(x, (int, float)) else str(x)


def study(options, passed_on):
    """Run one study of the papers' claims: a plot, a table, and what became of the claim."""
    plan = STUDIES[options.study]
    hashes, corpus = context(passed_on)
    full_size = len(data.split(corpus, 0)[0])
    runs, places = [], []
    for series, x, method, extra in plan["runs"]:
        if extra[:1] == ["--share"]:  # of the training set; as many steps as the whole takes, up to 20 epochs
            sentences = round(extra[1] * full_size)
            extra = [] if extra[1] == 1 else ["--limit", sentences, "--epochs", min(20, round(3 / extra[1]))]
        for repeat in range(options.folds or 1):
            label = key(series, x).replace(" ", "-").replace(",", "")
            runs.append(make_run(f"{options.study}-{label}", method, extra, repeat, passed_on, options.out))
            places.append((series, x))
    records = do_all(runs, hashes)
    done = list(zip(runs, records))
    names = {place: run["name"] for place, run in zip(places, runs)}
    rows = summarise(done)
    by_name = {row["method"]: row for row in rows}
    pairs = differences(done, [(names[a], names[b]) for a, b in plan["pairs"]], False)
    for row, (a, b) in zip(pairs, plan["pairs"]):
        row["name"] = f"{plots.look(key(*a))[0]} - {plots.look(key(*b))[0]}"
    content = {"claim": plan["claim"], "rows": rows, "differences": pairs, "verdict": [sentence(row) for row in pairs]}
    series, reference = {}, {}
    for (name, x), run_name in names.items():
        mean, std = by_name[run_name]["test_accuracy"]
        if mean is None:
            continue
        if x is None:
            reference[plots.look(name)[0]] = 100 * mean
        else:
            series.setdefault(name, []).append((plots.look(x)[0] if isinstance(x, str) else x, 100 * mean, std and 100 * std))
    print("", *markdown(rows, QUALITY), sep="\n")
    write_study(options.study, content, options.out, lambda aside: plots.study(
        plan["x_label"], series, aside, "", plan.get("log_x", False), reference, "test"))


def inside(options, passed_on):
    """What LoRA's updates look like (Hu et al., section 7), from two runs of different seeds on fold 0.

    The size ||BA|| / ||W0|| of each update, its singular values, and how far the leading directions of the two
    seeds agree: phi(i) = ||U^T V||^2 / i over the first i right singular vectors of each (equation 4), which is 1
    for the same space and about i / width by chance.
    """
    hashes, _ = context(passed_on)
    runs = [make_run("lora", "lora", [], 0, passed_on, options.out),
            make_run("inside-lora", "lora", [], 0, passed_on, options.out, seed=100)]
    for run in runs:
        if load_record(run, hashes) is None or not (run["folder"] / "model.safetensors").is_file():
            do_run(run, hashes)
    seeds = [checkpoint.read_tensors(run["folder"] / "model.safetensors")[0] for run in runs]
    base, settings = load_bert(download.find_weights(runs[0]["settings"]["weights"])), runs[0]["settings"]
    rank, rows = settings["rank"], []
    for name in [name.removesuffix(".lora_A") for name in seeds[0] if name.endswith(".lora_A")]:
        updates = [settings["alpha"] / rank * t[name + ".lora_B"] @ t[name + ".lora_A"] for t in seeds]
        (_, values, one), (_, _, two) = (np.linalg.svd(update.numpy(), full_matrices=False) for update in updates)
        _, _, layer, kind = name.split(".", 3)  # encoder.layers.0.attention.query
        weight = base.get_submodule(name.removeprefix("encoder.")).weight
        rows.append({"layer": int(layer) + 1, "kind": kind, "singular_values": values[:rank].tolist(),
                     "ratio": float(updates[0].norm() / weight.norm()), "width": one.shape[1],
                     "agreement": [float(np.square(one[:i] @ two[:i].T).sum() / i) for i in range(1, rank + 1)]})
    rows.sort(key=lambda row: row["layer"])
    mean = {"ratio": np.mean([row["ratio"] for row in rows]), "first": np.mean([row["agreement"][0] for row in rows]),
            "all": np.mean([row["agreement"][-1] for row in rows]), "chance": np.mean([rank / row["width"] for row in rows])}
    content = {"claim": "an update is small beside its matrix, and two seeds agree on its leading direction only "
                        "(Hu et al., section 7)", "rows": rows, "verdict": [
        f"an update is {mean['ratio']:.1%} of its matrix in the mean; two seeds agree to {mean['first']:.2f} in the "
        f"first direction and to {mean['all']:.2f} in all {rank}, where chance alone gives {mean['chance']:.3f}"]}
    write_study("inside", content, options.out, plots.spectra, rows)


def write_study(name, content, out, draw, *numbers):
    checkpoint.write_json(out / f"study-{name}.json", content)
    with download.whole(out / f"study-{name}.png") as aside:
        draw(*numbers, aside)
    print("", f"claim: {content['claim']}", *content["verdict"], "",
          f"written to {out}/: study-{name}.json, study-{name}.png", sep="\n")


def human(options):
    """How often the sign of one rating is that of the others' mean, a zero counted half. Written to human.json."""
    agree = total = 0
    for line in download.read_data_package("movieReviewSnippets_anonDataRatings.txt").decode().splitlines():
        ratings = np.array(json.loads(line.split("\t")[3]), float)  # id, mean, standard deviation, [ratings]
        others = np.sign(ratings.sum() - ratings)
        agree += ((1 + np.sign(ratings) * others) / 2)[others != 0].sum()
        total += int((others != 0).sum())
    checkpoint.write_json(options.out / "human.json", {"agreement": agree / total, "ratings": total})
    print(f"one rater agrees with the others in {agree / total:.1%} of {total:,} ratings")


# -- publishing -------------------------------------------------------------------------------------------

def published(results):
    """What stands between the README's markers, made from the files in `results`."""
    content = checkpoint.read_json(results / "comparison.json")
    rows = content["rows"]
    counts = sorted({row["runs"] for row in rows})
    lines = [f"Mean ± standard deviation over {' or '.join(map(str, counts))} folds "
             f"(`python compare.py --folds {max(counts)} --out results`).", "", *markdown(rows, QUALITY), "",
             f"For scale: always the more frequent class, {content['majority_class']:.1%}"
             + (f"; one human rater against the others, {content['one_human_rater']:.1%}" if content["one_human_rater"] else "")
             + ".", "", *markdown(rows, COST), "", *(f"- {sentence(row)}." for row in content["differences"])]
    for name in STUDIES:
        path = results / f"study-{name}.json"
        if path.is_file():
            found = checkpoint.read_json(path)
            lines += ["", f"**{name}** (`python compare.py --study {name} --out results`). Claim: {found['claim']}.", "",
                      *(f"- {line}." for line in found["verdict"])]
    return "\n".join(lines)


def publish(readme=ROOT / "README.md", results=ROOT / "results"):
    """Rewrite the part of the README between the markers."""
    text = readme.read_text(encoding="utf-8")
    start, end = "<!-- results -->", "<!-- end of results -->"
    before, rest = text.split(start)
    with download.whole(readme) as aside:
        aside.write_text(before + start + "\n" + published(results) + "\n" + end + rest.split(end)[1], encoding="utf-8")


def main(options, passed_on):
    """Exit code; a user's mistake is one line."""
    try:
        if options.publish:
            publish()
        elif options.human:
            human(options)
        elif options.tune:
            tune(options, passed_on)
        elif options.study == "inside":
            inside(options, passed_on)
        elif options.study:
            study(options, passed_on)
        else:
            compare(options, passed_on)
        return 0
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on where it was, from what is in {options.out}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(OPTIONS, PASSED_ON))

"""Compare the techniques on equal footing: same folds, same head, same order of data, same schedule.

    python compare.py                 head, adapters, LoRA and full fine-tuning on three folds; table and plots
    python compare.py --quick         the whole thing in small: one fold, 640 sentences to train on
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
PAIRS = [("head", "full", None), ("adapter", "full", None), ("lora", "full", None), ("lora", "adapter", None)]
QUICK = ["--limit", "640"]
# --tune tries these learning rates, twice, four times, half and a quarter of them, and more if the best is at an end.
MIDDLE = {"head": 1e-3, "adapter": 5e-4, "lora": 5e-4, "full": 5e-5, "bitfit": 1e-3}

# The papers' claims. runs: (series, x, method, options), one point of the plot each; x None is a line across it, and
# with by_size the place is the number of trained parameters.
# pairs: which of them, as (series, x), are compared, and what the claim says of the first: better, worse, no worse,
# or None where it says nothing.
ATTENTION = ["query", "key", "value", "attention.output"]
RANKS, BOTTLENECKS, LAYERS = (1, 2, 4, 8, 16, 64), (4, 8, 16, 32, 64, 128), (1, 2, 3, 4, "all")
SCALES, SHARES = (1e-5, 1e-3, 1e-2, 1e-1, 1.0), (1, 5, 20, 100)
TOP_RATE = 4e-4  # a few blocks alone want another rate than all: of 2.5e-5, 1e-4, 4e-4 the best on dev for 1 and 2
# And so do few sentences: by share (%) the best on dev of three, as --tune would choose. For head 5e-4, 2e-3 and 8e-3,
# else the rate for all sentences, a quarter of it and four times it.
SHARE_RATES = {1: {"head": 5e-4, "adapter": 5e-4, "lora": 2.5e-4, "full": 2.5e-5},
               5: {"head": 5e-4, "adapter": 1.25e-4, "lora": 1e-3, "full": 1e-4}}
MARGIN = 0.4  # points that "no worse" may be behind, as in the adapters' paper
STUDIES = {
    "rank": {
        "claim": "a very small rank is enough, to 0.4 points (Hu et al., table 6)",
        "x_label": "rank of the update",
        "runs": [("lora", rank, "lora", ["--rank", rank, "--alpha", 2 * rank]) for rank in RANKS],
        "pairs": [(("lora", 1), ("lora", 8), "no worse"), (("lora", 8), ("lora", 64), "no worse")]},
    "targets": {
        "claim": "of equal budgets, one spent on several kinds of matrices does better than one spent on the query "
                 "alone (Hu et al., table 5)",
        "x_label": "the linear layers that get LoRA, and its rank",  # 73,728 parameters each, the last 82,944
        "runs": [("lora", label, "lora", ["--targets", *targets, "--rank", rank, "--alpha", 2 * rank])
                 for label, targets, rank in [
                     ("query, 16", ["query"], 16), ("value, 16", ["value"], 16),
                     ("query and value, 8", ["query", "value"], 8), ("attention, 4", ATTENTION, 4),
                     ("all, 2", [*ATTENTION[:3], "attention.output", "intermediate", "feed_forward.output"], 2)]],
        "pairs": [(("lora", "query and value, 8"), ("lora", "query, 16"), "better"),
                  (("lora", "attention, 4"), ("lora", "query, 16"), "better"),
                  (("lora", "attention, 4"), ("lora", "query and value, 8"), None),
                  (("lora", "all, 2"), ("lora", "query and value, 8"), None)]},
    "bottleneck": {
        "claim": "the size of adapters matters little: all stay within 0.4 points of full fine-tuning (Houlsby et al., "
                 "abstract and section 3.6)",
        "x_label": "bottleneck of the adapters",
        "runs": [("adapter", m, "adapter", ["--bottleneck", m]) for m in BOTTLENECKS] + [("full", None, "full", [])],
        "pairs": [(("adapter", m), ("full", None), "no worse") for m in BOTTLENECKS]},
    "layers": {
        "claim": "adapters in all blocks beat training the top blocks, and with fewer parameters (Houlsby et al., "
                 "figure 3)",
        "x_label": "trained parameters, head included (at each point: in how many of the top blocks)", "by_size": True,
        "runs": [(method, k, method, [] if k == "all" else
                  ["--top-layers", k] + ["--lr", TOP_RATE] * (method == "full"))
                 for k in LAYERS for method in ("adapter", "full")],
        "pairs": [(("adapter", "all"), ("full", 1), "better"), (("adapter", "all"), ("full", 2), "better"),
                  *((("adapter", k), ("full", k), None) for k in LAYERS)]},
    "init": {
        "claim": "adapters fail if their first weights are large (Houlsby et al., figure 6)",
        "x_label": "standard deviation of the adapters' first weights",
        "runs": [("adapter", std, "adapter", ["--init-std", std]) for std in SCALES],
        "pairs": [(("adapter", std), ("adapter", 1e-2), "no worse" if std < 1e-2 else "worse")
                  for std in SCALES if std != 1e-2]},
    "data": {
        "claim": "with few sentences, training few parameters does better than training all",
        "x_label": "share of the training set (%)",
        "runs": [(method, share, method, ["--lr", SHARE_RATES[share][method]] if share in SHARE_RATES else [])
                 for share in SHARES for method in METHODS],  # and see study()
        "pairs": [((method, share), ("full", share), "better" if share <= 5 else None)
                  for share in SHARES for method in METHODS[:3]]},
    "light": {
        "claim": "training the biases alone is as good as training everything, to 0.4 points (Ben Zaken et al. 2021: "
                 "competitive, where data are few)",
        "x_label": "trained parameters, head included", "by_size": True,
        "runs": [(name, name, method, options) for name, method, options in [
            ("head", "head", []), ("bitfit", "bitfit", []),
            ("last_block", "full", ["--top-layers", 1, "--lr", TOP_RATE]),
            ("adapter", "adapter", []), ("lora", "lora", []), ("full", "full", [])]],
        "pairs": [(("bitfit", "bitfit"), ("full", "full"), "no worse"), (("bitfit", "bitfit"), ("lora", "lora"), None),
                  *((("last_block", "last_block"), (rival, rival), None) for rival in ("full", "lora", "adapter"))]},
}


def parse(arguments):
    """(options of this command line, options to pass on to train.py)"""
    parser = argparse.ArgumentParser(prog="compare.py", allow_abbrev=False, description="Compare head tuning, "
                                     "adapters, LoRA and full fine-tuning. Options of train.py are passed on to it.")
    parser.add_argument("--methods", nargs="+", choices=MIDDLE, metavar="NAME",
                        help=f"what to compare ({' '.join(METHODS)}; with --tune bitfit too)")
    parser.add_argument("--folds", metavar="N", type=int, choices=range(1, 11), help="how many of the ten folds to "
                        "test on, each with a seed of its own (3; 1 with --quick and --study)")
    parser.add_argument("--seeds", metavar="N", type=int, help="the same with --test FILE: how many seeds (3 or 1)")
    parser.add_argument("--quick", action="store_true", help="one fold, few sentences: a look at the whole")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="search each technique's learning rate on dev")
    mode.add_argument("--study", choices=[*STUDIES, "inside"], help="put one claim of the papers to the test")
    mode.add_argument("--human", action="store_true", help="how well one rater of the default data agrees with the "
                      "others")
    mode.add_argument("--publish", action="store_true", help="rewrite the README's table from results/")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where everything goes (runs/comparison)")
    options, rest = parser.parse_known_args(arguments)
    passed_on = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    own = {word for *_, extra in STUDIES.get(options.study, {"runs": []})["runs"] for word in extra
           if str(word).startswith("--")}
    own |= {"--lr"} if options.tune else {"--limit", "--epochs"} if options.study == "data" else set()
    if options.study and options.methods or options.publish and options.out:
        parser.error("--study has methods of its own, and --publish reads results/: leave --methods and --out out")
    methods = {method for _, _, method, _ in STUDIES[options.study]["runs"]} if options.study in STUDIES else (
        options.methods or METHODS)
    if "--targets" in passed_on and {"adapter", "lora"} <= {*methods}:
        parser.error("--targets names the same layers to adapters and LoRA, which go to different ones: choose one of "
                     "the two with --methods")
    for name in ("--fold", "--seed", "--resume", "--overwrite", *own):
        if name in QUICK * options.quick + passed_on:
            parser.error(f"{name} is chosen by compare.py itself here; leave it{' or --quick' * options.quick} out, "
                         "or use train.py for a single run")
    if options.seeds is not None and (options.seeds < 1 or "--test" not in passed_on):
        parser.error("--seeds N, at least 1, goes with --test FILE; without it --folds N repeats the comparison")
    if options.folds and "--test" in passed_on:
        parser.error("--folds takes test sentences from the data, but --test names a file: use --seeds")
    options.methods = options.methods or (MIDDLE if options.tune else METHODS)
    options.repeats = options.folds or options.seeds or (1 if options.quick or options.study else 3)
    if options.out is None:
        options.out = Path("runs/quick" if options.quick else "runs/comparison")
    return options, QUICK * options.quick + passed_on  # of an option given twice, the last counts


if __name__ == "__main__":
    OPTIONS, PASSED_ON = parse(sys.argv[1:])  # before the slow imports

import numpy as np

import train
from minipeft import checkpoint, data, download, plots, statistics
from minipeft.lora import LoRALinear


# -- runs -------------------------------------------------------------------------------------------------

def own_options(method, options):
    """Those of train.py's options that this method has: `--rank 4` is passed on to LoRA only."""
    special = {name for defaults in train.DEFAULTS.values() for name in defaults}
    kept, keep = [], True
    for word in map(str, options):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            keep = name not in special or name in train.DEFAULTS[method]
        kept += [word] * keep
    return kept


def make_run(label, method, options, repeat, passed_on, out, seed=None):
    """A run as a dict: its label in tables, its command line for train.py, its settings, its folder and record.

    The folder and the record are named after those of `options` that differ from the defaults, so that a run which
    several studies ask for is run once.
    """
    common = [method, *own_options(method, passed_on)]
    default, given = vars(train.parse(common)), vars(train.parse([*common, *own_options(method, options)]))
    differ = [f"{key}-{value}" for key, value in given.items() if value != default.get(key) and key != "out"]
    own_test, seed = given["test"] is not None, repeat if seed is None else seed
    place = f"seed{repeat}" if own_test else f"fold{repeat}"
    name = "-".join([method, *differ, place] + [f"seed{seed}"] * (seed != repeat))
    name = "".join(letter for letter in name if letter not in "[]',").replace(" ", "-").replace("_", "-")
    line = [*common, *own_options(method, options), "--seed", str(seed), *(() if own_test else ("--fold", str(repeat)))]
    folder = out / "folders" / name
    return {"label": label, "method": method, "line": line, "folder": folder, "record": out / "runs" / f"{name}.json",
            "settings": vars(train.parse([*line, "--out", str(folder)]))}


def check_same(run, path, settings, hashes):
    """ValueError unless `settings`, as a run wrote them to `path`, are of this run, with these weights and data."""
    ignored = ("out", "resume", "overwrite", "save_every", "weights", "data", "test", "device", "precision")
    wanted = {key: value for key, value in run["settings"].items() if key not in ignored} | hashes
    for key in ("device", "precision"):  # "auto" has become what it found
        if run["settings"][key] != "auto":
            wanted[key] = run["settings"][key]
    if any(settings.get(key) != value for key, value in wanted.items()):
        raise ValueError(f"{path} is a run with other settings, weights or data: choose another --out, or delete it")


def load_record(run, hashes):
    """What a run left, or None if it has to be run. ValueError if what is there is of another run."""
    if not run["record"].is_file():
        return None
    record = checkpoint.read_json(run["record"])
    check_same(run, run["record"], record["settings"], hashes)
    return record


# What a run's process does. It ends when the other end of its stdin is closed, and with that when compare.py is
# killed: or it would go on alone, and the next compare.py would write into the same folder. (On Windows an import
# must not be under way while another thread reads stdin.)
CHILD = f"""
import os, sys, threading
sys.path[0] = {str(ROOT)!r}
import train
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
sys.exit(train.main(train.parse(sys.argv[1:])))"""


def do_run(run, hashes):
    """Run train.py in a process of its own, so that its time and memory are its own; returns the record it leaves.

    A run that was killed goes on where it was, or afresh if it cannot. One whose loss does not stay finite is
    recorded as failed. ValueError for any other that comes to nothing: the mistake is the user's, or the disk is full.
    """
    folder, started = run["folder"], time.perf_counter()
    begun = folder / "settings.json"
    if begun.is_file():
        check_same(run, folder, checkpoint.read_json(begun), hashes)
    going_on = begun.is_file() and not (folder / checkpoint.FINISHED).is_file()
    if folder.is_dir() and not going_on:
        shutil.rmtree(folder)
    command = ["train.py", *run["line"], "--out", str(folder)] + ["--resume"] * going_on
    print("\n$ python", *command, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", "-c", CHILD, *command[1:]], encoding="utf-8", stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=None if sys.stderr.isatty() else subprocess.PIPE)
    try:
        error = process.stderr.read() if process.stderr else ""
        process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has the signal too, and ends in good order
        raise
    if process.returncode == 2 and going_on:  # begun with another version of torch, say
        shutil.rmtree(folder)
        return do_run(run, hashes)
    record = {"command": " ".join(["python", *command[:-1 if going_on else None]])}
    if process.returncode == 0:
        record["settings"] = checkpoint.read_json(begun)
        record["metrics"] = checkpoint.read_json(folder / checkpoint.FINISHED)
        with open(folder / "history.csv", encoding="utf-8") as file:
            record["history"] = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        with open(folder / "predictions.csv", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        record["predictions"] = {"lines": [int(row[0]) for row in rows[1:]], "labels": [row[1] for row in rows[1:]],
                                 "chances": [[float(value) for value in row[2:]] for row in rows[1:]]}
    elif process.returncode == train.DIVERGED:
        record |= {"settings": checkpoint.read_json(begun), "failed": (error or "it stopped; see above").strip()}
    else:
        raise ValueError((error or "").strip() or f"this run ended with exit code {process.returncode}")
    record["wall_seconds"] = time.perf_counter() - started
    if run["record"].is_file():  # `inside` needs the weights of a run whose record came without them, and stays
        return record
    with download.whole(run["record"]) as aside:  # one line a key: small, and still to be read
        lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
        aside.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    return record


def do_all(runs, hashes, show=lambda done: None):
    """The records of all runs, in their order; what is not there yet is run. show(done) is called after each run."""
    records = {run["record"]: load_record(run, hashes) for run in runs}
    left = [run for run in runs if records[run["record"]] is None]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them there already")
    for number, run in enumerate(left):
        seconds = {}  # of the finished runs of each method
        for other in runs:
            if record := records[other["record"]]:
                seconds.setdefault(other["method"], []).append(record["wall_seconds"])
        average = [np.mean(values) for values in seconds.values()]
        guess = sum(np.mean(seconds.get(other["method"], average)) for other in left[number:]) if seconds else None
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
    "technique_parameters": ("technique parameters", "{:,.0f}", 1),
    "head_parameters": ("head parameters", "{:,.0f}", 1),
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
        row = rows.setdefault(run["label"], {"method": run["label"], "runs": 0, "failed": 0, "values": []})
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
    spread = std is not None and std > 1e-9 * abs(mean)  # less is rounding: the same number in every run
    return form.format(factor * mean) + (f" ± {form.format(factor * std)}" if spread else "")


def markdown(rows, columns):
    """A table, as lines. Failed runs stand in a column of their own if there are any."""
    failed = any(row["failed"] for row in rows)
    head = ["method", *(COLUMNS[column][0] for column in columns), "runs", *["failed runs"] * failed]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [plots.look(row["method"])[0], *(cell(row, column) for column in columns), str(row["runs"])]
        lines.append("| " + " | ".join(cells + [str(row["failed"])] * failed) + " |")
    return lines


def name_of(label):
    """A method, or the (series, x) of a study, as it stands in tables."""
    if isinstance(label, str):
        return plots.look(label)[0]
    series, x = label
    return plots.look(series)[0] + ("" if x in (None, series) else f" ({x if isinstance(x, str) else f'{x:g}'})")


def differences(done, pairs, same_sentences):
    """Paired comparisons of test accuracy, in points: a list of dicts with name, difference, low, high, p (of Holm).

    p is the larger of two, corrected by Holm: that of the bootstrap over runs and sentences, and McNemar's (with the
    same sentences in all runs, a permutation test), which is exact but knows of sentences only.
    pairs: (one label, another, what a paper claims of the one or None), ...
    """
    by_name, found = {}, []
    for run, record in done:
        if "failed" not in record:
            by_name.setdefault(run["label"], {})[record["settings"]["seed"]] = right(record)
    for a, b, claimed in pairs:
        repeats = sorted(by_name.get(a, {}).keys() & by_name.get(b, {}).keys())
        if not repeats:
            continue
        ours, theirs = [by_name[a][i] for i in repeats], [by_name[b][i] for i in repeats]
        gaps = [x - y for x, y in zip(ours, theirs)]
        mean, low, high, p = statistics.paired_bootstrap(gaps, same_sentences=same_sentences)
        only_a, only_b, exact = statistics.mcnemar(np.concatenate(ours), np.concatenate(theirs))
        if same_sentences:
            exact = statistics.permutation_test(np.mean(gaps, axis=0))
        found.append({"name": f"{name_of(a)} - {name_of(b)}", "claimed": claimed, "runs": len(gaps),
                      "sentences": len(gaps[0]) if same_sentences else sum(map(len, gaps)), "only_a": only_a,
                      "only_b": only_b, "difference": 100 * mean, "low": 100 * low, "high": 100 * high,
                      "p": max(p, exact)})
    for row, p in zip(found, statistics.holm([row["p"] for row in found]) if found else []):
        row |= {"p": float(p), "smallest": statistics.smallest_detectable(row["low"], row["high"], len(found))}
    return found


def outcome(row):
    """better, worse or not distinguished. Neither is called better unless both the interval and p say so."""
    if row["low"] <= 0 <= row["high"] or row["p"] > 0.05:
        return "not distinguished"
    return "better" if row["low"] > 0 else "worse"


def sentence(row):
    """A paired comparison in words."""
    a, b = row["name"].split(" - ")
    facts = (f"{row['difference']:+.1f} points, 95 % interval {row['low']:+.1f} to {row['high']:+.1f}, "
             f"p = {row['p']:.2g}, {row['sentences']:,} sentences" + ", one run each" * (row["runs"] == 1))
    if outcome(row) == "not distinguished":
        return (f"{a} and {b} are not distinguished ({facts}; a true difference of {row['smallest']:.1f} points would "
                "have been found four times in five)")
    return f"{a} did {outcome(row)} than {b} ({facts})"


def speaks(row):
    """1 if a comparison shows what is claimed of it, -1 if it shows the contrary, 0 if neither."""
    if row["claimed"] == "no worse":  # that no difference was found is no proof: the interval has to exclude one
        return int(row["low"] > -MARGIN) - int(row["high"] < -MARGIN)
    return {row["claimed"]: 1, "not distinguished": 0}.get(outcome(row), -1)


def verdict(pairs, claims):
    """Whether a claim, of so many comparisons, held. That nothing speaks against it is no proof, and not called one."""
    found = [speaks(row) for row in pairs if row["claimed"]]
    shown, against = found.count(1), found.count(-1)
    word = "it did not hold here" if against else "it held here" if shown == claims else "not settled here"
    failed = f", {claims - len(found)} could not be made, as a run failed" * (len(found) < claims)
    alone = "; one run each, so that another seed or fold may say otherwise" * ({row["runs"] for row in pairs} == {1})
    return (f"{word} (comparisons that it speaks of: {shown} as claimed, {against} against it, {found.count(0)} "
            f"undecided{failed}{alone})")


def tables(content):
    """The whole comparison as lines of Markdown. The untrained model is not in the table of costs: it has none."""
    human = content["one_human_rater"]
    return [*markdown(content["rows"], QUALITY), "",
            f"For scale: always the most frequent class {content['majority_class']:.1%}"
            + f"; one human rater, against the others {human or 0:.1%}" * bool(human) + ".", "",
            *markdown([row for row in content["rows"] if row["method"] != "untrained"], COST), "",
            *(f"- {sentence(row)}." for row in content["differences"])]


# -- the comparison ---------------------------------------------------------------------------------------

def context(options, passed_on):
    """What all runs have in common: their settings, the hashes of weights and data, and the corpus."""
    settings = train.parse(["head", *own_options("head", passed_on)])
    weights = download.find_weights(settings.weights)
    files = [settings.test] * bool(settings.test) + [settings.data or download.fetch_data()]
    corpus = data.read_corpus(files, data.load_tokenizer(weights, settings.max_length), settings.text_column,
                              settings.label_column)
    for fold in range(1 if settings.test else options.repeats):
        data.split(corpus, fold)  # ValueError now, and not after hours, if a fold lacks a class
    hashes = {"weights_sha256": download.hash_weights(weights), "data_sha256": [download.sha256(f) for f in files]}
    return settings, hashes, corpus


def certainty(finished):
    """Accuracy in bins of |mean rating|, as plots.by_certainty takes it, from {method: records of its runs}."""
    with open(download.DATA, encoding="utf-8") as file:
        ratings = {number: abs(float(line.split("\t")[1])) for number, line in enumerate(file, 1) if number > 1}
    edges, bins, scores = [0, 0.5, 1, 1.5, 2, 2.5, 4], [], {}
    for name, records in finished.items():
        sure = np.array([ratings[line] for record in records for line in record["predictions"]["lines"]])
        correct = np.concatenate([right(record) for record in records])
        inside = [(sure > low) & (sure <= high) for low, high in zip(edges, edges[1:])]
        bins = [(low, high, int(chosen.sum())) for low, high, chosen in zip(edges, edges[1:], inside)]
        scores[name] = [(100 * correct[chosen].mean(), 100 * math.sqrt(correct[chosen].var() / chosen.sum()))
                        if chosen.any() else (None, None) for chosen in inside]
    return bins, scores


def write_comparison(done, out, same_sentences, common, default_data):
    """Table (Markdown, CSV, JSON) and plots of all runs that are done. common: the most frequent class."""
    rows, pairs = summarise(done), differences(done, PAIRS, same_sentences)
    finished = {row["method"]: [record for run, record in done if run["label"] == row["method"]
                                and "failed" not in record] for row in rows if row["runs"]}
    labels = [label for record in finished.get("untrained", []) for label in record["predictions"]["labels"]]
    human = out / "human.json"
    human = checkpoint.read_json(human)["agreement"] if default_data and human.is_file() else None
    content = {"majority_class": labels.count(common) / len(labels), "one_human_rater": human, "rows": rows,
               "differences": pairs, "runs": [{"name": run["record"].stem, "command": record["command"]} | (
                   {"failed": record["failed"]} if "failed" in record else {"metrics": record["metrics"]})
                   for run, record in done]}
    checkpoint.write_json(out / "comparison.json", content)
    with download.whole(out / "table.md") as aside:
        aside.write_text("\n".join(tables(content)) + "\n", encoding="utf-8")
    checkpoint.write_csv(out / "table.csv", ["method", "runs", "failed", *(
        column + end for column in COLUMNS for end in ("", "_std"))], (
        [row["method"], row["runs"], row["failed"], *(value for column in COLUMNS for value in row[column])]
        for row in rows))

    finished.pop("untrained")
    points, costs = [], []
    for row in (row for row in rows if row["method"] in finished):
        (mean, std), parameters = row["test_accuracy"], row["technique_parameters"][0] + row["head_parameters"][0]
        points.append({"method": row["method"], "parameters": parameters, "mean": 100 * mean, "std": std and 100 * std})
        costs.append({"method": row["method"], **{key + end: row[key][i] for key in ("train_seconds", "peak_memory_mb")
                                                  for i, end in enumerate(("", "_std"))}})
    across = [("majority class", 100 * content["majority_class"])]
    across += [("one human rater", 100 * human)] if human else []
    histories = {method: [record["history"] for record in records] for method, records in finished.items()}
    figures = [("tradeoff", plots.tradeoff, points, across), ("curves", plots.learning_curves, histories),
               ("costs", plots.costs, costs)] * bool(finished)
    figures += [("differences", plots.differences, pairs)] * bool(pairs)
    if default_data and finished:
        figures.append(("certainty", plots.by_certainty, *certainty(finished)))
    for name, draw, *numbers in figures:
        with download.whole(out / f"{name}.png") as aside:
            draw(*numbers, aside)


def compare(options, passed_on):
    """Train every method on every fold (or seed), and write table and plots."""
    settings, hashes, corpus = context(options, passed_on)
    print(f"{len(corpus):,} sentences, labelled {', '.join(corpus.classes)[:200]}", *corpus.notes, sep="\n")
    plan = [("untrained", "head", ["--epochs", 0]), *((name, name, []) for name in MIDDLE if name in options.methods)]
    runs = [make_run(name, method, extra, repeat, passed_on, options.out)
            for repeat in range(options.repeats) for name, method, extra in plan]

    def show(done):
        print("", *markdown(summarise(done), ("trainable_percent", "train_accuracy", "dev_accuracy", "test_accuracy",
                                              "train_seconds")), sep="\n")

    records = do_all(runs, hashes, show)
    common = corpus.classes[np.bincount(corpus.labels).argmax()]
    write_comparison(list(zip(runs, records)), options.out, bool(settings.test), common, not settings.data)
    print("", (options.out / "table.md").read_text(encoding="utf-8"),
          f"written to {options.out}/: table.md, table.csv, comparison.json, and plots (.png)", sep="\n")


# -- tuning -----------------------------------------------------------------------------------------------

def leaders(scores):
    """(the rate with the best dev accuracy, all rates at most a point behind it); scores: {rate: accuracy}"""
    best = max(scores, key=scores.get)
    return best, [rate for rate in scores if scores[rate] >= scores[best] - 0.01]


def tune(options, passed_on):
    """Try learning rates for each technique, judged on dev alone, until the best is not at an end of those tried.

    Each is run once at first. Those at most a point of dev accuracy behind the best are then run on the other folds
    too, until all that are so close have been. A point is about the standard error of an accuracy on a thousand
    sentences, so that these still count as equals, and of them the lowest dev loss is chosen: it weighs every
    probability, and says more than right and wrong.
    """
    _, hashes, _ = context(options, passed_on)
    found = checkpoint.read_json(options.out / "tuning.json") if (options.out / "tuning.json").is_file() else {}
    for method in options.methods:
        tried, wanted = {}, [(MIDDLE[method] * factor, 0) for factor in (1 / 4, 1 / 2, 1, 2, 4)]
        while wanted:
            runs = [make_run(rate, method, ["--lr", rate], repeat, passed_on, options.out) for rate, repeat in wanted]
            for run, record in zip(runs, do_all(runs, hashes)):
                tried.setdefault(run["label"], []).append(record["history"][-1] if "failed" not in record else None)
            scores, losses = ({rate: np.mean([last[key] for last in ends]) for rate, ends in tried.items()
                               if None not in ends} for key in ("dev_accuracy", "dev_loss"))
            if not scores:
                raise ValueError(f"{method}: every run from --lr {min(tried):g} to {max(tried):g} failed; see "
                                 f"{options.out}/runs")
            best, close = leaders(scores)
            wanted = [(best / 2, 0)] * (best == min(tried)) + [(best * 2, 0)] * (best == max(tried)) or [
                (rate, repeat) for rate in close for repeat in range(len(tried[rate]), options.repeats)]
        chosen = min(close, key=losses.get)
        found[method] = {"chosen": chosen, "tried": [
            {"lr": rate, **{key: [last[key] for last in tried[rate] if None not in tried[rate]]
                            for key in ("dev_accuracy", "dev_loss")}} for rate in sorted(tried)]}
        checkpoint.write_json(options.out / "tuning.json", found)
        print(f"{method}: the learning rate chosen on dev is {chosen:g}")
    accuracy, loss = ({method: [(row["lr"], *(factor * value for value in statistics.mean_std(row[key])))
                                for row in result["tried"] if row[key]] for method, result in found.items()}
                      for key, factor in (("dev_accuracy", 100), ("dev_loss", 1)))
    with download.whole(options.out / "tuning.png") as aside:
        plots.sensitivity(accuracy, loss, {method: result["chosen"] for method, result in found.items()}, aside)
    print(f"written to {options.out}/: tuning.json, tuning.png")


# -- studies ----------------------------------------------------------------------------------------------

def study(options, passed_on):
    """Run one study of the papers' claims: a table, a plot, and what became of the claim."""
    plan, (settings, hashes, corpus) = STUDIES[options.study], context(options, passed_on)
    runs = []
    for series, x, method, extra in plan["runs"]:
        if options.study == "data" and x < 100:  # in per cent; as many steps as for all, but at most 20 epochs
            extra = [*extra, "--limit", len(data.split(corpus)[0]) * x // 100, "--epochs", min(20, 300 // x)]
        runs += [make_run((series, x), method, extra, repeat, passed_on, options.out)
                 for repeat in range(options.repeats)]
    done = list(zip(runs, do_all(runs, hashes)))
    pairs = differences(done, plan["pairs"], same_sentences=bool(settings.test))
    rows, points, across = summarise(done), {}, {}
    for row in rows:
        label, accuracy = row["method"], row["test_accuracy"][0]
        row["method"] = name_of(label)
        if accuracy is None:  # all its runs failed
            continue
        (series, x), size = label, row["technique_parameters"][0] + row["head_parameters"][0]
        sizes = [len(right(record)) for run, record in done if run["label"] == label and "failed" not in record]
        sentences = sizes[0] if settings.test else sum(sizes)
        point = 100 * accuracy, 100 * math.sqrt(accuracy * (1 - accuracy) / sentences)
        if x is None:
            across[plots.look(series)[0]] = point[0]
        else:
            points.setdefault(series, []).append(
                (size, *point, "" if x == series else str(x)) if plan.get("by_size") else (x, *point))
    if not points:
        raise ValueError(f"every run of this study failed; see {options.out}/runs")
    print("", *markdown(rows, QUALITY), sep="\n")
    claims = sum(claimed is not None for *_, claimed in plan["pairs"])
    content = {"claim": plan["claim"], "rows": rows, "differences": pairs, "verdict": verdict(pairs, claims),
               "details": [sentence(row) for row in pairs]}
    write_study(options.study, content, options.out, lambda path: plots.study(
        plan["x_label"], points, path, across))


def svd_of_product(B, A):
    """The SVD of B A, (rank, out), (rank,) and (rank, in), from that of a (rank, rank) matrix. Vectors are rows."""
    (outer, left), (inner, right) = np.linalg.qr(B), np.linalg.qr(A.T)
    U, values, Vt = np.linalg.svd(left @ right.T)
    return (outer @ U).T, values, Vt @ inner.T


def inside(options, passed_on):
    """What LoRA's updates look like (Hu et al., section 7), from two runs of different seeds on fold 0.

    The size ||BA|| / ||W0|| of each update, its singular values, and how far the leading directions of the two
    seeds agree: phi(i) = ||U^T V||^2 / i over the first i singular vectors of each (equation 4), which is 1 for the
    same space and about i / width by chance. The right singular vectors of BA are the directions of x that an update
    reads, where A starts at random; the left ones are those it writes, where B starts at zero. The paper takes A
    alone, most of whose directions are still the random ones it started with.
    """
    _, hashes, _ = context(options, passed_on)
    runs = [make_run("lora", "lora", [], 0, passed_on, options.out),
            make_run("inside-lora", "lora", [], 0, passed_on, options.out, seed=100)]
    for run in runs:
        if load_record(run, hashes) is None or not (run["folder"] / "model.safetensors").is_file():
            do_run(run, hashes)
    one, two = ({name: module for name, module in checkpoint.open_run(run["folder"])[0].encoder.named_modules()
                 if isinstance(module, LoRALinear)} for run in runs)
    rows, rank = [], runs[0]["settings"]["rank"]
    for name, lora in one.items():
        (writes, values, reads), (other_writes, _, other_reads) = (
            svd_of_product(module.lora_B.detach().numpy(), module.lora_A.detach().numpy())
            for module in (lora, two[name]))
        values, weight = lora.scaling * values, lora.linear.weight.detach().numpy()
        _, layer, kind = name.split(".", 2)  # layers.0.attention.query
        rows.append({"layer": int(layer) + 1, "kind": kind, "singular_values": values.tolist(),
                     "ratio": float(np.linalg.norm(values) / np.linalg.norm(weight)),
                     **{side: {"width": ours.shape[1], "agreement": [
                         float(np.square(ours[:i] @ theirs[:i].T).sum() / i) for i in range(1, rank + 1)]}
                        for side, ours, theirs in (("reads", reads, other_reads), ("writes", writes, other_writes))}})
    found = [f"an update is {np.mean([row['ratio'] for row in rows]):.1%} of its matrix in the mean"]
    for side in ("reads", "writes"):
        first, every, chance = np.mean([(row[side]["agreement"][0], row[side]["agreement"][-1],
                                         rank / row[side]["width"]) for row in rows], axis=0)
        found.append(f"two seeds agree to {first:.2f} in the first direction that an update {side} and to {every:.2f} "
                     f"in all {rank} (by chance {chance / rank:.3f} and {chance:.3f})")
    content = {"claim": "two seeds agree on the leading directions of an update, and on few others (Hu et al., section "
                        "7)", "rows": rows, "verdict": "; ".join(found), "details": []}
    write_study("inside", content, options.out, plots.spectra, rows)


def write_study(name, content, out, draw, *numbers):
    checkpoint.write_json(out / f"study-{name}.json", content)
    with download.whole(out / f"study-{name}.png") as aside:
        draw(*numbers, aside)
    print("", f"claim: {content['claim']}", f"verdict: {content['verdict']}", *content["details"], "",
          f"written to {out}/: study-{name}.json, study-{name}.png", sep="\n")


def human(options, _):
    """How often the sign of one rating is that of the others' mean, a zero counted half. Written to human.json."""
    agree = total = 0
    try:
        rated = download.read_data_package("movieReviewSnippets_anonDataRatings.txt")
    except subprocess.CalledProcessError as error:
        raise OSError(f"the ratings could not be fetched ({error}); this needs a network") from None
    for line in rated.decode().splitlines():
        ratings = np.array(json.loads(line.split("\t")[3]), float)  # id, mean, standard deviation, [ratings]
        others = np.sign(ratings.sum() - ratings)
        agree += ((1 + np.sign(ratings) * others) / 2)[others != 0].sum()
        total += int((others != 0).sum())
    checkpoint.write_json(options.out / "human.json", {"agreement": agree / total, "ratings": total})
    print(f"one rater agrees with the others in {agree / total:.1%} of {total:,} ratings")


# -- publishing -------------------------------------------------------------------------------------------

def rates(found):
    """What became of the search for learning rates, as lines of a table."""
    lines = ["| | rates tried | the most accurate on dev | at most a point behind | of these, the lowest loss: chosen |",
             "|---|---|---|---|---|"]
    for method, result in found.items():
        scores, losses = ({row["lr"]: np.mean(row[key]) for row in result["tried"] if row[key]}
                          for key in ("dev_accuracy", "dev_loss"))
        best, close = leaders(scores)
        best, chosen = (f"{rate:g} ({scores[rate]:.1%}, loss {losses[rate]:.3f})" for rate in (best, result["chosen"]))
        lines.append(f"| {plots.look(method)[0]} | {len(result['tried'])} | {best} | {min(close):g} to {max(close):g} | "
                     f"{chosen} |")
    return lines


def published(results):
    """What stands between the README's markers, made from the files in `results`."""
    content = checkpoint.read_json(results / "comparison.json")
    folds = max(row["runs"] for row in content["rows"])
    lines = [f"`python compare.py --folds {folds} --out results`"
             + (", mean ± standard deviation over the folds:" if folds > 1 else ":"), "", *tables(content)]
    if (results / "tuning.json").is_file():
        lines += ["", "`python compare.py --tune --out results`: each technique's learning rate, chosen on dev.", "",
                  *rates(checkpoint.read_json(results / "tuning.json")), "",
                  "![Dev accuracy and loss of each technique against its learning rate](results/tuning.png)"]
    studies = [name for name in (*STUDIES, "inside") if (results / f"study-{name}.json").is_file()]
    lines += ["", "**The papers' claims, each put to a small test.** Plot and comparisons stand behind its command."
              ] * bool(studies)
    for name in studies:
        found = checkpoint.read_json(results / f"study-{name}.json")
        folds = max((row["runs"] for row in found["rows"] if "runs" in row), default=1)
        command = f"python compare.py --study {name}{f' --folds {folds}' * (folds > 1)} --out results"
        lines += ["", f"*Claim: {found['claim']}.* Found: {found['verdict']}.", "",
                  f"<details><summary>{command}</summary>", "", f"![Study {name}](results/study-{name}.png)", "",
                  *(f"- {line}." for line in found["details"]), "", "</details>"]
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
        else:
            mode = (human if options.human else tune if options.tune else
                    inside if options.study == "inside" else study if options.study else compare)
            mode(options, passed_on)
        return 0
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on where it was, from what is in {options.out}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(OPTIONS, PASSED_ON))

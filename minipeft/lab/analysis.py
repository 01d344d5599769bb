"""Analyse finished runs and models without training: layers, spectra, forgetting, memory, inference.

    python -m minipeft.lab.analysis --out results --runs results/folders      all but inference
    python -m minipeft.lab.analysis --out results --latency                   inference, on a quiet machine

Each function returns plain numbers. `main` writes them to analysis.json, with one row a claim, and draws figures.
"""
import copy
import shlex
import sys
import timeit
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..adapter import AdapterLinear
from ..bert import load_bert
from ..head import pool
from ..lora import merge_lora
from ..model import Compute, predict
from ..tools import checkpoint, download, settings as options, texts
from ..tools.fast import processor
from ..tools.files import UserError, progress_bar, read_json, write_json
from . import plots, stats
from .memory import SENTENCES, TOKENS, make_model, memory


def read_data(record, weights):
    """Read the data of a run again: (corpus, dev indices, test indices). UserError if the files have changed."""
    from train import load_data
    corpus, _, _, dev, test = load_data(checkpoint.settings_of(record), weights)
    if [texts.fingerprint(path) for path in corpus.files] != record["data_sha256"]:
        raise UserError(f"{corpus.files[-1]}: the data have changed since the run; restore them or train again")
    return corpus, dev, test


# -- which layers matter ----------------------------------------------------------------------------------

WHOLE = (0, -1)  # no layer is without its adapters


def layer_spans(folder, weights=None):
    """Classify the test sentences of an adapter run without the adapters of layers first..last (Houlsby et al. 2019,
    figure 6, left). Norms keep their trained values.

    Returns {(first, last): (sentences,)}, 100 for a correct prediction and 0 for a wrong one; WHOLE: all adapters.
    """
    model, record, weights = checkpoint.open_run(folder, weights)
    if not any(isinstance(module, AdapterLinear) for module in model.modules()):
        raise UserError(f"{folder} is not a run with adapters: choose a folder that train.py adapter wrote")
    corpus, _, test = read_data(record, weights)
    sentences, layers, correct = corpus.sentences(test), len(model.encoder.layers), {}
    compute = Compute(precision=record["machine"]["precision"])  # that of the run, on the CPU
    for first, last in [WHOLE, *((first, last) for last in range(layers) for first in range(last + 1))]:
        bare = copy.deepcopy(model)
        for module in bare.encoder.layers[first:last + 1].modules():
            if isinstance(module, AdapterLinear):
                module.adapter = nn.Identity()
        correct[first, last] = 100.0 * (predict(bare, sentences, compute).argmax(1) == corpus.labels[test])
    return correct


def compare_spans(runs, seeds=False):
    """Average what layer_spans returns over runs, and compare some of the spans.

    Returns complete (per cent), matrix[first][last] (per cent, None where first > last), the worst single layer, and
    paired differences in points, as in stats.compare.
    """
    means = {span: float(np.mean([run[span].mean() for run in runs])) for span in runs[0]}
    layers = 1 + max(last for _, last in means)
    worst, half = min(range(layers), key=lambda layer: means[layer, layer]), layers // 2
    pairs = {"worst single layer": ((worst, worst), WHOLE), "all layers": ((0, layers - 1), WHOLE),
             "lower half instead of upper half": ((0, half - 1), (half, layers - 1))}
    differences = {name: vars(stats.compare([run[a] - run[b] for run in runs], seeds=seeds, comparisons=layers + 2))
                   for name, (a, b) in pairs.items()}
    matrix = [[means.get((first, last)) for last in range(layers)] for first in range(layers)]
    return {"complete": means[WHOLE], "matrix": matrix, "runs": len(runs), "worst": worst, "differences": differences}


# -- the spectrum of the update ---------------------------------------------------------------------------

def rank_of_energy(energies, share=0.9):
    """The smallest r with e_1 + ... + e_r >= share of the sum of all energies: squared singular values, largest
    first."""
    total = np.asarray(energies).cumsum()
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)) + 1)


def intruders(before, after, top=10, cosine=0.5):
    """How many of the `top` left singular vectors of `after` are unlike all those of `before`: the largest absolute
    cosine is below `cosine` (intruder dimensions, Shuttleworth et al. 2024, arXiv 2410.21228)."""
    old, new = (torch.linalg.svd(weight, full_matrices=False).U for weight in (before, after))
    return int(((new[:, :top].T @ old).abs().amax(1) < cosine).sum())


def update_spectrum(folder, weights=None):
    """Singular values of W - W0 for each linear layer of the encoder that was trained, and intruder dimensions.
    {layer name: numbers}"""
    model, _, weights = checkpoint.open_run(folder, weights)
    merge_lora(model)
    tuned, result = dict(model.encoder.named_modules()), {}
    for name, layer in load_bert(weights).named_modules():
        if isinstance(layer, nn.Linear) and name != "pooler":
            linear = getattr(tuned[name], "linear", tuned[name])  # the base layer in an adapter's wrapper
            before, after = layer.weight.detach().double(), linear.weight.detach().double()
            if torch.equal(before, after):
                continue
            values = torch.linalg.svdvals(after - before)
            result[name] = {"values": values.tolist(), "rank": rank_of_energy(values ** 2),
                            "intruders": intruders(before, after)}
    return result


# -- forgetting -------------------------------------------------------------------------------------------

def spearman(a, b):
    """Spearman's rank correlation: Pearson's of the ranks; equal values share their mean rank."""
    def ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def cosines(vectors):
    """Cosine similarity of each pair of rows, the upper triangle: (n, width) -> (n (n - 1) / 2,)"""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]


def similarity_kept(folder, weights=None, count=500, groups=10):
    """Measure how well training preserves the sentence similarities of the pretrained encoder.

    Returns Spearman's correlation of the pairwise cosines of mean-pooled vectors of `count` dev sentences, before and
    after, and the same in each of `groups` disjoint parts of them (of three or more sentences).
    """
    model, record, weights = checkpoint.open_run(folder, weights)
    corpus, dev, _ = read_data(record, weights)
    if len(dev) < 6:
        raise UserError(f"{folder} has only {len(dev)} dev sentences, too few to measure forgetting; use larger data")
    sentences = corpus.sentences(np.random.default_rng(0).permutation(dev)[:count])
    before, after = (predict(lambda ids, mask: pool(encoder(ids, mask), mask), sentences)
                     for encoder in (load_bert(weights), model.encoder))
    parts = np.array_split(np.arange(len(sentences)), min(groups, len(sentences) // 3))
    return {"correlation": spearman(cosines(before), cosines(after)), "sentences": len(sentences),
            "groups": [spearman(cosines(before[part]), cosines(after[part])) for part in parts]}


# -- inference --------------------------------------------------------------------------------------------

VARIANTS = {"base": "head", "base again": "head", "merged LoRA": "lora", "unmerged LoRA": "lora", "adapters": "adapter"}


@torch.no_grad()
def latency(weights, size, rounds=20, calls=20, tokens=TOKENS):
    """Milliseconds for a batch of `size` sentences: {variant: [median of `calls` calls, for each round]}.

    A round times all variants in turn. The difference between "base" and "base again" is noise.
    """
    models = {name: make_model(technique, weights).eval() for name, technique in VARIANTS.items()}
    merge_lora(models["merged LoRA"])
    ids, result = torch.full((size, tokens), 5), {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            seconds = timeit.repeat(lambda: model(ids), number=1, repeat=calls)
            if turn:  # the first round warms up
                result[name].append(1000 * float(np.median(seconds)))
    return result


# -- the claims -------------------------------------------------------------------------------------------

def span(row, unit=" points", digits=1):
    """A paired difference in words, from the dict of a stats.Comparison. Its interval's level goes with `at_level`."""
    mean, low, high = (f"{row[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} [{low}, {high}]"


def at_level(row):
    return f" (intervals at {100 * row['level']:.4g}%)"


def as_verdict(word):
    """The verdict on a claim that something is better."""
    return {"better": "confirmed", "worse": "contradicted"}.get(word.split(",")[0], word)


def each(runs):
    return "one run each" if runs == 1 else f"{runs} runs each"


def claim_layers(found):
    """found: result of compare_spans"""
    rows = found["differences"]
    single, everything, halves = (span(row) for row in rows.values())
    lower = as_verdict(rows["lower half instead of upper half"]["verdict"])  # better without them: they matter less
    runs = "one run" if found["runs"] == 1 else f"{found['runs']} runs"
    return {"claim": "adapters: no single layer matters much, all together do, lower layers less than upper ones",
            "source": "Houlsby et al. 2019, section 3.6, figure 6 (left, centre)",
            "measured": f"{runs}, {found['complete']:.1f}% with all adapters. Removed: the worst single layer "
                        f"({found['worst'] + 1}) {single}; all {everything}; the lower half instead of the upper half "
                        f"{halves}{at_level(rows['all layers'])}",
            "verdict": f"{runs}. Removing the worst single layer: {rows['worst single layer']['verdict']}; removing "
                       f"all: {rows['all layers']['verdict']}; lower layers matter less than upper ones: {lower}",
            "figure": "removed.png"}


def mean_energy(runs):
    """The share of the energy that each singular value holds, largest first, as a mean over matrices and runs."""
    squares = np.square([row["values"] for run in runs for row in run.values()])
    return (squares / squares.sum(1, keepdims=True)).mean(0)


def claim_spectrum(found):
    """found: {technique: [result of update_spectrum for each run]}, with full and lora. All matrices have the same full
    rank."""
    full, lora = mean_energy(found["full"]), mean_energy(found["lora"])
    needed, rank = (rank_of_energy(energy) for energy in (full, lora))
    most, runs = int((lora > 1e-12).sum()), each(len(found["full"]))
    matrices = {name: sum(map(len, rows)) for name, rows in found.items()}
    new = {name: sum(row["intruders"] for run in rows for row in run.values()) for name, rows in found.items()}
    return {"claim": "the update of full fine-tuning is low-rank; LoRA has intruder dimensions, full has none",
            "source": "Hu et al. 2021, section 4.1 (hypothesis); Biderman et al. 2024, arXiv 2405.09673 (the "
                      "opposite); Shuttleworth et al. 2024, arXiv 2410.21228 (intruders)",
            "measured": f"{runs}, mean over all trained matrices ({matrices['full']} full, {matrices['lora']} "
                        f"LoRA). The largest {needed} of {len(full)} (full) and {rank} of {most} (LoRA) singular "
                        f"values of the update hold 90% of its squared norm (energy); the largest {most} hold "
                        f"{full[:most].sum():.0%} of full fine-tuning's. Intruder dimensions (new singular vectors, "
                        "with a cosine below 0.5 to every old one) among the top 10 of each matrix: "
                        f"{new['full']} of {10 * matrices['full']:,} (full), {new['lora']} of "
                        f"{10 * matrices['lora']:,} (LoRA)",
            "verdict": f"{runs}. No verdict on low rank: the hypothesis is that a low-rank update suffices, not "
                       "that full fine-tuning finds one. Intruder dimensions with LoRA: "
                       f"{'confirmed' if new['lora'] else 'not confirmed'}; none with full fine-tuning: "
                       f"{'contradicted' if new['full'] else 'confirmed'}",
            "figure": "spectrum.png"}


def claim_forgetting(found, seeds=False):
    """found: {technique: [result of similarity_kept for each run]}, with full and lora on the same folds (or seeds)."""
    pairs = [np.subtract(lora["groups"], full["groups"]) for lora, full in zip(found["lora"], found["full"])]
    pair, runs = vars(stats.compare(pairs, "dev", seeds, margin=None)), each(len(pairs))
    means = "; ".join(f"{options.TECHNIQUES[name].label} {np.mean([run['correlation'] for run in rows]):.3f}"
                      for name, rows in found.items())
    return {"claim": "LoRA forgets less than full fine-tuning (here: stays closer to the untouched encoder)",
            "source": "Biderman et al. 2024, arXiv 2405.09673",
            "measured": f"{runs}. Rank correlation of sentence similarities before and after training (untouched: 1), "
                        f"{found['full'][0]['sentences']} dev sentences: {means}. LoRA - full in {len(pairs[0])} "
                        f"groups of sentences: {span(pair, '', 3)}{at_level(pair)}",
            "verdict": f"{runs}. LoRA stays closer: {as_verdict(pair['verdict'])}. What the encoder can still do was "
                       "not measured", "figure": None}


def claim_memory(found):
    """found: {technique: result of memory}, with full and lora; "steps": the machine and step time of runs."""
    full, lora = (found[name]["measured"] for name in ("full", "lora"))

    def saved(*parts):
        return f"{1 - sum(lora[part] for part in parts) / sum(full[part] for part in parts):.0%}"

    states = ("weights", "gradients", "optimiser_states")
    seconds, steps = "step time: no runs on one machine", [found[name].get("steps") for name in ("full", "lora")]
    if all(steps) and steps[0]["machine"] == steps[1]["machine"]:
        one, other = (np.mean(row["milliseconds"]) for row in steps)
        runs = each(min(len(row["milliseconds"]) for row in steps))
        seconds = (f"step time in {steps[0]['machine']['precision']} {one:.0f} ms (full), {other:.0f} ms (LoRA), "
                   f"{1 - other / one:.0%} less, {runs}")
    without, together = saved(*states), saved(*states, "activations")
    return {"claim": "LoRA needs up to two thirds less memory than full fine-tuning with Adam, and is 25% faster",
            "source": "Hu et al. 2021, section 4.2",
            "measured": f"a step of {SENTENCES} x {TOKENS} tokens in fp32, counted: {without} less for weights, "
                        f"gradients and optimiser states; {lora['activations'] / full['activations']:.2f} times the "
                        f"activations; together {together} less. {saved('forward_flop', 'backward_flop')} fewer FLOP "
                        f"in matrix products; {seconds}",
            "verdict": f"counted, no interval: {without} less without activations, {together} with them; {seconds}",
            "figure": "memory.png"}


def claim_latency(found, processor):
    """found: {size of a batch: result of latency}. Times against "base" are paired over rounds, in per cent of it."""
    parts, words = [], []
    for size, times in found.items():
        base = np.array(times["base"])
        middle = np.median(base)
        parts.append(f"batch {size}: base {middle:.1f} ms ({1000 * size / middle:,.0f} sentences/s)")
        for name in list(VARIANTS)[1:]:
            pair = vars(stats.paired(100 * (np.array(times[name]) / base - 1), overlap=0, margin=None,
                                     comparisons=len(found) * (len(VARIANTS) - 1), lower_is_better=True))
            parts.append(f"{name} {span(pair, '%')}")
            words.append(f"batch {size}, {name}: {pair['verdict']}")
    return {"claim": "merged LoRA costs nothing in inference; adapters slow it, most in small batches",
            "source": "Hu et al. 2021, section 3 and table 1",
            "measured": f"{processor}, {torch.get_num_threads()} threads, fp32, {TOKENS} tokens. {'; '.join(parts)}"
                        f"{at_level(pair)}",
            "verdict": f"time against the base model: {'; '.join(words)}", "figure": None}


def find_runs(folder):
    """The finished runs of each technique that differ in fold and seed alone: {technique: {(fold, seed): folder}}.

    Of several such groups, take the one with the fewest settings that are not the defaults.
    """
    groups = {}
    for path in sorted(Path(folder).glob("*/run.json")):
        record = checkpoint.read_record(path)
        if "failed" not in record and record["settings"]["epochs"]:
            rest = dict(record["settings"])
            technique, repeat = rest["technique"], (rest.pop("fold", None), rest.pop("seed"))
            default = options.defaults(technique)
            key = sum(value != default[name] for name, value in rest.items()), repr(rest)
            groups.setdefault(technique, {}).setdefault(key, {})[repeat] = str(path.parent)
    return {technique: groups[technique][min(groups[technique])] for technique in options.TECHNIQUES
            if technique in groups}


def step_times(folders):
    """The machine of the first of these runs, and the milliseconds a step of all that ran on it."""
    records = [checkpoint.read_record(Path(folder) / checkpoint.RECORD) for folder in folders]
    machine = records[0]["machine"]
    return {"machine": machine, "milliseconds": [record["metrics"]["step_milliseconds"] for record in records
                                                 if record["machine"] == machine]}


def analyse(out, runs=None, weights=None):
    """Measure everything but inference, as far as there are runs for it, and draw the figures. {name: section}"""
    weights, found_runs, sections = download.find_weights(weights), find_runs(runs) if runs else {}, {}
    if runs and not found_runs:
        raise UserError(f"--runs {runs} holds no finished run; compare.py writes its runs to OUT/folders")
    seeds = any(fold is None for folders in found_runs.values() for fold, _ in folders)  # a test file, not folds
    if "adapter" in found_runs:
        folders = progress_bar(iterable=found_runs["adapter"].values(), desc="layers", unit=" runs")
        found = compare_spans([layer_spans(folder, weights) for folder in folders], seeds)
        plots.heat_map(found["matrix"], found["complete"], out / "removed.png")
        sections["layers"] = found | {"row": claim_layers(found)}
    both = [repeat for repeat in found_runs.get("full", {}) if repeat in found_runs.get("lora", {})]
    if both:
        found = {name: [update_spectrum(found_runs[name][repeat], weights)
                        for repeat in progress_bar(iterable=both, desc=f"spectrum, {name}", unit=" runs")]
                 for name in ("full", "lora")}
        row = claim_spectrum(found)
        plots.spectra({name: [layer.pop("values") for run in rows for layer in run.values()]
                       for name, rows in found.items()}, out / "spectrum.png")
        sections["spectrum"] = found | {"row": row}
        found = {name: [similarity_kept(folders[repeat], weights) for repeat in both if repeat in folders]
                 for name, folders in found_runs.items()}
        found = {name: rows for name, rows in found.items() if rows}
        sections["forgetting"] = found | {"row": claim_forgetting(found, seeds)}
    found, bars = {name: memory(name, weights) for name in options.TECHNIQUES}, {}
    for name, folders in found_runs.items():
        found[name]["steps"] = step_times(folders.values())
    for name, row in found.items():
        parts = {part: size / 1e6 for part, size in row["formula"].items()}
        bars[name] = plots.Memory(**parts, measured=sum(row["measured"][part] for part in parts) / 1e6)
    note = (f"{SENTENCES} sentences of {TOKENS} tokens, fp32; bars: by formula; diamond: tensors counted in a step;\n"
            "the peak of a process is higher")
    plots.memory(bars, note, out / "memory.png")
    sections["memory"] = found | {"row": claim_memory(found)}
    return sections


def main(arguments=None):
    """Write OUT/analysis.json: a section a claim, and "claims", the rows of the table. Returns the exit code."""
    parser = options.Parser(prog="python -m minipeft.lab.analysis", description=(
        "Measure layers, spectra, forgetting, memory and inference. Trains nothing."))
    parser.add_argument("--out", default="results", help="folder for analysis.json and figures (default: results)")
    parser.add_argument("--runs", metavar="FOLDER", help="a folder of finished runs (default: measure memory only)")
    parser.add_argument("--weights", metavar="FOLDER", help="the base weights of the runs")
    parser.add_argument("--latency", action="store_true", help="measure inference only; needs a quiet machine")
    given = parser.parse_args(arguments)
    try:
        path, command = Path(given.out) / "analysis.json", ["python", "-m", "minipeft.lab.analysis", "--out", given.out]
        for option in ("runs", "weights"):
            if getattr(given, option) and not given.latency:
                command += [f"--{option}", getattr(given, option)]
        if given.latency:
            found = {size: latency(download.find_weights(given.weights), size) for size in (1, SENTENCES)}
            sections = {"latency": found | {"row": claim_latency(found, processor("cpu"))}}
            command.append("--latency")
        else:
            sections = analyse(Path(given.out), given.runs, given.weights)
        for section in sections.values():
            section["row"]["command"] = shlex.join(command)
        content = (read_json(path) if path.is_file() else {}) | sections
        content["claims"] = [section["row"] for name, section in content.items() if name != "claims"]
        write_json(path, content)
        for row in content["claims"]:
            print(f"\n{row['claim']} ({row['source']})\n  {row['measured']}\n  {row['verdict']}")
        return 0
    except UserError as error:
        print(f"minipeft.lab.analysis: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

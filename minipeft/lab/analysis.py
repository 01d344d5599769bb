"""Analyse finished runs without training: layers, spectra, cut updates, forgetting, many tasks, memory, inference.

    python -m minipeft.lab.analysis                          memory; figures and table of everything measured so far
    python -m minipeft.lab.analysis --runs results/folders   the same, and layers, spectra, forgetting
    python -m minipeft.lab.analysis --cut RUN ...            cut the update of full fine-tuning to low ranks
    python -m minipeft.lab.analysis --tasks RUN RUN ...      several techniques in turn on one encoder
    python -m minipeft.lab.analysis --latency                inference, on a quiet machine

OUT/analysis.json has one section a measurement, with numbers. `publish` makes figures and table from it, without runs.
"""
import copy
import math
import shlex
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from torch import nn

from ..adapter import AdapterLinear, remove_adapters
from ..bert import load_bert, read_config
from ..head import Classifier, freeze, pool
from ..lora import merge_lora, remove_lora
from ..model import APPLY, Compute, predict
from ..tools import checkpoint, download, settings as options, texts
from ..tools.fast import processor
from ..tools.files import UserError, progress_bar, read_json, write_json
from . import plots, stats
from .memory import SENTENCES, TOKENS, make_model, memory


# -- finding runs and their data --------------------------------------------------------------------------

def read_data(record, weights):
    """Read the data of a run again: (corpus, dev indices, test indices). UserError if the files have changed."""
    corpus, _, dev, test = texts.load_data(checkpoint.settings_of(record), weights, read_config(weights))
    if [texts.fingerprint(path) for path in corpus.files] != record["data_sha256"]:
        raise UserError(f"{corpus.files[-1]}: the data have changed since the run; restore them or train again")
    return corpus, dev, test


def find_runs(paths):
    """The finished runs of each technique that differ in fold and seed alone: {technique: {(fold, seed): path}}.

    paths: of their records. Of several such groups, take the one with the fewest settings that are not the defaults.
    """
    groups = {}
    for path in sorted(paths):
        record = checkpoint.read_record(path)
        if "failed" not in record:
            rest = dict(record["settings"])
            technique, repeat = rest["technique"], (rest.pop("fold", None), rest.pop("seed"))
            default = options.defaults(technique)
            key = sum(value != default.get(name) for name, value in rest.items()), repr(rest)
            groups.setdefault(technique, {}).setdefault(key, {})[repeat] = path
    return {technique: groups[technique][min(groups[technique])] for technique in options.TECHNIQUES
            if technique in groups}


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


def trained_matrices(encoder, weights):
    """Yield (name, W0, W, layer that holds W) for each linear layer of the blocks that was trained; float64."""
    for name, layer in load_bert(weights).named_modules():
        if name.startswith("layers.") and isinstance(layer, nn.Linear):
            tuned = encoder.get_submodule(name)
            tuned = getattr(tuned, "linear", tuned)  # the base layer in an adapter's wrapper
            before, after = layer.weight.detach().double(), tuned.weight.detach().double()
            if not torch.equal(before, after):
                yield name, before, after, tuned


def update_spectrum(folder, weights=None):
    """Singular values of W - W0 for each linear layer of the blocks that was trained, the rank that holds 90% of
    their energy, and intruder dimensions. {layer name: numbers}"""
    model, _, weights = checkpoint.open_run(folder, weights)
    merge_lora(model)
    result = {}
    for name, before, after, _ in trained_matrices(model.encoder, weights):
        values = torch.linalg.svdvals(after - before)
        result[name] = {"values": values.tolist(), "rank": rank_of_energy(values ** 2),
                        "intruders": intruders(before, after)}
    return result


def mean_values(runs):
    """Take the singular values out of what update_spectrum returns for each run, and average them for each layer:
    {layer name: four digits each, without those that are zero}."""
    means = {name: np.mean([run[name].pop("values") for run in runs], axis=0) for name in runs[0]}
    return {name: [float(f"{value:.4g}") for value in values if value > 1e-6 * values[0]]
            for name, values in means.items()}


def ranks_by_block(runs):
    """{kind of matrix: mean rank of 90% of the energy in each block, from the bottom}. runs: of update_spectrum"""
    kinds = {}
    for name in runs[0]:
        kinds.setdefault(name.split(".", 2)[2], []).append(float(np.mean([run[name]["rank"] for run in runs])))
    return kinds


@rc_context(plots.STYLE)
def draw_ranks(found, path):
    """The rank that holds 90% of the energy of an update, for each block and kind of matrix."""
    figure, [axes] = plots.figure_in_style(1, 2, (9, 4.6), sharex=True, sharey=True)
    for axis, technique in zip(axes, ("full", "lora")):
        kinds = ranks_by_block(found[technique])
        for kind, ranks in kinds.items():
            _, colour, marker = plots.look(kind, kinds)
            axis.plot(range(1, len(ranks) + 1), ranks, color=colour, marker=marker,
                      label=kind.replace("_", "-").replace(".", ", "))
        axis.set(title=plots.look(technique)[0], xlabel="block, from the bottom", yscale="log", ylim=(0.8, 400))
        axis.set_yticks((1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256))
        axis.minorticks_off()
    axes[0].set_ylabel("rank for 90% of the energy")
    return plots.finish(figure, path, "how many singular values of an update W - W0 hold 90% of its squared norm; mean "
                        f"of {len(found['full'])} runs")


# -- cut the update to a low rank -------------------------------------------------------------------------

def score(series, rank, record):
    """One row of the section "cut": accuracy (per cent) and calibrated loss (nats) on test; the temperature is fitted
    on dev. record: as in run.json; of its predictions only logits and labels are needed."""
    (dev, known), (test, labels) = ((np.array(record[part]["logits"], dtype=float), np.array(record[part]["labels"]))
                                    for part in ("dev", "test"))
    return {"series": series, "rank": rank, "fold": record["settings"].get("fold"),
            "accuracy": 100 * float((test.argmax(1) == labels).mean()),
            "calibrated_loss": float(stats.log_losses(test / stats.temperature(dev, known), labels).mean())}


@torch.no_grad()
def cut_updates(folder, weights=None):
    """Classify the test sentences of a full fine-tuning run with the update of every matrix of the blocks cut to rank
    0, 1, 2, 4, ...; the last rank is the whole update. Returns one row a rank, as `score` makes it.

        W0 + U_r S_r V_r^T, with U S V^T = W - W0: no update of rank r is closer to W - W0 (Eckart & Young 1936)

    Embeddings, biases, norms and head stay as trained, also at rank 0.
    """
    model, record, weights = checkpoint.open_run(folder, weights)
    if record["settings"]["technique"] != "full":
        raise UserError(f"{folder} is not a run of full fine-tuning: choose a folder that train.py full wrote")
    corpus, *sets = read_data(record, weights)
    compute = Compute(precision=record["machine"]["precision"])  # that of the run, on the CPU
    parts = [(layer, before, torch.linalg.svd(after - before, full_matrices=False))
             for _, before, after, layer in trained_matrices(model.encoder, weights)]
    whole, rows = model.encoder.config.hidden_size, []
    for rank in [0, *(2 ** power for power in range(whole.bit_length()) if 2 ** power < whole), whole]:
        for layer, before, (u, s, v) in parts:
            layer.weight.copy_(before + (u[:, :rank] * s[:rank]) @ v[:rank])
        predicted = {part: {"logits": predict(model, corpus.sentences(indices), compute, f"rank {rank}, {part}"),
                            "labels": corpus.labels[indices]} for part, indices in zip(("dev", "test"), sets)}
        rows.append(score("cut", rank, record | predicted))
    return rows


def trained_ranks(paths, like):
    """The rows, as of `score`, of LoRA runs at default settings but for rank and fold, with the data, base weights and
    precision of the record `like`. paths: of their records"""
    def inputs(record):
        return record["weights_sha256"], record["data_sha256"], record["machine"]["precision"]

    default, rows = options.defaults("lora"), []
    for record in map(checkpoint.read_record, sorted(paths)):
        settings = record["settings"]
        changed = {name for name, value in settings.items() if value != default.get(name)}
        if changed <= {"rank", "fold"} and "failed" not in record and inputs(record) == inputs(like):
            rows.append(score("trained", settings["rank"], record))
    return rows


def against_whole(rows, measure, **rule):
    """Compare every row with the whole update on the same fold: {(series, rank): stats.Comparison}. With one fold the
    interval is NaN. measure: "accuracy" or "calibrated_loss"; rule: as in stats.judge"""
    last = max(row["rank"] for row in rows if row["series"] == "cut")
    whole = {row["fold"]: row[measure] for row in rows if row["series"] == "cut" and row["rank"] == last}
    pairs = {}
    for row in rows:
        if row["fold"] in whole and (row["series"], row["rank"]) != ("cut", last):
            pairs.setdefault((row["series"], row["rank"]), []).append(row[measure] - whole[row["fold"]])
    return {key: stats.paired(values, **rule) if len(values) > 1 else stats.judge(values[0], math.nan, 1, 1, **rule)
            for key, values in sorted(pairs.items())}


@rc_context(plots.STYLE)
def draw_cut(rows, path):
    """What is lost if the update is cut to a rank, beside LoRA trained at that rank."""
    figure, [axes] = plots.figure_in_style(1, 2, (9, 5))
    for axis, measure, unit in zip(axes, ("accuracy", "calibrated_loss"), ("points", "nats")):
        found = against_whole(rows, measure)
        axis.axhline(0, color=plots.INK, linewidth=1)
        axis.axhline(found["cut", 0].mean, color="#7f7f7f", linestyle="--", label="rank 0: no matrix updated")
        for series, name, technique in (("cut", "full fine-tuning, cut to this rank", "full"),
                                        ("trained", "LoRA, trained at this rank", "lora")):
            points = {rank: point for (kind, rank), point in found.items() if kind == series and rank}
            if not points:
                continue
            means, half = [point.mean for point in points.values()], [p.high - p.mean for p in points.values()]
            _, colour, marker = plots.look(technique)
            shift = 1.07 if series == "trained" else 1 / 1.07  # so that no bar hides another
            axis.errorbar(np.multiply(list(points), shift), means, half, color=colour, marker=marker, capsize=3,
                          label=name)
        axis.set_xscale("log", base=2)
        ranks = [rank for series, rank in found if series == "cut" and rank]
        axis.set_xticks(ranks, ranks)
        axis.minorticks_off()
        axis.set(xlabel="rank", title=f"change of {measure.replace('_', ' ')} ({unit})")
    return plots.finish(figure, path, "0: the whole update; bars: 95% intervals over folds. Cutting is not training at "
                        "that rank: only the updates of\nthe blocks' matrices are cut, after training; embeddings, "
                        "biases, norms and head stay as trained, also at rank 0")


# -- one encoder, many tasks ------------------------------------------------------------------------------

REMOVE = {"head": lambda encoder: None, "adapter": remove_adapters, "lora": remove_lora}


@torch.no_grad()
def share_encoder(folders, weights=None, rounds=11):
    """Load runs in turn into one encoder, `rounds` times, and take each out again. {"encoder_mb", "runs": [numbers]}

    A switch reads the saved file, inserts the technique, fills it and, in the end, takes it out. Raises AssertionError
    unless every logit is that of the run opened alone, and in the end every bit of the encoder that of the base
    weights; UserError for a run that changes the base weights.
    """
    opened = [checkpoint.open_run(folder, weights) for folder in folders]
    for folder, (_, record, _) in zip(folders, opened):
        if record["settings"]["technique"] not in REMOVE:
            raise UserError(f"{folder}: {record['settings']['technique']} changes the base weights; choose runs of "
                            f"{', '.join(REMOVE)}")
    weights, times = opened[0][2], [[] for _ in folders]
    encoder = load_bert(weights)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    ids = torch.arange(SENTENCES * TOKENS).view(SENTENCES, TOKENS) % encoder.config.vocab_size
    for _ in range(rounds):
        for folder, (alone, record, _), seconds in zip(folders, opened, times):
            settings, began = checkpoint.settings_of(record), time.perf_counter()
            freeze(encoder)
            top = record["settings"].get("top_layers")
            APPLY[settings.technique](encoder.layers[-top:] if top else encoder, settings)
            model = Classifier(encoder, len(record["classes"]), settings.pooling).eval()
            path = Path(folder) / "model.safetensors"
            checkpoint.fill(model, checkpoint.read_tensors(path)[0], path)
            ready = time.perf_counter()
            assert torch.equal(model(ids), alone(ids)), f"{folder}: other logits than alone"
            removing = time.perf_counter()
            REMOVE[settings.technique](encoder)
            seconds.append(ready - began + time.perf_counter() - removing)
    after = encoder.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return {"encoder_mb": sum(tensor.nbytes for tensor in before.values()) / 1e6, "rounds": rounds, "runs": [
        {"name": Path(folder).name, "technique": record["settings"]["technique"],
         "saved_mb": (Path(folder) / "model.safetensors").stat().st_size / 1e6,
         "whole_mb": sum(parameter.nbytes for parameter in alone.parameters()) / 1e6,
         "switch_ms": 1000 * float(np.median(seconds))}
        for folder, (alone, record, _), seconds in zip(folders, opened, times)]}


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


# -- memory and inference ---------------------------------------------------------------------------------

def step_times(paths):
    """The machine of the first of these records, and the milliseconds a step of all that were made on it."""
    records = [checkpoint.read_record(path) for path in paths]
    machine = records[0]["machine"]
    return {"machine": machine, "milliseconds": [record["metrics"]["step_milliseconds"] for record in records
                                                 if record["machine"] == machine]}


def draw_memory(found, path):
    """Memory of a training step by purpose, for each technique."""
    bars = {}
    for name in options.TECHNIQUES:
        parts = {part: size / 1e6 for part, size in found[name]["formula"].items()}
        bars[name] = plots.Memory(**parts, measured=sum(found[name]["measured"][part] for part in parts) / 1e6)
    return plots.memory(bars, f"{SENTENCES} sentences of {TOKENS} tokens, fp32; bars: by formula; diamond: tensors "
                        "counted in a step;\nthe peak of a process is higher", path)


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


# -- the table: for each section its numbers, as (name, value, verdict or None) ----------------------------

def interval(row, unit=" points", digits=1):
    """A paired difference with its interval, from a stats.Comparison as a dict."""
    mean, low, high = (f"{row[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit}" + ("" if math.isnan(row["low"]) else f" [{low}, {high}] at {100 * row['level']:.4g}%")


def as_verdict(word):
    """The verdict on a claim that something is better."""
    return {"better": "confirmed", "worse": "contradicted"}.get(word.split(",")[0], word)


def layers_numbers(found):
    yield "runs", found["runs"], None
    yield "with all adapters", f"{found['complete']:.1f}%", None
    for name, row in found["differences"].items():  # better without the lower half: it matters less
        verdict = as_verdict(row["verdict"]) if name.startswith("lower half") else row["verdict"]
        yield f"removed: {name}", interval(row), verdict


def spectrum_numbers(found):
    yield "runs of each", len(found["full"]), None
    for name in ("full", "lora"):
        blocks = list(zip(*ranks_by_block(found[name]).values()))
        for place, ranks in (("bottom", blocks[0]), ("top", blocks[-1])):
            yield f"rank for 90% of the energy, {name}, {place} block", f"{min(ranks):.0f} to {max(ranks):.0f}", None
        counts = [layer["intruders"] for run in found[name] for layer in run.values()]
        yield (f"intruders (top 10 of each matrix), {name}", f"{sum(counts):,} of {10 * len(counts):,}",
               "confirmed" if any(counts) == (name == "lora") else "not confirmed")


def cut_numbers(found):
    for (series, rank), row in against_whole(found["rows"], "accuracy").items():
        yield f"{series} at rank {rank}", f"{interval(vars(row))}, folds: {row.runs}", None


def tasks_numbers(found):
    saved, whole = (sum(run[key] for run in found["runs"]) for key in ("saved_mb", "whole_mb"))
    yield "base weights after all switches", "the same bits", "confirmed"
    yield "one encoder and all saved files", f"{found['encoder_mb'] + saved:.1f} MB", None
    yield f"{len(found['runs'])} whole models", f"{whole:.1f} MB", None
    for run in found["runs"]:
        yield f"switch to {run['name']}", f"{run['switch_ms']:.1f} ms (median of {found['rounds']})", None


def forgetting_numbers(found):
    pairs = [np.subtract(lora["groups"], full["groups"]) for lora, full in zip(found["lora"], found["full"])]
    yield "runs of each", len(pairs), None
    yield "dev sentences", found["full"][0]["sentences"], None
    for name in filter(found.get, options.TECHNIQUES):
        mean = np.mean([run["correlation"] for run in found[name]])
        yield f"rank correlation of similarities before and after, {name}", f"{mean:.3f}", None
    row = vars(stats.compare(pairs, "dev", found["seeds"], margin=None))
    yield "LoRA - full", interval(row, "", 3), as_verdict(row["verdict"])


def memory_numbers(found):
    full, lora = (found[name]["measured"] for name in ("full", "lora"))
    states = ("weights", "gradients", "optimiser_states")
    for name, parts in (("weights, gradients and optimiser states", states), ("activations", ["activations"]),
                        ("together", (*states, "activations")),
                        ("FLOP in matrix products", ("forward_flop", "backward_flop"))):
        yield f"LoRA / full, {name}", f"{sum(map(lora.get, parts)) / sum(map(full.get, parts)):.2f}", None
    steps = [found[name].get("steps") for name in ("full", "lora")]
    if all(steps) and steps[0]["machine"] == steps[1]["machine"]:
        one, other = (np.mean(row["milliseconds"]) for row in steps)
        yield f"step in {steps[0]['machine']['precision']}", f"{one:.0f} ms (full), {other:.0f} ms (LoRA)", None


def latency_numbers(found):
    yield "machine", found["machine"], None
    for size, times in found["times"].items():
        base = np.array(times["base"])
        yield f"batch {size}, base", f"{np.median(base):.1f} ms", None
        for name in list(VARIANTS)[1:]:
            row = vars(stats.paired(100 * (np.array(times[name]) / base - 1), overlap=0, margin=None,
                                    comparisons=len(found["times"]) * (len(VARIANTS) - 1), lower_is_better=True))
            yield f"batch {size}, {name}", interval(row, "%"), row["verdict"]


SECTIONS = {  # name: claim, source, numbers, figure, how it is drawn
    "layers": ("adapters: no single layer matters much, all together do, lower layers less than upper ones",
               "Houlsby et al. 2019, section 3.6, figure 6 (left, centre)", layers_numbers, "removed.png",
               lambda found, path: plots.heat_map(found["matrix"], found["complete"], path)),
    "spectrum": ("the update of full fine-tuning is low-rank; LoRA has intruder dimensions, full has none",
                 "Hu et al. 2021, section 4.1 (hypothesis); Biderman et al. 2024, arXiv 2405.09673 (the opposite); "
                 "Shuttleworth et al. 2024, arXiv 2410.21228 (intruders)", spectrum_numbers, "spectrum.png",
                 draw_ranks),
    "cut": ("an update of low rank suffices: full fine-tuning with its updates cut to a rank, after training",
            "Hu et al. 2021, section 4.1 (hypothesis)", cut_numbers, "cut.png",
            lambda found, path: draw_cut(found["rows"], path)),
    "tasks": ("one encoder serves many tasks; a switch replaces only what was trained",
              "Houlsby et al. 2019, section 1; Hu et al. 2021, section 4.2", tasks_numbers, None, None),
    "forgetting": ("LoRA forgets less than full fine-tuning (here: stays closer to the untouched encoder)",
                   "Biderman et al. 2024, arXiv 2405.09673", forgetting_numbers, None, None),
    "memory": ("LoRA needs up to two thirds less memory than full fine-tuning with Adam, and is 25% faster",
               "Hu et al. 2021, section 4.2", memory_numbers, "memory.png", draw_memory),
    "latency": ("merged LoRA costs nothing in inference; adapters slow it, most in small batches",
                "Hu et al. 2021, section 3 and table 1", latency_numbers, None, None)}


def publish(out, content):
    """Draw the figures into OUT/figures and return the rows of the table. content: the sections of analysis.json"""
    rows = []
    for section, (claim, source, numbers, figure, draw) in SECTIONS.items():
        if section in content:
            found = content[section]
            if figure:
                draw(found, Path(out) / "figures" / figure)
            numbers = list(numbers(found))
            verdicts = [f"{name}: {verdict}" for name, _, verdict in numbers if verdict]
            rows.append({"claim": claim, "source": source, "command": found["command"],
                         "measured": "; ".join(f"{name}: {value}" for name, value, _ in numbers),
                         "verdict": "; ".join(verdicts) or "none: measured only",
                         "figure": figure and f"figures/{figure}"})
    return rows


# -- measuring --------------------------------------------------------------------------------------------

def analyse_runs(folder, weights):
    """The sections "layers", "spectrum" and "forgetting", as far as there are runs for them."""
    runs, sections = find_runs(Path(folder).glob("*/run.json")), {}
    if not runs:
        raise UserError(f"--runs {folder} holds no finished run; compare.py writes its runs to OUT/folders")
    seeds = any(fold is None for paths in runs.values() for fold, _ in paths)  # a test file, not folds

    def measure(function, technique, repeats):
        return [function(runs[technique][repeat].parent, weights)
                for repeat in progress_bar(iterable=repeats, desc=f"{function.__name__}, {technique}", unit=" runs")]

    if "adapter" in runs:
        sections["layers"] = compare_spans(measure(layer_spans, "adapter", runs["adapter"]), seeds)
    both = [repeat for repeat in runs.get("full", {}) if repeat in runs.get("lora", {})]
    if both:
        found = {name: measure(update_spectrum, name, both) for name in ("full", "lora")}
        sections["spectrum"] = found | {"values": {name: mean_values(rows) for name, rows in found.items()}}
        sections["forgetting"] = {"seeds": seeds} | {
            name: measure(similarity_kept, name, [repeat for repeat in both if repeat in paths])
            for name, paths in runs.items() if any(repeat in paths for repeat in both)}
    return sections


def measure(given):
    """What the command line asks for, as sections of analysis.json: {name: numbers}"""
    weights, records = download.find_weights(given.weights), list((Path(given.out) / "runs").glob("*.json"))
    if given.latency:
        times = {str(size): latency(weights, size) for size in (1, SENTENCES)}
        machine = f"{processor('cpu')}, {torch.get_num_threads()} threads, fp32, {TOKENS} tokens"
        return {"latency": {"machine": machine, "times": times}}
    if given.tasks:
        return {"tasks": share_encoder(given.tasks, given.weights)}
    if given.cut:
        rows = [row for folder in progress_bar(iterable=given.cut, desc="cut", unit=" runs")
                for row in cut_updates(folder, given.weights)]
        like = checkpoint.read_record(Path(given.cut[0]) / checkpoint.RECORD)
        return {"cut": {"rows": rows + trained_ranks(records, like)}}
    sections = analyse_runs(given.runs, weights) if given.runs else {}
    sections["memory"] = {name: memory(name, weights) for name in options.TECHNIQUES}
    for name, paths in find_runs(records).items():
        sections["memory"][name]["steps"] = step_times(paths.values())
    return sections


def main(arguments=None):
    """Write OUT/analysis.json: the sections and "claims", the rows of the table. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = options.Parser(prog="python -m minipeft.lab.analysis", description=(
        "Measure memory, and what finished runs have learnt; draw figures. Trains nothing."))
    parser.add_argument("--out", default="results", help="folder for analysis.json and figures; its runs/ may hold the "
                        "records of a comparison (default: results)")
    parser.add_argument("--weights", metavar="FOLDER", help="the base weights of the runs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--runs", metavar="FOLDER", help="measure layers, spectra and forgetting of the runs in a folder")
    what.add_argument("--cut", metavar="RUN", nargs="+", help="cut the updates of full fine-tuning to low ranks")
    what.add_argument("--tasks", metavar="RUN", nargs="+", help="load runs in turn into one encoder")
    what.add_argument("--latency", action="store_true", help="measure inference; needs a quiet machine")
    given = parser.parse_args(arguments)
    path, command = Path(given.out) / "analysis.json", shlex.join(["python", "-m", "minipeft.lab.analysis", *arguments])
    try:
        sections = {name: found | {"command": command} for name, found in measure(given).items()}
        content = (read_json(path) if path.is_file() else {}) | sections
        content["claims"] = publish(given.out, content)
        write_json(path, content)
    except UserError as error:
        print(f"minipeft.lab.analysis: {error}", file=sys.stderr)
        return 2
    for row in content["claims"]:
        print(f"\n{row['claim']} ({row['source']})\n  {row['measured']}\n  {row['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

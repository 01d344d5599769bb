"""Analyse finished runs without training: layers, spectra, cut updates, many tasks, memory, inference.

    python -m minipeft.lab.analysis                          memory of a training step
    python -m minipeft.lab.analysis --runs results/folders   layers, spectra
    python -m minipeft.lab.analysis --cut results/folders    cut the updates of full fine-tuning to low ranks
    python -m minipeft.lab.analysis --tasks RUN RUN ...      several techniques in turn on one encoder
    python -m minipeft.lab.analysis --latency                inference, on a quiet machine

Each command writes its sections of OUT/analysis.json, as numbers, and draws figures from all sections there.
"""
import copy
import math
import shlex
import sys
import timeit
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..adapter import AdapterLinear, remove_adapters
from ..bert import load_bert, read_config
from ..head import Classifier, freeze
from ..lora import merge_lora, remove_lora
from ..model import APPLY, Compute, predict
from ..tools import checkpoint, download, settings as options, texts
from ..tools.fast import processor
from ..tools.files import UserError, read_json, run_program, write_json
from . import plots, stats
from .memory import SENTENCES, TOKENS, make_model, memory
from .studies import label


# -- finding runs and their data --------------------------------------------------------------------------

def scorer(record, weights):
    """Read the data of a run again. Returns a function that gives 100 for each test sentence that a model classifies
    correctly, else 0; on the CPU, in the precision of the run. UserError if the data have changed."""
    corpus, _, _, test = texts.load_data(checkpoint.settings_of(record), weights, read_config(weights))
    if [texts.fingerprint(path) for path in corpus.files] != record["data_sha256"]:
        raise UserError(f"{corpus.files[-1]}: the data have changed since the run; restore them or train again")
    compute, sentences = Compute(precision=record["machine"]["precision"]), corpus.sentences(test)
    return lambda model: 100.0 * (predict(model, sentences, compute).argmax(1) == corpus.labels[test])


def find_runs(folder, free=("fold", "seed")):
    """The finished runs in a folder that differ in `free` settings only: {technique: {values of these: folder of the
    run}}. Of several such groups, the one with the fewest settings that are not the defaults. UserError if there is
    none."""
    groups = {}
    for path in sorted(Path(folder).glob("*/run.json")):
        record = checkpoint.read_record(path)
        if "failed" not in record:
            settings = record["settings"]
            default = options.defaults(settings["technique"])
            changed = {name: value for name, value in settings.items()
                       if name not in free and value != default.get(name)}
            group = groups.setdefault(settings["technique"], {}).setdefault((len(changed), repr(changed)), {})
            group[tuple(settings.get(name) for name in free)] = path.parent
    if not groups:
        raise UserError(f"{folder} holds no finished run; compare.py writes its runs to OUT/folders")
    return {technique: groups[technique][min(groups[technique])] for technique in groups}


# -- which layers matter ----------------------------------------------------------------------------------

WHOLE = (0, -1)  # no layer is without its adapters


def layer_spans(folder, weights=None):
    """Classify the test sentences of an adapter run without the adapters of layers first..last (Houlsby et al. 2019,
    figure 6, left). Norms keep their trained values.

    Returns {(first, last): (sentences,)}, each as of `scorer`; WHOLE: with all adapters.
    """
    model, record, weights = checkpoint.open_run(folder, weights)
    score, layers, correct = scorer(record, weights), len(model.encoder.layers), {}
    for first, last in [WHOLE, *((first, last) for last in range(layers) for first in range(last + 1))]:
        bare = copy.deepcopy(model)
        for module in bare.encoder.layers[first:last + 1].modules():
            if isinstance(module, AdapterLinear):
                module.adapter = nn.Identity()
        correct[first, last] = score(bare)
    return correct


def compare_spans(found, seeds=False):
    """Average what layer_spans returns over runs, and compare some of the spans.

    Returns complete (per cent), matrix[first][last] (per cent, None where first > last), the worst single layer, and
    paired differences in points, as in stats.compare.
    """
    means = {span: float(np.mean([run[span].mean() for run in found])) for span in found[0]}
    layers = 1 + max(last for _, last in means)
    worst, half = min(range(layers), key=lambda layer: means[layer, layer]), layers // 2
    pairs = {"worst single layer": ((worst, worst), WHOLE), "all layers": ((0, layers - 1), WHOLE),
             "lower half instead of upper half": ((0, half - 1), (half, layers - 1))}
    differences = {name: asdict(stats.compare([run[a] - run[b] for run in found], seeds=seeds, comparisons=layers + 2))
                   for name, (a, b) in pairs.items()}
    matrix = [[means.get((first, last)) for last in range(layers)] for first in range(layers)]
    return {"complete": means[WHOLE], "matrix": matrix, "runs": len(found), "worst": worst, "differences": differences}


# -- the spectrum of the update ---------------------------------------------------------------------------

def rank_of_energy(energies, share=0.9):
    """The smallest r with e_1 + ... + e_r >= share of the sum of all energies: squared singular values, largest
    first."""
    total = np.asarray(energies).cumsum()
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)) + 1)


def trained_matrices(encoder, weights):
    """Yield (name, W0, W, layer that holds W) for each linear layer of the blocks that was trained; float64."""
    for name, layer in load_bert(weights).named_modules():
        if name.startswith("layers.") and isinstance(layer, nn.Linear):
            tuned = encoder.get_submodule(name)
            before, after = layer.weight.detach().double(), tuned.weight.detach().double()
            if not torch.equal(before, after):
                yield name, before, after, tuned


def update_spectrum(folder, weights=None):
    """For each trained linear layer of the blocks, the rank that holds 90% of the energy of W - W0: {layer name:
    {"rank"}}. For runs of LoRA and full fine-tuning."""
    model, _, weights = checkpoint.open_run(folder, weights)
    merge_lora(model)
    return {name: {"rank": rank_of_energy(torch.linalg.svdvals(after - before) ** 2)}
            for name, before, after, _ in trained_matrices(model.encoder, weights)}


def ranks_by_block(spectra):
    """{kind of matrix: mean rank of 90% of the energy in each block, from the bottom}. spectra: of update_spectrum"""
    kinds = {}
    for name in spectra[0]:
        kind = name.split(".", 2)[2].replace("_", "-").replace(".", ", ")
        kinds.setdefault(kind, []).append(float(np.mean([run[name]["rank"] for run in spectra])))
    return kinds


def draw_ranks(found, path):
    """The rank that holds 90% of the energy of an update, for each block and kind of matrix."""
    panels = []
    for technique in ("full", "lora"):
        series = {kind: [plots.Point(block, rank) for block, rank in enumerate(ranks, 1)]
                  for kind, ranks in ranks_by_block(found[technique]).items()}
        panels.append(plots.Panel(series, "block, from the bottom", "rank", label(technique), log=False))
    return plots.series([panels], "how many singular values of an update W - W0 hold 90% of its squared norm; mean of "
                        f"{len(found['full'])} runs", path)


# -- cut the update to a low rank -------------------------------------------------------------------------

@torch.no_grad()
def cut_updates(folder, weights=None):
    """Classify the test sentences of a full fine-tuning run with the update of every matrix of the blocks cut to rank
    0, 1, 2, 4, ...; the last rank is the whole update. Returns {rank: accuracy in per cent}.

        W0 + U_r S_r V_r^T, with U S V^T = W - W0: no update of rank r is closer to W - W0 (Eckart & Young 1936)

    Embeddings, biases, norms and head stay as trained, also at rank 0.
    """
    model, record, weights = checkpoint.open_run(folder, weights)
    score = scorer(record, weights)
    parts = [(layer, before, torch.linalg.svd(after - before, full_matrices=False))
             for _, before, after, layer in trained_matrices(model.encoder, weights)]
    whole, accuracies = model.encoder.config.hidden_size, {}
    for rank in [0, *(2 ** power for power in range((whole - 1).bit_length())), whole]:
        for layer, before, (u, s, v) in parts:
            layer.weight.copy_(before + (u[:, :rank] * s[:rank]) @ v[:rank])
        accuracies[rank] = score(model).mean()
    return accuracies


def analyse_cuts(folder, weights=None):
    """The section "cut": the mean accuracy of full fine-tuning (per cent), and what changes (points, one a run) with
    its updates cut to a rank, or with LoRA trained at that rank on the same fold instead."""
    full = {repeat: cut_updates(run, weights) for repeat, run in find_runs(folder).get("full", {}).items()}
    if not full:
        raise UserError(f"{folder} holds no finished run of full fine-tuning: train.py full makes one")
    largest = max(map(max, full.values()))
    whole = {repeat: accuracies.pop(largest) for repeat, accuracies in full.items()}
    ranks = next(iter(full.values())).keys()
    changes = {"full": {rank: [full[repeat][rank] - whole[repeat] for repeat in full] for rank in ranks}, "lora": {}}
    for (*repeat, rank), run in find_runs(folder, ("fold", "seed", "rank")).get("lora", {}).items():
        if tuple(repeat) in full and rank in ranks:
            accuracy = 100 * checkpoint.read_record(run / checkpoint.RECORD)["metrics"]["test_accuracy"]
            changes["lora"].setdefault(rank, []).append(accuracy - whole[tuple(repeat)])
    return {"whole": np.mean(list(whole.values())), "largest": largest, "changes": changes}


def cut_intervals(found):
    """Yield (technique, rank, stats.Comparison with the whole update); with one run the interval is NaN."""
    for technique, changes in found["changes"].items():
        for rank, values in changes.items():
            one = stats.judge(values[0], math.nan, 1, 1)
            yield technique, str(rank), stats.paired(values) if len(values) > 1 else one


def draw_cut(found, path):
    """The accuracy of updates cut to a rank, beside LoRA trained at that rank."""
    series, whole = {}, found["whole"]
    for technique, rank, row in cut_intervals(found):
        if rank != "0":  # the axis is logarithmic
            point = plots.Point(int(rank), whole + row.mean, whole + row.low, whole + row.high)
            series.setdefault(technique, []).append(point)
    series["full"].append(plots.Point(found["largest"], whole))
    note = "full fine-tuning: updates of the blocks' matrices cut to this rank after training, all else as trained"
    if "lora" in series:
        note += "; LoRA: trained at this rank"
    return plots.series([[plots.Panel(series, "rank", "accuracy (%)")]], f"{note}\nband: 95% interval of the "
                        "difference from the whole update, over folds", path)


# -- one encoder, many tasks ------------------------------------------------------------------------------

REMOVE = {"head": lambda encoder: None, "adapter": remove_adapters, "lora": remove_lora}


def insert(encoder, folder, record):
    """Put the technique of a run and its saved tensors into an encoder. Returns the classifier in eval mode."""
    settings, path = checkpoint.settings_of(record), Path(folder) / "model.safetensors"
    top = record["settings"].get("top_layers")
    freeze(encoder)
    APPLY[settings.technique](encoder.layers[-top:] if top else encoder, settings)
    model = Classifier(encoder, len(record["classes"]), settings.pooling)
    checkpoint.fill(model, checkpoint.read_tensors(path)[0], path)
    return model.eval()


@torch.no_grad()
def share_encoder(folders, weights=None, rounds=11):
    """Load runs in turn into one encoder, and take each out again. {"encoder_mb", "rounds", "runs": [numbers]}

    A switch reads the saved file, inserts the technique, fills it, and takes it out; its time is the median of
    `rounds`. Raises AssertionError unless all logits are those of the run opened alone, and in the end every bit of the
    encoder that of the base weights; UserError for a run that changes the base weights, or is of other ones.
    """
    encoder, rows = None, []
    for folder in map(Path, folders):
        alone, record, weights = checkpoint.open_run(folder, weights)
        technique = record["settings"]["technique"]
        if technique not in REMOVE:
            raise UserError(f"{folder}: {technique} changes the base weights; choose runs of {', '.join(REMOVE)}")
        if encoder is None:
            encoder = load_bert(weights)
            before = copy.deepcopy(encoder.state_dict())
            ids = torch.arange(SENTENCES * TOKENS).view(SENTENCES, TOKENS) % encoder.config.vocab_size

        def switch():
            insert(encoder, folder, record)
            REMOVE[technique](encoder)

        assert torch.equal(insert(encoder, folder, record)(ids), alone(ids)), f"{folder}: other logits than alone"
        REMOVE[technique](encoder)
        rows.append({"name": folder.name, "technique": technique,
                     "saved_mb": (folder / "model.safetensors").stat().st_size / 1e6,
                     "whole_mb": sum(parameter.nbytes for parameter in alone.parameters()) / 1e6,
                     "switch_ms": 1000 * float(np.median(timeit.repeat(switch, number=1, repeat=rounds)))})
    after = encoder.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return {"encoder_mb": sum(tensor.nbytes for tensor in before.values()) / 1e6, "rounds": rounds, "runs": rows}


# -- memory and inference ---------------------------------------------------------------------------------

MEMORY = ("weights", "gradients", "optimiser_states", "activations")


def draw_memory(found, path):
    """Memory of a training step by purpose, for each technique."""
    bars = {name: {part.replace("optimiser_states", "moments"): numbers[part] / 1e6 for part in MEMORY}
            for name, numbers in found.items() if name in options.TECHNIQUES}
    return plots.memory(bars, f"{SENTENCES} sentences of {TOKENS} tokens, fp32; tensors counted in a step: the peak of "
                        "a process is higher", path)


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

def layers_numbers(found):
    yield "runs", found["runs"], None
    yield "with all adapters", f"{found['complete']:.1f}%", None
    for name, row in found["differences"].items():
        mean, low, high = (f"{row[end]:+.1f}" for end in ("mean", "low", "high"))
        yield f"removed: {name}", f"{mean} points [{low}, {high}] at {100 * row['level']:.4g}%", row["verdict"]


def spectrum_numbers(found):
    yield "runs of each", len(found["full"]), None
    for name in ("full", "lora"):
        blocks = list(zip(*ranks_by_block(found[name]).values()))
        for place, ranks in (("bottom", blocks[0]), ("top", blocks[-1])):
            yield f"rank for 90% of the energy, {name}, {place} block", f"{min(ranks):.0f} to {max(ranks):.0f}", None


def cut_numbers(found):
    yield "whole update", f"{found['whole']:.1f}%", None
    for technique, rank, row in cut_intervals(found):
        series = "cut to" if technique == "full" else "LoRA at"
        yield f"{series} rank {rank}", f"{row.text_with_level(1, ' points')}, runs: {row.runs}", None


def tasks_numbers(found):
    saved, whole = (sum(run[key] for run in found["runs"]) for key in ("saved_mb", "whole_mb"))
    yield "base weights after all switches", "the same bits", "confirmed"
    yield "one encoder and all saved files", f"{found['encoder_mb'] + saved:.1f} MB", None
    yield f"{len(found['runs'])} whole models", f"{whole:.1f} MB", None
    for run in found["runs"]:
        yield f"switch to {run['name']}", f"{run['switch_ms']:.1f} ms (median of {found['rounds']})", None


def memory_numbers(found):
    for name, parts in (("weights, gradients and optimiser states", MEMORY[:3]), ("activations", MEMORY[3:]),
                        ("together", MEMORY), ("FLOP in matrix products", ("forward_flop", "backward_flop"))):
        full, lora = (sum(found[technique][part] for part in parts) for technique in ("full", "lora"))
        yield f"LoRA / full, {name}", f"{lora / full:.2f}", None
    yield "time of a step", "in studies/techniques.md", None


def latency_numbers(found):
    yield "machine", found["machine"], None
    for size, times in found["times"].items():
        base = np.array(times["base"])
        yield f"batch {size}, base", f"{np.median(base):.1f} ms", None
        for name in list(VARIANTS)[1:]:
            row = stats.paired(100 * (np.array(times[name]) / base - 1), overlap=0, margin=None,
                               comparisons=len(found["times"]) * (len(VARIANTS) - 1), lower_is_better=True)
            yield f"batch {size}, {name}", row.text_with_level(1, "%"), row.verdict


CLAIMS = {  # section: the claim that it tests, its source, numbers
    "layers": ("adapters: no single layer matters much, all together do, lower layers less than upper ones",
               "Houlsby et al. 2019, section 3.6, figure 6 (left, centre)", layers_numbers),
    "spectrum": ("the update of full fine-tuning is low-rank", "Hu et al. 2021, section 4.1 (hypothesis); Biderman et "
                 "al. 2024, arXiv 2405.09673 (the opposite)", spectrum_numbers),
    "cut": ("an update of low rank suffices: full fine-tuning with its updates cut to a rank, after training",
            "Hu et al. 2021, section 4.1 (hypothesis)", cut_numbers),
    "tasks": ("one encoder serves many tasks; a switch replaces only what was trained",
              "Houlsby et al. 2019, section 1; Hu et al. 2021, section 4.2", tasks_numbers),
    "memory": ("LoRA needs up to two thirds less memory than full fine-tuning with Adam, and is 25% faster",
               "Hu et al. 2021, section 4.2", memory_numbers),
    "latency": ("merged LoRA costs nothing in inference; adapters slow it, most in small batches",
                "Hu et al. 2021, section 3 and table 1", latency_numbers)}
FIGURES = {"layers": ("removed.png", lambda found, path: plots.heat_map(found["matrix"], found["complete"], path)),
           "spectrum": ("spectrum.png", draw_ranks), "cut": ("cut.png", draw_cut),
           "memory": ("memory.png", draw_memory)}


def publish(out, content):
    """Draw the figures into OUT/figures. Returns the rows of the table of claims: (claim, how measured, numbers,
    verdicts). content: the sections of analysis.json; any others are ignored."""
    rows = []
    for section, (claim, source, numbers) in CLAIMS.items():
        if section not in content:
            continue
        found, link = content[section], ""
        if section in FIGURES:
            name, draw = FIGURES[section]
            draw(found, Path(out) / "figures" / name)
            link = f"[figure](figures/{name}), "
        numbers = list(numbers(found))
        verdicts = [f"{name}: {verdict}" for name, _, verdict in numbers if verdict]
        rows.append([f"{claim} ({source})", f"{link}`{found['command']}`",
                     "; ".join(f"{name}: {value}" for name, value, _ in numbers),
                     "; ".join(verdicts) or "none: measured only"])
    return rows


# -- measuring --------------------------------------------------------------------------------------------

def analyse_runs(folder, weights):
    """The sections "layers" and "spectrum", as far as there are runs for them."""
    found, sections = find_runs(folder), {}
    adapter, full, lora = (found.get(technique, {}) for technique in ("adapter", "full", "lora"))
    if adapter:
        seeds = any(fold is None for fold, _ in adapter)  # a test file, not folds
        sections["layers"] = compare_spans([layer_spans(run, weights) for run in adapter.values()], seeds)
    both = [repeat for repeat in full if repeat in lora]
    if both:
        sections["spectrum"] = {name: [update_spectrum(found[name][repeat], weights) for repeat in both]
                                for name in ("full", "lora")}
    return sections


def measure(given):
    """What the command line asks for, as sections of analysis.json: {name: numbers}"""
    weights = download.find_weights(given.weights)
    if given.latency:
        times = {str(size): latency(weights, size) for size in (1, SENTENCES)}
        machine = f"{processor('cpu')}, {torch.get_num_threads()} threads, fp32, {TOKENS} tokens"
        return {"latency": {"machine": machine, "times": times}}
    if given.tasks:
        return {"tasks": share_encoder(given.tasks, given.weights)}
    if given.cut:
        return {"cut": analyse_cuts(given.cut, weights)}
    if given.runs:
        return analyse_runs(given.runs, weights)
    return {"memory": {name: memory(name, weights) for name in options.TECHNIQUES}}


def main(arguments=None):
    """Write OUT/analysis.json and OUT/figures, and print the table of claims."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = options.Parser(prog="python -m minipeft.lab.analysis", description=(
        "Measure memory, or what finished runs have learnt; draw figures. Trains nothing."))
    parser.add_argument("--out", default="results", help="folder for analysis.json and figures (default: results)")
    parser.add_argument("--weights", metavar="FOLDER", help="the base weights of the runs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--runs", metavar="FOLDER", help="measure layers and spectra of the runs in a folder")
    what.add_argument("--cut", metavar="FOLDER", help="cut the updates of its full fine-tuning runs to low ranks")
    what.add_argument("--tasks", metavar="RUN", nargs="+", help="load runs in turn into one encoder")
    what.add_argument("--latency", action="store_true", help="measure inference; needs a quiet machine")
    given = parser.parse_args(arguments)
    path, command = Path(given.out) / "analysis.json", shlex.join(["python", "-m", "minipeft.lab.analysis", *arguments])
    content = read_json(path) if path.is_file() else {}
    for name, found in measure(given).items():
        content[name] = found | {"command": command}
    write_json(path, content)
    for claim, _, numbers, verdicts in publish(given.out, content):
        print(f"\n{claim}\n  {numbers}\n  {verdicts}")


if __name__ == "__main__":
    sys.exit(run_program("minipeft.lab.analysis", main))

"""Compare the techniques on equal footing: same folds, same head, same order of data, same schedule.

    python compare.py                 head, adapters, LoRA and full fine-tuning on three folds: tables and figures
    python compare.py --quick         a smoke test on 640 sentences; too short to rank the techniques
    python compare.py --study rank    test one claim of the papers (minipeft/lab/studies.py lists them)
    python compare.py --rates         search the learning rates on dev
    python compare.py --report        train nothing

Each run is a train.py run in a process of its own and leaves one record, OUT/runs/NAME.json. Existing records are
reused; an unfinished run resumes. Then it writes OUT/README.md and its figures from all records in OUT.
"""
import shlex
import sys
from pathlib import Path

from minipeft.lab.studies import LIMITS, PROTOCOL, SEARCHES, STUDIES, Contrast, label
from minipeft.tools import settings as options

QUICK = {"limit": 640, "epochs": 1}


def common_defaults():
    """The options that all runs of a comparison share, with their defaults."""
    parser = options.Parser()
    options.add_common(parser)
    return vars(parser.parse_args([]))


def parse(arguments):
    """Turn the command line into a Namespace; `common` has the options that all runs share. Mistakes exit with 2."""
    parser = options.Parser(prog="compare.py", description="Compare head tuning, adapters, LoRA and full fine-tuning.")
    whole = [name for name, search in SEARCHES.items() if search.accuracy and "limit" not in search.options]
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help=f"a smoke test: one fold, {QUICK['limit']} sentences, "
                      "one epoch")
    mode.add_argument("--study", nargs="+", choices=STUDIES, metavar="NAME", help=f"test claims: {', '.join(STUDIES)}")
    mode.add_argument("--rates", nargs="*", choices=SEARCHES, metavar="NAME", help="search learning rates on dev, on "
                      f"folds 0 to 2 (with --test: seeds): {', '.join(SEARCHES)} (default: {' '.join(whole)})")
    mode.add_argument("--report", action="store_true", help="train nothing: README.md and figures from the records")
    parser.add_argument("--folds", "--seeds", metavar="N", type=options.number(int, 1, 10),
                        help="test on N of the ten folds (default: 3; with --study, see minipeft/lab/studies.py); with "
                             "--test, which names the test set, repeat with N seeds (default: 1)")
    parser.add_argument("--jobs", metavar="N", type=options.count, default=1,
                        help="run N at a time, each on its share of the cores (default: 1, for reliable times)")
    parser.add_argument("--out", metavar="FOLDER", type=Path,
                        help="default: runs/comparison; runs/quick with --quick; results with --report")
    options.add_common(parser)
    chosen = parser.parse_args(arguments)
    if chosen.rates == []:
        chosen.rates = whole
    if chosen.folds and (chosen.quick or chosen.rates or chosen.report):
        parser.error("--folds and --seeds go with the main comparison or --study")
    if chosen.test and not chosen.data:
        parser.error("--test needs --data, with the same labels, to train on")
    chosen.folds = chosen.folds or (1 if chosen.quick or chosen.test else None if chosen.study else 3)
    chosen.study = chosen.study or ["techniques"]
    chosen.out = chosen.out or Path("results" if chosen.report else "runs/quick" if chosen.quick else "runs/comparison")

    planned = [SEARCHES[name] for name in chosen.rates or ()]
    planned = planned or [variant for name in chosen.study for variant in STUDIES[name].variants]
    default, taken = common_defaults(), set().union(*(plan.options for plan in planned), QUICK if chosen.quick else ())
    chosen.common = {name: getattr(chosen, name) for name in default}
    for name, value in chosen.common.items():
        if value != default[name] and (chosen.report or name in taken):
            parser.error(f"--{name.replace('_', '-')} is set by {'the records' if chosen.report else 'compare.py'} "
                         "here: leave it out")
    if chosen.quick:
        chosen.common |= QUICK
    return chosen


if __name__ == "__main__":
    CHOSEN = parse(sys.argv[1:])  # before the slow imports

from collections import Counter
from dataclasses import dataclass
from functools import partial

from numpy import nan

from minipeft.lab import plots, rates, stats
from minipeft.lab.runs import PATHS, Place, collect, find_place, machine, make_run, train_missing, word
from minipeft.tools import checkpoint
from minipeft.tools.files import UserError, read_json, write_text


# -- comparing --------------------------------------------------------------------------------------------

@dataclass
class Finding:
    """A contrast as measured, in points and in nats (None: no pair of runs). left_out: pairs with a failed run, or of
    two machines."""
    contrast: Contrast
    accuracy: stats.Comparison | None
    loss: stats.Comparison | None
    left_out: int = 0

    @property
    def name(self):
        return f"{label(self.contrast.a)} - {label(self.contrast.b)}"


def leaves_open(expected, found):
    """True if a comparison of accuracies does not settle what a claim expects (None: no claim)."""
    if expected == "equivalent":
        return "equivalent" not in found.verdict and found.low <= 1 and found.high >= -1
    return found.verdict == stats.INCONCLUSIVE


def measure(result, contrast):
    """The Finding of a contrast, from pairs of finished runs of one machine."""
    a, b = result.outcomes[contrast.a], result.outcomes[contrast.b]
    pairs = [(a[fold], b[fold]) for fold in result.folds if fold in a and fold in b]
    scores = [one.scores - other.scores for one, other in pairs if machine(one.record) == machine(other.record)]
    accuracy = loss = None
    if scores and scores[0].shape[1] > 1:
        rule = {"part": result.study.part, "seeds": "test" in pairs[0][0].record["settings"],
                "comparisons": len(result.study.contrasts)}
        accuracy, loss = zip(*scores)
        accuracy = stats.compare(accuracy, is_open=partial(leaves_open, contrast.expected), **rule)
        loss = stats.compare(loss, margin=None, lower_is_better=True, **rule)
    return Finding(contrast, accuracy, loss, len(result.folds) - len(scores))


def count_pairs(found):
    """How many pairs of runs a finding rests on, in words."""
    left_out = f", {found.left_out} left out (failed, or of two machines or precisions)" if found.left_out else ""
    if found.accuracy is None:
        return f"no pair of runs{left_out}"
    return ("one run" if found.accuracy.runs == 1 else f"{found.accuracy.runs} pairs") + left_out


def describe(found):
    """A finding in one line: differences, intervals and verdicts for accuracy and loss, and the number of pairs."""
    accuracy, loss = found.accuracy, found.loss
    if accuracy is None:
        return f"{found.name}: {count_pairs(found)}"
    return (f"{found.name}: {accuracy.mean:+.2f} points [{accuracy.low:+.2f}, {accuracy.high:+.2f}] at "
            f"{100 * accuracy.level:.4g}%, [{accuracy.low90:+.2f}, {accuracy.high90:+.2f}] at 90%: "
            f"{accuracy.verdict}; calibrated loss {loss.mean:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}]: "
            f"{loss.verdict}; {count_pairs(found)}")


def decided_by_loss(found):
    """True if a claim says which of two variants is better, accuracy is inconclusive, and calibrated loss is not."""
    return (found.contrast.expected in ("better", "worse") and found.accuracy.verdict == stats.INCONCLUSIVE
            and found.loss.verdict != stats.INCONCLUSIVE)


def verdict_on_claim(found):
    """The verdict on what a claim expects of a contrast."""
    expected, accuracy = found.contrast.expected, found.accuracy
    if accuracy is None:
        return "not measured"
    by_loss = decided_by_loss(found)
    measured, by = (found.loss.verdict, " by calibrated loss") if by_loss else (accuracy.verdict, "")
    if expected in measured:
        verdict = f"confirmed{by}" + (" (within 1 point)" if expected == "equivalent" else "")
    elif measured == stats.INCONCLUSIVE:
        verdict = accuracy.in_words
    elif expected == "equivalent" and leaves_open(expected, accuracy):
        verdict = f"{stats.INCONCLUSIVE} ({measured}, perhaps by less than 1 point)"
    else:
        against = "not confirmed" if measured.startswith("equivalent") else f"contradicted{by}"
        verdict = f"{against} ({measured})"
    return f"{verdict}, one run" if accuracy.runs == 1 else verdict


def brief(found):
    """The part of a finding that its verdict rests on, for the table of claims."""
    accuracy, loss = found.accuracy, found.loss
    if accuracy is None:
        return describe(found)
    low, high, level = accuracy.low, accuracy.high, accuracy.level
    if found.contrast.expected == "equivalent" or accuracy.verdict.startswith("equivalent"):
        low, high, level = accuracy.low90, accuracy.high90, 0.9
    text = f"{found.name}: {accuracy.mean:+.2f} points [{low:+.2f}, {high:+.2f}] at {100 * level:.4g}%"
    if decided_by_loss(found):
        text += f", calibrated loss {loss.mean:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}]"
    return f"{text}, {count_pairs(found)}"


# -- tables -----------------------------------------------------------------------------------------------

# Columns: {key of Outcome.numbers: (heading, format)}.
QUALITY = {"lr": ("learning rate", "g"), "technique": ("technique parameters", ",.0f"),
           "head": ("head parameters", ",.0f"), "share": ("trained", ".2%"),
           "train_accuracy": ("train accuracy", ".1%"), "dev_accuracy": ("dev accuracy", ".1%"),
           "accuracy": ("{} accuracy (%)", ".2f"), "calibrated": ("{} calibrated loss", ".4f"),
           "loss": ("{} raw loss", ".3f"), "error": ("{} calibration error", ".1%")}
COST = {"train_seconds": ("training (s)", ",.0f"), "step_milliseconds": ("a step (ms)", ",.0f"),
        "peak_memory_mb": ("peak memory (MB)", ",.0f"), "saved_mb": ("saved (MB)", ".2f")}
GAINS = {"accuracy": "gain kept", "calibrated": "gain kept in calibrated loss"}


def table(heading, rows):
    """A Markdown table, as lines."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in (heading, ["---"] * len(heading), *rows)]


def mean_std(outcomes, key):
    """(mean, standard deviation) of a number over runs; (nan, None) if it is unknown, None if all are equal."""
    values = [outcome.numbers[key] for outcome in outcomes if outcome.numbers[key] is not None]
    return stats.mean_std(values) if len(set(values)) > 1 else (values[0] if values else nan, None)


def cells(name, outcomes, columns):
    """A row: the name, the number of runs, and for each column their mean ± standard deviation."""
    row = [label(name), len(outcomes)]
    for key, (_, form) in columns.items():
        mean, std = mean_std(outcomes, key)
        row.append(f"{mean:{form}} ± {std:{form}}" if std else f"{mean:{form}}")
    return row


def gain_kept(outcomes, name, key):
    """How much of the gain from head tuning to full fine-tuning a technique keeps."""
    folds = outcomes[name].keys() & outcomes["head"].keys() & outcomes["full"].keys()
    own, head, full = (sum(outcomes[other][fold].numbers[key] for fold in folds) for other in (name, "head", "full"))
    return f"{round(100 * (own - head) / (full - head))}%" if full != head else ""


def quality_table(result, gains):
    """Size, accuracy, loss and calibration of each variant, as lines. gains: with the share of the gain kept."""
    outcomes, gains = result.outcomes, GAINS if gains and {"head", "full"} <= result.outcomes.keys() else {}
    rows = [[*cells(name, runs.values(), QUALITY), len(result.folds) - len(runs),
             *(gain_kept(outcomes, name, key) for key in gains)] for name, runs in outcomes.items()]
    headings = [heading.format(result.study.part) for heading, _ in QUALITY.values()]
    return table(["", "runs", *headings, "failed runs", *gains.values()], rows)


def on_one_machine(result):
    """(the machine with the most runs, {variant: its runs there}): what costs are averaged over."""
    def where_of(record):
        return *machine(record, "threads"), record["machine"].get("jobs", 1), record["versions"]["torch"]

    where = Counter(where_of(run.record) for runs in result.outcomes.values() for run in runs.values())
    [(most, _)] = where.most_common(1)
    groups = {name: [run for run in runs.values() if where_of(run.record) == most]
              for name, runs in result.outcomes.items()}
    words = "{}, {}, {}, threads: {}, runs at a time: {}, torch {}".format(*most)
    return words, {name: group for name, group in groups.items() if group}


# -- figures ----------------------------------------------------------------------------------------------

def shown_by_bars(findings, variants):
    """{variant: the finding that its error bar shows}, if one variant is the reference of all others; else {}."""
    shown = {}
    for found in findings:
        if found.accuracy:
            shown.setdefault(found.contrast.a, found)
    references = {found.contrast.b for found in shown.values()}
    return shown if len(references) == 1 and len(shown) == len(variants) - 1 else {}


def get_panels(result, shown, measure="accuracy"):
    """The points of a study: {panel: {series: points}}. Their bars are the intervals of the paired differences."""
    panels = {}
    for variant in result.study.variants:
        outcomes = result.outcomes[variant.name].values()
        if outcomes:
            y, x = mean_std(outcomes, measure)[0], variant.x or mean_std(outcomes, "trainable")[0]
            bar = shown[variant.name].accuracy if variant.name in shown else None
            point = plots.Point(x, y, y + bar.low - bar.mean, y + bar.high - bar.mean) if bar else plots.Point(x, y)
            panels.setdefault(variant.panel, {}).setdefault(variant.series or variant.name, []).append(point)
    return panels


def find_best(result):
    """For a study without contrasts: where each series has its highest accuracy and its lowest raw loss, as lines."""
    def best(measure, better):
        found = {}
        for panel, series in get_panels(result, {}, measure).items():
            for name, points in series.items():
                y = better(point.y for point in points)
                found[f"{panel}, {name}"] = " and ".join(f"{point.x:g}" for point in points if point.y == y)
        return found

    lowest = best("loss", min)
    return [f"{name}: highest {result.study.part} accuracy at {x}, lowest raw loss at {lowest[name]}"
            for name, x in best("accuracy", max).items()]


def explain_bars(shown):
    """What the error bars of a study are, in words; "" without any."""
    if not shown:
        return ""
    [reference] = {label(found.contrast.b) for found in shown.values()}
    level = 100 * next(iter(shown.values())).accuracy.level
    return (f"bars: {level:.4g}% interval of the paired difference to {reference};\n"
            f"a bar that includes the value of {reference}: no significant difference")


def draw_costs(result, path):
    """Training time and peak memory of each variant, on one machine."""
    (where, groups), costs = on_one_machine(result), {}
    for name, runs in groups.items():
        seconds, memory = mean_std(runs, "train_seconds"), mean_std(runs, "peak_memory_mb")
        costs[name] = plots.Cost(seconds[0], memory[0], seconds[1], memory[1])
    plots.costs(costs, where, path)


def draw(result, findings, place):
    """Draw the figures of a study. Returns their names."""
    study, names, references = result.study, [], {}

    def path(kind=""):
        names.append(f"{result.name}{kind}.png")
        return place.out / names[-1]

    if study.references and (main := collect(place, "techniques", result.folds)).folds == result.folds:
        references = {name: mean_std(main.outcomes[name].values(), "accuracy")[0] for name in ("head", "full")}
    if findings:
        shown = shown_by_bars(findings, study.variants)
        rows = {f"{label(found.contrast.a)}\n− {label(found.contrast.b)}": found.accuracy for found in findings
                if found.accuracy}
        note = explain_bars(shown)
        if rows and not shown:
            note = f"intervals of the differences: {result.name}-differences.png"
        plots.study(study.x_label, get_panels(result, shown), f"{study.part} accuracy (%)", path(), note, references)
        if rows:
            plots.differences(rows, study.part, path("-differences"))
    elif not study.contrasts:
        plots.study(study.x_label, get_panels(result, {}), f"{study.part} accuracy (%)", path())
        plots.study(study.x_label, get_panels(result, {}, "loss"), f"{study.part} raw loss (nats)", path("-loss"))
    if study.costs:
        histories = {name: [run.record["history"] for run in runs.values()] for name, runs in result.outcomes.items()}
        plots.learning_curves({name: runs for name, runs in histories.items() if runs}, path("-curves"))
        draw_costs(result, path("-costs"))
    return names


# -- report -----------------------------------------------------------------------------------------------

MEASURED = "none: measured only"
OPENING = "# Results\n\n`python compare.py --report"  # of every README.md that compare.py writes


def show(result, findings, place):
    """(the tables of a study as lines, the names of its figures, which are drawn). Without findings, both leave out
    what ranks the variants."""
    lines = [*quality_table(result, bool(findings)), ""]
    if result.study.costs:
        where, groups = on_one_machine(result)
        rows = [cells(name, runs, COST) for name, runs in groups.items()]
        lines += [f"Costs on {where}:", "", *table(["", "runs", *(text for text, _ in COST.values())], rows), ""]
    return lines, draw(result, findings, place)


def command_of(place, plans, *words):
    """The command line with these words that makes runs of this place. plans: the variants or searches that it runs,
    which set some options themselves."""
    words, default = list(words), common_defaults()
    taken = set().union(*(plan.options for plan in plans))
    for name, value in place.common.items():
        if value != default[name] and name not in taken:
            words += "--" + name.replace("_", "-"), word(value)
    return shlex.join(["python", "compare.py", *words, "--out", place.out.as_posix()])


def report_study(place, name, path=""):
    """(lines, claims) of a study; empty if no fold is complete. path: from README.md to the figures."""
    study, result = STUDIES[name], collect(place, name, range(10))
    if not any(result.outcomes.values()):
        return [], []
    quick = place.common.items() >= QUICK.items()
    findings = [] if quick else [measure(result, contrast) for contrast in study.contrasts]
    lines, figures = show(result, findings, place)
    lines += [f"![{figure}]({path}{figure})" for figure in figures]
    if quick:
        return ["These runs are too short to rank the techniques; python compare.py compares them.", "", *lines], []
    measured = [describe(found) for found in findings] or find_best(result)
    judged = [found for found in findings if found.contrast.expected]
    verdicts = [f"{found.name}: {verdict_on_claim(found)}" for found in judged] or [MEASURED]
    command = command_of(place, study.variants, "--study", name, "--folds", str(len(result.folds)))
    lines = [f"{study.claim} ({study.source}): `{command}`", "", *(f"- {line}" for line in measured),
             *(f"- Verdict: {line}" for line in verdicts), "", *lines]
    measured = [brief(found) for found in judged or findings] or measured
    return lines, [{"claim": study.claim, "source": study.source, "measured": "<br>".join(measured),
                    "verdict": "<br>".join(verdicts), "figure": path + figures[0], "command": command}]


def report_rates(place, path=""):
    """(lines, claims) of the learning rates whose search the records complete. path: from README.md to the figure."""
    chosen, rows, figures = rates.publish(place)
    if not chosen:
        return [], []
    command, claims = command_of(place, map(SEARCHES.get, chosen), "--rates", *chosen), []
    if {"lora", "full"} <= chosen.keys():
        by_accuracy, by_loss, highest = (chosen["lora"][rule] / chosen["full"][rule]
                                         for rule in ("accuracy", "loss", "highest"))
        claims = [{"claim": "LoRA's best learning rate is about ten times that of full fine-tuning",
                   "source": "Schulman 2025", "verdict": MEASURED, "figure": path + figures[0], "command": command,
                   "measured": f"{by_accuracy:g} times by the accuracy rule, {by_loss:g} by the loss rule, {highest:g} "
                               "by the highest dev accuracy; the grid has factors of 2, and alpha is 16"}]
    shown = [f"![{name}]({path}{name})" for name in figures]
    return [f"`{command}`", "", *table(rates.HEADING, rows), "", *shown], claims


def read_place(out):
    """The Place of the records in `out`. Its common settings, and precision, are those that all records share."""
    records = [checkpoint.read_record(path) for path in sorted((out / "runs").glob("*.json"))]
    if not records:
        raise UserError(f"{out / 'runs'} holds no records: name the folder of a comparison with --out, or run "
                        "python compare.py first")
    default, first = common_defaults(), records[0]
    shared = {name: value for name, value in first["settings"].items()
              if name in PATHS or name in default and all(record["settings"].get(name) == value for record in records)}
    precisions = {record["machine"]["precision"] for record in records}
    shared["precision"] = precisions.pop() if len(precisions) == 1 else "auto"
    return Place(out, default | shared, first["weights_sha256"], first["data_sha256"])


def inputs(place):
    """What two places must share to measure the same: settings but the precision, weights and data."""
    return place.common | {"precision": None}, place.weights_sha256, place.data_sha256


def check_readme(path):
    """UserError if `report` would replace a file that it did not write."""
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(OPENING):
        raise UserError(f"{path} was not written by compare.py: choose another --out")


def report_all(place, path="", but=()):
    """{heading: (lines, claims)} of every study, but those named, and of the learning rates. path: from README.md to
    the figures."""
    studies = {name: report_study(place, name, path) for name in STUDIES if name not in but}
    return studies | {"Learning rates": report_rates(place, path)}


def report(place):
    """Write README.md and every figure from the records of a place and of its subfolders (other data, another
    precision, a search), analysis.json and limits.md. Trains nothing. Returns the sections, {heading: lines}."""
    reports = report_all(place)
    claims = [row for _, rows in reports.values() for row in rows]
    if (place.out / "analysis.json").is_file():
        claims += read_json(place.out / "analysis.json", ["claims"])["claims"]
    for folder in sorted(path.parent for path in place.out.glob("*/runs")):
        part = read_place(folder)
        have = [name for name in STUDIES if reports[name][0]] if inputs(part) == inputs(place) else ()
        found = report_all(part, f"{folder.name}/", have)  # the runs of a search can complete a study that is here
        reports |= {f"{folder.name}: {heading}": lines for heading, lines in found.items()}
        claims += [{**row, "claim": f"{folder.name}: {row['claim']}"} for _, rows in found.values() for row in rows]
    rows = [[f"{row['claim']} ({row['source']})", row["measured"], row["verdict"],
             f"[figure]({row['figure']})" if row["figure"] else "", f"`{row['command']}`"] for row in claims]
    sections = {"Protocol": [PROTOCOL], "Claims": ["No study is complete yet."]}
    if rows:
        sections["Claims"] = table(["claim", "measured", "verdict", "figure", "command"], rows)
    sections |= {heading: lines for heading, (lines, _) in reports.items()}
    sections["Limits"] = [LIMITS]
    own = place.out / "limits.md"
    if own.is_file():
        sections["Limits"].append(own.read_text(encoding="utf-8").rstrip())
    out = shlex.quote(place.out.as_posix())
    text = [f"{OPENING} --out {out}` writes this file and its figures; it trains nothing."]
    for heading, lines in sections.items():
        if lines:
            text += ["", f"## {heading}", "", *lines]
    write_text(place.out / "README.md", "\n".join([*text, ""]))
    return sections


# -- main -------------------------------------------------------------------------------------------------

def main(chosen):
    """Train what is missing, write the report, and print what was asked for. Returns the exit code."""
    headings = ["Claims"] if chosen.report else ["Learning rates"] if chosen.rates else chosen.study
    try:
        check_readme(chosen.out / "README.md")
        place = read_place(chosen.out) if chosen.report else find_place(chosen.out, chosen.common)
        for name in chosen.rates or ():
            find = rates.search if SEARCHES[name].accuracy else rates.search_calibrated
            find(name, place, chosen.jobs)
        if not (chosen.rates or chosen.report):
            runs = [make_run(place, variant, fold, STUDIES[name].rule) for name in chosen.study
                    for variant in STUDIES[name].variants for fold in range(chosen.folds or STUDIES[name].folds)]
            train_missing(sorted(runs, key=lambda run: run.settings.seed), chosen.jobs)  # fold by fold, to have pairs
        sections = report(place)
        for heading in headings:
            if not sections[heading]:
                raise UserError(f"no run of {heading} has finished; see {place.out / 'runs'}")
            print("", heading, "", *sections[heading], sep="\n")
        print(f"\nwritten: {place.out / 'README.md'}")
        return 0
    except UserError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to resume in {chosen.out}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(CHOSEN))

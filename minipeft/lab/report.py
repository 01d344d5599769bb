"""The report of a comparison: verdicts, tables, figures and Markdown, all from records. It trains nothing."""
import os
import shlex
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from numpy import nan

from ..tools.files import UserError, read_json, write_text
from ..tools.settings import TECHNIQUES, common_defaults
from . import plots, rates, stats
from .runs import Place, collect, machine, read_place, word
from .studies import RULE_NAMES, RULES, SEARCHES, STUDIES, Contrast, Study, Variant, label

ENOUGH = 200  # test sentences, below which a comparison has no verdict
OPENING = "# Results\n\n`python compare.py --report"  # of every README.md that compare.py writes
TOO_SHORT = "These runs are too short to rank the techniques; python compare.py compares them."
NOT_SEARCHED = """\
Learning rates were **not searched** on this data: they are train.py's, found on movie reviews, and may favour one
technique. `{command}` searches them first."""
METHOD = """\
- Every technique has the same encoder, head, initialisation of the head, order of batches, schedule and epochs.
- {split}
- Learning rates are chosen on dev alone, {rates}. Test is read once, at the end of a run.
- Calibrated loss: log loss after dividing the logits by one number, the temperature, fitted on dev predictions.
- Intervals are paired over folds, Student's t. Folds share training sentences, so the variance of a mean of k folds is
  that of the differences times 1/k + 1/9 (Nadeau and Bengio 2003). On one test file, and for one run: over sentences.
- Two others show what depends on this choice: the plain paired t (variance / k), and sampling variance / k + run
  variance x (1/k + 1/9), as test parts share no sentence and only training sets overlap.
- With m contrasts in a study, better or worse: the interval at 1 - 0.05/m excludes zero; equivalent within 1 point: the
  interval at 1 - 0.10/m lies within 1 point of zero; else inconclusive. If accuracy is inconclusive, calibrated loss
  may say better or worse, and is named. No verdict below {enough} test sentences, or if no two runs differ.
- Two runs are compared only if processor, device and precision agree; costs are averaged on one machine only."""
LIMITS = """\
- ± is the standard deviation over runs, not an interval. Failed runs are counted, and left out of means.
- Intervals do not include the uncertainty of the choice of rates; neighbouring rates can be equally good on dev."""


# -- comparing --------------------------------------------------------------------------------------------

@dataclass
class Finding:
    """A contrast as measured: {kind of interval: stats.Comparison} in points of accuracy and nats of calibrated loss;
    matthews: the correlation x 100, if the study compares it. Empty if there is no pair of runs. left_out: pairs with a
    failed run, or of two machines."""
    contrast: Contrast
    accuracy: dict
    loss: dict
    matthews: stats.Comparison | None = None
    left_out: int = 0

    @property
    def name(self):
        """The two variants; what both begin with is said once."""
        a, b = label(self.contrast.a), label(self.contrast.b)
        shared = os.path.commonprefix([a, b]).rpartition(" ")[0]
        return f"{a} - {b[len(shared):].strip()}"

    @property
    def verdicts(self):
        """{kind of interval: verdict}: that on accuracy, or if it is inconclusive, that on calibrated loss."""
        words = {}
        for kind, accuracy in self.accuracy.items():
            words[kind] = accuracy.verdict
            if accuracy.verdict == stats.INCONCLUSIVE and self.loss[kind].verdict in ("better", "worse"):
                words[kind] = f"{self.loss[kind].verdict} in calibrated loss"
        return words


@dataclass
class Result:
    """A study in one place: {variant: {fold: Outcome, or None for a failed run}}, and what its contrasts have found."""
    name: str
    study: Study
    place: Place
    outcomes: dict
    findings: list

    def runs(self, variant):
        return [outcome for outcome in self.outcomes[variant].values() if outcome]

    def mean_std(self, variant, number, runs=None):
        """(mean, standard deviation) of a number over runs; (nan, None) if unknown, None if all are equal."""
        values = [run.numbers[number] for run in runs or self.runs(variant) if run.numbers[number] is not None]
        return stats.mean_std(values) if len(set(values)) > 1 else (values[0] if values else nan, None)


def measure(study, outcomes, contrast, comparisons=None):
    """The Finding of a contrast, from pairs of finished runs of one machine. comparisons: m (None: of the study)."""
    a, b = (outcomes.get(name, {}) for name in (contrast.a, contrast.b))
    both = [(a[fold], b[fold]) for fold in a if fold in b and a[fold] and b[fold]]
    pairs = [(one, other) for one, other in both if machine(one.record) == machine(other.record)]
    found = Finding(contrast, {}, {}, left_out=len(a.keys() & b.keys()) - len(pairs))
    if not pairs or len(pairs[0][0].accuracy) < 2:
        return found
    seeds, m = "test" in pairs[0][0].record["settings"], comparisons or len(study.contrasts)
    over_folds = len(pairs) > 1 and study.part == "test" and not seeds
    for kind in stats.INTERVALS if over_folds else ["corrected"]:
        rule = {"part": study.part, "seeds": seeds, "interval": kind, "comparisons": m}
        found.accuracy[kind] = stats.compare([one.accuracy - other.accuracy for one, other in pairs], **rule)
        found.loss[kind] = stats.compare([one.loss - other.loss for one, other in pairs], margin=None,
                                         lower_is_better=True, **rule)
        if sum(len(one.accuracy) for one, _ in pairs) < ENOUGH:
            for measured in (found.accuracy, found.loss):
                measured[kind] = replace(measured[kind], verdict=f"{stats.NO_VERDICT} below {ENOUGH} test sentences")
    if study.matthews and over_folds:
        found.matthews = stats.paired([one.numbers["matthews"] - other.numbers["matthews"] for one, other in pairs],
                                      comparisons=m, margin=None)
    return found


def find_results(places):
    """The Result of every study that the records of these places complete, in the order of STUDIES."""
    results = []
    for name, study in STUDIES.items():
        here = [places[folder] for folder in study.folders if folder in places]
        if "" in places and places[""].out.name in study.folders:
            here.append(places[""])
        for place in here:
            outcomes = collect(place, study)
            if outcomes:
                contrasts = () if place.quick else study.contrasts
                findings = [measure(study, outcomes, contrast) for contrast in contrasts]
                results.append(Result(name, study, place, outcomes, findings))
                break
    return results


def agree(verdicts):
    """(the verdict that all share, what it depends on: ""), or ("depends", "the rule" or "the interval" or both).

    verdicts: {(rule, kind of interval): verdict}
    """
    def differ(place):
        """True if verdicts with the same other choice differ."""
        groups = {}
        for choice, verdict in verdicts.items():
            groups.setdefault(choice[1 - place], set()).add(verdict)
        return any(len(group) > 1 for group in groups.values())

    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values())), ""
    return "depends", " and ".join(name for place, name in enumerate(("the rule", "the interval")) if differ(place))


def sensitivity(places):
    """The main contrasts by each rule for the rates: {(contrast, rule): Finding, or None if its runs do not exist}."""
    main, found = STUDIES["calibrated"], {}
    for contrast in main.contrasts:
        for rule in RULES:
            study = replace(main, variants=[Variant(name, name) for name in (contrast.a, contrast.b)], rule=rule,
                            partial=False)
            order = main.folders if rule == main.rule else reversed(main.folders)  # the other rules were run first
            runs = [collect(places[folder], study) for folder in order if folder in places]
            whole = [outcomes for outcomes in runs if outcomes and len(outcomes[contrast.a]) == main.folds]
            found[contrast, rule] = measure(main, whole[0], contrast) if whole else None
    return found


def agree_on(cells, contrast):
    """`agree` on one contrast of a sensitivity table, over all rules and intervals with runs."""
    return agree({(rule, kind): verdict for (one, rule), found in cells.items() if one == contrast and found
                  for kind, verdict in found.verdicts.items()})


# -- tables -----------------------------------------------------------------------------------------------

def markdown(rows):
    """A Markdown table, as lines. rows: of cells, the first the heading"""
    heading, *rest = rows
    return ["| " + " | ".join(map(str, row)) + " |" for row in (heading, ["---"] * len(heading), *rest)]


def aligned(rows, width=100):
    """A table for a terminal, as lines of at most `width` columns; the widest column is wrapped if need be."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    widest = max(range(len(widths)), key=widths.__getitem__)
    widths[widest] -= max(sum(widths) + 2 * (len(widths) - 1) - width, 0)
    lines = []
    for row in rows:
        parts = [textwrap.wrap(str(cell), room) or [""] for cell, room in zip(row, widths)]
        for step in range(max(map(len, parts))):
            cells = [part[step] if step < len(part) else "" for part in parts]
            lines.append("  ".join(f"{cell:<{room}}" for cell, room in zip(cells, widths)).rstrip())
    return lines


def signed(row, digits=2, inner=False):
    """A difference with its interval, as "+0.10 [-1.68, +1.88]"."""
    low, high = (row.inner_low, row.inner_high) if inner else (row.low, row.high)
    return f"{row.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


# Columns: {key of Outcome.numbers: (heading, format)}.
QUALITY = {"lr": ("learning rate", "g"), "technique": ("technique parameters", ",.0f"),
           "head": ("head parameters", ",.0f"), "share": ("trained", ".2%"),
           "train_accuracy": ("train accuracy", ".1%"), "dev_accuracy": ("dev accuracy", ".1%"),
           "accuracy": ("{} accuracy (%)", ".2f"), "calibrated": ("{} calibrated loss", ".4f"),
           "loss": ("{} raw loss", ".3f"), "error": ("{} calibration error", ".1%")}
MATTHEWS = {"matthews": ("{} Matthews correlation x 100", ".1f")}
COST = {"train_seconds": ("training (s)", ",.0f"), "step_milliseconds": ("a step (ms)", ",.0f"),
        "peak_memory_mb": ("peak memory (MB)", ",.0f"), "saved_mb": ("saved (MB)", ".2f")}
SHORT = {name: QUALITY[name] for name in ("lr", "share", "accuracy", "calibrated")} | {
    "train_seconds": COST["train_seconds"]}


def number_rows(result, columns, groups=None):
    """A table of means ± standard deviations, one row a variant. groups: {variant: runs} (None: all finished runs)"""
    rows = [["", "runs", *(heading.format(result.study.part) for heading, _ in columns.values())]]
    for name in groups or result.outcomes:
        runs, cells = groups[name] if groups else result.runs(name), []
        for number, (_, form) in columns.items():
            mean, std = result.mean_std(name, number, runs) if runs else (nan, None)
            cells.append(f"{mean:{form}} ± {std:{form}}" if std else f"{mean:{form}}")
        rows.append([label(name), len(runs), *cells])
    return rows


def quality_rows(result):
    """Size, accuracy, loss and calibration of each variant, and how many runs have failed."""
    columns = QUALITY | (MATTHEWS if result.study.matthews else {})
    if any(run.numbers["head_lr"] for name in result.outcomes for run in result.runs(name)):
        columns = {"lr": QUALITY["lr"], "head_lr": ("rate of the head", "g")} | columns
    heading, *rows = number_rows(result, columns)
    failed = [len(folds) - len(result.runs(name)) for name, folds in result.outcomes.items()]
    return [[*heading, "failed runs"], *([*row, number] for row, number in zip(rows, failed))]


def contrast_rows(findings):
    """All that is known of each contrast."""
    rows = [["contrast", "accuracy (points)", "for equivalence", "verdict", "calibrated loss", "verdict",
             "verdicts by the other intervals", "pairs"]]
    for found in findings:
        pairs = f"{found.left_out} left out (failed, or of two machines)" if found.left_out else ""
        if not found.accuracy:
            rows.append([found.name, *[""] * 6, f"none; {pairs}" if pairs else "none"])
            continue
        accuracy, loss, (_, *others) = found.accuracy["corrected"], found.loss["corrected"], found.verdicts.values()
        levels = [f"{signed(accuracy, 2, inner)} at {100 * level:.4g}%"
                  for inner, level in ((False, accuracy.level), (True, 2 * accuracy.level - 1))]
        number = "one run" if accuracy.runs == 1 else str(accuracy.runs)
        rows.append([found.name, *levels, accuracy.verdict, signed(loss, 4), loss.verdict, "; ".join(others),
                     f"{number}; {pairs}" if pairs else number])
        if found.matthews:
            rows.append([f"{found.name}, Matthews correlation x 100", signed(found.matthews), "",
                         found.matthews.verdict, "", "", "", number])
    return rows


def said(found):
    """The verdict of a finding, by the main interval, in words."""
    if not found.accuracy:
        return stats.NO_VERDICT
    verdict = found.verdicts["corrected"]
    return f"{verdict}, one run" if found.accuracy["corrected"].runs == 1 else verdict


def short_rows(findings):
    """The contrasts for a terminal."""
    return [["", "accuracy (points)", "verdict"], *(
        [found.name, signed(found.accuracy["corrected"]) if found.accuracy else "no pair of runs", said(found)]
        for found in findings)]


def on_one_machine(result):
    """(the machine with the most runs, {variant: its runs there}): what costs are averaged over."""
    def where_of(run):
        return *machine(run.record, "threads"), run.record["machine"].get("jobs", 1), run.record["versions"]["torch"]

    groups = {name: result.runs(name) for name in result.outcomes}
    [(most, _)] = Counter(where_of(run) for runs in groups.values() for run in runs).most_common(1)
    groups = {name: [run for run in runs if where_of(run) == most] for name, runs in groups.items()}
    words = "{}, {}, {}, threads: {}, runs at a time: {}, torch {}".format(*most)
    return words, {name: runs for name, runs in groups.items() if runs}


def best_rows(result):
    """For a study without contrasts: where each series is best."""
    rows = [["", "lowest calibrated loss at", "highest accuracy at"]]
    for panel, measures in panels_of(result).items():
        for name, points in measures["calibrated"].items():
            most = max(point.y for point in measures["accuracy"][name])
            rows.append([f"{panel}, {name}", f"{min(points, key=lambda point: point.y).x:g}",
                         " and ".join(f"{point.x:g}" for point in measures["accuracy"][name] if point.y == most)])
    return rows


# -- figures ----------------------------------------------------------------------------------------------

def data_name(place):
    return Path(place.common["data"]).name if place.common["data"] else "movie reviews"


def row_of(name, compared, text="", colour=plots.INK):
    return plots.Row(name, compared.mean, compared.low, compared.high, compared.inner_low, compared.inner_high, text,
                     colour)


def forest_rows(findings):
    return [row_of(found.name.replace(" - ", " − "), found.accuracy["corrected"],
                   f"{signed(found.accuracy['corrected'])}  {said(found)}") for found in findings if found.accuracy]


def panels_of(result):
    """The points of a study: {panel: {"accuracy" or "calibrated": {series: points}}}. A point of accuracy has the
    interval of its difference to the reference, if the study has one reference for all others."""
    bars = {found.contrast.a: found.accuracy["corrected"] for found in result.findings if found.accuracy}
    single = len({found.contrast.b for found in result.findings}) == 1
    panels = {}
    for variant in result.study.variants:
        for number in ("accuracy", "calibrated") if result.runs(variant.name) else ():
            y, _ = result.mean_std(variant.name, number)
            bar = bars.get(variant.name) if single and number == "accuracy" else None
            ends = (y + bar.low - bar.mean, y + bar.high - bar.mean) if bar else (None, None)
            points = panels.setdefault(variant.panel, {}).setdefault(number, {})
            points.setdefault(variant.series or variant.name, []).append(plots.Point(variant.x, y, *ends))
    return panels


def draw(result, figures):
    """Draw the figures of a study. Returns their names."""
    study, names, where = result.study, [], f"{data_name(result.place)}, {result.study.part}"

    def path(kind=""):
        names.append(f"{result.name}{kind}.png")
        return figures / names[-1]

    rows = forest_rows(result.findings)
    if rows:
        level = 100 * next(found.accuracy["corrected"].level for found in result.findings if found.accuracy)
        plots.forest({"": rows}, "difference in accuracy (points)", f"{where}. Thin line: {level:.4g}% interval; "
                     f"thick: {2 * level - 100:.4g}%, which decides on equivalence (shaded: ±1 point)",
                     path("-differences"))
    if study.x_label:
        number, y_label = ("accuracy", "accuracy (%)") if study.contrasts else ("calibrated", "calibrated loss (nats)")
        panels, note = {name: measures[number] for name, measures in panels_of(result).items()}, where
        low = high = None
        if study.contrasts and rows:
            note += f"; bars: {level:.4g}% interval of the paired difference to {label(study.contrasts[0].b)}"
        elif number == "calibrated":  # a run that has not learnt anything would hide all others
            low, high = plots.scale_of_best({(panel, name): points for panel, series in panels.items()
                                             for name, points in series.items()}, min, 0.3)
            note += "; triangle at the edge: off the scale"
        plots.series([[plots.Panel(series, study.x_label, y_label, panel, low=low, high=high)
                       for panel, series in panels.items()]], note, path())
    if study.costs:
        histories = {name: [run.record["history"] for run in result.runs(name)] for name in result.outcomes}
        note = "; line: mean over runs; band: smallest to largest" if max(map(len, histories.values())) > 1 else ""
        plots.learning_curves({name: runs for name, runs in histories.items() if runs}, data_name(result.place) + note,
                              path("-curves"))
    return names


# -- Markdown ---------------------------------------------------------------------------------------------

def command_of(place, plans, *words):
    """The command line with these words that makes runs of this place. plans: the variants or searches that it runs,
    which set some options themselves."""
    words, default = list(words), common_defaults()
    taken = set().union(*(plan.options for plan in plans))
    for name, value in place.common.items():
        if value != default[name] and name not in taken:
            words += "--" + name.replace("_", "-"), word(value)
    return shlex.join(["python", "compare.py", *words, "--out", place.out.as_posix()])


def study_page(result, figures):
    """The page of a study, as lines. figures: the names of its figures"""
    study, folds = result.study, max(map(len, result.outcomes.values()))
    lines = [f"# {result.name}", "", f"{study.question} ({study.source})", "",
             f"`{command_of(result.place, study.variants, '--study', result.name, '--folds', str(folds))}`", ""]
    lines += [f"Rates: {RULES[study.rule]}.", ""]
    if study.caveat:
        lines += [f"Mind: {study.caveat}.", ""]
    absent = [label(variant.name) for variant in study.variants if variant.name not in result.outcomes]
    if absent:
        lines += [f"Not run: {', '.join(absent)}.", ""]
    if result.place.quick:
        lines += [TOO_SHORT, ""]
    elif study.contrasts:
        lines += [*markdown(contrast_rows(result.findings)), ""]
    else:
        lines += [*markdown(best_rows(result)), ""]
    lines += [*markdown(quality_rows(result)), ""]
    if study.costs:
        words, groups = on_one_machine(result)
        lines += [f"Costs on {words}:", "", *markdown(number_rows(result, COST, groups)), ""]
    return [*lines, *(f"![{name}](../figures/{name})" for name in figures)]


def rates_page(places, figures):
    """The page of the searches of learning rates, as lines; [] without any. Draws their figure."""
    chosen = [["search", "runs", *(f"{rule}: {words}" for rule, words in RULES.items())]]
    tried, drawn = [["search", "rate", "dev accuracy", "raw loss", "calibrated loss"]], {}
    for name, search in SEARCHES.items():
        found = rates.find(places[search.folder], name) if search.folder in places else {}
        scores = rates.average(found)
        if not scores:
            continue
        means, shares = rates.over_sentences(scores), rates.bootstrap(scores)
        picks = [f"{rate:g} ({shares[rule].get(rate, 0):.0%})" for rule, rate in rates.choose(means).items()]
        chosen.append([name, sum(map(len, found.values())), *picks])
        tried += [[name, f"{rate:g}", f"{row.accuracy:.2%}", f"{row.loss:.4f}", f"{row.calibrated:.4f}"]
                  for rate, row in means.items()]
        if name in TECHNIQUES:
            drawn[name] = means
    if len(chosen) == 1:
        return []
    if drawn:
        panels = []
        for number, y_label, better, scale, rule in (
                ("accuracy", "dev accuracy (%)", max, 100, "highest"),
                ("calibrated", "calibrated dev loss (nats)", min, 1, "calibrated")):
            series = {name: [plots.Point(rate, scale * getattr(row, number)) for rate, row in means.items()]
                      for name, means in drawn.items()}
            low, high = plots.scale_of_best(series, better, 0.05 if better is max else 0.2)
            panels.append([plots.Panel(series, "learning rate", y_label, low=low, high=high,
                                       ringed={name: rates.choose(means)[rule] for name, means in drawn.items()})])
        plots.series(panels, "mean of folds 0 to 2; ring: the best; triangle at the edge: off the scale",
                     figures / "rates.png", (9, 8))
    return ["# Learning rates", "", "Searched on dev, folds 0 to 2. In brackets: how often the rule chooses this rate "
            "if the dev sentences are drawn anew (bootstrap).", "", *markdown(chosen), "",
            *(["![rates.png](../figures/rates.png)", ""] if drawn else []), *markdown(tried)]


def sensitivity_lines(cells, places, figures):
    """The verdicts on the main contrasts and the table of what they depend on, as lines. Draws its figure."""
    shares = {}
    for name in TECHNIQUES:
        place = places.get(SEARCHES[name].folder)
        scores = rates.average(rates.find(place, name)) if place else {}
        shares[name] = rates.bootstrap(scores) if scores else {}

    def rate_and_share(name, rule):
        rate = getattr(SEARCHES[name], rule)
        return f"{rate:g}" + (f" ({shares[name][rule].get(rate, 0):.0%})" if shares[name] else "")

    rows = [["", "rule for the rates", "rates (how often a bootstrap of dev chooses them)", "accuracy (points)",
             *stats.INTERVALS.values(), "calibrated loss"]]
    panels, lines = {}, []
    for (contrast, rule), found in cells.items():
        name = f"{label(contrast.a)} - {label(contrast.b)}"
        if rule == next(iter(RULES)):
            verdict, depends = agree_on(cells, contrast)
            lines.append(f"- {name}: **{verdict}**" + (f" on {depends}" if depends else ""))
        row = [name, RULE_NAMES[rule], " - ".join(rate_and_share(one, rule) for one in (contrast.a, contrast.b))]
        if found:
            row += [signed(found.accuracy["corrected"]), *found.verdicts.values(), signed(found.loss["corrected"], 4)]
        rows.append(row if found else [*row, "not run", *[""] * (len(stats.INTERVALS) + 1)])
        panel = panels.setdefault(name.replace(" - ", "\n− "), {})
        measured = found.accuracy.values() if found else ()
        panel[textwrap.fill(RULE_NAMES[rule], 10)] = [row_of("", one) for one in measured]
    plots.sensitivity(panels, dict(zip(stats.INTERVALS.values(), ("#332288", "#d55e00", "#009e73"))),
                      "difference in test accuracy (points); thin line: for a difference, thick: for equivalence "
                      "(shaded: ±1 point)", figures / "sensitivity.png")
    return [*lines, "", "![What the verdicts depend on](figures/sensitivity.png)", "", *markdown(rows)]


def claim_rows(results, cells, out):
    """The table of claims, one claim a row."""
    rows = [["claim", "ours", "difference in accuracy (points)", "verdict", "depends on"]]
    for result in results:
        for found in result.findings:
            if not found.contrast.claim:
                continue
            if result.name == "calibrated":
                verdict, depends = agree_on(cells, found.contrast)
            else:
                verdict, (_, depends) = said(found), agree({("", kind): word for kind, word in found.verdicts.items()})
            difference = "not run by this rule"
            if found.accuracy:
                accuracy = found.accuracy["corrected"]
                inner = accuracy.verdict.startswith("equivalent")
                level = 2 * accuracy.level - 1 if inner else accuracy.level
                difference = f"{signed(accuracy, 2, inner)} at {100 * level:.4g}%"
            rows.append([found.contrast.claim, f"[{result.name}](studies/{result.name}.md): {found.name}", difference,
                         verdict, "; ".join(part for part in (depends, result.study.caveat) if part)])
    if (out / "analysis.json").is_file():
        for row in read_json(out / "analysis.json", ["claims"])["claims"]:
            link = f"[figure]({row['figure']}), " if row["figure"] else ""
            rows.append([f"{row['claim']} ({row['source']})", f"{link}`{row['command']}`", row["measured"],
                         row["verdict"], ""])
    return rows


def describe_method(results):
    """The method of these runs, in words."""
    place = results[0].place
    record = next(run.record for runs in results[0].outcomes.values() for run in runs.values() if run)
    sizes = ", ".join(f"{record['sentences'][part]:,} {words}" for part, words in (
        ("train", "training"), ("dev", "dev"), ("test", "test")))
    split = (f"Data: {data_name(place)}; the first run has {sizes} sentences. The hash of a text puts it into one of "
             "eleven parts.\n  Part 10 is dev; fold i tests on part i, the other nine are for training.")
    if place.common["test"]:
        split = (f"Data: {data_name(place)}, tested on {Path(place.common['test']).name}: {sizes} sentences. The hash "
                 "of a text\n  decides whether it is dev. Runs differ in their seed.")
    if place.rates:
        words = "by a search on this data: factors of 4, fold 0, the lowest calibrated loss"
    elif place.common["data"]:
        words = "on the movie reviews, not on this data"
    else:
        words = "on folds 0 to 2, by factors of 2;\n  main rule: the lowest calibrated loss; the others are beside it"
    return METHOD.format(split=split, rates=words, enough=ENOUGH)


def read_places(out):
    """The places of the records in `out` and in its subfolders: {"": Place, name of the subfolder: Place}."""
    places = {folder.name: read_place(folder) for folder in sorted(path.parent for path in out.glob("*/runs"))}
    return places | {"": read_place(out)} if (out / "runs").is_dir() or not places else places


def check_readme(path):
    """UserError if `report` would replace a file that it did not write."""
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(OPENING):
        raise UserError(f"{path} was not written by compare.py: choose another --out")


def own_text(out, name):
    """What the folder says itself, in OUT/NAME.md, as lines: its answer, method or limits."""
    path = out / f"{name}.md"
    return path.read_text(encoding="utf-8").rstrip().splitlines() if path.is_file() else []


def not_searched(result):
    """A warning if the rates are train.py's, which were found on other data; else ""."""
    if result.study.rule != "doubling" or not result.place.common["data"] or result.place.rates:
        return ""
    return NOT_SEARCHED.format(command=command_of(result.place, [], "--search"))


def tables(result, form):
    """A study in two short tables, as lines. form: `markdown` or `aligned`"""
    if result.place.quick:
        lines = [TOO_SHORT]
    else:
        lines = form(short_rows(result.findings) if result.findings else best_rows(result))
    return [*lines, "", *form(number_rows(result, SHORT))]


def in_terminal(result):
    """A study as lines of at most 100 columns."""
    lines = textwrap.wrap(f"{result.name}, on {data_name(result.place)}: {result.study.question}", 100)
    lines += textwrap.wrap(not_searched(result).replace("*", "").replace("`", ""), 100)
    return [*lines, "", *tables(result, aligned)]


def report(out):
    """Write OUT/README.md, OUT/studies/ and OUT/figures/ from the records in OUT and its subfolders. Trains nothing.
    Returns the Results."""
    places = read_places(out)
    results, figures = find_results(places), out / "figures"
    for folder in (figures, out / "studies"):
        folder.mkdir(exist_ok=True)
    lines = [f"{OPENING} --out {shlex.quote(out.as_posix())}` writes this file, studies/ and figures/; it trains "
             "nothing.", ""]
    for result in results:
        if result.place.out == out and not_searched(result):
            lines += [not_searched(result), ""]
    lines += [*own_text(out, "answer"), ""]
    drawn = {result.name: draw(result, figures) for result in results}
    for result in results:
        write_text(out / "studies" / f"{result.name}.md", "\n".join([*study_page(result, drawn[result.name]), ""]))
    groups = {result.name: forest_rows(result.findings) for result in results if result.study.part == "test"}
    groups = {name: rows for name, rows in groups.items() if rows}
    if len(groups) > 1:
        plots.forest(groups, "difference in test accuracy (points)", "thin line: for a difference; thick: for "
                     "equivalence (shaded: ±1 point); arrow: beyond the axis", figures / "contrasts.png", (-6, 6))
        lines += ["![All contrasts](figures/contrasts.png)", ""]
    cells = sensitivity(places)
    if sum(bool(found) for found in cells.values()) > len(RULES):
        lines += ["## What the verdicts depend on", "", *sensitivity_lines(cells, places, figures), ""]
    else:
        for result in results:
            lines += [f"## {result.name}", "", *tables(result, markdown), "",
                      *(f"![{name}](figures/{name})" for name in drawn[result.name]), ""]
    claims = claim_rows(results, cells, out)
    if len(claims) > 1:
        lines += ["## Claims", "", *markdown(claims), ""]
    if results:
        lines += ["## Method", "", describe_method(results), *own_text(out, "method"), "", "## Limits", "",
                  *own_text(out, "limits"), LIMITS, "", "## Studies", ""]
    searches = rates_page(places, figures)
    if searches:
        write_text(out / "studies" / "learning-rates.md", "\n".join([*searches, ""]))
        lines += ["- [learning rates](studies/learning-rates.md)"]
    lines += [f"- [{result.name}](studies/{result.name}.md): {result.study.question}" for result in results]
    write_text(out / "README.md", "\n".join([*lines, ""]))
    return results

"""The report of a comparison: verdicts, tables, figures and Markdown, all from records. It trains nothing."""
import shlex
import textwrap
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from ..tools.files import UserError, read_json, write_text
from ..tools.settings import TECHNIQUES
from . import analysis, plots, rates, stats
from .runs import Place, collect, machine, read_place
from .studies import RULE_NAMES, RULES, SEARCHES, STUDIES, Contrast, Study, label

ENOUGH = 200  # test sentences, below which a comparison has no verdict
OPENING = "# Results\n\n`python compare.py --report"  # of every README.md that compare.py writes
TOO_SHORT = "These runs are too short to rank the techniques; python compare.py compares them."
NOT_SEARCHED = """\
Learning rates were **not searched** on this data: they are train.py's, found on movie reviews, and may favour one
technique. Add `--search` to the command to search them first."""
METHOD = """\
- Every technique has the same encoder, head, initialisation of the head, order of batches, schedule and epochs.
- Data: {data}: {sizes} sentences in the first run. {split}
- Learning rates are chosen on dev alone, {rates}. Test is read once, at the end of a run.
- Calibrated loss: log loss after dividing the logits by one number, the temperature, fitted on dev predictions.
- Intervals are paired over folds, Student's t. Folds share training sentences, so the variance of a mean of k folds is
  that of the differences times 1/k + 1/9 (Nadeau and Bengio 2003). On one test file, and for one run: over sentences.
- Two others show what depends on this choice: the plain paired t (variance / k), and sampling variance / k + run
  variance x (1/k + 1/9), as test parts share no sentence and only training sets overlap.
- With m contrasts in a study, better or worse: the interval at 1 - 0.05/m excludes zero; equivalent within 1 point: the
  interval at 1 - 0.10/m lies within 1 point of zero; else inconclusive. If accuracy is inconclusive, calibrated loss
  may say better or worse, and is named. No verdict below {enough} test sentences, or if no two runs differ.
- Two runs are compared only if processor, device and precision agree; costs are averaged on one machine only.
"""
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
    def verdicts(self):
        """{kind of interval: verdict}: that on accuracy, or if it is inconclusive, that on calibrated loss."""
        words = {}
        for kind, accuracy in self.accuracy.items():
            words[kind] = accuracy.verdict
            if accuracy.verdict == stats.INCONCLUSIVE and self.loss[kind].verdict in ("better", "worse"):
                words[kind] = f"{self.loss[kind].verdict} in calibrated loss"
        return words

    @property
    def verdict(self):
        """The verdict by the main interval, in words."""
        if not self.accuracy:
            return stats.NO_VERDICT
        return self.verdicts["corrected"] + (", one run" if self.accuracy["corrected"].runs == 1 else "")


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


def measure(study, outcomes, contrast):
    """The Finding of a contrast, from pairs of finished runs of one machine."""
    folds = list(zip(*(outcomes.get(name, {}).values() for name in (contrast.a, contrast.b))))
    pairs = [(a, b) for a, b in folds if a and b and machine(a.record) == machine(b.record)]
    found = Finding(contrast, {}, {}, left_out=len(folds) - len(pairs))
    sizes = [len(a.accuracy) for a, _ in pairs]
    if not pairs or min(sizes) < 2:
        return found
    seeds, m = "test" in pairs[0][0].record["settings"], len(study.contrasts)
    over_folds = len(pairs) > 1 and study.part == "test" and not seeds
    for kind in stats.INTERVALS if over_folds else ["corrected"]:
        rule = {"part": study.part, "seeds": seeds, "interval": kind, "comparisons": m}
        accuracy = stats.compare([a.accuracy - b.accuracy for a, b in pairs], **rule)
        loss = stats.compare([a.loss - b.loss for a, b in pairs], margin=None, lower_is_better=True, **rule)
        if sum(sizes) < ENOUGH:
            words = f"{stats.NO_VERDICT} below {ENOUGH} test sentences"
            accuracy, loss = replace(accuracy, verdict=words), replace(loss, verdict=words)
        found.accuracy[kind], found.loss[kind] = accuracy, loss
    if study.matthews and over_folds:
        found.matthews = stats.paired([a.numbers["matthews"] - b.numbers["matthews"] for a, b in pairs],
                                      comparisons=m, margin=None)
    return found


def find_pair(places, study, contrast):
    """The outcomes of the two variants of a contrast, from the first folder with runs of both on all folds; else {}."""
    pair = [variant for variant in study.variants if variant.name in (contrast.a, contrast.b)]
    for folder in study.folders:
        outcomes = collect(places[folder], replace(study, variants=pair, partial=False)) if folder in places else {}
        if outcomes and len(outcomes[contrast.a]) == study.folds:
            return outcomes
    return {}


def find_results(places):
    """The Result of every study that the records of these places complete, in the order of STUDIES. A contrast with a
    variant that was not run there is measured where both were run."""
    results = []
    for name, study in STUDIES.items():
        for place in [places[folder] for folder in study.folders if folder in places]:
            outcomes = collect(place, study)
            if outcomes:
                findings = []
                for contrast in () if place.quick else study.contrasts:
                    here = {contrast.a, contrast.b} <= outcomes.keys()
                    findings.append(measure(study, outcomes if here else find_pair(places, study, contrast), contrast))
                results.append(Result(name, study, place, outcomes, findings))
                break
    return results


def agree(verdicts):
    """(the verdict that all share, ""), or ("depends", what it depends on: "the rule", "the interval" or both).

    verdicts: {(rule, kind of interval): verdict}. It depends on the rule if two rules differ for one interval.
    """
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values())), ""
    differing = [(a, b) for a, b in combinations(verdicts, 2) if verdicts[a] != verdicts[b]]
    causes = []
    if any(a[1] == b[1] for a, b in differing):
        causes.append("the rule")
    if any(a[0] == b[0] for a, b in differing):
        causes.append("the interval")
    return "depends", " and ".join(causes)


def sensitivity(places):
    """The main contrasts by each rule for the rates: {(contrast, rule): Finding, or None if its runs do not exist}."""
    main, found = STUDIES["calibrated"], {}
    for contrast in main.contrasts:
        for rule in RULES:
            outcomes = find_pair(places, replace(main, rule=rule), contrast)
            found[contrast, rule] = measure(main, outcomes, contrast) if outcomes else None
    return found


def agree_on(cells, contrast):
    """`agree` on one contrast of a sensitivity table, over all rules and intervals with runs."""
    verdicts = {}
    for (one, rule), found in cells.items():
        if one == contrast and found:
            verdicts |= {(rule, kind): verdict for kind, verdict in found.verdicts.items()}
    return agree(verdicts)


# -- tables -----------------------------------------------------------------------------------------------

def markdown(rows):
    """A Markdown table. rows: of cells, the first the heading"""
    heading, *rest = rows
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (heading, ["---"] * len(heading), *rest))


def aligned(rows):
    """A table for a terminal."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


# Columns: {key of Outcome.numbers: (heading, format)}.
QUALITY = {"lr": ("learning rate", "g"), "technique": ("technique parameters", ",.0f"),
           "head": ("head parameters", ",.0f"), "share": ("trained", ".2%"),
           "train_accuracy": ("train accuracy", ".1%"), "dev_accuracy": ("dev accuracy", ".1%"),
           "accuracy": ("{} accuracy (%)", ".2f"), "calibrated": ("{} calibrated loss", ".4f"),
           "loss": ("{} raw loss", ".3f")}
COST = {"train_seconds": ("training (s)", ",.0f"), "step_milliseconds": ("a step (ms)", ",.0f"),
        "peak_memory_mb": ("peak memory (MB)", ",.0f"), "saved_mb": ("saved (MB)", ".2f")}
SHORT = {"lr": ("lr", "g"), "share": ("trained", ".2%"), "accuracy": ("accuracy (%)", ".2f"),
         "calibrated": ("calibrated loss", ".4f"), "train_seconds": ("training (s)", ",.0f")}


def mean_std(runs, number):
    """(mean, standard deviation) of a number over runs; None for an unknown mean, and if all are equal."""
    values = [run.numbers[number] for run in runs if run.numbers[number] is not None]
    if len(set(values)) > 1:
        return stats.mean_std(values)
    return values[0] if values else None, None


def number_rows(result, columns, groups=None):
    """A table of means ± standard deviations, one row a variant. groups: {variant: runs} (None: all finished runs)"""
    groups = groups or {name: result.runs(name) for name in result.outcomes}
    rows = [["", "runs", *(heading.format(result.study.part) for heading, _ in columns.values())]]
    for name, runs in groups.items():
        row = [label(name), len(runs)]
        for number, (_, form) in columns.items():
            mean, std = mean_std(runs, number)
            row.append("–" if mean is None else f"{mean:{form}} ± {std:{form}}" if std else f"{mean:{form}}")
        rows.append(row)
    return rows


def quality_rows(result):
    """Size, accuracy, loss and calibration of each variant, and how many runs have failed."""
    columns = dict(QUALITY)
    if any(run.numbers["head_lr"] for name in result.outcomes for run in result.runs(name)):
        columns["head_lr"] = ("rate of the head", "g")
    if result.study.matthews:
        columns["matthews"] = ("{} Matthews correlation x 100", ".1f")
    failed = [len(folds) - len(result.runs(name)) for name, folds in result.outcomes.items()]
    return [[*row, last] for row, last in zip(number_rows(result, columns), ("failed runs", *failed))]


def contrast_rows(findings):
    """All that is known of each contrast."""
    rows = [["contrast", "accuracy (points)", "for equivalence", "verdict", "calibrated loss", "verdict",
             "verdicts by the other intervals", "pairs"]]
    for found in findings:
        name, left_out = found.contrast.name, ""
        if found.left_out:
            left_out = f"; {found.left_out} left out (failed, or of two machines)"
        if not found.accuracy:
            rows.append([name, *[""] * 6, f"none{left_out}"])
            continue
        accuracy, loss, (_, *others) = found.accuracy["corrected"], found.loss["corrected"], found.verdicts.values()
        pairs = "one run" if accuracy.runs == 1 else accuracy.runs
        rows.append([name, accuracy.text_with_level(), accuracy.inner.text_with_level(), accuracy.verdict,
                     loss.text(4), loss.verdict, "; ".join(others), f"{pairs}{left_out}"])
        if found.matthews:
            rows.append([f"{name}, Matthews correlation x 100", found.matthews.text(), "", found.matthews.verdict, "",
                         "", "", pairs])
    return rows


def short_rows(findings):
    """The contrasts for a terminal."""
    return [["", "accuracy (points)", "verdict"], *(
        [found.contrast.name, found.accuracy["corrected"].text() if found.accuracy else "no pair of runs",
         found.verdict] for found in findings)]


def on_one_machine(result):
    """(the machine with the most runs, {variant: its runs there}): what costs are averaged over."""
    groups = {}
    for name in result.outcomes:
        for run in result.runs(name):
            where = (*machine(run.record, "threads"), run.record["machine"].get("jobs", 1),
                     run.record["versions"]["torch"])
            groups.setdefault(where, {}).setdefault(name, []).append(run)
    most = max(groups, key=lambda where: sum(map(len, groups[where].values())))
    return "{}, {}, {}, threads: {}, runs at a time: {}, torch {}".format(*most), groups[most]


# -- figures ----------------------------------------------------------------------------------------------

def data_name(place):
    return Path(place.common["data"]).name if place.common["data"] else "movie reviews"


def draw(result, figures):
    """Draw the figures of a study. Returns their names."""
    study, names = result.study, []
    if study.x_label:
        names.append(f"{result.name}.png")
        panels = {}
        for variant in study.variants:
            if result.runs(variant.name):
                point = plots.Point(variant.x, mean_std(result.runs(variant.name), "calibrated")[0])
                panels.setdefault(variant.panel, {}).setdefault(variant.series, []).append(point)
        plots.series([[plots.Panel(series, study.x_label, "calibrated loss (nats)", name)
                       for name, series in panels.items()]], f"{data_name(result.place)}, {study.part}",
                     figures / names[-1], not study.contrasts)
    if study.costs:
        names.append(f"{result.name}-curves.png")
        histories = {name: [run.record["history"] for run in result.runs(name)] for name in result.outcomes}
        note = "; line: mean over runs; band: smallest to largest" if max(map(len, histories.values())) > 1 else ""
        plots.learning_curves({name: runs for name, runs in histories.items() if runs}, data_name(result.place) + note,
                              figures / names[-1])
    return names


def draw_contrasts(results, path):
    """Draw the contrasts of some studies on test; of the two main studies one. False if there are none."""
    names, groups = {result.name for result in results}, {}
    for result in results:
        rows = [plots.Row(found.contrast.name.replace(" - ", " − "), found.accuracy["corrected"],
                          f"{found.accuracy['corrected'].text()}  {found.verdict}")
                for found in result.findings if found.accuracy]
        if rows and result.study.part == "test" and not (result.name == "techniques" and "calibrated" in names):
            groups[result.study.title or result.name] = rows
    if groups:
        plots.forest(groups, "difference in test accuracy (points)", "thin line: for a difference; thick: for "
                     "equivalence (shaded: ±1 point); arrow: beyond the axis", path)
    return bool(groups)


# -- Markdown ---------------------------------------------------------------------------------------------

def paragraphs(blocks):
    """Join blocks of Markdown that are not empty, with an empty line after each."""
    return "".join(f"{block}\n\n" for block in blocks if block)


def study_page(result, figures):
    """The page of a study. Draws its figures."""
    study, place, runs = result.study, result.place, [run for name in result.outcomes for run in result.runs(name)]
    absent = [label(variant.name) for variant in study.variants if variant.name not in result.outcomes]
    blocks = [f"# {result.name}", f"{study.question} ({study.source})", f"Rates: {RULES[study.rule]}.",
              f"Mind: {study.caveat}." if study.caveat else "", f"Not run: {', '.join(absent)}." if absent else "",
              TOO_SHORT if place.quick else ""]
    if runs:
        blocks.append(f"`python compare.py --study {result.name} --out {shlex.quote(place.out.as_posix())}`, with the "
                      f"options of its runs, such as `{runs[0].record['command']}`.")
    if result.findings:
        blocks.append(markdown(contrast_rows(result.findings)))
    blocks.append(markdown(quality_rows(result)))
    if study.costs and runs:
        words, groups = on_one_machine(result)
        blocks += [f"Costs on {words}:", markdown(number_rows(result, COST, groups))]
    return paragraphs(blocks) + "".join(f"![{name}](../figures/{name})\n" for name in draw(result, figures))


def find_searches(places):
    """The searches of learning rates that have records: {name: rates.Searched}."""
    found = {name: rates.summarise(places[search.folder], name) for name, search in SEARCHES.items()
             if search.folder in places}
    return {name: search for name, search in found.items() if search}


def rates_page(searches, figures):
    """The page of the searches of learning rates. Draws their figure."""
    chosen = [["search", "runs", *(f"{rule}: {words}" for rule, words in RULES.items())]]
    tried, drawn, ringed = [["search", "rate", "dev accuracy", "raw loss", "calibrated loss"]], {}, {}
    for name, search in searches.items():
        chosen.append([name, search.runs, *(search.text(rule, rate) for rule, rate in search.picks.items())])
        tried += [[name, f"{rate:g}", f"{row.accuracy:.2%}", f"{row.loss:.4f}", f"{row.calibrated:.4f}"]
                  for rate, row in search.means.items()]
        if name in TECHNIQUES:
            drawn[name] = [plots.Point(rate, row.calibrated) for rate, row in search.means.items()]
            ringed[name] = search.picks["calibrated"]
    figure = ""
    if drawn:
        panel = plots.Panel(drawn, "learning rate", "calibrated dev loss (nats)", ringed=ringed)
        plots.series([[panel]], "mean of folds 0 to 2; ring: the best", figures / "rates.png", zoom=True)
        figure = "![rates.png](../figures/rates.png)"
    return paragraphs([
        "# Learning rates", "Searched on dev, folds 0 to 2. In brackets: how often the rule chooses this rate if the "
        "dev sentences are drawn anew (bootstrap).", markdown(chosen), figure]) + markdown(tried) + "\n"


def sensitivity_blocks(cells, searches, figures):
    """The verdicts on the main contrasts and the table of what they depend on. Draws its figure."""
    def rate(name, rule):
        value = getattr(SEARCHES[name], rule)
        return searches[name].text(rule, value) if name in searches else f"{value:g}"

    rows = [["", "rule for the rates", "rates (how often a bootstrap of dev chooses them)", "accuracy (points)",
             *stats.INTERVALS.values(), "calibrated loss"]]
    panels, verdicts = {}, []
    for (contrast, rule), found in cells.items():
        numbers, measured = ["not run", *[""] * (len(stats.INTERVALS) + 1)], []
        if found:
            numbers = [found.accuracy["corrected"].text(), *found.verdicts.values(), found.loss["corrected"].text(4)]
            measured = list(found.accuracy.values())
        rows.append([contrast.name, RULE_NAMES[rule], f"{rate(contrast.a, rule)} - {rate(contrast.b, rule)}", *numbers])
        panels.setdefault(contrast.name.replace(" - ", "\n− "), {})[textwrap.fill(RULE_NAMES[rule], 10)] = measured
    plots.sensitivity(panels, dict(zip(stats.INTERVALS.values(), ("#332288", "#d55e00", "#009e73"))),
                      "difference in test accuracy (points); thin line: for a difference, thick: for equivalence "
                      "(shaded: ±1 point)", figures / "sensitivity.png")
    for contrast in STUDIES["calibrated"].contrasts:
        verdict, depends = agree_on(cells, contrast)
        verdicts.append(f"- {contrast.name}: **{verdict}**" + (f" on {depends}" if depends else ""))
    return ["## What the verdicts depend on", "\n".join(verdicts),
            "![What the verdicts depend on](figures/sensitivity.png)", markdown(rows)]


def claim_rows(results, cells, out):
    """The table of claims, one claim a row. Draws the figures of OUT/analysis.json."""
    rows = [["claim", "ours", "difference in accuracy (points)", "verdict", "depends on"]]
    for result in results:
        for found in result.findings:
            if not found.contrast.claim:
                continue
            if result.name == "calibrated":
                verdict, depends = agree_on(cells, found.contrast)
            else:
                verdict, (_, depends) = found.verdict, agree_on({(found.contrast, ""): found}, found.contrast)
            difference = "not run by this rule"
            if found.accuracy:
                accuracy = found.accuracy["corrected"]
                decides = accuracy.inner if accuracy.verdict.startswith("equivalent") else accuracy
                difference = decides.text_with_level()
            rows.append([found.contrast.claim, f"[{result.name}](studies/{result.name}.md): {found.contrast.name}",
                         difference, verdict, "; ".join(filter(None, (depends, result.study.caveat)))])
    path = out / "analysis.json"
    if path.is_file():
        rows += [[*row, ""] for row in analysis.publish(out, read_json(path))]
    return rows


def describe_method(results):
    """The method of these runs, in words."""
    place = results[0].place
    first = next(iter(place.records.values()))
    sizes = "{train:,} training, {dev:,} dev, {test:,} test".format(**first["sentences"])
    split = ("The hash of a text puts it\n  into one of eleven parts. Part 10 is dev; fold i tests on part i, the "
             "other nine are for training.")
    if place.common["test"]:
        split = f"Test: {Path(place.common['test']).name}. Runs differ in their seed."
    words = "on folds 0 to 2, by factors of 2;\n  main rule: the lowest calibrated loss; the others are beside it"
    if place.rates:
        words = "by a search on this data: factors of 4, fold 0, the lowest calibrated loss"
    elif place.common["data"]:
        words = "on the movie reviews, not on this data"
    return METHOD.format(data=data_name(place), sizes=sizes, split=split, rates=words, enough=ENOUGH)


# -- the whole report -------------------------------------------------------------------------------------

def read_places(out):
    """The places of the records in `out`, named "" and as the folder, and in its subfolders: {name: Place}."""
    places = {folder.name: read_place(folder) for folder in sorted(path.parent for path in out.glob("*/runs"))}
    if (out / "runs").is_dir() or not places:
        place = read_place(out)
        places = {out.resolve().name: place} | places | {"": place}
    return places


def check_readme(path):
    """UserError if `report` would replace a file that it did not write."""
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(OPENING):
        raise UserError(f"{path} was not written by compare.py: choose another --out")


def own_text(out, name):
    """What the folder says itself, in OUT/NAME.md: its answer, method or limits."""
    path = out / f"{name}.md"
    return path.read_text(encoding="utf-8").rstrip() + "\n" if path.is_file() else ""


def warning(result):
    """A warning if the runs are a smoke test, or if their rates are train.py's, which were found on other data."""
    place = result.place
    if place.quick:
        return TOO_SHORT
    searched = result.study.rule != "doubling" or place.rates or not place.common["data"]
    return "" if searched else NOT_SEARCHED


def tables(result, form):
    """A study in short tables. form: `markdown` or `aligned`"""
    contrasts = [form(short_rows(result.findings))] if result.findings else []
    return "\n\n".join([*contrasts, form(number_rows(result, SHORT))])


def in_terminal(result):
    """A study for a terminal."""
    title = textwrap.fill(f"{result.name}, on {data_name(result.place)}: {result.study.question}", 100)
    mind = textwrap.fill(warning(result).replace("*", "").replace("`", ""), 100)
    return "\n".join(filter(None, (title, mind))) + f"\n\n{tables(result, aligned)}"


def report(out):
    """Write OUT/README.md, OUT/studies/ and OUT/figures/ from the records in OUT and its subfolders. Trains nothing.
    Returns the Results."""
    places, figures = read_places(out), out / "figures"
    results, searches, cells = find_results(places), find_searches(places), sensitivity(places)
    blocks = [f"{OPENING} --out {shlex.quote(out.as_posix())}` writes this file, studies/ and figures/; it trains "
              "nothing.", *dict.fromkeys(warning(result) for result in results if result.place.out == out),
              own_text(out, "answer").rstrip()]
    if draw_contrasts(results, figures / "contrasts.png"):
        blocks.append("![All contrasts](figures/contrasts.png)")
    tasks = [result for result in results if result.name in ("calibrated", "cola")]
    if len(tasks) > 1:
        draw_contrasts(tasks, figures / "differences.png")  # of README.md
    if sum(bool(found) for found in cells.values()) > len(RULES):
        blocks += sensitivity_blocks(cells, searches, figures)
    else:
        for result in results:
            blocks += [f"## {result.name}", tables(result, markdown)]
    claims = claim_rows(results, cells, out)
    if len(claims) > 1:
        blocks += ["## Claims", markdown(claims)]
    if results:
        blocks += ["## Method", (describe_method(results) + own_text(out, "method")).rstrip(), "## Limits",
                   own_text(out, "limits") + LIMITS, "## Studies"]
    index = []
    if searches:
        write_text(out / "studies" / "learning-rates.md", rates_page(searches, figures))
        index.append("- [learning rates](studies/learning-rates.md)\n")
    for result in results:
        write_text(out / "studies" / f"{result.name}.md", study_page(result, figures))
        index.append(f"- [{result.name}](studies/{result.name}.md): {result.study.question}\n")
    write_text(out / "README.md", paragraphs(blocks) + "".join(index))
    return results

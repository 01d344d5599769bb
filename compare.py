"""Compare the techniques on equal footing: same folds, same head, same order of data, same schedule.

    python compare.py                                 head, adapters, LoRA and full fine-tuning on three folds
    python compare.py --search --data my.csv --out runs/mine    your data: search each learning rate on dev first
    python compare.py --quick                         a smoke test on 640 sentences; too short to rank the techniques
    python compare.py --study rank                    a study of minipeft/lab/studies.py
    python compare.py --rates lora                    search a learning rate on folds 0 to 2
    python compare.py --report                        train nothing

Each run is a train.py process and leaves one record, OUT/runs/NAME.json. Existing records are reused; an unfinished run
resumes. Then OUT/README.md, OUT/studies/ and OUT/figures/ are written from all records in OUT.
"""
import signal
import sys
from pathlib import Path

from minipeft.lab.studies import QUICK, RULES, SEARCHES, STUDIES
from minipeft.tools import settings as options

options.share_cores()  # before torch starts its threads


def parse(arguments):
    """Turn the command line into a Namespace; `common` has the options that all runs share. Mistakes exit with 2."""
    parser = options.Parser(prog="compare.py", description="Compare head tuning, adapters, LoRA and full fine-tuning.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help=f"a smoke test: one fold, {QUICK['limit']} sentences, "
                      "one epoch")
    mode.add_argument("--search", action="store_true", help="search the learning rate of each technique on this data "
                      "first: on dev, fold 0, by factors of 4")
    mode.add_argument("--study", nargs="+", choices=STUDIES, metavar="NAME", help=f"answer questions: "
                      f"{', '.join(STUDIES)}")
    mode.add_argument("--rates", nargs="*", choices=SEARCHES, metavar="NAME", help="search learning rates on dev, on "
                      "folds 0 to 2 (with --test: seeds), by minipeft/lab/studies.py (default: of each technique)")
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
        chosen.rates = list(options.TECHNIQUES)
    if chosen.folds and (chosen.quick or chosen.rates or chosen.report):
        parser.error("--folds and --seeds go with the main comparison or --study")
    if chosen.test and not chosen.data:
        parser.error("--test needs --data, with the same labels, to train on")
    chosen.folds = chosen.folds or (1 if chosen.quick or chosen.test else None if chosen.study else 3)
    if not chosen.study:
        chosen.study = [] if chosen.rates else ["techniques"]
    chosen.out = chosen.out or Path("results" if chosen.report else "runs/quick" if chosen.quick else "runs/comparison")

    taken = set(QUICK if chosen.quick else ())
    for name in chosen.rates or ():
        taken |= SEARCHES[name].options.keys()
    for name in chosen.study:
        taken = taken.union(*(variant.options for variant in STUDIES[name].variants))
    default = options.common_defaults()
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

from dataclasses import replace

from minipeft.lab import rates, report
from minipeft.lab.runs import COMPARISON, find_place, make_run, train_missing
from minipeft.tools.files import run_program, write_json


def train(chosen):
    """Train what the command line asks for and is missing."""
    place = find_place(chosen.out, chosen.common)
    for name in chosen.rates or ():
        rates.search_rate(place, name, SEARCHES[name], chosen.jobs)
        found = rates.summarise(place, name)
        for rule, rate in found.picks.items():
            print(f"{name}, {RULES[rule]}: {found.text(rule, rate)}")
    if chosen.rates:
        return
    studies = [STUDIES[name] for name in chosen.study]
    if chosen.search:
        for name in [variant.technique for variant in studies[0].variants]:
            search = replace(SEARCHES[name], start=options.TECHNIQUES[name].lr, factor=4)
            place.rates[name] = rates.search_rate(place, name, search, chosen.jobs, folds=[0])
        write_json(chosen.out / COMPARISON, {"rates": place.rates})
    runs = [make_run(place, variant, fold, study.rule) for study in studies for variant in study.variants
            for fold in range(chosen.folds or study.folds)]
    train_missing(sorted(runs, key=lambda run: run.settings.seed), chosen.jobs)  # fold by fold, to have pairs


def main(chosen):
    """Train what is missing, write the report, and print what was asked for. Returns the exit code."""
    try:
        report.check_readme(chosen.out / "README.md")
        if not chosen.report:
            train(chosen)
        results = report.report(chosen.out)
        for result in results[:1] if chosen.report else [one for one in results if one.name in chosen.study]:
            print(f"\n{report.in_terminal(result)}")
        print(f"\nwritten: {chosen.out / 'README.md'}")
        return 0
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to resume in {chosen.out}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end too
    sys.exit(run_program("compare.py", main, CHOSEN))

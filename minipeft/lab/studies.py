"""The papers' claims as data: the learning rates, the runs that test a claim, and the contrasts between them."""
from dataclasses import dataclass, field, replace

from ..tools.settings import LINEAR_LAYERS, TECHNIQUES


# -- learning rates ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Search:
    """The learning rates of a technique with these options. start: where the search begins; accuracy, loss, calibrated:
    what was chosen by each rule (None: not searched by it). A technique's rate by accuracy is train.py's default.
    option: what is searched, "lr" or "head_lr", in steps of `factor`."""
    technique: str
    start: float
    accuracy: float | None = None
    loss: float | None = None
    options: dict = field(default_factory=dict)
    calibrated: float | None = None
    option: str = "lr"
    factor: float = 2


TOP_BLOCK, TOP_TWO_BLOCKS = {"top_layers": 1}, {"top_layers": 2}
FEW = {sentences: {"limit": sentences, "epochs": 20, "eval_every": 20}  # measuring dev takes longer than an epoch
       for sentences in (86, 431)}  # 1 and 5%; 60 and 280 steps
SEARCHES = {
    "head": Search("head", 8e-3, 8e-3, 8e-3, calibrated=8e-3),
    "adapter": Search("adapter", 5e-4, 1e-3, 5e-4, calibrated=2e-3),
    "lora": Search("lora", 5e-4, 5e-4, 2.5e-4, calibrated=5e-4),
    "bitfit": Search("bitfit", 4e-3, 2e-3, 4e-3, calibrated=4e-3),
    "full": Search("full", 5e-5, 2.5e-5, 1.25e-5, calibrated=2.5e-5),
    "top-block": Search("full", 2e-4, 2e-4, 4e-4, TOP_BLOCK),
    "top-two-blocks": Search("full", 2e-4, 2e-4, 1e-4, TOP_TWO_BLOCKS),
    "adapter-86": Search("adapter", 5e-4, 2.5e-4, 2.5e-4, FEW[86]),
    "lora-86": Search("lora", 5e-4, 2.5e-4, 1.25e-4, FEW[86]),
    "full-86": Search("full", 5e-5, 5e-5, 2.5e-5, FEW[86]),
    "adapter-431": Search("adapter", 5e-4, 1.25e-4, 6.25e-5, FEW[431]),
    "lora-431": Search("lora", 5e-4, 5e-4, 6.25e-5, FEW[431]),
    "full-431": Search("full", 5e-5, 5e-5, 6.25e-6, FEW[431]),
    # A rate of its own for the head (results/protocol.md): the head's rate, then the body's once more.
    "adapter-head": Search("adapter", 2e-3, options={"lr": 2e-3}, option="head_lr", factor=4),
    "lora-head": Search("lora", 2e-3, options={"lr": 5e-4}, option="head_lr", factor=4),
    "full-head": Search("full", 4e-4, options={"lr": 2.5e-5}, option="head_lr", factor=4),
    # CoLA: is a sentence grammatical?
    "cola-head": Search("head", 8e-3),
    "cola-adapter": Search("adapter", 1e-3),
    "cola-lora": Search("lora", 5e-4),
    "cola-bitfit": Search("bitfit", 4e-3),
    "cola-full": Search("full", 5e-5),
}


# -- studies ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Variant:
    """One setting, run on several folds. search: the search that its learning rate comes from, unless `options` has
    "lr" (None: that of its technique). series, x, panel: its place in the figure (series None: its own; x None: the
    number of trained parameters)."""
    name: str
    technique: str
    options: dict = field(default_factory=dict)
    search: str | None = None
    series: str | None = None
    x: float | str | None = None
    panel: str = ""


@dataclass(frozen=True)
class Contrast:
    """Two variants, by name. expected: what the claim predicts for a compared with b, "better", "worse", "equivalent"
    (within 1 point), or None where it predicts nothing."""
    a: str
    b: str
    expected: str | None = None


@dataclass(frozen=True)
class Study:
    """A claim and its test. folds: how many `--study` runs. rule: of the learning rates. part: what is judged, "test"
    or "dev". references: draw head tuning and full fine-tuning as lines. costs: publish costs and learning curves."""
    claim: str
    source: str
    x_label: str
    variants: list
    contrasts: list
    folds: int = 5
    rule: str = "accuracy"
    part: str = "test"
    references: bool = False
    costs: bool = False


def label(name):
    """Return the name of a variant in tables: the label of a technique, or its own name."""
    return TECHNIQUES[name].label if name in TECHNIQUES else name


def vary(technique, option, values, kind=float, word=None):
    """One variant for each value of an option, which names call `word`. kind: str for categories on the x axis."""
    return [Variant(f"{label(technique)}, {word or option} {value:g}", technique, {option: value}, series=technique,
                    x=kind(value)) for value in values]


def with_few(technique, sentences):
    return Variant(f"{label(technique)}, {sentences} sentences", technique, FEW[sentences], f"{technique}-{sentences}",
                   series=technique, x=sentences)


def lora_on(name, rank, targets):
    return Variant(f"{name}, rank {rank}", "lora", {"targets": targets, "rank": rank}, series="lora",
                   x=f"{name}\nrank {rank}")


def constant_and_growing_alpha(ranks=(1, 8, 64), rates=(6.25e-5, 2.5e-4, 1e-3, 4e-3)):
    """Two rules for alpha. At rank 8 both give alpha 16: the same runs."""
    return [Variant(f"{panel}, rank {rank}, lr {lr:g}", "lora", {"rank": rank, "alpha": alpha(rank), "lr": lr},
                    series=f"rank {rank}", x=lr, panel=panel)
            for panel, alpha in (("alpha = 16", lambda rank: 16.0), ("alpha = 2 rank", lambda rank: 2.0 * rank))
            for rank in ranks for lr in rates]


HEAD, ADAPTER, LORA, BITFIT, FULL = (Variant(name, name) for name in ("head", "adapter", "lora", "bitfit", "full"))
TOP_ONE = Variant("top block", "full", TOP_BLOCK, "top-block")
TOP_TWO = Variant("top two blocks", "full", TOP_TWO_BLOCKS, "top-two-blocks")
PARAMETERS = "trained parameters, head included"
MAIN = Study(
    "LoRA and adapters match full fine-tuning (Houlsby et al.: within 0.4 points)",
    "Houlsby et al. 2019, abstract and table 1; Hu et al. 2021, table 2", PARAMETERS, [HEAD, ADAPTER, LORA, FULL],
    [Contrast("head", "full"), Contrast("adapter", "full", "equivalent"), Contrast("lora", "full", "equivalent"),
     Contrast("lora", "adapter")], 10, costs=True)
STUDIES = {
    "techniques": MAIN,
    "techniques-loss": replace(MAIN, claim=f"{MAIN.claim} (learning rates of the loss rule)", rule="loss"),
    "rank": Study(
        "a rank of 1 is enough, and 64 adds nothing (against 8)", "Hu et al., table 6 and section 7.2",
        "rank (alpha = 16)", vary("lora", "rank", (1, 8, 64)),
        [Contrast("LoRA, rank 1", "LoRA, rank 8", "equivalent"),
         Contrast("LoRA, rank 64", "LoRA, rank 8", "equivalent")], 8, references=True),
    "alpha": Study(
        "with a constant alpha the best learning rate does not move with the rank",
        "Hu et al., section 4.1; Schulman 2025", "learning rate", constant_and_growing_alpha(), [], 1, part="dev"),
    "targets": Study(
        "at similar size several kinds of matrices beat the query alone (Hu), and attention alone loses to the "
        "feed-forward layers and to all (Schulman)", "Hu et al., table 5; Schulman 2025", "layers with LoRA (alpha 16)",
        [lora_on("query", 16, ["query"]), lora_on("query + value", 8, ["query", "value"]),
         lora_on("attention", 4, LINEAR_LAYERS[:4]), lora_on("feed-forward", 3, LINEAR_LAYERS[4:]),
         lora_on("all", 2, LINEAR_LAYERS)],
        [Contrast("query + value, rank 8", "query, rank 16", "better"),
         Contrast("attention, rank 4", "query, rank 16", "better"),
         Contrast("feed-forward, rank 3", "attention, rank 4", "better"),
         Contrast("all, rank 2", "attention, rank 4", "better")], 8, references=True),
    "bottleneck": Study(
        "the size of the adapters matters little (8 and 128 against 32)", "Houlsby et al., sections 3.4 and 3.6",
        "bottleneck", vary("adapter", "bottleneck", (8, 32, 128)),
        [Contrast("adapters, bottleneck 8", "adapters, bottleneck 32", "equivalent"),
         Contrast("adapters, bottleneck 128", "adapters, bottleneck 32", "equivalent")], 8, references=True),
    "layers": Study(
        "adapters in all blocks beat training the top one or two blocks", "Houlsby et al., figure 3", PARAMETERS,
        [ADAPTER, TOP_ONE, TOP_TWO],
        [Contrast("adapter", "top block", "better"), Contrast("adapter", "top two blocks", "better")]),
    "init": Study(
        "adapters degrade if their initialisation is large", "Houlsby et al., section 3.6 and figure 6 (right)",
        "standard deviation of the initialisation",
        vary("adapter", "init_std", (1e-2, 1e-1, 1.0), word="initialisation"),
        [Contrast("adapters, initialisation 0.1", "adapters, initialisation 0.01"),
         Contrast("adapters, initialisation 1", "adapters, initialisation 0.01", "worse")], references=True),
    "data": Study(
        "with about a hundred sentences, LoRA and adapters beat full fine-tuning (with a thousand, they do not)",
        "Hu et al., appendix F.3, table 16 (LoRA)", "training sentences",
        [with_few(technique, sentences) for sentences in FEW for technique in ("adapter", "lora", "full")],
        [Contrast(with_few(technique, sentences).name, with_few("full", sentences).name,
                  "better" if sentences == 86 else None) for sentences in FEW for technique in ("adapter", "lora")],
        10),
    "light": Study(
        "training the biases alone is competitive with full fine-tuning", "Ben Zaken et al. 2021, abstract and table 1",
        PARAMETERS, [BITFIT, TOP_ONE, LORA, FULL],
        [Contrast("bitfit", "full", "equivalent"), Contrast("bitfit", "lora"), Contrast("top block", "full"),
         Contrast("top block", "lora")], 10),
    "dropout": Study(
        "encoder dropout of 0.1 against the default 0, on dev", "check of the protocol", "encoder dropout",
        vary("full", "dropout", (0.0, 0.1), str) + vary("lora", "dropout", (0.0, 0.1), str),
        [Contrast(f"{label(name)}, dropout 0.1", f"{label(name)}, dropout 0") for name in ("full", "lora")], 3,
        part="dev"),
    "epochs": Study(
        "10 epochs against the default 3, on dev", "check of the protocol", "epochs",
        vary("head", "epochs", (3, 10), str) + vary("bitfit", "epochs", (3, 10), str),
        [Contrast(f"{label(name)}, epochs 10", f"{label(name)}, epochs 3") for name in ("head", "bitfit")], 3,
        part="dev"),
    "doubling": Study(
        "2e-3, the rate with the highest dev accuracy in the search, for adapters and for LoRA; its double loses more "
        "than 1 point",
        "check of the protocol, planned after the main results were known", "learning rate",
        vary("adapter", "lr", (1e-3, 2e-3), word="rate") + vary("lora", "lr", (5e-4, 2e-3), word="rate")
        + vary("full", "lr", (2.5e-5,), word="rate"),
        [Contrast("adapters, rate 0.002", "adapters, rate 0.001"), Contrast("LoRA, rate 0.002", "LoRA, rate 0.0005"),
         Contrast("adapters, rate 0.002", "full fine-tuning, rate 2.5e-05"),
         Contrast("LoRA, rate 0.002", "full fine-tuning, rate 2.5e-05")], 10),
}


# -- protocol ---------------------------------------------------------------------------------------------

PROTOCOL = """\
- Every technique has the same encoder, head, initialisation of the head, order of batches, schedule and number of
  epochs, and no dropout in the encoder. The hash of a text puts it into one of eleven parts. Fold i tests on part i,
  part 10 is dev, the other nine are for training.
- Learning rates are chosen on dev only, from a grid by factors of 2 on folds 0 to 2, the best never at an edge.
  Accuracy rule (primary; it sets train.py's defaults): the highest mean dev accuracy among the rates that lose at most
  1 point when doubled. Loss rule: the lowest mean dev loss.
- Measures: accuracy, and calibrated loss: log loss after dividing the logits by one number, the temperature, fitted
  on the dev predictions of the run. Raw loss: without the temperature. Calibration error: the mean distance between
  confidence and accuracy, in 15 bins. Gain kept: the share of the difference between head tuning and full
  fine-tuning.
- Intervals over folds: paired, Student's t. Folds share training sentences, so the variance of a mean of k folds is
  that of the differences times 1/k + 1/9, not 1/k; 1/9 is test part / training parts (Nadeau and Bengio 2003).
  For one run, for seeds on one test file, and on dev, the intervals are over sentences, and over runs if there are
  several.
- Better or worse: the interval at 1 - 0.05/m, for the m contrasts of a study, excludes zero. Equivalent within 1
  point: the 90% interval, which is not corrected for m, lies within ±1. Else inconclusive.
- If accuracy leaves open which of two is better, calibrated loss may settle it, and the verdict then says so. Each
  measure has its own error of 5% in a study; the two are not corrected together.
- Two runs are compared only if processor, device and precision agree. Costs are averaged on one machine only."""
LIMITS = """\
- One small encoder and one data set of short sentences, unless a section says otherwise. Other tasks may differ.
- In the studies of rank, targets, bottleneck and initialisation, all variants have one learning rate: that of rank 8
  on all layers, bottleneck 32 and standard deviation 0.01. With rates of their own, results could differ.
- Rates are searched on three folds, and dev has about a thousand sentences: neighbouring rates can be equally good.
- The number of folds that would settle a comparison, in one way or the other, takes mean and variance found so far as
  the true ones: a rough guess. Beyond ten they are folds of further splits. No number: more than 100.
- Intervals do not include the uncertainty of the choice of rates.
- The correction for folds is an approximation. ± is the standard deviation over runs, not an interval.
- Failed runs are counted in the tables, and left out of means and differences. A study has the folds that all its
  variants have."""

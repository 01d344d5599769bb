"""The comparison as data: searches of learning rates, the runs that test a claim, and the contrasts between them."""
import os
from dataclasses import dataclass, field

from ..tools.settings import LINEAR_LAYERS, TECHNIQUES

QUICK = {"limit": 640, "epochs": 1}  # a smoke test: compare.py --quick


# -- learning rates ---------------------------------------------------------------------------------------

RULES = {  # how a rate is chosen from the means over folds 0 to 2, on dev alone
    "calibrated": "lowest calibrated loss",
    "loss": "lowest raw loss",
    "highest": "highest accuracy",
    "doubling": "highest accuracy among the rates that lose at most 1 point when doubled"}
RULE_NAMES = dict(zip(RULES, ("calibrated loss", "raw loss", "highest accuracy", "survives doubling")))


@dataclass(frozen=True)
class Search:
    """The search of one rate of a technique with these options. start: where it begins; option: what is searched, "lr"
    or "head_lr", in steps of `factor`; folder: where its records are, below the folder of the comparison. Then the rate
    that each rule of RULES has chosen (None: not known yet). train.py's default is the rate of the doubling rule."""
    technique: str
    start: float
    calibrated: float | None = None
    loss: float | None = None
    highest: float | None = None
    doubling: float | None = None
    options: dict = field(default_factory=dict)
    option: str = "lr"
    factor: float = 2
    folder: str = "search"


TOP_BLOCK, TOP_TWO_BLOCKS = {"top_layers": 1}, {"top_layers": 2}
FEW = {"limit": 86, "epochs": 20, "eval_every": 20}  # 1% of the sentences, 60 steps; measuring dev takes longer
FOUR = ("head", "adapter", "lora", "full")
COLA_RATES = {"head": 4e-3, "adapter": 2e-3, "lora": 1e-3, "bitfit": 4e-3, "full": 5e-5}
STARTS = {"head": 8e-3, "adapter": 1e-3, "lora": 5e-4, "bitfit": 4e-3, "full": 5e-5}  # of searches on other data

# A rate for the head alone, by the calibrated rule. For each technique: one rate for body and head; that of the head,
# with the body at the first; that of the body, with the head at the second. None: `compare.py --rates NAME` finds it.
HEAD_RATES = {
    "adapter": (2e-3, None, None),
    "lora": (5e-4, None, None),
    "full": (2.5e-5, None, None)}
HEAD_RATES_86 = {  # with 86 sentences
    "adapter": (5e-4, 5e-4, 5e-4),
    "lora": (2.5e-4, 5e-4, 2.5e-4),
    "full": (5e-5, 2e-3, 2.5e-5)}


def search_heads(rates, options, end=""):
    """The searches of the last two rates in each row of HEAD_RATES."""
    found = {}
    for name, (shared, head, body) in rates.items():
        start = shared * (16 if name == "full" else 4)
        found |= {f"{name}-head{end}": Search(name, start, head, options={**options, "lr": shared}, option="head_lr",
                                              factor=4, folder=f"head-rate{end}"),
                  f"{name}-body{end}": Search(name, shared, body, options={**options, "head_lr": head},
                                              folder=f"head-rate{end}")}
    return found


SEARCHES = {
    "head": Search("head", 8e-3, 8e-3, 8e-3, 8e-3, 8e-3, folder="fp32"),
    "adapter": Search("adapter", 5e-4, 2e-3, 5e-4, 2e-3, 1e-3),
    "lora": Search("lora", 5e-4, 5e-4, 2.5e-4, 2e-3, 5e-4, folder="fp32"),
    "bitfit": Search("bitfit", 4e-3, 4e-3, 4e-3, 2e-3, 2e-3),
    "full": Search("full", 5e-5, 2.5e-5, 1.25e-5, 2.5e-5, 2.5e-5, folder="fp32"),
    "top-block": Search("full", 2e-4, 8e-4, 4e-4, 2e-4, 2e-4, TOP_BLOCK),
    "top-two-blocks": Search("full", 2e-4, 2e-4, 1e-4, 2e-4, 2e-4, TOP_TWO_BLOCKS),
    **{f"{name}-86": Search(name, start, HEAD_RATES_86[name][0], options=FEW, folder="head-rate-86")
       for name, start in (("adapter", 5e-4), ("lora", 5e-4), ("full", 5e-5))},
    **search_heads(HEAD_RATES, {}),
    **search_heads(HEAD_RATES_86, FEW, "-86"),
    **{f"cola-{name}": Search(name, start, COLA_RATES[name], folder="cola") for name, start in STARTS.items()},
    **{f"imdb-{name}": Search(name, STARTS[name], options={"limit": 3000}, folder="imdb-512") for name in FOUR},
}


# -- studies ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Variant:
    """One setting, run on several folds. searches: where its rates come from, unless `options` has them (none: that of
    its technique). series, x, panel: its place in the figure of a study with an `x_label`."""
    name: str
    technique: str
    options: dict = field(default_factory=dict)
    searches: tuple = ()
    series: str = ""
    x: float = 0
    panel: str = ""


def label(name):
    """Return the name of a variant in tables: the label of a technique, or its own name."""
    return TECHNIQUES[name].label if name in TECHNIQUES else name


@dataclass(frozen=True)
class Contrast:
    """Two variants, by name, and the claim about them that is tested ("": none)."""
    a: str
    b: str
    claim: str = ""

    @property
    def name(self):
        """The two variants, as "LoRA, rank 1 - 8": what both begin with is said once."""
        a, b = label(self.a), label(self.b)
        shared = os.path.commonprefix([a, b]).rpartition(" ")[0]
        return f"{a} - {b[len(shared):].strip()}"


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, and the source of the claims. folds: how many `--study` runs. rule: of the
    learning rates. part: what is judged, "test" or "dev". folders: where its records may be, the first that has them.
    caveat: what the answers depend on by design. costs: publish costs and learning curves. partial: it is shown even if
    one variant has not been run. matthews: compare the Matthews correlation too. title: its heading in a figure ("":
    its name)."""
    question: str
    source: str
    variants: list
    contrasts: list
    folds: int = 10
    rule: str = "doubling"
    part: str = "test"
    folders: tuple = ("",)
    caveat: str = ""
    x_label: str = ""
    costs: bool = False
    partial: bool = False
    matthews: bool = False
    title: str = ""


def vary(technique, option, values, word=None):
    """One variant for each value of an option, which names call `word`."""
    return [Variant(f"{label(technique)}, {word or option} {value:g}", technique, {option: value}, series=technique,
                    x=value) for value in values]


def lora_on(name, rank, targets):
    return Variant(f"{name}, rank {rank}", "lora", {"targets": targets, "rank": rank})


def constant_and_growing_alpha(ranks=(1, 8, 64), rates=(6.25e-5, 2.5e-4, 1e-3, 4e-3)):
    """Two rules for alpha. At rank 8 both give alpha 16: the same runs."""
    return [Variant(f"{panel}, rank {rank}, lr {lr:g}", "lora", {"rank": rank, "alpha": alpha(rank), "lr": lr},
                    series=f"rank {rank}", x=lr, panel=panel)
            for panel, alpha in (("alpha = 16", lambda rank: 16.0), ("alpha = 2 rank", lambda rank: 2.0 * rank))
            for rank in ranks for lr in rates]


def searched_on(data, names):
    """Techniques with the rates that were searched on another data set."""
    return [Variant(name, name, searches=(f"{data}-{name}",)) for name in names]


def head_rate_study(question, title, options, end="", claim=""):
    """Does the head need a rate of its own? end: of the names of its searches; claim: on LoRA"""
    variants, contrasts, names = [], [], {name: label(name) for name in ("adapter", "lora", "full")}
    for name, words in names.items():
        variants += [Variant(f"{words}, one rate", name, options, (name + end,)),
                     Variant(f"{words}, own head rate", name, options, (f"{name}-head{end}", f"{name}-body{end}"))]
        contrasts.append(Contrast(f"{words}, own head rate", f"{words}, one rate"))
    for rate in ("own head rate", "one rate"):
        contrasts += [Contrast(f"{names['lora']}, {rate}", f"{names['full']}, {rate}", claim),
                      Contrast(f"{names['adapter']}, {rate}", f"{names['full']}, {rate}")]
    return Study(question, "our own question", variants, contrasts, rule="calibrated", folders=(f"head-rate{end}",),
                 title=title)


HEAD, ADAPTER, LORA, BITFIT, FULL = FIVE = [Variant(name, name) for name in TECHNIQUES]
TOP_ONE, TOP_TWO = (Variant(f"top {name}", "full", options, (f"top-{name.replace(' ', '-')}",))
                    for name, options in (("block", TOP_BLOCK), ("two blocks", TOP_TWO_BLOCKS)))
HOULSBY_MATCH = "adapters are within 0.4 points of full fine-tuning (Houlsby et al., GLUE, BERT-large)"
HU_MATCH = "LoRA matches full fine-tuning or is better (Hu et al., table 2, GLUE, RoBERTa)"
BEN_ZAKEN = "the biases alone are competitive on small to medium data (Ben Zaken et al., GLUE, BERT)"
FOUR_CONTRASTS = [Contrast("head", "full"), Contrast("adapter", "full"), Contrast("lora", "full"),
                  Contrast("lora", "adapter")]
MAIN_CONTRASTS = [Contrast("head", "full"), Contrast("adapter", "full", HOULSBY_MATCH),
                  Contrast("lora", "full", HU_MATCH), Contrast("bitfit", "full", BEN_ZAKEN),
                  Contrast("lora", "adapter")]
MAIN = "Houlsby et al. 2019, abstract and table 1; Hu et al. 2021, table 2; Ben Zaken et al. 2021, table 1"
STUDIES = {
    "calibrated": Study("How far are the techniques from full fine-tuning, and from each other?", MAIN, FIVE,
                        MAIN_CONTRASTS, rule="calibrated", folders=("head-rate", ""), partial=True,
                        title="movie reviews, rates by calibrated loss"),
    "techniques": Study("How far apart are they at train.py's default rates, and what does training cost?", MAIN,
                        [HEAD, ADAPTER, LORA, FULL], FOUR_CONTRASTS, costs=True,
                        title="movie reviews, rates of train.py"),
    "cola": Study("How far apart are they on a second task: is a sentence grammatical?", "Warstadt et al. 2019 (CoLA)",
                  searched_on("cola", TECHNIQUES), MAIN_CONTRASTS, rule="calibrated", folders=("cola",), matthews=True,
                  title="CoLA: is a sentence grammatical?"),
    "imdb": Study("How far apart are they on IMDb at 256 tokens, one run each?", "Maas et al. 2011 (IMDb)",
                  [HEAD, ADAPTER, LORA, FULL], FOUR_CONTRASTS, 1, folders=("imdb",), costs=True,
                  caveat="one run each: these runs only; on dev, full fine-tuning is ahead", title="IMDb, one run"),
    "imdb-512": Study("How far apart are they on IMDb at 512 tokens?", "Maas et al. 2011 (IMDb)",
                      searched_on("imdb", FOUR), FOUR_CONTRASTS, 3, "calibrated",
                      folders=("imdb-512",), costs=True, title="IMDb at 512 tokens"),
    "head-rate": head_rate_study(
        "Does a rate of its own for the head change the order of the techniques?", "the head's own rate", {}),
    "head-rate-86": head_rate_study(
        "Does a rate of its own for the head change the order of the techniques with 86 sentences?",
        "the head's own rate, 86 sentences", FEW, "-86",
        "with 100 examples LoRA is more accurate than full fine-tuning (Hu et al., table 16, GPT-3)"),
    "light": Study(
        "What do the biases alone reach, and what the top block?", "Ben Zaken et al. 2021, abstract and table 1",
        [BITFIT, TOP_ONE, LORA, FULL],
        [Contrast("bitfit", "full"), Contrast("bitfit", "lora"), Contrast("top block", "full"),
         Contrast("top block", "lora")], title="biases or the top block alone"),
    "layers": Study(
        "Do adapters in all blocks beat training the top one or two blocks?", "Houlsby et al., figure 3",
        [ADAPTER, TOP_ONE, TOP_TWO],
        [Contrast("adapter", "top block", "adapters beat training the top layers (Houlsby et al., figure 3, GLUE)"),
         Contrast("adapter", "top two blocks", "the same")], 5, caveat="how many blocks: one of six, or two",
        title="adapters or the top blocks"),
    "rank": Study(
        "Which rank does LoRA need?", "Hu et al., table 6 and section 7.2", vary("lora", "rank", (1, 8, 64)),
        [Contrast("LoRA, rank 1", "LoRA, rank 8", "rank 1 suffices (Hu et al., table 6, GPT-3, other matrices)"),
         Contrast("LoRA, rank 64", "LoRA, rank 8", "rank 64 adds nothing (Hu et al., table 6)")], 8,
        caveat="one rate, found for rank 8"),
    "alpha": Study(
        "With a constant alpha, does the best learning rate move with the rank?",
        "Hu et al., section 4.1 (alpha acts like the rate); Schulman 2025 (LoRA Without Regret)",
        constant_and_growing_alpha(), [], 1, part="dev", caveat="one fold, a grid by factors of 4",
        x_label="learning rate"),
    "targets": Study(
        "Where does LoRA belong, at similar size?", "Hu et al., table 5; Schulman 2025 (LoRA Without Regret)",
        [lora_on("query", 16, ["query"]), lora_on("query + value", 8, ["query", "value"]),
         lora_on("attention", 4, LINEAR_LAYERS[:4]), lora_on("feed-forward", 3, LINEAR_LAYERS[4:]),
         lora_on("all", 2, LINEAR_LAYERS)],
        [Contrast("query + value, rank 8", "query, rank 16",
                  "several kinds of matrices beat the query alone (Hu et al., table 5, GPT-3)"),
         Contrast("attention, rank 4", "query, rank 16", "the same"),
         Contrast("feed-forward, rank 3", "attention, rank 4",
                  "attention alone loses to the feed-forward layers and to all (Schulman 2025)"),
         Contrast("all, rank 2", "attention, rank 4", "the same")], 8,
        caveat="all at LoRA's common rate; training accuracy rises with the number of matrices",
        title="layers with LoRA"),
    "bottleneck": Study(
        "Which size do adapters need?", "Houlsby et al., sections 3.4 and 3.6",
        vary("adapter", "bottleneck", (8, 32, 128)),
        [Contrast("adapters, bottleneck 8", "adapters, bottleneck 32",
                  "the size of the adapters matters little (Houlsby et al., section 3.6)"),
         Contrast("adapters, bottleneck 128", "adapters, bottleneck 32", "the same")], 8,
        caveat="one rate, found for bottleneck 32"),
    "init": Study(
        "How large may the initialisation of adapters be?", "Houlsby et al., section 3.6 and figure 6 (right)",
        vary("adapter", "init_std", (1e-2, 1e-1, 1.0), word="initialisation"),
        [Contrast("adapters, initialisation 0.1", "adapters, initialisation 0.01"),
         Contrast("adapters, initialisation 1", "adapters, initialisation 0.01",
                  "a large initialisation harms (Houlsby et al., figure 6, MNLI and CoLA)")], 5,
        caveat="one rate, found for 0.01", x_label="standard deviation of the initialisation",
        title="initialisation of adapters"),
    "dropout": Study(
        "Does dropout of 0.1 in the encoder help?", "check of the protocol, on dev",
        vary("full", "dropout", (0.0, 0.1)) + vary("lora", "dropout", (0.0, 0.1)),
        [Contrast(f"{label(name)}, dropout 0.1", f"{label(name)}, dropout 0") for name in ("full", "lora")], 3,
        part="dev"),
    "epochs": Study(
        "Do ten epochs help instead of three?", "check of the protocol, on dev",
        vary("head", "epochs", (3, 10)) + vary("bitfit", "epochs", (3, 10)),
        [Contrast(f"{label(name)}, epochs 10", f"{label(name)}, epochs 3") for name in ("head", "bitfit")], 3,
        part="dev"),
}

"""Walk through one technique on the real model, with real numbers: the live version of README.md's parts 3 to 6.

    python -m minipeft explain lora

Each step is a function that returns numbers; the walkthroughs below print them. Everything runs in fp32 on the CPU and
without dropout, so the seed fixes every number but the times.
"""
import textwrap
import timeit

import torch
import torch.nn.functional as F
from torch import nn

from .. import data
from ..adapter import Adapter, AdapterLinear, TrainedNorm
from ..lora import LoRALinear, merge_lora
from ..model import count_parameters, trained
from ..tools import download
from ..tools.settings import TECHNIQUES
from .memory import SENTENCES, TOKENS, make_model, memory

EXAMPLES = [  # a positive and a negative sentence in turn
    "A warm, funny film that I would gladly see again.", "The story drags and nobody in it is interesting.",
    "Clever writing and two wonderful performances.", "A lazy sequel without a single new idea.",
    "It moved me to tears, and then it made me laugh.", "Loud, long and completely pointless.",
    "Every scene is beautiful and nothing is wasted.", "The jokes are old and the acting is worse."]
PROBE = "An honest, touching story, beautifully played."  # positive, and not among the examples
RATES = {"head": 1e-3, "adapter": 5e-4, "lora": 5e-4, "full": 5e-5}  # for ten steps on eight sentences


class Lesson:
    """What all steps share: the examples and the probe as batches (ids, mask), the labels, the untrained model `base`.

    weights: a folder; None for the default ones. Raises UserError if they are missing or damaged.
    """

    def __init__(self, weights=None, seed=0):
        self.weights, self.seed = download.find_weights(weights), seed
        sentences, _ = data.tokenize(data.load_tokenizer(self.weights, 128), [*EXAMPLES, PROBE])
        self.examples, self.probe = data.pad(sentences[:-1]), data.pad(sentences[-1:])
        self.labels = torch.tensor([1, 0] * (len(EXAMPLES) // 2))
        self.base = self.build("head")

    def build(self, technique, *more):
        """The classifier that `train.py TECHNIQUE` builds for two classes, in eval mode: no dropout."""
        return make_model(technique, self.weights, "--seed", self.seed, *more).eval()

    def loss(self, model):
        return F.cross_entropy(model(*self.examples), self.labels)

    @torch.no_grad()
    def change(self, model):
        """The relative change |v - v0| / |v0| of the sentence vectors v against those of the pretrained model."""
        new, old = (one.features(*self.examples) for one in (model, self.base))
        return ((new - old).norm() / old.norm()).item()

    @torch.no_grad()
    def probability(self, model):
        """The probability of "positive" for the probe."""
        return model(*self.probe).softmax(1)[0, 1].item()


def layers_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def gradient_norms(lesson, model, *endings):
    """For each ending, the norm of the loss's gradient over all parameters of the encoder with such a name."""
    model.zero_grad()
    lesson.loss(model).backward()
    return [torch.cat([p.grad.flatten() for name, p in model.encoder.named_parameters() if name.endswith(ending)])
            .norm().item() for ending in endings]


def train(lesson, model, technique, steps=10):
    """Take AdamW steps on all examples, without warm-up. Return the loss before each step."""
    optimizer, losses = torch.optim.AdamW(trained(model).values(), lr=RATES[technique]), []
    for _ in range(steps):
        loss = lesson.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- what the steps measure -------------------------------------------------------------------------------

STARTS = {"A random, B zero": (1, 0), "A zero, B random": (0, 1), "both zero": (0, 0), "both random": (1, 1)}


def compare_starts(lesson):
    """For four starts of A and B (random: B with BERT's standard deviation 0.02): the relative change of the sentence
    vectors before training, and the gradient norms of A and B at steps one and two. {start: five numbers}"""
    result = {}
    for start, (random_a, random_b) in STARTS.items():
        model = lesson.build("lora")
        torch.manual_seed(lesson.seed)
        for layer in layers_of(model, LoRALinear):
            if not random_a:
                nn.init.zeros_(layer.lora_A)
            if random_b:
                nn.init.normal_(layer.lora_B, std=0.02)
        change, one = lesson.change(model), gradient_norms(lesson, model, "lora_A", "lora_B")
        train(lesson, model, "lora", 1)
        result[start] = [change, *one, *gradient_norms(lesson, model, "lora_A", "lora_B")]
    return result


def first_fall(lesson, rank, alpha):
    """How far one step of LoRA alone, with the head frozen, lowers the loss."""
    model = lesson.build("lora", "--rank", rank, "--alpha", alpha)
    model.head.requires_grad_(False)
    before, after = train(lesson, model, "lora", 2)
    return before - after


def adapter_gradients(lesson, zero=False):
    """Gradient norms at step one, from the default initialisation or with all adapters at zero."""
    model = lesson.build("adapter")
    for layer in layers_of(model, Adapter) if zero else []:
        nn.init.zeros_(layer.down.weight)  # the biases are zero already
        nn.init.zeros_(layer.up.weight)
    return gradient_norms(lesson, model, "down.weight", "up.weight", "up.bias")


def adapter_start(lesson, init_std, skip=True):
    """The relative change of the sentence vectors by untrained adapters, with their skip or without it."""
    model = lesson.build("adapter", "--init-std", init_std)
    for layer in layers_of(model, Adapter) if not skip else []:
        layer.register_forward_hook(lambda adapter, inputs, output: output - inputs[0])
    return lesson.change(model)


def compare_cache(lesson):
    """Head tuning: the largest difference of the sentence vectors of two passes, and how many times longer a step
    through the encoder takes than a step from the cached vectors."""
    with torch.no_grad():
        cached, again = (lesson.base.features(*lesson.examples) for _ in range(2))
    slow, quick = (min(timeit.repeat(step, number=1, repeat=5)) for step in (
        lambda: lesson.loss(lesson.base).backward(),
        lambda: F.cross_entropy(lesson.base.head(cached), lesson.labels).backward()))
    return (again - cached).abs().max().item(), slow / quick


# -- printing ---------------------------------------------------------------------------------------------

def step(title):
    print(f"\n{title}\n{'-' * len(title)}")


def say(text):
    print(textwrap.fill(" ".join(text.split()), 98, break_on_hyphens=False))


def show(*lines):
    print(textwrap.indent("\n".join(lines), "    "))


def table(widths, *rows):
    """Print rows of cells, in columns of these widths."""
    show(*("".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows))


def wrapping(before, after):
    """Print a layer before and after it is wrapped, and which of its tensors are trained."""
    say("print(layer) before, and after:")
    show(*str(before).splitlines(), *str(after).splitlines(), "")
    table((24, 14, 0), *((name, " x ".join(map(str, p.shape)), "trained" if p.requires_grad else "frozen")
                         for name, p in after.named_parameters()))


def ten_steps(number, lesson, model, technique):
    step(f"{number}. Ten steps of AdamW, the head included, on eight sentences, learning rate {RATES[technique]:g}")
    before = lesson.probability(model)
    losses = train(lesson, model, technique)
    show(f'"{PROBE}" (not among the eight)',
         f"P(positive) before: {before:.3f}    after: {lesson.probability(model):.3f}",
         f"loss at the first step: {losses[0]:.3f}    at the tenth: {losses[-1]:.3f}")


# -- the walkthroughs -------------------------------------------------------------------------------------

def lora(lesson):
    """why B starts at zero, what alpha / rank is for, what a merge does"""
    model = lesson.build("lora")
    layers, blocks = layers_of(model, LoRALinear), len(model.encoder.layers)
    sizes = [layer.linear.in_features + layer.linear.out_features for layer in layers[:len(layers) // blocks]]
    step("1. Two thin matrices beside a frozen one: h = W0 x + b0 + (alpha / rank) B A x")
    wrapping(layers[0].linear, layers[0])
    say("Numbers to train: rank x (in + out) for each weight of a block, in all blocks.")
    show(f"{blocks} x {len(layers[0].lora_A)} x ({' + '.join(map(str, sizes))}) = "
         f"{count_parameters(model)['technique']:,}")

    step("2. What a rank is")
    show("1 2 3       1 0", "2 4 6   =   2 0   @   1 2 3", "1 3 4       1 1       0 1 1")
    say("""The second row is twice the first; the third is the first plus (0 1 1). All rows are sums of multiples of two
        rows: the rank is 2.""")

    step("3. At the first step, which of A and B has a gradient?")
    say("With s = alpha / rank and g = dL/dh, the chain rule gives, summed over all tokens:")
    show("dL/dB = s g (A x)^T        contains A", "dL/dA = s B^T g x^T        contains B", "")
    rows = [("", "change of the", "at step one", "", "at step two"),
            ("start", "sentence vectors", "|dL/dA|", "|dL/dB|", "|dL/dA|", "|dL/dB|")]
    for start, (change, *norms) in compare_starts(lesson).items():
        rows.append((start, f"{change:.1%}", *(f"{norm:.4f}" for norm in norms)))
    table((21, 20, 11, 11, 11, 0), *rows)

    step("4. Why alpha / rank")
    say("Freeze the head and train LoRA alone for one step. The loss falls by:")
    table((8, 34, 0), ("rank", "alpha = 16, scaling 16 / rank", "alpha = 2 rank, scaling 2"),
          *((rank, *(f"{first_fall(lesson, rank, alpha):.4f}" for alpha in (16, 2 * rank))) for rank in (1, 8, 64)))
    say("Adam's first step pushes all r terms of B A x the same way. Dividing by r cancels that.")

    ten_steps(5, lesson, model, "lora")
    logits = model(*lesson.examples)
    merge_lora(model)
    difference = (model(*lesson.examples) - logits).abs().max()
    say("Then merge: W = W0 + (alpha / rank) B A.")
    show(f"largest change of a logit: {difference:.0e}")


def adapter(lesson):
    """where an adapter sits, why it starts near the identity, why it cannot be merged"""
    model = lesson.build("adapter")
    wrappers, norms = layers_of(model, AdapterLinear), layers_of(model, TrainedNorm)
    width, size = wrappers[0].adapter.up.weight.shape
    one = sum(parameter.numel() for parameter in wrappers[0].adapter.parameters())
    step("1. A bottleneck after the last weight of a sub-layer: y = h + W_up GELU(W_down h + b_down) + b_up")
    wrapping(wrappers[0].linear, wrappers[0])
    say("Numbers to train, with the two norms of each block:")
    show(f"adapters  {len(wrappers)} x (2 x {size} x {width} + {size} + {width}) = {len(wrappers)} x {one:,} = "
         f"{len(wrappers) * one:,}", f"norms     {len(norms)} x 2 x {width} = {len(norms) * 2 * width:,}")

    step("2. What if both matrices start at zero?")
    say("With g = dL/dy and low = GELU(W_down h + b_down), the chain rule gives, summed over all tokens:")
    show("dL/dW_up = g low^T     dL/dW_down = (W_up^T g * GELU') h^T     dL/db_up = g", "")
    table((14, 15, 15, 0), ("start", "|dL/dW_down|", "|dL/dW_up|", "|dL/db_up|"),
          *((start, *(f"{norm:.4f}" for norm in adapter_gradients(lesson, zero)))
            for start, zero in (("std 0.01", False), ("all zero", True))))

    step("3. Near the identity")
    table((14, 13, 0), ("initial std", "inner skip", "change of the sentence vectors"),
          *((std, "yes" if skip else "no", f"{adapter_start(lesson, std, skip):.1%}")
            for std, skip in ((0.01, True), (1.0, True), (0.01, False))))

    ten_steps(4, lesson, model, "adapter")
    say("No merge: GELU stands between the two matrices, so no single matrix computes the same.")


def head(lesson):
    """what a frozen encoder allows: the cache, and its limit"""
    model = lesson.build("head")
    counts, hidden = count_parameters(model), model.encoder.config.hidden_size
    step("1. Two new layers on the mean v of the token vectors: logits = W2 tanh(W1 v + b1) + b2")
    show(*str(model.head).splitlines(), "",
         f"dense       {hidden} x {hidden} + {hidden} = {hidden * hidden + hidden:,}",
         f"classifier  2 x {hidden} + 2 = {2 * hidden + 2:,}",
         f"in all      {counts['head']:,} of {counts['total']:,} = {counts['trainable'] / counts['total']:.2%}")

    step("2. Why is it so fast?")
    difference, ratio = compare_cache(lesson)
    say("A frozen encoder without dropout returns the same vector for a sentence every time, so each is encoded once.")
    show(f"largest difference of the vectors of two passes: {difference:g}",
         f"a step through the encoder takes {ratio:.0f} times as long (depends on the machine)")

    ten_steps(3, lesson, model, "head")
    say(f"The sentence vectors have changed by {lesson.change(model):.1%}: the head can only use what they hold.")


def full(lesson):
    """what PEFT saves: products, gradients, moments, activations"""
    total = count_parameters(lesson.base)["total"]
    step("1. Everything is trained")
    show(f"16 bytes x {total:,} = {16 * total / 1e6:,.0f} MB: weight, gradient and AdamW's two moments, in fp32",
         f"a copy for each task: {4 * total / 1e6:.0f} MB")

    step(f"2. A training step on {SENTENCES} sentences of {TOKENS} tokens, in fp32")
    products = [("linear layers, GFLOP", "y = W x", "dx = W^T dy", "dW = dy x^T", "sum")]
    sizes = [("memory, MB", "weights", "gradients", "moments", "activations", "sum")]
    for name in ("head", "adapter", "lora", "full"):
        found = memory(name, lesson.weights)
        for rows, unit, parts in ((products, 1e9, found["rule_flop"].values()), (sizes, 1e6, [
                found[part] for part in ("weights", "gradients", "optimiser_states", "activations")])):
            digits = 2 if rows is products else 1
            rows.append((TECHNIQUES[name].label, *(f"{part / unit:.{digits}f}" for part in (*parts, sum(parts)))))
    table((23, 12, 14, 14, 14, 0), *products, (), *sizes)
    say("Head tuning starts at the cached vectors.")

    ten_steps(3, lesson, lesson.build("full"), "full")


WALKTHROUGHS = {"lora": lora, "adapter": adapter, "head": head, "full": full}


def explain(technique=None, weights=None, seed=0):
    """Print the walkthrough of a technique, or without one what each teaches. weights: a folder; None for the default
    ones. Raises UserError."""
    if not technique:
        for name, walk in WALKTHROUGHS.items():
            print(f"python -m minipeft explain {name:<9}{walk.__doc__}")
        return
    lesson = Lesson(weights, seed)
    print(f"{TECHNIQUES[technique].label} on {lesson.weights.name}")
    WALKTHROUGHS[technique](lesson)

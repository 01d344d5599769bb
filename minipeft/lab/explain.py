"""Walk through one technique on the real model, step by step, with real numbers: python -m minipeft explain lora

Each step is a function that returns numbers; the walkthroughs below print them. Everything runs in fp32 on the CPU and
without dropout, so the seed fixes every number but the ratio of times.
"""
import textwrap
import timeit

import torch
import torch.nn.functional as F
from torch import nn

from .. import data
from ..adapter import Adapter, TrainedNorm
from ..lora import LoRALinear, merge_lora
from ..model import count_parameters, trained
from ..tools import download
from ..tools.settings import TECHNIQUES
from .analysis import rank_of_energy
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
    def features(self, model):
        """The sentence vectors of the examples, (examples, hidden): the input of the head."""
        return model.features(*self.examples)

    def change(self, model):
        """The relative change of the sentence vectors against the pretrained model."""
        return distance(self.features(model), self.features(self.base))

    @torch.no_grad()
    def probability(self, model):
        """The probability of "positive" for the probe."""
        return model(*self.probe).softmax(1)[0, 1].item()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def distance(new, old):
    """|new - old| / |old|, with norms over all elements"""
    return ((new - old).norm() / old.norm()).item()


def layers_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def gradient_norms(lesson, model, *endings):
    """For each ending, the norm of the loss's gradient over all parameters of the encoder with such a name."""
    model.zero_grad()
    lesson.loss(model).backward()
    norms = []
    for ending in endings:
        gradients = [p.grad.flatten() for name, p in model.encoder.named_parameters() if name.endswith(ending)]
        norms.append(torch.cat(gradients).norm().item())
    return norms


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

def compare_starts(lesson):
    """For three starts of A and B (random: B with BERT's standard deviation 0.02): the relative change of the sentence
    vectors before training, and the gradient norms of A and B at steps one and two. {start: five numbers}"""
    result = {}
    for start in ("A random, B zero", "both zero", "both random"):
        model = lesson.build("lora")
        torch.manual_seed(lesson.seed)
        for layer in layers_of(model, LoRALinear):
            if start == "both zero":
                nn.init.zeros_(layer.lora_A)
            if start == "both random":
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


def identity_distance(lesson, init_std, skip=True):
    """At the start: the mean of |y - h| / |h| over all adapters, and the relative change of the sentence vectors."""
    model, distances = lesson.build("adapter", "--init-std", init_std), []

    def hook(adapter, inputs, output):
        if not skip:
            output = output - inputs[0]
        distances.append(distance(output, inputs[0]))
        return output

    for adapter in layers_of(model, Adapter):
        adapter.register_forward_hook(hook)
    change = lesson.change(model)
    return sum(distances) / len(distances), change


def adapter_gradients(lesson, zero=False):
    """Gradient norms at step one, from the default initialisation or with all adapters at zero."""
    model = lesson.build("adapter")
    if zero:
        for adapter in layers_of(model, Adapter):
            nn.init.zeros_(adapter.down.weight)  # the biases are zero already
            nn.init.zeros_(adapter.up.weight)
    return gradient_norms(lesson, model, "down.weight", "up.weight", "up.bias", "trained.weight")


def compare_cache(lesson):
    """Head tuning: the largest difference of the sentence vectors of two passes, and how many times longer a step
    through the encoder takes than a step from the cached vectors."""
    cached = lesson.features(lesson.base)
    difference = (lesson.features(lesson.base) - cached).abs().max().item()

    slow, quick = (min(timeit.repeat(step, number=1, repeat=5)) for step in (
        lambda: lesson.loss(lesson.base).backward(),
        lambda: F.cross_entropy(lesson.base.head(cached), lesson.labels).backward()))
    return difference, slow / quick


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


def opening(lesson, title, equation):
    config = lesson.base.encoder.config
    say(f"""{title} on {lesson.weights.name}, {config.num_hidden_layers} blocks of hidden size
        {config.hidden_size}, {count(lesson.base.encoder):,} parameters in the encoder.""")
    show(equation)


def ten_steps(number, lesson, model, technique):
    step(f"{number}. Ten steps of AdamW, the head included, on eight sentences, learning rate {RATES[technique]:g}")
    before = lesson.probability(model)
    losses = train(lesson, model, technique)
    show(f'"{PROBE}" (not among the eight)',
         f"P(positive) before: {before:.3f}    after: {lesson.probability(model):.3f}",
         f"loss at the first step: {losses[0]:.3f}    at the tenth: {losses[-1]:.3f}")


def memory_step(number, lesson, technique):
    """Print memory and matrix products of a training step, beside those of full fine-tuning."""
    step(f"{number}. What a training step needs: {SENTENCES} sentences of {TOKENS} tokens, fp32, AdamW")
    sizes = [("memory in MB", "weights", "gradients", "optimiser", "activations", "sum")]
    products = [(), ("linear layers, GFLOP", "y = W x", "dx = W^T dy", "dW = dy x^T", "sum")]
    for name in dict.fromkeys((technique, "full")):
        found, label = memory(name, lesson.weights), TECHNIQUES[name].label
        row = [found[part] / 1e6 for part in ("weights", "gradients", "optimiser_states", "activations")]
        sizes.append([label, *(f"{size:.1f}" for size in (*row, sum(row)))])
        row = [flop / 1e9 for flop in found["rule_flop"].values()]
        products.append([label, *(f"{size:.2f}" for size in (*row, sum(row)))])
    table((23, 12, 14, 14, 14, 0), *sizes, *products)


# -- the walkthroughs -------------------------------------------------------------------------------------

def lora(lesson):
    model = lesson.build("lora")
    counts, blocks = count_parameters(model), model.encoder.layers
    opening(lesson, "LoRA (Hu et al. 2021)", "h = W0 x + (alpha / rank) B A x")

    step("1. What is swapped")
    say("""W0 is frozen. Each linear layer gets two thin matrices, A and B, and in the encoder only they are
        trained. Their product B A has the shape of W0, but its rank is at most r.""")
    rows = [("layer", "W0: out x in", "A: r x in", "B: out x r", "trained: r x (in + out)")]
    for name, layer in blocks[0].named_modules():
        if isinstance(layer, LoRALinear):
            (rank, inputs), outputs = layer.lora_A.shape, len(layer.lora_B)
            rows.append((name, f"{outputs} x {inputs}", f"{rank} x {inputs}", f"{outputs} x {rank}",
                         f"{rank} x ({inputs} + {outputs}) = {rank * (inputs + outputs):,}"))
    table((28, 15, 12, 13, 0), *rows)
    show(f"{len(blocks)} blocks x {counts['technique'] // len(blocks):,} = {counts['technique']:,}, "
         f"{counts['technique'] / count(lesson.base.encoder):.1%} of the encoder")
    say(f"The head's {counts['head']:,} parameters are trained too, as with every technique: a new head is random.")

    step("2. The start: why A is random and B is zero")
    say("""B starts at zero, so B A x is zero and the first output is exactly that of the pretrained model. With
        g = dL/dh, the chain rule gives, summed over all tokens,""")
    show("dL/dB = (alpha / rank) g (A x)^T        contains A",
         "dL/dA = (alpha / rank) B^T g x^T        contains B", "")
    rows = [("", "change of the", "at step one", "", "at step two"),
            ("start", "sentence vectors", "|dL/dA|", "|dL/dB|", "|dL/dA|", "|dL/dB|")]
    for start, (change, *norms) in compare_starts(lesson).items():
        rows.append((start, f"{change:.1%}", *(f"{norm:.4f}" for norm in norms)))
    table((21, 20, 11, 11, 11, 0), *rows)
    say("""A random, B zero: at step one A has no gradient, but B has. That step moves B, and from step two on A
        learns too. Both zero: each gradient contains the other matrix, so both are zero and nothing ever moves. Both
        random: it trains, but the start has already changed the pretrained model.""")

    step("3. Why alpha / rank")
    say("Freeze the head and train LoRA alone for one step. The loss falls by:")
    table((8, 34, 0), ("rank", "alpha = 16, scaling 16 / rank", "alpha = 2 rank, scaling 2"),
          *((rank, *(f"{first_fall(lesson, rank, alpha):.4f}" for alpha in (16, 2 * rank))) for rank in (1, 8, 64)))
    say("""The first step of AdamW moves every entry of B by about the learning rate, whatever the rank. The
        update is a sum of r terms that push the same way, so its effect grows with r. Dividing by the rank
        cancels that at the first step: alpha and the learning rate need little change with the rank (Hu et al.,
        section 4.1).""")

    ten_steps(4, lesson, model, "lora")
    logits = model(*lesson.examples)
    merge_lora(model)
    difference = (model(*lesson.examples) - logits).abs().max()
    say("Then merge: W = W0 + (alpha / rank) B A.")
    show(f"P(positive) merged: {lesson.probability(model):.3f}    largest change of a logit: {difference:.0e}")
    say(f"""The merged encoder has {count(model.encoder):,} parameters in plain linear layers, as before:
        inference costs what it did. To keep the task, save A, B and the head: {4 * counts['trainable'] / 1e6:.1f}
        MB.""")

    memory_step(5, lesson, "lora")
    say("""Gradients and optimiser states exist only for what is trained: this is where LoRA saves memory. It keeps
        as many activations: the backward pass goes through all blocks, and the gradient of A needs each layer's input
        x. It saves one of three products: dW of the frozen W0. It still needs dx, for the layers below.""")


def adapter(lesson):
    model = lesson.build("adapter")
    counts, adapters, norms = count_parameters(model), layers_of(model, Adapter), layers_of(model, TrainedNorm)
    (width, size), one = adapters[0].up.weight.shape, count(adapters[0])
    opening(lesson, "Adapters (Houlsby et al. 2019)", "y = h + W_up GELU(W_down h + b_down) + b_up")

    step("1. What is swapped")
    say(f"""h is the output of a frozen linear layer, the last of attention or feed-forward, before the residual
        sum. It goes through a bottleneck, {width} -> {size} -> {width}. Each block has two adapters. Its two norms
        are trained as copies.""")
    show(f"adapters  {len(adapters)} x (2 x {size} x {width} + {size} + {width}) = {len(adapters)} x {one:,} = "
         f"{len(adapters) * one:,}",
         f"norms     {len(norms)} x 2 x {width} = {len(norms) * count(norms[0].trained):,}",
         f"head      {counts['head']:,}, trained with every technique",
         f"in all    {counts['trainable']:,} of {counts['total']:,} = {counts['trainable'] / counts['total']:.1%}")

    step("2. The start is near the identity")
    rows = [("initial std", "inner skip", "|y - h| / |h|", "change of the sentence vectors")]
    for init_std, skip in ((1e-2, True), (1.0, True), (1e-2, False)):
        identity, change = identity_distance(lesson, init_std, skip)
        rows.append((init_std, "yes" if skip else "no", f"{identity:.2g}", f"{change:.1%}"))
    table((14, 13, 17, 0), *rows)
    say("""With small weights the bottleneck adds almost nothing, so training starts from the pretrained model.
        With std 1 the pretrained features are lost. Without the inner skip they are lost, too: y is then almost
        zero instead of h.""")

    step("3. The first gradients: why not both matrices are zero")
    say("With g = dL/dy and low = GELU(W_down h + b_down), the chain rule gives, summed over all tokens,")
    show("dL/dW_up = g low^T     dL/dW_down = (W_up^T g * GELU') h^T     dL/db_up = g", "")
    table((14, 15, 15, 15, 0), ("start", "|dL/dW_down|", "|dL/dW_up|", "|dL/db_up|", "|dL/d norm weight|"),
          ("std 0.01", *(f"{norm:.4f}" for norm in adapter_gradients(lesson))),
          ("all zero", *(f"{norm:.4f}" for norm in adapter_gradients(lesson, zero=True))))
    say("""From zero, low and W_up are zero and stay zero: neither matrix ever has a gradient, and only b_up
        learns. One of the two may be zero. The norms have gradients from the start, and few parameters: they
        rescale and shift every hidden dimension.""")

    ten_steps(4, lesson, model, "adapter")
    say("""An adapter cannot be merged: GELU stands between its two matrices, so no matrix W can replace them. It
        stays in the model and costs time in inference.""")

    memory_step(5, lesson, "adapter")
    say("""Adapters keep fewer activations than full fine-tuning. The input of a frozen layer is kept only to
        compute its dW, which is not needed; and nothing is kept below the first adapter. dx is needed in all
        layers above it.""")


def head(lesson):
    model = lesson.build("head")
    counts, hidden = count_parameters(model), model.encoder.config.hidden_size
    opening(lesson, "Head tuning", "logits = W2 tanh(W1 v + b1) + b2,    v = mean of the encoder's outputs")

    step("1. What is trained")
    lesson.loss(model).backward()
    gradients = [parameter for parameter in model.encoder.parameters() if parameter.grad is not None]
    show(f"dense       {hidden} x {hidden} + {hidden} = {hidden * hidden + hidden:,}",
         f"classifier  2 x {hidden} + 2 = {2 * hidden + 2:,}",
         f"in all      {counts['head']:,} of {counts['total']:,} = {counts['trainable'] / counts['total']:.2%}",
         f"encoder     frozen: {len(gradients)} tensors with a gradient after a backward pass")
    say("""The backward pass ends at the head: nothing below it is trained. Every other technique trains this same head
        too.""")

    step("2. The cache")
    difference, ratio = compare_cache(lesson)
    say("""A frozen encoder without dropout returns the same vector for a sentence every time. So each sentence is
        encoded once, and all epochs train on the stored vectors.""")
    show(f"largest difference of the vectors of two passes: {difference:g}",
         f"a step through the encoder takes {ratio:.0f} times as long (depends on the machine)")

    ten_steps(3, lesson, model, "head")
    say(f"""The sentence vectors have changed by {lesson.change(model):.1%}. The head can only use what pretraining
        has put into v. That limits its accuracy.""")

    memory_step(4, lesson, "head")
    say("The step starts at the cached vectors. It does not use the encoder's weights: they only fill the cache.")


def full(lesson):
    model = lesson.build("full")
    total = count(model)
    opening(lesson, "Full fine-tuning", "W = W0 + dW,    dW of any rank")

    step("1. What is trained")
    show(f"{len(trained(model))} tensors with {total:,} parameters: all there are",
         "weight + gradient + AdamW's first and second moment = 4 x 4 bytes in fp32",
         f"16 x {total:,} = {16 * total / 1e6:,.0f} MB, before any activation")

    ten_steps(2, lesson, model, "full")
    new, old = (m.encoder.layers[0].attention.query.weight.detach() for m in (model, lesson.base))
    values = torch.linalg.svdvals(new - old)
    show(f"|W - W0| / |W0| of the first query matrix: {distance(new, old):.2%}",
         f"singular values of W - W0 that hold 90% of its squared norm: {rank_of_energy(values ** 2)} of {len(values)}")
    say("""The prediction changes while the weights hardly move. A small update need not have a low rank, which LoRA
        assumes: the singular values measure that. Ten steps are an illustration; python -m minipeft.lab.analysis does
        the same for finished runs.""")

    memory_step(3, lesson, "full")
    say(f"""Every task is a whole model: {4 * total / 1e6:.0f} MB to save. Every layer needs all three products:
        dx carries the gradient to the layers below, and dW is the gradient of the layer's own weight.""")


WALKTHROUGHS = {"lora": lora, "adapter": adapter, "head": head, "full": full}


def explain(technique, weights=None, seed=0):
    """Print the walkthrough of a technique. weights: a folder; None for the default ones. Raises UserError."""
    WALKTHROUGHS[technique](Lesson(weights, seed))

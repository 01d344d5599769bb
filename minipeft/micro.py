"""Parameter-efficient fine-tuning in one file: a BERT encoder, three techniques, and the loop that trains them.

    python minipeft/micro.py head|adapter|lora|full

Full fine-tuning changes all 22.6 million parameters of the encoder; a technique freezes them and trains a few new ones.
The shapes at the ends of lines are for B sentences of T tokens; the numbers are the sizes of all-MiniLM-L6-v2.
"""
import hashlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

WEIGHTS, DATA = Path("weights/all-MiniLM-L6-v2"), Path("data/movie-reviews.tsv")
RATES = {"head": 8e-3, "adapter": 1e-3, "lora": 5e-4, "full": 2.5e-5}  # the peak of the learning rate
EPOCHS, BATCH_SIZE = 3, 32


# A layer of BERT (Devlin et al. 2018), without dropout: attention mixes the tokens, feed-forward works on each alone.
class Block(nn.Module):
    def __init__(self, hidden, heads, wide):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.attention_output = (nn.Linear(hidden, hidden) for _ in range(4))
        self.attention_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.intermediate, self.output = nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x, mask):                                                  # (B, T, 384), (B, 1, 1, T)
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, 12, T, 32) each
                   for linear in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, mask)                    # softmax(q k^T / sqrt(32)) v
        x = self.attention_norm(x + self.attention_output(mixed.transpose(1, 2).flatten(2)))       # (B, T, 384)
        return self.output_norm(x + self.output(F.gelu(self.intermediate(x))))   # 384 -> 1536 -> 384


# The encoder: token ids in, one vector per token out. The mask is False where a sentence is padded.
class Bert(nn.Module):
    def __init__(self, words=30522, positions=512, blocks=6, hidden=384, heads=12, wide=1536):
        super().__init__()
        self.word, self.position, self.token_type = (nn.Embedding(size, hidden) for size in (words, positions, 2))
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.blocks = nn.ModuleList(Block(hidden, heads, wide) for _ in range(blocks))

    def forward(self, ids, mask):                                                # (B, T), (B, T)
        x = self.norm(self.word(ids) + self.position.weight[:ids.shape[1]] + self.token_type.weight[0])
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])                                 # (B, T, 384)
        return x


def load(bert, path):
    """Fill an encoder from a checkpoint, where blocks.3.query.weight is encoder.layer.3.attention.self.query.weight."""
    names = {"word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings",
             "token_type": "embeddings.token_type_embeddings", "norm": "embeddings.LayerNorm",
             "blocks": "encoder.layer", "query": "attention.self.query", "key": "attention.self.key",
             "value": "attention.self.value", "attention_output": "attention.output.dense",
             "attention_norm": "attention.output.LayerNorm", "intermediate": "intermediate.dense",
             "output": "output.dense", "output_norm": "output.LayerNorm"}
    tensors = load_file(path)
    for name, parameter in bert.named_parameters():
        parameter.data.copy_(tensors[".".join(names.get(part, part) for part in name.split("."))])
    return bert


# Head: logits = W2 tanh(W1 x + b1) + b2, where x is the mean of a sentence's token vectors.
class Head(nn.Module):
    def __init__(self, hidden=384, classes=2, dropout=0.1):
        super().__init__()
        self.dense, self.classifier = nn.Linear(hidden, hidden), nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.dense, self.classifier):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x):                                                        # (B, 384)
        return self.classifier(self.dropout(torch.tanh(self.dense(x))))          # (B, classes)


# Adapter (Houlsby et al. 2019): y = h + W_up GELU(W_down h + b_down) + b_up, where h is the output of a frozen layer.
class AdapterLinear(nn.Module):
    def __init__(self, linear, bottleneck=32):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.out_features, bottleneck), nn.Linear(bottleneck, linear.out_features)
        for layer in (self.down, self.up):  # small weights: y is almost h at the start
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x):                                                        # (B, T, in)
        h = self.linear(x)                                                       # (B, T, out)
        return h + self.up(F.gelu(self.down(h)))                                 # out -> 32 -> out


# LoRA (Hu et al. 2021): h = W0 x + b0 + (alpha / rank) B A x, where W0 and b0 are frozen, A (rank, in), B (out, rank).
class LoRALinear(nn.Module):
    def __init__(self, linear, rank=8, alpha=16):
        super().__init__()
        self.linear, self.scaling = linear, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-1, 1) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # zero: h is unchanged at the start

    def forward(self, x):                                                        # (B, T, in)
        return self.linear(x) + self.scaling * (x @ self.A.T) @ self.B.T         # in -> 8 -> out

    @torch.no_grad()
    def merge(self):
        self.linear.weight += self.scaling * self.B @ self.A                     # (out, in)
        return self.linear  # a plain layer that computes the same


def swap(bert, make, names=("query", "key", "value", "attention_output", "intermediate", "output")):
    """Replace layers in every block, by default all linear ones: block.query = make(block.query), and so on."""
    for block in bert.blocks:
        for name in names:
            setattr(block, name, make(getattr(block, name)))


def apply(technique, bert):
    """Freeze an encoder, then add what a technique trains. Full fine-tuning freezes nothing."""
    bert.requires_grad_(technique == "full")
    if technique == "lora":
        swap(bert, LoRALinear)
    if technique == "adapter":
        swap(bert, AdapterLinear, ["attention_output", "output"])
        swap(bert, nn.LayerNorm.requires_grad_, ["attention_norm", "output_norm"])  # returns the norm


def read(path, tokenizer):
    """Return (training set, test set): lists of (token ids, label). A hash of its text puts a sentence into a set."""
    tokenizer.no_padding()  # batches are padded to their own length, see encode
    parts = [[] for _ in range(11)]
    for line in path.read_text(encoding="utf-8").strip().split("\n")[1:]:
        _, _, label, text = line.split("\t")
        digest = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=8).hexdigest()
        parts[int(digest, 16) % 11].append((tokenizer.encode(text).ids, int(label == "positive")))
    return sum(parts[1:10], []), parts[0]  # part 10 is dev, for choices such as that of a rate


def make_batches(sentences):
    """Return lists of indices, in random order. Sentences of like length share a batch, so there is little padding."""
    order = sorted(torch.randperm(len(sentences)).tolist(), key=lambda index: len(sentences[index][0]))
    batches = [order[start:start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    return [batches[index] for index in torch.randperm(len(batches))]


def encode(bert, sentences):
    """Return the mean of each sentence's token vectors: token ids of B sentences -> (B, 384)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sentences], batch_first=True)
    mask = ids != 0                                                              # (B, T); 0 is padding
    return (bert(ids, mask) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def train(technique, bert, head, sentences):
    """Train all that requires a gradient, with weight decay for matrices only. Return the loss of each step."""
    parameters = [p for p in [*bert.parameters(), *head.parameters()] if p.requires_grad]
    print(f"{technique}: training {sum(p.numel() for p in parameters):,} parameters on {len(sentences):,} sentences")
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0}])
    if technique == "head":  # the encoder does not change, so its output for a sentence does not either
        print("encoding every sentence once", flush=True)
        features = torch.cat([encode(bert, [ids]) for ids, _ in sentences])      # (number of sentences, 384)
    batches = sum((make_batches(sentences) for _ in range(EPOCHS)), [])
    losses, steps, warmup = [], len(batches), round(0.1 * len(batches))
    for step, batch in enumerate(batches, 1):
        ids, labels = zip(*[sentences[index] for index in batch])
        x = features[batch] if technique == "head" else encode(bert, ids)        # (B, 384)
        loss = F.cross_entropy(head(x), torch.tensor(labels))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:  # the learning rate rises for a tenth of the steps, then falls
            group["lr"] = RATES[technique] * min(step / warmup, (steps - step + 1) / (steps - warmup))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 50 == 0:
            print(f"step {step:3} of {steps}   loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
    return losses


if __name__ == "__main__":
    if sys.argv[1:] not in [[technique] for technique in RATES]:
        sys.exit(f"usage: python minipeft/micro.py {'|'.join(RATES)}")
    if not (WEIGHTS.exists() and DATA.exists()):
        sys.exit("the weights or the data are not here: python train.py head fetches both")
    torch.manual_seed(0)
    training_set, test_set = read(DATA, Tokenizer.from_file(str(WEIGHTS / "tokenizer.json")))
    bert, head = load(Bert(), WEIGHTS / "model.safetensors"), Head()
    apply(sys.argv[1], bert)
    train(sys.argv[1], bert, head, training_set)
    head.eval()
    if sys.argv[1] == "lora":
        swap(bert, LoRALinear.merge)
    with torch.no_grad():
        right = [head(encode(bert, [ids])).argmax() == label for ids, label in test_set]
    print(f"test accuracy {sum(right) / len(right):.1%} on {len(right):,} sentences")

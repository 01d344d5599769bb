"""From a corpus of labelled sentences to batches of token ids: tokenise, split, batch, pad.

A corpus is a few flat arrays: the tokens of all sentences end to end, and where each sentence starts, its label, file
and line. Texts are not kept, so that a million sentences fit into memory. tools/texts.py reads it from files.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from .tools.files import UserError

PARTS = 11  # the hash of its text puts each sentence into one of these parts
DEV = 10    # the part on which all choices are made; parts 0 to 9 take turns as the test set
ENOUGH = 1000  # dev sentences, if there are fewer training sentences than that


# -- the corpus -------------------------------------------------------------------------------------------

@dataclass
class Corpus:
    """n labelled sentences. Sentence i has the tokens[starts[i]:starts[i + 1]]."""
    files: list         # the paths read; the --test file, if given, comes first
    reading: dict       # how they are read: options of tools/texts.py's open_table
    classes: list       # the names of the labels, sorted; whole numbers by value
    tokens: np.ndarray  # (total tokens,) int32
    starts: np.ndarray  # (n + 1,) int64
    labels: np.ndarray  # (n,) int64, indices into classes
    file: np.ndarray    # (n,) int64, indices into files
    line: np.ndarray    # (n,) int64, line in that file
    hashes: np.ndarray  # (n,) uint64, equal for texts that differ in case and spacing only
    notes: list         # what was left out or cut, to be printed as warnings

    def __len__(self):
        return len(self.labels)

    @property
    def lengths(self):
        """(n,) number of tokens in each sentence, [CLS] and [SEP] included"""
        return np.diff(self.starts)

    def sentences(self, indices):
        """Return the token ids of some sentences as a list of arrays."""
        return [self.tokens[self.starts[index]:self.starts[index + 1]] for index in indices]


def load_tokenizer(folder, max_length, vocab_size=None):
    """Load the tokenizer of a folder of weights; it cuts at `max_length` tokens and does not pad.

    UserError if there is none, if it does not put [CLS] and [SEP] around a text, or if a token has an id that an
    encoder of `vocab_size` tokens does not know.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is missing or not a tokenizer ({error}): fetch the file again, or make it as "
                        "weights/README.md says (also from vocab.txt)") from None
    tokenizer.no_padding()  # files from sentence-transformers pad everything to 128
    tokenizer.enable_truncation(max_length)
    special = tokenizer.encode("").ids
    if len(special) < 2:
        raise UserError(f"{path} has no template (post_processor) that puts [CLS] and [SEP] around a text: take the "
                        "file of the original model")
    highest = max([*tokenizer.get_vocab().values(), *special])
    if vocab_size and highest >= vocab_size:
        raise UserError(f"{path} has token ids up to {highest:,}, and the encoder has {vocab_size:,} tokens, from 0: "
                        "they do not belong together")
    return tokenizer


def tokenize(tokenizer, texts):
    """Return the token ids of each text as int32 arrays, and how many texts were cut."""
    sentences, cut = [], 0
    for start in range(0, len(texts), 1000):  # in parts, since the library's own result is large
        for encoding in tokenizer.encode_batch_fast(texts[start:start + 1000]):
            sentences.append(np.array(encoding.ids, np.int32))
            cut += bool(encoding.overflowing)
    return sentences, cut


def split(corpus, fold=0):
    """Return the indices of the sentences to train on, to choose on and to test on: (train, dev, test).

    The hash of its text puts a sentence into one of eleven parts; texts that differ in case and spacing only share a
    part. Part 10 is dev. Fold i tests on part i and trains on the other nine. With --test, every fold tests on that
    file and trains on all parts except dev. Raises UserError if a set is empty or training lacks a class.
    """
    part = (corpus.hashes % PARTS).astype(int)
    is_test = corpus.file == 0 if len(corpus.files) > 1 else part == fold
    sets = {"training": ~is_test & (part != DEV), "dev": ~is_test & (part == DEV), "test": is_test}
    for name, chosen in sets.items():
        present = np.unique(corpus.labels[chosen])
        if not len(present) or name == "training" and len(present) < len(corpus.classes):
            lack = ", ".join(repr(label) for i, label in enumerate(corpus.classes) if i not in present)
            raise UserError(f"{', '.join(map(str, corpus.files))}: the {name} set has no sentence labelled {lack:.300} "
                            f"({len(corpus):,} sentences in all); add more of them")
    return tuple(np.flatnonzero(chosen) for chosen in sets.values())


def limit(corpus, train_set, dev_set, most=None, seed=0):
    """Return (train, dev) with at most `most` training sentences and no more dev sentences than training sentences,
    or ENOUGH if that is more.

    The seed draws the training sentences, at least one of each class. Dev keeps the lowest hashes, whatever the seed.
    UserError if `most` is less than the number of classes.
    """
    if most:
        if most < len(corpus.classes):
            raise UserError(f"--limit {most} is less than the {len(corpus.classes)} classes; take more")
        drawn = np.random.default_rng(seed).permutation(train_set)
        _, first = np.unique(corpus.labels[drawn], return_index=True)  # the first sentence of each class
        train_set = np.sort(np.concatenate([drawn[first], np.delete(drawn, first)])[:most])
    enough = max(len(train_set), ENOUGH)
    if len(dev_set) > enough:
        corpus.notes.append(f"dev is measured on {enough:,} of its {len(dev_set):,} sentences, since training has few")
        dev_set = np.sort(dev_set[np.argsort(corpus.hashes[dev_set], kind="stable")[:enough]])
    return train_set, dev_set


# -- batches ----------------------------------------------------------------------------------------------

def batches_of_like_length(lengths, batch_size, rng=None):
    """Group sentences 0 .. n - 1 of similar length into batches, so that there is little padding.

    With a generator, ties and the order of the batches are random: a new epoch. Without, longest first.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
    return batches


def batches_of_tokens(lengths, budget=1024):
    """Group sentences 0 .. n - 1 for inference, longest first: one sentence a batch, or several with at most `budget`
    tokens in all, padded (before `pad` rounds the length up)."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // lengths[order[start]])
        batches.append(order[start:start + size])
        start += size
    return batches


def pad(sentences, device="cpu", multiple=1):
    """Token ids of a few sentences -> input_ids (batch, length) int64, attention_mask (batch, length) bool.

    The length is that of the longest sentence, rounded up to a multiple of `multiple`. Without padding the mask
    is None.
    """
    lengths = np.array([len(ids) for ids in sentences])
    length = -(-lengths.max() // multiple) * multiple
    input_ids = np.zeros((len(sentences), length), np.int64)
    mask = np.arange(length) < lengths[:, None]
    input_ids[mask] = np.concatenate(sentences)
    attention_mask = None if mask.all() else torch.from_numpy(mask).to(device)
    return torch.from_numpy(input_ids).to(device), attention_mask

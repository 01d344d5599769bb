"""Measures of predictions on labelled sentences: accuracy with an interval, loss, macro-F1, correlation, confusions."""
import numpy as np

CONFUSIONS = 10  # shown of more classes than a table has room for
WIDEST = 12      # characters of a class name in a table


def wilson(right, total, z=1.96):
    """A 95% interval of a proportion: (low, high). Wilson (1927): honest for few cases and near 0 and 1."""
    share = right / total
    middle = share + z**2 / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return (middle - half) / (1 + z**2 / total), (middle + half) / (1 + z**2 / total)


def confusion(labels, predictions, classes):
    """Count (label, prediction): two arrays (n,) of indices -> (classes, classes), a row for each label."""
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def macro_f1(counts):
    """The mean of F1 = 2 right / (labelled + predicted) over the classes that are labelled or predicted at all."""
    size = counts.sum(0) + counts.sum(1)
    return float((2 * np.diag(counts)[size > 0] / size[size > 0]).mean())


def matthews(counts):
    """The correlation of labels and predictions, -1 to 1 (Matthews 1975; several classes: Gorodkin 2004); 0 if either
    is constant."""
    total, labelled, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    scale = (total**2 - (labelled**2).sum()) * (total**2 - (predicted**2).sum())
    return float((total * np.trace(counts) - labelled @ predicted) / np.sqrt(scale)) if scale else 0.0


def log_probabilities(logits):
    """(n, classes) -> (n, classes), float64"""
    shifted = logits.astype(float) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def log_loss(logits, labels):
    """The mean cross-entropy in nats: (n, classes), (n,) -> a number."""
    return float(-log_probabilities(logits)[np.arange(len(labels)), labels].mean())


def short(name):
    return name if len(name) <= WIDEST else name[:WIDEST - 1] + "…"


def summary(logits, labels, classes):
    """Two lines on logits (n, classes) and labels (n,). A constant answer gets the share of the largest class."""
    counts = confusion(labels, logits.argmax(1), len(classes))
    total, right, labelled = len(labels), np.trace(counts), counts.sum(1)
    low, high = wilson(right, total)
    numbers = f"loss {log_loss(logits, labels):.3f}, macro-F1 {macro_f1(counts):.3f}"
    if len(classes) == 2:
        numbers += f", Matthews correlation {matthews(counts):.3f}"
    return [f"accuracy {right / total:.1%} on {total:,} {'sentence' if total == 1 else 'sentences'} "
            f"[{100 * low:.1f}, {100 * high:.1f}] (95% interval), largest class {labelled.max() / total:.1%} "
            f"({short(classes[labelled.argmax()])})", numbers]


def confusions(logits, labels, classes):
    """Lines that show which class is taken for which: a table if it fits into 100 columns, else the most frequent."""
    counts = confusion(labels, logits.argmax(1), len(classes))
    width = 2 + max(max(len(short(name)) for name in classes), len(f"{counts.max():,}"))
    if width * (len(classes) + 1) + 6 <= 100:
        rows = [[short(name), *(f"{number:,}" for number in row)] for name, row in zip(classes, counts)]
        rows.insert(0, ["", *map(short, classes)])
        lines = ("".join(f"{cell:>{width}}" for cell in row) for row in rows)
        return ["labelled (rows) and predicted (columns):", *lines]
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [(wrong.flat[place], *divmod(int(place), len(classes))) for place in order if wrong.flat[place]]
    return ["most frequent confusions (count, labelled, predicted):",
            *(f"{number:>7,}  {classes[label]}  {classes[guess]}" for number, label, guess in pairs)]

"""Every figure, drawn from plain numbers."""
import matplotlib

matplotlib.use("Agg")  # files only: no window, no display needed
import matplotlib.pyplot as plt

TRAIN, DEV = "#0072b2", "#d55e00"  # two colours that colour-blind readers tell apart (Okabe and Ito)


def curves(history, title, path):
    """Loss and accuracy after each epoch, train against dev. history: rows as in history.csv."""
    epochs = [row["epoch"] for row in history]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, measure, scale, label in zip(axes, ("loss", "accuracy"), (1, 100), ("cross-entropy loss (nats)",
                                                                                "accuracy (%)")):
        for name, colour, style in (("train", TRAIN, "o-"), ("dev", DEV, "s--")):
            values = [scale * row[f"{name}_{measure}"] for row in history]
            axis.plot(epochs, values, style, color=colour, label=name)
        axis.set(xlabel="epochs trained", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)

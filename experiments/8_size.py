"""8. Does a curve through small runs predict a larger one? (Beyond the paper.)

    python experiments/8_size.py --predict         # from the 15 smaller runs, before the largest
    python experiments/8_size.py --predict_next    # from those of 600 steps and more: two others
    python experiments/8_size.py                   # predictions and outcomes

The form is that of Hoffmann et al. 2022 (arXiv 2203.15556, eq. 2): L = E + A / N^a + B / D^b, with
N weights (the embedding and the output layer left out) and D tokens. Expected: the largest run is
within 0.05 nats of the prediction. Refuted if it is further away. The learning rates were not tuned
for each size, and no claim is made outside the measured range.

It was further away, by 0.081. One more look, after the fact: without the runs of 150 steps, a third
of which is warm-up, the same fit would have missed by 0.047, without those of 300 too by 0.012. So
the eight runs of 600 steps and more predict two that had not been made then: dim 256 with 2,400
steps, dim 320 with 1,200. Expected: each within twice the fit's error. Refuted if one is not.
"""
import itertools
import json

import common

import numpy as np

from plot_dynamics import COLOURS
from support.flags import Parser
from support.runs import script

EXPERIMENT = "8_size"
DIMS = (64, 128, 192, 256)
STEPS = (150, 300, 600, 1200)
SIZES = list(itertools.product(DIMS, STEPS))  # the last is the largest
TOKENS = 1024  # a step
VOCABULARY = 4096
WINDOW = 128
LAYERS = 4
LONG = [size for size in SIZES if size[1] >= 600]
NEXT = [(256, 2400), (320, 1200)]


def weights(dim):
    """N: queries and output 2 dim², keys and values of a head of 64, feed-forward 3 · 3 dim²."""
    return LAYERS * (2 * dim**2 + 2 * 64 * dim + 9 * dim**2)


def flops(dim, steps):
    """Of all training: 6 for each weight and token (with the output layer), and attention."""
    per_token = 6 * (weights(dim) + dim * VOCABULARY) + 12 * LAYERS * dim * WINDOW
    return per_token * steps * TOKENS


def loss_of(size):
    dim, steps = size
    run = common.log_of(EXPERIMENT, f"dim{dim}_steps{steps}")
    return common.ends([run], "eval", "val_loss")[0]


def terms(sizes, a, b):
    """Rows (1, N^-a, D^-b), in which the loss is linear."""
    dims, steps = np.array(sizes, dtype=float).T
    return np.stack([np.ones(len(dims)), weights(dims)**-a, (steps * TOKENS)**-b], axis=1)


def fit(sizes, losses):
    """(E, A, B), a, b with the smallest squared error; a and b are searched on a grid."""
    smallest = np.inf
    for a, b in itertools.product(np.arange(0.02, 1.51, 0.02), repeat=2):
        x = terms(sizes, a, b)
        factors = np.linalg.lstsq(x, losses)[0]
        error = np.square(x @ factors - losses).sum()
        if factors.min() >= 0 and error < smallest:
            smallest = error
            best = factors, a, b
    return best


def error_of(residuals):
    """Standard error of a fit with 5 parameters."""
    return np.sqrt(np.square(residuals).sum() / (len(residuals) - 5))


def predict_next(file):
    """Write what the long runs say of two others."""
    losses = [loss_of(size) for size in LONG]
    factors, a, b = fit(LONG, losses)
    error = error_of(terms(LONG, a, b) @ factors - losses)
    guesses = terms(NEXT, a, b) @ factors
    for (dim, steps), guess in zip(NEXT, guesses):
        print(f"dim {dim}, {steps:,} steps: {guess:.4f} ± {2 * error:.4f}")
    file.write_text(json.dumps({"val_loss": list(guesses), "margin": 2 * error}) + "\n")


def draw(losses, fitted, predicted):
    """A figure: all runs beside the fit, and what the fit misses."""
    residuals = losses - fitted
    figure, (panel, right) = common.figure_of(2, height=3.6)
    for number, (dim, colour) in enumerate(zip(DIMS, COLOURS)):
        x = flops(dim, np.array(STEPS))
        part = slice(number * len(STEPS), (number + 1) * len(STEPS))
        panel.plot(x, fitted[part], lw=1, color=colour)
        panel.plot(x, losses[part], "o", ms=5, color=colour, label=f"dim {dim}")
        right.plot(x, residuals[part], "o", color=colour)
    largest = flops(*SIZES[-1])
    panel.plot(largest, predicted, "k*", ms=12, label="predicted without it")
    right.plot(largest, losses[-1] - predicted, "k*", ms=12)
    right.axhline(0, color="0.5", lw=1)
    panel.set(title="Lines: fitted to all runs but the largest", xlabel="FLOPs of the training",
              ylabel="validation loss, nats", xscale="log", ylim=(3.2, 6.2))
    right.set(title="Measured minus fitted (star: predicted)", xlabel="FLOPs of the training",
              ylabel="nats", xscale="log")
    panel.legend(loc="upper right")
    return figure


@script
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--predict", action="store_true", help="the largest run, before it is made")
    parser.add_argument("--predict_next", action="store_true", help="the two that follow it")
    args = parser.parse_args(argv)
    if args.predict_next:
        predict_next(common.LOGS / EXPERIMENT / "next.json")
        return
    losses = [loss_of(size) for size in SIZES[:-1]]
    factors, a, b = fit(SIZES[:-1], losses)
    fitted = terms(SIZES, a, b) @ factors
    form = "L = {:.3f} + {:.3g} / N^{:.2f} + {:.3g} / D^{:.2f}".format(
        factors[0], factors[1], a, factors[2], b)
    file = common.LOGS / EXPERIMENT / "prediction.json"
    if args.predict:
        file.write_text(json.dumps({"val_loss": fitted[-1]}) + "\n")
        print(f"{form}: predicted for the largest run {fitted[-1]:.4f}")
        return
    predicted = json.loads(file.read_text())["val_loss"]  # before the largest run was made
    losses.append(loss_of(SIZES[-1]))
    residuals = losses - fitted
    figure = draw(losses, fitted, predicted)
    found = {
        "form": form,
        "error of the fit": f"{error_of(residuals[:-1]):.4f}",
        "predicted": f"{predicted:.4f}", "outcome": f"{losses[-1]:.4f}",
        "outcome minus prediction": f"{losses[-1] - predicted:+.4f}"}
    for least in (300, 600):  # had the shorter runs been left out
        part = [size for size in SIZES[:-1] if size[1] >= least]
        factors, a, b = fit(part, [loss_of(size) for size in part])
        miss = losses[-1] - (terms(SIZES[-1:], a, b) @ factors)[0]
        found[f"from runs of {least} steps and more: outcome minus prediction"] = f"{miss:+.4f}"
    following = json.loads((common.LOGS / EXPERIMENT / "next.json").read_text())
    for size, guess in zip(NEXT, following["val_loss"]):
        found["dim {}, {:,} steps: predicted ± twice the fit's error, outcome".format(*size)] = (
            f"{guess:.4f} ± {following['margin']:.4f}, {loss_of(size):.4f}")
    common.report(EXPERIMENT, figure, found)


if __name__ == "__main__":
    main()

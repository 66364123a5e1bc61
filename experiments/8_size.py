"""8. Does a curve through small runs predict a larger one? (Beyond the paper.)

    python experiments/8_size.py --predict    # from the 15 smaller runs, before the largest is made
    python experiments/8_size.py              # prediction and outcome

The form is that of Hoffmann et al. 2022 (arXiv 2203.15556, eq. 2): L = E + A / N^a + B / D^b, with
N weights (the embedding and the output layer left out) and D tokens. Expected: the largest run is
within 0.05 nats of the prediction. Refuted if it is further away. The learning rates were not tuned
for each size, and no claim is made outside the measured range.
"""
import itertools
import json
import sys

import common
import numpy as np

from support.flags import Parser
from support.runs import script

EXPERIMENT = "8_size"
DIMS = (64, 128, 192, 256)
STEPS = (150, 300, 600, 1200)
LARGEST = (256, 1200)
TOKENS = 1024  # a step
VOCABULARY = 4096
WINDOW = 128
LAYERS = 4


def weights(dim):
    """N: queries and output 2 dim², keys and values of a head of 64, feed-forward 3 · 3 dim²."""
    return LAYERS * (2 * dim**2 + 2 * 64 * dim + 9 * dim**2)


def flops(dim, steps):
    """Of all training: 6 for each weight and token (with the output layer), and attention."""
    per_token = 6 * (weights(dim) + dim * VOCABULARY) + 12 * LAYERS * dim * WINDOW
    return per_token * steps * TOKENS


def loss_of(size):
    run = common.log_of(EXPERIMENT, f"dim{size[0]}_steps{size[1]}")
    return common.last(run, "eval", "val_loss")


def terms(sizes, a, b):
    """Rows (1, N^-a, D^-b), in which the loss is linear."""
    dims, steps = np.array(sizes, dtype=float).T
    return np.stack([np.ones(len(dims)), weights(dims)**-a, (steps * TOKENS)**-b], axis=1)


def fit(sizes):
    """(E, A, B, a, b) with the smallest squared error; a and b are searched on a grid."""
    losses = np.array([loss_of(size) for size in sizes])
    best = None
    for a, b in itertools.product(np.arange(0.02, 1.51, 0.02), repeat=2):
        x = terms(sizes, a, b)
        found, *_ = np.linalg.lstsq(x, losses, rcond=None)
        error = np.square(x @ found - losses).sum()
        if found.min() >= 0 and (best is None or error < best[0]):
            best = (error, *found, a, b)
    return best[1:]


def at(parameters, size):
    E, A, B, a, b = parameters
    return float((terms([size], a, b) @ np.array([E, A, B]))[0])


@script
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--predict", action="store_true", help="the largest run, before it is made")
    args = parser.parse_args(argv)
    smaller = [(d, s) for d in DIMS for s in STEPS if (d, s) != LARGEST]
    parameters = fit(smaller)
    prediction = at(parameters, LARGEST)
    residuals = [loss_of(size) - at(parameters, size) for size in smaller]
    print("  L = {:.3f} + {:.3g} / N^{:.2f} + {:.3g} / D^{:.2f}".format(
        parameters[0], parameters[1], parameters[3], parameters[2], parameters[4]))
    file = common.LOGS / EXPERIMENT / "prediction.json"
    if args.predict:
        file.write_text(json.dumps({"val_loss": prediction}) + "\n")
        print(f"predicted for dim {LARGEST[0]}, {LARGEST[1]} steps: {prediction:.4f}")
        return
    predicted = json.loads(file.read_text())["val_loss"]  # as it was said before the run
    outcome = loss_of(LARGEST)
    figure, (panel, right) = common.figure_of(2, height=3.6)
    for dim, colour in zip(DIMS, common.COLOURS):
        x = [flops(dim, s) for s in STEPS]
        done = [(dim, s) for s in STEPS]
        panel.plot(x, [at(parameters, size) for size in done], "-", lw=1, color=colour)
        panel.plot(x, [loss_of(size) for size in done], "o", ms=5, color=colour, label=f"dim {dim}")
    panel.plot(flops(*LARGEST), predicted, "k*", ms=12, label="predicted before it was run")
    panel.set(xscale="log", xlabel="FLOPs of the training", ylabel="validation loss, nats",
              ylim=(3.2, 6.2))
    panel.set_title("Lines: fitted to all runs but the largest", fontsize=10)
    panel.legend(fontsize=8, loc="upper right")
    right.axhline(0, color="0.5", lw=1)
    for (dim, steps), residual in zip([*smaller, LARGEST], [*residuals, outcome - predicted]):
        marker = "k*" if (dim, steps) == LARGEST else "o"
        right.plot(flops(dim, steps), residual, marker, ms=6,
                   **({} if marker == "k*" else {"color": common.COLOURS[DIMS.index(dim)]}))
    right.set(xscale="log", xlabel="FLOPs of the training", ylabel="nats")
    right.set_title("Measured minus fitted (star: predicted)", fontsize=10)
    common.save(figure, EXPERIMENT)
    common.report(EXPERIMENT, {
        "form": "L = {:.3f} + {:.3g} / N^{:.2f} + {:.3g} / D^{:.2f}".format(
            parameters[0], parameters[1], parameters[3], parameters[2], parameters[4]),
        "error of the fit": f"{np.sqrt(np.square(residuals).sum() / (15 - 5)):.4f}",
        "predicted": f"{predicted:.4f}", "outcome": f"{outcome:.4f}",
        "outcome minus prediction": f"{outcome - predicted:+.4f}"})


if __name__ == "__main__":
    sys.exit(main())

"""growth.py — how speed and memory of a training step change with the width of the network and the
length of its windows, beside what the arithmetic alone would cost: `python -m bench growth`.

It is our step, not compiled. A size that is in growth.jsonl already is not measured again; so with
all of them there the command only draws. They should all be of one machine.
"""
import json
import sys
from dataclasses import replace

import numpy as np

from bench.measure import in_fresh_process, matmul_rate
from bench.plan import peak_of_step
from bench.step import DEFAULT, SIZES
from model import ModelConfig, flops_per_token
from plot_dynamics import open_figure
from support.progress import tqdm
from support.rows import read_json_rows
from support.runs import UserError

DIMS = (128, 256, 512, 1024)          # with windows of 256 tokens
WINDOWS = (128, 256, 512, 1024, 2048)  # at dim 256
POINTS = [(dim, 256) for dim in DIMS] + [(256, T) for T in WINDOWS if T != 256]
KEYS = {"dim", "seq_len", "tok_per_s", "peak_bytes", "smallest_bytes", "computed_bytes",
        "flops_per_token", "ceiling"}  # of a row
TOKENS = 2048  # a step, always: 16 windows of 128, 1 of 2048


def measure_growth(out, measure):
    """Add what growth.jsonl in the folder `out` lacks: for each size a row from measure(dim,
    seq_len). Draw growth.png. Returns the rows as text, the header first."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "growth.jsonl"
    rows = read_rows(file)
    known = [(row["dim"], row["seq_len"]) for row in rows]
    missing = [size for size in POINTS if size not in known]
    for dim, seq_len in tqdm(missing, desc="sizes", leave=False):
        rows.append(measure(dim, seq_len))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, out / "growth.png")
    return growth_table(rows)


def measure_size(args, device, dtype, dim, seq_len):
    """A row of growth.jsonl: tokens/s and peak of a fresh process, and what is computed about
    them. It is DEFAULT's network with another width or window, in heads of 32 numbers."""
    config = ModelConfig(dim, DEFAULT.n_layers, dim // 32, dim // 64, 3 * dim, DEFAULT.vocab_size,
                         max_seq_len=seq_len)
    micro_batch = TOKENS // seq_len
    measured = measure_alone(args, config, micro_batch)
    # Python, the libraries, and what these need for any network.
    smallest = measure_alone(args, replace(DEFAULT, dim=64, n_layers=1, max_seq_len=16), 1)
    return {"dim": dim, "seq_len": seq_len, "tok_per_s": TOKENS / measured["seconds"],
            "peak_bytes": measured["peak_bytes"], "smallest_bytes": smallest["peak_bytes"],
            "computed_bytes": peak_of_step(config, micro_batch),
            "flops_per_token": flops_per_token(config, seq_len),
            "ceiling": matmul_rate(2048, 2048, 2048, dtype, device)}


def measure_alone(args, config, micro_batch):
    """What a fresh process reports about our step in a network of these sizes."""
    flags = {"seq_len": config.max_seq_len, "micro_batch": micro_batch, "dtype": args.dtype,
             "device": args.device, "threads": args.threads}
    for name in SIZES:
        flags[name] = getattr(config, name)
    command = [sys.executable, "-m", "bench", "--alone", "ours"]
    for name, value in flags.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    return in_fresh_process(command)


def read_rows(file):
    """What was measured before. Raises UserError for a line that is not a row of it."""
    rows = []
    for place, row, _ in read_json_rows(file) if file.exists() else []:
        if not isinstance(row, dict) or row.keys() != KEYS:
            raise UserError(f"{place}: not a row that bench wrote — delete the line, and what is "
                            f"missing is measured again")
        rows.append(row)
    return rows


def ceiling_of(rows):
    """FLOP/s: the fastest that a matrix product was in any row."""
    return max(row["ceiling"] for row in rows)


def growth_table(rows):
    """Rows of text, the header first."""
    table = [["dim", "window", "tokens/s", "if only the arithmetic took time", "peak GB",
              "computed GB"]]
    for row in rows:
        bound = ceiling_of(rows) / row["flops_per_token"]
        computed = row["smallest_bytes"] + row["computed_bytes"]
        table.append([str(row["dim"]), str(row["seq_len"]), f"{row['tok_per_s']:,.0f}",
                      f"{bound:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}", f"{computed / 1e9:.2f}"])
    return table


def draw(rows, path):
    """Four panels: tokens/s and memory, against dim and against the window."""
    figure = open_figure((10, 7))
    panels = figure.subplots(2, 2, sharey="row")
    columns = [("dim", "seq_len", "width of the network (dim), windows of 256 tokens"),
               ("seq_len", "dim", "window in tokens, dim 256")]
    for (speed, memory), (key, fixed, label) in zip(panels.T, columns):
        chosen = sorted((row for row in rows if row[fixed] == 256), key=lambda row: row[key])
        values = {name: np.array([row[name] for row in chosen]) for name in KEYS}
        x = values[key]
        speed.plot(x, ceiling_of(rows) / values["flops_per_token"], "o--", color="0.6",
                   label="if only the arithmetic took time")
        speed.plot(x, values["tok_per_s"], "o-", label="measured")
        computed = values["smallest_bytes"] + values["computed_bytes"]
        memory.plot(x, computed / 1e9, "o--", color="0.6", label="computed")
        memory.plot(x, values["peak_bytes"] / 1e9, "o-", label="measured")
        speed.set(ylabel="tokens/s", yscale="log")
        memory.set(ylabel="peak memory, GB", ylim=(0, None))
        for panel in (speed, memory):
            panel.set(xscale="log", xlabel=label)
            panel.set_xticks(x, x)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend()
    figure.suptitle(f"A training step of {TOKENS:,} tokens, 6 layers, vocabulary 4,096, not "
                    f"compiled")
    figure.savefig(path)

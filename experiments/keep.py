"""keep.py — copy what the figures need from run folders into logs/, thinned.

    python experiments/keep.py logs/2_optimizer runs/reproduce/2/*    # a file for each run
    python experiments/keep.py logs/1_emergence runs/reproduce/1/* --every 20

Of the training rows only every n-th is kept. Settings are left out, since they are in reproduce.sh,
and so are numbers that no figure shows. The rows of evaluations.jsonl follow those of
metrics.jsonl.
"""
import json
from pathlib import Path

import common  # makes Python find the files at the root

from plot_dynamics import read_events
from support.flags import Parser, count, count_or_0
from support.runs import script

LEFT_OUT = ("config", "time", "file", "seq_len", "tokens", "lr", "grad_norm", "dt_ms")


def short(value):
    """Numbers with six digits, also in lists."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [short(item) for item in value]
    return value


def kept(events, every, after, only):
    """Yield the rows that are kept, shortened: starts, resumes, and what follows step `after`."""
    for event in events:
        if only is not None and event["event"] != only:
            continue
        if event["step"] <= after and event["event"] not in ("start", "resume"):
            continue
        if event["event"] == "train" and event["step"] % every != 0:
            continue
        yield {key: short(value) for key, value in event.items() if key not in LEFT_OUT}


@script
def main(argv=None):
    parser = Parser(description="Copy the logs of runs into logs/, thinned.")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--every", type=count, default=1, help="keep every n-th training row")
    parser.add_argument("--after", type=count_or_0, default=-1, help="only what follows this step")
    parser.add_argument("--only", metavar="EVENT", help="keep only these rows")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for run in args.runs:
        events = read_events(run / "metrics.jsonl")
        added = run / "evaluations.jsonl"
        if added.exists():
            events += read_events(added)
        rows = [json.dumps(row, ensure_ascii=False) + "\n"
                for row in kept(events, args.every, args.after, args.only)]
        (args.out / f"{run.name}.jsonl").write_text("".join(rows), encoding="utf-8")
    print(f"{len(args.runs)} logs in {args.out}")


if __name__ == "__main__":
    main()

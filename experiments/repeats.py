"""repeats.py — random tokens that repeat: made, and read by a network (experiment 6).

    python experiments/repeats.py make data/repeats          # shards to train on
    python experiments/repeats.py score runs/two --ids 64    # every checkpoint of a run

`score` shows the network 32 random tokens four times in a row, and adds a row {"event": "repeats",
"step", "ids", "drawn", "first_copy", "second_copy": nats per token, "prefix_matching"} to
evaluations.jsonl. The prefix-matching score of a head is the share of its attention that goes to
the token after the last occurrence of the present token (Olsson et al. 2022, arXiv 2209.11895): [a
list for each layer, a number for each head]. Evenly spread attention would have about 0.014.
"""
import math
from pathlib import Path

import common  # makes Python find the files at the root

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import load_model
from data import DataFolder
from support.durable import checkpoints
from support.files import new_folder, sha256_of, write_json
from support.flags import Parser, count
from support.runs import UserError, beginning, note, script

WINDOW = 128  # tokens of a sequence; each is a window of its own
IDS = 64      # to draw from; each is rare in a sequence
PERIODS = (16, 32)  # shortest and longest copy: of one length, its distance could be learned
PERIOD = 32   # tokens of a copy in `score`


def make(folder, sequences):
    """Write a data folder: each sequence is 16 to 32 random ids that repeat until it is full."""
    random = np.random.RandomState(0)
    splits = {}
    with new_folder(folder) as unfinished:
        for split, n in (("train", sequences), ("val", 256)):
            rows = np.zeros((n, WINDOW), dtype=np.uint16)
            for row in rows:
                period = random.randint(PERIODS[0], PERIODS[1] + 1)
                row[:] = np.resize(random.randint(0, IDS, period), WINDOW)
            tokens = np.append(rows, np.uint16(0))  # the last window needs one more target
            file = unfinished / f"{split}_0000.npy"
            np.save(file, tokens)
            splits[split] = [{"file": file.name, "tokens": len(tokens), "sha256": sha256_of(file)}]
        write_json(unfinished / "meta.json", {
            "tokenizer": "gpt2", "vocab_size": 257, "eot": 256, "dtype": "uint16", "splits": splits,
            "source": {"name": "repeats", "ids": IDS, "periods": PERIODS}})
    print(f"{folder}: {sequences:,} sequences of {WINDOW} tokens")


def sequences_like(ids, folder, n=16):
    """(n, 4 · PERIOD) random tokens, four times in a row: evenly drawn from the first `ids`, or as
    often as they stand in the training text of a data folder."""
    random = np.random.RandomState(1)
    shape = (n, PERIOD)
    if folder is None:
        drawn = random.randint(0, ids, shape)
    else:
        text = DataFolder(folder).train[0].tokens
        drawn = text[random.randint(0, len(text), shape)]
    return torch.from_numpy(np.tile(drawn, 4).astype(np.int64))


@torch.no_grad()
def score(model, tokens):
    """The losses on the first and the second copy, and the score of each head."""
    seen = []  # the attention weights of each layer, (B, n_heads, T, T)
    layers = [block.self_attn for block in model.model.layers]
    plain = layers[0].attend

    def watched(q, k, v, mask):
        k_of_head = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k_of_head.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask
        seen.append(scores.softmax(-1))
        return plain(q, k, v, mask)

    for layer in layers:
        layer.attend = watched
    logits, _ = model(tokens[:, :-1])
    for layer in layers:
        layer.attend = plain
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    at = torch.arange(PERIOD, losses.shape[1])  # positions whose token occurred a period before
    heads = [weights[:, :, at, at - PERIOD + 1].mean((0, 2)).tolist() for weights in seen]
    # losses[:, i] is the loss of token i + 1. Nothing tells the first token of a copy.
    return {"first_copy": losses[:, :PERIOD - 1].mean().item(),
            "second_copy": losses[:, PERIOD:2 * PERIOD - 1].mean().item(),
            "prefix_matching": heads}


@script
def main(argv=None):
    parser = Parser(description="Random tokens that repeat.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{make,score}")
    making = commands.add_parser("make", help="a data folder to train on")
    making.add_argument("folder", type=Path)
    making.add_argument("--sequences", type=count, default=24_000, help="for training")
    scoring = commands.add_parser("score", help="every checkpoint of a run")
    scoring.add_argument("run", type=Path)
    scoring.add_argument("--ids", type=count, default=4095, help="evenly drawn from so many ids")
    scoring.add_argument("--like", metavar="DATA", help="drawn as often as they stand there")
    args = parser.parse_args(argv)
    if args.command == "make":
        make(args.folder, args.sequences)
        return
    began = beginning(args.run)
    for step in checkpoints(args.run):
        model, tokenizer, _ = load_model(args.run, step)
        if args.ids > tokenizer.vocab_size:
            raise UserError(f"--ids {args.ids} is more than the vocabulary of the run, "
                            f"{tokenizer.vocab_size}")
        found = score(model, sequences_like(args.ids, args.like))
        drawn = "evenly" if args.like is None else "by frequency"
        row = {"event": "repeats", "step": step, "ids": args.ids, "drawn": drawn}
        note(args.run, row | found, began)
        best = max(max(layer) for layer in found["prefix_matching"])
        print(f"step {step}: first copy {found['first_copy']:.3f}, second "
              f"{found['second_copy']:.3f} nats; best head {best:.2f}")


if __name__ == "__main__":
    main()

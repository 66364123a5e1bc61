"""evaluate.py — score a model on held-out text: loss, bits per byte, and how much it makes of its context.

    python evaluate.py                                  # newest run, newest checkpoint, the data it was trained on
    python evaluate.py runs/tiny --step 64              # an earlier moment
    python evaluate.py runs/tiny --data data/mytext     # other text, of the same vocabulary

Appends an "eval" event to the run's evaluations.jsonl.
"""
import argparse
import json
import math
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import load_model, newest_run
from data import DataFolder, Windows
from errors import UserError, script


def choose_device(name=None):
    """torch.device of that name; by default cuda if there is one. Raises UserError if this machine has no such device."""
    try:
        device = torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
        assert device.type in ("cpu", "cuda", "mps")
        return device
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name} here — use --device cpu, or a build of torch that sees your GPU") from None


def choose_dtype(name, device):
    """The dtype of matrix products. bf16 only where the hardware has it: emulated, it is slower than fp32."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    x86 = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return torch.bfloat16 if x86 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()) else torch.float32


BATCH_TOKENS = 4096  # tokens per forward; fixed, so that a score does not depend on a flag
EIGHTHS = 8          # parts of the window for the loss by position


def evaluate(model, val, tokenizer, eval_tokens, autocast, progress=False):
    """Score `model` on the first `eval_tokens` of `val` (Windows in file order), rounded to whole windows.

    Returns {"val_loss": nats per target, "val_bpb": bits per byte of the scored text, "context_gain", "position_loss"}:
    position_loss is the mean loss in each eighth of the window, context_gain the first minus the last, in nats: how much
    the model makes of what it has read, after the in-context learning score of Olsson et al. 2022 (arXiv 2209.11895);
    comparable only at equal seq_len. Under DDP the batches go round the ranks, and every rank returns the exact whole."""
    device, T = next(model.parameters()).device, val.seq_len
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    windows = np.arange(min(val.total, max(1, eval_tokens // T)))
    size = max(1, BATCH_TOKENS // T)
    batches = [windows[i:i + size] for i in range(0, len(windows), size)]
    # A row per batch: nats at each position, and bytes. Each rank fills in its rows and leaves the others 0, so that the
    # total adds up the same numbers in the same order whatever the number of processes.
    sums = torch.zeros(len(batches), T + 1, dtype=torch.float64)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for i in tqdm(range(rank, len(batches), world), desc="evaluating", disable=not progress, leave=False):
            tokens = val.read(batches[i])                                                   # (n, T + 1)
            inputs, targets = torch.from_numpy(tokens).to(device)[:, :-1], torch.from_numpy(tokens).to(device)[:, 1:]
            with autocast:
                logits, _ = model(inputs)                                                   # (n, T, padded vocabulary)
            loss = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # (n, T)
            sums[i, :T] = loss.double().sum(0).cpu()
            sums[i, T] = int(tokenizer.byte_lengths[tokens[:, 1:]].sum())
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    nats, n_bytes = sums[:, :T].sum(0).cpu(), sums[:, T].sum().item()
    by_position = nats / len(windows)  # (T,) mean loss at each position
    eighths = [part.mean().item() for part in by_position.tensor_split(EIGHTHS)] if T >= EIGHTHS else []
    return {"val_loss": by_position.mean().item(),
            "val_bpb": nats.sum().item() / math.log(2) / max(1, n_bytes),
            "context_gain": eighths[0] - eighths[-1] if eighths else None,
            "position_loss": eighths}


def text_statistics(ids):
    """{"distinct_2": unique share of the bigrams, "repetition": share of the 4-grams seen before} of a token list."""
    def repeated(n):  # share of the n-grams that repeat an earlier one
        grams = Counter(zip(*(ids[i:] for i in range(n))))
        return 1 - len(grams) / grams.total() if grams else 0.0
    return {"distinct_2": 1 - repeated(2), "repetition": repeated(4)}


def continue_prompt(model, tokenizer, prompt, autocast, device):
    """{"prompt", "text", statistics} of 80 tokens, always drawn with the same seed: only the weights differ."""
    ids, generator = tokenizer.encode(prompt) or [tokenizer.eot], torch.Generator().manual_seed(0)
    with autocast, torch.compiler.set_stance("force_eager"):
        new = [int(next_id) for next_id in model.generate(torch.tensor([ids], device=device), 80, temperature=0.8, top_p=0.95,
                                                          eot=tokenizer.eot, generator=generator)]
    new = new[:-1] if new[-1] == tokenizer.eot else new
    return {"prompt": prompt, "text": tokenizer.decode(new), **text_statistics(new)}


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a checkpoint on held-out text.")
    parser.add_argument("run", nargs="?", help="run folder (default: the newest run)")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--data", help="data folder (default: the one it was trained on)")
    parser.add_argument("--seq_len", type=int, help="window (default: as in training)")
    parser.add_argument("--eval_tokens", type=int, default=10_000_000, help="at most so many tokens (default 10M)")
    parser.add_argument("--device", help="default: cuda if there is one")
    args = parser.parse_args(argv)

    for name in ("seq_len", "eval_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is out of range — the least is 1")

    run, device = Path(args.run) if args.run else newest_run(), choose_device(args.device)
    model, tokenizer, step = load_model(run, args.step, device)
    try:
        settings = dict(json.loads((run / "config.json").read_text()))
        folder = args.data or settings["data"]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{run}/config.json is missing or damaged — train with --resume writes it again") from None
    data = DataFolder(folder)
    if data.vocab_size != tokenizer.vocab_size:
        raise UserError(f"{folder} has a vocabulary of {data.vocab_size}, {run} of {tokenizer.vocab_size} — prepare it "
                        f"again with --vocab_size {tokenizer.vocab_size}")
    seq_len = args.seq_len or settings["seq_len"]
    if seq_len > model.config.max_seq_len:
        raise UserError(f"--seq_len {seq_len} is more than the model's max_seq_len {model.config.max_seq_len}")
    val = Windows(data.val, seq_len, data.vocab_size)

    autocast = torch.autocast(device.type, enabled=False)  # fp32
    result = evaluate(model, val, tokenizer, args.eval_tokens, autocast, progress=True)
    print(f"{run} step {step} on {folder}: val loss {result['val_loss']:.4f} nats/token | "
          f"{result['val_bpb']:.4f} bits/byte | context gain {result['context_gain'] or 0:.3f} nats")
    print("loss by eighth of the window: " + " ".join(f"{loss:.3f}" for loss in result["position_loss"]))
    event = {"event": "eval", "step": step, "time": time.time(), "data": str(folder), "dtype": "fp32", **result}
    with open(run / "evaluations.jsonl", "a") as log:
        log.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    main()

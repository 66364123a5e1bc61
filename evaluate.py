"""evaluate.py — score a model: loss and bits per byte of held-out text, use of context, multiple choice, samples.

    python evaluate.py                                  # newest run, newest checkpoint, the data it was trained on
    python evaluate.py runs/tiny --step 64              # an earlier moment
    python evaluate.py runs/tiny --data data/mytext     # other text, of the same vocabulary
    python evaluate.py runs/1.7b --benchmark hellaswag_val.jsonl --style harness    # questions in HellaSwag's format

Appends "eval" and "benchmark" events to the run's evaluations.jsonl.
"""
import argparse
import itertools
import json
import math
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import load_model
from data import DataFolder, Windows
from devices import add_up, choose_device, processes
from errors import UserError, script
from log import note
from model import KVCache
from runs import newest_run, settings_of


BATCH_TOKENS = 4096  # tokens per forward; fixed, so that a score does not depend on a flag
ROWS = 1024          # tokens whose logits are held at once
EIGHTHS = 8          # parts of the window for the loss by position


def token_losses(model, hidden, targets):
    """−ln p(target) for each row of hidden (N, dim) and targets (N,): (N,) float64, on the CPU. A few rows at a time, so
    that the logits stay in a processor's cache: on a CPU that is nearly twice as fast."""
    parts = zip(hidden.split(ROWS), targets.split(ROWS))
    return torch.cat([F.cross_entropy(model.lm_head(h).float(), t, reduction="none").double().cpu() for h, t in parts])


def evaluate(model, val, tokenizer, eval_tokens, autocast, progress=False):
    """Score `model` on the first `eval_tokens` of `val` (Windows in file order), rounded to whole windows.

    Returns {"val_loss": nats per target, "val_bpb": bits per byte of the scored text, "context_gain",
    "context_gain_stderr", "position_loss"}: position_loss is the mean loss in each eighth of the window, context_gain the
    first minus the last, in nats: how much the model makes of what it has read, after the in-context learning score of
    Olsson et al. 2022 (arXiv 2209.11895; its sign is the opposite); comparable only at equal seq_len. The eighths are
    different text, and of few windows that is most of it: context_gain_stderr is the standard error over windows. Under
    DDP the batches go round the ranks, and every rank returns the exact whole."""
    device, T, (rank, world) = next(model.parameters()).device, val.seq_len, processes()
    windows = np.arange(min(val.total, max(1, eval_tokens // T)))
    size = max(1, BATCH_TOKENS // T)
    batches = [windows[i:i + size] for i in range(0, len(windows), size)]
    sums = torch.zeros(len(batches), T + 2, dtype=torch.float64)  # a row per batch: nats at each position, bytes, gains²
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for i in tqdm(range(rank, len(batches), world), desc="evaluating", disable=None if progress else True, leave=False):
            tokens = val.read(batches[i])                                                   # (n, T + 1)
            inputs, targets = torch.from_numpy(tokens).to(device)[:, :-1], torch.from_numpy(tokens).to(device)[:, 1:]
            with autocast:
                loss = token_losses(model, model.model(inputs).flatten(0, 1), targets.flatten())  # (n · T,)
            loss = loss.view(-1, T)
            sums[i, :T] = loss.sum(0)
            parts = loss.tensor_split(EIGHTHS, dim=1)
            sums[i, T + 1] = (parts[0].mean(1) - parts[-1].mean(1)).square().sum() if T >= EIGHTHS else 0
            sums[i, T] = int(tokenizer.byte_lengths[tokens[:, 1:]].sum())
    sums = add_up(sums, device)
    nats, n_bytes = sums[:, :T].sum(0), sums[:, T].sum().item()
    by_position = nats / len(windows)  # (T,) mean loss at each position
    eighths = [part.mean().item() for part in by_position.tensor_split(EIGHTHS)] if T >= EIGHTHS else []
    gain = eighths[0] - eighths[-1] if eighths else None
    variance = max(0.0, sums[:, T + 1].sum().item() / len(windows) - gain**2) if eighths else None
    return {"val_loss": by_position.mean().item(),
            "val_bpb": nats.sum().item() / math.log(2) / max(1, n_bytes),
            "context_gain": gain,
            "context_gain_stderr": math.sqrt(variance / max(1, len(windows) - 1)) if eighths else None,
            "position_loss": eighths}


def text_in_words(result):
    """An "eval" event as one line."""
    gain = f" | context gain {result['context_gain']:.3f} ± {result['context_gain_stderr']:.3f}" if result["position_loss"] else ""
    return f"val loss {result['val_loss']:.4f} | {result['val_bpb']:.4f} bits/byte{gain}"


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: of the endings of a text, the model chooses the one that it finds most probable.

def log_likelihoods(model, questions, autocast, rank=0, world=1, progress=False):
    """ln P(ending | context), in nats, for questions [(context ids, [ending ids, …]), …] with C endings each: (N, C).
    Of several processes each does its share of the batches, and leaves the other rows 0."""
    # A question's endings share its context, so it is read once, into a KV cache that all its endings continue. The rows
    # of a batch must share the cache's length: it holds a multiple of 8 tokens, and what is left of the context goes
    # before each ending. Questions of similar length then meet in one batch, padded on the right, where no one looks.
    cached = [(len(context) - 1) // 8 * 8 for context, _ in questions]
    rest = [len(context) - n + max(map(len, endings)) for (context, endings), n in zip(questions, cached)]
    batches, C = [], len(questions[0][1])
    for S, group in itertools.groupby(sorted(range(len(questions)), key=lambda i: (cached[i], rest[i])), key=lambda i: cached[i]):
        group = list(group)
        size = max(1, BATCH_TOKENS // (S + C * rest[group[-1]]))
        batches += [(S, group[i:i + size]) for i in range(0, len(group), size)]
    device = next(model.parameters()).device
    result = torch.zeros(len(questions), C, dtype=torch.float64)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast:
        for S, group in tqdm(batches[rank::world], desc="choosing", disable=None if progress else True, leave=False):
            R = rest[group[-1]]
            tokens = torch.zeros(len(group) * C, R, dtype=torch.long)
            targets = torch.full_like(tokens, -100)
            for row, (i, ending) in enumerate((i, ending) for i in group for ending in questions[i][1]):
                start = len(questions[i][0]) - S
                tokens[row, :start + len(ending)] = torch.tensor(questions[i][0][S:] + ending)
                targets[row, start:start + len(ending)] = torch.tensor(ending)
            cache = KVCache(replace(model.config, max_seq_len=S + R)) if S else None
            if cache:
                model.model(torch.tensor([questions[i][0][:S] for i in group], device=device), cache)
                cache.keys, cache.values = (kept.repeat_interleave(C, dim=1) for kept in (cache.keys, cache.values))
            hidden = model.model(tokens[:, :-1].to(device), cache)                                # (n · C, R − 1, dim)
            scored = targets[:, 1:] != -100  # only these need the output layer
            loss = torch.zeros(scored.shape, dtype=torch.float64)
            loss[scored] = token_losses(model, hidden[scored.to(device)], targets[:, 1:][scored].to(device))
            result[group] = -loss.sum(1).view(-1, C)
    return result


class Benchmark:
    """Questions of a JSONL file in HellaSwag's format (Zellers et al. 2019, arXiv 1905.07830), tokenized.

    Two conventions are in use, and their scores must not be mixed. style "token", the paper's and build-nanogpt's: `ctx`,
    then " " + ending; acc_norm divides by tokens. style "harness", lm-evaluation-harness's, which leaderboards show:
    "activity_label: ctx_a ctx_b" without bracketed remarks; acc_norm divides by the ending's characters.
    Raises UserError naming file and line. Contexts longer than `window` lose their beginning.
    items: read only the first so many lines."""

    def __init__(self, path, tokenizer, window, style="token", items=None):
        self.name, self.style, self.eot = Path(path).stem, style, tokenizer.eot
        self.texts, self.questions, labels, norms = [], [], [], []
        with open(path, "rb") as file:
            for number, line in enumerate(itertools.islice(file, items), 1):
                if not line.strip():
                    continue
                try:
                    context, endings, label = self.parse(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    needed = "ctx" if style == "token" else "activity_label, ctx_a, ctx_b"
                    raise UserError(f"{path}:{number}: not a question in HellaSwag's format ({needed}, a list of endings, as many as in the "
                                    f"first line, label) — mend the line or remove it") from None
                ids = [tokenizer.encode(" " + ending) for ending in endings]
                room = window + 1 - max(map(len, ids))  # the last token of an ending is not read, only predicted
                if room < 1:
                    raise UserError(f"{path}:{number}: an ending of {window + 1 - room} tokens is longer than the window of {window} — remove "
                                    f"the line, or use a longer --seq_len")
                self.texts.append((context, endings))
                self.questions.append((tokenizer.encode(context)[-room:], ids))
                labels.append(label)
                norms.append([len(ending) for ending in (ids if style == "token" else endings)])
        if not self.questions:
            raise UserError(f"{path}: no questions in it — give a file in HellaSwag's format")
        self.labels, self.norms = torch.tensor(labels), torch.tensor(norms)  # (N,), (N, C)

    def parse(self, item):
        """(context, endings, label) of a line; one of several exceptions if it is not a question."""
        if self.style == "token":
            context, endings = item["ctx"], item["endings"]
        else:
            def plain(text):
                return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
            context = plain(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
            endings = [plain(ending) for ending in item["endings"]]
        label = int(str(item["label"]))  # a string in some releases
        if not isinstance(item["endings"], list) or not all(isinstance(text, str) and text.strip() for text in (context, *endings)):
            raise ValueError("texts are missing")
        if not 0 <= label < len(endings) or len(endings) < 2 or self.texts and len(endings) != len(self.texts[0][1]):
            raise ValueError("the label is none of the endings, or they are not as many as before")
        return context, endings, label

    def score(self, model, autocast, progress=False):
        """The fields of a "benchmark" event. acc: the likeliest ending is the right one; acc_norm: the likeliest per token or
        character; acc_pmi: the one that the context makes most likelier than it is after end-of-text alone, which takes
        away what is likely anywhere (Holtzman et al. 2021, arXiv 2104.08315). With the standard error of each."""
        device, n, scores = next(model.parameters()).device, len(self.labels), {}
        found = add_up(log_likelihoods(model, self.questions, autocast, *processes(), progress), device)  # (N, C)
        alone = add_up(self.without_context(model, self.questions, autocast, *processes()), device)       # (N, C)
        for name, by in (("", found), ("_norm", found / self.norms), ("_pmi", found - alone)):
            share = (by.argmax(1) == self.labels).double().mean().item()
            scores |= {f"acc{name}": share, f"stderr{name}": math.sqrt(share * (1 - share) / max(1, n - 1))}
        return {"name": self.name, "style": self.style, **scores, "n": n, "n_choices": found.shape[1]}

    def without_context(self, model, questions, autocast, rank=0, world=1):
        """ln P(ending | end-of-text): how likely each ending is anywhere, (N, C). Endings that repeat are scored once."""
        endings = [tuple(ending) for _, endings in questions for ending in endings]
        distinct = {ending: i for i, ending in enumerate(dict.fromkeys(endings))}
        found = log_likelihoods(model, [([self.eot], [list(ending)]) for ending in distinct], autocast, rank, world)
        return found[[distinct[ending] for ending in endings], 0].view(len(questions), -1)

    def ask(self, model, autocast):
        """The question with the shortest context, as text, with a probability for each ending: of how much the context makes
        it likelier (the measure of acc_pmi), as if all were equally likely before. The plain probabilities would mostly
        tell which ending has the fewest tokens."""
        shortest = min(range(len(self.texts)), key=lambda i: len(self.texts[i][0]))
        (context, endings), question = self.texts[shortest], self.questions[shortest:shortest + 1]
        shares = (log_likelihoods(model, question, autocast) - self.without_context(model, question, autocast))[0].softmax(0)
        lines = [f"    {share:4.0%} {'>' if i == self.labels[shortest] else ' '} {ending}" for i, (share, ending) in enumerate(zip(shares, endings))]
        return "\n".join([f"  which ending (> is right)? {' '.join(context.split())} …", *lines])


def scores_in_words(scores):
    """A "benchmark" event as one line."""
    shares = ", ".join(f"{name} {100 * scores[name]:.1f} ± {100 * scores[error]:.1f} %" for name, error in
                       (("acc", "stderr"), ("acc_norm", "stderr_norm"), ("acc_pmi", "stderr_pmi")))
    return f"{scores['name']} ({scores['style']} style, {scores['n']} questions, chance {100 / scores['n_choices']:.0f} %): {shares}"


# ---------------------------------------------------------------------------------------------------------------------
# Samples

def text_statistics(ids):
    """{"distinct_2": unique share of the bigrams, "repetition": share of the 4-grams seen before} of a token list."""
    def repeated(n):  # share of the n-grams that repeat an earlier one
        grams = Counter(zip(*(ids[i:] for i in range(n))))
        return 1 - len(grams) / grams.total() if grams else 0.0
    return {"distinct_2": 1 - repeated(2), "repetition": repeated(4)}


def continue_prompt(model, tokenizer, prompt, autocast, max_new_tokens=80, temperature=0.8, top_k=None, top_p=0.95, seed=0):
    """The fields of a "sample" event: prompt, text, statistics. Always drawn with the same seed, so that in the same precision
    only the weights make a difference."""
    ids, generator = tokenizer.encode(prompt) or [tokenizer.eot], torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    with autocast, torch.compiler.set_stance("force_eager"):
        new = [int(next_id) for next_id in model.generate(torch.tensor([ids], device=device), max_new_tokens, temperature, top_k, top_p,
                                                          tokenizer.eot, generator)]
    new = new[:-1] if new[-1] == tokenizer.eot else new
    return {"prompt": prompt, "text": tokenizer.decode(new), **text_statistics(new)}


class Observer:
    """What a run looks at while it trains: validation text, questions and a prompt, the same at every moment. Nothing in
    here touches the run's random numbers."""

    def __init__(self, model, data, settings, autocast):
        self.model, self.tokenizer, self.settings, self.autocast = model, data.tokenizer, settings, autocast
        self.val = Windows(data.val, settings["seq_len"], data.vocab_size)
        file, items = settings["benchmark"] or data.path / "cloze.jsonl", settings["benchmark_items"]
        self.benchmark = Benchmark(file, data.tokenizer, settings["seq_len"], items=items) if settings["benchmark"] or file.exists() else None

    def evaluate(self, step, log):
        start = time.monotonic()
        result = evaluate(self.model, self.val, self.tokenizer, self.settings["eval_tokens"], self.autocast)
        log.event("eval", step, tokens=step * self.settings["batch_tokens"], **result, seconds=time.monotonic() - start)
        log.say(f"  {text_in_words(result)}")
        if self.benchmark:
            start = time.monotonic()
            scores = self.benchmark.score(self.model, self.autocast)
            log.event("benchmark", step, **scores, seconds=time.monotonic() - start)
            log.say(f"  {scores_in_words(scores)}")

    def sample(self, step, log):
        """On rank 0 alone."""
        sample = continue_prompt(self.model, self.tokenizer, self.settings["sample_prompt"], self.autocast)
        log.event("sample", step, **sample)
        log.say(f"  after {step} steps: {sample['prompt']} | {sample['text']}")
        if self.benchmark:
            log.say(self.benchmark.ask(self.model, self.autocast))


# ---------------------------------------------------------------------------------------------------------------------
# The command line: everything in fp32, so that a score does not depend on the machine.

def score_text(model, tokenizer, folder, seq_len, eval_tokens, autocast):
    """Print and return the scores on the validation text of a data folder."""
    data = DataFolder(folder)
    if data.vocab_size != tokenizer.vocab_size:
        raise UserError(f"{folder} has a vocabulary of {data.vocab_size}, the model of {tokenizer.vocab_size} — prepare it "
                        f"again with --vocab_size {tokenizer.vocab_size}")
    result = evaluate(model, Windows(data.val, seq_len, data.vocab_size), tokenizer, eval_tokens, autocast, progress=True)
    print(f"{folder}: {text_in_words(result)}")
    print("loss by eighth of the window: " + " ".join(f"{loss:.3f}" for loss in result["position_loss"]))
    return {"data": str(folder), "dtype": "fp32", "seq_len": seq_len, "eval_tokens": eval_tokens, **result}


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a checkpoint on held-out text and on multiple-choice questions.")
    parser.add_argument("run", nargs="?", help="run folder (default: the newest run)")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--data", help="data folder (default: the one it was trained on; none if --benchmark is given)")
    parser.add_argument("--benchmark", help="questions in HellaSwag's format, .jsonl (default: the data folder's cloze.jsonl)")
    parser.add_argument("--style", choices=("token", "harness"), default="token", help="how questions are put and normalised: "
                        "as the paper, or as lm-evaluation-harness and leaderboards (default token)")
    parser.add_argument("--seq_len", type=int, help="window (default: as in training)")
    parser.add_argument("--eval_tokens", type=int, default=10_000_000, help="at most so many tokens (default 10M)")
    parser.add_argument("--device", help="default: cuda if there is one")
    args = parser.parse_args(argv)
    for name in ("seq_len", "eval_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is out of range — the least is 1")

    run, device = Path(args.run) if args.run else newest_run(), choose_device(args.device)
    model, tokenizer, step = load_model(run, args.step, device)
    settings = settings_of(run)
    seq_len = args.seq_len or settings["seq_len"]
    if seq_len > model.config.max_seq_len:
        raise UserError(f"--seq_len {seq_len} is more than the model's max_seq_len {model.config.max_seq_len}")
    folder = args.data or (None if args.benchmark else settings["data"])
    questions = args.benchmark or (Path(folder, "cloze.jsonl") if Path(folder, "cloze.jsonl").exists() else None)
    benchmark = Benchmark(questions, tokenizer, seq_len, args.style) if questions else None

    print(f"{run} step {step}")
    autocast = torch.autocast(device.type, enabled=False)
    if folder:
        note(run, {"event": "eval", "step": step, **score_text(model, tokenizer, folder, seq_len, args.eval_tokens, autocast)})
    if benchmark:
        start = time.monotonic()
        scores = benchmark.score(model, autocast, progress=True)
        print(f"{scores_in_words(scores)} ({scores['n'] / (time.monotonic() - start):.0f} questions/s)")
        note(run, {"event": "benchmark", "step": step, "dtype": "fp32", "file": str(questions), "seq_len": seq_len, **scores})


if __name__ == "__main__":
    main()

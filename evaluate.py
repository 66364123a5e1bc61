"""evaluate.py — score a model: loss and bits per byte of held-out text, use of context, multiple
choice, samples.

    python evaluate.py                                  # newest run, newest checkpoint, its data
    python evaluate.py runs/tiny --step 64              # an earlier checkpoint
    python evaluate.py runs/tiny --data data/mytext     # other text, of the same vocabulary
    python evaluate.py runs/1.7b --benchmark data/hellaswag/hellaswag.jsonl --style harness

Appends "eval" and "benchmark" events to the run's evaluations.jsonl.
"""
import itertools
import math
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import support.cpu  # before torch, which reads its settings once

import torch
import torch.nn.functional as F

from checkpoint import load_model
from data import DataFolder, Windows
from model import KVCache
from support.devices import choose_device, choose_dtype, complete_rows, processes, refuse_processes
from support.flags import Parser, count
from support.progress import tqdm
from support.rows import read_json_rows
from support.runs import UserError, beginning, newest_run, note, script, settings_of, trained_window
from support.sharding import gathered

BATCH_TOKENS = 4096       # tokens per forward; fixed, so that no flag changes a score
GPU_BATCH_TOKENS = 16384  # 4096 are too few for a GPU: it would wait for Python
ROWS = 1024               # tokens whose logits are in memory at once


@contextmanager
def evaluating(model, autocast):
    """Evaluation mode, without gradients and without the compiler, in the precision of `autocast`.
    A sharded model is whole here. Afterwards the model is in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        with gathered(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast:
            yield
    finally:
        model.train(was_training)


def tokens_per_forward(device):
    return GPU_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS


def token_losses(model, hidden, targets, n_ids=None):
    """−ln p(target) for each row of hidden (N, dim) and targets (N,): (N,) float64, on the CPU.
    n_ids: p is among the first so many ids; without it among all, as in training. Raises
    FloatingPointError if one is NaN or infinite: among NaN any choice would be the first.

    Some rows at a time, so that the logits stay in a CPU's cache: nearly twice as fast there."""
    losses = []
    for h, target in zip(hidden.split(ROWS), targets.split(ROWS)):
        loss = F.cross_entropy(model.logits(h)[:, :n_ids], target, reduction="none")
        losses.append(loss.cpu().double())  # MPS has no fp64
    losses = torch.cat(losses)
    if not losses.isfinite().all():
        raise FloatingPointError("the model's output is NaN or infinite")
    return losses


# -------------------------------------------------------------------------------------------------
# Held-out text

def evaluate(model, val, tokenizer, eval_tokens, autocast, progress=False):
    """Score `model` on the first `eval_tokens` of `val` (Windows in file order), in whole windows.

    Returns {"val_loss": nats per target, "val_bpb": bits per byte of the scored text,
    "position_loss": the mean loss in each eighth of the window, "context_gain": the first of these
    minus the last, "context_gain_stderr"}. With several processes each scores its share, and every
    one returns the exact whole."""
    rank, world = processes()
    device = next(model.parameters()).device
    T = val.seq_len
    n = min(val.total, max(1, eval_tokens // T))  # windows
    size = max(1, tokens_per_forward(device) // T)  # windows per forward
    losses = torch.zeros(n, T, dtype=torch.float64)
    n_bytes = torch.zeros(n, dtype=torch.float64)
    starts = range(rank * size, n, world * size)
    with evaluating(model, autocast):
        for start in tqdm(starts, desc="evaluating", disable=not progress, leave=False):
            end = min(n, start + size)
            tokens = val.read(start, end - start)                   # (windows, T + 1)
            inputs = torch.from_numpy(tokens[:, :-1]).to(device)
            targets = torch.from_numpy(tokens[:, 1:]).to(device)
            hidden = model.model(inputs)                            # (windows, T, dim)
            loss = token_losses(model, hidden.flatten(0, 1), targets.flatten())
            losses[start:end] = loss.view(-1, T)
            n_bytes[start:end] = torch.from_numpy(tokenizer.byte_lengths[tokens[:, 1:]].sum(1))
    losses = complete_rows(losses, device)    # (n, T)
    n_bytes = complete_rows(n_bytes, device)  # (n,)
    bits = losses.sum().item() / math.log(2)
    scores = {"val_loss": losses.mean().item(), "val_bpb": bits / max(1, n_bytes.sum().item())}
    return {**scores, **use_of_context(losses)}


def use_of_context(losses):
    """How much the model uses what it has read, from losses (windows, T): the loss in the first
    eighth of the window minus that in the last, in nats. After the in-context-learning score of
    Olsson et al. 2022 (arXiv 2209.11895), with the opposite sign; comparable at equal T only.

    The eighths are different text, which among few windows is most of the difference. So the
    standard error over the windows belongs to it."""
    n = len(losses)
    eighths = [part.mean(1) for part in losses.tensor_split(8, dim=1)]  # each (n,)
    gains = eighths[0] - eighths[-1]
    return {"context_gain": gains.mean().item(),
            "context_gain_stderr": gains.std(correction=0).item() / math.sqrt(max(1, n - 1)),
            "position_loss": [eighth.mean().item() for eighth in eighths]}


def describe_text(scores):
    """The scores of `evaluate` in one line."""
    return (f"val loss {scores['val_loss']:.4f} | {scores['val_bpb']:.4f} bits/byte | context gain "
            f"{scores['context_gain']:.3f} ± {scores['context_gain_stderr']:.3f}")


# -------------------------------------------------------------------------------------------------
# Multiple choice: of several endings the model chooses the one that it finds most probable.

def log_likelihoods(model, contexts, endings, autocast, progress=False):
    """ln P(ending | context), in nats, of C endings for each of N contexts, all lists of ids:
    (N, C) float64. Among the tokenizer's ids: padded ones are no part of a Hugging Face folder
    either.

    A context is read once for all its endings. Contexts of similar length share a forward: as many
    of their tokens as the shortest has go into a cache. Then each ending is a row, behind what is
    left of its context, and padded on the right, where causal attention never looks. With several
    processes each scores its share."""
    rank, world = processes()
    device = next(model.parameters()).device
    C = len(endings[0])
    longest = [max(len(ending) for ending in question) for question in endings]
    order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), longest[i]))
    batches = []
    while order:
        tokens = len(contexts[order[-1]]) + C * longest[order[-1]]
        size = max(1, tokens_per_forward(device) // tokens)  # questions per forward
        batches.append(order[-size:])
        del order[-size:]
    found = torch.zeros(len(contexts), C, dtype=torch.float64)
    with evaluating(model, autocast):
        for batch in tqdm(batches[rank::world], desc="choosing", disable=not progress, leave=False):
            shared = min(len(contexts[i]) for i in batch) - 1  # the last token is not: it predicts
            inputs, targets = as_rows([(contexts[i][shared:], ending)
                                       for i in batch for ending in endings[i]])
            cache = None
            if shared > 0:
                cache = KVCache(replace(model.config, max_seq_len=shared + inputs.shape[1]))
                beginnings = torch.tensor([contexts[i][:shared] for i in batch])
                model.model(beginnings.to(device), cache)
                cache.keys = cache.keys.repeat_interleave(C, dim=1)  # dim 1: the sequences
                cache.values = cache.values.repeat_interleave(C, dim=1)
            hidden = model.model(inputs.to(device), cache)  # (rows, T, dim)
            scored = targets != -100  # only these need the output layer
            loss = torch.zeros(scored.shape, dtype=torch.float64)
            hidden = hidden[scored.to(device)]  # (tokens of endings, dim)
            loss[scored] = token_losses(model, hidden, targets[scored].to(device),
                                        model.config.vocab_size)
            found[batch] = -loss.sum(1).view(-1, C)
    return complete_rows(found, device)


def as_rows(pairs):
    """(inputs, targets), both (len(pairs), T), of pairs (ids before, ids of an ending), padded on
    the right. Targets are what follows each input, if that is of the ending; else −100."""
    longest = max(len(before) + len(ending) for before, ending in pairs)
    tokens = torch.zeros(len(pairs), longest, dtype=torch.long)
    targets = torch.full_like(tokens, -100)
    for row, (before, ending) in enumerate(pairs):
        end = len(before) + len(ending)
        tokens[row, :end] = torch.tensor(before + ending)
        targets[row, len(before):end] = torch.tensor(ending)
    return tokens[:, :-1], targets[:, 1:]


class Benchmark:
    """Questions of a JSONL file in HellaSwag's format (Zellers et al. 2019, arXiv 1905.07830).

    Two conventions are in use, and their scores must not be mixed. style "token", of the paper and
    of build-nanogpt: `ctx`, then " " + ending; acc_norm divides by tokens. style "harness", of
    lm-evaluation-harness and so of leaderboards: "activity_label: ctx_a ctx_b" without remarks in
    brackets; acc_norm divides by the characters of the ending.

    A context that is too long for `window` with the longest of its endings loses its beginning.
    (lm-evaluation-harness cuts it for each ending apart, so its shorter endings see more.) items:
    read only the first so many.
    Raises UserError naming file and line."""

    def __init__(self, path, tokenizer, window, style="token", items=None):
        self.name = Path(path).stem
        self.style = style
        self.eot = tokenizer.eot
        self.contexts = []  # of each question, its context in ids
        self.endings = []   # and its endings in ids
        labels = []
        norms = []          # tokens or characters of each ending
        self.cut = 0        # contexts that are too long for the window
        for place, item, _ in itertools.islice(read_json_rows(path), items):
            context, space, endings, label = self.parse(item, place)
            ids = [tokenizer.encode(space + ending) for ending in endings]
            longest = max(len(ending) for ending in ids)
            room = window + 1 - longest  # the last token of an ending is predicted, not read
            if room < 1:
                raise UserError(f"{place}: an ending of {longest} tokens is longer than the window "
                                f"of {window} — remove the line, or use a longer --seq_len")
            context = tokenizer.encode(context)
            self.cut += len(context) > room
            self.contexts.append(context[-room:])
            self.endings.append(ids)
            labels.append(label)
            norms.append([len(ending) for ending in (ids if style == "token" else endings)])
        if not self.endings:
            raise UserError(f"{path}: no questions in it — give a file in HellaSwag's format")
        self.labels = torch.tensor(labels)  # (N,)
        self.norms = torch.tensor(norms)    # (N, C)

    def parse(self, item, place):
        """(context, space before an ending, endings, label) of a row. Raises UserError naming the
        place."""
        try:
            context, space, endings = put_question(item, self.style)
            label = int(str(item["label"]))  # a string in some releases
            texts = [context, *endings]
            "".join(texts).encode()  # fails for half a surrogate pair
            fits = (isinstance(item["endings"], list)
                    and all(text.strip() for text in texts)
                    and 0 <= label < len(endings)
                    and len(endings) >= 2
                    and (not self.endings or len(endings) == len(self.endings[0])))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            fits = False
        if not fits:
            needed = "ctx" if self.style == "token" else "activity_label, ctx_a, ctx_b"
            raise UserError(f"{place}: not a question in HellaSwag's format ({needed}, a list of "
                            f"endings, as many as in the first line, label) — fix the line or "
                            f"remove it")
        return context, space, endings, label

    def score(self, model, autocast, progress=False):
        """The fields of a "benchmark" event: three accuracies, each with its standard error.

        acc: the likeliest ending is the right one. acc_norm: the likeliest per token or character.
        acc_pmi: the one whose likelihood the context increases most, compared to that after
        end-of-text alone; this removes what is likely anywhere (Holtzman et al. 2021, arXiv
        2104.08315)."""
        found = log_likelihoods(model, self.contexts, self.endings, autocast, progress)  # (N, C)
        alone = self.log_likelihoods_alone(model, autocast)
        n = len(self.labels)
        scores = {}
        for name, by in (("", found), ("_norm", found / self.norms), ("_pmi", found - alone)):
            right = (by.argmax(1) == self.labels).double().mean().item()
            scores[f"acc{name}"] = right
            scores[f"stderr{name}"] = math.sqrt(right * (1 - right) / max(1, n - 1))
        return {"name": self.name, "style": self.style, **scores, "n": n,
                "n_choices": found.shape[1], "cut": self.cut}

    def log_likelihoods_alone(self, model, autocast):
        """Those of all endings after end-of-text alone: (N, C). One that repeats is scored once."""
        distinct = list(dict.fromkeys(tuple(e) for question in self.endings for e in question))
        contexts = [[self.eot]] * len(distinct)
        found = log_likelihoods(model, contexts, [[list(e)] for e in distinct], autocast)
        of = dict(zip(distinct, found[:, 0].tolist()))
        return torch.tensor([[of[tuple(ending)] for ending in question]
                             for question in self.endings], dtype=torch.float64)


def put_question(item, style):
    """(context, space before an ending, endings) of a line, in the words of the style."""
    if style == "token":
        return item["ctx"], " ", item["endings"]
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    context = without_brackets(context)
    # A remark at the end leaves a space there. GPT-2's tokens begin with their space, so it goes to
    # the ending, as lm-evaluation-harness does it.
    bare = context.rstrip()
    space = context[len(bare):] + " "
    return bare, space, [without_brackets(text) for text in item["endings"]]


def without_brackets(text):
    """As lm-evaluation-harness cleans HellaSwag: remarks like [header] are removed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def describe_choices(scores):
    """The scores of `Benchmark.score` in one line."""
    shares = []
    for name in ("", "_norm", "_pmi"):
        acc = 100 * scores[f"acc{name}"]
        shares.append(f"acc{name} {acc:.1f} ± {100 * scores[f'stderr{name}']:.1f} %")
    chance = 100 / scores["n_choices"]
    cut = f"; {scores['cut']} contexts cut to the window" if scores["cut"] else ""
    return (f"{scores['name']} ({scores['style']} style, {scores['n']} questions, chance "
            f"{chance:.0f} %): {', '.join(shares)}{cut}")


# -------------------------------------------------------------------------------------------------
# Samples

def text_statistics(ids):
    """Of a list of tokens: {"distinct_2": share of the bigrams that are different, "repetition":
    share of the 4-grams that stood earlier in the text}."""
    return {"distinct_2": 1 - repeated(ids, 2), "repetition": repeated(ids, 4)}


def repeated(ids, n):
    """The share of the n-grams that repeat an earlier one."""
    grams = Counter(tuple(ids[i:i + n]) for i in range(len(ids) - n + 1))
    if not grams:
        return 0.0
    return 1 - len(grams) / grams.total()


def continue_prompt(model, tokenizer, prompt, autocast, max_new_tokens=80, temperature=0.8,
                    top_k=None, top_p=0.95, seed=0):
    """The fields of a "sample" event: prompt, text, statistics. Every call uses the same random
    numbers, so in the same precision only the weights make a difference."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model, autocast):
        new = model.generate(torch.tensor([ids], device=device), max_new_tokens, temperature,
                             top_k, top_p, tokenizer.eot, generator)
        new = [int(next_id) for next_id in new]
    if new[-1] == tokenizer.eot:
        new.pop()
    return {"prompt": prompt, "text": tokenizer.decode(new), **text_statistics(new)}


# -------------------------------------------------------------------------------------------------
# What train.py evaluates: validation text, questions and a prompt, the same at every step.

class Observer:
    """Evaluates a model during training. It draws no random numbers of the run."""

    def __init__(self, model, data, args, autocast):
        self.model = model
        self.tokenizer = data.tokenizer
        self.args = args
        self.autocast = autocast
        self.val = Windows(data.val, args.seq_len, data.vocab_size, shuffle=False)
        self.benchmark = open_benchmark(args, data.tokenizer)

    def evaluate(self, step, log):
        start = time.monotonic()
        scores = evaluate(self.model, self.val, self.tokenizer, self.args.eval_tokens,
                          self.autocast)
        log.event("eval", step, tokens=step * self.args.batch_tokens, **scores,
                  seconds=time.monotonic() - start)
        log.say(f"  {describe_text(scores)}")
        is_asked = step >= self.args.benchmark_from or step == self.args.max_steps
        if self.benchmark is not None and is_asked:
            log_benchmark(self.benchmark, self.model, self.autocast, step, log)

    def sample(self, step, log):
        prompt = self.args.sample_prompt
        try:
            sample = continue_prompt(self.model, self.tokenizer, prompt, self.autocast)
        except FloatingPointError as error:  # the next update fails too, and says more
            log.say(f"  no sample: {error}")
            return
        log.event("sample", step, **sample)
        log.say(f"  after {step} steps: {prompt} | {sample['text']}")


def open_benchmark(args, tokenizer):
    """The questions of --benchmark, or of the data folder's cloze.jsonl; None without either."""
    if args.benchmark is None and args.data is None:  # a tuning of an imported model
        return None
    file = Path(args.benchmark or Path(args.data, "cloze.jsonl"))
    if args.benchmark is None and not file.exists():
        return None
    return Benchmark(file, tokenizer, args.seq_len, items=args.benchmark_items)


def log_benchmark(benchmark, model, autocast, step, log):
    start = time.monotonic()
    scores = benchmark.score(model, autocast)
    log.event("benchmark", step, **scores, seconds=time.monotonic() - start)
    log.say(f"  {describe_choices(scores)}")


# -------------------------------------------------------------------------------------------------
# The command line. Without --dtype everything in fp32, so that a score does not depend on the
# machine.

def read_arguments(argv):
    parser = Parser(description="Score a checkpoint on held-out text and on questions.")
    add = parser.add_argument
    add("run", nargs="?", help="run folder; without it the newest run")
    add("--step", type=int, help="checkpoint; without it the newest")
    add("--data", help="data folder; without it the one it was trained on, or none if --benchmark")
    add("--benchmark", help="questions in HellaSwag's format, .jsonl; without it the data folder's "
        "cloze.jsonl")
    add("--benchmark_items", type=count, help="use only so many of them, the first")
    add("--style", choices=("token", "harness"), default="token", help="how questions are put and "
        "normalized: as in the paper, or as in lm-evaluation-harness and on leaderboards")
    add("--seq_len", type=count, help="window; without it the one of the training")
    add("--eval_tokens", type=count, default=10_000_000, help="at most so many tokens")
    add("--device", help="cpu, cuda, cuda:1 …; without it cuda if there is one")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of matrix products; the "
        "shorter ones are much faster on a GPU, and change a score a little")
    return parser.parse_args(argv)


def open_text(args, run, settings, vocab_size):
    """(the DataFolder whose validation text is scored, or None; whether it is the run's own).
    Raises UserError."""
    folder = args.data
    if folder is None and args.benchmark is None:
        folder = settings["data"]
        if folder is None:
            raise UserError(f"{run} was imported, so it has no data of its own — give --data or "
                            f"--benchmark")
    if folder is None:
        return None, False
    data = DataFolder(folder)
    recorded = settings.get("fingerprint")
    if args.data is None:
        data.check_same(recorded, f"restore it, or score other text with --data {folder}")
    is_own = data.fingerprint == recorded
    if not is_own:
        print(f"note: {folder} is not the data that {run} was trained on, or was prepared anew: "
              f"the run may have read this text")
    if data.vocab_size != vocab_size:
        raise UserError(f"{folder} has a vocabulary of {data.vocab_size}, the model of "
                        f"{vocab_size} — prepare it again with --vocab_size {vocab_size}")
    return data, is_own


def open_questions(args, data, tokenizer, seq_len):
    """(file of questions, Benchmark); both None if there are none. Raises UserError."""
    file = args.benchmark
    if file is None and (data.path / "cloze.jsonl").exists():
        file = data.path / "cloze.jsonl"
    if file is not None:
        file = Path(file)
        return file, Benchmark(file, tokenizer, seq_len, args.style, args.benchmark_items)
    if args.style == "harness":
        raise UserError(f"--style is for questions, and {data.path} has no cloze.jsonl — give some "
                        f"with --benchmark")
    return None, None


@script
def main(argv=None):
    args = read_arguments(argv)
    refuse_processes()
    run = Path(args.run) if args.run else newest_run()
    began = beginning(run)
    device = choose_device(args.device)
    model, tokenizer, step = load_model(run, args.step, device)
    settings = settings_of(run)
    seq_len = args.seq_len or settings["seq_len"]
    if seq_len > model.config.max_seq_len:
        raise UserError(f"--seq_len {seq_len} is more than the model's max_seq_len "
                        f"{model.config.max_seq_len}")
    trained = trained_window(settings, model.config.max_seq_len)
    if seq_len > trained:
        print(f"note: {run} was trained in windows of {trained} tokens; beyond that it predicts "
              f"worse")
    data, is_own = open_text(args, run, settings, tokenizer.vocab_size)
    file, benchmark = open_questions(args, data, tokenizer, seq_len)

    print(f"{run} step {step}")
    dtype = choose_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    about = {"step": step, "dtype": args.dtype, "seq_len": seq_len}
    events = []
    if data is not None:
        val = Windows(data.val, seq_len, data.vocab_size, shuffle=False)
        scores = evaluate(model, val, tokenizer, args.eval_tokens, autocast, progress=True)
        print(f"{data.path}: {describe_text(scores)}")
        eighths = " ".join(f"{loss:.3f}" for loss in scores["position_loss"])
        print(f"loss by eighth of the window: {eighths}")
        events.append({"event": "eval", **about, "same_data": is_own, "data": str(data.path),
                       "eval_tokens": args.eval_tokens, **scores})
    if benchmark is not None:
        scores = benchmark.score(model, autocast, progress=True)
        is_ours = is_own and args.benchmark is None
        if file.name == "cloze.jsonl" and not is_ours:  # each data folder has one
            scores["name"] = f"cloze of {file.parent}"
        print(describe_choices(scores))
        events.append({"event": "benchmark", **about, "file": str(file), **scores})
    for event in events:  # at the end: if they cannot be noted, they are on the screen at least
        note(run, event, began)


if __name__ == "__main__":
    sys.exit(main())

"""sft.py — instruction tuning: teach a pretrained model to answer.

The loop is that of train.py. This file gives it rows of conversations instead of windows of text,
targets that count in answers only, adapters if --lora is given, and an evaluation of answers.

    python sft.py                                   # the newest pretrained run, on its own manuals
    python sft.py runs/tiny --run runs/tiny-sft     # all weights
    python sft.py runs/tiny --lora 8                # adapters alone: support/lora.py
    python sft.py runs/1.7b --instructions alpaca.json --epochs 3 --lora 64      # your own file
    python sample.py runs/tiny-sft --chat           # then ask it something

The paper (arXiv 2412.13335) tunes on alpaca-cleaned in the template of Vicuna 1.1. Signals, exit
codes and --resume are those of train.py.
"""
import os
import sys
import textwrap
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import support.cpu  # before torch, which reads its settings once
import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from data import DataFolder, Tokenizer
from evaluate import (ROWS, evaluating, log_benchmark, open_benchmark, text_statistics,
                      tokens_per_forward)
from model import Llama
from support import chat, durable, fast, flags, lora
from support.chat import IGNORE, Batches, Examples
from support.devices import check_equal, complete_rows, end_processes, processes, say
from support.rows import listed
from support.runs import (UserError, is_finished, is_tuned, newest_run, quoted, script,
                          settings_of)
from train import Batch, begin, finish, open_run, parse_settings, prepare, train

# -------------------------------------------------------------------------------------------------
# The run

@script
def main(argv=None):
    run, args, machine, state = open_run(argv, read_settings)
    if is_finished(run, state, args.max_steps):
        say(f"{run} is finished: {args.max_steps} steps — next: python sample.py {quoted(run)} "
            f"--chat")
        return end_processes(0)
    weights = open_base(args, run, state)
    model = make_model(args, weights).to(machine.device)
    tokenizer = Tokenizer(model.config.vocab_size)
    window = args.max_length or model.config.max_seq_len
    if window > model.config.max_seq_len:
        raise UserError(f"--max_length {window} is more than the model's window of "
                        f"{model.config.max_seq_len} tokens")
    examples, held_out, bad, fingerprint = open_instructions(args, state, tokenizer, window)
    batches = Batches(examples, args.batch_size, args.seed)
    if args.max_steps is None:
        args.max_steps = max(1, round(args.epochs * batches.per_epoch))
    code = fast.hashes("model.py", "train.py", "sft.py")
    check_equal({**vars(args), **code, "rows in the file": fingerprint})
    # Not compiled: the micro-batches differ in length, and blocks would be compiled anew for each.
    prepared = prepare(args, state, model, machine, window)
    observer = AnswerObserver(model, tokenizer, held_out, args, prepared.autocast)
    constants, log = begin(run, args, machine, state, prepared, code, fingerprint)
    facts = describe(examples, held_out, bad, batches.useful(args.micro_batch))
    if state is None:
        if args.lora is not None and machine.is_main:
            lora.keep_base(run, args.base, args.step, weights)
        questions = [{"question": messages[-2]["content"], "answer": messages[-1]["content"]}
                     for messages in observer.shown]
        log.event("instructions", 0, **facts, questions=questions)
    log.say(introduce(args, model, facts, batches.per_epoch, machine.world))
    del state, weights  # they may be as large as the model and its moments

    def read_step(step):
        # Rows differ in how many of their targets count. Their number in the whole batch is known
        # before the first forward, so each token of an answer has the same weight, be it of a short
        # answer or of a long one.
        rows = batches.of_step(step)
        micro_batches = []
        together = args.micro_batch * machine.world  # rows in one forward of all processes
        for start in range(0, len(rows), together):
            first = start + machine.rank * args.micro_batch
            ours = rows[first:first + args.micro_batch]
            inputs, targets = examples.read(ours if len(ours) > 0 else rows[:1])
            if len(ours) == 0:  # no row is left for this process, but DDP needs its forward
                targets[:] = IGNORE
            micro_batches.append((inputs, targets))
        return Batch(micro_batches, targets=int(examples.targets[rows].sum()),
                     tokens=int(examples.lengths[rows].sum()))  # without padding

    stopped = train(run, args, machine, prepared, constants, read_step, observer, log)
    advice = ["python sample.py {run} --chat", "python evaluate.py {run}",
              "open {run}/trajectory.md: base and tuned model side by side"]
    return finish(run, log, prepared.progress.step, stopped, advice)


# -------------------------------------------------------------------------------------------------
# What the run is made of

def open_base(args, run, state):
    """The weights to start from, {"config", "model"}: those of the base, or of the run resumed."""
    if state is None:
        weights, args.step = checkpoint.load_weights(args.base, args.step)
        return weights
    if args.lora is not None:
        return durable.load_weights(lora.base_file(run))  # the state has only the adapters
    return {"config": state["model_config"], "model": state["model"]}


def open_instructions(args, state, tokenizer, window):
    """(Examples to train on, Examples held out, number of bad rows, fingerprint of the file).

    Raises UserError if nothing is left to train on, or if the file of a resumed run has changed."""
    if args.instructions is None and args.data is None:
        raise UserError(f"{args.base} was imported, so it has no data of its own — give "
                        f"--instructions")
    file = Path(args.instructions or Path(args.data, "instruct.json"))
    if not file.is_file():
        raise UserError(f"{file}: no such file — give one with --instructions (python "
                        f"prepare_data.py pydocs writes data/pydocs/instruct.json)")
    has_questions = args.data is not None and Path(args.data, "cloze.jsonl").exists()
    if args.instructions is None or (args.benchmark is None and has_questions):
        DataFolder(args.data).check_same(args.fingerprint, "restore it, or give --instructions and "
                                                           "--benchmark")
    fingerprint = chat.file_fingerprint(file)
    if state is not None and state["data"] != fingerprint:
        raise UserError(f"{file} is not the file that this run was tuned on — restore it, or "
                        f"choose another --run")
    chats, splits, bad, unread = chat.read_instructions(file, args.skip_bad)
    if unread:
        say(f"{file}: fields that are not read: {listed(unread)}")
    training, held_out = chat.hold_out(chats, splits, args.held_out, args.seed)
    if any(splits) and args.held_out != HELD_OUT:
        say(f"{file}: its rows have a \"split\", so --held_out is not used")
    repeated = len(chats) - len(training) - len(held_out)
    if repeated > 0:
        say(f"{file}: {repeated} rows repeat another one and are left out")
    rows_of = partial(Examples, tokenizer=tokenizer, system=args.system, max_length=window,
                      progress=processes()[0] == 0)
    examples = rows_of([chats[i] for i in training])
    if len(examples) == 0:
        raise UserError(f"{file}: nothing left to train on: {len(chats) + bad} rows, {bad} bad "
                        f"ones, {repeated} repeated, {len(held_out)} held out (by their \"split\", "
                        f"or by --held_out), {examples.skipped} without an answer that counts in "
                        f"the first {window} tokens — give more or shorter rows")
    held_out = rows_of([chats[i] for i in held_out])
    return examples, held_out, bad, fingerprint


def make_model(args, weights):
    """The network with the weights to start from; with --lora frozen, and adapters beside them."""
    config = checkpoint.read_config(weights["config"])
    if args.lora is not None and args.lora > config.dim:
        raise UserError(f"--lora {args.lora} is more than the model's dim {config.dim}: that rank "
                        f"is not low — choose a smaller one")
    torch.manual_seed(args.seed)
    model = Llama(config)
    checkpoint.restore_weights(weights, model)
    if args.lora is not None:
        lora.add_adapters(model, args.lora, args.lora_alpha)
    return model


# -------------------------------------------------------------------------------------------------
# Evaluation

class AnswerObserver:
    """What is evaluated during a tuning, the same at every step: the loss on held-out answers, some
    of their questions, and the benchmark of the base, to see what tuning costs."""
    ASKED = 32    # questions that the model answers, to count the answers that end
    SHOWN = 5     # of them, those whose answers are logged
    LONGEST = 64  # tokens of an answer

    def __init__(self, model, tokenizer, held_out, args, autocast):
        self.model = model
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.autocast = autocast
        self.device = next(model.parameters()).device
        self.system = args.system
        self.rows = spread(range(len(held_out)), args.eval_items)
        # A conversation that was cut may end within its last question.
        whole = [row for row in range(len(held_out)) if held_out.whole[row]]
        self.asked = [held_out.chats[row] for row in spread(whole, self.ASKED)]
        self.shown = spread(self.asked, self.SHOWN)
        self.benchmark = open_benchmark(args, tokenizer)

    def evaluate(self, step, log):
        start = time.monotonic()
        scores = self.score()
        rank, _ = processes()
        if rank == 0:  # the others wait for it where they exchange something next
            answers = self.answer(self.asked)
            ended = [end for _, end in answers]
            scores["ended"] = sum(ended) / len(ended) if ended else None
            log.event("sft_eval", step, **scores, seconds=time.monotonic() - start)
            if ended:
                log.say(f"  held-out answers: loss {scores['heldout_loss']:.4f}, "
                        f"{scores['token_acc']:.1%} of the tokens right; {scores['ended']:.0%} of "
                        f"{len(ended)} answers end")
        if self.benchmark is not None:
            log_benchmark(self.benchmark, self.model, self.autocast, step, log)

    def sample(self, step, log):
        for messages, (ids, ended) in zip(self.shown, self.answer(self.shown)):
            question = messages[-2]["content"]
            answer = self.tokenizer.decode(ids).strip()
            log.event("sample", step, prompt=question, text=answer, cut=not ended,
                      **text_statistics(ids))
            if messages is self.shown[0]:
                more = "" if ended else " …"
                log.say(f"  {one_line(question)} | {one_line(answer, 240)}{more}")

    def score(self):
        """{"heldout_loss": nats per target that counts, "token_acc": share of these that are the
        likeliest token}, exact over all processes; None where there is no target."""
        rank, world = processes()
        size = max(1, tokens_per_forward(self.device) // self.held_out.max_length)  # rows
        rows = sorted(self.rows, key=lambda row: self.held_out.padded[row])
        batches = [rows[i:i + size] for i in range(0, len(rows), size)]
        sums = torch.zeros(len(batches), 3, dtype=torch.float64)  # nats, right tokens, tokens
        with evaluating(self.model, self.autocast):
            for i in range(rank, len(batches), world):
                inputs, targets = self.held_out.read(batches[i])
                hidden = self.model.model(torch.from_numpy(inputs).to(self.device))
                targets = torch.from_numpy(targets).to(self.device)
                counted = targets != IGNORE
                parts = zip(hidden[counted].split(ROWS), targets[counted].split(ROWS))
                for h, target in parts:  # (rows, dim), (rows,)
                    logits = self.model.logits(h)
                    sums[i, 0] += F.cross_entropy(logits, target, reduction="sum").item()
                    sums[i, 1] += (logits.argmax(-1) == target).sum().item()
                    sums[i, 2] += len(target)
        nats, right, n = complete_rows(sums, self.device).sum(0).tolist()
        if n == 0:
            return {"heldout_loss": None, "token_acc": None}
        return {"heldout_loss": nats / n, "token_acc": right / n}

    def answer(self, chats):
        """[(ids, whether it ended), …]: the likeliest answer to the last question of each chat.

        Questions of the same number of tokens are answered together."""
        prompts = [chat.encode_chat(self.tokenizer, messages[:-1], self.system)[0]
                   for messages in chats]
        of_length = defaultdict(list)  # number of tokens: the places of such prompts
        for place, prompt in enumerate(prompts):
            of_length[len(prompt)].append(place)
        eot = self.tokenizer.eot
        answers = [None] * len(chats)
        for length, group in of_length.items():
            most = min(self.LONGEST, self.model.config.max_seq_len - length)
            tokens = torch.tensor([prompts[place] for place in group], device=self.device)
            with evaluating(self.model, self.autocast):
                new = self.model.generate(tokens, most, temperature=0, eot=eot)
                new = torch.stack(list(new), dim=1).tolist()  # (questions, tokens)
            for place, ids in zip(group, new):
                ended = eot in ids
                if ended:
                    ids = ids[:ids.index(eot)]
                answers[place] = (ids, ended)
        return answers


def spread(items, n):
    """At most n of the items, evenly spread over all of them."""
    places = np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)
    return [items[i] for i in places]


# -------------------------------------------------------------------------------------------------
# Settings. A flag that train.py has too means the same here.

HELD_OUT = 0.02
DEFAULTS = dict(lr=2e-5, warmup_steps=20, weight_decay=0.0, sample_every=250, keep_every=0,
                epochs=3.0, lora_alpha=16.0)
# What a preset of the base changes.
BY_PRESET = {"tiny": dict(lr=1e-3, epochs=1.0, batch_size=32, eval_every=0, sample_every=0)}

# What comes from the base's settings.
INHERITED = ("preset", "data", "fingerprint", "seq_len", "benchmark", "benchmark_items")


def read_settings(argv, saved=None):
    """The command line as a namespace, as in train.py; the preset is that of the base."""
    parser = flags.Parser(description=__doc__.split("\n")[0])
    length = flags.add_settings(parser)
    add = parser.add_argument_group("instruction tuning").add_argument
    add("base", nargs="?", metavar="RUN", type=os.path.relpath,
        help="run folder to start from; without it the newest that train.py made")
    add("--step", type=int, help="checkpoint of RUN to start from; without it the newest")
    add("--instructions", metavar="FILE", help=".json or .jsonl; without it instruct.json of the "
        "data that RUN was trained on")
    add("--skip_bad", action="store_true", help="leave out bad rows and count them; without it the "
        "first one is an error")
    add("--held_out", type=flags.number(float, 0, 0.9), default=HELD_OUT, help="share of the rows "
        "that is scored and not trained on, unless the rows have a \"split\"")
    add("--system", type=flags.text, default=chat.SYSTEM, help="how each conversation begins")
    add("--max_length", type=flags.count, help="tokens of the longest example, longer ones are "
        "cut; if not given, the model's window")
    add("--lora", type=flags.count, metavar="RANK",
        help="train adapters of this rank, not the weights")
    add("--lora_alpha", type=flags.positive,
        help="adapters are multiplied by this / rank (default: 16)")
    length.add_argument("--epochs", type=flags.positive,
                        help="how often each row is read (default: 3; for tiny 1)")
    add("--batch_size", type=flags.count, default=128,
        help="at most so many rows per step, over all processes")
    add("--eval_items", type=flags.count, default=512,
        help="held-out rows scored in each evaluation")
    args = parser.parse_args(argv)
    if args.lora_alpha is not None and args.lora is None and saved is None:
        raise UserError("--lora_alpha is about adapters — give --lora too, or leave it out")
    parser.set_defaults(**DEFAULTS, **dict.fromkeys(INHERITED))
    if saved is None:
        parser.set_defaults(**settings_of_base(args))
    args = parse_settings(parser, argv, saved)
    method = "sft" if args.lora is None else f"lora{args.lora}"
    args.run = args.run or f"runs/{Path(args.base).name}-{method}"
    if flags.same_place(args.run, args.base):
        raise UserError(f"{args.run} is the run to start from — choose another --run for the tuned "
                        f"one")
    return args


def settings_of_base(args):
    """What the base decides: how it was trained and scored, and the defaults for its preset."""
    if args.resume and args.run and is_tuned(args.run):
        known = settings_of(args.run)  # has the same values; the base may be gone
        base = args.base or known["base"]
    else:
        base = args.base or os.path.relpath(newest_run(pretrained=True))
        known = settings_of(base)
    defaults = {"base": base, **{name: known.get(name) for name in INHERITED}}
    defaults.update(BY_PRESET.get(known.get("preset"), {}))
    if args.lora is not None:  # adapters start at zero and are few: they can take larger steps
        defaults["lr"] = 10 * defaults.get("lr", DEFAULTS["lr"])
    return defaults


# -------------------------------------------------------------------------------------------------
# What it prints and logs at the start

def describe(examples, held_out, bad, useful):
    """Numbers of the rows to train on, for the log and the screen. useful: the share of tokens that
    are not padding."""
    answer, share = chat.most_frequent_answer(examples.chats)
    return {"rows": len(examples), "held_out": len(held_out), "cut": examples.cut,
            "skipped": examples.skipped, "bad": bad, "useful": useful, "frequent_answer": answer,
            "frequent_share": share, "counted": examples.targets.sum() / examples.lengths.sum()}


def introduce(args, model, facts, per_epoch, world):
    """What is about to happen: what is trained, on which rows, in which batches."""
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return "\n".join([
        f"base    {args.base} step {args.step}: {trained:,} of {every:,} parameters are trained",
        f"rows    {facts['rows']:,} to train on ({facts['cut']} cut, {facts['skipped']} without "
        f"an answer that counts in the window, {facts['bad']} bad), {facts['held_out']:,} held "
        f"out; most frequent answer ({facts['frequent_share']:.2%}): "
        f"{one_line(facts['frequent_answer'])}",
        f"batch   up to {args.batch_size} rows/step in micro-batches of {args.micro_batch} on "
        f"{world} process(es); {facts['useful']:.1%} of the tokens are not padding; "
        f"{facts['counted']:.1%} of these belong to answers and count; {args.max_steps} steps, "
        f"{per_epoch} per epoch"])


def one_line(text, most=120):
    return textwrap.shorten(text, most, placeholder=" …")


if __name__ == "__main__":
    sys.exit(main())

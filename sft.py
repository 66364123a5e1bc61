"""sft.py — instruction tuning: teach a pretrained model to answer. Read it beside train.py: the
loop is the same, and what differs is the lesson (`diff train.py sft.py`).

    python sft.py                                   # the newest pretrained run, on its own manuals
    python sft.py runs/tiny --run runs/tiny-sft     # all weights
    python sft.py runs/tiny --lora 8                # only thin matrices beside: support/lora.py
    python sft.py runs/1.7b --instructions alpaca.json --epochs 3 --lora 64      # your own file
    python sample.py runs/tiny-sft --chat           # then ask it something

The paper (arXiv 2412.13335) tunes on alpaca-cleaned in the template of Vicuna 1.1. Signals, exit
codes and --resume are those of train.py.
"""
import itertools
import math
import os
import sys
import textwrap
import time
from pathlib import Path

from support import cpu  # before torch, which reads its settings once
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from data import DataFolder, Tokenizer
from evaluate import (ROWS, evaluating, log_benchmark, open_benchmark, text_statistics,
                      tokens_per_forward)
from model import Llama
from support import chat, fast, flags, lora, sharding
from support.chat import IGNORE, Batches, Examples
from support.devices import (StopSignals, any_process, check_equal, choose_dtype, complete_rows,
                             end_processes, environment, from_rank_0, peak_memory, processes,
                             start_processes, sum_over_processes, to_device, use_machine)
from support.files import write_json
from support.memory import checkpoint_activations
from support.runs import (Log, UserError, claim, due, is_finished, is_tuned, newest_run, script,
                          settings_of, start_over)
from train import (ONCE, add_settings, check_resume, finish, finish_settings, has_diverged,
                   introduce_parts, introduce_resume, lr_at, make_optimizer, rewarming,
                   rms_of_change)

# What a preset of the base changes. A flag on the command line wins over it.
BY_PRESET = {"tiny": dict(lr=1e-3, epochs=1.0, batch_size=32, eval_every=0, sample_every=0)}


# -------------------------------------------------------------------------------------------------
# The run

@script
def main(argv=None):
    args = read_settings(argv)  # a mistake in a flag ends here, before anything is touched
    rank, world, device = start_processes(args)
    is_main = rank == 0
    method = "sft" if args.lora is None else f"lora{args.lora}"
    run = Path(args.run or f"runs/{Path(args.base).name}-{method}")
    if run.resolve() == Path(args.base).resolve():
        raise UserError(f"{run} is the run to start from — choose another --run for the tuned one")
    folder = None  # of the checkpoint to resume
    if is_main:
        claim(run, args.resume, args.overwrite)
        if args.resume:
            folder = checkpoint.newest(run)
    folder = from_rank_0(folder)
    state = checkpoint.load(folder)  # restored below; None in a new run
    if state is not None:
        args = read_settings(argv, saved=state["config"])  # again, with the saved values
    args.run = str(run)
    device = use_machine(args, device, world)

    # ---- Data, model, optimizer, precision
    weights = open_base(args, run, state)
    model = make_model(args, weights, device)
    if args.activation_checkpointing:
        checkpoint_activations(model)
    tokenizer = Tokenizer(model.config.vocab_size)
    window = args.max_length or model.config.max_seq_len
    if window > model.config.max_seq_len:
        raise UserError(f"--max_length {window} is more than the model's window of "
                        f"{model.config.max_seq_len} tokens")
    opened = open_instructions(args, state, tokenizer, window, is_main)
    examples, held_out, bad, fingerprint = opened
    batches = Batches(examples, args.batch_size, args.seed)
    if args.max_steps is None:
        args.max_steps = max(1, round(args.epochs * batches.per_epoch))
    lr_at(0, args)  # a schedule without a formula ends here
    optimizer = make_optimizer(model, args, device)
    dtype = choose_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    observer = AnswerObserver(model, tokenizer, held_out, args, autocast)

    step = 0
    tokens_seen = 0
    seconds = 0.0      # of training, over all resumes
    updates = 0        # those that the optimizer's moments have seen
    log_length = 0     # what was logged after the checkpoint is cut off
    resumed_at = None  # this step is saved already
    if state is not None:
        checkpoint.restore(state, model, optimizer, scaler, args.reset_optimizer)
        step = state["step"]
        tokens_seen = state["tokens"]
        seconds = state["seconds"]
        updates = 0 if args.reset_optimizer else state["updates"]
        log_length = state["log_bytes"]
        resumed_at = step
    check_resume(run, state, args)
    code = fast.hashes("model.py", "train.py", "sft.py")
    check_equal({**vars(args), **code, "rows in the file": fingerprint})
    # A run at its last step may still lack its last evaluations: the log says if it is finished.
    finished = from_rank_0(is_main and step == args.max_steps and is_finished(run))
    if finished:
        if is_main:
            print(f"{run} is finished: {step} steps — next: python sample.py {run} --chat")
        return end_processes(0)

    # The formulas of model.py, or what computes the same faster. Not compiled: the micro-batches
    # differ in length, and blocks would be compiled anew for each.
    parts, remarks = [], []
    if args.fast:
        parts, remarks = fast.use_what_agrees(model, args.micro_batch, window, autocast)
    network = model  # what the loop calls; `model` keeps the plain names
    if world > 1:
        devices = [device] if device.type == "cuda" else None
        network = DistributedDataParallel(
            model, device_ids=devices,
            gradient_as_bucket_view=True,  # else all gradients are in memory twice
            broadcast_buffers=False)       # they are constants, the same in each process

    # ---- Log. Everything is checked by now: only here is an earlier run deleted.
    settings = {name: value for name, value in vars(args).items() if name not in ONCE}
    env = environment(device, dtype, world, args.micro_batch, parts, code)
    if is_main:
        if state is None:
            start_over(run)
        if state is None and args.lora is not None:
            lora.keep_base(run, args.base, args.step, weights)
        write_json(run / "config.json", settings)
    log = Log(run if is_main else None, log_length, args.max_steps)
    log.start(step, state, settings, env, args.reset_optimizer)
    if state is None:
        log_instructions(log, step, args, examples, held_out, bad, batches, observer.shown)
    log.say(introduce(args, model, examples, held_out, bad, batches, world, dtype, device))
    for line in introduce_parts(parts, remarks):
        log.say(line)
    if state is not None:
        log.say(introduce_resume(args, state, env))
    del state, weights  # their memory is needed

    # ---- The loop
    stop = StopSignals(log)
    start_time = time.monotonic()
    stopping = False
    failure = None
    skipped_in_a_row = 0
    trained = [p for p in model.parameters() if p.requires_grad]
    while True:
        # Each round does what is due at `step`, then the update to `step` + 1. It ends here: when
        # told to stop, after saving; at the last step, after evaluating. Saving comes first, so
        # that whatever takes long or fails after it loses nothing. Evaluation draws no random
        # numbers and sampling has its own, so doing them more often does not change the training.
        stopping = stopping or step == args.stop_at
        save_now = stopping or due(step, args.save_every, args.max_steps)
        if save_now and is_main and step != resumed_at:
            full = checkpoint.capture(model, optimizer, scaler, step=step, tokens=tokens_seen,
                                      seconds=seconds, config=settings, env=env, data=fingerprint,
                                      updates=updates, log_bytes=log.length())
            checkpoint.save(run, full, args.keep_last, args.keep_every)
            del full
        if stopping:
            break
        if due(step, args.eval_every, args.max_steps):
            observer.evaluate(step, log)
        if due(step, args.sample_every, args.max_steps):  # each process the same; rank 0 logs it
            observer.sample(step, log)
        if step == args.max_steps:
            break

        # 1. Batch, 2. forward, 3. backward, for each micro-batch of this process.
        start = time.monotonic()
        lr = lr_at(step, args) * rewarming(updates, args)
        rows = batches.of_step(step)
        # Rows differ in how many of their targets count, so a mean of the micro-batches' means
        # would give a token of a short answer more weight than one of a long answer. The number of
        # targets of the whole step is known before the first forward.
        targets_in_step = int(examples.targets[rows].sum())  # of all processes
        accumulation = math.ceil(len(rows) / (args.micro_batch * world))
        loss_sum = torch.zeros((), device=device)
        for micro in range(accumulation):
            first = (micro * world + rank) * args.micro_batch
            ours = rows[first:first + args.micro_batch]
            if len(ours) > 0:
                inputs, targets = examples.read(ours)
            else:  # no row is left for this process, but DDP needs its forward: nothing counts
                inputs, targets = examples.read(rows[:1])
                targets[:] = IGNORE
            inputs = to_device(inputs, device)    # (B, T)
            targets = to_device(targets, device)  # (B, T)
            if world > 1:  # exchange gradients once a step, in the last backward
                sharding.exchange_in_backward(network, micro == accumulation - 1)
            with autocast:
                _, micro_loss = network(inputs, targets, reduction="sum")
            scaler.scale(micro_loss * world / targets_in_step).backward()
            loss_sum += micro_loss.detach()

        # 4. Clip. All processes first agree on the loss, and on whether one was told to stop: if
        # only that one left the loop, the others would wait for it for ever.
        loss = sum_over_processes(loss_sum).item() / targets_in_step
        stopping = any_process(stop.requested, device)
        scaler.unscale_(optimizer)  # without fp16 it does nothing
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        norm = norm.item()
        overflow = scaler.is_enabled() and not math.isfinite(norm)  # the scaler skips this update
        skipped_in_a_row = skipped_in_a_row + 1 if overflow else 0
        if has_diverged(loss, norm, scaler, skipped_in_a_row):
            failure = f"step {step + 1}: loss {loss}, gradient norm {norm}, lr {lr:.2e}"
            stopping = True
            continue  # without this update: the state before it is good, and is saved above

        # 5. Learning rate, 6. update.
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = [p.detach().clone() for p in trained] if args.log_update_rms else None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        updates += not overflow

        # 7. Log. Tokens are those of the rows, without padding.
        update_rms = rms_of_change(before, trained) if args.log_update_rms else None
        tokens_in_step = int(examples.lengths[rows].sum())
        tokens_seen += tokens_in_step
        dt = time.monotonic() - start
        seconds += dt
        log.train(step, tokens_seen, loss, lr, norm, dt, tokens_in_step, skipped=overflow,
                  memory=peak_memory(device), update_rms=update_rms)

    # ---- The end
    stop.restore()
    advice = [f"python sample.py {run} --chat", f"python evaluate.py {run}",
              f"open {run}/trajectory.md: base and tuned model side by side"]
    return finish(log, run, step, time.monotonic() - start_time, stopping, failure, advice)


# -------------------------------------------------------------------------------------------------
# What the run is made of

def open_base(args, run, state):
    """The weights to start from, {"config", "model"}: those of the base, or of the run resumed."""
    if state is None:
        weights, args.step = checkpoint.load_weights(args.base, args.step)
        return weights
    if args.lora is not None:
        file = lora.base_file(run)  # the state has only the adapters
        return checkpoint.load_parts(file, checkpoint.WEIGHTS)
    return {"config": state["model_config"], "model": state["model"]}


def open_instructions(args, state, tokenizer, window, is_main):
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
    chats, splits, bad = chat.read_instructions(file, args.skip_bad)
    training, held_out = chat.hold_out(chats, splits, args.held_out, args.seed)
    if any(splits) and args.held_out != HELD_OUT and is_main:
        print(f"{file}: its rows have a \"split\", so --held_out is not used")
    repeated = len(chats) - len(training) - len(held_out)
    if repeated > 0 and is_main:
        print(f"{file}: {repeated} rows repeat another one and are left out")
    examples = Examples([chats[i] for i in training], tokenizer, args.system, window, is_main)
    held_out = Examples([chats[i] for i in held_out], tokenizer, args.system, window, is_main)
    if len(examples) == 0:
        raise UserError(f"{file}: nothing left to train on: {len(training)} rows, {bad} bad ones, "
                        f"{len(chats) - len(training)} held out (by their \"split\", or by "
                        f"--held_out), {examples.skipped} whose question alone is longer than "
                        f"{window} tokens — give more or shorter rows")
    return examples, held_out, bad, fingerprint


def make_model(args, weights, device):
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
    return model.to(device)


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
        if rank == 0:  # the other processes wait in the next exchange
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
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = {}
        for length, group in itertools.groupby(order, key=lambda i: len(prompts[i])):
            group = list(group)
            most = min(self.LONGEST, self.model.config.max_seq_len - length)
            tokens = torch.tensor([prompts[i] for i in group], device=self.device)
            with evaluating(self.model, self.autocast):
                new = self.model.generate(tokens, most, temperature=0, eot=self.tokenizer.eot)
                new = torch.stack(list(new), dim=1).tolist()  # (questions, tokens)
            for i, ids in zip(group, new):
                answers[i] = cut_at_end(ids, self.tokenizer.eot)
        return [answers[i] for i in range(len(prompts))]


def cut_at_end(ids, eot):
    """(ids before the first end-of-text, whether there is one)."""
    if eot in ids:
        return ids[:ids.index(eot)], True
    return ids, False


def spread(items, n):
    """At most n of the items, evenly spread over all of them."""
    places = np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)
    return [items[i] for i in np.unique(places)]


# -------------------------------------------------------------------------------------------------
# Settings. A flag that train.py has too means the same here.

HELD_OUT = 0.02
DEFAULTS = dict(lr=2e-5, warmup_steps=20, weight_decay=0.0, sample_every=250, keep_every=0,
                epochs=3.0, lora_alpha=16.0)

# What comes from the base's settings.
INHERITED = ("preset", "data", "fingerprint", "seq_len", "benchmark", "benchmark_items")

EXPERIMENT = ("base", "step", "held_out", "system", "max_length", "lora", "lora_alpha", "epochs",
              "batch_size", "seed", "lr", "min_lr", "warmup_steps", "schedule", "weight_decay",
              "beta1", "beta2", "grad_clip")


def read_settings(argv, saved=None):
    """The command line as a namespace, as in train.py; the preset is that of the base."""
    parser = flags.Parser(description=__doc__.split("\n")[0])
    add_settings(parser)
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
    add("--epochs", type=flags.positive, help="how often each row is read (default: 3; for tiny 1)")
    add("--batch_size", type=flags.count, default=128,
        help="at most so many rows per step, over all processes")
    add("--eval_items", type=flags.count, default=512,
        help="held-out rows scored in each evaluation")
    args = parser.parse_args(argv)
    if args.lora_alpha is not None and args.lora is None and saved is None:
        raise UserError("--lora_alpha is about adapters — give --lora too, or leave it out")
    if args.epochs is not None and args.max_steps is not None and saved is None:
        raise UserError("--epochs and --max_steps both say when to end — give one of them")
    parser.set_defaults(**DEFAULTS)
    parser.set_defaults(**dict.fromkeys(INHERITED))
    if saved is None:
        parser.set_defaults(**settings_of_base(args))
    return finish_settings(parser, argv, saved, EXPERIMENT)


def settings_of_base(args):
    """What the base decides: how it was trained and scored, and the defaults for its preset."""
    if args.resume and args.run and is_tuned(args.run):
        known = settings_of(args.run)  # which has all of it; the base may be gone
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

def introduce(args, model, examples, held_out, bad, batches, world, dtype, device):
    """What is about to happen: what is trained, on which rows, in which batches."""
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = "all weights" if args.lora is None else f"LoRA of rank {args.lora}"
    answer, share = chat.most_frequent_answer(examples.chats)
    useful = batches.useful(args.micro_batch)
    counted = examples.targets.sum() / examples.lengths.sum()
    return "\n".join([
        f"base    {args.base} step {args.step}: {trained:,} of {every:,} parameters are trained "
        f"({method})",
        f"rows    {len(examples):,} to train on ({examples.cut} cut at {examples.max_length} "
        f"tokens, {examples.skipped} skipped whose question alone is longer, {bad} bad), "
        f"{len(held_out):,} held out; most frequent answer ({share:.2%}): {one_line(answer)}",
        f"batch   up to {args.batch_size} rows/step in micro-batches of {args.micro_batch} on "
        f"{world} process(es); {useful:.1%} of the tokens are not padding; {counted:.1%} of these "
        f"belong to answers and count",
        f"device  {device}, {str(dtype).removeprefix('torch.')}; {args.max_steps} steps, "
        f"{batches.per_epoch} per epoch"])


def log_instructions(log, step, args, examples, held_out, bad, batches, shown):
    """What was tuned on, for the figures: numbers, the commonest answer, the questions shown."""
    answer, share = chat.most_frequent_answer(examples.chats)
    questions = [{"question": messages[-2]["content"], "answer": messages[-1]["content"]}
                 for messages in shown]
    log.event("instructions", step, rows=len(examples), held_out=len(held_out), cut=examples.cut,
              skipped=examples.skipped, bad=bad, useful=batches.useful(args.micro_batch),
              frequent_answer=answer, frequent_share=share, questions=questions)


def one_line(text, most=120):
    return textwrap.shorten(text, most, placeholder=" …")


if __name__ == "__main__":
    sys.exit(main())

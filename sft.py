"""sft.py — instruction tuning: teach a pretrained model to answer. Read it beside train.py: the loop is the same, step for step.

    python sft.py                                   # the newest pretrained run, on questions about its own documentation
    python sft.py runs/tiny --run runs/tiny-sft     # all weights
    python sft.py runs/tiny --lora 8                # only thin matrices beside the big ones: lora.py
    python sft.py runs/1.7b --instructions alpaca.json --epochs 3 --lora 64    # your own file, Alpaca's form or messages
    python sample.py runs/tiny-sft --chat           # then talk to it

The paper (arXiv 2412.13335) tunes on alpaca-cleaned in Vicuna 1.1's template. Signals, exit codes and --resume as in train.py.
"""
import contextlib
import itertools
import math
import os
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from data import SYSTEM, Tokenizer, encode_chat
from devices import (add_up, check_room, choose_dtype, end_processes, environment, from_rank_0, listen_for_stops, memory_advice, processes,
                     start_processes)
from errors import UserError, script
from evaluate import BATCH_TOKENS, ROWS, Benchmark, scores_in_words, text_statistics
from instructions import IGNORE, Batches, Examples, file_mark, hold_out, read_instructions
from log import Log
from lora import add_adapters
from model import Llama, ModelConfig
from runs import claim, clear, need, newest_run, settings_of
from settings import check, continued, flags_of, whole_text
from train import SETTINGS as PRETRAINING, introduce_resume, lr_at, make_optimizer

# ---------------------------------------------------------------------------------------------------------------------
# Settings: as in train.py, and where the two have a setting of the same name it means the same.

SETTINGS = {  # name: (default, type or choices, meaning)
    "step": (None, int, "checkpoint of RUN to start from (default: its newest)"),
    "instructions": (None, str, "questions and answers, .json or .jsonl (default: instruct.json of RUN's data)"),
    "skip_bad": (False, bool, "leave out bad rows, and count them, where otherwise the first one is an error"),
    "held_out": (0.02, float, "share of the rows that is not trained on, where the rows have no \"split\""),
    "system": (SYSTEM, str, "how each conversation begins"),
    "max_length": (None, int, "tokens of the longest example; longer ones are cut (default: the model's window)"),
    "run": (None, str, "folder for the log and the checkpoints (default runs/RUN-sft, or runs/RUN-loraRANK)"),
    "lora": (None, int, "train adapters of this rank, and not the weights"),
    "lora_alpha": (16.0, float, "what the adapters add is multiplied by alpha / rank"),
    "epochs": (3.0, float, "how often each row is read"),
    "max_steps": (None, int, "length of the run, instead of --epochs"),
    "batch_size": (128, int, "examples per step, over all processes; a step's batch may have one less"),
    "seed": (1337, int, "of the adapters, of the rows that are held out, and of the order of the others"),
    **{name: PRETRAINING[name] for name in ("device", "dtype", "deterministic", "threads", "micro_batch", "min_lr", "schedule",
                                               "beta1", "beta2", "grad_clip", "keep_last", "save_every")},
    "lr": (2e-5, float, "peak learning rate; with --lora the default is ten times this"),
    "warmup_steps": (20, int, "linear rise to the peak"),
    "weight_decay": (0.0, float, "of matrices; vectors are not decayed"),
    "eval_every": (250, int, "steps between evaluations; also at 0, 4, 16, 64 … and the end; 0: only those"),
    "eval_items": (512, int, "held-out rows scored each time"),
    "keep_every": (0, int, "steps between weights kept for good, beside 0, 1, 2, 4, 8 …; 0: only those"),
}
BY_PRESET = {"tiny": dict(lr=1e-3, epochs=1.0, batch_size=32, eval_every=0)}  # of the base
INHERITED = ("preset", "data", "seq_len", "sample_prompt", "benchmark", "benchmark_items")  # of the base: how it was trained and scored
EXPERIMENT = ("base", "step", "held_out", "system", "max_length", "lora", "lora_alpha", "batch_size", "seed", "lr", "min_lr",
              "warmup_steps", "schedule", "weight_decay", "beta1", "beta2", "grad_clip")


def parse(argv):
    """The flags that were given, and only those: {name: value}."""
    parser = flags_of(SETTINGS, __doc__.split("\n")[0], BY_PRESET)
    parser.add_argument("base", nargs="?", metavar="RUN", help="run folder to start from (default: the newest that train.py made)")
    given = vars(parser.parse_args(argv))
    # Spelled one way, so that a resume knows them again.
    return {name: os.path.relpath(value or ".") if name == "base" else whole_text(value) if name == "system" else value for name, value in given.items()}


def resolve(given, saved=None):
    """All settings of a run, one dict, as train.resolve. "base" is given by now, or absent when only the flags are checked."""
    flags = check(given)
    if {"max_steps", "epochs"} <= flags.keys():
        raise UserError("--max_steps and --epochs both say when to end — give one")
    if "lora_alpha" in flags and not (saved or flags).get("lora"):
        raise UserError("--lora_alpha is about adapters, and this run has none — leave it out, or give --lora too")
    if saved:
        return continued({**saved, "max_steps": None} if "epochs" in flags else saved, flags, EXPERIMENT)
    of_base = settings_of(Path(flags["base"])) if "base" in flags else {}
    preset = BY_PRESET.get(of_base.get("preset"), {})
    settings = {**{name: row[0] for name, row in SETTINGS.items()}, **preset, **{name: of_base.get(name) for name in INHERITED}, **flags}
    if settings["lora"] and "lr" not in flags:
        settings["lr"] *= 10
    return settings | ({"min_lr": settings["lr"] / 10} if settings["min_lr"] is None else {})


def find_base(given):
    return given["base"] if "base" in given else str(newest_run(pretrained=True))


# ---------------------------------------------------------------------------------------------------------------------
# What the loop is made of

def open_base(run, settings, weights):
    """(weights to start from, reference): of a new run those of its base; of a resumed LoRA run those that its adapters are for;
    else the saved ones. reference, kept with adapters: where their base is and which SHA-256 its model.pt has."""
    if weights:
        reference = weights.get("lora", {}).get("base")
        return checkpoint.load_base(run, reference) if reference else weights, reference
    base, step = checkpoint.load_weights(settings["base"], settings["step"])
    meta = checkpoint.read_meta(checkpoint.checkpoints(settings["base"])[step])
    return base, {"run": os.path.relpath(settings["base"], run), "step": step, "sha256": meta["files"]["model.pt"]["sha256"]}


def open_instructions(settings, state, tokenizer, window, is_main):
    """(file's mark, rows to train on, rows held out, conversations of the first, of the second, number of bad rows). Raises
    UserError if there is nothing to train on, or if a run's file has changed."""
    file = Path(settings["instructions"] or Path(settings["data"], "instruct.json"))
    if not file.is_file():
        raise UserError(f"{file}: no such file — " + ("give another --instructions" if settings["instructions"] else
                        "give one with --instructions, or that of the embedded text: python prepare_data.py pydocs makes data/pydocs/instruct.json"))
    chats, splits, bad = read_instructions(file, settings["skip_bad"])
    parts = [[chats[i] for i in part] for part in hold_out(splits, settings["held_out"], settings["seed"])]
    examples = [Examples(part, tokenizer, settings["system"], window, progress=is_main) for part in parts]
    if not len(examples[0]):
        by_split = ' by their "split", which is not "train"' if any(splits) else ""
        raise UserError(f"{file}: nothing left to train on ({len(parts[0])} rows, {examples[0].skipped} of them with a question that alone is longer "
                        f"than {window} tokens; {bad} bad; {len(parts[1])} held out{by_split}) — give more or shorter rows")
    mark = file_mark(file)
    if state and state["data"] != mark:
        raise UserError(f"{file} is not the file that this run was tuned on — restore it, or choose another --run")
    return mark, *examples, *([part[i] for i in rows.kept] for part, rows in zip(parts, examples)), bad


class Examiner:
    """What is looked at while tuning, the same at every moment: the loss on held-out answers, some of their questions put to
    the model, and the base's benchmark, to see what tuning costs."""
    ASKED, SHOWN, LONGEST = 32, 5, 64  # questions, those of them that are shown, tokens of an answer

    def __init__(self, model, tokenizer, examples, chats, settings, autocast):
        self.model, self.tokenizer, self.examples, self.autocast = model, tokenizer, examples, autocast
        self.rows = spread(range(len(examples)), settings["eval_items"])
        asked = spread([i for i in range(len(examples)) if examples.whole[i]], self.ASKED)
        self.prompts = [encode_chat(tokenizer, chats[i][:-1], settings["system"])[0] for i in asked]
        shown = spread(range(len(asked)), self.SHOWN)
        self.shown = {place: {"question": chats[asked[place]][-2]["content"], "answer": chats[asked[place]][-1]["content"]} for place in shown}
        file, items = Path(settings["benchmark"] or Path(settings["data"], "cloze.jsonl")), settings["benchmark_items"]
        self.benchmark = Benchmark(file, tokenizer, settings["seq_len"], items=items) if file.exists() else None

    def evaluate(self, step, log, is_main):
        """Log all of it, print most of it."""
        start, result = time.monotonic(), self.score()
        answers = self.answer() if is_main else []  # the others wait for rank 0 in the next exchange
        result["ended"] = sum(ended for _, ended in answers) / len(answers) if answers else None
        log.event("sft_eval", step, **result, seconds=time.monotonic() - start)
        if answers:
            log.say(f"  held-out answers: loss {result['heldout_loss']:.4f}, {result['token_acc']:.1%} of the tokens right; "
                    f"{result['ended']:.0%} of {len(answers)} answers end")
        if self.benchmark:
            start = time.monotonic()
            scores = self.benchmark.score(self.model, self.autocast)
            log.event("benchmark", step, **scores, seconds=time.monotonic() - start)
            log.say(f"  {scores_in_words(scores)}")
        for number, (place, question) in enumerate(self.shown.items() if answers else []):
            ids, ended = answers[place]
            text = self.tokenizer.decode(ids).strip()
            log.event("sample", step, prompt=question["question"], text=text, cut=not ended, **text_statistics(ids))
            if not number:
                log.say(f"  {on_a_line(question['question'])} | {on_a_line(text, 240)}{'' if ended else ' …'}")

    def score(self):
        """{"heldout_loss": nats per counted token, "token_acc": share of them that is the likeliest}; exact over all processes."""
        device, (rank, world) = next(self.model.parameters()).device, processes()
        rows = sorted(self.rows, key=lambda row: self.examples.padded[row])
        size = max(1, BATCH_TOKENS // self.examples.max_length)
        sums = torch.zeros(-(-len(rows) // size), 3, dtype=torch.float64)  # a row per batch: nats, right ones, tokens
        with torch.no_grad(), self.autocast:
            for i in range(rank, len(sums), world):
                tokens, targets = (torch.from_numpy(part).to(device) for part in self.examples.read(rows[i * size:(i + 1) * size]))
                counted = targets != IGNORE
                for hidden, target in zip(self.model.model(tokens)[counted].split(ROWS), targets[counted].split(ROWS)):
                    logits = self.model.lm_head(hidden).float()
                    sums[i, 0] += F.cross_entropy(logits, target, reduction="sum").item()
                    sums[i, 1] += (logits.argmax(-1) == target).sum().item()
                    sums[i, 2] += len(target)
        nats, right, n = add_up(sums, device).sum(0).tolist()
        return {"heldout_loss": nats / n if n else None, "token_acc": right / n if n else None}

    def answer(self):
        """[(ids, ended), …]: the likeliest answer to each question. Questions with as many tokens are asked together."""
        answers, device = {}, next(self.model.parameters()).device
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        for n, group in itertools.groupby(order, key=lambda i: len(self.prompts[i])):
            group = list(group)
            room = min(self.LONGEST, self.model.config.max_seq_len - n)
            with self.autocast:
                new = self.model.generate(torch.tensor([self.prompts[i] for i in group], device=device), room, 0, eot=self.tokenizer.eot)
                for i, ids in zip(group, torch.stack(list(new), 1).tolist()):
                    ended = self.tokenizer.eot in ids
                    answers[i] = ids[:ids.index(self.tokenizer.eot)] if ended else ids, ended
        return [answers[i] for i in range(len(self.prompts))]


def spread(items, n):
    """At most n of the items, evenly over all of them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(n, len(items))).astype(int))]


def on_a_line(text, most=120):
    return textwrap.shorten(text, most, placeholder=" …")


def most_frequent_answer(chats):
    """(the answer that training shows most often, its share)."""
    counts = Counter(message["content"] for messages in chats for message in messages if message["role"] == "assistant")
    answer, n = counts.most_common(1)[0]
    return answer, n / counts.total()


def introduce(settings, model, examples, held_out, bad, batches, frequent, world, dtype, device):
    """What is about to happen: what is trained, on which rows, in which batches."""
    all_, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or everything) for everything in (True, False))
    counts = f"{examples.cut} cut at {examples.max_length} tokens, {examples.skipped} skipped whose question alone is longer, {bad} bad"
    return (f"base    {settings['base']} step {settings['step']}: {trained:,} of {all_:,} parameters are trained"
            + (f" (LoRA of rank {settings['lora']})" if settings["lora"] else "") + "\n"
            f"rows    {len(examples):,} to train on ({counts}), {len(held_out):,} held out; most frequent answer ({frequent[1]:.2%}): {on_a_line(frequent[0])}\n"
            f"batch   up to {settings['batch_size']} rows/step in micro-batches of {settings['micro_batch']} on {world} process{'es' if world > 1 else ''}; "
            f"{batches.useful(settings['micro_batch']):.1%} of the tokens useful, the rest padding; "
            f"{examples.targets.sum() / examples.lengths.sum():.1%} of the useful ones belong to answers and count\n"
            f"device  {device}, {str(dtype).removeprefix('torch.')}; {settings['max_steps']} steps, {batches.per_epoch} per epoch")


@script
def main(argv=None):
    given = parse(argv)
    fresh, method = not given.get("resume"), f"lora{given['lora']}" if "lora" in given else "sft"
    base = find_base(given) if fresh or not given.get("run") else None  # a run that is resumed knows its base
    run = Path(given.get("run") or f"runs/{Path(base).resolve().name}-{method}")
    if fresh and run.resolve() == Path(base).resolve():
        raise UserError(f"{run} is the run to start from — choose another --run for what becomes of it")
    first = {**given, "base": base} if fresh else {name: value for name, value in given.items() if name != "base"}
    rank, world, device = start_processes(resolve(first))  # a first time, so that a mistake touches nothing
    is_main = rank == 0
    lock, folder = claim(run, given) if is_main else (None, None)  # held as long as `lock` lives
    weights, state = checkpoint.load_full(from_rank_0(folder))
    settings = {**(resolve(given, state["config"]) if state else resolve({**given, "base": find_base(given)})), "run": str(run)}
    # ---- Data, model, optimizer, precision
    pretrained, reference = open_base(run, settings, weights)
    settings["step"] = reference["step"] if reference else settings["step"]
    config, lora = ModelConfig(**pretrained["config"]), settings["lora"]
    tokenizer, window = Tokenizer(config.vocab_size), settings["max_length"] or config.max_seq_len
    if window > config.max_seq_len or lora and lora > config.dim:
        raise UserError(f"--max_length {window} is more than the model's window of {config.max_seq_len} tokens — give at most that" if window > config.max_seq_len else
                        f"--lora {lora} is more than the model's dim {config.dim}: that would be no low rank — choose a smaller one")
    mark, examples, held_out, chats, held_chats, bad = open_instructions(settings, state, tokenizer, window, is_main)
    batches, frequent = Batches(examples, settings["batch_size"], settings["seed"]), most_frequent_answer(chats)
    settings["max_steps"] = settings["max_steps"] or max(1, round(settings["epochs"] * batches.per_epoch))
    torch.manual_seed(settings["seed"])
    model = Llama(config)
    checkpoint.restore_weights(pretrained, model)
    if lora:
        add_adapters(model, lora, settings["lora_alpha"])
    model.to(device)
    optimizer, dtype = make_optimizer(model, settings, device), choose_dtype(settings["dtype"], device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    examiner = Examiner(model, tokenizer, held_out, held_chats, settings, autocast)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, seconds, seen = 0, 0.0, 0
    if state:
        checkpoint.restore(weights, state, model, optimizer, scaler, given.get("reset_optimizer"))
        step, seconds, seen = state["step"], state["seconds"], state["tokens"]
    if step >= settings["max_steps"]:
        if is_main:
            print(f"{run} is finished: {step} steps — try: python sample.py {run} --chat, python plot_dynamics.py {run}, or a larger --max_steps")
        return end_processes(0)
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model

    # ---- Log. Only here, with everything checked, is an earlier run given up.
    if is_main:
        check_room(run, model, settings)
        checkpoint.write_json(run / "config.json", settings)
        if lora and not state:  # so that train.py, going on with the base, does not remove what these adapters are for
            need(checkpoint.checkpoints(settings["base"])[settings["step"]], run)
        if not state:
            clear(run)
    log = Log(run, step, state["log_bytes"] if state else 0, is_main)
    env, reset = environment(device, dtype, world, settings["micro_batch"], False), given.get("reset_optimizer", False)
    log.event("resume" if state else "start", step, time=time.time(), config=settings, env=env, restored_optimizer=bool(state) and not reset)
    if not state:
        log.event("instructions", step, rows=len(examples), held_out=len(held_out), cut=examples.cut, skipped=examples.skipped, bad=bad,
                  useful=batches.useful(settings["micro_batch"]), frequent_answer=frequent[0], frequent_share=frequent[1],
                  questions=list(examiner.shown.values()))
    log.say(introduce(settings, model, examples, held_out, bad, batches, frequent, world, dtype, device))
    if state:
        log.say(introduce_resume(state, settings, env, reset))
    resumed_at, weights, state, pretrained = step if state else None, None, None, None

    # ---- The loop
    asked, stop_listening = listen_for_stops(log)
    B, stopping, step_times, last_line = settings["micro_batch"], False, [], 0.0
    while True:
        # Look at the model and save it, at the moments for that.
        at_end, stopping = step == settings["max_steps"], stopping or step >= given.get("stop_at", math.inf)
        every = {name: at_end or step == 0 or (n > 0 and step % n == 0) for name in ("eval", "save") for n in [settings[f"{name}_every"]]}
        if step != resumed_at:
            if every["eval"] or checkpoint.power_of_two(step) and step.bit_length() in range(3, 99, 2):
                examiner.evaluate(step, log, is_main)
            full = stopping or every["save"]
            if is_main and (full or checkpoint.power_of_two(step)):
                weights, state = checkpoint.capture(model, optimizer, scaler)
                weights |= {"lora": {"base": reference, "scale": settings["lora_alpha"] / lora}} if lora else {}
                state |= {"step": step, "tokens": seen, "seconds": seconds, "config": settings, "env": env, "data": mark, "log_bytes": log.length()}
                checkpoint.save(run, step, weights, state if full else None)
                checkpoint.prune(run, step, settings["keep_last"], settings["keep_every"])
        if stopping or at_end:
            break

        # 1. Batch, 2. forward, 3. backward: for each micro-batch of this process.
        start, lr, rows = time.monotonic(), lr_at(step, settings), batches.of_step(step)
        # The targets that count in the whole step, on all processes: known before the first forward. Rows differ in how many
        # they have, so a mean of the micro-batches' means would count a token of a short answer more than one of a long answer.
        total, accumulation = int(examples.targets[rows].sum()), -(-len(rows) // (B * world))
        report = torch.zeros(2, device=device)  # summed loss, wishes to stop
        with memory_advice({**settings, "seq_len": window}, accumulation, "--max_length"):
            for micro in range(accumulation):
                mine = rows[(micro * world + rank) * B:][:B]
                tokens, targets = examples.read(mine if len(mine) else rows[:1])
                if not len(mine):  # more processes than rows are left: a forward of our own, in which nothing counts
                    targets[:] = IGNORE
                tokens, targets = torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)
                if world > 1:
                    network.require_backward_grad_sync = micro == accumulation - 1
                with autocast:
                    _, loss = network(tokens, targets, reduction="sum")
                scaler.scale(loss * world / total).backward()
                report[0] += loss.detach()
        # 4. Clip; but first the loss of all processes, and whether one was asked to stop, so that all do the same.
        report[1] = len(asked)
        if world > 1:
            dist.all_reduce(report)
        loss, stopping = report[0].item() / total, report[1].item() > 0
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"] or math.inf).item()
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            if is_main:
                checkpoint.write_json(run / "non_finite.json", {"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "lr": lr,
                                                                "questions": [chats[i][-2]["content"] for i in rows]})
            raise UserError(f"step {step + 1}: loss {loss}, gradient norm {norm}; this update was not made (more in {run}/non_finite.json) — "
                            f"try a lower --lr in another --run", code=3)
        # 5. Learning rate, 6. update.
        for group in optimizer.param_groups:
            group["lr"] = lr
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # 7. Log. Tokens are those of the rows, without padding.
        dt, read = time.monotonic() - start, int(examples.lengths[rows].sum())
        seconds, seen, rate = seconds + dt, seen + read, read / dt
        step_times.append(dt)
        log.event("train", step, tokens=seen, loss=loss, lr=lr, grad_norm=norm, dt_ms=1000 * dt, tok_per_s=rate,
                  **({"skipped": True} if scaler.get_scale() < scale else {}))
        if step <= 4 or time.monotonic() - last_line > 2 or stopping or step == settings["max_steps"]:
            last_line, left = time.monotonic(), (settings["max_steps"] - step) * median(step_times[-20:]) / 60
            log.say(f"step {step:>6}/{settings['max_steps']} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {1000 * dt:.0f} ms | "
                    f"{rate / 1000:.1f}k tok/s | {left:.1f} min left")

    # ---- The end
    stop_listening()
    log.event("end", step, time=time.time(), reason="done" if at_end else "stopped")
    if is_main and at_end:
        import plot_dynamics
        with contextlib.suppress(SystemExit):  # it says what is wrong; the run is done and saved all the same
            plot_dynamics.main([str(run), "--out", str(run)])
    log.say(f"done: {step} steps, {seconds / 60:.1f} minutes of training{f'; base and tuned model side by side: {run}/trajectory.md' if examiner.shown else ''}\n"
            f"Two things to try next:\n  python sample.py {run} --chat\n  python evaluate.py {run}" if at_end else
            f"stopped and saved at step {step} — go on with the same command and --resume")
    return end_processes(0 if at_end else 75)


if __name__ == "__main__":
    sys.exit(main())

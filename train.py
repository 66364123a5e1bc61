"""train.py — pretrain a LLaMA: the whole loop, read from top to bottom.

    python train.py                                         # tiny, on the manuals of your own Python; a few minutes
    python train.py --resume                                # go on after Ctrl-C, as if nothing had happened
    python train.py --preset 1.7b --data data/fineweb-edu   # the paper's run (arXiv 2412.13335)
    torchrun --standalone --nproc_per_node=8 -- train.py --preset 1.7b    # after --: torchrun takes --run for its own

Exit codes: 0 done, 2 bad usage or data, 3 the loss is no number, 4 checkpoint or log not written, 75 stopped: use --resume.
"""
import contextlib
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from data import DataFolder, Windows
from devices import (check_room, choose_dtype, end_processes, environment, from_rank_0, listen_for_stops, memory_advice, peak_flops,
                     start_processes)
from errors import UserError, script
from evaluate import Observer
from log import Log
from model import PRESETS, Llama, ModelConfig, flops_per_token, kv_bytes_per_token
from runs import claim, clear
from settings import check, continued, flags_of

# ---------------------------------------------------------------------------------------------------------------------
# Settings: what every run starts from, what a preset changes, and what the command line says, in this order.

EMBEDDED = "data/pydocs"  # the text on every Python's disk; prepared on the spot when it is missing
SETTINGS = {  # name: (default, type or choices, meaning)
    "data": ("data/fineweb-edu", str, "folder from prepare_data.py, or shards of nanoGPT, build-nanogpt, llm.c"),
    "run": (None, str, "folder for the log and the checkpoints (default runs/PRESET)"),
    "init_from": (None, str, "run folder whose weights to start from"),
    "seed": (1337, int, "of the initial weights and of the data order"),
    "device": (None, str, "cpu, cuda, cuda:1 … (default: cuda if there is one)"),
    "dtype": ("auto", ("auto", "fp32", "bf16", "fp16"), "of matrix products; weights stay fp32"),
    "compile": (None, bool, "torch.compile each block (default: on CUDA)"),
    "deterministic": (False, bool, "bitwise repeatable on CUDA too; slower"),
    "threads": (None, int, "CPU threads"),
    "max_steps": (None, int, "length of the run, and of the learning-rate schedule"),
    "max_minutes": (None, float, "time 20 steps, then set max_steps to what fits"),
    "batch_tokens": (524_288, int, "tokens per step, over all processes"),
    "micro_batch": (8, int, "sequences per forward of one process: memory and speed, nothing else"),
    "seq_len": (1024, int, "tokens per sequence"),
    "lr": (6e-4, float, "peak learning rate"),
    "min_lr": (None, float, "final learning rate (default: lr / 10)"),
    "warmup_steps": (715, int, "linear rise to the peak"),
    "schedule": ("cosine", ("cosine", "linear", "wsd"), "decay after the warm-up"),
    "weight_decay": (0.1, float, "of matrices; vectors are not decayed"),
    "beta1": (0.9, float, "AdamW's memory of the gradient"),
    "beta2": (0.95, float, "AdamW's memory of its square"),
    "grad_clip": (1.0, float, "longest gradient norm; 0: no clipping"),
    "eval_every": (250, int, "steps between evaluations; also at 0, 1, 2, 4, 8 … and the end; 0: only those"),
    "eval_tokens": (10_485_760, int, "validation tokens scored each time"),
    "sample_every": (1000, int, "steps between samples; also at 0, 4, 16, 64 … and the end; 0: only those"),
    "sample_prompt": ("The", str, "what the samples continue"),
    "benchmark": (None, str, "questions to score at evaluations, HellaSwag's format (default: the data's cloze.jsonl, if any)"),
    "benchmark_items": (None, int, "score only so many of the questions, the first (default: all)"),
    "save_every": (500, int, "steps between full checkpoints; also at 0, a stop and the end; 0: only those"),
    "keep_last": (2, int, "full checkpoints kept"),
    "keep_every": (5000, int, "steps between weights kept for good, beside 0, 1, 2, 4, 8 …; 0: only those"),
    "shuffle": (True, bool, "windows in a new random order each epoch; else in file order"),
}
BY_PRESET = {  # 978m and 1.7b: the paper's batch, rate, warm-up and 20B tokens
    "tiny": dict(data=EMBEDDED, max_minutes=4.0, batch_tokens=1024, seq_len=128, lr=3e-3, warmup_steps=100, eval_every=1000,
                 eval_tokens=24_576, benchmark_items=320, sample_prompt="The function returns", sample_every=0, save_every=500, keep_every=0),
    "124m": dict(max_steps=19_073), "978m": dict(max_steps=38_147), "1.7b": dict(max_steps=38_147)}
# What makes a run this run and not another: a resume may not change these. All else is speed, paths and intervals.
EXPERIMENT = ("preset", "init_from", "seed", "batch_tokens", "seq_len", "lr", "min_lr", "warmup_steps", "schedule",
              "weight_decay", "beta1", "beta2", "grad_clip", "shuffle")


def parse(argv):
    """The flags that were given, and only those: {name: value}."""
    parser = flags_of(SETTINGS, __doc__.split("\n")[0], BY_PRESET)
    parser.add_argument("--preset", choices=PRESETS, help="size of the model, and its settings (default tiny)")
    return vars(parser.parse_args(argv))


def resolve(given, saved=None):
    """All settings of a run, one dict: defaults, preset, flags; on resume the `saved` ones and harmless flags.
    Raises UserError for values that make no sense, and for flags that would make of the run another experiment."""
    flags = check(given)
    if {"max_steps", "max_minutes"} <= flags.keys():
        raise UserError("--max_steps and --max_minutes both say when to end — give one")
    if saved:
        if saved.get("max_steps") is not None:
            flags.pop("max_minutes", None)  # the horizon was fixed; only --max_steps moves it
        return continued(saved, flags, EXPERIMENT)
    preset = flags.get("preset", "tiny")
    settings = {"preset": preset, **{name: row[0] for name, row in SETTINGS.items()}, **BY_PRESET[preset], **flags}
    if "max_steps" in flags or "max_minutes" in flags:  # the one that was given replaces the preset's
        settings["max_minutes" if "max_steps" in flags else "max_steps"] = None
    return settings | ({"min_lr": settings["lr"] / 10} if settings["min_lr"] is None else {})


def lr_at(step, settings):
    """Learning rate of the update that makes `step` + 1: linear warm-up, then cosine (Loshchilov & Hutter 2017, arXiv
    1608.03983, eq. 5), linear, or constant with a linear end over the last 20 % (wsd: Hu et al. 2024, arXiv 2404.06395,
    §4). A pure function: no resume can stretch it. While --max_minutes is still timing there is no end: the peak."""
    lr, min_lr, warmup, end = (settings[name] for name in ("lr", "min_lr", "warmup_steps", "max_steps"))
    if step < warmup or end is None:
        return lr * min(1.0, (step + 1) / max(1, warmup))
    done = min(1.0, (step - warmup) / max(1, end - warmup))  # share of the way from the warm-up to the end
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "wsd": min(1.0, (end - step) / (0.2 * end))}
    return min_lr + (lr - min_lr) * max(0.0, left[settings["schedule"]])


# ---------------------------------------------------------------------------------------------------------------------
# What the loop is made of

def open_data(settings, state, is_main):
    """(DataFolder, fingerprint). Prepares the embedded text if it is absent. Raises UserError if a run's data has changed."""
    if is_main and settings["data"] == EMBEDDED and not Path(EMBEDDED).exists():
        from prepare_data import prepare_pydocs
        prepare_pydocs(Path(EMBEDDED), PRESETS["tiny"].vocab_size)
    from_rank_0()
    data = DataFolder(settings["data"])
    fingerprint = data.fingerprint()
    if state and state["data"] != fingerprint:
        changed = [new[0] for old, new in zip(state["data"], fingerprint) if old != new] or ["the number of shards"]
        raise UserError(f"{settings['data']} is not this run's data (changed: {', '.join(changed)}) — restore it, or choose another --run")
    return data, fingerprint


def make_optimizer(model, settings, device):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2), decaying matrices but not the norms' vectors."""
    # AdamW keeps two running means for every weight, of its gradient and of the gradient's square: twice the size of the
    # model, and the memory of the run. Zeroed, the next update is a fresh gradient divided by its own size: about lr on
    # every weight at once, whatever was known of how far each should move.
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings["weight_decay"]},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=(settings["beta1"], settings["beta2"]), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))


def accumulation_steps(settings, world):
    """Micro-batches per step of each process. Raises UserError with the nearest batch sizes that divide."""
    B, T, total = settings["micro_batch"], settings["seq_len"], settings["batch_tokens"]
    unit = B * T * world
    if total % unit:
        near = " or ".join(str(n) for n in (total // unit * unit, total // unit * unit + unit) if n)
        raise UserError(f"--batch_tokens {total} is not divisible by micro_batch {B} x seq_len {T} x {world} "
                        f"process{'es' if world > 1 else ''} = {unit} — use --batch_tokens {near}, or another --micro_batch")
    return total // unit


def steps_that_fit(settings, step, step_times, elapsed):
    """Steps that fit into --max_minutes: the time left, divided by the time of a step and its share of an evaluation."""
    look = (elapsed - sum(step_times)) / 6  # in 20 steps we have looked (evaluated, sampled, saved) at 0, 1, 2, 4, 8, 16
    left = 60 * settings["max_minutes"] - elapsed - 7 * look  # at 32, 64, 128 … and the end
    cost = median(step_times[-10:]) + (look / settings["eval_every"] if settings["eval_every"] else 0)
    return step + max(1, int(left / cost))


def introduce(settings, model, world, accumulation, dtype, device):
    """What is about to happen: the model, the batch arithmetic, the first loss to expect."""
    config, T = model.config, settings["seq_len"]
    kv, mha = kv_bytes_per_token(config), kv_bytes_per_token(replace(config, n_kv_heads=config.n_heads))
    return (f"model   {settings['preset']}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.n_layers} layers of "
            f"{config.dim}, {config.n_heads} query heads on {config.n_kv_heads} key/value: KV cache {kv:,} bytes/token, not {mha:,}\n"
            f"batch   {settings['batch_tokens']:,} tokens/step = {settings['micro_batch']} sequences x {T} tokens x "
            f"{accumulation} accumulation x {world} process{'es' if world > 1 else ''}\n"
            f"device  {device}, {str(dtype).removeprefix('torch.')}, {flops_per_token(config, T) / 1e9:.3f} GFLOP/token\n"
            f"expect  a first loss near ln {config.padded_vocab_size:,} = {math.log(config.padded_vocab_size):.2f}: any next token equally likely")


def introduce_resume(state, settings, env, reset):
    """Where the run goes on, and what is no longer as it was."""
    step, before, now = state["step"], {**state["config"], **state["env"]}, {**settings, **env}
    changed = [f"{name} {before.get(name)} → {now[name]}" for name in now if before.get(name) != now[name]]
    return (f"resume  at step {step}, with{'out' if reset else ''} the optimizer's state; lr {lr_at(step, state['config']):.2e} as saved, "
            f"{lr_at(step, settings):.2e} now\n        changed since it was saved: {', '.join(changed) or 'nothing'}")


@script
def main(argv=None):
    given = parse(argv)
    settings = resolve(given)  # a first time, so that a mistake in a flag touches nothing
    rank, world, device = start_processes(settings)
    is_main = rank == 0
    run = Path(settings["run"] or f"runs/{settings['preset']}")
    lock, folder = claim(run, given) if is_main else (None, None)  # held as long as `lock` lives
    weights, state = checkpoint.load_full(from_rank_0(folder))
    settings = {**resolve(given, state and state["config"]), "run": str(run)}  # saved settings rule
    data, fingerprint = open_data(settings, state, is_main)
    windows = Windows(data.train, settings["seq_len"], data.vocab_size, settings["seed"], settings["shuffle"])
    # ---- Model, optimizer, precision. The weights are fp32: in bf16, with 8 bits, most small updates would round away.
    accumulation, preset = accumulation_steps(settings, world), PRESETS[settings["preset"]]
    config = ModelConfig(**weights["config"]) if weights else replace(
        preset, vocab_size=data.vocab_size, padded_vocab_size=None, max_seq_len=max(preset.max_seq_len, settings["seq_len"]))
    torch.manual_seed(settings["seed"])
    model = Llama(config).to(device)
    optimizer, dtype = make_optimizer(model, settings, device), choose_dtype(settings["dtype"], device)
    # Autocast runs matrix products in `dtype`; norms, softmax, loss and weights stay fp32. bf16 has the range of fp32 and
    # needs no more. fp16 has not, and small gradients would round to 0: so the scaler multiplies the loss, divides the
    # gradients before they are used, and where the product overflowed it skips the update and halves its factor.
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    observer = Observer(model, data, settings, autocast)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # `step` counts finished updates, which is also the number of batches consumed: the position in the data, in the
    # schedule and in the log are one number. Counted otherwise, each resume would repeat or skip a batch.
    step, seconds = 0, 0.0
    if state:
        checkpoint.restore(weights, state, model, optimizer, scaler, given.get("reset_optimizer"))
        step, seconds = state["step"], state["seconds"]
    elif settings["init_from"]:
        checkpoint.restore_weights(checkpoint.load_weights(settings["init_from"])[0], model)
    if settings["max_steps"] is not None and step >= settings["max_steps"]:
        if is_main:
            print(f"{run} is finished: {step} steps — try: python sample.py {run}, python plot_dynamics.py {run}, or a larger --max_steps")
        return end_processes(0)
    compiled = settings["compile"] if settings["compile"] is not None else device.type == "cuda"
    for block in model.model.layers if compiled else []:
        block.compile()  # in place, so that the state_dict keeps its names
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model

    # ---- Log. Only here, with everything checked, is an earlier run given up.
    if is_main:
        check_room(run, model, settings)
        checkpoint.write_json(run / "config.json", settings)
        if not state:
            clear(run)
    log = Log(run, step, state["log_bytes"] if state else 0, is_main)
    env, reset = environment(device, dtype, world, settings["micro_batch"], compiled), given.get("reset_optimizer", False)
    peak = peak_flops(env)
    log.event("resume" if state else "start", step, time=time.time(), config=settings, env=env, restored_optimizer=bool(state) and not reset)
    log.say(introduce(settings, model, world, accumulation, dtype, device))
    if state:
        log.say(introduce_resume(state, settings, env, reset))
    resumed_at, weights, state = step if state else None, None, None

    # ---- The loop
    asked, stop_listening = listen_for_stops(log)
    batch, B, total = settings["batch_tokens"] // settings["seq_len"], settings["micro_batch"], settings["batch_tokens"]
    stopping, timed, step_times, loop_start, last_line = False, False, [], time.monotonic(), 0.0
    while True:
        # Look at the model and save it, at the moments for that. An evaluation draws nothing at random, and samples have a
        # generator of their own: looking more often, or less, changes nothing in what is trained.
        at_end, stopping = step == settings["max_steps"], stopping or step >= given.get("stop_at", math.inf)
        every = {name: at_end or step == 0 or (n > 0 and step % n == 0) for name in ("eval", "sample", "save") for n in [settings[f"{name}_every"]]}
        if step != resumed_at:
            if every["eval"] or checkpoint.power_of_two(step):
                observer.evaluate(step, log)
            if is_main and (every["sample"] or checkpoint.power_of_two(step) and step.bit_length() in range(3, 99, 2)):
                observer.sample(step, log)
            full, timed = stopping or timed or every["save"], False
            if is_main and (full or checkpoint.power_of_two(step)):
                weights, state = checkpoint.capture(model, optimizer, scaler)
                state |= {"step": step, "tokens": step * total, "seconds": seconds, "config": settings, "env": env, "data": fingerprint,
                          "log_bytes": log.length()}
                checkpoint.save(run, step, weights, state if full else None)
                checkpoint.prune(run, step, settings["keep_last"], settings["keep_every"])
        if stopping or at_end:
            break

        # 1. Batch, 2. forward, 3. backward: for each micro-batch of this process.
        start, lr = time.monotonic(), lr_at(step, settings)
        report = torch.zeros(2, device=device)  # summed loss, wishes to stop
        with memory_advice(settings, accumulation):
            for micro in range(accumulation):
                # The windows of a step are one list, whatever the number of processes; this is our slice of it.
                mine = windows.order(step * batch + (micro * world + rank) * B, B)
                tokens = torch.from_numpy(windows.read(mine)).to(device)  # (B, seq_len + 1)
                if world > 1:  # gradients are exchanged once a step, in the last backward
                    network.require_backward_grad_sync = micro == accumulation - 1
                with autocast:
                    _, loss = network(tokens[:, :-1], tokens[:, 1:], reduction="sum")
                # Gradients add up over micro-batches, so each sum is divided by the targets of the whole step. Of two
                # micro-batches with 10 and 90 targets and mean losses 4 and 2, the mean is (10·4 + 90·2) / 100 = 2.2; the
                # mean of their means would be 3. And DDP takes the mean over processes where we want the sum: · world.
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
                                                                "windows": windows.order(step * batch, batch).tolist()})
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

        # 7. Log.
        dt = time.monotonic() - start
        seconds, rate = seconds + dt, total / dt
        step_times.append(dt)
        log.event("train", step, tokens=step * total, loss=loss, lr=lr, grad_norm=norm, dt_ms=1000 * dt, tok_per_s=rate,
                  **({"mfu": rate * flops_per_token(config, settings["seq_len"]) / peak} if peak else {}),
                  **({"skipped": True} if scaler.get_scale() < scale else {}))
        if settings["max_steps"] is None and step == 20:
            timed = True  # saved at once: timed again, after a kill, it would be another horizon
            settings["max_steps"] = from_rank_0(steps_that_fit(settings, step, step_times, time.monotonic() - loop_start))
            log.event("horizon", step, max_steps=settings["max_steps"])
            log.say(f"  at this speed, {settings['max_steps']} steps make {settings['max_minutes']:g} minutes")
            if is_main:
                checkpoint.write_json(run / "config.json", settings)
        if step <= 4 or time.monotonic() - last_line > 2 or stopping or step == settings["max_steps"]:
            last_line, left = time.monotonic(), ((settings["max_steps"] or math.nan) - step) * median(step_times[-20:]) / 60
            log.say(f"step {step:>6}/{settings['max_steps'] or '?'} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {1000 * dt:.0f} ms | "
                    f"{rate / 1000:.1f}k tok/s" + ("" if math.isnan(left) else f" | {left:.1f} min left"))

    # ---- The end
    stop_listening()
    log.event("end", step, time=time.time(), reason="done" if at_end else "stopped")
    if is_main and at_end:
        import plot_dynamics
        with contextlib.suppress(SystemExit):  # it says what is wrong; the run is done and saved all the same
            plot_dynamics.main([str(run), "--out", str(run)])
    log.say(f"done: {step} steps, {seconds / 60:.1f} minutes of training. Three things to try next:\n"
            f"  python sample.py {run} --prompt \"The function\"\n  python evaluate.py {run} --step {min(16, 1 << step.bit_length() - 1)}\n"
            f"  python train.py --run {run} --resume --max_steps {2 * step}" if at_end else
            f"stopped and saved at step {step} — go on with the same command and --resume")
    return end_processes(0 if at_end else 75)


if __name__ == "__main__":
    sys.exit(main())

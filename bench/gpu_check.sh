#!/usr/bin/env bash
# gpu_check.sh — what to run once on a new GPU. It takes about 20 minutes and ends in one table.
#
#     bash bench/gpu_check.sh        # on a machine with a CUDA GPU of 80 GB; two of them test more
#     bash bench/gpu_check.sh cpu    # the same parts in tiny sizes: this tests the script, no GPU
#
# The expected values were computed, or taken from the literature, before it ran on a GPU for the
# first time; what an H200 gave is in logs/gpu/table.md. All
# output is kept in the folder OUT (default: gpu_check), and the table in OUT/table.md. A part that
# fails does not end the others. First the commands, then the checks that they use.
set -u
cd "$(dirname "$0")/.." || exit 1
device=${1:-${DEVICE:-cuda}}
OUT=${OUT:-gpu_check}
python=${PYTHON:-python}
mkdir "$OUT" || exit 1  # of an earlier time: delete it, or choose another OUT
export PYTHONPATH=.
sed -n '/^: <<.PYTHON/,/^PYTHON$/{//!p}' bench/gpu_check.sh > "$OUT/check.py"  # the half below

part() {  # part NAME COMMAND…: run it for at most 5 minutes, keep its output and its exit code
  local name=$1 start=$SECONDS
  shift
  timeout -k 40 300 "$@" > "$OUT/$name.txt" 2>&1 < /dev/null
  echo $? > "$OUT/$name.code"
  echo "$name: exit code $(cat "$OUT/$name.code"), $((SECONDS - start)) s"
}
check() { part "$1" "$python" "$OUT/check.py" "$device" "$OUT" "$@"; }
train() { part "$1" "$python" train.py --device "$device" --run "$OUT/run_$1" "${@:2}"; }
bare() { part "$1" "$python" "$OUT/check.py" "$device" "$OUT" bare --device "$device" \
  --run "$OUT/run_$1" "${@:2}"; }  # train.py without checkpoints: those of 1.7b need 90 GB of disk

if [ "$device" = cpu ]; then  # the same commands, as far as a CPU can follow
  small="--preset tiny --max_steps 4 --benchmark_items 8 --eval_tokens 4096"
  large="--preset tiny --max_steps 4 --benchmark_items 8 --eval_tokens 4096"
  steps=20
  other_batch=4
  few="--max_steps 12 --eval_every 0 --benchmark_items 8 --eval_tokens 4096"
  huge="--preset tiny --seq_len 256 --micro_batch 16384 --batch_tokens 4194304 --eval_tokens 256"
  ulimit_kb=6000000  # so that it does run out of memory
else
  small="--preset 124m --data $OUT/p50k --max_steps 8 --batch_tokens 131072 --micro_batch 16
    --eval_tokens 1048576 --compile"
  large="--preset 1.7b --data $OUT/p50k --max_steps 6 --batch_tokens 65536 --eval_tokens 262144
    --compile"
  steps="300 --compile"
  other_batch=16
  few="--max_steps 60 --eval_every 0"
  huge="--preset 124m --data $OUT/p50k --micro_batch 512 --batch_tokens 524288 --eval_tokens 4096
    --no-compile"
  ulimit_kb=unlimited
  part data "$python" prepare_data.py pydocs --vocab_size 50257 --out "$OUT/p50k"
fi

# 1. The machine, the kernels, the network in each precision.
[ "$device" = cpu ] || part nvidia_smi nvidia-smi
check machine
check attention
CUDNN_ATTENTION=1 check attention_cudnn
check network

# 2. The default run; the same first evaluation on the CPU.
TORCH_LOGS=recompiles train default --max_steps $steps
part on_cpu "$python" train.py --device cpu --run "$OUT/run_on_cpu" --stop_at 1

# 3. A stop and a resume, with and without --deterministic; fp16 against bf16.
half=$(($(echo "$few" | cut -d " " -f 2) / 2))
for kind in deterministic no-deterministic; do
  train whole_$kind $few --$kind
  train half_$kind $few --$kind --stop_at $half
  part resumed_$kind "$python" train.py --run "$OUT/run_half_$kind" --resume
done
train fp16 $few --dtype fp16
train bf16 $few --dtype bf16
train half_fp16 $few --dtype fp16 --stop_at $half
part resumed_fp16 "$python" train.py --run "$OUT/run_half_fp16" --resume

# 4. Speed and memory at the sizes that matter.
bare small $small
bare large $large
CUDNN_ATTENTION=1 bare large_cudnn $large
bare large_other_batch $large --micro_batch $other_batch
bare large_not_compiled $large --no-compile
check save

# 5. What a checkpoint says: here and on the CPU.
for where in "$device" cpu; do
  part evaluate_$where "$python" evaluate.py "$OUT/run_default" --device "$where" \
    --eval_tokens 100000
  part greedy_$where "$python" sample.py "$OUT/run_default" --device "$where" --temperature 0 \
    --prompt "The function" --max_new_tokens 100
done

# 6. Out of memory; stop signals; waiting for the GPU; two processes.
(ulimit -v $ulimit_kb; bare out_of_memory $huge)
for signals in 1 2; do
  run="$OUT/run_signals_$signals"
  "$python" train.py --device "$device" --run "$run" --max_steps 100000 --eval_every 0 \
    > "$OUT/signals_$signals.txt" 2>&1 &
  pid=$!
  for _ in $(seq 240); do  # until it trains
    [ "$(grep -cs '"train"' "$run/metrics.jsonl")" -ge 3 ] 2> /dev/null && break
    sleep 0.5
  done
  kill -TERM $pid
  [ $signals = 2 ] && sleep 0.05 && kill -TERM $pid
  wait $pid
  echo $? > "$OUT/signals_$signals.code"
done
for micro_batch in 8 2; do
  bare waits_$micro_batch --max_steps 3 --eval_every 0 --no-compile --micro_batch $micro_batch
done
train one_process $few --dtype fp32 --micro_batch 4
part two_processes torchrun --standalone --nproc_per_node=2 -- train.py --device "$device" \
  --run "$OUT/run_two_processes" $few --dtype fp32 --micro_batch 4

# 7. Beside others.
if [ "$device" != cpu ]; then
  part bench_124m "$python" -m bench --preset 124m --rounds 3
  part bench_1.7b "$python" -m bench --preset 1.7b --rounds 2 --steps 5
fi

"$python" "$OUT/check.py" "$device" "$OUT" table | tee "$OUT/table.md"

: <<'PYTHON'
"""The checks of gpu_check.sh: python check.py DEVICE OUT NAME [FLAGS of train.py]"""
import copy
import json
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
import warnings
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import train
from model import PRESETS, Llama, ModelConfig
from support import durable, fast
from support.devices import choose_device

device, OUT, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
is_gpu = device != "cpu"


def row(title, expected, found, is_right=None):
    """A row of the table. is_right: None where there is nothing to compare with."""
    verdict = {None: "", True: "pass", False: "**FAIL**"}[is_right]
    print(f"| {title} | {expected} | {found} | {verdict} |", flush=True)


def seconds(function):
    """What a call takes, after one that warms up."""
    function()
    if is_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if is_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- Checks that compute something

def machine():
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    compiler = shutil.which("gcc") or shutil.which("cc")
    row("compiler and Python.h, for torch.compile", "both", f"{compiler}, {headers}",
        bool(compiler and headers))
    version = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if is_gpu:
        version += f", cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}"
    row("versions", "", version)


def attention():
    """Which kernel PyTorch chooses, and how far its output and gradients are from fp32's."""
    kernels = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}
    asked = os.environ.get("CUDNN_ATTENTION") == "1"
    best = "cuDNN" if asked else "flash"
    first_word = "cuDNN attention" if asked else "attention"
    B, T = (8, 1024) if is_gpu else (1, 128)
    cases = [("training, bf16", torch.bfloat16, B, T, T, best),
             ("training, fp16", torch.float16, B, T, T, best),
             ("training, fp32", torch.float32, B, T, T, "math"),
             ("one new token, bf16", torch.bfloat16, B, 1, T, best),
             ("16 new tokens, bf16", torch.bfloat16, B, 16, T, "math or cuDNN")]
    for title, dtype, B, T, S, kernel in cases:
        q = torch.randn(B, 32, T, 64, device=device, dtype=dtype, requires_grad=True)
        k = torch.randn(B, 8, S, 64, device=device, dtype=dtype, requires_grad=True)
        v = torch.randn(B, 8, S, 64, device=device, dtype=dtype, requires_grad=True)
        mask = None
        if 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
        options = dict(attn_mask=mask, is_causal=T == S, enable_gqa=True)

        def run(q, k, v):
            y = F.scaled_dot_product_attention(q, k, v, **options)
            return [y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))]
        chosen = kernels.get(torch._fused_sdp_choice(q, k, v, **options), "another")
        milliseconds = 1000 * seconds(lambda: run(q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            exact = run(*[x.detach().float().requires_grad_() for x in (q, k, v)])
        gap = max(distance(a, b) for a, b in zip(run(q, k, v), exact))
        most = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
        row(f"{first_word}, {title}", f"{kernel}, off by ≤ {most:.0e}",
            f"{chosen}, {gap:.1e}, {milliseconds:.2f} ms",
            gap <= most and (chosen in kernel or not is_gpu))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def network():
    """Loss and gradients of one network here and on the CPU; text with and without the cache."""
    torch.manual_seed(0)
    config = ModelConfig(dim=512, n_layers=4, n_heads=8, n_kv_heads=2, intermediate_size=1280,
                         vocab_size=50_257, max_seq_len=256)
    model = Llama(config)
    tokens = torch.randint(0, 50_257, (4, 257 if is_gpu else 33))

    def gradients(place, dtype, compiled):
        moved = copy.deepcopy(model).to(place)
        if compiled:
            fast.use(moved, fast.PARTS)
        with torch.autocast(place, dtype=dtype, enabled=dtype != torch.float32):
            _, loss = moved(tokens[:, :-1].to(place), tokens[:, 1:].to(place))
        loss.backward()
        return loss.item(), [p.grad.cpu() for p in moved.parameters()]
    loss, exact = gradients("cpu", torch.float32, False)
    for dtype, compiled, most in ((torch.float32, False, 1e-4), (torch.bfloat16, False, 3e-2),
                                  (torch.bfloat16, True, 3e-2)):
        found, grads = gradients(device, dtype, compiled)
        gap = max(distance(a, b) for a, b in zip(grads, exact))
        row(f"network, {str(dtype)[6:]}{', compiled' * compiled}: loss, worst gradient",
            f"{loss:.4f} ± 1e-3, off by ≤ {most:.0e}", f"{found:.4f}, {gap:.1e}",
            abs(found - loss) < 1e-3 and gap <= most)
    model.to(device).eval()
    prompt = tokens[:1, :4].to(device)
    ids = torch.cat([prompt[0], *model.generate(prompt, 60, temperature=0)])[None]
    with torch.no_grad():
        again = model(ids)[0][0, 3:-1, :50_257].argmax(-1)
    same = (again == ids[0, 4:]).sum().item()
    row("greedy text with the cache = without", "≥ 58 of 60", f"{same} of 60", same >= 58)


def save():
    """A full state: written, verified, loaded, restored."""
    preset = "1.7b" if is_gpu else "tiny"
    place = torch.device(device)
    start = time.time()
    model = Llama(PRESETS[preset]).to(place)
    made = time.time() - start
    settings = Namespace(weight_decay=0.1, lr=1e-4, beta1=0.9, beta2=0.95)
    optimizer = train.make_optimizer(model, settings, place)
    scaler = torch.amp.GradScaler(device, enabled=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    progress = checkpoint.Progress(step=1, tokens=1, seconds=1.0, updates=1)
    state = checkpoint.capture(model, optimizer, scaler, progress, config={}, env={}, data=[],
                               log_bytes=0)
    start = time.time()
    checkpoint.save(OUT / "saved", state, keep_last=2, keep_every=0)
    saved = time.time() - start
    folder = OUT / "saved/checkpoints/step_00000001"
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    before = [p.detach().clone() for p in model.parameters()]
    start = time.time()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.restore(checkpoint.load(durable.newest(OUT / "saved")), model, optimizer, scaler)
    loaded = time.time() - start
    is_equal = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    shutil.rmtree(OUT / "saved")
    row(f"a state of {preset}: GB/s to save; s to make, to verify and load; equal",
        "≥ 0.5; 40, 60; True", f"{size:.2f} GB, {size / saved:.2f}; {made:.0f}, {loaded:.0f}; "
        f"{is_equal}", is_equal)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_gpu else 0
    row("and its memory in GB: host, GPU", "≤ 30, ≤ 50", f"{memory:.1f}, {peak:.1f}")


def bare():
    """train.py without checkpoints. For the parts waits_…, warn where the program waits."""
    train.checkpoint.save = lambda *args: None
    train.checkpoint.read_back = lambda run, state, model, old, new, scaler: new.load_state_dict(
        old.state_dict())
    if is_gpu and "waits" in " ".join(sys.argv):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
    sys.exit(train.main(sys.argv[4:]))


# ---- The table: what the checks above said, and what the other parts left

def text(part):
    return (OUT / f"{part}.txt").read_text(errors="replace")


def code(part):
    return int((OUT / f"{part}.code").read_text())


def events(part, event="train"):
    lines = (OUT / f"run_{part}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if f'"event": "{event}"' in line]


def bits(part):
    return [(event["loss"], event["grad_norm"]) for event in events(part)]


def largest_gap(a, b):
    pairs = zip(events(a), events(b), strict=True)
    return max(abs(x["loss"] / y["loss"] - 1) for x, y in pairs)


def compare(title, expected, find):
    """A row from a function that returns (found, is_right)."""
    try:
        row(title, expected, *find())
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        row(title, expected, why.splitlines()[0][:120], False)


def first_loss():
    here, there = events("default", "eval")[0], events("on_cpu", "eval")[0]
    return (f"{here['val_loss']:.4f}, {there['val_loss']:.4f}",
            abs(here["val_loss"] - there["val_loss"]) < 2e-3)


def default_run():
    recompiles = text("default").count("Recompiling")
    found = (code("default"), recompiles, len(events("default", "sample")) > 0)
    return found, found == (0, 0, True)


def resumed(kind):
    ends = bits(f"whole_{kind}"), bits(f"half_{kind}")
    gap = largest_gap(f"whole_{kind}", f"half_{kind}")
    must = kind == "deterministic" or not is_gpu
    return f"{ends[0] == ends[1]}, losses {gap:.1e} apart", ends[0] == ends[1] if must else None


def speed(part):
    steps = events(part)[2:]
    best = max(steps, key=lambda step: step["tok_per_s"])
    evaluation = events(part, "eval")[-1]
    found = (f"{best['tok_per_s']:,.0f} tok/s, MFU {best.get('mfu', 0):.1%}, "
             f"{best.get('peak_memory', 0) / 1e9:.1f} GB, "
             f"evaluation {evaluation['seconds']:.1f} s, norm {best['grad_norm']:.2f}")
    is_right = None
    if is_gpu and part == "large":
        is_right = best["mfu"] >= 0.45 and best["peak_memory"] < 60e9
    return found, is_right


def scores():
    here, there = [re.search(r"val loss ([\d.]+)", text(f"evaluate_{place}")).group(1)
                   for place in (device, "cpu")]
    return f"{here}, {there}", abs(float(here) - float(there)) < 2e-4


def greedy():
    return (text(f"greedy_{device}") == text("greedy_cpu"),
            text(f"greedy_{device}") == text("greedy_cpu") and code("greedy_cpu") == 0)


def fp16():
    gap = largest_gap("fp16", "bf16")
    skipped = [event["step"] for event in events("fp16") if "skipped" in event]
    same = largest_gap("fp16", "half_fp16")
    return f"{gap:.1e}, skipped {skipped}, resumed {same:.1e}", gap < 5e-3 and same < 5e-3


def out_of_memory():
    last = text("out_of_memory").strip().splitlines()[-1]
    return f"{code('out_of_memory')}, {last[:60]}", (code("out_of_memory") == 2
                                                    and "out of memory" in last)


def stopped(signals):
    end = events(f"signals_{signals}", "end")[-1]
    found = code(f"signals_{signals}"), end["reason"]
    return found, found == (75, "stopped")


def waits():
    counts = [text(f"waits_{n}").count("synchronizing") for n in (8, 2)]
    return counts, counts[0] == counts[1]


def processes():
    gap = largest_gap("one_process", "two_processes")
    return f"{gap:.1e}", gap < 1e-5


def table():
    print("| check | expected | found | |\n|---|---|---|---|")
    for part in ("machine", "attention", "attention_cudnn", "network"):
        print_rows(part)
    compare("first val loss, here and on the CPU", "within 2e-3", first_loss)
    compare("default run: exit code, recompiles, samples", "0, 0, True", default_run)
    for kind in ("deterministic", "no-deterministic"):
        compare(f"resume, --{kind}: equal to the bit", str(kind == "deterministic" or not is_gpu),
                lambda: resumed(kind))
    compare("fp16: losses from bf16's, skipped updates, resumed", "< 5e-3, few, < 5e-3", fp16)
    for part, expected in (("small", ""), ("large", "MFU ≥ 45 %, < 60 GB"), ("large_cudnn", ""),
                           ("large_other_batch", ""), ("large_not_compiled", "65–68 GB")):
        compare(f"speed, {part.replace('_', ' ')}", expected, lambda: speed(part))
    print_rows("save")
    compare("val loss of evaluate.py, here and on the CPU", "within 2e-4", scores)
    compare("greedy text, here and on the CPU", "the same", greedy)
    compare("out of memory", "2, one line", out_of_memory)
    compare("SIGTERM", "75, stopped", lambda: stopped(1))
    compare("SIGTERM twice, 50 ms apart", "75, stopped", lambda: stopped(2))
    compare("waits with 1 and with 4 micro-batches", "the same number", waits)
    if torch.cuda.device_count() >= 2 or not is_gpu:
        compare("two processes: losses from one's", "< 1e-5", processes)
    for part in ("bench_124m", "bench_1.7b"):
        if (OUT / f"{part}.code").exists():
            row(part, "", f"exit code {code(part)}, see {OUT / part}.txt", code(part) == 0)


def print_rows(part):
    """The rows that a check printed, or how it ended without them."""
    if (OUT / f"{part}.txt").exists():
        rows = [line for line in text(part).splitlines() if line.startswith("| ")]
        print("\n".join(rows))
    compare(f"{part}: exit code", "0", lambda: (code(part), code(part) == 0))


if is_gpu or name != "table":
    choose_device(device)  # the settings of the project, such as which attention
globals()[{"attention_cudnn": "attention"}.get(name, name)]()
PYTHON

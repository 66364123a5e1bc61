#!/usr/bin/env bash
# reproduce.sh — the experiments of docs/dynamics.md as plain commands.
#
#     bash reproduce.sh             # all of them; docs/dynamics.md has the minutes
#     bash reproduce.sh 2           # one of them (5 and 6 need the runs of 1, 3 those of 7)
#                                   # After a kill: the ones that are left, in the order 71248653.
#     bash reproduce.sh figures     # draw all figures again from logs/, without training
#     bash reproduce.sh released    # the paper's released checkpoints: see at the end
#
# Two runs at a time, each with one thread (or one with two): the same machine gives the same
# numbers, whatever else it does. Each experiment says first what it looks at, what we expected
# before it was run, and what would refute that. Runs are in runs/reproduce/, what the figures need
# of their logs in logs/, the numbers in logs/summary.json: it overwrites those of the repository
# (`git checkout logs` brings them back).
# At full scale the same commands of 1, 2 and 7 take other settings, which win over those below:
#
#     SETTINGS="--preset 124m --data data/fineweb-edu --device cuda" JOBS=1 bash reproduce.sh 2
set -euo pipefail
set -m  # each job is a process group, so that a stop reaches all of it
cd "$(dirname "$0")"
SETTINGS=${SETTINGS:-}
JOBS=${JOBS:-2}
python=${PYTHON:-python}
R=runs/reproduce

quiet() {  # run a command; its output is shown only if it fails (75: it stopped as it was told)
  local code=0 log
  log=$(mktemp)
  "$@" > "$log" 2>&1 || code=$?
  [ $code = 0 ] || [ $code = 75 ] || { echo "failed: $*" >&2; tail -n 5 "$log" >&2; }
  rm "$log"
  return $code
}
# What `tiny` was when these experiments were made: 5.2 million parameters, a rate that falls to a
# tenth.
AS_THEN="--dim 256 --intermediate_size 768 --lr 1e-3 --max_steps 3800 --benchmark_from 0"
train() {
  local lr=1e-3 i as_then=
  for ((i = 1; i < $#; i++)); do [ "${!i}" != --lr ] || lr=${*:i+1:1}; done
  [ -n "$SETTINGS" ] || as_then="$AS_THEN --min_lr $(awk "BEGIN { printf \"%.17g\", $lr / 10 }")"
  quiet "$python" train.py --device cpu --threads 1 $as_then "$@" $SETTINGS
}
resumed() { quiet "$python" train.py --device cpu --threads 1 --resume "$@" $SETTINGS; }
evaluate() { quiet "$python" evaluate.py "$@" --dtype bf16; }
job() {  # run a command in the background, as soon as fewer than JOBS others run
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 0.2; done
  "$@" &
  pids+=($!)
}
all_done() {  # wait for all jobs; ends this script if one of them failed
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid"; done
  pids=()
}
pids=()
stop_jobs() {
  local pid
  for pid in $(jobs -p); do kill -- "-$pid" 2> /dev/null || true; done
  wait
}
trap stop_jobs EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
needs() {  # needs 1 seed3: the runs of another experiment
  tail -n 1 "$R/$1/$2/metrics.jsonl" 2> /dev/null | grep -q '"done"' && return
  echo "reproduce.sh: this needs the runs of another experiment — run: bash reproduce.sh $1" >&2
  exit 2
}
begin() { echo "== $1"; rm -rf "$R/${1%%_*}"; mkdir -p "$R/${1%%_*}"; }

# -------------------------------------------------------------------------------------------------
# 1. Trajectory and emergence. The paper: with falling validation loss, text and benchmarks turn
# from incoherent to fluent and context-aware.
# Expected: loss, accuracies and use of context improve together; accuracy by what the context adds
# leaves chance first. Refuted if accuracies stay at chance, or if a metric leaves chance in one
# seed only. That two quantities both change with time says little: so their changes are compared.
experiment_1() {
  begin 1_emergence
  local seed
  for seed in 1 2 3; do
    train --run $R/1/seed$seed --seed $seed --threads 2 --eval_every 150 --sample_every 150 \
      --save_every 0
  done
  "$python" experiments/keep.py logs/1_emergence $R/1/* --every 20
}

# 2. Optimizer state. The paper: restoring it when resuming matters. Expected: without the moments
# the loss jumps after the resume, more with a higher learning rate, because each weight moves by
# about lr at first; and the excess goes away. Refuted if the excess of the reset runs is within the
# spread between seeds. Is it lost for good? The long runs are made in threes: with the state,
# without it, and with it, but for the last bit of one weight. Expected: that bit moves the end by
# less than 0.005 bits/byte, and the reset by more. Refuted if chance alone moves a pair as far as
# the reset.
usual_2="--schedule cosine --warmup_steps 50 --log_update_rms --save_every 0 --eval_every 0
  --benchmark_items 4"
stopped() {  # what it evaluates on its way is not used
  train --run $1 --stop_at "${@:2}" $usual_2 --eval_tokens 1024 || [ $? = 75 ]
}
continued() {
  cp -r $1 $2
  resumed --run $2 --eval_tokens 24576 "${@:3}"
}
edited() {  # edited BASE NAME CHANGE FLAGS: continued after a change of its state; it may diverge
  quiet "$python" experiments/edit_state.py $1 $2 $3
  resumed --run $2 --eval_tokens 24576 "${@:4}" || case $? in 3 | 75) ;; *) return 1 ;; esac
}
two_ways() {
  local name=lr$1_beta$2_seed$3
  stopped $R/2/base_$name 100 --max_steps 200 --lr $1 --beta2 $2 --seed $3
  continued $R/2/base_$name $R/2/full_$name
  continued $R/2/base_$name $R/2/reset_$name --reset_optimizer
}
four_ways() {
  local base=$R/2/base$1
  stopped $base 200 --max_steps 400 --lr 3e-3 --beta2 0.95 --seed $1
  continued $base $R/2/full$1
  continued $base $R/2/reset$1 --reset_optimizer
  continued $base $R/2/paper$1 --reset_optimizer --max_steps 600  # 400 and the 200 that were made
  continued $base $R/2/rewarm$1 --reset_optimizer --rewarm_steps 100
}
three_long() {
  stopped $R/2/long$1 200 --max_steps 2200 --lr 3e-3 --beta2 0.95 --seed $1
  continued $R/2/long$1 $R/2/long_full$1
  continued $R/2/long$1 $R/2/long_reset$1 --reset_optimizer
  edited $R/2/long$1 $R/2/long_bit$1 "--flip_bit"
}
experiment_2() {
  begin 2_optimizer
  local seed lr beta2
  for seed in 1 2 3; do job three_long $seed; done
  for seed in 1 2 3; do
    job four_ways $seed
    for lr in 1e-3 3e-3 6e-3; do
      for beta2 in 0.95 0.99 0.999; do job two_ways $lr $beta2 $seed; done
    done
  done
  all_done
  "$python" experiments/keep.py logs/2_optimizer $R/2/long_* --after 200 --every 4
  "$python" experiments/keep.py logs/2_optimizer $R/2/full_* $R/2/reset_* --after 100
  "$python" experiments/keep.py logs/2_optimizer $R/2/{full,reset,paper,rewarm}? --after 150
}

# 3. Continuity across hardware. The paper: changes of hardware affect stability and throughput.
# Expected: the same tokens whatever computes them, so losses that differ by rounding only, far less
# than between seeds. Refuted if a move shifts the loss by more than a fifth of their spread.
moved() {  # moved NAME SCRIPT FLAGS: from step 150 on
  cp -r $R/3/stopped $R/3/$1
  quiet "${@:2}" --run $R/3/$1 --resume $SETTINGS || [ $? = 75 ]
}
experiment_3() {
  needs 7 seed1
  begin 3_hardware
  train --run $R/3/stopped --seed 1 --max_steps 300 --stop_at 150 --save_every 0 --eval_every 0 \
    --benchmark_items 4 || [ $? = 75 ]
  moved processes_2 "$python" -m torch.distributed.run --standalone --nproc_per_node=2 -- train.py \
    --micro_batch 4
  moved threads_2 "$python" train.py --threads 2
  job moved fp32 "$python" train.py --dtype fp32
  job moved stayed "$python" train.py
  job moved micro_batch_2 "$python" train.py --micro_batch 2
  job moved compiled "$python" train.py --compile
  all_done
  cp -r $R/7/seed1 $R/3/never_moved
  "$python" experiments/keep.py logs/3_hardware \
    $R/3/{never_moved,stayed,processes_2,threads_2,fp32,micro_batch_2,compiled} --after 100
  if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    moved gpu "$python" train.py --device cuda
    moved gpu_and_back "$python" train.py --device cuda --stop_at 225
    quiet "$python" train.py --run $R/3/gpu_and_back --resume --device cpu
    train --run $R/3/gpu_from_the_start --device cuda --seed 1 --max_steps 300 --save_every 0 \
      --eval_every 0 --benchmark_items 4
    "$python" experiments/keep.py logs/3_gpu $R/3/never_moved $R/3/gpu* $R/7/seed2 $R/7/seed3 \
      --after 100
  fi
}

# 4. Kind of text. The paper: high-quality data needs fewer tokens. At 20B tokens this cannot be
# tested here; what can: how much the kind of training text matters for which validation text.
# Expected: each network is best on its own kind, and on neutral text prose is best. Refuted if raw
# text gives the lower loss on the neutral text.
on_one_kind() {  # on_one_kind DATA SEED: trained on it, scored on all
  local run=$R/4/$1_seed$2 other
  train --run $run --data data/$1 --seed $2 --max_steps 600 --save_every 0 --eval_every 0 \
    --benchmark_items 4 --eval_tokens 1024
  evaluate $run --data data/pydocs
  for other in raw shuffled licenses; do evaluate $run --data data/$other --benchmark_items 4; done
}
experiment_4() {
  begin 4_text
  local kind seed
  for kind in raw shuffled; do
    [ -d data/$kind ] || "$python" prepare_data.py pydocs --out data/$kind --quality $kind \
      --val_quality $kind
  done
  [ -d data/licenses ] || "$python" experiments/licenses.py data/licenses
  for seed in 1 2 3; do
    for kind in pydocs raw shuffled; do job on_one_kind $kind $seed; done
  done
  all_done
  "$python" experiments/keep.py logs/4_text $R/4/* --every 20
}

# 5. Instruction tuning. The paper: it makes answers more contextually appropriate.
# Expected: held-out answers become likelier and end; text of the pretraining becomes less likely;
# cloze accuracies stay. Refuted if the loss on held-out answers does not fall.
tuned() {  # tuned NAME SEED FLAGS
  local run=$R/5/$1$2 step
  quiet "$python" sft.py $R/1/seed$2 --run $run --seed $2 --max_steps 128 --save_every 0 \
    --threads 1 "${@:3}"
  for step in 0 16 128; do
    evaluate $run --step $step --eval_tokens 24576 --benchmark_items 4
  done
}
experiment_5() {
  needs 1 seed3
  begin 5_tuning
  local seed
  for seed in 1 2 3; do
    job tuned full $seed
    job tuned lora $seed --lora 8
  done
  all_done
  "$python" experiments/keep.py logs/5_tuning $R/5/* --every 4
}

# 6. A transition that can be seen: random tokens that repeat. After Olsson et al. 2022
# (arXiv 2209.11895): networks of two layers and more form heads that look up what followed the
# present token before (induction heads), suddenly; one layer cannot.
# Expected: the loss on the later copies falls to nearly 0 within some 100 steps in networks of two
# and four layers, and the prefix-matching score of some head rises then. Refuted if it falls in one
# layer too, or slowly, or without such a head.
copying() {  # copying LAYERS SEED
  local run=$R/6/layers$1_seed$2
  train --run $run --data data/repeats --seed $2 --n_layers $1 --dim 128 --intermediate_size 384 \
    --max_steps 1200 --batch_tokens 2048 --micro_batch 16 --lr 2e-3 --schedule linear \
    --eval_every 50 --eval_tokens 16384 --save_every 100 --keep_every 100
  quiet "$python" experiments/repeats.py score $run --ids 64
}
experiment_6() {
  needs 1 seed3
  begin 6_induction
  local layers seed
  [ -d data/repeats ] || "$python" experiments/repeats.py make data/repeats
  for seed in 1 2 3; do
    for layers in 4 2 1; do job copying $layers $seed; done
  done
  for seed in 1 2 3; do  # and the networks that read text
    job quiet "$python" experiments/repeats.py score $R/1/seed$seed
    job quiet "$python" experiments/repeats.py score $R/1/seed$seed --like data/pydocs
  done
  all_done
  "$python" experiments/keep.py logs/6_induction $R/6/* --every 20
  "$python" experiments/keep.py logs/6_induction $R/1/* --only repeats
}

# 7. Seeds: the noise that every difference above is judged against.
experiment_7() {
  begin 7_seeds
  local seed
  for seed in 1 2 3 4 5 6 7 8; do
    job train --run $R/7/seed$seed --seed $seed --max_steps 300 --save_every 0 --eval_every 0 \
      --benchmark_items 4
  done
  all_done
  "$python" experiments/keep.py logs/7_seeds $R/7/* --every 20
}

# 8. Size and tokens (beyond the paper): four widths, four lengths of run. A curve through the 15
# smaller runs predicts the largest before it is made.
# Expected: within 0.05 nats. Refuted if the outcome is further away than that. A second try, after
# that one failed: see experiments/8_size.py.
sized() {  # sized DIM LR STEPS: heads of 64; the narrower, the higher the learning rate
  train --run $R/8/dim$1_steps$3 --seed 1 --dim $1 --n_heads $(($1 / 64)) --n_kv_heads 1 \
    --intermediate_size $((3 * $1)) --lr $2 --max_steps $3 --warmup_steps 50 --save_every 0 \
    --eval_every 0 --benchmark_items 4
}
experiment_8() {
  begin 8_size
  local steps
  for steps in 1200 600 300 150; do
    [ $steps = 1200 ] || job sized 256 1e-3 $steps
    job sized 192 1.33e-3 $steps
    job sized 128 2e-3 $steps
    job sized 64 4e-3 $steps
  done
  all_done
  rm -f logs/8_size/dim256_steps1200.jsonl
  "$python" experiments/keep.py logs/8_size $R/8/* --every 20
  "$python" experiments/8_size.py --predict
  sized 256 1e-3 1200
  "$python" experiments/keep.py logs/8_size $R/8/* --every 20
  "$python" experiments/8_size.py --predict_next
  job sized 256 1e-3 2400
  job sized 320 8e-4 1200
  all_done
  "$python" experiments/keep.py logs/8_size $R/8/* --every 20
}

# The trajectory of the paper's own model, from the ten checkpoints that it released: each one is
# downloaded, imported, scored on FineWeb-Edu and HellaSwag, sampled, and deleted. Needs the
# network, requirements-extras.txt, 15 GB of disk and 9 GB of memory; a GPU makes it hours faster.
# After a stop it goes on with the checkpoint that is not scored yet. The text is the beginning of
# the sample 10BT, in our shards; what the paper's curve was measured on is not known.
#
#     bash reproduce.sh released 2.7k 43.5k               # only these
#     RELEASED=folders/step- bash reproduce.sh released   # from folders/step-2.7k and so on, no hub
#     EVALUATE="--dtype bf16" OURS="runs/1.7b" bash reproduce.sh released
released() {
  local folder name run=runs/released step data=data/fineweb-edu-10M
  local questions=data/hellaswag/hellaswag.jsonl
  [ $# -gt 0 ] || set -- 2.7k 3.3k 5.1k 7.5k 15.7k 20k 23.9k 35k 40.5k 43.5k
  [ -d $data ] || "$python" prepare_data.py fineweb-edu --max_tokens 200000000 --out $data
  [ -f $questions ] || "$python" prepare_data.py hellaswag
  for name; do
    step=$(awk -v thousands="${name%k}" 'BEGIN { printf "%.0f", 1000 * thousands }')
    [ "$(grep -cs "\"sample\", \"step\": $step," $run/evaluations.jsonl)" = 2 ] && continue
    echo "== step $step"
    folder=${RELEASED:-}$name
    if [ -z "${RELEASED:-}" ]; then
      folder=hf/released-$name
      "$python" -c "import sys, huggingface_hub as hub; hub.snapshot_download(*sys.argv[1:2],
        local_dir=sys.argv[2])" "McGill-DMaS/DMaS-LLaMa-Lite-step-$name" "$folder"
    fi
    rm -rf $run/checkpoints
    "$python" convert_hf.py import "$folder" $run --step "$step"
    [ -n "${RELEASED:-}" ] || rm -rf "$folder"
    "$python" evaluate.py $run --step "$step" --data $data --benchmark $questions --style token \
      ${EVALUATE:-}
    "$python" sample.py $run --trajectory --prompt "The capital of France is" \
      --prompt "Photosynthesis is the process by which"
  done
  rm -rf $run/checkpoints
  "$python" plot_dynamics.py $run ${OURS:-logs/default} --batch_tokens 524288 --out figures/released
}

figures() {
  local script
  for script in experiments/[1-9]_*.py; do "$python" $script; done
}

data() { [ -d data/pydocs ] || "$python" prepare_data.py pydocs; }
case ${1:-all} in
  all) data; for n in 7 1 2 4 8 6 5 3; do "experiment_$n"; done; figures ;;
  figures) figures ;;
  released) released "${@:2}" ;;
  [1-8]) data; "experiment_$1"; "$python" experiments/"$1"_*.py ;;
  *) echo "reproduce.sh: $1 is not an experiment — give 1 to 8, figures or released" >&2
     exit 2 ;;
esac

#!/usr/bin/env bash
# reproduce.sh — the experiments of docs/dynamics.md as plain commands.
#
#     bash reproduce.sh             # all of them; after a stop it goes on with the one it was at
#                                   # (`rm -r runs/reproduce` to begin again). docs/dynamics.md
#                                   # has the minutes.
#     bash reproduce.sh 2           # one of them, again (5 and 6 need the runs of 1, 3 those of 7)
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
job() {  # run a command in the background (so that Ctrl-C ends this script, not it alone), as soon
         # as fewer than JOBS others run
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 0.5; done
  [ ! -e $R/failed ] || exit 1
  pids=($(jobs -rp))  # no older ones: in hours their numbers may belong to other processes
  (trap '[ $? = 0 ] || touch $R/failed' EXIT; "$@") &
  pids+=($!)
}
all_done() {  # wait for all jobs; ends this script if one of them failed
  wait
  [ ! -e $R/failed ]
}
pids=()
stop_jobs() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -- "-$pid" 2> /dev/null || true; done
  wait
}
trap stop_jobs EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
needs() {  # needs 1: the runs of another experiment
  [ -f "$R/$1.minutes" ] && return
  echo "reproduce.sh: this needs the runs of another experiment — run: bash reproduce.sh $1" >&2
  exit 2
}
begin() {  # begin N_NAME
  local folder=$R/${1%%_*}
  echo "== $1"
  rm -rf "$folder" "$folder.minutes" $R/failed
  mkdir -p "$folder"
}
only_log() { rm -rf "$1/checkpoints"; }  # of a run that nothing will load again

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
    JOBS=1 job train --run $R/1/seed$seed --seed $seed --threads 2 --eval_every 150 \
      --sample_every 150 --save_every 0
  done
  all_done
  "$python" experiments/keep.py logs/1_emergence $R/1/* --every 20
}

# 2. Optimizer state. The paper: restoring it when resuming matters. Expected: without the moments
# the loss jumps after the resume, more with a higher learning rate, because each weight moves by
# about lr at first; and the excess goes away. Refuted if the excess of the reset runs is within the
# spread between seeds. Is it lost for good? The long runs are made in threes: with the state,
# without it, and with it, but for one bit of one weight. Expected: that bit moves the end by less
# than 0.005 bits/byte, and the reset by more. Refuted if chance alone moves a pair as far as the
# reset. The same at lr 1e-3 was added when 9 had shown that there one bit moves the loss by less
# than 0.0002 nats in 200 steps, but at 3e-3 and 6e-3 by up to 0.015. Expected of it, before it was
# run: the bit moves the end by less than 0.001 bits/byte, and the reset run is behind by more than
# 0.003 in each of three seeds. Refuted if not.
usual_2="--schedule cosine --warmup_steps 50 --log_update_rms --save_every 0 --eval_every 0
  --benchmark_items 4"
stopped() {  # what it evaluates on its way is not used
  train --run $1 --stop_at "${@:2}" $usual_2 --eval_tokens 1024 || [ $? = 75 ]
}
continued() {
  cp -r $1 $2
  resumed --run $2 --eval_tokens 24576 "${@:3}"
  only_log $2
}
edited() {  # edited BASE NAME CHANGE FLAGS: continued after a change of its state; it may diverge
  quiet "$python" experiments/edit_state.py $1 $2 $3
  resumed --run $2 --eval_tokens 24576 "${@:4}" || case $? in 3 | 75) ;; *) return 1 ;; esac
  only_log $2
}
two_ways() {
  local name=lr$1_beta$2_seed$3
  stopped $R/2/base_$name 100 --max_steps 200 --lr $1 --beta2 $2 --seed $3
  continued $R/2/base_$name $R/2/full_$name
  continued $R/2/base_$name $R/2/reset_$name --reset_optimizer
  only_log $R/2/base_$name
}
four_ways() {
  local base=$R/2/base$1
  stopped $base 200 --max_steps 400 --lr 3e-3 --beta2 0.95 --seed $1
  continued $base $R/2/full$1
  continued $base $R/2/reset$1 --reset_optimizer
  continued $base $R/2/paper$1 --reset_optimizer --max_steps 600  # 400 and the 200 that were made
  continued $base $R/2/rewarm$1 --reset_optimizer --rewarm_steps 100
  only_log $base
}
three_long() {  # three_long NAME LR SEED
  stopped $R/2/$1$3 200 --max_steps 2200 --lr $2 --beta2 0.95 --seed $3
  continued $R/2/$1$3 $R/2/$1_full$3
  continued $R/2/$1$3 $R/2/$1_reset$3 --reset_optimizer
  edited $R/2/$1$3 $R/2/$1_bit$3 "--flip_bit"
  only_log $R/2/$1$3
}
experiment_2() {
  begin 2_optimizer
  local seed lr beta2
  for seed in 1 2 3; do
    job three_long long 3e-3 $seed
    job three_long low 1e-3 $seed
  done
  for seed in 1 2 3; do
    job four_ways $seed
    for lr in 1e-3 3e-3 6e-3; do
      for beta2 in 0.95 0.99 0.999; do job two_ways $lr $beta2 $seed; done
    done
  done
  all_done
  "$python" experiments/keep.py logs/2_optimizer $R/2/{long,low}_* --after 200 --every 4
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
half() {
  train --run $R/3/stopped --seed 1 --max_steps 300 --stop_at 150 --save_every 0 --eval_every 0 \
    --benchmark_items 4 || [ $? = 75 ]
}
experiment_3() {
  needs 7
  begin 3_hardware
  job half
  all_done
  JOBS=1 job moved processes_2 "$python" -m torch.distributed.run --standalone --nproc_per_node=2 \
    -- train.py --micro_batch 4
  JOBS=1 job moved threads_2 "$python" train.py --threads 2
  all_done
  job moved fp32 "$python" train.py --dtype fp32
  job moved stayed "$python" train.py
  job moved micro_batch_2 "$python" train.py --micro_batch 2
  job moved compiled "$python" train.py --compile
  all_done
  cp -r $R/7/seed1 $R/3/never_moved
  "$python" experiments/keep.py logs/3_hardware \
    $R/3/{never_moved,stayed,processes_2,threads_2,fp32,micro_batch_2,compiled} --after 100
  if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    JOBS=1 job moved gpu "$python" train.py --device cuda
    JOBS=1 job moved gpu_and_back "$python" train.py --device cuda --stop_at 225
    JOBS=1 job quiet "$python" train.py --run $R/3/gpu_and_back --resume --device cpu
    JOBS=1 job train --run $R/3/gpu_from_the_start --device cuda --seed 1 --max_steps 300 \
      --save_every 0 --eval_every 0 --benchmark_items 4
    all_done
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
  only_log $run
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
  needs 1
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
  needs 1
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
  only_log $R/8/dim$1_steps$3
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
  job sized 256 1e-3 1200
  all_done
  "$python" experiments/keep.py logs/8_size $R/8/* --every 20
  "$python" experiments/8_size.py --predict_next
  job sized 256 1e-3 2400
  job sized 320 8e-4 1200
  all_done
  "$python" experiments/keep.py logs/8_size $R/8/* --every 20
}

# 9. Which part of the state matters (beyond the paper). At step 200 of 400 a part of it is set to
# 0, the rest is kept. If gradients were nothing but noise, AdamW's formula would give the size of
# the first update, as a multiple of that of the untouched run (predicted() in
# experiments/9_state.py):
#
#     set to 0                          beta2 0.95        beta2 0.99
#     first moments                     0.44              0.44
#     second moments                    4.5 and more      9.3 and more
#     both                              1.9               4.1
#     the count of updates              2.2, soon 0.9     1.1, then 0.5 for 50 steps
#     all three, as --reset_optimizer   4.4               4.4
#
# Expected: measured within a factor of 1.5 of this, except second moments alone: there the average
# of many gradients is divided by the size of one, which may be near 0, and of a token that the
# batch does not have by eps. Excess loss of the first 20 steps: for second moments alone above 1
# nat; for first moments alone within the noise of seeds (0.023); for the count alone positive with
# beta2 0.95, and negative with 0.99, where smaller updates act as a decay; for both moments larger
# than for all three with 0.99, because the count that is kept does not correct for them. Nothing
# changed: the same bits. Another order of the data (by its seed, so a tenth of it was read before):
# within the noise of seeds. Another schedule (the released code's, as if 600 steps were wanted):
# above it. Refuted where it comes out otherwise. The long run is stopped at 2,000 of 3,800 steps,
# and 400 more are made: expected to tell the same.
parts() {
  local name=lr$1_beta$2_seed$3
  local base=$R/9/base_$name
  stopped $base 200 --max_steps 400 --lr $1 --beta2 $2 --seed $3
  continued $base $R/9/full_$name
  edited $base $R/9/bit_$name "--flip_bit"
  if [ $1 = 3e-3 ]; then
    edited $base $R/9/nothing_$name ""
    cmp <(digits $R/9/full_$name) <(digits $R/9/nothing_$name)  # ends this script if they differ
    edited $base $R/9/data_$name "--seed $(($3 + 10))"
    edited $base $R/9/schedule_$name "" --max_steps 600 --stop_at 400
  fi
  zeroed $base $name
  [ $name != lr1e-3_beta0.95_seed1 ] || "$python" experiments/9_state.py --absent $base
  only_log $base
}
digits() { grep -oE '"(loss|grad_norm|update_rms|val_loss)": [^,}]*' $1/metrics.jsonl; }
zeroed() {  # zeroed BASE NAME FLAGS
  edited $1 $R/9/first_$2 "--zero exp_avg" "${@:3}"
  edited $1 $R/9/second_$2 "--zero exp_avg_sq" "${@:3}"
  edited $1 $R/9/both_$2 "--zero exp_avg --zero exp_avg_sq" "${@:3}"
  edited $1 $R/9/count_$2 "--zero step" "${@:3}"
  edited $1 $R/9/all_$2 "--zero exp_avg --zero exp_avg_sq --zero step" "${@:3}"
}
long_parts() {
  local base=$R/9/base_long
  train --run $base --seed 1 --stop_at 2000 --log_update_rms --eval_every 0 --save_every 0 \
    --benchmark_items 4 --eval_tokens 1024 || [ $? = 75 ]
  edited $base $R/9/full_long "" --stop_at 2400
  zeroed $base long --stop_at 2400
  only_log $base
}
experiment_9() {
  begin 9_state
  local seed lr beta2
  job long_parts
  for seed in 1 2 3; do
    for lr in 1e-3 3e-3 6e-3; do
      for beta2 in 0.95 0.99; do job parts $lr $beta2 $seed; done
    done
  done
  all_done
  "$python" experiments/keep.py logs/9_state --after 200 \
    $R/9/{full,bit,data,schedule,nothing,first,second,both,count,all}_lr*
  "$python" experiments/keep.py logs/9_state --after 2000 \
    $R/9/{full,first,second,both,count,all}_long
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
  local folder made name run=runs/released step data=data/fineweb-edu-10M
  local questions=data/hellaswag/hellaswag.jsonl
  [ $# -gt 0 ] || set -- 2.7k 3.3k 5.1k 7.5k 15.7k 20k 23.9k 35k 40.5k 43.5k
  [ -d $data ] || "$python" prepare_data.py fineweb-edu --max_tokens 200000000 --out $data
  [ -f $questions ] || "$python" prepare_data.py hellaswag
  for name; do
    step=$(awk -v thousands="${name%k}" 'BEGIN { printf "%.0f", 1000 * thousands }')
    made=$(grep -cs "\"sample\", \"step\": $step," $run/evaluations.jsonl) || true
    [ "${made:-0}" -lt 2 ] || continue
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

one() {  # one N: experiment N, and the minutes it took
  local start=$SECONDS
  experiment_$1
  awk "BEGIN { printf \"%.1f\n\", ($SECONDS - $start) / 60 }" > $R/$1.minutes
  echo "   $(cat $R/$1.minutes) minutes"
}
all() {
  local n
  for n in 7 1 4 8 6 5 3 2 9; do
    if [ -f $R/$n.minutes ]; then
      echo "== $n was made before, in $(cat $R/$n.minutes) minutes (again: bash reproduce.sh $n)"
    else
      one $n
    fi
  done
  figures
}

data() { [ -d data/pydocs ] || "$python" prepare_data.py pydocs; }
case ${1:-all} in
  all) data; all ;;
  figures) figures ;;
  released) released "${@:2}" ;;
  [1-9]) data; one $1; "$python" experiments/"$1"_*.py ;;
  *) echo "reproduce.sh: $1 is not an experiment — give 1 to 9, figures or released" >&2
     exit 2 ;;
esac

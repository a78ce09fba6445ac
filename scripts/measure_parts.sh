#!/usr/bin/env bash
# What is to be measured on a GPU about parts, kernels and recipes on the study base, into result files.
#
#   scripts/measure_parts.sh DATA OUT [STAGE...]
#
# DATA is a folder of shards of at least 47.2M training tokens, OUT receives logs and result files.
# Stages, all of them by default, in this order (minutes on an H100-class card):
#   tests    the GPU tests, on WORKERS processes where pytest-xdist is there, then the failed ones alone (4)
#   kernels  every fused kernel beside eager and compiled torch (3)
#   steps    time and memory of one step of every recipe on the base (5)
#   rates    the base's rates, one changed at a time, at a third of the horizon; three runs share the card, so
#            that their losses hold and their times mean nothing (6)
#   demo     the demo with three seeds against two variants, on the CPU (10, beside the others)
#   study    loss at the study horizon: base, base-adamw and the precisions, one seed (20; two cards halve it)
#   seeds    the base with three seeds: its loss and the noise floor (6)
# and, only when named:
#   tiles    other tiles of the paged latent decoding kernel (1.5)
#   mla      that kernel on FlashMLA's grid (1)
#   attention  every attention backend (1.5)
#   decode   decoding by batch and length, dense and paged (1.5)
#   variants time and memory of one step of attention, latent, pooled, multi-token and expert recipes (5)
#   losses   loss at the study horizon of those, one seed (30)
# COMMIT names the code's commit where this copy is no git checkout. A stage that fails does not stop the rest.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,25p' "$0"; exit 2; }
data=$1 out=$2; shift 2
stages=("${@:-tests kernels steps rates study seeds}")
mkdir -p "$out"
commit=(${COMMIT:+--commit "$COMMIT"})
track=(--set "data.path=$data" --set data.track=stand-in)
variants=(base fused-head fused-rotary gqa mla mla-small pool-mean pool-latent alibi relbias window
  mtp-shared mtp-heads mtp-sequential moe-2 moe-8 moe-8-shared)

study() {  # NAME COMMAND...: a study whose folder and result carry the name
  local name=$1; shift
  python3 -m sabrage study "$@" "${track[@]}" --out "$out/$name" --result "$out/$name.json"
}

rates() {  # one line a run: its name, then what it changes
  local table=optim.1.optimizer muon=optim.0.optimizer
  local short=("data.path=$data" data.track=stand-in plan.steps=120 plan.lr.warmup=7 plan.lr.warmdown=60
    budget.evaluate_every=0 model.head=FusedHead runtime.micro_batch=32)
  mkdir -p "$out/rates"
  while read -r name changes; do
    echo "$out/rates/$name base" "$(printf -- ' --set %s' "${short[@]}" $changes)"
  done <<CHANGES | xargs -P 3 -L 1 bash -c 'python3 -m sabrage train "${@:1}" --out "$0" >"$0.txt" 2>&1'
table-0.0018 $table.lr=0.0018
table-0.0036 $table.lr=0.0036
table-0.0072 $table.lr=0.0072
table-0.0144 $table.lr=0.0144
muon-0.035 $table.lr=0.0072 $muon.lr=0.035
beta-0.8 $table.lr=0.0072 $table.betas=[0.8,0.95]
decay-0 $table.lr=0.0072 $table.weight_decay=0
momentum-0.9 $table.lr=0.0072 $muon.momentum=0.9
warmup-2 $table.lr=0.0072 plan.lr.warmup=2
normuon $table.lr=0.0072 $muon.normuon=true
muon-0.014 $table.lr=0.0072 $muon.lr=0.014
CHANGES
  python3 - "$out"/rates/*/result.json <<'PRINT'
import json, sys
for path in sys.argv[1:]:
    print(path.split("/")[-2], json.load(open(path))["validation_loss"])
PRINT
}

run() {
  case $1 in
    tests)
      # Where pytest-benchmark is installed, its warning about several processes would count as an error.
      python3 -m pytest -m gpu -q -p no:benchmark ${WORKERS:+-n "$WORKERS" --dist worksteal} \
        -o cache_dir="$out/cache" ||
        python3 -m pytest -m gpu -q --last-failed --last-failed-no-failures none -o cache_dir="$out/cache" ;;
    kernels) python3 -m sabrage.bench.kernels --out "$out/kernels.json" "${commit[@]}" ;;
    steps) python3 -m sabrage.bench.step base base-adamw fused-head fused-mlp fused-norm plain-dropout \
      fused-norm-dropout bf16 fp16 fp16-fast fp8-head fp8 tf32 fp32 --out "$out/steps.json" "${commit[@]}" ;;
    rates) rates ;;
    demo) CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=3 python3 -m sabrage study compare demo \
      demo+model.feedforwards.0.activation=relu_squared demo+model.mixers.0.qk_norm=false \
      --seeds 3 --parallel 3 --out "$out/demo" --result "$out/demo.json" ;;
    study) study precisions compare base base-adamw bf16 fp16 fp16-fast fp8-head fp8 tf32 --seeds 1 ;;
    seeds) study base-seeds compare base base+model.head=FusedHead --seeds 3 --target 4.30 ;;
    tiles) python3 -m sabrage bench mla --tune --out "$out/mla-tiles.json" ;;
    mla) python3 -m sabrage bench mla --out "$out/mla.json" ;;
    attention) python3 -m sabrage.bench.attention --out "$out/attention.json" "${commit[@]}" ;;
    decode) python3 -m sabrage bench decode base gqa mla --out "$out/decode.json" ;;
    variants) python3 -m sabrage.bench.step "${variants[@]}" --name variants --out "$out/variants.json" \
      "${commit[@]}" ;;
    losses) study variants compare "${variants[@]}" --seeds 1 ;;
    *) echo "no stage $1" >&2; return 2 ;;
  esac
}

source "$(dirname "$0")/stages.sh"

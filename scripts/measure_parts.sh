#!/usr/bin/env bash
# What is to be measured on a GPU about precisions, optimizers and fused kernels, into result files.
#
#   scripts/measure_parts.sh DATA OUT [STAGE...]
#
# DATA is a folder of shards of at least 47.2M training tokens, OUT receives logs and result files.
# Stages, all of them by default, in this order (minutes on an H100-class card):
#   tests    the GPU tests (4)
#   kernels  every fused kernel beside eager and compiled torch (3)
#   steps    time and memory of one step of every recipe on the base (5)
#   rates    the base's rates: AdamW's for the table, Muon's, and the warm-up, at a third of the horizon (6)
#   study    loss at the study horizon: base, base-adamw and the precisions, one seed (20; two cards halve it)
#   seeds    the base with three seeds: its loss and the noise floor (6)
# COMMIT names the code's commit where this copy is no git checkout. A stage that fails does not stop the rest.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,15p' "$0"; exit 2; }
data=$1 out=$2; shift 2
stages=("${@:-tests kernels steps rates study seeds}")
mkdir -p "$out"
commit=(${COMMIT:+--commit "$COMMIT"})
track=(--set "data.path=$data" --set data.track=stand-in)
failed=0

study() {  # NAME COMMAND...: a study whose folder and result carry the name
  local name=$1; shift
  python3 -m sabrage study "$@" "${track[@]}" --out "$out/$name" --result "$out/$name.json"
}

run() {
  case $1 in
    tests) python3 -m pytest -m gpu -q -p no:cacheprovider ;;
    kernels) python3 -m sabrage.bench.kernels --out "$out/kernels.json" ;;
    steps) python3 -m sabrage.bench.step base base-adamw fused-head fused-mlp fused-norm plain-dropout \
      fused-norm-dropout bf16 fp16 fp16-fast fp8-head fp8 tf32 fp32 --out "$out/steps.json" "${commit[@]}" ;;
    rates) study rates sweep base --seeds 1 --steps 120 --set budget.evaluate_every=0 \
      --over optim.1.optimizer.lr=0.0018,0.005,0.012 --over optim.0.optimizer.lr=0.02,0.035 \
      --over plan.lr.warmup=2,7 ;;
    study) study precisions compare base base-adamw bf16 fp16 fp16-fast fp8-head fp8 tf32 --seeds 1 ;;
    seeds) study base-seeds compare base base+model.head=FusedHead --seeds 3 --target 4.30 ;;
    *) echo "no stage $1" >&2; return 2 ;;
  esac
}

for stage in ${stages[*]}; do
  echo "== $stage"
  run "$stage" 2>&1 | tee "$out/$stage.txt" || { echo "== $stage FAILED"; failed=1; }
done
exit $failed

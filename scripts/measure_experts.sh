#!/usr/bin/env bash
# What is to be measured on a GPU about mixtures of experts, into result files.
#
#   scripts/measure_experts.sh DATA KINDS OUT [STAGE...]
#
# DATA is a folder of shards of at least 47.2M training tokens, KINDS a folder of labelled texts, OUT receives
# logs and result files. Stages, all of them by default, in this order (minutes on an H100-class card):
#   tests    the GPU tests of experts and of the grouped product (2)
#   kernels  the grouped product in Triton beside torch's (1)
#   steps    time and memory of one step beside the base's (3)
#   study    loss at the study horizon beside the base, one seed (12)
#   experts  which expert takes which kind of text, from the study's runs (2)
#   seeds    base and moe-8 with two more seeds (12)
# COMMIT names the code's commit where this copy is no git checkout. RANKS names the file of the GPT-2 ranks
# where it is not beside DATA. A stage that fails does not stop the rest.
set -uo pipefail
[ $# -ge 3 ] || { sed -n '2,17p' "$0"; exit 2; }
data=$1 kinds=$2 out=$3; shift 3
stages=("${@:-tests kernels steps study experts seeds}")
mkdir -p "$out"
commit=(${COMMIT:+--commit "$COMMIT"})
ranks=(${RANKS:+--ranks "$RANKS"})
track=(--set "data.path=$data" --set data.track=stand-in)
names=(moe-2 moe-2-context moe-8 moe-8-shared)

study() {  # NAME RECIPE...: paired runs whose folder and result carry the name
  local name=$1; shift
  python3 -m sabrage study compare "$@" "${track[@]}" --out "$out/$name" --result "$out/$name.json"
}

run() {
  case $1 in
    tests) python3 -m pytest -m gpu -q -p no:cacheprovider tests/feedforward tests/kernels/test_kernels_gate.py \
      -k "card or grouped" ;;
    kernels) python3 -m sabrage.bench.kernels grouped_product --out "$out/grouped_product.json" ;;
    steps) python3 -m sabrage.bench.step base "${names[@]}" --out "$out/steps-experts.json" \
      --name steps-experts "${commit[@]}" ;;
    study) study experts base "${names[@]}" --seeds 1 --keep-checkpoints ;;
    experts)
      local ok=0
      for name in "${names[@]}"; do
        python3 -m sabrage experts "$out/experts/runs/$name--seed-0" --kinds "$kinds" "${ranks[@]}" \
          --out "$out/$name.html" || ok=1
      done
      rm -rf "$out"/experts/runs/*/checkpoints
      return $ok ;;
    seeds) study experts-seeds base moe-8 --seeds 3 ;;
    *) echo "no stage $1" >&2; return 2 ;;
  esac
}

source "$(dirname "$0")/stages.sh"

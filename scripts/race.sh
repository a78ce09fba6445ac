#!/usr/bin/env bash
# The race on a GPU machine of one card or several: runs to their end, the baseline's step, where time goes.
#
#   scripts/race.sh DATA OUT [STAGE...]
#
# DATA is a folder of shards with as many training tokens as the recipes take, OUT receives runs, logs and
# result files. Stages, all of them by default, in this order (minutes on an H100-class card):
#   race       `fast` to its end with every seed, one run a card at a time (4 a seed)
#   small      `fast-24gb` likewise, in 22 GiB of the card's memory (8 a seed)
#   min        `fast-min` likewise (2 a seed)
#   base       `base` likewise (2 a seed)
#   breakdown  where a step's time goes in nocap, base and fast (6)
#   ablate     each trick of `fast` left out alone, over TOKENS tokens, one seed, two runs a card at a time, of
#              which one trains while the other compiles (1.5 a trick and card)
# and, only when named:
#   next       what `fast` may become, as `race` (4 a seed)
#   screen     eleven changes of that at once, in twelve whole passes, in runs of TOKENS tokens, or in the first
#              UNTIL steps of whole passes (480: 15); like ablate two runs a card at a time (50)
#   leave      the five tricks that matter most left out alone over a whole pass, with `fast` and `base` (30)
# After a card's first run a step of the baseline is timed on it, and OUT/race.json is made of all runs so
# far. A run that is done is not repeated; a half one starts anew, since it would time nothing. Recipes run as
# they are. SEEDS names the seeds ("0 1"), CARDS the cards (all of them), TRACK what the losses are filed under
# (stand-in), TARGET the loss that the mean is held against (3.50), TOKENS the tokens of a run of screen (all)
# or ablate (the study horizon), KEEP anything to keep checkpoints, COMMIT the code's commit where this copy is
# no git checkout. A stage that fails does not stop the rest.
#
# To publish: copy OUT/race.json and OUT/breakdown.json to results/, write in docs/results.md
#   <!-- table:race -->, <!-- /table --> and ![the race](../results/race.svg)
# and let `sabrage report --markdown` fill the tables and draw the curves.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,29p' "$0"; exit 2; }
data=$1 out=$2; shift 2
stages=("${@:-race small min base breakdown ablate}")
here=$(cd "$(dirname "$0")/.." && pwd)
commit=(${COMMIT:+--commit "$COMMIT"})
track=(--set "data.path=$data" --set "data.track=${TRACK:-stand-in}")
read -ra seeds <<<"${SEEDS:-0 1}"
visible=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ',')}
read -ra cards <<<"${CARDS:-${visible//,/ }}"
[ ${#cards[@]} -gt 0 ] || cards=(0)
lanes=$((2 * ${#cards[@]}))
mkdir -p "$out/runs"
label='' sets=()
# What `fast` may become, and what is screened on it. Why these: LOG.md, what was screened over 480 steps.
near=(model.mixers.{0,1,2}.window)
gaps='[3,2],[3,1],[4,2,1],[4,1],[4,3,1],[4,3,2]'
kinds='[-2,1],[2,-1],[-3,-2,-1],[-3,-2,1],[-3,2,1],[-5,-4,-3,-2,-1]'
next=(
  'model.wiring.inner.skips=[{"part":"SkipScales"}]'
  model.head.columns=16384
  model.embedding.rows=131072
  'blend.candidates={"part":"Candidates","hidden":128,"layers":2}'
  "blend.candidates.gaps=[$gaps,$kinds]"
  blend.batch=8192
)
changes=(
  "$(IFS=+; echo "${near[*]/%/=256}")"
  model.mixers.4.window=1024
  model.head.columns=12288
  model.embedding.rows=65536
  model.layers=12
  model.feedforwards.0.expansion=3
  model.feedforwards.0.fp8_forward=true
  optim.0.optimizer.cautious=false
  optim.0.optimizer.weight_decay=0.14
  'model.wiring.inner.skips=[{"part":"SkipScales","period":3}]'
  plan.tokens_per_step.starts=[0,871]
)
# Tricks of `fast` that are numbers, turned off: sampled columns, and what looks at candidates.
numbers=(
  'model.head.columns=0+model.head.proposal="uniform"'
  blend.candidates=null
)

train() {  # CARD RECIPE SEED [GIB]: one run to its end; a step of the baseline after the card's first
  local folder="$out/runs/${label:-$2}--seed-$3" program=(-m sabrage)
  [ -z "${4:-}" ] || program=(-m sabrage.cli.capped "$4")
  if ! grep -qs '"ending": "\(done\|target\)"' "$folder/result.json"; then
    rm -rf "$folder"
    CUDA_VISIBLE_DEVICES=$1 python3 "${program[@]}" train "$2" --seed "$3" "${track[@]}" \
      "${sets[@]}" --out "$folder" >"$folder.txt" 2>&1 || { tail -n 5 "$folder.txt"; return 1; }
  fi
  [ -n "${KEEP:-}" ] || rm -rf "$folder/checkpoints"
  local card="$out/runs/card-$1.nocap.json"
  grep -qs '"step_ms": [0-9]' "$card" || CUDA_VISIBLE_DEVICES=$1 python3 -m sabrage.bench.step nocap \
    --out "$card" "${commit[@]}" >"$out/runs/card-$1.nocap.txt" 2>&1
  cp "$card" "$folder.nocap.json"
}

race() {  # RECIPE [GIB]: every seed, as many at a time as there are cards, and the table of all runs
  local lane pids=() ok=0
  for lane in "${!cards[@]}"; do
    (
      status=0
      for ((turn = lane; turn < ${#seeds[@]}; turn += ${#cards[@]})); do
        train "${cards[lane]}" "$1" "${seeds[turn]}" "${2:-}" || status=1
      done
      exit $status
    ) &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || ok=1; done
  python3 -m sabrage.study.race_table "$out/runs" --out "$out/race.json" --target "${TARGET:-3.50}" \
    --peer "$here/results/peer-modded-nanogpt.json" "${commit[@]}" || ok=1
  return $ok
}

become() {  # what `fast` may become, in folders of its own
  local label=next sets=("${next[@]/#/--set=}")
  race fast
}

study() {  # KIND WORDS...: on the cards; its folder and result file are named by the stage
  CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${cards[*]}") python3 -m sabrage study "$@" "${track[@]}" \
    --out "$out/$stage" --result "$out/$stage.json"
}

screen() {  # all changes at once, twelve runs over the cards
  study screen fast "${next[@]/#/--set=}" "${changes[@]/#/--change=}" ${TOKENS:+--tokens "$TOKENS"} \
    ${UNTIL:+--set "budget.until=$UNTIL"} --parallel "$lanes"
}

# What `fast` and `base` differ by, whole parts first, which are left out piece by piece.
parts=(data model model.{embedding,mixers,wiring,head} optim plan plan.lr blend)
# Not worth a run.
small=(MultiHead.rotary_backend TokenTable.normalise FusedMlp.zero_init Muon.orthogonalise)
# Worth no whole pass.
rest=(model.feedforwards.0 {plan,Plan}.momentum ModelSpec.narrow_stream BigramHash MultiHead.window SkipScales
  LayerSkips FusedMlp.fp8_gradients FusedHead.{zero_init,softcap,fp8,proposal} Muon.{cautious,normuon})

without() {  # [WORDS...]: `fast` without each of its tricks but those that are kept
  study ablate fast --base base --alone --seeds 1 "${parts[@]/#/--keep=}" "${small[@]/#/--keep=}" "$@" \
    --set budget.evaluate_every=726 --parallel "$lanes"
}

ablate() { without --tokens "${TOKENS:-47185920}" "${numbers[@]/#/--also=}"; }

leave() { without "${rest[@]/#/--keep=}" --also=blend.candidates=null; }

run() {
  case $1 in
    race) race fast ;;
    next) become ;;
    small) race fast-24gb 22 ;;
    min) race fast-min ;;
    base) race base ;;
    breakdown) CUDA_VISIBLE_DEVICES=${cards[0]} python3 -m sabrage.bench.breakdown nocap base fast \
      --out "$out/breakdown.json" "${commit[@]}" ;;
    screen) screen ;;
    ablate) ablate ;;
    leave) leave ;;
    *) echo "no stage $1" >&2; return 2 ;;
  esac
}

source "$(dirname "$0")/stages.sh"

#!/usr/bin/env bash
# What is measured on one GPU of Qwen2.5-Coder: searches, forecasts, answers, whole requests and repairs, stage by stage.
#   qwen.sh MODEL_1.5B MODEL_0.5B OUT [STAGE …]        [default: all of them, in this order]
# cold      a study of 1.5B from nothing known, ten minutes at most (before it, echo 3 >/proc/sys/vm/drop_caches)
# plans     the speed table's forecast against measured ratios of twelve plans
# answers   accuracy, lengths and perplexity of five models
# heavy     seconds of stream and of distill
# batch     256 requests at once: A/A, four models, and `vllm bench throughput`'s own code
# confirmed the confirmed Score of the base model and of 26 layers, again and again
# tau       forty plans, screened and timed, against their forecast
# size      the smallest model of 0.5B that loses 3% at most
set -uo pipefail
large=$(realpath "$1") small=$(realpath "$2") out=$(realpath "$3")
shift 3
here=$(realpath "$(dirname "$0")/../..")
studies=$here/benchmarks/gpu/studies
export PYTHONPATH=$here:${PYTHONPATH:-} PYTHONUNBUFFERED=1 OPTUNA_SEARCH_CACHE=${OPTUNA_SEARCH_CACHE:-/tmp/optuna-search-cache}
work=${WORK:-/tmp/qwen}
mkdir -p "$work" "$out" && cd "$work" || exit 1
study=(--study qwen2.5-coder-1.5b --config-dir "$studies")
words=("model.source=$large")
search() { python3 -m search.cli "$@"; }
stamped() { python3 -u -c 'import sys, time
began = time.time()
for line in sys.stdin:
    print(f"{time.time() - began:7.1f} {line.rstrip()}", flush=True)'; }
quiet() { grep --line-buffered -v -E 'shard |turn |block |layer |answer '; }

cold() {
  [ -e outputs ] && { echo "$work/outputs is there; name another directory with WORK"; return 1; }
  search run "${study[@]}" "${words[@]}" --time 10m confirm.top=0 2> >(stamped >"$out/cold.err") >"$out/cold.txt"
  search status "${study[@]}" "${words[@]}" 2>&1
  search forecast "${study[@]}" "${words[@]}" 2>/dev/null
  cp outputs/studies.db* "$out/" # with the write-ahead log, which holds the last trials
}
plans() { python3 "$here/benchmarks/gpu/forecast_speed.py" "$out/plans" "${study[@]}" --words "${words[@]}" 2>&1 | quiet; }
answers() {
  python3 "$here/benchmarks/gpu/answers.py" "$large" --work "$work/answers" --json "$out/answers.json" 2> >(stamped >"$out/answers.err")
}
heavy() { # 73,728 tokens, and as many as distill takes
  for repair in stream distill; do
    search compress reduce-ffn "${study[@]}" "${words[@]}" --target-dim 7936 --importance energy --repair $repair --save-path "$work/$repair" \
      outputs="$work/heavy" study_name=heavy text.calibration=embedded text.moments_windows=24 2>&1 | stamped >"$out/$repair.err"
    quiet <"$out/$repair.err" | tail -8
  done
}
batch() {
  python3 "$here/benchmarks/gpu/batch.py" --study qwen2.5-coder-1.5b-batch --config-dir "$studies" --repeats "${REPEATS:-10}" --reference \
    --json "$out/batch.json" "${words[@]}" outputs="$work/batch" 2> >(stamped >"$out/batch.err")
}
confirmed() {
  python3 "$here/benchmarks/gpu/confirm_aa.py" "${study[@]}" --layers 26 --repeats "${REPEATS:-10}" --time "${SECONDS_OF_REPEATS:-900}" \
    --json "$out/confirmed.json" "${words[@]}" outputs="$work/confirmed" text.calibration=embedded 2> >(stamped >"$out/confirmed.err")
}
tau() {
  python3 "$here/benchmarks/search/collect.py" "$out/tau.json" "${study[@]}" --drawn 40 --processes 2 "${words[@]}" \
    text.calibration=embedded text.moments_windows=24 2>&1 | quiet
}
size() {
  local goal=(--study qwen2.5-coder-0.5b-size --config-dir "$studies" "model.source=$small" outputs="$work/size")
  search run "${goal[@]}" "storage=sqlite:///$work/size.db" 2> >(stamped >"$out/size.err")
}

for stage in ${*:-cold plans answers heavy batch confirmed tau size}; do
  echo "== $stage $(date +%T)"
  time "$stage"
done

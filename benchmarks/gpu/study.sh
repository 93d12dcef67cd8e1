#!/usr/bin/env bash
# On a small real EXAONE-4.0 model with the vLLM backend: a study over all of it; its best trials distilled; the recipes
# that teams try by hand, on the same baseline; the best of the study measured anew in turn with the best of them, and
# served by a fresh vLLM with the server's defaults.
#   study.sh MODEL TEXT_DIRECTORY OUT [TRIALS [SECONDS]]      STAGES="study distilled hand anew served", or some of them
set -uo pipefail
model=$(realpath "$1") text=$(realpath "$2") out=$(realpath "$3") trials=${4:-24} seconds=${5:-1200}
stages=${STAGES:-study distilled hand anew served}
export PYTHONPATH=$PWD:${PYTHONPATH:-} OPTUNA_SEARCH_CACHE=/tmp/optuna-search-cache PYTHONUNBUFFERED=1
[[ $stages == *study* ]] && rm -rf /tmp/mini
mkdir -p /tmp/mini/studies/experiments; cd /tmp/mini
study=(--study exaone4-1.2b "storage=sqlite:////tmp/mini/mini.db" "model.source=$model" tracking.mlflow=false
  "text.calibration=[$text/calibration_en.txt]" "text.search=[$text/search_en.txt]" text.report=null text.window=256
  text.shards=16 text.windows_per_shard=2 text.moments_windows=128 export.for_transformers=null
  "evaluation.workload.batch_sizes=[${BATCH_SIZES:-1}]")
space=("space.num_hidden_layers={low: 8, high: 12}" "space.num_key_value_heads={low: 1, high: 2}"
  "space.num_attention_heads={low: 4, high: 8}" "space.hidden_size={low: 448, high: 512, step: 64}"
  "space.intermediate_size={low: 768, high: 1024, step: 64}" "space.drop_from=[kl,importance]"
  "space.importance=[energy]" "space.rotation=[pca,none]" "space.repair=[stream,none]" "space.quantizer=[gptq,nearest]"
  "space.group_size=[64]" "space.kv_cache=[auto,fp8]")
search() { python3 -m search.cli "$@"; }
stage() { [[ $stages == *$1* ]] && echo "== $1 $(date +%T)"; }

if stage study; then
  time timeout --signal INT "$seconds" python3 -m search.cli run "${study[@]}" --study-name mini "${space[@]}" --trials "$trials" \
    2>"$out/run.err" >"$out/status.txt" || tail -3 "$out/run.err"
  grep -v '^…' "$out/run.err" | cut -c1-230
  python3 - <<'PY'
import optuna
study = optuna.load_study(storage="sqlite:////tmp/mini/mini.db", study_name="mini")
print("baseline", study.user_attrs["baseline"]["seconds"])
for trial in study.trials:
    if trial.state.name == "COMPLETE":
        print(trial.number, round(trial.value, 4), trial.user_attrs.get("seconds"))
PY
fi
if stage distilled; then # the study has its trials, so that this distills
  time search run "${study[@]}" --study-name mini "${space[@]}" --trials 1 --distill-top 2 --tokens 1000000 \
    2>"$out/distilled.err" >"$out/status.txt" || tail -20 "$out/distilled.err"
  grep -v '^…' "$out/distilled.err" | cut -c1-230
  cat "$out/status.txt"
fi
cp /tmp/mini/mini.db "$out/"

recipes=()
recipe() { # the manual's, of 30 layers and 32 heads, as near as 12 and 8 come
  printf '# @package _global_\nexperiment_name: %s\ncompression: {%s}\n' "$1" "$2" >"studies/experiments/01-01_by_hand_$1.yaml"
  recipes+=("by_hand_$1")
}
recipe fp16 "dtype: float16"
recipe w8a8 "scheme: W8A8"
recipe fp8 "scheme: FP8_DYNAMIC"
recipe w4a16 "scheme: W4A16"
recipe heads "keep_heads: 6"
recipe influence "keep_layers: 11"
recipe top "keep_layers: 11, drop_from: top"
if stage hand; then
  time search compress "${study[@]}" -m "experiments=$(IFS=,; echo "${recipes[*]}")" 2>"$out/hand.err" >"$out/hand.txt" || tail -5 "$out/hand.err"
  cat "$out/hand.txt"
fi

if stage anew; then # what was picked as the best of many was lucky too
  [ -d submit/best ] || search export "${study[@]}" --study-name mini "${space[@]}" --to /tmp/mini/submit/best 2>&1 | grep -v '^…'
  for _ in 1 2 3; do
    for name in ${ANEW:-best model_fp16 model_w8a8 model_fp8}; do
      echo "$name $(search evaluate "${study[@]}" --model "submit/$name" --json 2>>"$out/anew.err" |
        python3 -c 'import json, sys; f = json.load(sys.stdin); print(*(round(f[k], 4) for k in ("score", "perf_norm", "speed_norm")))')"
    done
  done
fi

if stage served; then
  python3 -m vllm.entrypoints.openai.api_server --model /tmp/mini/submit/best --served-model-name best --host 127.0.0.1 --port 8123 \
    --gpu-memory-utilization 0.5 >"$out/serve.log" 2>&1 &
  server=$!
  for _ in $(seq 120); do
    curl -sf http://127.0.0.1:8123/v1/models >/dev/null && break
    kill -0 $server 2>/dev/null || break
    sleep 1
  done
  curl -s http://127.0.0.1:8123/v1/completions -H 'Content-Type: application/json' \
    -d '{"model":"best","prompt":"The purpose of this package is","max_tokens":24,"temperature":0}' || tail -5 "$out/serve.log"
  echo
  kill $server
fi

#!/usr/bin/env bash
# A study with the vLLM backend on a small real EXAONE-4.0 model: every precision, exported, the export served by a fresh
# vLLM with the server's defaults.   study.sh MODEL TEXT_DIRECTORY OUT [TRIALS]
set -uo pipefail
model=$1 text=$2 out=$3 trials=${4:-16}
export PYTHONPATH=.:${PYTHONPATH:-} OPTUNA_SEARCH_CACHE=/tmp/optuna-search-cache PYTHONUNBUFFERED=1
study=(--study exaone4-1.2b --study-name mini --storage "sqlite:////tmp/mini.db" "outputs=/tmp/mini" "model.source=$model"
  "text.calibration=[$text/calibration_en.txt]" "text.search=[$text/search_en.txt]" text.window=256 text.shards=16
  text.windows_per_shard=2 "space.num_hidden_layers={low: 9, high: 12}" "space.num_key_value_heads={low: 1, high: 2}"
  space.num_attention_heads=null "space.hidden_size={low: 448, high: 512, step: 64}"
  "space.intermediate_size={low: 768, high: 1024, step: 64}")
time python3 -m search.cli run "${study[@]}" --trials "$trials" 2>"$out/run.err" >"$out/status.txt" || tail -20 "$out/run.err"
grep -v '^…' "$out/run.err" | cut -c1-190
cat "$out/status.txt"
time python3 -m search.cli export "${study[@]}" --to /tmp/submit/model 2>&1 | grep -v '^…'
ls /tmp/submit/model
python3 - "$out" <<'PY'
import json, pathlib, optuna
study = optuna.load_study(storage="sqlite:////tmp/mini.db", study_name="mini")
print("baseline", study.user_attrs["baseline"]["seconds"])
for trial in study.trials:
    print(trial.number, trial.state.name, trial.user_attrs.get("seconds"))
for path in sorted(pathlib.Path("/tmp/mini/measurements").glob("*.json")):
    found = json.loads(path.read_text())
    print(found["dtype"], round(found["perplexity"], 3), round(found["time_ratio"], 4), round(found["time_ratio_se"], 4), found["notes"], found["seconds"])
PY
cp /tmp/mini.db "$out/"; cp /tmp/mini/logs/*.log "$out/"
echo "== the export, served by a fresh vLLM with its defaults"
python3 -m vllm.entrypoints.openai.api_server --model /tmp/submit/model --served-model-name best --host 127.0.0.1 --port 8123 \
  --gpu-memory-utilization 0.5 >"$out/serve.log" 2>&1 &
server=$!
for _ in $(seq 150); do
  curl -sf http://127.0.0.1:8123/v1/models >/dev/null && break
  kill -0 $server 2>/dev/null || break
  sleep 1
done
curl -s http://127.0.0.1:8123/v1/completions -H 'Content-Type: application/json' \
  -d '{"model":"best","prompt":"The purpose of this package is","max_tokens":24,"temperature":0}' || tail -5 "$out/serve.log"
echo
kill $server

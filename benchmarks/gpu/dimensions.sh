#!/usr/bin/env bash
# EXAONE-4.0-1.2B's exact dimensions with random weights, on one GPU: the A/A check, then the baseline and one trial end
# to end with the seconds of each stage.   dimensions.sh TOKENIZER_DIRECTORY OUT
set -uo pipefail
tokenizer=$1 out=$2 model=/tmp/exaone4-1.2b-random
export PYTHONPATH=.:${PYTHONPATH:-} OPTUNA_SEARCH_CACHE=/tmp/optuna-search-cache PYTHONUNBUFFERED=1
python3 benchmarks/gpu/random_model.py "$model" --tokenizer "$tokenizer" 2>&1 | tail -1
echo "== baseline and one trial"
run=(python3 -m search.cli run --study exaone4-1.2b "model.source=$model" --storage "sqlite:////tmp/dims.db" "outputs=$out/dims" tracking.mlflow=false
  evaluation.backend=vllm text.shards=8 text.calibration_windows=16 "space.precision=[W8A8]"
  "space.num_hidden_layers={low: 28, high: 29}" limits.keep_checkpoints=1)
time "${run[@]}" --trials 1 --study-name dimensions --json >"$out/dims.json" 2>"$out/dims.err" || tail -5 "$out/dims.err"
tail -3 "$out/dims.err"
python3 - "$out" <<'PY'
import json, pathlib, sys
import optuna
study = optuna.load_study(storage="sqlite:////tmp/dims.db", study_name="dimensions")
print("baseline", study.user_attrs["baseline"]["seconds"], study.user_attrs["baseline"]["notes"])
for trial in study.trials:
    print(trial.number, trial.state.name, trial.value, trial.user_attrs.get("plan"), trial.user_attrs.get("seconds"), trial.user_attrs.get("reason"))
for path in pathlib.Path(sys.argv[1], "dims/measurements").glob("*.json"):
    found = json.loads(path.read_text())
    print({k: found[k] for k in ("seconds", "time_per_token_ms", "base_time_per_token_ms", "time_ratio", "time_ratio_se", "notes", "perplexity")})
PY
for sizes in "1" "1 32"; do
  echo "== A/A, batch sizes $sizes"
  python3 benchmarks/gpu/aa.py "$model" --backend vllm --repeats 10 --batch-sizes $sizes --prompt-tokens 128 \
    --decode-steps 24 --turns 40 --logs "$out/aa-logs" --json "$out/aa-${sizes// /-}.json" 2>"$out/aa.err" || tail -5 "$out/aa.err"
done
rm -rf "$out/dims"
xz -f "$out"/aa-*.json

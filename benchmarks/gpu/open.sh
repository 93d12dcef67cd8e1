#!/usr/bin/env bash
# What no machine has shown yet (benchmarks/README.md), on one GPU: what needs no clock beside each other, then what is
# timed, alone. Each job has its log in OUT, and prints its last lines. LEFT_OUT holds JSONL files of texts that nothing is
# fitted on.
#   open.sh SMOLLM2 QWEN_0.5B QWEN_1.5B LEFT_OUT OUT [scales half_scales heads size exaone shapes times]
set -uo pipefail
smol=$(realpath "$1") half=$(realpath "$2") whole=$(realpath "$3") left_out=$(realpath "$4") out=$(realpath "$5")
shift 5
wanted=" ${*:-scales half_scales heads size exaone shapes times} "
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
mkdir -p "$out"

carry() { # W4A16 by GPTQ, and with scales that learn, on text that nothing was fitted to
  python3 benchmarks/carry.py --model "$2" --fit embedded+self --windows 32 --cuts W4A16 --how none distill \
    --other "$left_out"/*.jsonl --work "/tmp/open/$1" --json "$out/$1.json"
}
scales() { carry scales "$smol"; }
half_scales() { carry half_scales "$half"; }
heads() { # the README's row
  python3 benchmarks/repair.py --model "$smol" --windows 64 --tokens 16384 --only "2 of 3 key/value groups" \
    --how "kl, stream" --work /tmp/open/heads --json "$out/heads.json"
}
size() {
  python3 -m search.cli run --study qwen2.5-coder-0.5b-size --config-dir benchmarks/gpu/studies "model.source=$half" \
    outputs=/tmp/open/size storage=sqlite:////tmp/open/size.db evaluation.gpu_memory_utilization=0.1 confirm.top=1 --time 240s
}
exaone() {
  python3 benchmarks/gpu/forecast_speed.py "$out" --tokenizer "$smol" --models exaone4-1.2b
}
shapes() { # the second table of the replay
  cp benchmarks/search/tables/replay-qwen2.5-coder-0.5b.json "$out/shapes.json"
  python3 benchmarks/search/collect.py "$out/shapes.json" --study replay-qwen2.5-coder-0.5b --only times \
    --config-dir benchmarks/search/studies "model.source=$half" outputs=/tmp/open/shapes
}
times() { # of forty plans that were screened
  cp benchmarks/search/tables/qwen2.5-coder-1.5b-stream.json "$out/times.json"
  python3 benchmarks/search/collect.py "$out/times.json" --study qwen2.5-coder-1.5b --drawn 40 --only times \
    --config-dir benchmarks/gpu/studies "model.source=$whole" outputs=/tmp/open/times text.calibration=embedded text.moments_windows=16
}
job() {
  local began=$SECONDS
  "$1" >"$out/$1.log" 2>&1
  echo "== $1: exit $?, $((SECONDS - began)) s"
  grep -v '^…' "$out/$1.log" | tail -12 | cut -c1-200
}
mkdir -p /tmp/open
for name in scales half_scales heads size; do [[ $wanted == *" $name "* ]] && job $name & done
wait
for name in exaone shapes times; do [[ $wanted == *" $name "* ]] && job $name; done

#!/usr/bin/env bash
# Calibration, choices, repair, GPTQ, building and distillation at EXAONE-4.0-1.2B's exact dimensions, on one GPU.
#   compress.sh TOKENIZER_DIRECTORY OUT [option of distill.py …]
set -uo pipefail
tokenizer=$1 out=$2 model=/tmp/exaone4-1.2b-random
shift 2
export PYTHONPATH=.:${PYTHONPATH:-} PYTHONUNBUFFERED=1
[ -d "$model" ] || python3 benchmarks/gpu/random_model.py "$model" --tokenizer "$tokenizer" 2>&1 | tail -1
echo "== compression"
time python3 benchmarks/gpu/compress.py "$model" --work /tmp/compress --json "$out/compress.json" 2>"$out/compress.err" || tail -5 "$out/compress.err"
rm -rf /tmp/compress
echo "== distillation"
time python3 benchmarks/distill.py "$model" --random-1.2b --layers 28 --tokens 1310720 --work /tmp/distill "$@" 2>"$out/distill.err" || tail -5 "$out/distill.err"
rm -rf /tmp/distill

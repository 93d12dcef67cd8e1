#!/bin/sh
# Packs submit/model into submit.zip, after the submission list has been checked:
#     ./create_submit.sh [MODEL [OUT]]      for instance ./create_submit.sh submit/model_drop28
set -eu

case ${1-} in
    -h | --help)
        echo "usage: $0 [MODEL [OUT]]   (submit/model, submit.zip)"
        exit 0
        ;;
esac
if [ $# -gt 2 ]; then
    echo "usage: $0 [MODEL [OUT]]   (submit/model, submit.zip)" >&2
    exit 2
fi

command=$(dirname "$0")/.venv/bin/optuna-search
if [ ! -x "$command" ]; then
    command=$(command -v optuna-search) || {
        echo "create_submit.sh: there is no optuna-search, neither in .venv nor on PATH; run \`make setup\` first" >&2
        exit 1
    }
fi
exec "$command" package --model "${1:-submit/model}" --out "${2:-submit.zip}"

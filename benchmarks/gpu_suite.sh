#!/usr/bin/env bash
# Correctness, both benchmarks and a short training, on one GPU within eight minutes.
#
#     benchmarks/gpu_suite.sh [--out FOLDER]
#
# Nothing is downloaded or installed: python3 needs PyTorch, Triton, NumPy, safetensors and pytest; a part that
# needs more says so and is left out. A part that fails or runs too long does not stop the next one. Results go to
# benchmarks/results/<device>/ (or FOLDER), logs to runs/gpu_suite/ (or LOGS). The exit code is 0 only if correctness was
# proved and no part failed.
#
# Variables: PYTHON (python3), DEVICE (cuda), RESULTS (as --out), SECONDS_IN_ALL (480; on a CPU 1800).
# DEVICE=cpu goes through the same parts with tiny sizes, to try the suite itself; no part has a limit of its own then.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-$([ "$DEVICE" = cpu ] && echo 1800 || echo 480)}
RESULTS=${RESULTS:-}
while [ $# -gt 0 ]; do
    case $1 in
        --out) RESULTS=${2:?--out needs a folder}; shift 2 ;;
        *) echo "usage: benchmarks/gpu_suite.sh [--out FOLDER]" >&2; exit 2 ;;
    esac
done
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 GOMP_SPINCOUNT=20000

if [ "$DEVICE" = cpu ]; then
    DTYPE=float32 TRAINING_STEPS=30 QUICK=--quick
    TESTS=(tests/attention/test_attention_kernels.py -k "value_alone or large_logits or views")
else
    DTYPE=bfloat16 TRAINING_STEPS=300 QUICK=
    TESTS=(tests/attention/test_attention_kernels.py) # on the GPU where there is one
    # Most of their time is compilation, by one core a process.
    "$PYTHON" -c 'import xdist' 2> /dev/null && TESTS+=(-n 8)
    if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
        echo "gpu_suite: PyTorch sees no GPU here (DEVICE=cpu tries the suite itself)" >&2
        exit 2
    fi
fi
if [ -z "$RESULTS" ]; then
    RESULTS=$(PYTHONPATH="benchmarks:$PYTHONPATH" "$PYTHON" -c "
import common, torch
print(common.results_folder(torch.device('$DEVICE')))") || exit 1
fi
mkdir -p "$RESULTS"
LOGS=${LOGS:-runs/gpu_suite}
rm -rf "$LOGS"
mkdir -p "$LOGS"
touch "$LOGS/started"

declare -a TABLE
FAILED=0

# part NAME LIMIT MODULES COMMAND…: run it for at most LIMIT seconds of what is left, if the modules are there.
part() {
    local name=$1 limit=$2 modules=$3 start=$SECONDS left=$((SECONDS_IN_ALL - SECONDS)) missing status verdict
    shift 3
    missing=$("$PYTHON" -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' $modules)
    if [ -n "$missing" ]; then
        echo "[$SECONDS s] $name: left out, not installed: $missing"
        TABLE+=("$name|left out|–|not installed: $missing")
        return 1
    fi
    if [ "$left" -lt 10 ]; then
        echo "[$SECONDS s] $name: left out, no time left"
        TABLE+=("$name|left out|–|no time left")
        FAILED=1
        return 1
    fi
    if [ "$DEVICE" = cpu ] || [ "$left" -lt "$limit" ]; then limit=$left; fi
    echo "[$SECONDS s] $name: at most $limit s"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$LOGS/${name// /_}.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="STOPPED after $limit s" ;;
        *) verdict="FAILED ($status)" ;;
    esac
    [ "$status" -eq 0 ] || FAILED=1
    echo "[$SECONDS s] $name: $verdict"
    TABLE+=("$name|$verdict|$((SECONDS - start)) s|$LOGS/${name// /_}.log")
    return "$status"
}

# Without these two nothing is proved, so leaving one out is a failure.
part "tests" 150 "torch triton numpy safetensors pytest hypothesis" \
    "$PYTHON" -m pytest -q -p no:cacheprovider --tb=short --maxfail=20 "${TESTS[@]}" || FAILED=1
if "$PYTHON" -c 'import jsonargparse, rich' 2> /dev/null; then
    CHECK=(-m tvmatch check --device)
else # the command's comparisons without its command line
    CHECK=(-c '
import sys
import torch
from tvmatch.check import Setting, check_attention, check_compilation, check_network, own_case, random_model
setting, model = Setting(torch.device(sys.argv[1]), getattr(torch, sys.argv[3])), random_model("tiny/2")
found = [*check_attention(setting, own_case(model.network)), *check_network(model, setting)]
found += check_compilation(setting)
for x in found:
    print("ok " if x.passed else "OFF", f"{x.error:.1e} of {x.tolerance:.1e}", x.name, x.part, x.backend, sep="  ")
raise SystemExit(any(not x.passed for x in found))')
fi
part "check" 45 "torch numpy safetensors" "$PYTHON" "${CHECK[@]}" "$DEVICE" --dtype "$DTYPE" || FAILED=1

part "attention" 170 "torch triton numpy safetensors" \
    "$PYTHON" benchmarks/attention.py --device "$DEVICE" --dtype "$DTYPE" --out "$RESULTS" $QUICK
part "training step" 160 "torch numpy safetensors" \
    "$PYTHON" benchmarks/training_step.py --device "$DEVICE" --out "$RESULTS" $QUICK
part "digits" 60 "torch numpy safetensors jsonargparse yaml rich PIL matplotlib tensorboard sklearn" \
    "$PYTHON" -m tvmatch train digits --out "$LOGS/digits" --device "$DEVICE" \
    --training.steps $TRAINING_STEPS --training.sample_every $((TRAINING_STEPS / 2))

{
    echo "# suite"
    PYTHONPATH="benchmarks:$PYTHONPATH" "$PYTHON" -c "
import common, torch
print()
for key, value in common.record(torch.device('$DEVICE')).items():
    print(f'- {key}: {value}')"
    for name in attention training_step; do
        if [ "$RESULTS/$name.md" -nt "$LOGS/started" ]; then # of this run
            printf '\n## %s\n' "$name"
            sed -n '/^## In short/,$p' "$RESULTS/$name.md" | sed 1d
        fi
    done
    printf '\n| part | outcome | time | log, or why |\n| --- | --- | --- | --- |\n'
    for line in "${TABLE[@]}"; do echo "| ${line//|/ | } |"; done
    printf '\n%s\n' "$SECONDS s in all; $([ "$FAILED" -eq 0 ] && echo "nothing failed" || echo "NOT everything passed")."
} > "$RESULTS/suite.md"
echo
cat "$RESULTS/suite.md"
exit "$FAILED"

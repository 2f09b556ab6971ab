#!/usr/bin/env bash
# The first minutes on a GPU: do the kernels agree with float64, and how fast are they? Needs no network.
#
#     bash benchmarks/gpu.sh                            nine minutes, results in gpu-first/
#     OUT=results MINUTES=30 bash benchmarks/gpu.sh
#     CUDA_VISIBLE_DEVICES=3 bash benchmarks/gpu.sh     another GPU than the first
#     DRY=1 bash benchmarks/gpu.sh                      without a GPU: the same steps under a fake one, sizes cut
#
# Leaves eight files in OUT: summary.txt (a line per step, then all figures), forward.json, compile.json, kernels.json and
# training.json (rows of the benches), facts.jsonl (host times, attention backends), tests.jsonl (a line per test) and logs.txt
# (all that was printed). A step gets its share of the time that is left. One that fails, hangs or gets no time costs itself
# only. The exit status is 0 if every step ended with status 0, else 1. PYTHON names another interpreter than python3.
set -uo pipefail
set -m # each step is a process group of its own, which can be ended whole

die() {
  echo "gpu.sh: $*" >&2
  exit 2
}

# ------------------------------------------------------------------------------------------------ what is here
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MINUTES=${MINUTES:-9}
[[ $MINUTES =~ ^[1-9][0-9]{0,2}$ ]] || die "MINUTES: got '$MINUTES', expected a whole number from 1 to 999"
export DRY=${DRY:-} OUT
OUT=$(realpath -m "${OUT:-gpu-first}")
for PYTHON in "${PYTHON:-python3}" python; do # the first that has torch
  "$PYTHON" -c 'import importlib.util as u; raise SystemExit(u.find_spec("torch") is None)' 2> /dev/null && break
  PYTHON=
done
[[ $PYTHON ]] || die "neither python3 nor python has torch: activate an environment that has it, or set PYTHON"
export PYTHONPATH=${PYTHONPATH:-} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
[[ $DRY ]] && export FAKE_CUDA=${FAKE_CUDA:-1} PYTHONPATH=$ROOT/tests/fake_cuda/process:$PYTHONPATH
"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
  || die "torch sees no GPU; DRY=1 bash benchmarks/gpu.sh shows without one that every step runs"

WORK=$(mktemp -d) || die "TMPDIR: got ${TMPDIR:-/tmp}, expected a folder that can be written"
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT" && cd "$OUT" && rm -f {summary,logs}.txt {facts,tests}.jsonl {forward,compile,kernels,training}.json \
  && touch {summary,logs}.txt || die "OUT: got $OUT, expected a folder that can be written"
cd "$WORK" || exit 2                        # neither a checkout that is read-only nor its folders' names matter here
[[ -w ${HOME:-/} ]] || export HOME=$WORK # where Triton keeps what it compiled

# ------------------------------------------------------------------------------------------------ steps
# Shares of the time. They add up to 530 s, so that nine minutes leave ten for the start and the summary.
declare -A SHARE=([install]=25 [doctor]=30 [forward]=90 [tests]=150 [micro]=40 [compile]=85 [kernels]=50 [training]=60)
share_left=530 failed=0 current=

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

run() { # NAME SECONDS COMMAND...: run a command for so long at most; its output goes to NAME.log
  timeout -k 5 -s INT "$2" "${@:3}" > "$WORK/$1.log" 2>&1 < /dev/null &
  current=$!
  wait "$current"
  local status=$?
  kill -KILL -- "-$current" 2> /dev/null # whatever it started and left
  current=
  return "$status"
}

record() { # NAME STATUS SECONDS LIMIT COMMAND...: a line of the summary, and the log
  local why=
  [[ $2 == 124 || $2 == 137 ]] && why=" (its time was up)"
  [[ $2 == 0 ]] || failed=1
  {
    echo "=== $1: ${*:5}"
    tail -c 400000 "$WORK/$1.log"
  } >> "$OUT/logs.txt"
  say "$1: status $2, $3 of $4 s$why"
}

step() { # NAME COMMAND...: run a command in its share of the time that is left
  local name=$1 begin=$SECONDS limit=$(((60 * MINUTES - 10 - SECONDS) * ${SHARE[$1]} / share_left))
  share_left=$((share_left - ${SHARE[$1]}))
  if ((limit < 3)); then
    say "$name: skipped, no time is left"
    failed=1
    return 1
  fi
  run "$name" "$limit" "${@:2}"
  local status=$?
  record "$name" "$status" $((SECONDS - begin)) "$limit" "${@:2}"
  return "$status"
}

compilers=()
start_compilers() { # BATCH...: let torch.compile fill its cache while nothing is timed
  local batch
  for batch; do
    timeout -k 5 -s INT $((SHARE[tests] * MINUTES / 9)) "${BENCH[@]}" --models "$MODEL:$batch" --rivals compile \
      --out "$WORK/compiler$batch" > "$WORK/compiler$batch.log" 2>&1 < /dev/null &
    compilers+=($!)
  done
}

wait_for_compilers() { # BATCH...
  local batch begin=$SECONDS pid status
  for batch; do
    pid=${compilers[0]}
    compilers=("${compilers[@]:1}")
    wait "$pid"
    status=$?
    kill -KILL -- "-$pid" 2> /dev/null
    record "compiler$batch" "$status" $((SECONDS - begin)) $((SHARE[tests] * MINUTES / 9)) "bench --models $MODEL:$batch --rivals compile"
  done
}

interrupt() {
  trap '' INT TERM
  local pid
  [[ $current ]] && kill -INT -- "-$current" 2> /dev/null && sleep 2
  for pid in $current "${compilers[@]}"; do kill -KILL -- "-$pid" 2> /dev/null; done
  say "interrupted: the steps from here on are missing"
  exit 130
}
trap interrupt INT TERM

bench() { # NAME OPTIONS...: run bench.py; NAME.json has its rows, those of a run that was cut off too
  step "$1" "${BENCH[@]}" --out "$WORK/$1" "${@:2}"
  cp "$WORK/$1/bench.json" "$OUT/$1.json" 2>> "$OUT/logs.txt"
}

MODEL=DiT-XL/2 BATCHES=(32 8 1 128) COMPILED=(32 1)
TESTS=("$ROOT/tests") WORKERS=$(($(nproc) > 16 ? 12 : $(nproc) > 4 ? $(nproc) - 4 : 2))
KERNELS="XL and b32 and not backward and not compile" TRAINING=(--models DiT-XL/2 --batch 32 --rounds 3)
if [[ $DRY ]]; then
  MODEL=DiT-S/8 BATCHES=(1) COMPILED=(1) TESTS=("$ROOT/tests/gpu/test_streams.py")
  KERNELS="S/2 and b8 and classifier_free_guidance and not compile" TRAINING=(--models DiT-S/8 --depth 1 --batch 1 --rounds 2)
  say "A dry run under a fake GPU: no number below says how fast anything is."
fi
FIRST=("$PYTHON" -m ditfast.benchmarks.gpu_first)
BENCH=("${FIRST[@]}" bench --device cuda:0 --rounds 5)
PYTEST=("$PYTHON" -m pytest -p ditfast.benchmarks.gpu_first -c "$ROOT/pyproject.toml" --rootdir "$ROOT" -p no:cacheprovider -q --tb=short)

# ------------------------------------------------------------------------------------------------ what is run
{
  date -u
  nproc
  nvidia-smi
  git -C "$ROOT" rev-parse HEAD
  "$PYTHON" -m pip list --disable-pip-version-check
} >> "$OUT/logs.txt" 2>&1
if ! step install "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --no-index -e "$ROOT"; then
  # No pip, a checkout that is read-only, an environment that is managed: a copy of the package does as well.
  mkdir "$WORK/copy" && cp -r "$ROOT/ditfast" "$WORK/copy/" && ln -sfn "$ROOT/kernels" "$ROOT/benchmarks" "$WORK/copy/ditfast/"
  PYTHONPATH=$WORK/copy:$PYTHONPATH
fi
step doctor "$PYTHON" -m ditfast doctor
bench forward --models "${BATCHES[@]/#/$MODEL:}" --rivals eager ditfast # first, since everybody asks for it
start_compilers "${COMPILED[@]}"
step tests "${PYTEST[@]}" -m gpu -n "$WORKERS" --dist worksteal --max-worker-restart 40 --maxfail 300 "${TESTS[@]}"
wait_for_compilers "${COMPILED[@]}" # what comes now is timed, on a GPU that does nothing else
step micro "${FIRST[@]}" micro
bench compile --models "${COMPILED[@]/#/$MODEL:}" --rivals compile ditfast
step kernels "${PYTEST[@]}" "$ROOT/benchmarks/kernels.py" -k "$KERNELS" --benchmark-json "$OUT/kernels.json"
step training "${FIRST[@]}" training --device cuda:0 --rivals eager:bf16 ditfast:bf16 --out "$OUT" "${TRAINING[@]}"
"${FIRST[@]}" summary 2>&1 | tee -a "$OUT/summary.txt"
echo "wrote $OUT: $(cd "$OUT" && echo *)"
exit $failed

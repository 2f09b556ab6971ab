#!/usr/bin/env bash
# The first minutes on a GPU: do the kernels agree with float64, and how fast are they? Needs no network.
#
#     bash benchmarks/gpu.sh                            nine minutes; results in gpu-first/, an earlier run's in earlier-N/
#     OUT=results MINUTES=30 bash benchmarks/gpu.sh
#     CUDA_VISIBLE_DEVICES=3 bash benchmarks/gpu.sh     on another GPU than the first
#     DRY=1 bash benchmarks/gpu.sh                      without a GPU: the same steps under a fake one, sizes cut
#
# Leaves nine files in OUT: summary.txt (a line per step, then all figures), forward.json, host.json, compile.json, kernels.json
# and training.json (the benches' rows), facts.jsonl (host times, attention backends), tests.jsonl (a line per test) and logs.txt
# (all that was printed). Each step gets its share of the time that is left. One that fails or hangs costs itself only; host
# leaves out what does not fit, in the order that its --help names. The exit status is 0 if every step ended with status 0, else
# 1. PYTHON names the interpreter; default: python3, else python.
set -uo pipefail
SECONDS=0
set -m # every step is a process group of its own, which can be ended whole

die() {
  echo "gpu.sh: $*" >&2
  exit 2
}

# ------------------------------------------------------------------------------------------------ what is here
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MINUTES=${MINUTES:-9} PYTHONPATH=${PYTHONPATH:-} DRY=${DRY:+1} OUT=$(realpath -m "${OUT:-gpu-first}")
export OUT DRY PYTHONPATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
[[ $MINUTES =~ ^[1-9][0-9]{0,2}$ ]] || die "MINUTES: got '$MINUTES', expected a whole number from 1 to 999"
for PYTHON in ${PYTHON:-python3 python} ""; do # the first that has torch
  "$PYTHON" -c 'from importlib import util; raise SystemExit(util.find_spec("torch") is None)' 2> /dev/null && break
done
[[ $PYTHON ]] || die "found no Python that has torch: activate an environment that has it, or set PYTHON"
# The first process of a dry run builds the fake, which takes g++ a minute.
[[ $DRY ]] && export FAKE_CUDA=1 PYTHONPATH="$ROOT/tests/fake_cuda/process:$PYTHONPATH"
timeout $((DRY ? 300 : 60)) "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
  || die "torch sees no GPU: look at nvidia-smi, or run with DRY=1, which needs none"

keep_earlier() { # of an earlier run in the same folder
  local files=() name number=1
  for name in {summary,logs}.txt {facts,tests}.jsonl {forward,host,compile,kernels,training}.json; do
    [[ -e $name ]] && files+=("$name")
  done
  ((${#files[@]})) || return 0
  while ! mkdir "earlier-$number" 2> /dev/null; do ((number++ < 999)) || return; done
  mv "${files[@]}" "earlier-$number"
}
mkdir -p "$OUT" && cd "$OUT" && keep_earlier && touch {summary,logs}.txt || die "OUT: got $OUT, expected a folder that can be written"
WORK=$(mktemp -d) || die "TMPDIR: got ${TMPDIR:-/tmp}, expected a folder that can be written"
trap 'rm -rf "$WORK"' EXIT
cd "$WORK" || exit 2                        # so that nothing is written into the checkout, or imported from it by chance
[[ -w ${HOME:-/} ]] || export HOME="$WORK" # Triton keeps there what it compiled

# ------------------------------------------------------------------------------------------------ steps
# Shares of nine minutes in seconds; the rest is for the summary, and for a step that has to be killed.
declare -A SHARE=([install]=25 [doctor]=30 [forward]=90 [tests]=130 [micro]=35 [host]=45 [compile]=70 [kernels]=45
  [training]=50)
share_left=520 failed=0 current='' compilers=()

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

start() { # NAME SECONDS COMMAND...: start a command that is ended after so long
  timeout -k 5 -s INT "$2" "${@:3}" > "$WORK/$1.log" 2>&1 < /dev/null &
}

finish() { # NAME PID SECONDS: wait for a command, then write its line of the summary and its log
  local begin=$SECONDS status note=''
  current=$2
  until
    wait "$current" 2> /dev/null # where bash would write that it was killed
    status=$?
    ! kill -0 "$current" 2> /dev/null # wait also returns when somebody stops the process, which goes on later
  do sleep 1; done
  kill -KILL -- "-$current" 2> /dev/null # what it started and left behind
  current=''
  ((status == 124 || status == 137)) && note=" (its time was up)"
  ((status)) && failed=1
  { echo "=== $1" && tail -c 400000 "$WORK/$1.log"; } >> "$OUT/logs.txt"
  say "$1: status $status, $((SECONDS - begin)) of $3 s$note"
  return "$status"
}

step() { # NAME COMMAND...: run a command in its share of the time that is left
  local limit=$(((60 * MINUTES - 20 - SECONDS) * SHARE[$1] / share_left))
  ((share_left -= SHARE[$1]))
  if ((limit < 2)); then
    failed=1
    say "$1: skipped, no time is left"
    return 1
  fi
  start "$1" "$limit" "${@:2}"
  finish "$1" $! "$limit"
}

bench() { # NAME OPTIONS...: run bench.py; NAME.json gets its rows, after a run that was cut off too
  step "$1" "${BENCH[@]}" --out "$WORK/$1" "${@:2}"
  cp "$WORK/$1/bench.json" "$OUT/$1.json" 2> /dev/null
}

interrupt() {
  trap '' INT TERM
  local group
  [[ $current ]] && kill -INT -- "-$current" 2> /dev/null && sleep 1
  for group in $current "${compilers[@]}"; do kill -KILL -- "-$group" 2> /dev/null; done
  say "interrupted: the other steps are missing"
  exit 130
}
trap interrupt INT TERM

# ------------------------------------------------------------------------------------------------ what is run
MODEL=DiT-XL/2 BATCHES=(32 8 1 128) COMPILED=(32 1) TESTS=$ROOT/tests
cores=$(env -u OMP_NUM_THREADS nproc) # which would be its answer
WORKERS=$((cores < 6 ? 2 : cores < 16 ? cores - 4 : 12))
HOST=(--baselines diffusers) # torch.compile's host time is in compile.json
KERNELS="XL and b32 and not backward and not compile" TRAINING=(--models DiT-XL/2 --batch 32 --rounds 3)
if [[ $DRY ]]; then
  MODEL=DiT-S/8 BATCHES=(1) COMPILED=(1) TESTS=$ROOT/tests/gpu/test_streams.py
  HOST=(--quick --depth 1 --rounds 2)
  KERNELS="S/2 and b8 and classifier_free_guidance and not compile"
  TRAINING=(--models DiT-S/8 --depth 1 --batch 1 --rounds 2)
  say "A dry run under a fake GPU: no number below says how fast anything is."
fi
FIRST=("$PYTHON" -m ditfast.benchmarks.gpu_first)
BENCH=("${FIRST[@]}" bench --device cuda:0 --rounds 5)
PYTEST=("$PYTHON" -m pytest -p ditfast.benchmarks.gpu_first -p no:cacheprovider -c "$ROOT/pyproject.toml"
  --rootdir "$ROOT" -q --tb=short)

{
  date -u
  echo "$cores cores"
  timeout 20 nvidia-smi
  git -C "$ROOT" rev-parse HEAD
  timeout 20 "$PYTHON" -m pip list --disable-pip-version-check
} >> "$OUT/logs.txt" 2>&1 < /dev/null

if ! step install "$PYTHON" -m pip install -q --disable-pip-version-check \
  --no-deps --no-build-isolation --no-index -e "$ROOT"; then
  # No pip, a checkout that is read-only, an environment that pip may not change: a copy on the path does as well.
  mkdir "$WORK/copy" && cp -r "$ROOT/ditfast" "$WORK/copy/"
  ln -sfn "$ROOT/kernels" "$ROOT/benchmarks" "$WORK/copy/ditfast/"
  PYTHONPATH=$WORK/copy:$PYTHONPATH
fi
step doctor "$PYTHON" -m ditfast doctor
bench forward --models "${BATCHES[@]/#/$MODEL:}" --rivals eager ditfast # early, since everybody asks for it

ahead=$((SHARE[tests] * MINUTES / 9)) # while nothing is timed, compilers fill their caches
for batch in "${COMPILED[@]}"; do
  start "compiler$batch" "$ahead" "${BENCH[@]}" --models "$MODEL:$batch" --rivals compile --out "$WORK/compiler$batch"
  compilers+=($!)
done
step tests "${PYTEST[@]}" -m gpu -n "$WORKERS" --dist worksteal --max-worker-restart 40 --maxfail 300 "$TESTS"
for i in "${!COMPILED[@]}"; do
  finish "compiler${COMPILED[i]}" "${compilers[i]}" "$ahead"
  unset "compilers[i]" # another process may have its number by now
done

step micro "${FIRST[@]}" micro
importing=15 # seconds until its budget begins, and those of the call that ends it
step host "$PYTHON" -m ditfast.benchmarks.host --device cuda:0 --out "$WORK/host" "${HOST[@]}" \
  --budget $((SHARE[host] * MINUTES / 9 > importing ? SHARE[host] * MINUTES / 9 - importing : 1))
cp "$WORK/host/host.json" "$OUT/" 2> /dev/null
bench compile --models "${COMPILED[@]/#/$MODEL:}" --rivals compile ditfast
step kernels "${PYTEST[@]}" "$ROOT/benchmarks/kernels.py" -k "$KERNELS" --benchmark-json "$OUT/kernels.json"
step training "${FIRST[@]}" training --device cuda:0 --rivals eager:bf16 ditfast:bf16 --out "$OUT" "${TRAINING[@]}"

timeout 60 "${FIRST[@]}" summary 2>&1 | tee -a "$OUT/summary.txt"
echo "wrote $OUT"
exit "$failed"

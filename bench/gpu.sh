#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command, for a machine that is at hand for ten minutes and has no network.
#
#   bench/gpu.sh [--budget MINUTES] [--dry-run] [STEP...]
#
# Steps, in this order; all of them when none is named:
#   packages  wheels of $WHEELS installed, what is missing listed
#   native    the compiled CPU part, where scikit-build-core and nanobind are there; without it the source tree is used
#   peers     mamba-ssm and causal-conv1d from $PEERS, sources built for this GPU alone while the tests run: build_peers.sh
#   test      the tests that need a GPU
#   tune      sizes of the kernels' tiles, measured on this GPU
#   kernels   every kernel timed at full size
#   decode    tokens a second at full size, beside the peers
# Each has a time limit and a log; the later ones run when one fails. The exit code is 1 when one failed, 3 when packages or the
# GPU are missing. A budget of so many minutes (default 9) shortens the last steps or leaves them out, and says so.
#
# Variables:
#   OUT      where results, logs, the tuned tiles.toml and built wheels go (default bench/results)
#   WHEELS   a directory of wheels that are installed first, without an index
#   PEERS    a directory with wheels or sources of mamba-ssm and causal-conv1d
#   PYTHON   the interpreter (default python3)
#   DECODE_PEERS  what decode measures beside us, where it is installed (default "mamba-ssm bitsandbytes transformer")
#   SCHEMES  what decode measures (default "w4a16-g128 w8a16-g128 w3a16-g64 fp16 bnb-nf4 bnb-int8")
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 3
python=${PYTHON:-python3}
out=${OUT:-bench/results}
all_steps=(packages native peers test tune kernels decode)
budget_minutes=9
dry_run=
wanted=()

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

while (($#)); do
  case $1 in
    --budget)
      [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "--budget needs whole minutes, got '${2:-}'" >&2; exit 2; }
      budget_minutes=$2
      shift
      ;;
    --dry-run) dry_run=yes ;;
    -h | --help) usage; exit 0 ;;
    *)
      [[ " ${all_steps[*]} " == *" $1 "* ]] || { echo "unknown step '$1'; known: ${all_steps[*]}" >&2; exit 2; }
      wanted+=("$1")
      ;;
  esac
  shift
done
((${#wanted[@]})) || wanted=("${all_steps[@]}")

is_wanted() { [[ " ${wanted[*]} " == *" $1 "* ]]; }

# Reading environments of others would change what is measured: interpreted kernels, for one.
unset TRITON_INTERPRET
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

[[ $dry_run ]] || mkdir -p "$out"
log_of() { echo "$out/gpu-$1.log"; }
seconds_left() { echo $((budget_minutes * 60 - SECONDS)); }

summary=()
failed=0
note() { # STEP WORDS
  summary+=("$(printf '%-9s %s' "$1" "$2")")
  echo "== $1: $2"
}

# What a step may take: its own limit, or what is left of the budget. Fails when that is less than the step needs to say anything.
limit_of() { # STEP SECONDS LEAST
  local left limit
  left=$(seconds_left)
  limit=$((left < $2 ? left : $2))
  if ((limit < $3)); then
    note "$1" "left out: $((left > 0 ? left : 0)) s of the budget left, it needs $3"
    return 1
  fi
  echo "$limit" >"$state/limit"
}

verdict() { # STEP CODE SECONDS LIMIT
  case $2 in
    0) note "$1" "done in $3 s" ;;
    124 | 137)
      failed=1
      note "$1" "FAILED: stopped after its $4 s; see $(log_of "$1")"
      ;;
    *)
      failed=1
      note "$1" "FAILED with exit code $2 after $3 s; see $(log_of "$1")"
      ;;
  esac
}

run() { # STEP SECONDS LEAST COMMAND...
  local step=$1 limit began code
  is_wanted "$step" || return 0
  if [[ $dry_run ]]; then
    printf '%-9s up to %s s: %s\n' "$step" "$2" "${*:4}"
    return 0
  fi
  limit_of "$step" "$2" "$3" || return 0
  limit=$(<"$state/limit")
  began=$SECONDS
  echo "== $step: up to $limit s"
  timeout -k 10 "$limit" "${@:4}" 2>&1 | tee "$(log_of "$step")"
  code=${PIPESTATUS[0]}
  verdict "$step" "$code" $((SECONDS - began)) "$limit"
  return "$code"
}

state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT

# What the package itself imports, by module and by the name pip knows; then what single steps need.
required="torch triton numpy click msgspec filelock platformdirs rich safetensors tokenizers PIL:pillow onnxruntime"
needed_by="test:pytest tune:tomlkit decode:tomlkit"
missing() { # MODULE[:PACKAGE]...
  "$python" - "$@" <<'PY'
import importlib.util, sys
names = [name.partition(":") for name in sys.argv[1:]]
print(" ".join(package or module for module, _, package in names if importlib.util.find_spec(module) is None))
PY
}

install_packages() {
  is_wanted packages || return 0
  local wheels=()
  [[ ${WHEELS:-} ]] && wheels=("$WHEELS"/*.whl)
  if [[ $dry_run ]]; then
    echo "packages  ${wheels[*]:+pip install --no-index --no-deps ${wheels[*]}; }look for: $required"
    return 0
  fi
  if [[ ${WHEELS:-} ]]; then
    if ! "$python" -m pip install -q --no-index --no-deps --upgrade "${wheels[@]}" 2>&1 | tee "$(log_of packages)"; then
      failed=1
      note packages "FAILED: wheels of $WHEELS cannot be installed; see $(log_of packages)"
    fi
  fi
}

require_packages() {
  [[ $dry_run ]] && return 0
  local lacking pair
  # shellcheck disable=SC2086 # words of a list
  lacking=$(missing $required) || exit 3
  if [[ $lacking ]]; then
    echo "missing here: $lacking" >&2
    echo "bring them as wheels: pip download --only-binary=:all: --no-deps -d DIR $lacking; then WHEELS=DIR $0" >&2
    exit 3
  fi
  for pair in $needed_by; do
    lacking=$(missing "${pair#*:}")
    if [[ $lacking ]] && is_wanted "${pair%%:*}"; then
      drop "${pair%%:*}" "left out: $lacking is not installed; bring it in \$WHEELS"
    fi
  done
}

drop() { # STEP WORDS
  local step kept=()
  note "$1" "$2"
  for step in "${wanted[@]}"; do [[ $step == "$1" ]] || kept+=("$step"); done
  wanted=("${kept[@]:-}")
}

find_gpu() {
  if [[ $dry_run ]]; then
    capability=CAPABILITY
    return 0
  fi
  capability=$("$python" -c 'import torch
assert torch.cuda.is_available(), "torch sees no CUDA GPU here"
print("%d.%d" % torch.cuda.get_device_capability())') || { echo "no GPU: see above; nvidia-smi says what the driver sees" >&2; exit 3; }
  "$python" -c 'import platform, torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, "Python", platform.python_version())'
}

build_native() {
  is_wanted native || return 0
  if [[ ! $dry_run ]]; then
    if "$python" -c 'import cobra_edge.decode._cpu' 2>/dev/null; then
      note native "there already"
      return 0
    fi
    local lacking
    lacking=$(missing scikit_build_core:scikit-build-core nanobind)
    if [[ $lacking ]]; then
      note native "left out: no $lacking; the package is used from the source tree"
      return 0
    fi
  fi
  run native 150 30 "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e "$root"
}

# Peers are built in the background while the tests run: compilers need the processor, tests the GPU.
peers_job=
build_peers() {
  is_wanted peers || return 0
  if [[ $dry_run ]]; then
    echo "peers     up to 420 s, beside the tests: bench/build_peers.sh ${PEERS:-(left out: no \$PEERS)} $out $capability"
    return 0
  fi
  [[ ${PEERS:-} ]] || { drop peers "left out: \$PEERS is not set"; return 0; }
  limit_of peers 420 60 || return 0
  peers_limit=$(<"$state/limit")
  peers_began=$SECONDS
  timeout -k 10 "$peers_limit" bench/build_peers.sh "$PEERS" "$out" "$capability" "$python" >"$(log_of peers)" 2>&1 &
  peers_job=$!
}

await_peers() {
  [[ $peers_job ]] || return 0
  wait "$peers_job"
  verdict peers $? $((SECONDS - peers_began)) "$peers_limit"
  peers_job=
}

is_there() { [[ $dry_run ]] || "$python" -c "import $1" 2>/dev/null; }

decode_arguments() {
  local name module
  arguments=(--device cuda)
  for name in ${SCHEMES:-w4a16-g128 w8a16-g128 w3a16-g64 fp16 bnb-nf4 bnb-int8}; do
    [[ $name == bnb-* ]] && ! is_there bitsandbytes || arguments+=(--scheme "$name")
  done
  for name in ${DECODE_PEERS:-mamba-ssm bitsandbytes transformer}; do
    case $name in
      mamba-ssm) module="selective_scan_cuda, mamba_ssm" ;;
      bitsandbytes) module=bitsandbytes ;;
      *) module=torch ;;
    esac
    if is_there "$module"; then arguments+=(--peer "$name"); fi
  done
}

keep_results() {
  local file logs=()
  cp cobra_edge/decode/cuda/kernels/tiles.toml "$out/"
  for file in bench/results/gpu-*.json; do
    [[ -e $file && ! $file -ef $out/${file##*/} ]] && cp "$file" "$out/"
  done
  for file in "$out"/gpu-*.log; do
    [[ -e $file && $file != "$out/gpu-run.log" ]] && logs+=("$file")
  done
  # One file of all logs: a machine that gives few files back gives this one.
  ((${#logs[@]})) && tail -n +1 "${logs[@]}" >"$out/gpu-run.log"
}

install_packages
require_packages
find_gpu
build_native
build_peers
run test 240 20 "$python" -m pytest -m gpu -rs -p no:cacheprovider tests/decode/cuda/test_gpu.py
run tune 150 30 "$python" -m bench.tiles
run kernels 120 30 "$python" -m bench.kernels --device cuda --capability "$capability"
await_peers
decode_arguments
run decode 300 60 "$python" -m cobra_edge.bench decode "${arguments[@]}"
[[ $dry_run ]] && exit 0
keep_results
echo
echo "summary, $SECONDS s of $((budget_minutes * 60)):"
printf '  %s\n' "${summary[@]}"
exit "$failed"

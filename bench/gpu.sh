#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of ten minutes at most, for a machine without a network.
#
#   bench/gpu.sh --plan         the steps, their time limits and the results they write; needs no GPU
#   bench/gpu.sh --prepare      gather in build/gpu what such a machine lacks, to be carried with the source tree
#   bench/gpu.sh --rehearse     the same steps at tiny sizes on the emulated GPU
#   bench/gpu.sh [--step N]...  run all steps, or those named by number or name; --out DIR copies each result there at once
#
# PYTHON names the interpreter (default python3). The exit code is 1 when a step failed, 2 for a step that is not there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [[ " $* " == *" --rehearse "* ]]; then
  driver=$("$python" -m tests.emulated.build fast)
  export LD_LIBRARY_PATH="${driver%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  export FAKE_GPU="Emulated;9.0;2000000000;1900000000;132;0;13000" OMP_NUM_THREADS=1
  # Results and bundles of a rehearsal are thrown away.
  aside=$(mktemp -d)
  trap 'rm -rf "$aside"' EXIT
  cd "$aside"
fi
"$python" -m bench.gpu_session "$@"

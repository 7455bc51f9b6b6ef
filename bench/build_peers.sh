#!/usr/bin/env bash
# Install causal-conv1d and mamba-ssm with their CUDA extensions, without a network.
#
#   bench/build_peers.sh PEERS OUT CAPABILITY [PYTHON]
#
# PEERS holds, of each, a wheel, an archive (*.tar.gz) or a directory of sources. Sources are built with nvcc for this compute
# capability alone (their setup.py names nine: an hour instead of minutes); the wheels made are left in OUT, to be brought next
# time. Exit code 3 when PEERS has neither of the two.
set -euo pipefail

peers=$1 out=$2 capability=$3 python=${4:-python3}
export TORCH_CUDA_ARCH_LIST=$capability
export MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT

offer() { # PATTERN...: the first path that is there
  local path
  for path in "$@"; do
    [[ -e $path ]] && { echo "$path"; return; }
  done
  return 1
}

unpack() { # SOURCE NAME: a copy of it in a directory of that name
  mkdir "$aside/$2"
  if [[ -d $1 ]]; then
    cp -r "$1/." "$aside/$2"
  else
    tar -xzf "$1" -C "$aside/$2" --strip-components=1
  fi
}

found=
for name in causal_conv1d mamba_ssm; do
  dashed=${name//_/-}
  if wheel=$(offer "$peers/$name"-*.whl); then
    echo "$wheel: installed as it is"
  elif source=$(offer "$peers/$name"*.tar.gz "$peers/$dashed"*.tar.gz "$peers/$name"*/ "$peers/$dashed"*/); then
    unpack "$source" "$name"
    # Without a list of its own in setup.py, torch takes TORCH_CUDA_ARCH_LIST.
    sed -i -E 's/cc_flag\.append\("(-gencode|arch=[^"]*)"\)/pass/' "$aside/$name/setup.py"
    "$python" -m pip wheel --no-index --no-deps --no-build-isolation -w "$aside/wheels" "$aside/$name"
    cp "$aside/wheels/$name"-*.whl "$out/"
    wheel=$(offer "$aside/wheels/$name"-*.whl)
  else
    echo "$name: nothing of it in $peers"
    continue
  fi
  "$python" -m pip install -q --no-index --no-deps "$wheel"
  found=yes
done
[[ $found ]] || exit 3

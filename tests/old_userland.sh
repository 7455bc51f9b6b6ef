#!/usr/bin/env bash
# The x86-64 wheel in a Debian 11: pip refuses it for Python 3.9 with the version that is needed, and the C library is new enough
# for the native decoder. Debian 11 has no later Python.
#
#   tests/old_userland.sh WHEEL [ROOT]
#
# Becomes root by sudo, for debootstrap and chroot. ROOT, by default build/old-userland, is made once; delete it to begin anew.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
wheel=$1 root=${2:-$here/build/old-userland}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

fail() { echo "old userland: $*" >&2; exit 1; }
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "old userland: must run as root: debootstrap and chroot ask for it" >&2; exit 3; }
  exec sudo --preserve-env=DEBIAN_MIRROR,HTTP_PROXY,HTTPS_PROXY "$0" "$@"
fi
if ! command -v debootstrap >/dev/null; then
  command -v apt-get >/dev/null || { echo "old userland: debootstrap is missing: install it" >&2; exit 3; }
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debian-archive-keyring debootstrap >/dev/null
fi
if [ ! -e "$root/usr/bin/python3" ]; then
  echo "making a Debian root in $root, some minutes"
  debootstrap --variant=minbase --include=python3-pip,unzip bullseye "$root" "$mirror" >"$root.log"
fi
rm -rf "$root/cobra" && mkdir -p "$root/cobra"
cp "$wheel" "$root/cobra/"
name=$(basename "$wheel")
inside() { chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 "$@"; }

echo "== $(inside python3 --version), $(inside ldd --version | head -1)"
if said=$(inside pip3 install --no-index --no-deps --target /cobra/installed "/cobra/$name" 2>&1); then fail "Python 3.9 was accepted"; fi
grep -q "requires a different Python: 3.9.* not in '>=3.10'" <<<"$said" || fail "pip refused with other words: $said"
echo "== refused: $(grep "different Python" <<<"$said")"
inside unzip -qo "/cobra/$name" -d /cobra/unpacked
inside python3 - <<'PROGRAM' || fail "the native library does not load"
import ctypes
library = ctypes.CDLL("/cobra/unpacked/cobra_edge/decode/native/libcobra_cpu.so")
library.cobra_kernels.restype = ctypes.c_char_p
names = []
while library.cobra_kernels(len(names)) is not None:
    names.append(library.cobra_kernels(len(names)).decode())
assert names[-1] == "scalar", names
print("== the native library loads, kernels", ", ".join(names))
PROGRAM
echo "old userland: all steps passed"

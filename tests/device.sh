#!/usr/bin/env bash
# The aarch64 wheel as a device installs it: a Debian root of that processor, emulated, with neither compiler nor torch.
#
#   tests/device.sh WHEEL BUNDLE [ROOT]
#
# BUNDLE was exported on this machine, as it is for a device. Becomes root by sudo; debootstrap and qemu-user-static are
# installed where they are missing and apt-get is not. ROOT, by default build/device, is made once; delete it to begin anew.
# Prints time and memory of each step.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
wheel=$1 bundle=$2 root=${3:-$here/build/device}
binfmt=/proc/sys/fs/binfmt_misc
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

fail() { echo "device: $*" >&2; exit 1; }
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "device: must run as root: debootstrap and chroot ask for it" >&2; exit 3; }
  exec sudo --preserve-env=DEBIAN_MIRROR,HTTP_PROXY,HTTPS_PROXY "$0" "$@"
fi
for program in debootstrap qemu-aarch64-static; do
  command -v $program >/dev/null && continue
  command -v apt-get >/dev/null || { echo "device: $program is missing: install debootstrap and qemu-user-static" >&2; exit 3; }
  echo "installing debootstrap and qemu-user-static"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    debian-archive-keyring debootstrap qemu-user-static >/dev/null
done

# The kernel starts the emulator for programs of that processor; F: opened now, so it need not lie in the root.
[ -e $binfmt/register ] || mount -t binfmt_misc none $binfmt
if ! grep -qs qemu-aarch64 $binfmt/*aarch64*; then
  magic='\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
  mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
  printf '%s' ":cobra-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >$binfmt/register
fi
if [ ! -e "$root/usr/bin/python3" ]; then
  echo "making a Debian root in $root, some minutes"
  debootstrap --arch=arm64 --variant=minbase --include=python3-venv,ca-certificates bookworm "$root" "$mirror" >"$root.log"
fi
cp /etc/resolv.conf "$root/etc/resolv.conf"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
rm -rf "$root/cobra" && mkdir -p "$root/cobra/watched"
cp -r "$wheel" "$bundle" "$here/cobra_edge/mini/demo.png" "$root/cobra/"
cp "$here/tests/device_check.py" "$here/tests/tolerance.py" "$root/cobra/"
"$here/.venv/bin/python" "$here/tests/device_check.py" "$bundle" "$here/cobra_edge/mini/demo.png" "$root/cobra/logits.npz"
name=$(basename "$bundle")
inside() {
  chroot "$root" /usr/bin/env -i PATH=/venv/bin:/usr/bin:/bin HOME=/root LANG=C.UTF-8 OMP_NUM_THREADS=1 \
    ${HTTPS_PROXY:+HTTPS_PROXY="$HTTPS_PROXY"} ${HTTP_PROXY:+HTTP_PROXY="$HTTP_PROXY"} "$@"
}
step() {
  local what=$1 began=$SECONDS
  shift
  inside "$@" || fail "$what failed with exit code $?"
  echo "== $what: $((SECONDS - began)) s"
}

inside sh -c 'command -v cc gcc c++ clang' && fail "the root has a compiler"
if [ ! -e "$root/venv/installed" ]; then
  step "environment" python3 -m venv --clear /venv
  step "install the libraries" pip install --quiet --no-cache-dir --only-binary :all: "/cobra/$(basename "$wheel")[serve,watch]"
  touch "$root/venv/installed"
fi
step "install the wheel" pip install --quiet --no-deps --force-reinstall "/cobra/$(basename "$wheel")"
inside python -c 'import torch' 2>/dev/null && fail "torch was installed"
du -sm "$root/venv" | awk '{print "== environment: " $1 " MB"}'
step "doctor" cobra-edge doctor "/cobra/$name"
step "run" cobra-edge run "/cobra/$name" --image /cobra/demo.png --prompt "Is there a red circle?"
step "regress" cobra-edge regress "/cobra/$name" --lines 20
step "watch" sh -c "(sleep 20; cp /cobra/demo.png /cobra/watched/one.png) & \
  cobra-edge watch /cobra/$name --directory /cobra/watched --prompt 'Is there a red circle?' --frames 1"
step "logits beside this machine's, serve" python /cobra/device_check.py "/cobra/$name" /cobra/demo.png /cobra/logits.npz
echo "device: all steps passed"

#!/usr/bin/env bash
# The shipped model on arm64 Linux, by the real Python runtime under qemu: the tokens of x86.
#
#     tests/release/arm.sh [WORK_DIR] [TOKENS]      some 10 minutes and 1 GB; needs root for debootstrap
#
# Makes an arm64 Debian root with Python and the runtime's wheels, cross-compiles the model for each
# instruction set, and generates greedily there and on this host. Fails unless tokens and all logits are
# equal. Downloads are kept in WORK_DIR for the next time.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(realpath -m "${1:-dist/arm-root}")
tokens=${2:-48}
root=$work/root
python=.venv/bin/python

for program in debootstrap qemu-aarch64 aarch64-linux-gnu-gcc dpkg-deb; do
  command -v $program >/dev/null || {
    echo "arm.sh: found no $program; possible: apt-get install debootstrap qemu-user gcc-aarch64-linux-gnu dpkg" >&2
    exit 2
  }
done

if [ ! -e "$work/.root" ]; then
  mkdir -p "$work"
  # The first stage only: packages are unpacked, none is configured, so that nothing need be emulated
  debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$root" >"$work/debootstrap.log"
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  $python -m pip install --quiet --target "$root/opt/bitnet" --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    -c constraints.txt apache-tvm apache-tvm-ffi numpy rich safetensors tokenizers
  # qemu-user shows the host's; the runtime asks it for the features that an artifact needs
  mkdir -p "$root/proc"
  echo "Features : asimd crc32 asimddp i8mm sve sve2" >"$root/proc/cpuinfo"
  touch "$work/.root"
fi

in_root() {
  qemu-aarch64 -cpu max -L "$root" -E PYTHONPATH="$root/opt/bitnet:$PWD" -E TVM_NUM_THREADS=2 \
    "$root/usr/bin/python3.11" "$@"
}

$python -m compiler.build --head-bits 8 -o "$work/host" >/dev/null
$python tests/release/greedy.py "$work/host" "$tokens" | tee "$work/host.json"
for target in arm-neon arm-dotprod arm-i8mm arm-sve2; do
  $python -m compiler.build --target $target -o "$work/$target" >/dev/null
  in_root tests/release/greedy.py "$work/$target" "$tokens" >"$work/$target.json"
  cmp "$work/host.json" "$work/$target.json"
  echo "$target: the same $tokens tokens and the same logits, KV at 3 and 16 bits"
done
in_root -m runtime.generate "$work/arm-i8mm" --temperature 0 -n "$tokens" --prompt "It was a dark evening, and the old house"

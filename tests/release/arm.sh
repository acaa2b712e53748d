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

[ -x $python ] || { echo "arm.sh: found no $python; possible: make setup" >&2; exit 2; }

if [ ! -e "$root" ]; then
  [ "$(id -u)" = 0 ] || { echo "arm.sh: debootstrap needs root; possible: sudo $0" >&2; exit 2; }
  rm -rf "$root.part"
  mkdir -p "$work"
  # The first stage only: packages are unpacked, none is configured, so that nothing need be emulated
  debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$root.part" >"$work/debootstrap.log"
  for package in "$root.part"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root.part"; done
  $python -m pip install --quiet --target "$root.part/opt/bitnet" --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    -c constraints.txt apache-tvm apache-tvm-ffi numpy rich safetensors tokenizers
  mkdir -p "$root.part/proc"
  mv "$root.part" "$root"
fi

# The least CPU that has what the artifact needs, and the features that the runtime then finds: qemu-user
# shows the host's /proc/cpuinfo unless the root has one.
cpu_for() {
  case $1 in
    arm-neon | arm-pi4) cpu=cortex-a72 features="asimd crc32" ;;
    arm-dotprod) cpu=cortex-a76 features="asimd crc32 atomics fphp asimdhp asimdrdm lrcpc asimddp" ;;
    arm-i8mm) cpu=max features="asimd crc32 atomics fphp asimdhp asimdrdm lrcpc asimddp i8mm" ;;
    *) cpu=max features="asimd crc32 atomics fphp asimdhp asimdrdm lrcpc asimddp i8mm bf16 sve sve2" ;;
  esac
  echo "Features : $features" >"$root/proc/cpuinfo"
}

in_root() {
  qemu-aarch64 -cpu "$cpu" -L "$root" -E PYTHONPATH="$root/opt/bitnet:$PWD" -E TVM_NUM_THREADS=2 \
    "$root/usr/bin/python3.11" "$@"
}

$python -m compiler.build --head-bits 8 -o "$work/host" >/dev/null
$python tests/release/greedy.py "$work/host" "$tokens" | tee "$work/host.json"
for target in arm-neon arm-pi4 arm-dotprod arm-i8mm arm-sve2; do
  cpu_for $target
  $python -m compiler.build --target $target -o "$work/$target" >/dev/null
  in_root tests/release/greedy.py "$work/$target" "$tokens" >"$work/$target.json"
  cmp "$work/host.json" "$work/$target.json"
  echo "$target: the same $tokens tokens and the same logits, KV at 3 and 16 bits"
done
in_root -m runtime.generate "$work/arm-sve2" --temperature 0 -n "$tokens" --prompt "It was a dark evening, and the old house"

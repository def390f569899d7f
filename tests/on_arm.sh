#!/usr/bin/env bash
# make arm: cross-compiles the C++ kernels for aarch64 and runs every stem under qemu, beside the reference in float64.
# Needs Debian's g++-aarch64-linux-gnu, qemu-user-static and debootstrap; everything else it puts into build/arm.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static debootstrap; do
    command -v "$tool" > /dev/null || { echo "make arm: $tool is missing; apt-get install g++-aarch64-linux-gnu qemu-user-static debootstrap"; exit 1; }
done
python=$PWD/.venv/bin/python arm=$PWD/build/arm torch=${TORCH:-2.10.0} # of torch, aarch64 has small CPU builds up to here
fetch() { "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 -d "$arm/wheels" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 "$@"; }
if [ ! -e "$arm/sysroot/ready" ]; then
    rm -rf "$arm" && mkdir -p "$arm/site"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 bookworm "$arm/sysroot" > "$arm/debootstrap.log"
    find "$arm/sysroot" -name '*.deb' -exec dpkg-deb -x {} "$arm/sysroot" \;
    fetch "torch==$torch" numpy psutil pandas
    for wheel in "$arm"/wheels/*.whl; do unzip -q -o "$wheel" -d "$arm/site"; done
    "$python" -m pip install -q --target "$arm/site" --no-deps typing_extensions sympy mpmath networkx jinja2 fsspec filelock pytest \
        pluggy iniconfig packaging pygments rich python-dateutil six setuptools
    touch "$arm/sysroot/ready"
fi
rm -rf "$arm/tree" && mkdir "$arm/tree" && git ls-files -z | xargs -0 cp --parents -t "$arm/tree"
(cd "$arm/tree" && CXX=aarch64-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-aarch64 PYTHONPATH="$arm/site" FASTKD_BUILD=cpu \
    "$python" setup.py -q build_ext --inplace --build-temp "$arm/objects")
rm -f "$arm"/tree/fastkd/_C*.so # named after this machine
prefix=$arm/sysroot/usr paths=$arm/tree:$arm/tree/tests:$arm/tree/tests/ops:$arm/site
exec qemu-aarch64-static -L "$arm/sysroot" -E PYTHONHOME="$prefix" -E PYTHONPATH="$paths" -E OMP_NUM_THREADS=1 \
    "$prefix/bin/python3.11" "$arm/tree/tests/on_arm.py"

#!/bin/sh
# gpu.sh STEP...: all there is to do on a machine with an NVIDIA GPU, in calls of less than ten minutes each, which
# may be repeated. Run from anywhere. Needs the CUDA toolkit, make and a C and a C++ compiler; no network.
#
#   sh tests/gpu.sh build      the examples, tests, benchmarks, for this GPU's architecture; what GPU it is
#   sh tests/gpu.sh test       make CUDA=1 test
#   sh tests/gpu.sh sanitize   make CUDA=1 sanitize: memcheck, racecheck, initcheck, synccheck; TOOLS="memcheck" for one
#   sh tests/gpu.sh kernels    build/bench_cuda: every kernel alone, at the shapes of the four networks;
#                              KERNELS="resnet50 128 224 bf16" for one network, batch, size and precision
#   sh tests/gpu.sh wgmma      the kernels of one network with Hopper's wgmma, then without; KERNELS as above
#   sh tests/gpu.sh peers      make CUDA=1 bench-peers, ROUNDS (1); needs a Python (PYTHON, python3) with torch,
#                              torchvision and numpy; summary.txt says which of the bars are met
#   sh tests/gpu.sh real       build/incremental --precision bf16 --arch resnet18-cifar on cifar10 and tinyimagenet100
#
# Set by environment variables:
#   OUT=DIR          where logs go: STEP.log, and what else a step leaves (build/gpu)
#   DATA=DIR         has the folders cifar10 and tinyimagenet100 (SET/{train,test}/CLASS/*.jpg), or their SET.tar.xz
#                    (data or ../shared/data, whichever is there)
#   CUDA_ARCH=NN     [what the GPU says]; NVCC=FILE where nvcc is in neither PATH nor /usr/local/cuda/bin
#   LIMIT=S          seconds after which a step is stopped (570); what it said until then is in its log
#   EPOCHS=N         of real (10)
#   DRY=1            no GPU: the same script with the kernels on the CPU (tests/cuda_shim.h), tiny, stand-ins for the
#                    sanitizer and PyTorch. It tries this script, and measures nothing
#
# Exits with 1 if a step failed. A step that lacks something has not failed, but says so in a line with SKIPPED.
cd "$(dirname "$0")/.." || exit 1
steps="build test sanitize kernels wgmma peers real"
usage() { sed -n '2,/^# Exits/s/^# \{0,1\}//p' tests/gpu.sh; }
if [ $# -eq 0 ]; then
    usage
    exit 2
fi
for step in "$@"; do
    case " $steps " in
    *" $step "*) ;;
    *)
        echo "gpu.sh: there is no step $step: $steps" >&2
        exit 2
        ;;
    esac
done
unset MAKEFLAGS MFLAGS MAKELEVEL # a make of its own, whoever called

out=${OUT:-build/gpu}
if ! { mkdir -p "$out" && : > "$out/.try" && rm "$out/.try"; } 2> /dev/null; then
    echo "gpu.sh: nothing can be written to $out: logs go to build/gpu"
    out=build/gpu
    mkdir -p $out || exit 1
fi
out=$(cd "$out" && pwd)
limit=${LIMIT:-570}
nvcc=${NVCC:-$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null)}
arch=${CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d '. ')}
case $arch in
*[!0-9\ ]* | '') arch=90 ;; # it did not say
esac

skip() { echo "SKIPPED $*"; }

# make with what all calls share.
gpu_make() { make CUDA=1 CUDA_ARCH="$arch" NVCC="$nvcc" "$@"; }

# Whether there is a GPU: the CUDA runtime's word, since device files have other names in other places.
has_gpu() {
    mkdir -p build/gpu
    cat > build/gpu/gpu.cu << 'END'
#include <cuda_runtime.h>
#include <stdio.h>
int main() {
    int n = 0, driver = 0, runtime = 0;
    cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (!e && n) e = cudaGetDeviceProperties(&p, 0);
    if (e || !n) {
        puts(e ? cudaGetErrorString(e) : "no device");
        return 1;
    }
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    printf("%s, sm_%d%d, %.1f GB, %d multiprocessors, L2 %.0f MB, driver %d, runtime %d\n", p.name, p.major, p.minor,
           p.totalGlobalMem * 1e-9, p.multiProcessorCount, p.l2CacheSize * 1e-6, driver, runtime);
    return 0;
}
END
    [ -n "$nvcc" ] && "$nvcc" -o build/gpu/gpu build/gpu/gpu.cu > build/gpu/gpu.log 2>&1 && build/gpu/gpu
}

do_build() {
    [ -n "$DRY" ] && { make build/shim/bench_cuda build/shim/bench build/shim/incremental; return; }
    "$nvcc" --version | tail -n 2
    gpu_make all bench bench-cuda $(for t in tests/test_*.c; do echo build/tests/$(basename "$t" .c); done)
}
do_test() {
    [ -n "$DRY" ] && { build/shim/bench train resnet8 2 8 1 1 bf16; return; }
    gpu_make test
}
do_sanitize() {
    [ -n "$DRY" ] && { echo "a stand-in for compute-sanitizer"; return; }
    if [ ! -x "$(dirname "$nvcc")/compute-sanitizer" ] && ! command -v compute-sanitizer > /dev/null; then
        skip "sanitize: compute-sanitizer is neither beside $nvcc nor in PATH"
        return
    fi
    gpu_make sanitize ${TOOLS:+TOOLS="$TOOLS"}
}
do_kernels() {
    [ -n "$DRY" ] && { build/shim/bench_cuda stem 1 8 bf16; return; }
    gpu_make bench-cuda && build/bench_cuda $KERNELS # the words are its arguments
}
do_wgmma() {
    [ -n "$DRY" ] && { build/shim/bench_cuda stem 1 8 bf16 && build/shim/bench_cuda stem 1 8 bf16 mma; return; }
    gpu_make bench-cuda && build/bench_cuda ${KERNELS:-resnet18-cifar 512 32 bf16} &&
        build/bench_cuda ${KERNELS:-resnet18-cifar 512 32 bf16} mma
}
do_peers() {
    peers=build/gpu/peers
    if [ -n "$DRY" ]; then # stand-ins that say what the real ones would
        rm -rf $peers
        mkdir -p $peers
        line="median_ms=2.000 min_ms=1.900 max_ms=2.100 images_per_s=64000.0 peak_rss_mb=90"
        gpu="unsynced_ms=1.500 device_mb=300 gflop=1.0 mbyte=10 threads=4"
        printf '#!/bin/sh\necho "%s %s"\n' "$line" "$gpu" > $peers/bench
        {
            echo '#!/bin/sh'
            echo 'case "$*" in'
            echo '-c*name*) echo stand-in ;; -c*) echo 0 ;; *peak*) echo threads=$3 fma_gflops=1000 triad_gbps=100 ;;'
            echo "*) echo $(echo "$line" | sed 's/=2/=7/') $gpu ;;"
            echo esac
        } > $peers/python
        chmod +x $peers/bench $peers/python
        PEERS=$peers PYTHON=$peers/python ROUNDS=1 STEPS=1 python3 tests/bench_peers.py $peers/bench cuda
    else
        python=${PYTHON:-python3}
        if ! "$python" -c 'import torch, torchvision, numpy' 2> /dev/null; then
            skip "peers: $python cannot import torch, torchvision and numpy"
            return
        fi
        gpu_make bench-peers PEERS=$peers PYTHON="$python" ROUNDS="${ROUNDS:-1}"
    fi
    status=$?
    cp $peers/summary.txt $peers/results.csv "$out" 2> /dev/null
    if [ $status -eq 0 ]; then cat $peers/summary.txt; fi
    return $status
}
do_real() {
    if [ -n "$DRY" ]; then
        build/shim/incremental --precision bf16 --arch resnet8 --width 4 --size 8 --chunks 2 --chunk-size 4 --epochs 1 \
            --batch 4 --methods warm,ckca
        return
    fi
    gpu_make build/incremental || return
    data=$DATA
    for place in data ../shared/data; do
        [ -z "$data" ] && [ -d $place ] && data=$place
    done
    failed=0
    for set in cifar10 tinyimagenet100; do
        folder=$data/$set
        if [ ! -d "$folder/train" ] && [ -f "$data/$set.tar.xz" ]; then
            folder=build/gpu/data/$set
            [ -d $folder/train ] || { mkdir -p build/gpu/data && tar -xJf "$data/$set.tar.xz" -C build/gpu/data; }
        fi
        if [ ! -d "$folder/train" ]; then
            skip "real: no pictures of $set in DATA=${data:-} (neither $set/train nor $set.tar.xz)"
            continue
        fi
        echo "$set"
        build/incremental --data "$folder" --precision bf16 --arch resnet18-cifar --augment --chunks 10 --batch 128 \
            --epochs "${EPOCHS:-10}" --methods scratch-chunk,warm,ckca --out "build/gpu/$set" --resume || failed=1
        cp "build/gpu/$set/results.csv" "$out/$set.csv" 2> /dev/null
    done
    return $failed
}

if [ -n "$INSIDE" ]; then # of the limit, see below
    do_$1
    exit
fi
status=0
if [ -z "$DRY" ]; then
    if [ -z "$nvcc" ]; then
        for step in "$@"; do skip "$step: there is no nvcc: put it in PATH, or set NVCC"; done
        exit 0
    fi
    if ! gpu=$(has_gpu); then
        [ -n "$gpu" ] || gpu=$(tail -n 3 build/gpu/gpu.log)
        case " $* " in
        *" build "*) echo "gpu.sh: no GPU here ($gpu): building is all that can be done" && set -- build ;;
        *)
            for step in "$@"; do skip "$step: no GPU here ($gpu)"; done
            exit 0
            ;;
        esac
    fi
    echo "$gpu" | tee "$out/gpu.txt"
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv 2> /dev/null |
        tee -a "$out/gpu.txt"
fi
for step in "$@"; do
    start=$(date +%s)
    echo "== $step"
    # A pipe's status is its last program's: the step's goes by a file. timeout ends all that the step has started.
    rm -f build/gpu/status
    mkdir -p build/gpu
    {
        OUT=$out INSIDE=1 timeout "$limit" sh tests/gpu.sh "$step" 2>&1
        echo $? > build/gpu/status
    } | tee "$out/$step.log"
    code=$(cat build/gpu/status)
    [ "$code" -ne 124 ] || echo "gpu.sh: $step was stopped after $limit s" | tee -a "$out/$step.log"
    [ "$code" -eq 0 ] || status=1
    echo "== $step: status $code, $(($(date +%s) - start)) s" | tee -a "$out/$step.log"
done
exit $status

# ckca.h is a header: nothing is built to use it. This builds the examples, the tests and the benchmark.
#
#   make                    the examples, in build/
#   make demo               the main example on drawn pictures; checkpoints, table and plot in build/demo
#   make test               all tests; ends with "N passed, N failed"
#   make check              only the test programs
#   make asan               the test programs under AddressSanitizer and UndefinedBehaviorSanitizer
#   make shim               the GPU kernels, tested on the CPU (tests/cuda_shim.h)
#   make fuzz TIME=60       libFuzzer on the file readers for TIME seconds (needs clang)
#   make bench              build/bench (see tests/bench.c)
#   make bench-peers        a table against PyTorch and this machine's peak rates. Installs PyTorch into build/peers
#                           unless PYTHON has it; ROWS="train resnet20", ROUNDS=3 and more: see tests/bench_peers.py
#   make install PREFIX=    ckca.h, ckca_cuda.cu, LICENSE, ckca.pc, CMake's package; DESTDIR is honoured
#   make shared             build/libckca.so, a shared library for programs in other languages
#   make install-shared     install, the shared library and ckca-shared.pc
#   make clean
#   make MPI=1              the examples for mpirun, with mpicc (Debian: libopenmpi-dev or libmpich-dev): see examples/mpi.h
#   make CUDA=1 ...         any of these for an NVIDIA GPU, with ckca_cuda.cu (needs the CUDA toolkit)
#   make CUDA=1 MPI=1 NCCL=1  one GPU per process, gradients summed by NCCL (NCCL_HOME= if it is not in the usual places)
#   make CUDA=1 bench-peers against PyTorch on the same GPU
#   make CUDA=1 bench-cuda  build/bench_cuda: every kernel alone, checked, and timed beside its floor
#   make CUDA=1 sanitize    the op tests under the four tools of compute-sanitizer; TOOLS="memcheck initcheck" for some
#
# Variables: CC, CFLAGS, LDFLAGS; MPICC; THREADS= builds without threads, STB= without JPEG and PNG files,
# TURBOJPEG= without libjpeg-turbo where it is installed (stb_image then decodes JPEGs);
# NVCC; CUDA_ARCH="80 90": the GPUs to compile for (newer ones use the PTX of the last; 90 is sm_90a, which has wgmma).

# One job per processor unless -j says otherwise.
ifeq ($(filter -j%,$(MAKEFLAGS)),)
MAKEFLAGS += -j$(or $(shell getconf _NPROCESSORS_ONLN 2>/dev/null),2)
endif

ifeq ($(origin CC),default)
CC := $(firstword $(foreach c,cc gcc clang,$(if $(shell command -v $(c) 2>/dev/null),$(c))))
endif
CFLAGS ?= -O3
WARNINGS = -Wall -Wextra -Wpedantic
PREFIX ?= /usr/local
TIME ?= 60
VERSION := $(shell sed -n 's/.*define CKCA_VERSION "\(.*\)".*/\1/p' ckca.h 2>/dev/null)
# Before 1.0 a new minor version may change declarations, after that only a new major one.
SONAME := libckca.so.$(shell echo $(VERSION) | sed 's/\.[0-9]*$$//; /^0/!s/\..*//')

# Finds what this machine has by compiling probes, only for targets that compile.
ifeq ($(filter clean help install,$(MAKECMDGOALS)),)
ifeq ($(CC),)
$(error no C compiler found: install gcc or clang, or set CC)
endif
HASH := \#
probe = $(shell mkdir -p build && printf '%s\n' '$(HASH)include $(1)' 'int main(void) { return 0; }' | \
    $(CC) $(CFLAGS) $(2) -x c -o build/probe.$$$$ - 2>/dev/null && echo yes; rm -f build/probe.$$$$)
ifeq ($(origin THREADS),undefined)
THREADS := $(if $(call probe,<pthread.h>,-pthread),-pthread)
endif
ifeq ($(origin STB),undefined)
STB := $(or $(call probe,<stb/stb_image.h>),$(call probe,<stb_image.h>,-I.))
endif
ifeq ($(origin TURBOJPEG),undefined)
TURBOJPEG := $(if $(STB),$(call probe,<turbojpeg.h>,-lturbojpeg))
endif
ifneq ($(CUDA),)
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
ifeq ($(NVCC),)
$(error CUDA=1, but there is no nvcc: install the CUDA toolkit, put it in PATH, or set NVCC)
endif
endif
ifneq ($(MPI),)
MPICC ?= $(shell command -v mpicc 2>/dev/null)
ifeq ($(MPICC),)
$(error MPI=1, but there is no mpicc: install an MPI (Debian: libopenmpi-dev), put it in PATH, or set MPICC)
endif
endif
ifeq ($(MAKELEVEL),0)
$(info compiler: $(CC), $(shell $(CC) --version 2>/dev/null | head -n 1))
$(info threads: $(or $(THREADS),none (one thread)); stb_image: $(if $(STB),found,none (no JPEG or PNG; Debian: libstb-dev)); \
    TurboJPEG: $(if $(TURBOJPEG),found,none (stb_image decodes JPEG; Debian: libturbojpeg0-dev))$(if $(MPI),; MPI: $(MPICC)))
endif
endif

FEATURES = $(or $(THREADS),-DCKCA_NO_THREADS) $(if $(STB),,-DCKCA_NO_STB_IMAGE) $(if $(TURBOJPEG),-DCKCA_TURBOJPEG)
ALL_CFLAGS = -std=c99 -D_DEFAULT_SOURCE $(if $(CUDA),-DCKCA_CUDA) $(WARNINGS) $(CFLAGS) $(FEATURES) -I.
ASAN_CFLAGS = -std=c99 -D_DEFAULT_SOURCE -Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    -fno-omit-frame-pointer $(FEATURES) -I.
LIBS = -lm $(if $(TURBOJPEG),-lturbojpeg)

# The GPU path: one more object, and CKCA_CUDA for everything that includes ckca.h.
CUDA_ARCH ?= 75 80 86 89 90
ifneq ($(CUDA),)
CUDA_HOME := $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
CUDA_OBJECT = build/ckca_cuda.o
LIBS += -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcublas -lcudart -lstdc++
NVCC_FLAGS = -O3 -std=c++17 -ccbin $(or $(firstword $(CXX)),c++) \
    $(foreach a,$(patsubst 90,90a,$(CUDA_ARCH)),-gencode arch=compute_$a,code=sm_$a) \
    -gencode arch=compute_$(lastword $(CUDA_ARCH)),code=compute_$(lastword $(CUDA_ARCH))
endif

# mpicc runs this compiler, Open MPI's and MPICH's.
ifneq ($(MPI),)
EXAMPLE_CC = OMPI_CC='$(CC)' MPICH_CC='$(CC)' $(MPICC) -DCKCA_MPI
endif
EXAMPLE_CC ?= $(CC)
comma := ,
ifneq ($(NCCL),)
NVCC_FLAGS += -DCKCA_NCCL $(if $(NCCL_HOME),-I$(NCCL_HOME)/include)
LIBS += $(if $(NCCL_HOME),-L$(NCCL_HOME)/lib -Wl$(comma)-rpath$(comma)$(NCCL_HOME)/lib) -lnccl
endif

EXAMPLES := $(patsubst examples/%.c,build/%,$(wildcard examples/*.c))
TESTS := $(patsubst tests/%.c,build/tests/%,$(sort $(wildcard tests/test_*.c)))
SCRIPTS := $(sort $(wildcard tests/test_*.sh))
ASAN := $(filter-out build/asan/test_cuda,$(patsubst build/tests/%,build/asan/%,$(TESTS)))
# What `make test` leaves to `make asan`: the same code runs under the sanitizers in test_train, test_ops and test_conv.
ASAN_QUICK := $(filter-out $(patsubst %,build/asan/test_%,nets safety transfer),$(ASAN))
# The GPU kernels on the CPU, see tests/cuda_shim.h.
SHIM := $(patsubst %,build/shim/test_%,conv cuda nets ops ranks train) build/shim/bench_cuda
ifneq ($(CUDA),) # the host build covers sanitizers, compilers and the shim
SCRIPTS := tests/test_examples.sh
ASAN :=
ASAN_QUICK :=
SHIM :=
ONE := JOBS=1 # one test at a time may use the GPU's memory
endif

.PHONY: all demo test check bench bench-peers bench-cuda asan shim sanitize fuzz shared install install-shared clean \
    help FORCE
.DELETE_ON_ERROR:

all: $(EXAMPLES)

demo: build/incremental
	rm -rf build/demo
	mkdir -p build/demo
	build/incremental --out build/demo

test: $(EXAMPLES) $(TESTS) $(ASAN_QUICK) $(SHIM) $(if $(CUDA),,build/shim/bench build/shim/incremental) build/bench
	CC="$(CC)" $(ONE) sh tests/run.sh $(TESTS) $(SCRIPTS) $(ASAN_QUICK) $(SHIM)

check: $(TESTS)
	$(ONE) sh tests/run.sh $(TESTS)

asan: $(ASAN)
	sh tests/run.sh $(ASAN)

shim: $(SHIM)
	sh tests/run.sh $(SHIM)

# Tests let allocations fail on purpose: those are no errors. New memory is left as it is (CKCA_FRESH), so that
# initcheck sees who reads it before anything is there.
SANITIZER = $(or $(wildcard $(CUDA_HOME)/bin/compute-sanitizer),$(shell command -v compute-sanitizer 2>/dev/null))
SANITIZE = "$(SANITIZER)" --error-exitcode 1 --report-api-errors no
TOOLS = memcheck racecheck initcheck synccheck
ifneq ($(filter sanitize,$(MAKECMDGOALS)),)
ifeq ($(CUDA),)
$(error sanitize looks at what runs on a GPU: make CUDA=1 sanitize)
endif
ifeq ($(SANITIZER),)
$(error no compute-sanitizer in $(CUDA_HOME)/bin or in PATH: it comes with the CUDA toolkit, as the package cuda-sanitizer)
endif
endif
sanitize: $(patsubst %,build/sanitize/test_%,conv ops cuda)
	set -e; for tool in $(TOOLS); do for test in $^; do more=; [ $$tool != memcheck ] || more='--leak-check full'; \
	    echo "$$tool $$test"; $(SANITIZE) --tool $$tool $$more $$test; done; done

build/sanitize/ckca_cuda.o: ckca_cuda.cu ckca.h build/flags
	@mkdir -p build/sanitize
	$(NVCC) $(NVCC_FLAGS) -lineinfo -DCKCA_FRESH=-1 -c $< -o $@

build/sanitize/%: tests/%.c ckca.h $(wildcard tests/*.h) build/flags build/sanitize/ckca_cuda.o
	$(CC) $(ALL_CFLAGS) -g $< build/sanitize/ckca_cuda.o -o $@ $(LDFLAGS) $(LIBS)

bench: build/bench

bench-cuda: build/bench_cuda

# The variables reach the script through the environment.
bench-peers: build/bench
	python3 tests/bench_peers.py build/bench $(if $(CUDA),cuda)

# Changes only when the flags do; everything is rebuilt then.
build/flags: FORCE
	@mkdir -p build/tests build/asan build/shim
	@echo '$(CC) $(MPI)$(MPICC) $(ALL_CFLAGS) $(LDFLAGS) $(LIBS) $(ASAN_CFLAGS) $(NVCC_FLAGS)' > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

build/%: examples/%.c ckca.h $(wildcard examples/*.h) build/flags $(CUDA_OBJECT)
	$(EXAMPLE_CC) $(ALL_CFLAGS) $< $(CUDA_OBJECT) -o $@ $(LDFLAGS) $(LIBS)

build/%: tests/%.c ckca.h $(wildcard tests/*.h) build/flags $(CUDA_OBJECT)
	$(CC) $(ALL_CFLAGS) $< $(CUDA_OBJECT) -o $@ $(LDFLAGS) $(LIBS)

# Only these tests are about the vector kernels. The others do without: they then compile in a tenth of the time, and in
# a quarter under the sanitizers (private: build/flags stays).
KERNEL_TESTS = conv cuda nets ops train
PLAIN_TESTS := $(filter-out $(patsubst %,build/tests/test_%,$(KERNEL_TESTS)),$(TESTS))
$(PLAIN_TESTS): private CFLAGS += -O1 -DCKCA_NO_SIMD
$(patsubst build/tests/%,build/asan/%,$(PLAIN_TESTS)) build/asan/test_train build/asan/test_nets: private ASAN_CFLAGS += -DCKCA_NO_SIMD

build/tests/%: tests/%.c ckca.h $(wildcard tests/*.h) build/flags $(CUDA_OBJECT)
	$(CC) $(ALL_CFLAGS) $< $(CUDA_OBJECT) -o $@ $(LDFLAGS) $(LIBS)

build/asan/%: tests/%.c ckca.h $(wildcard tests/*.h) build/flags
	$(CC) $(ASAN_CFLAGS) $(WARNINGS) $< -o $@ $(LDFLAGS) $(LIBS)

build/ckca_cuda.o: ckca_cuda.cu ckca.h build/flags
	$(NVCC) $(NVCC_FLAGS) -c $< -o $@

# New memory is NaN there.
SHIM_FLAGS = -O2 -g -Wall -Wextra -I. -DCKCA_CUDA -DCKCA_CUDA_SHIM -DCKCA_FRESH=0xff
build/shim/ckca_cuda.o: ckca_cuda.cu ckca.h tests/cuda_shim.h build/flags
	$(CXX) -std=c++17 $(SHIM_FLAGS) -O3 -Wno-unknown-pragmas -Wno-maybe-uninitialized -include tests/cuda_shim.h \
	    -x c++ -c $< -o $@

build/shim/test_%: tests/test_%.c build/shim/ckca_cuda.o ckca.h $(wildcard tests/*.h) build/flags
	$(CC) -std=c99 -D_DEFAULT_SOURCE $(SHIM_FLAGS) $(FEATURES) -O1 -c $< -o $@.o
	$(CXX) $(THREADS) $@.o build/shim/ckca_cuda.o -o $@ $(LIBS)

# The linker hands the library's calls of ops to tests/bench_cuda.cu, which names those it wants.
WRAP := $(shell sed -n 's/^OP(\([a-z_]*\)).*/-Wl,--wrap=ckca__op_\1/p; \
    s/.*__wrap_\(ckca__device_[a-z]*\).*/-Wl,--wrap=\1/p' tests/bench_cuda.cu 2>/dev/null)

build/bench_cuda.o: tests/bench_cuda.cu ckca_cuda.cu ckca.h build/flags
	$(NVCC) $(NVCC_FLAGS) --extended-lambda -lineinfo -I. -c $< -o $@

build/bench_cuda: build/bench_cuda.o ckca.h build/flags
	echo '#include "ckca.h"' | $(CC) $(ALL_CFLAGS) -DCKCA_IMPLEMENTATION -x c -c - -o $@.library.o
	$(CC) $(THREADS) $(WRAP) $< $@.library.o -o $@ $(LDFLAGS) $(LIBS) -ldl

build/shim/bench_cuda: tests/bench_cuda.cu ckca_cuda.cu ckca.h tests/cuda_shim.h build/flags
	$(CXX) -std=c++17 $(SHIM_FLAGS) -O1 -g0 -Wno-unknown-pragmas -Wno-maybe-uninitialized -include tests/cuda_shim.h \
	    -x c++ -c $< -o $@.o
	echo '#include "ckca.h"' | $(CC) -std=c99 -D_DEFAULT_SOURCE $(SHIM_FLAGS) $(FEATURES) -O1 -DCKCA_IMPLEMENTATION \
	    -x c -c - -o $@.library.o
	$(CXX) $(THREADS) $(WRAP) $@.o $@.library.o -o $@ $(LIBS)

# The benchmark and the main example through the shim: for tests/test_gpu.sh, which tries tests/gpu.sh.
build/shim/bench: tests/bench.c build/shim/ckca_cuda.o ckca.h build/flags
	$(CC) -std=c99 -D_DEFAULT_SOURCE $(SHIM_FLAGS) $(FEATURES) -O1 -c $< -o $@.o
	$(CXX) $(THREADS) $@.o build/shim/ckca_cuda.o -o $@ $(LIBS)

build/shim/incremental: examples/incremental.c build/shim/ckca_cuda.o ckca.h $(wildcard examples/*.h) build/flags
	$(CC) -std=c99 -D_DEFAULT_SOURCE $(SHIM_FLAGS) $(FEATURES) -O1 -c $< -o $@.o
	$(CXX) $(THREADS) $@.o build/shim/ckca_cuda.o -o $@ $(LIBS)

build/fuzz: tests/fuzz.c ckca.h build/flags
	clang -std=c99 -D_DEFAULT_SOURCE -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
	    $(FEATURES) -I. $< -o $@ $(LIBS)

fuzz: build/fuzz
	mkdir -p build/corpus
	FUZZ_SEEDS=build/corpus build/fuzz -max_len=6400 -max_total_time=$(TIME) -print_final_stats=1 -artifact_prefix=build/ build/corpus

# Only the public names are visible. ckca_cuda.cu is compiled again, as code that may lie anywhere.
build/libckca.so: ckca.h build/flags $(if $(CUDA),build/shared_cuda.o)
	echo '#include "ckca.h"' | $(CC) $(ALL_CFLAGS) -fPIC -shared -fvisibility=hidden -DCKCA_IMPLEMENTATION \
	    -DCKCA_API='__attribute__((visibility("default")))' -Wl,-soname,$(SONAME) -x c - -x none \
	    $(if $(CUDA),build/shared_cuda.o) -o $@ $(LDFLAGS) $(LIBS)

build/shared_cuda.o: ckca_cuda.cu ckca.h build/flags
	$(NVCC) $(NVCC_FLAGS) -Xcompiler -fPIC,-fvisibility=hidden -c $< -o $@

shared: build/libckca.so

# ckca_cuda.cu is source that each program compiles for its own GPUs: pkg-config --variable=cuda_source ckca names it.
install:
	install -d '$(DESTDIR)$(PREFIX)/include' '$(DESTDIR)$(PREFIX)/lib/pkgconfig' '$(DESTDIR)$(PREFIX)/share/ckca' \
	    '$(DESTDIR)$(PREFIX)/share/doc/ckca' '$(DESTDIR)$(PREFIX)/lib/cmake/ckca'
	install -m 644 ckca.h '$(DESTDIR)$(PREFIX)/include/ckca.h'
	install -m 644 ckca_cuda.cu '$(DESTDIR)$(PREFIX)/share/ckca/ckca_cuda.cu'
	install -m 644 LICENSE '$(DESTDIR)$(PREFIX)/share/doc/ckca/LICENSE'
	install -m 644 ckca-config.cmake ckca-config-version.cmake '$(DESTDIR)$(PREFIX)/lib/cmake/ckca'
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' \
	    'cuda_source=$${prefix}/share/ckca/ckca_cuda.cu' '' 'Name: ckca' \
	    'Description: Incremental training of image classifiers, a single C header' 'Version: $(VERSION)' \
	    'Cflags: -I$${includedir}' 'Libs: -lm -pthread' > '$(DESTDIR)$(PREFIX)/lib/pkgconfig/ckca.pc'

install-shared: install build/libckca.so
	install -m 755 build/libckca.so '$(DESTDIR)$(PREFIX)/lib/libckca.so.$(VERSION)'
	ln -sf libckca.so.$(VERSION) '$(DESTDIR)$(PREFIX)/lib/$(SONAME)'
	ln -sf $(SONAME) '$(DESTDIR)$(PREFIX)/lib/libckca.so'
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' 'libdir=$${prefix}/lib' '' 'Name: ckca-shared' \
	    'Description: ckca as a shared library' 'Version: $(VERSION)' \
	    'Cflags: -I$${includedir}' 'Libs: -L$${libdir} -lckca' > '$(DESTDIR)$(PREFIX)/lib/pkgconfig/ckca-shared.pc'

clean:
	rm -rf build

help:
	@sed -n 's/^#   //p' Makefile

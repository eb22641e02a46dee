#!/usr/bin/env python3
"""tests/bench.c in PyTorch: the same command line, the same line of results.

    python3 tests/torch_bench.py train NET BATCH SIZE THREADS STEPS [PRECISION] [SETTING]
    python3 tests/torch_bench.py infer NET BATCH SIZE THREADS STEPS [PRECISION] [SETTING]
    python3 tests/torch_bench.py distill STUDENT TEACHER BATCH SIZE THREADS STEPS [PRECISION] [SETTING]
    python3 tests/torch_bench.py peak PRECISION          peak rates of a GPU: matrix products and copies

On the processor SETTING is one of
    tuned          channels-last, and glibc's malloc set to use and keep huge pages (Linux): the default
    tcmalloc       channels-last, and tcmalloc instead of malloc
    channels-last  channels-last only
    default        PyTorch without settings
and on a GPU
    eager          channels-last, cuDNN benchmark mode
    graph          the same, the whole step captured as a CUDA graph and replayed
with float32, tf32 or bf16 (AMP: autocast, float32 weights) as PRECISION; the processor knows float32 only.

Eager mode except for graph. On a GPU the warm-up takes at least a second and STEPS at least two; each step is
synchronised, as bench synchronises for its report of each; unsynced_ms is the time of a step where only the last of two
seconds' worth is synchronised, device_mb the most that PyTorch's allocator has held (CUDA's own share is not in it, nor in
bench's). SGD is the fused one. A network that only evaluates (infer, and the teacher of distill) has its batch norms
folded into its convolutions, as in ckca.h. Pictures are ready in memory; bench distill augments its own.
"""
import ctypes.util, os, resource, statistics, sys, time

MALLOC = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:"
          "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864")
SETTINGS = ("tuned", "tcmalloc", "channels-last", "default", "eager", "graph")
PRECISIONS = ("float32", "tf32", "bf16")


def tcmalloc():
    """The name of the tcmalloc library, or None."""
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")


def arguments():
    """Returns mode, nets, numbers, precision, setting; restarts the process if it needs another allocator."""
    argv = sys.argv[1:]
    nets = 2 if argv[:1] == ["distill"] else 1
    setting = argv.pop() if argv and argv[-1] in SETTINGS else "tuned"
    precision = argv.pop() if argv and argv[-1] in PRECISIONS else "float32"
    if argv == ["peak"]:
        return "peak", [], [], precision, "eager"
    if argv[:1] not in (["train"], ["infer"], ["distill"]) or len(argv) != 1 + nets + 4:
        sys.exit(__doc__)
    if precision != "float32" and setting not in ("eager", "graph"):
        sys.exit(f"torch_bench: {precision} needs a GPU, with eager or graph")
    wanted = {"tuned": {"GLIBC_TUNABLES": MALLOC}, "tcmalloc": {"LD_PRELOAD": tcmalloc() or ""}}.get(setting, {})
    if wanted.get("LD_PRELOAD") == "":
        sys.exit("torch_bench: tcmalloc not found (Debian: libtcmalloc-minimal4)")
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.execve(sys.executable, [sys.executable] + sys.argv, dict(os.environ, **wanted))
    return argv[0], argv[1:1 + nets], [int(v) for v in argv[1 + nets:]], precision, setting


MODE, NETS, NUMBERS, PRECISION, SETTING = arguments()

import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from torch_nets import build

WARM_UP = 3
WARM_UP_S, TIMED_S = (1, 2) if SETTING in ("eager", "graph") else (0, 0)
DEVICE = "cuda" if SETTING in ("eager", "graph") else "cpu"


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def captured(step):
    """The step as a CUDA graph, after the warm-up on a side stream that capturing requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak():
    """Multiply-adds of 8192 x 8192 matrices in the precision, and bytes of copying 1 GiB: the best of at least ten
    tries in three seconds, of which the first warms up."""
    side, words = 8192, 1 << 28
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16 if PRECISION == "bf16" else torch.float32)
            for _ in range(2))
    x, y = (torch.ones(words, device=DEVICE) for _ in range(2))
    best, tries, begin = [float("inf")] * 2, 0, time.perf_counter()
    while tries < WARM_UP + 10 or time.perf_counter() - begin < WARM_UP_S + TIMED_S:
        for i, step in enumerate((lambda: torch.mm(a, b), lambda: y.copy_(x))):
            wait()
            start = time.perf_counter()
            step()
            wait()
            best[i] = min(best[i], time.perf_counter() - start)
        tries += 1
    print(f"threads={PRECISION} fma_gflops={2e-9 * side ** 3 / best[0]:.0f} triad_gbps={8e-9 * words / best[1]:.0f} "
          f"device={torch.cuda.get_device_name().replace(' ', '_')}")


def make(name, layout, evaluate):
    classes = 1000 if name in ("resnet18", "resnet34", "resnet50") else 10
    net = build(name, classes)
    last = ".bn3.weight" if "50" in name else ".bn2.weight"
    for key, p in net.named_parameters():
        if key.startswith("layer") and key.endswith(last):
            torch.nn.init.constant_(p, 0.2)
    if evaluate:
        net = fuse(net.eval())
    return net.to(DEVICE, memory_format=layout), classes


def main():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("torch_bench: PyTorch finds no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = PRECISION != "float32"
    torch.backends.cudnn.benchmark = True
    if MODE == "peak":
        peak()
        return
    mode, name = MODE, NETS[0]
    batch, size, threads, steps = NUMBERS
    layout = torch.contiguous_format if SETTING == "default" else torch.channels_last
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    net, classes = make(name, layout, mode == "infer")
    x = torch.randn(batch, 3, size, size).to(DEVICE, memory_format=layout)
    y = torch.randint(0, classes, (batch,)).to(DEVICE)
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    opt = torch.optim.SGD([{"params": decay, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}],
                          lr=0.01, momentum=0.9, nesterov=True, fused=True)
    if mode == "distill":
        teacher, _ = make(NETS[1], layout, True)
        features = {}
        net.fc.register_forward_pre_hook(lambda _, args: features.update(student=args[0]))
        teacher.fc.register_forward_pre_hook(lambda _, args: features.update(teacher=args[0]))
        weight = torch.rand(classes).to(DEVICE)  # AdaKD CLASS: the teacher's accuracy on each class

    def precision():
        return torch.autocast(DEVICE, torch.bfloat16, enabled=PRECISION == "bf16", cache_enabled=SETTING != "graph")

    def infer():
        with torch.inference_mode(), precision():
            net(x)

    def train():
        with precision():
            z = net(x)
            loss = F.cross_entropy(z, y)
            if mode == "distill":
                with torch.inference_mode():
                    zo = teacher(x)
                zo, fo, t = zo.clone(), features["teacher"].clone(), 2.0
                kl = F.kl_div(F.log_softmax(z / t, 1), F.log_softmax(zo / t, 1), reduction="none",
                              log_target=True).sum(1)
                loss = loss + 2.0 * t * t * (weight[y] * kl).mean()
                loss = loss + (1 - F.cosine_similarity(features["student"], fo)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()

    if mode != "infer":
        net.train()
    step = infer if mode == "infer" else train
    if SETTING == "graph":
        step = captured(step)
    begin, done = time.perf_counter(), 0
    while done < WARM_UP or time.perf_counter() - begin < WARM_UP_S:
        step()
        wait()
        done += 1
    ms, begin = [], time.perf_counter()
    while len(ms) < steps or time.perf_counter() - begin < TIMED_S:
        start = time.perf_counter()
        step()
        wait()
        ms.append(1e3 * (time.perf_counter() - start))
    gpu = ""
    if DEVICE == "cuda":
        count, start = int(1e3 * TIMED_S / statistics.mean(ms)) + 1, time.perf_counter()
        for _ in range(count):
            step()
        wait()
        gpu = (f" unsynced_ms={1e3 * (time.perf_counter() - start) / count:.3f} "
               f"device_mb={torch.cuda.max_memory_reserved() / 1e6:.0f}")
    steps = len(ms)
    ms.sort()
    median = statistics.median(ms)
    other = f"teacher={NETS[1]} " if mode == "distill" else ""
    print(f"net={name} {other}batch={batch} size={size} threads={threads} steps={steps} median_ms={median:.3f} "
          f"min_ms={ms[0]:.3f} max_ms={ms[-1]:.3f} images_per_s={1e3 * batch / median:.1f} "
          f"peak_rss_mb={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}{gpu}")


if __name__ == "__main__":
    main()

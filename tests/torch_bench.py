#!/usr/bin/env python3
"""tests/bench.c in PyTorch: the same command line, the same line of figures.

    python3 tests/torch_bench.py train NET BATCH SIZE THREADS STEPS
    python3 tests/torch_bench.py infer NET BATCH SIZE THREADS STEPS
    python3 tests/torch_bench.py distill STUDENT TEACHER BATCH SIZE THREADS STEPS

Eager, channels-last, and with the malloc settings that suit it best on Linux (huge pages, memory kept); set
GLIBC_TUNABLES yourself, empty even, to run with others.
"""
import os, resource, statistics, sys, time

TUNED = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:"
         "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864")
if "GLIBC_TUNABLES" not in os.environ:
    os.execve(sys.executable, [sys.executable] + sys.argv, dict(os.environ, GLIBC_TUNABLES=TUNED))

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from torch_nets import build

WARM_UP = 3


def make(name):
    classes = 1000 if name in ("resnet18", "resnet34", "resnet50") else 10
    net = build(name, classes).to(memory_format=torch.channels_last)
    last = ".bn3.weight" if "50" in name else ".bn2.weight"
    for key, p in net.named_parameters():
        if key.startswith("layer") and key.endswith(last):
            torch.nn.init.constant_(p, 0.2)
    return net, classes


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("train", "infer", "distill") or \
            len(sys.argv) != (8 if sys.argv[1] == "distill" else 7):
        sys.exit(__doc__)
    mode, name = sys.argv[1:3]
    batch, size, threads, steps = map(int, sys.argv[-4:])
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    net, classes = make(name)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    y = torch.randint(0, classes, (batch,))
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    opt = torch.optim.SGD([{"params": decay, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}],
                          lr=0.01, momentum=0.9, nesterov=True)
    if mode == "distill":
        teacher, _ = make(sys.argv[3])
        teacher.eval()
        features = {}
        net.fc.register_forward_pre_hook(lambda _, args: features.update(student=args[0]))
        teacher.fc.register_forward_pre_hook(lambda _, args: features.update(teacher=args[0]))
        weight = torch.rand(classes)  # AdaKD CLASS: the teacher's accuracy on each class

    def infer():
        with torch.inference_mode():
            net(x)

    def train():
        z = net(x)
        loss = F.cross_entropy(z, y)
        if mode == "distill":
            with torch.inference_mode():
                zo = teacher(x)
            zo, fo, t = zo.clone(), features["teacher"].clone(), 2.0
            kl = F.kl_div(F.log_softmax(z / t, 1), F.log_softmax(zo / t, 1), reduction="none", log_target=True).sum(1)
            loss = loss + 2.0 * t * t * (weight[y] * kl).mean()
            loss = loss + (1 - F.cosine_similarity(features["student"], fo)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()

    net.train(mode != "infer")
    step = infer if mode == "infer" else train
    ms = []
    for i in range(WARM_UP + steps):
        start = time.perf_counter()
        step()
        ms.append(1e3 * (time.perf_counter() - start))
    ms = sorted(ms[WARM_UP:])
    median = statistics.median(ms)
    other = f"teacher={sys.argv[3]} " if mode == "distill" else ""
    print(f"net={name} {other}batch={batch} size={size} threads={threads} steps={steps} median_ms={median:.2f} "
          f"min_ms={ms[0]:.2f} max_ms={ms[-1]:.2f} images_per_s={1e3 * batch / median:.1f} "
          f"peak_rss_mb={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


if __name__ == "__main__":
    main()

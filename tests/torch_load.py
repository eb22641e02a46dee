#!/usr/bin/env python3
"""torch_load.py BENCH DIR [SIZE [ROUNDS]]: pictures per second of this library's loader (build/bench load) beside
torchvision's: ImageFolder, RandomResizedCrop(SIZE), flip, ToTensor, DataLoader with 2 workers, on DIR/CLASS/*.jpg.

In turn, ROUNDS times; the medians count. "per core" divides by the processor time that all threads and workers took, so
that other work on the machine matters less. Needs torch and torchvision."""
import os
import re
import statistics
import subprocess
import sys
import time

EPOCHS, BATCH, WORKERS = 8, 64, 2


def torch_round(folder, size):
    """Runs in a process of its own, so that its children's time is that of its workers."""
    import torch
    from torchvision import datasets, transforms
    torch.set_num_threads(1)
    made = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(),
                               transforms.ToTensor()])
    loader = torch.utils.data.DataLoader(datasets.ImageFolder(folder, made), batch_size=BATCH, shuffle=True,
                                         num_workers=WORKERS, persistent_workers=True)
    for _ in loader:  # starts the workers
        pass
    before = time.perf_counter(), os.times(), workers_seconds(loader)
    count = 0
    for _ in range(EPOCHS):
        for pictures, _ in loader:
            count += len(pictures)
    after = time.perf_counter(), os.times(), workers_seconds(loader)
    cpu = after[1].user + after[1].system - before[1].user - before[1].system + after[2] - before[2]
    print(count / (after[0] - before[0]), count / cpu)


def workers_seconds(loader):
    ticks = 0
    for worker in loader._iterator._workers:
        with open("/proc/%d/stat" % worker.pid) as file:
            fields = file.read().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main():
    if sys.argv[1] == "--torch":
        return torch_round(sys.argv[2], int(sys.argv[3]))
    bench, folder = sys.argv[1:3]
    size = sys.argv[3] if len(sys.argv) > 3 else "224"
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 3
    ours, theirs = [], []
    for _ in range(rounds):
        line = subprocess.run([bench, "load", folder, str(BATCH), size, str(WORKERS), str(EPOCHS)], check=True,
                              capture_output=True, text=True).stdout
        value = {k: float(v) for k, v in re.findall(r"(\w+)=([\d.]+)", line)}
        ours.append((value["images_per_s"], value["pictures"] * value["epochs"] / value["cpu_s"]))
        line = subprocess.run([sys.executable, __file__, "--torch", folder, size], check=True, capture_output=True,
                              text=True).stdout
        theirs.append(tuple(map(float, line.split())))
    median = [[statistics.median(column) for column in zip(*rows)] for rows in (ours, theirs)]
    print("size=%s ours_per_s=%.0f ours_per_core=%.0f torchvision_per_s=%.0f torchvision_per_core=%.0f ratio=%.2f "
          "ratio_per_core=%.2f" % (size, *median[0], *median[1], median[0][0] / median[1][0],
                                   median[0][1] / median[1][1]))


main()

#!/usr/bin/env python3
"""Fine-tuning a pre-trained ResNet-18 on ten pictures a class, ours against the same recipe in PyTorch.

    python3 tests/finetune_peers.py TRAIN WEIGHTS PICTURES [SIZE] [SEEDS]

TRAIN is build/train; WEIGHTS a checkpoint of a resnet18 that it has written (--arch resnet18 --size SIZE), PICTURES a
folder with train/CLASS and test/CLASS. Needs torch, numpy, Pillow and safetensors. For every seed ten pictures of each
class are drawn, and both programs train the head alone and then, from WEIGHTS again, everything (the backbone at a tenth
of the learning rate), in turn, with one thread and without augmentation: SGD with Nesterov momentum, cosine after one
epoch of warm-up, the same epochs, batch, learning rate and weight decay. PyTorch runs the frozen backbone in evaluation
mode without gradients; ours computes its features once. Prints accuracy on the test pictures and seconds of training.
"""
import math, os, random, re, shutil, statistics, subprocess, sys, tempfile, time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

PER_CLASS, EPOCHS, BATCH, DECAY = 10, 30, 20, 5e-4
LR = {"head": 0.03, "all": 0.03}


class Block(nn.Module):
    def __init__(self, inp, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or inp != out:
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet18(nn.Module):
    """With torchvision's names."""

    def __init__(self, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        for i, width in enumerate((64, 128, 256, 512)):
            inp = max(64, width // 2)
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(inp, width, 2 if i else 1), Block(width, width, 1)))
        self.fc = nn.Linear(512, classes)

    def features(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


def read(folder, size, mean, std):
    """All pictures of folder/CLASS as ckca_open_folder reads them: covers size x size, then a centre crop."""
    pictures, labels = [], []
    for label, name in enumerate(sorted(os.listdir(folder))):
        for file in sorted(os.listdir(f"{folder}/{name}")):
            with Image.open(f"{folder}/{name}/{file}") as im:
                im = im.convert("RGB")
                w, h = im.size
                scale = size / min(w, h)
                im = im.resize((max(size, round(w * scale)), max(size, round(h * scale))), Image.BILINEAR)
                left, top = (im.size[0] - size) // 2, (im.size[1] - size) // 2
                pictures.append(np.asarray(im.crop((left, top, left + size, top + size)), dtype=np.float32) / 255)
            labels.append(label)
    x = (torch.from_numpy(np.stack(pictures)) - mean) / std
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def theirs(weights, folder, size, mode, seed):
    torch.manual_seed(seed)
    with safe_open(weights, "pt") as f:
        meta = f.metadata()
        state = {k: f.get_tensor(k) for k in f.keys() if not k.startswith(("momentum.", "fc."))}
    mean, std = (torch.tensor([float(v) for v in meta[f"ckca.{k}"].split()]) for k in ("mean", "std"))
    x, y = read(f"{folder}/train", size, mean, std)
    x_test, y_test = read(f"{folder}/test", size, mean, std)
    net = ResNet18(int(y.max()) + 1)
    missing = net.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys, missing
    net = net.to(memory_format=torch.channels_last)
    groups = []
    for name, p in net.named_parameters():
        head = name.startswith("fc.")
        if mode == "head" and not head:
            p.requires_grad_(False)
            continue
        groups.append(dict(params=[p], factor=1 if head else 0.1, weight_decay=DECAY if p.dim() > 1 else 0))
    sgd = torch.optim.SGD(groups, lr=LR[mode], momentum=0.9, nesterov=True)
    net.train()
    if mode == "head":
        net.eval()
    batches, step, start = math.ceil(len(y) / BATCH), 0, time.perf_counter()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(y))
        for first in range(0, len(y), BATCH):
            i = order[first:first + BATCH]
            rate = (step + 1) / batches if step < batches else \
                0.5 * (1 + math.cos(math.pi * (step - batches) / ((EPOCHS - 1) * batches)))
            for group in sgd.param_groups:
                group["lr"] = LR[mode] * rate * group["factor"]
            sgd.zero_grad(set_to_none=True)
            if mode == "head":
                with torch.no_grad():
                    f = net.features(x[i])
                logits = net.fc(f)
            else:
                logits = net(x[i])
            F.cross_entropy(logits, y[i]).backward()
            sgd.step()
            step += 1
    seconds = time.perf_counter() - start
    net.eval()
    with torch.no_grad():
        right = sum(int((net(x_test[i:i + 100]).argmax(1) == y_test[i:i + 100]).sum()) for i in range(0, len(y_test), 100))
    return 100 * right / len(y_test), seconds


def ours(train, weights, folder, size, mode, seed):
    command = [train, "--data", folder, "--size", size, "--arch", "resnet18", "--from", weights, "--epochs", EPOCHS,
               "--batch", BATCH, "--lr", LR[mode], "--weight-decay", DECAY, "--seed", seed, "--threads", 1]
    command += ["--freeze", "backbone"] if mode == "head" else ["--backbone-lr", 0.1]
    text = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout
    match = re.search(r"test: accuracy ([\d.]+)%.*trained in ([\d.]+) s", text)
    return float(match[1]), float(match[2])


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    train, weights, pictures = sys.argv[1:4]
    size, seeds = int(sys.argv[4]) if len(sys.argv) > 4 else 32, int(sys.argv[5]) if len(sys.argv) > 5 else 3
    torch.set_num_threads(1)
    results = {}
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            os.symlink(os.path.abspath(f"{pictures}/test"), f"{folder}/test")
            for name in sorted(os.listdir(f"{pictures}/train")):
                os.makedirs(f"{folder}/train/{name}")
                files = sorted(os.listdir(f"{pictures}/train/{name}"))
                for file in random.Random(f"{seed} {name}").sample(files, PER_CLASS):
                    shutil.copy(f"{pictures}/train/{name}/{file}", f"{folder}/train/{name}/{file}")
            for mode in ("head", "all"):
                a, b = ours(train, weights, folder, size, mode, seed), theirs(weights, folder, size, mode, seed)
                results.setdefault(mode, []).append((a, b))
                print(f"seed {seed} {mode}: ours {a[0]:.2f}% in {a[1]:.1f} s, PyTorch {b[0]:.2f}% in {b[1]:.1f} s, "
                      f"{b[1] / max(a[1], 0.05):.2f} times", flush=True)
    for mode, rows in results.items():
        mean = [statistics.mean(r[k][0] for r in rows) for k in (0, 1)]
        ratio = statistics.median(r[1][1] / max(r[0][1], 0.05) for r in rows)
        print(f"{mode}: mean accuracy ours {mean[0]:.2f}%, PyTorch {mean[1]:.2f}% (difference {mean[0] - mean[1]:+.2f}); "
              f"{ratio:.2f} times as fast (median; at most 0.05 s is counted as 0.05)")


if __name__ == "__main__":
    main()

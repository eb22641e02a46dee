#!/usr/bin/env python3
"""The PyTorch peer of examples/train.c: the same ResNet, recipe and pictures, for comparing accuracies.

    python3 tests/torch_train.py --data DIR [--depth 20] [--epochs 10] [--seed 1] [--threads 2]

DIR holds train/CLASS/*.jpg and test/CLASS/*.jpg. Recipe: batch 128, SGD with Nesterov momentum 0.9, weight decay 5e-4
(not on batch norm and biases), cosine from --lr to zero after one epoch of linear warm-up, pad-4 crop and flip,
projection shortcuts, Kaiming initialisation as torchvision's, pictures normalised by the training set's mean and deviation.
"""
import argparse, math, os, time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image


class Block(nn.Module):
    def __init__(self, inp, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or inp != out:
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2, with projection shortcuts; depth = 6n + 2."""

    def __init__(self, depth=20, width=16, classes=10, channels=3):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inp = width
        for s in range(3):
            out = width << s
            blocks = [Block(inp if b == 0 else out, out, 2 if s and b == 0 else 1) for b in range(n)]
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
            inp = out
        self.fc = nn.Linear(inp, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def load(folder, classes):
    jobs = [(os.path.join(folder, c, f), i) for i, c in enumerate(classes) for f in sorted(os.listdir(os.path.join(folder, c)))]
    with ThreadPoolExecutor(4) as pool:
        pics = list(pool.map(lambda j: np.asarray(Image.open(j[0]).convert("RGB")), jobs))
    return torch.from_numpy(np.stack(pics)).permute(0, 3, 1, 2).contiguous(), torch.tensor([j[1] for j in jobs])


def augment(x, gen):
    """Pad-4 random crop (black border) and horizontal flip on a batch of bytes."""
    n, _, h, w = x.shape
    x = F.pad(x, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, n), generator=gen)
    flip = torch.rand(n, generator=gen) < 0.5
    rows = dy[:, None] + torch.arange(h)
    cols = dx[:, None] + torch.where(flip[:, None], torch.arange(w - 1, -1, -1), torch.arange(w))
    return x[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", required=True)
    ap.add_argument("--depth", type=int, default=20)
    ap.add_argument("--epochs", type=int, default=10)
    ap.add_argument("--batch", type=int, default=128)
    ap.add_argument("--lr", type=float, default=0.1)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    gen = torch.Generator().manual_seed(a.seed)
    classes = sorted(os.listdir(os.path.join(a.data, "train")))
    x, y = load(os.path.join(a.data, "train"), classes)
    xt, yt = load(os.path.join(a.data, "test"), classes)
    sample = x.float() / 255
    mean, std = sample.mean((0, 2, 3))[:, None, None], sample.std((0, 2, 3))[:, None, None]
    del sample
    prepare = lambda b: ((b.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    net = CifarResNet(a.depth, classes=len(classes)).to(memory_format=torch.channels_last)
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    opt = torch.optim.SGD([{"params": decay, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}],
                          lr=a.lr, momentum=0.9, nesterov=True)
    per = math.ceil(len(x) / a.batch)
    total, warm = per * a.epochs, per
    step = 0
    for epoch in range(a.epochs):
        net.train()
        order, start, losses = torch.randperm(len(x), generator=gen), time.time(), 0.0
        for b in order.split(a.batch):
            lr = a.lr * (step + 1) / warm if step < warm else 0.5 * a.lr * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
            for g in opt.param_groups:
                g["lr"] = lr
            loss = F.cross_entropy(net(prepare(augment(x[b], gen))), y[b])
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses += loss.item() * len(b)
            step += 1
        net.eval()
        with torch.no_grad():
            right = sum((net(prepare(bx)).argmax(1) == by).sum().item() for bx, by in zip(xt.split(500), yt.split(500)))
        print(f"epoch={epoch + 1} loss={losses / len(x):.4f} test={100 * right / len(xt):.2f} seconds={time.time() - start:.1f}", flush=True)


if __name__ == "__main__":
    main()

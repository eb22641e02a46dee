"""Writes tests/reference/transfer.safetensors, by PyTorch: grouped convolutions with their gradients, and a small network
that is trained for three SGD steps with some of its layers frozen, or at a lower learning rate.

    python tests/torch_transfer.py [OUT]          (needs torch and safetensors; read by tests/test_transfer.c)

Maps are N x H x W x C; weights have PyTorch's order.
"""
import sys
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

torch.manual_seed(11)
torch.set_num_threads(1)
out = {}


def put(name, t):
    out[name] = t.detach().clone().contiguous()


def nhwc(t):
    return t.permute(0, 2, 3, 1)


for groups, stride in ((2, 1), (4, 2)):
    x, w, b = torch.randn(2, 8, 7, 6), torch.randn(12, 8 // groups, 3, 3) * 0.3, torch.randn(12)
    x.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    y = F.conv2d(x, w, b, stride, 1, groups=groups)
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    for name, t in dict(x=x, y=y, dy=dy, d_x=dx, w=w, d_w=dw).items():
        put(f"grouped{groups}.{name}", nhwc(t))
    put(f"grouped{groups}.b", b)
    put(f"grouped{groups}.d_b", db)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, 1, 1, bias=True), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        return self.fc(x.mean((2, 3)))


start = Net()
for module in start.modules():
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.3), nn.init.normal_(module.bias, 0, 0.3)
        module.running_mean.normal_(0, 0.5), module.running_var.uniform_(0.5, 2)
for name, t in start.state_dict().items():
    if "num_batches" not in name:
        put(f"start.{name}", t)
pictures, labels = torch.randn(6, 3, 7, 6), torch.randint(0, 5, (6,))
put("pictures", nhwc(pictures))
put("labels", labels.int())

# The layers that are frozen, and the factor of the learning rate of all others but fc.
CASES = (((), 1), (("conv1", "bn1"), 1), (("bn2", "conv3"), 1), (("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), 1),
         (("bn1",), 1), (("conv1", "bn1", "conv2"), 1), ((), 0.1), (("fc",), 1))
for case, (frozen, factor) in enumerate(CASES):
    net = Net()
    net.load_state_dict(start.state_dict())
    groups = []
    for name, p in net.named_parameters():
        layer = name.split(".")[0]
        if layer in frozen:
            p.requires_grad_(False)
            continue
        decay = 0.05 if p.dim() > 1 else 0
        groups.append(dict(params=[p], lr=0.1 * (1 if layer == "fc" else factor), weight_decay=decay))
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(3):
        net.train()
        for name, module in net.named_modules():
            if name in frozen:
                module.eval()
        sgd.zero_grad()
        logits = net(pictures)
        F.cross_entropy(logits, labels).backward()
        put(f"case{case}.logits{step}", logits)
        sgd.step()
    for name, t in net.state_dict().items():
        if "num_batches" not in name:
            put(f"case{case}.{name}", t)

save_file(out, sys.argv[1] if len(sys.argv) > 1 else "tests/reference/transfer.safetensors")

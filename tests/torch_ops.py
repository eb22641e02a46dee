"""Writes tests/reference/ops.safetensors: inputs, outputs and gradients of single ops at tiny shapes, by PyTorch.

    python tests/torch_ops.py [OUT]          (needs torch and safetensors; read by tests/test_ops.c)

Maps are N x H x W x C and convolution weights K x R x S x C, as in ckca.h; labels are int32. "NAME.d_X" is the gradient
with respect to X, given the gradient "NAME.dy" of NAME's output; for losses, the gradient of the loss.
"""
import sys
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.manual_seed(7)
torch.set_num_threads(1)
out = {}


def put(name, t):
    out[name] = t.detach().clone().contiguous()


def nhwc(t):  # N x C x H x W, or K x C x R x S
    return t.permute(0, 2, 3, 1)


def leaf(*shape, scale=1.0, shift=0.0):
    return (torch.randn(*shape) * scale + shift).requires_grad_()


def backward(name, y, inputs, maps=()):
    """Stores y, a random gradient of it, and every input with its gradient."""
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    turn = lambda t: nhwc(t) if t.dim() == 4 else t
    put(f"{name}.y", turn(y))
    put(f"{name}.dy", turn(dy))
    for (key, value), grad in zip(inputs.items(), grads):
        put(f"{name}.{key}", turn(value))
        put(f"{name}.d_{key}", turn(grad))


# Convolutions of ResNets: kernel, stride, pad.
for kernel, stride, pad in ((3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (7, 2, 3)):
    x, w, b = leaf(2, 3, 9, 8), leaf(5, 3, kernel, kernel, scale=0.3), leaf(5)
    backward(f"conv{kernel}_{stride}", F.conv2d(x, w, b, stride, pad), dict(x=x, w=w, b=b))

x, w, b = leaf(4, 6), leaf(3, 6), leaf(3)
backward("linear", F.linear(x, w, b), dict(x=x, w=w, b=b))

# Batch norm followed by a residual and ReLU; then the same in evaluation mode, with the updated statistics.
x, residual = leaf(3, 5, 4, 6, scale=2, shift=3), leaf(3, 5, 4, 6)
gamma, beta = leaf(5, shift=1, scale=0.3), leaf(5)
mean, var = torch.randn(5), torch.rand(5) + 0.5
put("bn.mean0", mean)
put("bn.var0", var)
y = F.relu(F.batch_norm(x, mean, var, gamma, beta, training=True) + residual)
backward("bn", y, dict(x=x, residual=residual, gamma=gamma, beta=beta))
put("bn.mean1", mean)
put("bn.var1", var)
put("bn.eval", nhwc(F.relu(F.batch_norm(x, mean, var, gamma, beta, training=False) + residual)))

x = leaf(2, 4, 9, 8)
backward("maxpool", F.max_pool2d(x, 3, 2, 1), dict(x=x))
x = leaf(2, 4, 5, 3)
backward("avgpool", F.adaptive_avg_pool2d(x, 1), dict(x=x))

# Losses.
n, k, t = 6, 7, 3.0
z, zo = leaf(n, k, scale=2), torch.randn(n, k) * 2
labels = torch.randint(0, k, (n,))
class_weight = torch.rand(k)
put("loss.z", z)
put("loss.zo", zo)
put("loss.labels", labels.int())
put("loss.class_weight", class_weight)
for name, smoothing in (("ce", 0.0), ("ce_smooth", 0.1)):
    loss = F.cross_entropy(z, labels, label_smoothing=smoothing)
    put(f"{name}.loss", loss.reshape(1))
    put(f"{name}.d_z", torch.autograd.grad(loss, z)[0])

for name, a in dict(CLASS=class_weight[labels], CONSTANT=torch.ones(n)).items():
    kl = F.kl_div(F.log_softmax(z / t, 1), F.softmax(zo / t, 1), reduction="none").sum(1)
    loss = t * t * (a * kl).mean()
    put(f"adakd_{name}.loss", loss.reshape(1))
    put(f"adakd_{name}.d_z", torch.autograd.grad(loss, z)[0])

f, fo = leaf(5, 8), torch.randn(5, 8)
maps, maps_o = leaf(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
put("feat.f", f)
put("feat.fo", fo)
put("feat.maps", nhwc(maps))
put("feat.maps_o", nhwc(maps_o))
# CENTROID: the features of two chunks give class means; class 2 of 4 was in neither, so its pictures have no term.
chunks = [(torch.randn(5, 8), torch.tensor([0, 1, 3, 0, 3])), (torch.randn(4, 8), torch.tensor([3, 1, 1, 0]))]
means = torch.stack([torch.cat([x[y == c] for x, y in chunks]).sum(0) / max(1, sum((y == c).sum() for _, y in chunks))
                     for c in range(4)])
of, known = torch.tensor([3, 2, 0, 1, 3]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
put("feat.means", means)
put("feat.labels", of.int())

for name, value, loss in (("COSINE", f, (1 - F.cosine_similarity(f, fo)).mean()),
                          ("CENTROID", f, (known * (1 - F.cosine_similarity(f, means[of]))).mean()),
                          ("STAGES", maps, (1 - F.cosine_similarity(maps.flatten(1), maps_o.flatten(1))).mean())):
    grad = torch.autograd.grad(loss, value)[0]
    put(f"featreg_{name}.loss", loss.reshape(1))
    put(f"featreg_{name}.d_f", nhwc(grad) if grad.dim() == 4 else grad)

# SGD over three steps, and clipping.
w0, gs = torch.randn(37), torch.randn(3, 37)
put("sgd.w", w0)
put("sgd.g", gs)
for name, nesterov in (("nesterov", True), ("plain", False)):
    w = torch.nn.Parameter(w0.clone())
    sgd = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=nesterov)
    for g in gs:
        w.grad = g.clone()
        sgd.step()
    put(f"sgd.{name}.w", w)
    put(f"sgd.{name}.v", sgd.state[w]["momentum_buffer"])
for name, limit in (("clip_low", 0.5), ("clip_high", 100.0)):
    w = torch.nn.Parameter(w0.clone())
    w.grad = gs[0].clone()
    torch.nn.utils.clip_grad_norm_([w], limit)
    put(name, w.grad)

# EWC's penalty, drawn from a generator of its own so that the tensors after it stay as they are.
own = torch.Generator().manual_seed(11)
old, fisher, w = torch.randn(37, generator=own), torch.rand(37, generator=own), w0.clone().requires_grad_()
loss = 0.7 / 2 * (fisher * (w - old) ** 2).sum()
put("ewc.old", old)
put("ewc.fisher", fisher)
put("ewc.loss", loss.reshape(1))
put("ewc.d_w", torch.autograd.grad(loss, w)[0])

# Group norm, of one group, some and as many as channels.
for groups in (1, 3, 6):
    x, gamma, beta = leaf(3, 6, 4, 5, scale=2, shift=3), leaf(6, shift=1, scale=0.3), leaf(6)
    backward(f"gn{groups}", F.group_norm(x, groups, gamma, beta), dict(x=x, gamma=gamma, beta=beta))

save_file(out, sys.argv[1] if len(sys.argv) > 1 else "tests/reference/ops.safetensors")

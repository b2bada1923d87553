"""The same network, data and algorithm in plain PyTorch: answers every line read with seconds.

Run by peers.py in a process of its own: `torch_peer.py '{"form": "loop", ...}'`. Forms are `loop`
(a Python loop over tasks, as in most code), `vmap` (`torch.func` over tasks) and `second` (the loop
with second derivatives).
"""

# pyright: reportMissingImports=false

import itertools
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as nn

INNER_RATE = 0.1


def batch_of(setting, per_class, rng):
    """Random pictures and labels for every task."""
    n, size = setting["ways"] * per_class, setting["size"]
    x = rng.random((setting["tasks"], n, setting["channels"], size, size), np.float32)
    y = np.tile(np.repeat(np.arange(setting["ways"]), per_class), (setting["tasks"], 1))
    return torch.tensor(x), torch.tensor(y)


def parameters(setting):
    """Kernels and biases, layer by layer."""
    out, channels, size = [], setting["channels"], setting["size"]
    for _ in range(4):
        scale = (2 / (9 * channels)) ** 0.5
        out += [
            torch.randn(setting["width"], channels, 3, 3) * scale,
            torch.zeros(setting["width"]),
        ]
        channels = setting["width"]
        size = size // 2 if setting["pooling"] == "max" else -(-size // 2)
    features = channels * size * size
    return [*out, torch.randn(setting["ways"], features) * 0.05, torch.zeros(setting["ways"])]


def image_loss(pooling):
    """The loss of four blocks of convolution."""

    def loss(params, x, y):
        for i in range(4):
            stride = 2 if pooling == "stride" else 1
            x = nn.conv2d(x, params[2 * i], params[2 * i + 1], stride=stride, padding=1)
            x = nn.relu(nn.batch_norm(x, None, None, training=True))
            if pooling == "max":
                x = nn.max_pool2d(x, 2)
        return nn.cross_entropy(nn.linear(x.flatten(1), params[-2], params[-1]), y)

    return loss


def loop(loss, params, support, query, steps, second=False):
    """The mean meta-gradient, task by task."""
    totals = [torch.zeros_like(p) for p in params]
    tasks = len(support[0])
    for t in range(tasks):
        fast = [p.detach().requires_grad_() for p in params]
        start = fast
        for _ in range(steps):
            value = loss(fast, support[0][t], support[1][t])
            grads = torch.autograd.grad(value, fast, create_graph=second)
            fast = [p - INNER_RATE * g for p, g in zip(fast, grads, strict=True)]
            if not second:
                fast = [p.detach().requires_grad_() for p in fast]
        value = loss(fast, query[0][t], query[1][t])
        grads = torch.autograd.grad(value, start if second else fast)
        for total, g in zip(totals, grads, strict=True):
            total += g / tasks
    return totals


def vmapped(loss, params, support, query, steps):
    """The same through `torch.func`: all tasks at once."""
    grad = torch.func.grad(loss)

    def one_task(xs, ys, xq, yq):
        fast = params
        for _ in range(steps):
            grads = grad(fast, xs, ys)
            fast = [p - INNER_RATE * g for p, g in zip(fast, grads, strict=True)]
        return grad(fast, xq, yq)

    return [g.mean(0) for g in torch.func.vmap(one_task)(*support, *query)]


def images(setting):
    """A call that computes one meta-gradient."""
    rng = np.random.default_rng(0)
    support, query = (batch_of(setting, setting[n], rng) for n in ("shots", "queries"))
    params, loss = parameters(setting), image_loss(setting["pooling"])
    forms = {
        "loop": lambda: loop(loss, params, support, query, setting["steps"]),
        "second": lambda: loop(loss, params, support, query, setting["steps"], second=True),
        "vmap": lambda: vmapped(loss, params, support, query, setting["steps"]),
    }
    return forms[setting["form"]]


def sine_waves(setting):
    """A call of a whole outer step: tasks drawn, meta-gradient, Adam."""
    widths = [1, 40, 40, 1]
    params = []
    for inputs, outputs in itertools.pairwise(widths):
        params += [torch.randn(outputs, inputs) * (2 / inputs) ** 0.5, torch.zeros(outputs)]
    params = [p.requires_grad_() for p in params]
    optimizer = torch.optim.Adam(params, 1e-3)
    tasks, points = setting["tasks"], setting["points"]

    def loss(params, x, y):
        for i in range(2):
            x = nn.relu(nn.linear(x, params[2 * i], params[2 * i + 1]))
        return nn.mse_loss(nn.linear(x, params[-2], params[-1]), y)

    def draw():
        amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1)
        phase = torch.pi * torch.rand(tasks, 1, 1)
        xs = [10 * torch.rand(tasks, points, 1) - 5 for _ in range(2)]
        return [(x, amplitude * torch.sin(x - phase)) for x in xs]

    form = {"loop": loop, "vmap": vmapped}[setting["form"]]

    def step():
        support, query = draw()
        detached = [p.detach() for p in params]
        for p, g in zip(
            params, form(loss, detached, support, query, setting["steps"]), strict=True
        ):
            p.grad = g
        optimizer.step()

    return step


def main():
    """Answers lines until there are no more."""
    setting = json.loads(sys.argv[1])
    if setting.get("threads"):
        torch.set_num_threads(setting["threads"])
    torch.manual_seed(0)
    call = sine_waves(setting) if "points" in setting else images(setting)
    for _ in range(2):
        call()
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        calls = int(line)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        print((time.perf_counter() - start) / calls, flush=True)


if __name__ == "__main__":
    main()

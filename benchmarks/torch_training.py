"""Few-shot training as a plain PyTorch loop over tasks: the peer of time_to_accuracy.py.

`torch_training.py SETTING PICTURES` prints a JSON line of tasks, seconds and accuracy now and then;
the first is the start-up.
"""

# pyright: reportMissingImports=false

import json
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as nn


def network(params, x):
    """Four strided blocks with batch statistics; features scaled to norm sqrt(D); linear head."""
    for i in range(4):
        kernel, scale, shift = params[3 * i : 3 * i + 3]
        x = nn.conv2d(x, kernel, stride=2, padding=1)
        x = nn.batch_norm(x, None, None, scale, shift, training=True, eps=1e-3)
        if i < 3:
            x = nn.relu(x)
    x = x.flatten(1)
    x = x * torch.rsqrt((x**2).mean(1, keepdim=True) + 1e-6)
    return nn.linear(x, params[-2], params[-1])


def episode(pictures, ways, queries, generator, *, turned=False):
    """Support and query pictures with labels; classes and examples without replacement.

    With `turned` every class is turned by its own multiple of 90 degrees.
    """

    def examples(c):
        picked = torch.randperm(pictures.shape[1], generator=generator)[: queries + 1]
        turns = int(torch.randint(4, (), generator=generator)) if turned else 0
        return torch.rot90(pictures[c, picked], turns, (-2, -1))

    classes = torch.randperm(len(pictures), generator=generator)[:ways]
    picked = torch.stack([examples(c) for c in classes]).float() / 255
    labels = torch.arange(ways)
    support = picked[:, 0], labels
    query = picked[:, 1:].flatten(0, 1), labels.repeat_interleave(queries)
    return support, query


def adapted(body, ways, support, setting):
    """The body with a fresh head of zeros, after the inner steps."""
    head = [torch.zeros(ways, setting["features"]), torch.zeros(ways)]
    fast = [p.detach().requires_grad_() for p in (*body, *head)]
    rates = [setting["inner_rate"]] * len(body) + [setting["head_rate"] * ways] * 2
    for _ in range(setting["inner_steps"]):
        grads = torch.autograd.grad(nn.cross_entropy(network(fast, support[0]), support[1]), fast)
        moved = zip(fast, grads, rates, strict=True)
        fast = [(p - rate * g).detach().requires_grad_() for p, g, rate in moved]
    return fast


def accuracy(body, pictures, setting):
    """The mean over unseen tasks, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    right = []
    for _ in range(setting["eval_tasks"]):
        support, query = episode(
            pictures, setting["ways"], setting["queries"], generator, turned=setting["turned"]
        )
        fast = adapted(body, setting["ways"], support, setting)
        with torch.no_grad():
            right.append((network(fast, query[0]).argmax(1) == query[1]).float().mean())
    return float(torch.stack(right).mean())


def main():
    """Trains."""
    start = time.perf_counter()
    setting, data = json.loads(sys.argv[1]), np.load(sys.argv[2])
    torch.set_num_threads(setting["threads"])
    torch.manual_seed(0)
    train, test = (torch.tensor(data[n]).permute(0, 1, 4, 2, 3) for n in ("train", "test"))
    width, channels, size = setting["width"], train.shape[2], train.shape[-1]
    body = []
    for _ in range(4):
        body += [torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5]
        body += [torch.ones(width), torch.zeros(width)]
        channels, size = width, -(-size // 2)
    setting["features"] = width * size * size
    body = [p.requires_grad_() for p in body]
    optimizer = torch.optim.Adam(body, setting["rate"])
    generator = torch.Generator().manual_seed(0)
    tasks = setting["tasks_per_step"]
    tell(0, time.perf_counter() - start, 0.0)
    seconds = 0.0
    for step in range(setting["steps"]):
        start = time.perf_counter()
        decay = 0.5 * (1 + math.cos(math.pi * step / setting["steps"]))
        optimizer.param_groups[0]["lr"] = setting["rate"] * (0.01 + 0.99 * decay)
        totals = [torch.zeros_like(p) for p in body]
        for _ in range(tasks):
            ways = setting["train_ways"]
            support, query = episode(train, ways, setting["queries"], generator)
            fast = adapted(body, ways, support, setting)
            loss = nn.cross_entropy(network(fast, query[0]), query[1])
            grads = torch.autograd.grad(loss, fast[: len(body)])
            for total, g in zip(totals, grads, strict=True):
                total += g / tasks
        for p, total in zip(body, totals, strict=True):
            p.grad = total
        optimizer.step()
        seconds += time.perf_counter() - start
        if (step + 1) % setting["judge_every"] == 0 or step + 1 == setting["steps"]:
            tell((step + 1) * tasks, seconds, accuracy(body, test, setting))


def tell(tasks, seconds, accuracy):
    """One line."""
    print(json.dumps({"tasks": tasks, "seconds": seconds, "accuracy": accuracy}), flush=True)


if __name__ == "__main__":
    main()

"""What `grad_norms` costs, on the blog's small convnet and 256 MNIST digits.

    python benchmarks/gradnorm.py --out benchmarks/results

All ways are measured in turn, again and again, in one process, so that what else the machine does falls on all of them. A ratio is the
median over the rounds of the ratio within a round. The loop differentiates one loss at a time, as written in the blog; it runs in a few rounds only.
"""
import argparse, shlex, sys, time
from pathlib import Path
from statistics import median

import torch, torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from fastai_is.analysis import machine
from fastai_is.data import mnist
from fastai_is.gradnorm import grad_norms

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--bs', type=int, default=256)
ap.add_argument('--rounds', type=int, default=20)
ap.add_argument('--loop-rounds', type=int, default=3)
ap.add_argument('--out', type=Path, default=None)
args = ap.parse_args()

device = 'cuda' if torch.cuda.is_available() else 'cpu'
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
    nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 10)).to(device)
xb, yb = (t.to(device).as_subclass(torch.Tensor) for t in mnist(bs=args.bs).train.one_batch())
loss_func, params = nn.CrossEntropyLoss(), list(model.parameters())

def plain():
    model.zero_grad()
    loss_func(model(xb), yb).backward()

def loop():
    losses = F.cross_entropy(model(xb), yb, reduction='none')
    return torch.stack([sum(g.square().sum() for g in torch.autograd.grad(l, params, create_graph=True)).sqrt().detach() for l in losses])

named = {n: p.detach() for n, p in model.named_parameters()}
def one_loss(ps, x, y): return loss_func(functional_call(model, ps, x[None]), y[None])
def func(): return sum(g.flatten(1).square().sum(1) for g in vmap(grad(one_loss), (None, 0, 0))(named, xb, yb).values()).sqrt()

def ours(): return grad_norms(model, loss_func, xb, yb)

def seconds(f):
    if device == 'cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()-start

torch.testing.assert_close(ours(), loop(), rtol=1e-4, atol=1e-7)
torch.testing.assert_close(ours(), func(), rtol=1e-4, atol=1e-7)
model.zero_grad()
for f in (plain, ours, func)*3: f()
times = {f: [] for f in (plain, ours, func, loop)}
for i in range(args.rounds):
    for f in (plain, ours, func) + ((loop,) if i < args.loop_rounds else ()): times[f].append(seconds(f))

def ratio(a, b): return median(x/y for x, y in zip(times[a], times[b]))
names = {plain: 'plain forward and backward', ours: 'grad_norms', func: 'torch.func.vmap(grad)', loop: 'loop of autograd.grad'}
text = '\n'.join(['# Cost of exact gradient norms', '', f'{args.bs} MNIST digits, small convnet, `python benchmarks/gradnorm.py {shlex.join(sys.argv[1:])}`',
    machine().rpartition(';')[0], '',
    '| | median ms | rounds |', '|---|---|---|',
    *(f'| {names[f]} | {1000*median(t):.1f} | {len(t)} |' for f, t in times.items()), '', '| ratio | measured | wanted |', '|---|---|---|',
    f'| grad_norms / plain forward and backward | {ratio(ours, plain):.2f} | at most 1.7 |',
    f'| loop / grad_norms | {ratio(loop, ours):.0f} | at least 50 |', f'| vmap / grad_norms | {ratio(func, ours):.2f} | at least 1 |', ''])
print(text)
if args.out: (args.out/'gradnorm.md').write_text(text, encoding='utf-8')

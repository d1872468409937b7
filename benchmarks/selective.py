"""What SelectiveBackprop's selection costs beside its passes, measured alternately in one process.

    python benchmarks/selective.py --out benchmarks/results

A fit with `SelectiveBackprop` is timed step by step, and so are the same passes written by hand: one forward pass without gradients
over each batch and, in those steps in which the callback trains, one training step on a batch of the same size. By hand means
(a) in fastai, with a callback of five lines, so that the difference is what scores, percentiles, draws and queue cost (at most 1.03);
(b) without fastai, so that its loop counts too.
"""
import argparse, time
from pathlib import Path

import numpy as np, torch
from fastai.vision.all import *
from fastai_is.all import *
from fastai_is.analysis import machine
from fastai_is.callback.selective import SelectiveBackprop
from fastai_is.demo import small_convnet

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--rounds', type=int, default=15)
ap.add_argument('--steps', type=int, default=20)
ap.add_argument('--beta', type=float, default=1.)
ap.add_argument('--out', type=Path, default=None)
ap.add_argument('--note', default='', help='what else ran on the machine')
args = ap.parse_args()
BS = 128
dls = mnist(n=BS*args.steps, bs=BS)

class Steps(Callback):
    "When each batch began and ended, loading included, and whether it was trained on"
    order,run_valid = -50,False
    def before_fit(self): self.trained,self.seconds = [],[]
    def before_train(self): self.t = time.perf_counter()
    def after_batch(self):
        now = time.perf_counter()
        self.trained.append(len(self.yb)>0)
        self.seconds.append(now-self.t)
        self.t = now

class Passes(Callback):
    "The same passes and nothing else"
    order,run_valid,pattern = SelectionCB.order,False,()
    def before_batch(self):
        self.model.eval()
        with torch.no_grad(): self.learn.loss_func(self.model(self.x), self.y)
        self.model.train()
        if self.pattern[self.iter]: return
        self.learn.yb = ()
        raise CancelBatchException

def learner(widths, cb):
    set_seed(0)
    steps = Steps()
    learn = Learner(dls, small_convnet(widths=widths), cbs=[steps,cb])
    learn._do_epoch_validate = lambda *a, **k: None
    return learn,steps

def fit(learn, steps):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return steps

def by_hand(model, opt, pattern):
    "The same passes without fastai"
    times,t = [],time.perf_counter()
    for (x,y),train in zip(dls.train, pattern):
        x,y = x.as_subclass(Tensor),y.as_subclass(Tensor)
        model.eval()
        with torch.no_grad(): F.cross_entropy(model(x), y)
        model.train()
        if train:
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        now = time.perf_counter()
        times.append(now-t)
        t = now
    return times

def ms(o): return 1e3*np.median(o)
lines = [f'{machine().rpartition(";")[0]}; '
         f'medians over {args.rounds} rounds of {args.steps} batches of {BS}, measured alternately, beta={args.beta:g}. {args.note}'.strip()]
def say(*o): lines.append(' '.join(map(str, o))); print(lines[-1], flush=True)
print(lines[0])
for widths in ((24,48,96,128), (12,24,36,48)):
    ours,passes = learner(widths, SelectiveBackprop(args.beta)),Passes()
    bare = learner(widths, passes)
    set_seed(0)
    model = small_convnet(widths=widths)
    opt,rows = torch.optim.AdamW(model.parameters()),[]
    for r in range(args.rounds+2): # the first round fills the history, the second warms up
        steps = fit(*ours)
        passes.pattern = pattern = np.array(steps.trained)
        if not pattern[:-1].any(): pattern[0] = True
        row = [np.array(o[1:]) for o in (steps.seconds, fit(*bare).seconds, by_hand(model, opt, pattern))] # the first batch of an epoch starts the loader
        inner = pattern[1:-1] # the last batch of a fit trains on whatever is left
        if r>1: rows.append([[t[:-1][o].mean() if o.any() else np.nan for t in row] for o in (inner,~inner,inner|True)])
    rows = np.array(rows) # rounds, kind of step, who
    for i,kind in enumerate(('step that trains','step that waits','mean step')):
        o,b,h = rows[:,i].T
        say(f'widths {str(widths):18} {kind:17} ours {ms(o):6.2f} ms, (a) {ms(b):6.2f} ms, ratio {np.median(o/b):.3f}; (b) {ms(h):6.2f} ms, ratio {np.median(o/h):.3f}')

if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out/'selective.md').write_text('```\n'+'\n'.join(lines)+'\n```\n', encoding='utf-8')

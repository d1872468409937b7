"""What the callbacks cost, as ratios measured alternately in one process.

    python benchmarks/step_cost.py --out benchmarks/results

1. A step with everything kept, or with the gate shut, over a step of plain fastai (at most 1.02).
2. A step in the batch seat at a share of a third, over a hand-written loop that does the same passes (at most 1.10).
3. The training part of an epoch in the epoch seat at a share of a third, over that of plain fastai (at most 0.40),
   for a network whose step takes 40 ms or more, and for smaller ones, where fastai's own time for each step shows.
"""
import argparse, time
from pathlib import Path

import numpy as np, torch
from fastai.vision.all import *
from fastai_is.all import *
from fastai_is.analysis import machine
from fastai_is.demo import small_convnet

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--rounds', type=int, default=15)
ap.add_argument('--steps', type=int, default=20)
ap.add_argument('--out', type=Path, default=None)
args = ap.parse_args()
BS,K = 128,43
dls = mnist(n=BS*args.steps, bs=BS)

class StepTimes(Callback):
    "Seconds of each training step, loading included, and of each epoch's training part"
    order,run_valid = -50,False
    def before_fit(self): self.steps,self.epochs = [],[]
    def before_train(self): self.t0 = self.t = time.perf_counter()
    def after_batch(self):
        now = time.perf_counter()
        self.steps.append(now-self.t)
        self.t = now
    def after_train(self): self.epochs.append(time.perf_counter()-self.t0)

def learner(widths, cb=None):
    set_seed(0)
    log = StepTimes()
    learn = Learner(dls, small_convnet(widths=widths), cbs=[log]+([cb] if cb else []))
    learn._do_epoch_validate = lambda *a, **k: None
    return learn,log

def fit(learn, log):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return log

def hand_written(model, k, opt):
    "The same work without fastai: score a batch, choose, train on the chosen part"
    times,t = [],time.perf_counter()
    for x,y in dls.train: # loading included, as in fastai's loop
        x,y = x.as_subclass(Tensor),y.as_subclass(Tensor)
        if k<BS:
            model.eval()
            with torch.no_grad(): s = (model(x).softmax(1)-F.one_hot(y, 10)).norm(dim=1)
            model.train()
            idxs = torch.multinomial(s, k)
            x,y,w = x[idxs],y[idxs],1/s[idxs]
            loss = (F.cross_entropy(model(x), y, reduction='none')*w).mean()
        else: loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        now = time.perf_counter()
        times.append(now-t)
        t = now
    return times

def ms(o): return 1e3*np.median(o)
lines = [f'{machine().rpartition(";")[0]}; '
         f'medians over {args.rounds} rounds of {args.steps} steps, batch size {BS}, measured alternately']
def say(*o): lines.append(' '.join(map(str, o))); print(lines[-1], flush=True)
print(lines[0])

big = (24,48,96,128)
say('\n1. Step with everything kept or the gate shut, over plain fastai')
kinds = {'plain':None, 'keep=1':ImportanceCB(keep=1), 'epoch seat, gate shut':ImportanceCB(gate=1e9), 'batch seat, gate shut':ImportanceCB(keep=1/3, seat='batch', gate=1e9),
    'BatchLossFilter, guarded':BatchLossFilter(.5, min_sample_perc=.7)}
ls,ts = {k:learner(big, cb) for k,cb in kinds.items()},{k:[] for k in kinds}
for r in range(args.rounds+1):
    for k in ls:
        t = fit(*ls[k]).steps[1:]
        if r: ts[k].append(np.median(t)) # the first round warms up
for k in ts: say(f'{k:28} {ms(ts[k]):7.2f} ms  ratio {np.median(np.array(ts[k])/np.array(ts["plain"])):.3f}')

say('\n2. Step in the batch seat at a third, over a hand-written loop')
for widths in (big, (12,24,36,48)):
    ours,plain = learner(widths, ImportanceCB(keep=1/3, seat='batch', gate=None)),learner(widths)
    hands = []
    for k in (K,BS):
        set_seed(0)
        m = small_convnet(widths=widths)
        hands.append((m, k, torch.optim.AdamW(m.parameters())))
    rows = []
    for r in range(args.rounds+1):
        row = [np.median(fit(*ours).steps[1:]),np.median(hand_written(*hands[0])[1:]),np.median(fit(*plain).steps[1:]),np.median(hand_written(*hands[1])[1:])]
        if r: rows.append(row)
    rows = np.array(rows)
    o,h,p,hp = rows.T
    say(f'widths {widths}: ours {ms(o):.2f} ms, hand-written {ms(h):.2f} ms, ratio {np.median(o/h):.3f}; plain fastai {ms(p):.2f}, hand-written plain {ms(hp):.2f}, '
        f'ratio {np.median(p/hp):.3f}; ours over plain fastai {np.median(o/p):.3f}')

say('\n3. Epoch in the epoch seat at a third, over plain fastai (training part)')
for widths in ((32,64,96,128), big, (12,24,36,48), (4,8,8,8)):
    ours,plain = learner(widths, ImportanceCB(keep=1/3, gate=None)),learner(widths)
    rows = []
    for r in range(args.rounds+1):
        row = [fit(*ours).epochs[0],fit(*plain).epochs[0]]
        if r: rows.append(row)
    o,p = np.array(rows).T
    say(f'widths {str(widths):20} plain step {1e3*np.median(p)/args.steps:7.2f} ms  ratio {np.median(o/p):.3f}')

if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out/'step_cost.md').write_text('```\n'+'\n'.join(lines)+'\n```\n', encoding='utf-8')

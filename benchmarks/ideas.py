"""Ideas for better defaults of `ImportanceCB`, each measured: what it costs, how accurate it gets, and what plain training would spend for the same.

    python benchmarks/ideas.py --data mnist --epochs 8 --seeds 2 --out benchmarks/results

Each idea changes one thing: a setting of ImportanceCB, or a few lines of it; one is another callback. All have batches of the same size and the same learning rate, which suit plain
training (`fastai-is bench` tunes them); plain training has budgets from 2 epochs up, each with its learning rate decayed to zero. Seconds are of processor
time, on one thread. Runs are added to a CSV, and what is in it already is not repeated; a table is written beside it.
"""
import argparse, shlex, sys, time
from pathlib import Path

import fastai_is, pandas as pd, torch
from torch import nn
from fastai.torch_core import set_seed
from fastprogress.fastprogress import progress_bar

from fastai_is.analysis import machine
from fastai_is.bench import PROBLEMS, fit_once, markdown, summarise
from fastai_is.callback.core import Plan
from fastai_is.callback.importance import ImportanceCB
from fastai_is.callback.proxy import ProxyScore
from fastai_is.selection import inclusion, systematic
from fastai_is.variance import keep_within, variance_ratio


def forecast(before, after, weights, bins=32):
    "What scores turn out to be, from those remembered and those met in the next epoch: edges of bins of the former, and the root mean square of the latter in each"
    edges = before.quantile(torch.linspace(0, 1, bins+1)[1:-1])
    at = torch.bucketize(before, edges)
    def total(o): return torch.zeros(bins).index_add_(0, at, o)
    rms = (total(weights*after.square())/total(weights).clamp(min=1e-9)).sqrt()
    return edges,torch.where(total(torch.ones_like(after))>10, rms, 0.).cummax(0).values


class Idea(ImportanceCB):
    "`ImportanceCB` with what is being tried. In one stage, unless it is said to be two"
    def __init__(self, first=1., by_ratio=None, tightens=None, whole_from=2., unseen='top', grow=1., blind=False, lr_power=0., lr_times=1., mom_power=0., refresh=False,
            forecasts=False, fresh=False, even=False, scored=False, half=True, prefilter=1, bf16=False, **kwargs):
        super().__init__(prefilter=prefilter, bf16=bf16, **kwargs) # scores in 32 bits, as when the first ideas were measured
        self.first = first           # share of each batch in the first epoch of several, by chance
        self.by_ratio = by_ratio     # bias=min(1, by_ratio/variance_ratio)
        self.tightens = tightens     # the limit at the beginning; it falls to `limit` at the end
        self.whole_from = whole_from # part of the training after which everything is trained on
        self.unseen = unseen         # score of what was not seen yet: 'top', the highest, or 'mean', the mean of the others
        self.grow = grow             # factor by which a score grows in each epoch in which its sample is not seen
        self.blind = blind           # choose by chance, as many as importance would
        self.lr_power = lr_power     # learning rate times share**lr_power
        self.lr_times = lr_times     # learning rate times this
        self.mom_power = mom_power   # momentum to the power of (batches that a step stands for)**mom_power: 1 forgets as fast by samples offered, not by steps (Adam's mean of squares still goes by steps)
        self.refresh = refresh       # BatchNorm's running statistics anew at the end, from 4,096 samples
        self.forecasts = forecasts   # go by what scores like the remembered one turned out to be in the last epoch
        self.fresh = fresh           # in the first epoch of several, choose within each batch by a fresh score, where that pays
        self.even = even             # each sample as often as its probabilities add up to, epoch after epoch, instead of by chance in each
        self.scored = scored         # load everything after the first epoch, and choose from it by a fresh score, where that pays
        self.half = half             # weights also where fresh scores had the last word
        self.last,self.tight,self.share,self.sums = None,self.limit,1.,None

    def number(self, windows, n):
        k = super().number(windows, n)
        if windows is None and self.n_epoch>1: k = max(2, round(self.first*n))
        self.share = k/n
        return k

    def plan(self, ids, bs):
        pct,known = self.epoch/self.n_epoch,len(self.store)>0
        if pct>=self.whole_from: return
        if self.fresh and not known and self.n_epoch>1: return Plan(ids, torch.ones(len(ids)), bs, bs, refine=True)
        if self.scored and known: return self._score_all(ids, bs)
        if not known: res = super().plan(ids, bs)
        else:
            vals = torch.full((self.n_ids,), torch.nan)
            vals[:len(self.store.values)] = self.store.values
            if self.tightens: self.limit = self.tightens+(self.tight-self.tightens)*pct
            if self.by_ratio: self.bias = min(1., self.by_ratio/variance_ratio(self.store.seen()).item())
            if self.grow>1 and self.last is not None:
                unseen = torch.ones(len(vals), dtype=torch.bool)
                unseen[self.last.ids] = False
                vals[unseen] *= self.grow
            self.store.values = vals
            kept = vals # what is remembered; what is gone by may be another
            if self.unseen=='mean': kept = vals.nan_to_num(nan=self.store.seen().mean().item())
            if self.forecasts and self.last is not None:
                ok = self.before[self.last.ids].isfinite() & vals[self.last.ids].isfinite()
                met = self.last.ids[ok]
                edges,rms = forecast(self.before[met], vals[met], self.last.weights[ok])
                kept = torch.where(vals.isfinite(), rms[torch.bucketize(vals, edges)], vals)
            self.before,self.store.values = vals.clone(),kept
            res = super().plan(ids, bs)
            if res and self.blind: # the same numbers of the same windows, by chance
                part,m = ids[:len(ids)//res.window*res.window].view(-1,res.window),len(ids)//res.window
                sel = systematic(torch.ones(part.shape), res.bs, 1., self.generator())
                res = res._replace(ids=part.gather(1, sel.idxs).flatten(), weights=torch.ones(m*res.bs))
            if res and self.even:
                if self.sums is None: self.sums = torch.rand(self.n_ids, generator=self.generator(), dtype=torch.float64) # where each begins
                part = ids[:len(ids)//res.window*res.window].view(-1,res.window)
                part,pi = part.flatten(),inclusion(self.store.get(part), res.bs, self.smooth).flatten()
                now = self.sums[part]+pi
                due = (now.floor()>self.sums[part].floor()).nonzero()[:,0]
                self.sums[part],due = now,due[:len(due)//res.bs*res.bs]
                res = res._replace(ids=part[due], weights=(res.bs/res.window/pi[due]).float())
            self.store.values = vals
        self.last = res if known else None
        return res

    def _score_all(self, ids, bs):
        share = keep_within(self.store.get(ids[:len(ids)//256*256].view(-1,256)), self.limit, self.smooth, self.floor)/256
        if share+1/3>=1: return
        step = min(self.least, bs)
        m = round(step/share)
        self.fit_state.share,ids = step/m,ids[:len(ids)//m*m]
        return Plan(ids, torch.ones(len(ids)), m, m, refine=True)

    def before_batch(self):
        s = self.fit_state
        if s and self.fresh and not len(self.store) and self.learn.train_iter%10==0:
            rows = [o for _,o in s.fresh[-10:] if len(o)==s.full_bs]
            s.share = keep_within(torch.stack(rows).cpu(), self.limit, self.smooth, self.floor)/s.full_bs if rows else 1.
            s.refine = s.share<.6 # scoring a batch costs a third of training on it
        super().before_batch()

    def _reduce(self, raw):
        bias = self.bias
        if self.fit_state.scored is not None and not self.half: self.bias = 0.
        super()._reduce(raw)
        self.bias = bias

    def before_step(self):
        times = self.lr_times*(self.share**self.lr_power if self.fit_state.w is not None else 1)
        if times!=1: self.opt.set_hyper('lr', float(self.opt.hypers[-1]['lr']*times))
        if self.mom_power and self.fit_state.window: # the schedule sets it anew in each step
            self.opt.set_hyper('mom', float(self.opt.hypers[-1]['mom']**(self.fit_state.window/self.fit_state.full_bs)**self.mom_power))

    def after_train(self):
        super().after_train()
        if not self.refresh or self.epoch<self.n_epoch-1: return
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.reset_running_stats()
            m.old,m.momentum = m.momentum,None # a plain mean over batches
        ds = self.dls.train_ds
        ids = torch.randperm(len(ds), generator=torch.Generator().manual_seed(0))[:4096]
        with torch.no_grad():
            for xb,*_ in self.dls.train.new(ds.subset(ids)): self.model(xb)
        for m in norms: m.momentum = m.old


IDEAS = {
    'one stage, a former default': {},
    'small steps, an earlier default': dict(least=1),
    'steps of 128': dict(least=128),
    'as many by chance': dict(blind=True),
    'a third of the first epoch': dict(first=1/3),
    'a third of the first epoch, unseen ones count as the mean': dict(first=1/3, unseen='mean'),
    'no weights': dict(bias=0.),
    'full weights': dict(bias=1.),
    'weights by the variance ratio': dict(by_ratio=3.),
    'half of the probability uniform': dict(smooth=.5),
    'the loss as score': dict(score='loss'),
    'limit 1.3': dict(limit=1.3),
    'the limit tightens from 2 to 1.05': dict(tightens=2., limit=1.05),
    'everything in the last eighth': dict(whole_from=.87),
    'scores of the unseen grow by 1.3 an epoch': dict(grow=1.3),
    'learning rate by the root of the share': dict(lr_power=.5),
    'learning rate times 0.7': dict(lr_times=.7),
    'learning rate times 1.5': dict(lr_times=1.5),
    'learning rate times 2': dict(lr_times=2.),
    'steps of 64, learning rate times 1.4': dict(least=64, lr_times=1.4),
    'BatchNorm statistics anew at the end': dict(refresh=True),
    'forecast scores': dict(forecasts=True, floor=.02),
    'forecast scores, limit 1.6, full weights': dict(forecasts=True, floor=.02, limit=1.6, smooth=.1, bias=1.),
    'forecast scores, limit 2, a third of the first epoch': dict(forecasts=True, floor=.02, limit=2., smooth=.1, first=1/3),
    'two stages, the default': dict(prefilter=3),
    'two stages, steps of 12': dict(prefilter=3, least=12),
    'two stages, steps of 64': dict(prefilter=3, least=64),
    'two stages, steps of 128': dict(prefilter=3, least=128),
    'two stages, limit 1.3': dict(prefilter=3, limit=1.3),
    'two stages, twice as many first': dict(prefilter=2),
    'two stages, 5 times as many first': dict(prefilter=5),
    'two stages, no weights': dict(prefilter=3, bias=0.),
    'two stages, two thirds of the first epoch': dict(prefilter=3, first=2/3),
    'two stages, a fresh choice in the first epoch': dict(prefilter=3, fresh=True),
    'two stages, a fresh choice in the first epoch, no weights': dict(prefilter=3, fresh=True, bias=0.),
    'two stages, evenly over the epochs': dict(prefilter=3, even=True),
    'fresh scores of everything': dict(scored=True),
    'fresh scores of everything, limit 1.3': dict(scored=True, limit=1.3),
    'the default, scored in bfloat16': dict(prefilter=3, bf16=None),
    'floor 0.05': dict(prefilter=3, bf16=None, floor=.05),
    'floor 0.05, no weights': dict(prefilter=3, bf16=None, floor=.05, bias=0.),
    'floor 0.05, no weights where fresh scores chose': dict(prefilter=3, bf16=None, floor=.05, half=False),
    'floor 0.05, a fresh choice in the first epoch': dict(prefilter=3, bf16=None, floor=.05, fresh=True),
    'floor 0.05, early': dict(prefilter=3, bf16=None, floor=.05, early=True), # the same, as `ImportanceCB` has it: with steps of at least 32
    'momentum by the batches that a step stands for': dict(prefilter=3, bf16=None, mom_power=1.),
    'momentum by the root of the batches that a step stands for': dict(prefilter=3, bf16=None, mom_power=.5),
    'a tiny network chooses from three batches': ProxyScore,
    'less weight, bias 0.25': dict(prefilter=3, bf16=None, bias=.25),
    'a tenth of the probability uniform': dict(prefilter=3, bf16=None, smooth=.1),
}
def make(idea): return Idea(**idea) if isinstance(idea, dict) else idea()
SETTINGS = dict(mnist=(128,6.4e-2), fashion_mnist=(128,6.4e-2), cifar10=(32,2e-2))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='mnist', help='mnist, fashion_mnist or cifar10')
    p.add_argument('--n', type=int, default=None, help='training samples; all by default')
    p.add_argument('--epochs', type=int, default=8, help='epochs of each idea')
    p.add_argument('--plain', default='', help='epochs of plain training, such as 2,4,8, or none; by default 1/4, 1/2, 3/4 and all of --epochs')
    p.add_argument('--seeds', type=int, default=2, help='how many')
    p.add_argument('--first', type=int, default=0, help='the first of them, such as 24 for seeds that no idea was chosen by')
    p.add_argument('--only', default='', help='numbers of the ideas, such as 0,5; all by default')
    p.add_argument('--out', default='benchmarks/results', help='folder')
    args = p.parse_args()
    torch.set_num_threads(1)
    bs,lr = SETTINGS[args.data]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    problem,out = PROBLEMS[args.data](args.n),Path(args.out)/f"ideas_{args.data}{f'_{args.n}' if args.n else ''}.csv"
    chosen = [list(IDEAS)[int(o)] for o in args.only.split(',')] if args.only else list(IDEAS)
    plain = [] if args.plain=='none' else [int(o) for o in args.plain.split(',')] if args.plain else [round(args.epochs*o) for o in (1/4,1/2,3/4,1)]
    seeds = range(args.first, args.first+args.seeds)
    turns = [('plain',o) for o in plain]+[(o,args.epochs) for o in chosen]
    done = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=['method','epochs','seed'])
    n = len(problem.make(bs).dls.train_ds)
    fit_once(problem.make(bs), 1, lr, None, time.process_time) # the first steps of a process are slow
    for seed,(name,epochs) in progress_bar([(s,t) for s in seeds for t in turns], leave=False):
        if ((done.method==name) & (done.epochs==epochs) & (done.seed==seed)).any(): continue
        set_seed(seed)
        row = dict(method=name, bs=bs, lr=lr, epochs=epochs, seed=seed,
            **fit_once(problem.make(bs), epochs, lr, None if name=='plain' else make(IDEAS[name]), time.process_time))
        done = pd.concat([done,pd.DataFrame([row])]).astype(dict(bs=int, epochs=int, seed=int))
        done.to_csv(out, index=False)
    about = f"{args.data}, {n:,} training samples, batches of {bs}, rate {lr}, {args.seeds} seeds{f' from {args.first} on' if args.first else ''}; {machine().rpartition(';')[0]}; fastai_is {fastai_is.__version__}"
    out.with_suffix('.md').write_text(f"# Ideas for ImportanceCB\n\n{about}\n\n{markdown(summarise(done[done.seed.isin(seeds)]), n)}\n\n    python benchmarks/ideas.py {shlex.join(sys.argv[1:])}\n", encoding='utf-8')

"""Is the gradient as precise as `ImportanceCB` predicts? It keeps so much that the predicted variance is within `limit`, by scores that are an epoch old or older.

    OMP_NUM_THREADS=1 python benchmarks/realised.py --out benchmarks/results

Networks are trained on MNIST, in one stage and in two (which choose among what is loaded once more, by fresh scores), and on 10,000 images of CIFAR-10, with the
flips and zooms of the benchmark and without. Of each epoch with a choice: the share kept, the variance that was predicted (for a choice in one stage), the one that it came to by the scores that the samples
had in the training pass, and that of as many by chance. All are of the unbiased estimate, relative to the whole batches that were chosen from, which are
larger than plain training's; the half weights of the default make the variance smaller, at the price of a bias. The last column says how much larger the
variance of a plain batch of as many samples is: where that is near 1, the choice is worth little in precision. Runs are added to a CSV, and what is in it already
is not repeated.
"""
import argparse, shlex, sys
from pathlib import Path

import fastai_is, pandas as pd, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastprogress.fastprogress import progress_bar

from fastai_is.analysis import machine
from fastai_is.bench import PROBLEMS, Problem, small_resnet
from fastai_is.callback.importance import ImportanceCB
from fastai_is.data import cifar10
from fastai_is.scores import apply_score
from fastai_is.variance import inflation, realised_inflation

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--seeds', type=int, default=3, help='how many')
ap.add_argument('--n', type=int, default=None, help='training samples of each, for a quick look; by default 60,000 and 10,000')
ap.add_argument('--cases', default='', help='numbers of the cases, such as 0,2; all by default')
ap.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder')
args = ap.parse_args()
torch.set_num_threads(1)

def unaugmented(n):
    def learner(bs): return Learner(cifar10(bs=bs, n=n, val_bs=500), small_resnet().to(memory_format=torch.channels_last), metrics=accuracy)
    return Problem('CIFAR-10, not augmented', 'small_resnet', learner, 4e-2)

mnist = PROBLEMS['mnist']
CASES = {'MNIST, one stage':(mnist,60_000,128,6.4e-2,8,1), 'MNIST, two stages (the default)':(mnist,60_000,128,6.4e-2,8,3),
    'CIFAR-10':(PROBLEMS['cifar10'],10_000,32,2e-2,24,3), 'CIFAR-10, not augmented':(unaugmented,10_000,32,2e-2,24,3)}
if args.cases: CASES = {k:CASES[k] for k in (list(CASES)[int(o)] for o in args.cases.split(','))}

class Watch(Callback):
    "What each epoch's choice was predicted to cost, and what it did cost"
    run_valid = False
    order = ImportanceCB.order+1
    def __init__(self, cb): self.cb,self.rows = cb,[]
    def before_train(self): self.met,self.before = [],None
    def select(self, learn, ids, weights, scores):
        "Called with what is remembered when the epoch is planned; and with each batch that is chosen from once more"
        if self.before is None: self.before = scores
    def after_loss(self):
        if self.before is not None: self.met.append((apply_score(self.cb.score, self.pred.detach(), self.yb, self.loss_func),self.cb.fit_state.w))
    def after_train(self):
        if self.before is None: return
        s,(now,w) = self.cb.fit_state,(torch.cat(o) for o in zip(*self.met))
        share,k = len(w)/s.n,round(s.share*s.bs)
        order = torch.randperm(len(self.before), generator=torch.Generator().manual_seed(0)) # windows of chance, as those of the epoch were
        windows = self.before[order[:len(order)//s.window*s.window]].view(-1,s.window)
        self.rows.append(dict(epoch=self.epoch, share=share, predicted=inflation(windows, k, self.cb.smooth).item(),
            realised=realised_inflation(now, w, share).item(), by_chance=1/share))

path = args.out/'realised.csv'
args.out.mkdir(parents=True, exist_ok=True)
rows = pd.read_csv(path).to_dict('records') if path.exists() else []
for case,seed in progress_bar([(c,s) for c in CASES for s in range(args.seeds)], leave=False):
    problem,n,bs,lr,epochs,prefilter = CASES[case]
    n = args.n or n
    if any((o['case'],o['n'],o['seed'])==(case,n,seed) for o in rows): continue
    problem = problem(n)
    set_seed(seed)
    learn,cb = problem.make(bs),ImportanceCB(prefilter=prefilter)
    watch = Watch(cb)
    cb.on_select = watch.select
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=[cb,watch])
    rows += [dict(case=case, n=n, seed=seed, **o) for o in watch.rows]
    pd.DataFrame(rows).to_csv(path, index=False)
rows = pd.DataFrame(rows)
mean = rows.groupby(['case','n','epoch'], sort=False).mean(numeric_only=True).reset_index()

lines = [f"{rows.seed.nunique()} seeds; {machine().rpartition(';')[0]}; fastai_is {fastai_is.__version__}", '',
    '| case | samples | epoch | share kept | variance, predicted | realised | by chance | by chance / realised |', '|'+'---|'*8]
lines += [f"| {o.case} | {o.n:,} | {o.epoch+1} | {o.share:.2f} | {o.predicted:.2f} | {o.realised:.2f} | {o.by_chance:.2f} | {o.by_chance/o.realised:.2f} |" for o in mean.itertuples()]
(args.out/'realised.md').write_text('\n'.join(['# Predicted and realised variance', '', 'Of the unbiased estimate of the gradient, relative to the whole batches that were chosen from; by chance / realised: how '
    'much larger the variance of a plain batch of as many samples is. Predicted for a choice in one stage. Means over seeds.', '',
    *lines, '', f"    OMP_NUM_THREADS=1 python benchmarks/realised.py {shlex.join(sys.argv[1:])}"])+'\n', encoding='utf-8')

"""Where selection cannot help, does it harm? `ImportanceCB()` with its defaults beside plain training on MNIST: random labels, a single epoch, and 30 % wrong labels.

    python benchmarks/harmless.py --out benchmarks/results

The two alternate, with the same seeds, initial weights and peak rate (the best for plain training on correct labels). Random labels: its seconds are to be at
most 1.02 times plain training's, and its loss on the training set the same within noise. A single epoch: the same weights, bit for bit. Wrong labels: no less
accurate on the correctly labelled test set. Seconds are of processor time, on one thread.
"""
import argparse, shlex, sys, time
from pathlib import Path

import fastai_is, pandas as pd, torch
from fastai.torch_core import set_seed
from fastprogress.fastprogress import progress_bar

from fastai_is.analysis import machine
from fastai_is.bench import fit_once, mnist_problem
from fastai_is.callback.importance import ImportanceCB

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--n', type=int, default=20_000, help='training digits')
p.add_argument('--epochs', type=int, default=8, help='epochs of the fits with random and with wrong labels')
p.add_argument('--seeds', type=int, default=5, help='how many')
p.add_argument('--bs', type=int, default=128, help='batch size')
p.add_argument('--lr', type=float, default=6.4e-2, help='peak learning rate')
p.add_argument('--only', default='', help="the cases whose names hold this, such as single; all by default")
p.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder')
args = p.parse_args()
torch.set_num_threads(1)
problem = mnist_problem(args.n)

def learner(wrong, seed):
    "A Learner whose training labels are `wrong` with this probability; with 1 they are random"
    set_seed(seed)
    learn = problem.make(args.bs)
    ds,g = learn.dls.train_ds,torch.Generator().manual_seed(seed)
    ds.y = ds.y.clone()
    at = torch.rand(len(ds.y), generator=g)<wrong
    ds.y[at] = (ds.y[at]+torch.randint(0 if wrong==1 else 1, 10, (int(at.sum()),), generator=g).to(ds.y.dtype))%10
    set_seed(seed)
    return learn

def run(case, wrong, epochs, seed, method):
    learn = learner(wrong, seed)
    res = fit_once(learn, epochs, args.lr, None if method=='plain' else ImportanceCB(), time.process_time)
    with learn.no_bar(): res['train_loss'] = learn.validate(dl=learn.dls.train.new(shuffle=False, drop_last=False))[0]
    weights = torch.cat([o.flatten() for o in learn.model.state_dict().values()]).double()
    return dict(case=case, epochs=epochs, seed=seed, method=method, checksum=(weights*torch.arange(len(weights))).sum().item(), **res)

cases = {'random labels':(1.,args.epochs), 'a single epoch':(0.,1), '30 % wrong labels':(.3,args.epochs)}
cases = {k:v for k,v in cases.items() if args.only in k}
if not cases: p.error(f'--only {args.only!r} is in no name of a case')
fit_once(problem.make(args.bs), 1, args.lr, None, time.process_time) # the first steps of a process are slow
turns = [(c,s,m) for c in cases for s in range(args.seeds) for m in (('plain','importance') if s%2 else ('importance','plain'))]
rows = pd.DataFrame([run(c, *cases[c], s, m) for c,s,m in progress_bar(turns, leave=False)])

same = None
lines = ['| case | epochs | seconds, importance / plain: median (range) | cost in plain epochs | accuracy, plain | importance | difference | loss on the training set, plain | importance | difference |', '|'+'---|'*10]
for case,d in rows.groupby('case', sort=False):
    a,b = (d[d.method==o].set_index('seed') for o in ('plain','importance'))
    def pm(o, digits): return f'{o.mean():.{digits}f} ± {o.std():.{digits}f}'
    ratio = b.seconds/a.seconds
    lines.append(f'| {case} | {d.epochs.iloc[0]} | {ratio.median():.3f} ({ratio.min():.3f} to {ratio.max():.3f}) | {b.cost.mean()/args.n:.2f} | '
        f'{pm(a.accuracy, 2)} | {pm(b.accuracy, 2)} | {pm(b.accuracy-a.accuracy, 2)} | {pm(a.train_loss, 4)} | {pm(b.train_loss, 4)} | {pm(b.train_loss-a.train_loss, 4)} |')
    if case=='a single epoch': same = (a.checksum==b.checksum).all()
text = f"""# Where selection cannot help

MNIST, {args.n:,} training digits, small_convnet, batches of {args.bs}, peak rate {args.lr}, {args.seeds} seeds: means ± standard deviations, differences by seed.
{machine().rpartition(';')[0]}; fastai_is {fastai_is.__version__}

""" + '\n'.join(lines) + ('' if same is None else f"\n\nWeights after a single epoch: {'the same' if same else 'NOT the same'} in all seeds.") + f"""

    python benchmarks/harmless.py {shlex.join(sys.argv[1:])}
"""
args.out.mkdir(parents=True, exist_ok=True)
rows.to_csv(args.out/'harmless.csv', index=False)
(args.out/'harmless.md').write_text(text, encoding='utf-8')
print(text)

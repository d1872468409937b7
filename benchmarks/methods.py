"""The methods of the field beside a committed benchmark of `ImportanceCB`: on the same problem, with the same batches, rate and seeds.

    OMP_NUM_THREADS=1 python benchmarks/methods.py --data cifar10 --out benchmarks/results/cifar10_methods

Plain training's runs, ImportanceCB's and the random share's are those of the benchmark (benchmarks/results), so that they need not be made twice; costs compare
with them, seconds only as far as the machine was as fast on the other day. Runs are kept in a Parquet file, and what is in it already is not repeated; a table
and a picture are made of both.
"""
import argparse, shlex, sys, time
from pathlib import Path

import fastai_is, pandas as pd, torch
from fastai.torch_core import set_seed
from fastprogress.fastprogress import progress_bar

from fastai_is.analysis import machine
from fastai_is.bench import METHODS, PROBLEMS, Runs, describe, fit_once, markdown, plot_frontier, summarise

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--data', default='cifar10', choices=list(PROBLEMS), help='which committed benchmark')
ap.add_argument('--methods', default='blf,sb,kath18_5,infobatch', help='names of METHODS')
ap.add_argument('--budgets', default='12,24,48', help='epochs, each a training of its own')
ap.add_argument('--seeds', type=int, default=5, help='how many')
ap.add_argument('--out', type=Path, required=True, help='folder')
args = ap.parse_args()
torch.set_num_threads(1)

old = pd.read_parquet(Path(__file__).parent/'results'/args.data/'runs.parquet').query(f"stage=='compare' and seed<{args.seeds}")
ours = old.query("method=='importance'").iloc[0]
problem,bs,lr = PROBLEMS[args.data](int(ours.n)),int(ours.bs),float(ours.lr)
args.out.mkdir(parents=True, exist_ok=True)
runs,budgets = Runs(args.out/'runs.parquet'),[int(o) for o in args.budgets.split(',')]
for seed,epochs,method in progress_bar([(s,e,m) for s in range(args.seeds) for e in budgets for m in args.methods.split(',')], leave=False):
    cb = METHODS[method]()
    key = dict({k:ours[k] for k in ('data','model')}, n=int(ours.n), n_valid=int(ours.n_valid), stage='compare', method=method, settings=describe(cb), bs=bs, lr=lr,
        epochs=epochs, seed=seed, clock='process_time')
    if runs.find(**key): continue
    set_seed(seed)
    runs.add(key|dict(machine=machine().rpartition(';')[0], version=fastai_is.__version__)|fit_once(problem.make(bs), epochs, lr, cb, time.process_time))

new = pd.DataFrame(runs.rows)
tbl = summarise(pd.concat([old.query(f"method=='plain' or epochs in {budgets}"), new]).sort_values('epochs', kind='stable'))
lines = [f"# Methods of the field: {ours.data}, {ours.model}", '', f"{ours.n:,} training and {ours.n_valid:,} validation samples; batches of {bs} at a peak rate of {lr:.2g}, for each budget of epochs "
    f"decayed to zero; means over {args.seeds} seeds, ± standard deviation, with the {'95 % interval by' if args.seeds>4 else 'range of'} a bootstrap over seeds. Cost: (forwarded + 2 backpropagated)/3. Plain training, "
    f"ImportanceCB and the random share: runs of [{args.data}](../{args.data}/table.md), of other days.", '', f"Machine: {'; '.join(new.machine.unique())}; fastai_is {fastai_is.__version__}", '',
    markdown(tbl, int(ours.n)), '', *(f'- {m}: `{s}`' for m,s in new[['method','settings']].drop_duplicates().itertuples(index=False)), '',
    f"    OMP_NUM_THREADS=1 python benchmarks/methods.py {shlex.join(sys.argv[1:])}"]
(args.out/'table.md').write_text('\n'.join(lines)+'\n', encoding='utf-8')
plot_frontier(tbl, f'{ours.data}, {ours.n:,} samples, {ours.model}: the methods of the field, {args.seeds} seeds', 'seconds (processor time) of training').savefig(args.out/'frontier.png', dpi=120)

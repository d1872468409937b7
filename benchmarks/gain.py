"""Does the `gain` that `ImportanceCB` shows, by which it tells at the end of a fit that it did not pay, go with what it was measured to save?

    OMP_NUM_THREADS=1 python benchmarks/gain.py --out benchmarks/results

Trains with the settings of the committed benchmarks, each of their budgets, and sets the median `gain` over the epochs with a choice beside the speed-up that
they found (benchmarks/results). The gains are of `--seeds` runs of their own, which are added to a CSV and not repeated; the speed-ups of all seeds of the benchmark.
"""
import argparse, shlex, sys
from pathlib import Path
from statistics import median

import fastai_is, pandas as pd, torch
from fastai.torch_core import set_seed
from fastprogress.fastprogress import progress_bar

from fastai_is.analysis import machine
from fastai_is.bench import PROBLEMS, summarise
from fastai_is.callback.importance import ImportanceCB

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--seeds', type=int, default=2, help='how many')
ap.add_argument('--data', default='mnist,mnist_4000,fashion_mnist,cifar10', help='folders of the committed benchmarks, whose names begin with that of the problem')
ap.add_argument('--n', type=int, default=None, help='training samples of each, for a quick look; by default as many as in the benchmark')
ap.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder')
args = ap.parse_args()
torch.set_num_threads(1)

def runs(data): return pd.read_parquet(Path(__file__).parent/'results'/data/'runs.parquet')

todo = []
for data in args.data.split(','):
    ours = runs(data).query("stage=='compare' and method=='importance' and epochs>1")
    todo += [(data,*o) for o in ours[['n','bs','lr','epochs']].drop_duplicates().sort_values('epochs').itertuples(index=False)]

path,rows = args.out/'gain.csv',[]
args.out.mkdir(parents=True, exist_ok=True)
own = ['data','n','epochs','seed','kept','gain']
if path.exists(): rows = pd.read_csv(path)[own].to_dict('records') # what is there is not run again
for (data,n,bs,lr,epochs),seed in progress_bar([(o,s) for o in todo for s in range(args.seeds)], leave=False):
    n = args.n or n
    if any((o['data'],o['n'],o['epochs'],o['seed'])==(data,n,epochs,seed) for o in rows): continue
    problem,cb = PROBLEMS[next(k for k in PROBLEMS if data.startswith(k))](n),ImportanceCB()
    set_seed(seed)
    learn = problem.make(bs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=cb)
    kept,gain = (learn.recorder.metric_names.index(o)-1 for o in ('kept','gain'))
    chosen = [o for o in learn.recorder.values if o[kept]<1]
    rows.append(dict(zip(own, (data, n, epochs, seed, sum(o[kept] for o in learn.recorder.values)/epochs, median([o[gain] for o in chosen]) if chosen else 1.))))
    pd.DataFrame(rows).to_csv(path, index=False)

tbl = pd.DataFrame(rows)
speed = pd.concat([summarise(runs(o)).query("method=='importance'").assign(data=o, n=runs(o).n.iloc[0]) for o in tbl.data.unique()])
told = [f'{unit}_{o}' for unit in ('seconds','cost') for o in ('bound','speed_up','low','high')]
tbl = tbl.merge(speed[['data','n','epochs',*told]], on=['data','n','epochs'], how='left', validate='many_to_one').sort_values(['data','n','epochs','seed']) # none for a quick look
tbl.to_csv(path, index=False)

lines = [f"Gains: {machine().rpartition(';')[0]}; fastai_is {fastai_is.__version__}", '',
    '| data | samples | epochs | seeds | share kept | `gain` | speed-up in seconds | speed-up in cost |', '|'+'---|'*8]
for (data,n,epochs),g in tbl.groupby(['data','n','epochs'], sort=False):
    o = g.iloc[0]
    def factor(unit): return '' if pd.isna(o[f'{unit}_speed_up']) else f"{o[f'{unit}_bound']}{o[f'{unit}_speed_up']:.2f} ({o[f'{unit}_low']:.2f} to {o[f'{unit}_high']:.2f})"
    lines.append(f"| {data} | {n:,} | {epochs} | {len(g)} | {g.kept.mean():.2f} | {g.gain.mean():.2f} ({g.gain.min():.2f} to {g.gain.max():.2f}) | {factor('seconds')} | {factor('cost')} |")
(args.out/'gain.md').write_text('\n'.join(['# Gain and speed-up of ImportanceCB', '',
    'Gain: how many times as many samples by chance would make the gradient as precise, the median over the epochs with a choice, mean over seeds (smallest to largest). '
    'Speed-up at matched accuracy, with its interval: of the benchmark of each data set.', '', *lines, '', f"    OMP_NUM_THREADS=1 python benchmarks/gain.py {shlex.join(sys.argv[1:])}"])+'\n', encoding='utf-8')

"""How much to keep: the limit on predicted inflation and the bias of `ImportanceCB`, on MNIST and CIFAR-10 (JPEG).

    python benchmarks/defaults.py --data mnist --epochs 5 --seeds 3 --out benchmarks/results

Same network, schedule and number of epochs for all; the cost is counted in samples, so that the machine does not matter:
(samples forwarded + 2 x samples backpropagated) / (3 x samples of one plain epoch).
"""
import argparse
from functools import partial
from pathlib import Path

import pandas as pd, torch
from fastai.vision.all import *
from fastai_is.callback.importance import ImportanceCB
from fastai_is.data import cifar10, mnist
from fastai_is.demo import compare, small_convnet

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--data', choices=('mnist','cifar10'), default='mnist')
ap.add_argument('--n', type=int, default=None, help='training images')
ap.add_argument('--epochs', type=int, default=5)
ap.add_argument('--seeds', type=int, default=3)
ap.add_argument('--limits', type=float, nargs='+', default=[1.15,1.3,1.5,2.])
ap.add_argument('--biases', type=float, nargs='+', default=[.5])
ap.add_argument('--keeps', type=float, nargs='*', default=[])
ap.add_argument('--out', type=Path, default=None)
args = ap.parse_args()

dls = partial(mnist if args.data=='mnist' else cifar10, n=args.n)
model = small_convnet if args.data=='mnist' else partial(small_convnet, c_in=3, widths=(16,32,64,64))
methods = {'plain':lambda: None}
methods.update({f'limit={l} bias={b}':partial(ImportanceCB, limit=l, bias=b) for b in args.biases for l in args.limits})
methods.update({f'random {k:.2f} (uniform, gate=None)':partial(ImportanceCB, keep=k, smooth=1., gate=None) for k in args.keeps})

res = []
for seed in range(args.seeds): # all methods of one seed before the next, so that a run cut short is still a fair table
    r = compare(dls, methods, args.epochs, seed=seed, model=model, quiet=True)
    res.append(r.assign(seed=seed))
    per_epoch = r.backpropagated.iloc[0]
    last = pd.concat(res).query(f'epoch=={args.epochs}').copy()
    last['cost'] = (last.forwarded+2*last.backpropagated)/(3*per_epoch)
    g = last.groupby('method', sort=False)
    tbl = pd.DataFrame({'accuracy %':100*g.accuracy.mean(), 'sd':100*g.accuracy.std(), 'valid_loss':g.valid_loss.mean(), 'cost (plain epochs)':g.cost.mean(),
        'seeds':g.size()})
    print(tbl.round(3).to_string(), flush=True)
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    name = f'defaults_{args.data}_{args.n or "all"}_{args.epochs}ep'
    pd.concat(res).to_csv(args.out/f'{name}.csv', index=False)
    head = f'{args.data}, n={args.n or "all"}, {args.epochs} epochs, {args.seeds} seeds, torch {torch.__version__}, CPU\n\n'
    (args.out/f'{name}.md').write_text(head+'```\n'+tbl.round(3).to_string()+'\n```\n')

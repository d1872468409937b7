"""What it takes to plan an epoch of 1,281,167 samples (ImageNet's number), beyond the DataLoader's own list and shuffle.

    python benchmarks/planning.py --out benchmarks/results

Each method runs in a process of its own, on one thread, in a fit of which each epoch ends after its first batch. Scores are planted. The plan is made
where training makes it, when the DataLoader asks for its order, and is over when the DataLoader has it.

Times are the processor's for that thread, which other processes disturb less than the clock on the wall.

- own: seconds of the DataLoader's own list and shuffle
- plan: milliseconds beyond that, median and range over the epochs; of these, `method` in the method's `plan` and the rest in the engine
- peak: MB of resident memory at the highest point while planning, beyond the highest point of the DataLoader's own list and shuffle;
  beside it, beyond what the list takes once it is shuffled
"""
import argparse, json, os, platform, subprocess, sys, time
from pathlib import Path

N,BS,KINDS = 1_281_167,256,'ImportanceCB SoftPrune RandomSubset LossResampler OnlineBatchSelection Proportional Rank'.split()

def resident(peak=False):
    "Resident memory in MB"
    key = 'VmHWM' if peak else 'VmRSS'
    return int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key)).split()[1])/1024

def forget_peak(): Path('/proc/self/clear_refs').write_text('5')

def measure(kind, epochs):
    import torch
    torch.set_num_threads(1)
    from fastai.basics import Callback,CancelTrainException,DataLoader,DataLoaders,Learner,nn,set_seed
    from fastai_is.callback.core import PlannedLoader
    from fastai_is.callback.epoch import LossResampler,RandomSubset,SoftPrune
    from fastai_is.callback.importance import ImportanceCB
    from fastai_is.callback.ranked import OnlineBatchSelection,PrioritizedSampling
    make = dict(ImportanceCB=lambda: ImportanceCB('loss', keep=1/3, gate=None), SoftPrune=SoftPrune, RandomSubset=RandomSubset, LossResampler=LossResampler,
        OnlineBatchSelection=lambda: OnlineBatchSelection(recompute=0), Proportional=PrioritizedSampling, Rank=lambda: PrioritizedSampling('rank', .7, .5))

    class Numbers:
        def __len__(self): return N
        def __getitem__(self, i): return torch.tensor([i/N]),torch.tensor([0.])
    rows,now,kept = [],{},[]
    class Loader(DataLoader):
        def get_idxs(self):
            begin = time.thread_time()
            kept.clear()
            now.update(before=resident())
            forget_peak()
            t = time.thread_time()
            res = super().get_idxs()
            now.update(own=time.thread_time()-t, own_peak=resident(True), held=resident(), method=0.)
            kept[:] = [res] # to free this list, too, is the DataLoader's own business
            forget_peak()
            now['all'] = time.thread_time()-begin # with the looking
            return res
    class Stop(Callback):
        def before_batch(self): raise CancelTrainException

    set_seed(0)
    cb = make[kind]()
    whole,plan = PlannedLoader.get_idxs,cb.plan
    def timed_plan(ids, bs):
        t = time.thread_time()
        res = plan(ids, bs)
        now['method'],now['made'] = time.thread_time()-t,res is not None
        return res
    def timed_whole(self):
        t = time.thread_time()
        res = whole(self)
        total = time.thread_time()-t
        if now['made']: rows.append(dict(now, plan=total-now['all'], peak=resident(True)))
        return res
    cb.plan,PlannedLoader.get_idxs = timed_plan,timed_whole
    dls = DataLoaders(Loader(Numbers(), bs=BS, shuffle=True), DataLoader(Numbers(), bs=BS))
    learn = Learner(dls, nn.Linear(1,1), loss_func=nn.MSELoss(), cbs=[cb,Stop()])
    learn._do_epoch_validate = lambda *a, **k: None
    cb.n_ids = N
    cb.store.put(torch.arange(N), torch.randn(N, generator=torch.Generator().manual_seed(0)).exp())
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 0.)
    print(json.dumps(rows))

def run(kind, epochs, **env):
    "What `measure` notes, without the first plan, which warms up"
    out = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--measure', kind, '--epochs', str(epochs)], stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ|{'OMP_NUM_THREADS':'1'}|env).stdout
    return json.loads(out.splitlines()[-1])[1:]

def main(args):
    import numpy as np, torch
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), platform.machine())
    lines = [f'{N:,} samples, batch size {BS}, one thread of {cpu}; Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; '
        f'up to {args.epochs} planned epochs each','',f"{'method':24}{'own s':>7}{'plan ms':>9}{'range':>12}{'method ms':>11}{'engine ms':>11}{'peak MB':>9}{'beyond list':>13}"]
    print('\n'.join(lines))
    for kind in args.kinds:
        rows,mem = run(kind, args.epochs),run(kind, 4, MALLOC_MMAP_THRESHOLD_='262144') # memory that is given back at once, which takes time, is easier to account for
        def col(k, rows=rows): return np.array([r[k] for r in rows])
        plan,method = 1e3*col('plan'),1e3*col('method')
        lines.append(f"{kind:24}{np.median(col('own')):7.2f}{np.median(plan):9.0f}{f'{plan.min():.0f}-{plan.max():.0f}':>12}{np.median(method):11.0f}{np.median(plan-method):11.0f}"
            f"{np.median(col('peak', mem)-col('own_peak', mem)):9.0f}{np.median(col('peak', mem)-col('held', mem)):13.0f}")
        print(lines[-1], flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out/'planning.md').write_text('```\n'+'\n'.join(lines)+'\n```\n', encoding='utf-8')

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--epochs', type=int, default=10)
    ap.add_argument('--kinds', nargs='+', default=KINDS, choices=KINDS)
    ap.add_argument('--out', type=Path, default=None)
    ap.add_argument('--measure', default=None, help=argparse.SUPPRESS)
    args = ap.parse_args()
    measure(args.measure, args.epochs) if args.measure else main(args)

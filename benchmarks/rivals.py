"""Our steps, epochs and gradient norms beside those of other packages, at the same share kept, measured alternately in one process.

    python benchmarks/rivals.py --out benchmarks/results

On a machine that others use as well, one thread and its processor time vary less:

    OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python benchmarks/rivals.py \\
        --processor-time --out benchmarks/results

The two settings of glibc keep memory that was freed. Without them a step of 128 images may have to ask the system for it anew each time, which
depends on the process, and a step of 43 hardly ever: the epoch seat would gain by luck.

1. A step that scores a batch of 128 and trains on a third of it: `ImportanceCB` and our `BatchLossFilter` in the batch seat, tsai's
   `BatchLossFilter`, Composer's `select_using_loss` called from a fastai callback, and the ideal: the same two passes written by hand, without
   fastai (a) and in a fastai callback of six lines (b). Ours is to be no slower than a rival's, and at most 1.05 of the ideal (a).
2. An epoch of `ImportanceCB` in the epoch seat at a third, beside an epoch of tsai's and of Composer's, from tensors as they come, with
   augmentation on top, and from JPEG that is decoded image by image; and beside an epoch of datacull's RCAP, in a plain PyTorch loop with its own
   loader. tsai's and Composer's are to take at least twice as long as ours. Ours has two forms: as many steps as theirs, of 43 samples each, or
   whole batches of 128 (`least=128`), a third as many, as RCAP makes them: 7 of 21, 896 samples to their 903. With as many steps, from tensors
   as they come, twice is out of reach where a forward pass is less than a third of a step: they do it on everything and then train on a third,
   we do the latter. The ideal's row shows what any form of theirs would take, and fits on a random third, which plain fastai is handed as if it
   were all, in as many steps or in whole batches, what any form of ours would: at that, nothing is chosen.
3. The norm of each sample's gradient: `grad_norms` beside Opacus's ghost norms, once by `backward()` as its README has it, and once, kinder than
   any documented use, without computing the gradients of the parameters. Ours is to be no slower than either.

Each on MNIST with a small convnet, and on CIFAR-10 with the residual network of `fastai-is bench`, both with BatchNorm and without. How many
samples each way trains on is checked in every round, and that norms agree before the first. A rival that is not there is listed with the reason,
and all others are measured. So that each keeps exactly 43 of 128:

- tsai's filter keeps the largest losses up to a share of their sum, so its number depends on the losses. Its scoring pass is handed
  `1 + loss/100,000`, which has the order of the losses and makes shares of the sum shares of the samples. The step that follows trains on the
  loss itself.
- Composer's form takes a share of samples; by default every second batch is left whole, which is switched off.
- datacull's `pruning_rate` is documented as the share to remove, but 1.0.2 *keeps* that share. It is given the share to keep, and rounds up in
  each class.
- Opacus takes no BatchNorm that is trained. There, BatchNorm's own parameters are frozen for both; a further row has ours with them. Nor does
  1.6.0 give the right norms where the model is in channels-last memory (those of a convolution's weights are off by tens of per cent), which
  the residual networks are elsewhere; there they are not.

tsai and Composer score in training mode (so that BatchNorm's running statistics see each batch twice), ours and the ideal in evaluation mode. Ours scores
in bfloat16 where the processor is made for it; in the first part, rows and targets of their own have it in 32 bits, as all others do.

Install the rivals in an environment of their own that has fastai_is, as nbs/25a_rivals.ipynb says.
"""
import argparse, io, os, shlex, sys, tempfile, time, warnings
from copy import deepcopy
from importlib import metadata
from pathlib import Path

import numpy as np, torch
from fastai.vision.all import *
from fastai_is.all import *
from fastai_is.analysis import machine
from fastai_is.bench import small_resnet
from fastai_is.gradnorm import grad_norms
from fastai_is.scores import fast_bf16

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--rounds', type=int, default=15)
ap.add_argument('--steps', type=int, default=21, help='batches in an epoch; a third of 21 is 7 whole ones')
ap.add_argument('--widths', type=int, nargs='+', default=(24,48,96,128), help='channels of each convolution of the convnet')
ap.add_argument('--out', type=Path, default=None)
ap.add_argument('--processor-time', action='store_true', help='seconds of processor time, for a machine that does other things beside; with OMP_NUM_THREADS=1')
args = ap.parse_args()
BS,K = 128,43
device = default_device()

# What is there

rivals,missing = {},{}
def rival(package, what):
    "Decorator: call a function that imports and returns parts of `package`, and note its version or why it is not there"
    def deco(f):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore') # rivals warn of what they import
                rivals[package] = metadata.version(package),what,f()
        except Exception as e: missing[package] = what,f'{type(e).__name__}: {e}'.splitlines()[0]
    return deco

@rival('tsai', '`BatchLossFilter`, a callback')
def _():
    from tsai.callback.experimental import BatchLossFilter
    return BatchLossFilter
@rival('mosaicml', 'Composer, `select_using_loss` and `should_selective_backprop`')
def _():
    from composer.algorithms.selective_backprop import select_using_loss, should_selective_backprop
    return select_using_loss,should_selective_backprop
@rival('opacus', '`GradSampleModuleFastGradientClipping`, ghost norms')
def _():
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    return GradSampleModuleFastGradientClipping
@rival('datacull', '`RCAPDataLoader`, pruning by epoch')
def _():
    import datacull
    return datacull
def get(package): return rivals[package][2] if package in rivals else None

# Networks and data

def convnet(norm):
    "The demo's small convnet, with BatchNorm or without"
    widths = tuple(args.widths)
    convs = [ConvLayer(i, o, stride=2 if n else 1, norm_type=norm) for n,(i,o) in enumerate(zip((1,)+widths, widths))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(widths[-1], 10)).to(device)
def resnet(norm):
    "The residual network of the benchmark of CIFAR-10, with BatchNorm or without"
    net = small_resnet()
    for m in [] if norm else list(net.modules()):
        for k,o in m.named_children():
            if isinstance(o, nn.BatchNorm2d): setattr(m, k, nn.Identity())
    return net.to(device, memory_format=torch.channels_last)
def jpegs(data, stats):
    "The same images as JPEG in memory, each opened and decoded when it is asked for, as `ImageBlock` does"
    ds = data.train_ds
    kind = PILImageBW if ds.x.shape[1]==1 else PILImage
    def encode(x):
        f = io.BytesIO()
        kind.create(x.permute(1, 2, 0).squeeze(-1).numpy()).save(f, 'jpeg')
        return f.getvalue()
    files,labels = [encode(x) for x in ds.x],ds.y.tolist()
    opened = [lambda i: kind.create(io.BytesIO(files[i])), ToTensor()]
    dsets = Datasets(range_of(files), [opened,[lambda i: TensorCategory(labels[i])]], splits=[range_of(files),range(BS)])
    return dsets.dataloaders(bs=BS, after_batch=[IntToFloatTensor(),Normalize.from_stats(*stats, cuda=False)], num_workers=0, device=device)
def loaders(data, stats, tfms):
    "The same images in three ways"
    as_they_come = data(n=BS*args.steps, bs=BS)
    return {'as they come':as_they_come, 'augmented':data(n=BS*args.steps, bs=BS, batch_tfms=tfms), 'decoded from JPEG':jpegs(as_they_come, stats)}
digits = loaders(mnist, mnist_stats, aug_transforms(do_flip=False))
photos = loaders(cifar10, cifar_stats, aug_transforms(max_rotate=0., max_zoom=1.2, max_lighting=0., max_warp=0.))
nets = {f'{kind}{", BatchNorm" if norm else ", no BatchNorm"}':(partial(make, norm),data)
    for kind,make,data in (('convnet',convnet,digits),('ResNet',resnet,photos)) for norm in (NormType.Batch,None)}

def clock():
    if device.type=='cuda': torch.cuda.synchronize()
    return time.process_time() if args.processor_time else time.perf_counter()

class Timing(Callback):
    "Seconds of each step, loading included, and of the epoch's training part; how many samples each step trained on"
    order,run_valid = -50,False
    def before_fit(self): self.steps,self.sizes = [],[]
    def before_train(self): self.t0 = self.t = clock()
    def after_batch(self):
        now = clock()
        self.steps.append(now-self.t)
        self.sizes.append(len(self.y))
        self.t = now
    def after_train(self): self.epoch_seconds = clock()-self.t0
    def result(self): return np.median(self.steps[1:]),self.epoch_seconds,self.sizes # the first step of an epoch starts the loader

# The ways to train on a third. Each is a function that trains for an epoch and returns (seconds of a step, of the epoch, sizes of the batches)

def in_fastai(net, dls, cb=None, loss=None):
    set_seed(0)
    log = Timing()
    learn = Learner(dls, net(), loss_func=loss or CrossEntropyLossFlat(), cbs=[log]+([cb] if cb else []))
    learn._do_epoch_validate = lambda *a, **k: None
    def f():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return log.result()
    return f

class Levelled(CrossEntropyLossFlat):
    "Nearly the same for each sample, in the order of the losses, where losses of samples are asked for"
    def __call__(self, inp, targ):
        res = super().__call__(inp, targ)
        return 1+1e-5*res if self.reduction=='none' else res

class ComposerStep(Callback):
    "Composer's functional form before each step. It is handed plain tensors, which are faster than fastai's, and is barer than `ComposerSelective`, so that no check of ours counts against it"
    order,run_valid = SelectionCB.order,False
    def before_batch(self):
        select,should = get('mosaicml')
        if not should(self.pct_train, self.iter, start=0., end=1., interrupt=0): return
        x,y = select(self.x.as_subclass(Tensor), self.y.as_subclass(Tensor), self.model, F.cross_entropy, keep=K/BS)
        self.learn.xb,self.learn.yb = (x,),(y,)

def best_of(model, x, y):
    "Forward on everything, and the part with the highest loss"
    model.eval()
    with torch.no_grad(): idxs = F.cross_entropy(model(x), y, reduction='none').topk(K).indices
    model.train()
    return x[idxs],y[idxs]

class IdealStep(Callback):
    "Those two passes and nothing else"
    order,run_valid = SelectionCB.order,False
    def before_batch(self):
        x,y = best_of(self.model, self.x.as_subclass(Tensor), self.y.as_subclass(Tensor))
        self.learn.xb,self.learn.yb = (x,),(y,)

def by_hand(net, dls):
    "The same without fastai, but for its loader"
    set_seed(0)
    model = net()
    opt = torch.optim.AdamW(model.parameters())
    def f():
        steps,sizes = [],[]
        t0 = t = clock()
        for x,y in dls.train:
            x,y = best_of(model, x.as_subclass(Tensor), y.as_subclass(Tensor))
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            now = clock()
            steps.append(now-t)
            sizes.append(len(y))
            t = now
        return np.median(steps[1:]),clock()-t0,sizes
    return f

def with_datacull(net, dls, folder):
    "RCAP as datacull's README has it, with images that are normalised beforehand"
    dc,ds = get('datacull'),dls.train.dataset
    x,y = (torch.cat([b[i].as_subclass(Tensor).cpu() for b in dls.train.new(shuffle=False, drop_last=False)]) for i in range(2))
    class Images(torch.utils.data.TensorDataset): targets = y.numpy()
    set_seed(0)
    model,data,log = net(),dc.DCDataset(Images(x, y)),dc.DCLogger(f'{folder}/')
    opt,score = torch.optim.AdamW(model.parameters()),dc.RCAPImportance(data, log, beta=1.)
    loader,epochs = dc.RCAPDataLoader(data, pruning_rate=K/BS, batch_size=BS),[]
    def f():
        sizes = []
        t = clock()
        loader.resample(score.compute_importance())
        for x,y,ids in loader:
            x,y = x.to(device),y.to(device)
            losses = F.cross_entropy(model(x), y, reduction='none')
            losses.mean().backward()
            opt.step()
            opt.zero_grad()
            log.log_metric(len(epochs), ids, losses.detach())
            sizes.append(len(y))
        epochs.append(clock()-t)
        return np.nan,epochs[-1],sizes
    return f

OURS,OURS32,BLF,BLF32,TSAI,COMPOSER,HAND,HAND_FASTAI = 'ImportanceCB','ImportanceCB, scored in 32 bits','our BatchLossFilter','our BatchLossFilter, scored in 32 bits','tsai','Composer','ideal (a), by hand','ideal (b), by hand in fastai'
EPOCH,WHOLE = 'ImportanceCB, epoch seat','ImportanceCB, epoch seat, whole batches'
THIRD,THIRD_WHOLE = 'plain fastai, handed a random third','plain fastai, handed a random third in whole batches'
DATACULL,PLAIN = 'datacull RCAP','plain fastai'
WHOLES = max(1, round(K*args.steps/BS)) # a third of the batches

def third(dls, bs, steps):
    "Another part of the same images in each epoch, by chance"
    n = BS*args.steps
    return DataLoaders(dls.train.new(bs=bs, n=bs*steps, get_idxs=lambda: torch.randperm(n)[:bs*steps].tolist()), dls.valid)

def batch_ways(net, dls):
    ways = {HAND:by_hand(net, dls), HAND_FASTAI:in_fastai(net, dls, IdealStep()),
        OURS:in_fastai(net, dls, ImportanceCB(keep=K/BS, seat='batch', gate=None)),
        BLF:in_fastai(net, dls, BatchLossFilter(0., min_sample_perc=K/BS, gate=None))}
    if fast_bf16(device):
        ways[OURS32] = in_fastai(net, dls, ImportanceCB(keep=K/BS, seat='batch', gate=None, bf16=False))
        ways[BLF32] = in_fastai(net, dls, BatchLossFilter(0., min_sample_perc=K/BS, gate=None, bf16=False))
    if get('tsai'): ways[TSAI] = in_fastai(net, dls, get('tsai')(loss_perc=(K+.5)/BS), Levelled())
    if get('mosaicml'): ways[COMPOSER] = in_fastai(net, dls, ComposerStep())
    return {**ways, PLAIN:in_fastai(net, dls)}

def right(name, sizes):
    "Does this way train on as many samples as it should?"
    n,k = BS*args.steps,K*args.steps
    if name==PLAIN: return sizes==[BS]*args.steps
    if name==DATACULL: return k<=sum(sizes)<=k+10 # rounded up in each of ten classes
    if name in (WHOLE,THIRD_WHOLE): return set(sizes)=={BS} and abs(sum(sizes)-k)<BS # rounded to whole batches
    return sizes==[K]*args.steps

# Measuring

raw = [] # what was measured: a row for each way and round

def alternate(ways, which, about, check=True):
    "Seconds `[rounds]` of each way; `which` of the results. Another way begins each round, so that none always follows the same one"
    names,res = list(ways),{k:[] for k in ways}
    for r in range(-2, args.rounds): # two rounds to warm up
        for k in names[r%len(names):]+names[:r%len(names)]:
            out = ways[k]()
            if check and not right(k, out[2]): raise RuntimeError(f'{k} trained on batches of {out[2]}, which is not what is to be compared')
            if r<0: continue
            res[k].append(out[which])
            raw.append(dict(about, way=k, round=r, seconds=out[which]))
    return {k:np.array(v) for k,v in res.items()}

lines,found = [],{} # what is written, and for its summary: (what, as it is wanted) to what came out, by network
def say(s=''): lines.append(s); print(s, flush=True)
def head(*cols): say('\n| '+' | '.join(cols)+' |'); say('|'+'---|'*len(cols))
def row(*cols): say('| '+' | '.join(cols)+' |')
def ratio(a, b):
    "Median and quartiles over the rounds of the ratio within a round"
    lo,mid,hi = np.percentile(a/b, (25,50,75))
    return f'{mid:.3f} ({lo:.3f} to {hi:.3f})'
def compare(what, net, a, b, most=np.inf, least=0):
    "Keep the ratio for the summary, marked where it is not as wanted"
    wanted = f'at most {most:g}' if most<np.inf else f'at least {least:g}' if least else ''
    found.setdefault((what,wanted), {})[net] = ratio(a, b)+' ✗'*(not least<=np.median(a/b)<=most)

kept = ' '.join(f'{k}={v}' for k,v in sorted(os.environ.items()) if k.startswith('MALLOC_'))
say(f'# Beside other packages\n\n`python benchmarks/rivals.py {shlex.join(sys.argv[1:])}`{" (processor time)"*args.processor_time}{f"; {kept}"*bool(kept)}; {machine().rpartition(";")[0]}. '
    f'Medians over {args.rounds} rounds of {args.steps} batches of {BS} images, {K} of each kept; '
    f'convnets with channels {tuple(args.widths)} on MNIST, residual networks on CIFAR-10; all ways in turn in one process. A ratio is the median over rounds of the ratio within a round, '
    f'with quartiles.')
head('package', 'version', 'measured')
for k,(v,what,_) in rivals.items(): row(k, v, what)
for k,(what,why) in missing.items(): row(k, 'not measured', f'{what}: {why}')
summary_at = len(lines)

say('\n## 1. A step at a third, in the batch')
for name,(net,data) in nets.items():
    ts = alternate(batch_ways(net, data['as they come']), 0, dict(part='step', network=name, batches='as they come'))
    head(name, 'ms', 'over ideal (a)', 'ImportanceCB over it')
    for k,t in ts.items(): row(k, f'{1e3*np.median(t):.2f}', ratio(t, ts[HAND]), ratio(ts[OURS], t))
    for ours in (OURS,OURS32,BLF,BLF32):
        if ours not in ts: continue
        for k in (TSAI,COMPOSER):
            if k in ts: compare(f'step of {ours} over {k}', name, ts[ours], ts[k], most=1)
        if ours in (OURS,OURS32): compare(f'step of {ours} over ideal (a)', name, ts[ours], ts[HAND], most=1.05)

say('\n## 2. An epoch at a third')
forms = {EPOCH:'', WHOLE:' with whole batches'}
for name,(net,data) in nets.items():
    for kind,dls in data.items():
        with tempfile.TemporaryDirectory() as folder:
            ways = {EPOCH:in_fastai(net, dls, ImportanceCB(keep=K/BS, gate=None)), THIRD:in_fastai(net, third(dls, K, args.steps)),
                THIRD_WHOLE:in_fastai(net, third(dls, BS, WHOLES))}
            if args.steps>=3: ways[WHOLE] = in_fastai(net, dls, ImportanceCB(keep=K/BS, gate=None, least=BS)) # of fewer there is none
            ways.update({k:f for k,f in batch_ways(net, dls).items() if k in (HAND,TSAI,COMPOSER,PLAIN)})
            if get('datacull') and kind=='as they come': ways[DATACULL] = with_datacull(net, dls, folder)
            ts = alternate(ways, 1, dict(part='epoch', network=name, batches=kind))
        head(f'{name}, batches {kind}', 'ms', 'over our epoch seat', 'over it with whole batches', 'over plain fastai')
        for k,t in ts.items(): row(k, f'{1e3*np.median(t):.1f}', *(ratio(t, ts[o]) if o in ts else '' for o in (EPOCH,WHOLE,PLAIN)))
        for k in (TSAI,COMPOSER):
            for ours,form in forms.items():
                if k in ts and ours in ts: compare(f'epoch of {k} over our epoch seat{form}, batches {kind}', name, ts[k], ts[ours], least=2)
        if kind!='as they come': continue
        for k in (TSAI,COMPOSER):
            if k in ts: compare(f'epoch of {k} over that of {THIRD_WHOLE}, the most that ours could come to, batches {kind}', name, ts[k], ts[THIRD_WHOLE])
        for k,ours in ((THIRD,EPOCH),(THIRD_WHOLE,WHOLE),(DATACULL,EPOCH),(DATACULL,WHOLE)):
            if k in ts and ours in ts: compare(f'epoch of {k}, over our epoch seat{forms[ours]}, batches {kind}', name, ts[k], ts[ours])

say("\n## 3. Norms of samples' gradients")
def ghost(model, x, y, kind):
    "Opacus's norms. Its hooks work in training mode only, which BatchNorm is kept out of"
    model = get('opacus')(deepcopy(model).train())
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    ps = list(model.parameters())
    if kind: x = x.clone().requires_grad_()
    def f():
        for p in ps: p.grad = None
        t = clock()
        loss = F.cross_entropy(model(x), y)
        if kind: torch.autograd.grad(loss, x)
        else: loss.backward()
        norms = model.get_norm_sample()
        return clock()-t,norms
    return f
def ours(model, x, y):
    model = deepcopy(model).eval()
    loss = nn.CrossEntropyLoss()
    def f():
        t = clock()
        norms = grad_norms(model, loss, x, y)
        return clock()-t,norms
    return f
def plain_pass(model, x, y):
    model = deepcopy(model).eval()
    def f():
        for p in model.parameters(): p.grad = None
        t = clock()
        F.cross_entropy(model(x), y).backward()
        return clock()-t,None
    return f
for name,(net,data) in nets.items():
    x,y = (o.as_subclass(Tensor) for o in data['as they come'].one_batch())
    set_seed(0)
    model = net().to(memory_format=torch.contiguous_format) # Opacus's norms are wrong for others
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad(): model(x) # in training mode: running statistics that are not those of no data
    ways = {}
    if norms: ways["grad_norms, with BatchNorm's parameters"] = ours(model, x, y)
    for m in norms: m.requires_grad_(False)
    ways = {'grad_norms':ours(model, x, y), **ways, 'plain forward and backward':plain_pass(model, x, y)}
    if get('opacus'):
        ways['Opacus, by backward()'],ways["Opacus, without the parameters' gradients"] = (ghost(model, x, y, kind) for kind in (False,True))
        for k in list(ways)[-2:]: torch.testing.assert_close(ways[k]()[1], ways['grad_norms']()[1], rtol=1e-3, atol=1e-6)
    many = {k:lambda f=f: (np.median([f()[0] for _ in range(args.steps)]),) for k,f in ways.items()}
    ts = alternate(many, 0, dict(part='norms', network=name, batches='as they come'), check=False)
    head(name, 'ms', 'grad_norms over it')
    for k,t in ts.items(): row(k, f'{1e3*np.median(t):.2f}', ratio(ts['grad_norms'], t))
    for k in ts:
        if 'Opacus' in k: compare(f'grad_norms over {k}', name, ts['grad_norms'], ts[k], most=1)

details_to = len(lines)
say("\n## In short\n\nHow long one takes over how long the other does; ✗ marks what is not as wanted.")
head('', 'wanted', *nets)
for (what,wanted),o in found.items(): row(what, wanted, *(o.get(k, '') for k in nets))
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    order = lines[:summary_at]+lines[details_to:]+lines[summary_at:details_to] # what matters first
    (args.out/'rivals.md').write_text('\n'.join(order)+'\n', encoding='utf-8')
    pd.DataFrame(raw).to_csv(args.out/'rivals.csv', index=False, float_format='%.6g')

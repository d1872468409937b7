"Small problems on which the callbacks are tried."
from fastai.basics import *
from fastai.callback.all import *
from fastai.data.all import *
from fastai_is.all import *

def make_data(n=600, n_val=100, seed=0):
    "Five overlapping clouds; input 0 holds the id of the sample (scaled), so that batches can be recognised"
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n+n_val, 20, generator=g), torch.randint(5, (n+n_val,), generator=g)
    x += 1.*torch.randn(5, 20, generator=g)[y]
    x[:, 0] = torch.arange(n+n_val)/1e6
    items = [(a, b) for a, b in zip(x, y)]
    return items[:n], items[n:]

def make_dls(bs=64, n=600, cls=DataLoader, workers=0, shuffle=True, **kw):
    train, valid = make_data(n)
    return DataLoaders(cls(train, bs=bs, shuffle=shuffle, num_workers=workers, **kw), cls(valid, bs=bs))

def ids_of(xb): return (xb[0][:, 0]*1e6).round().long().tolist()

def make_net(): return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(.2), nn.Linear(32, 5))

def make_learner(dls=None, seed=0, loss=None, model=None, **kw):
    set_seed(seed)
    return Learner(dls or make_dls(), model or make_net(), loss_func=loss or CrossEntropyLossFlat(), metrics=accuracy, **kw)

def quiet_fit(learn, n=3, cbs=None, lr=1e-2, fit='fit_one_cycle'):
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(n, lr, cbs=cbs)
    return learn

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

class Watch(Callback):
    "Notes what each training step was given, after selection"
    order, run_valid = 5, False
    def before_fit(self): self.ids, self.lrs, self.train_losses, self.grad_losses = [], [], [], []
    def before_train(self): self.ids.append([])
    def before_batch(self): self.ids[-1].append(ids_of(self.xb)); self.lrs.append(self.opt.hypers[-1]['lr'])
    def after_loss(self): self.train_losses.append(self.learn.loss.item()); self.grad_losses.append(self.learn.loss_grad.item())

class BF16(MixedPrecision):
    "fastai's own only autocasts CUDA"
    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = torch.autocast('cpu', dtype=torch.bfloat16), torch.amp.GradScaler('cpu', enabled=False)

for o in [o for o in globals() if o=='test' or o.startswith('test_')]: del globals()[o] # fastcore's, which pytest would take for tests

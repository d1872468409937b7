"SVRG against its definition, and that nothing else changes."
import random

import pytest, torch
from torch.utils.data import IterableDataset
from helpers import *
from fastai_is.callback.svrg import *
from fastai_is.data import mnist

def svrg_fit(cb=None, epochs=3, seed=0, cbs=(), model=None, loss=None, fit='fit_one_cycle', lr=1e-2, opt_func=Adam, **kw):
    set_seed(seed)
    learn, w = make_learner(make_dls(**kw), model=model, loss=loss, opt_func=opt_func), Watch()
    return quiet_fit(learn, epochs, [w, *cbs]+([cb] if cb else []), fit=fit, lr=lr), w
def random_states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.initial_seed()
def flat(gs): return torch.cat([g.flatten() for g in gs])
def data(n=600):
    x, y = zip(*make_data(n)[0])
    return torch.stack(x), torch.stack(y)

class Grads(Callback):
    "What the optimiser is given, and the weights it was taken at"
    order, run_valid = SVRG.order+1, False
    def before_fit(self): self.grads, self.at, self.first = [], [], []
    def before_train(self): self.first.append(len(self.grads))
    def before_step(self):
        self.grads.append(flat([p.grad for p in self.model.parameters()]).clone())
        self.at.append(deepcopy(self.model))

# Plain training
@pytest.mark.parametrize('kw', (dict(), dict(workers=1), dict(cls=TfmdDL, drop_last=True)))
def test_an_anchor_that_never_comes_is_plain_training_bit_for_bit(kw):
    (plain, w0), (ours, w1), (other, w2) = svrg_fit(**kw), svrg_fit(cb := SVRG(start=3), **kw), svrg_fit(SVRG(start=2), **kw)
    assert same(weights(plain), weights(ours)) and w0.ids == w1.ids == w2.ids and plain.recorder.values == ours.recorder.values
    assert plain.recorder.values[:2] == other.recorder.values[:2] and plain.recorder.values[2] != other.recorder.values[2]
    assert cb.counts['forwarded'] == cb.counts['backpropagated'] == sum(len(b) for e in w1.ids for b in e)

def test_with_no_noise_to_remove_nothing_changes():
    "One batch is the whole training set: the correction is zero up to rounding, and neither dropout nor order is disturbed by the extra passes"
    def net():
        torch.manual_seed(0)
        return nn.Linear(20, 5)
    (plain, w0), (ours, w1) = [svrg_fit(cb, 4, bs=600, model=net(), opt_func=SGD, lr=.1) for cb in (None, SVRG(start=0))]
    for a, b in zip(plain.model.parameters(), ours.model.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert w0.ids == w1.ids

# The definition
LOSSES = dict(plain=CrossEntropyLossFlat(), classes=CrossEntropyLossFlat(weight=torch.tensor([1., 2, 8, 1, 4])), ignored=CrossEntropyLossFlat(ignore_index=2))
@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('every', (1, 2))
def test_the_step_is_the_definition(every, loss):
    "g_b(w) - g_b(anchor) + mu by hand at every step; mu is the mean over the anchor pass"
    torch.manual_seed(3)
    lf, grads, mus = LOSSES[loss], Grads(), []
    class Note(Callback):
        order, run_valid = SVRG.order+1, False
        def before_train(self): mus.append(cb.mu and [m.clone() for m in cb.mu])
    cb = SVRG(every=every)
    learn, w = svrg_fit(cb, 4, cbs=[grads, Note()], model=nn.Linear(20, 5), loss=lf)
    x, y = data()
    def grad(m, ids): return flat(torch.autograd.grad(lf(m(x[ids]), y[ids]), list(m.parameters())))
    anchor = None
    for e, batches in enumerate(w.ids):
        at = grads.first[e]
        if e >= 1 and (e-1) % every == 0:
            anchor, mu = grads.at[at], flat(mus[e])
            if loss == 'plain': torch.testing.assert_close(mu, grad(anchor, list(range(600))))
            else: assert (mu-grad(anchor, list(range(600)))).norm() < .2*mu.norm() # a mean of ratios
        for i, ids in enumerate(batches):
            want = grad(grads.at[at+i], ids)
            if e >= 1: want = want-grad(anchor, ids)+mu
            torch.testing.assert_close(grads.grads[at+i], want, atol=2e-6, rtol=1e-4)

def test_unbiased_by_enumeration():
    "Ten equal batches and fixed weights away from the anchor: the mean of the corrected gradients is the full gradient; at the anchor each one is"
    grads, cb = Grads(), SVRG(start=0, every=9)
    class Away(Callback):
        order, run_valid = SVRG.order+1, False
        def before_batch(self):
            if self.epoch == 1 and self.iter == 0:
                torch.manual_seed(5)
                with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in self.model.parameters()]
    learn, _ = svrg_fit(cb, 2, cbs=[grads, Away()], model=nn.Linear(20, 5), bs=60, lr=0., fit='fit', opt_func=SGD)
    x, y = data()
    full = [flat(torch.autograd.grad(learn.loss_func(m(x), y), list(m.parameters()))) for m in (grads.at[0], grads.at[-1])]
    near, far = torch.stack(grads.grads[:10]), torch.stack(grads.grads[10:])
    assert (near-full[0]).abs().max() < 1e-6
    torch.testing.assert_close(far.mean(0), full[1])
    assert (far-full[1]).norm(dim=1).min() > 1e-2, 'away from the anchor there is noise'

def test_a_subsampled_anchor_is_unbiased_over_its_draws():
    grads = Grads()
    learn, _ = svrg_fit(SVRG(anchor=.25, start=0), 150, cbs=[grads], model=nn.Linear(20, 5), n=48, bs=12, lr=0., fit='fit', opt_func=SGD)
    x, y = data(48)
    full = flat(torch.autograd.grad(learn.loss_func(learn.model(x), y), list(learn.model.parameters())))
    got = torch.stack(grads.grads)[::4] # all steps of an epoch have the same noise: the anchor's
    assert len(got) == 150 and (got-full).norm(dim=1).min() > 1e-3
    assert ((got.mean(0)-full).abs()/(got.std(0)/150**.5+1e-7)).max() < 4.5

def test_constant_steps_converge_to_the_optimum_where_sgd_stalls():
    "Least squares with noise in the targets, the same constant learning rate, from the same start: SVRG linearly to rounding, SGD to a floor"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=g)
    y = x@torch.randn(4, 1, generator=g)+torch.randn(200, 1, generator=g)
    best = torch.linalg.lstsq(x.double(), y.double()).solution[:, 0]
    items = list(zip(x, y))
    def distances(cb):
        out = []
        class Log(Callback):
            def after_epoch(self): out.append((self.model.weight[0].double()-best).norm().item())
        set_seed(0)
        model = nn.Linear(4, 1, bias=False)
        learn = Learner(DataLoaders(DataLoader(items, bs=10, shuffle=True), DataLoader(items[:10], bs=10)), model, loss_func=MSELossFlat(), opt_func=SGD)
        quiet_fit(learn, 14, [Log()]+([cb] if cb else []), lr=.05, fit='fit')
        return out
    sgd, svrg = distances(None), distances(SVRG())
    assert min(sgd[3:]) > 1e-2
    assert svrg[-1] < 2e-6 and all(b < .5*a for a, b in zip(svrg[1:7], svrg[2:8])), svrg

# The passes leave no trace
def test_same_dropout_masks_at_the_anchor():
    masks = []
    class Mask(nn.Dropout):
        def forward(self, x):
            y = super().forward(x)
            if self.training: masks.append((y == 0).tolist())
            return y
    class Off(nn.Module): # nothing is zero but what dropout made so
        def forward(self, x): return x.abs()+1
    def net(): return nn.Sequential(nn.Linear(20, 8), Off(), Mask(.5), nn.Linear(8, 5))
    svrg_fit(SVRG(start=0, every=2), 2, model=net())
    anchors, steps = masks[:10], masks[10:]
    assert len(steps) == 40 and steps[::2] == steps[1::2] and len({str(m) for m in steps}) == 20 and not any(m in steps for m in anchors)
    svrg_fit(None, 2, model=net())
    assert masks[50:] == steps[::2], 'plain training draws the same masks'

def test_batchnorm_sees_each_batch_once_and_random_states_are_put_back():
    (plain, _), a = svrg_fit(None, 3, lr=0., fit='fit'), random_states()
    (ours, _), b = svrg_fit(SVRG(start=0), 3, lr=0., fit='fit'), random_states()
    assert same(weights(plain), weights(ours)) and a == b and plain.recorder.values == ours.recorder.values

def test_gradient_at_leaves_no_trace_and_is_the_gradient():
    torch.manual_seed(0)
    m, lf = make_net().train(), nn.CrossEntropyLoss()
    x, y = data(32)
    for p in m.parameters(): p.grad = torch.ones_like(p)
    m[0].bias.requires_grad_(False)
    before, at = {k: v.clone() for k, v in m.state_dict().items()}, {k: torch.randn_like(p) for k, p in m.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    got = gradient_at(at, m, lf, (x,), (y,))
    assert same(before, m.state_dict()) and m.training and all((p.grad == 1).all() for p in m.parameters())
    twin = deepcopy(m)
    twin.load_state_dict({**before, **at})
    torch.set_rng_state(state)
    want = torch.autograd.grad(lf(twin(x), y), [p for p in twin.parameters() if p.requires_grad])
    assert len(got) == 5 and all(torch.equal(a, b) for a, b in zip(got, want))

def test_frozen_and_unused_parameters():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(20, 5), nn.Linear(5, 5), nn.Linear(3, 3)
        def forward(self, x): return self.b(self.a(x))
    m = Odd()
    m.a.requires_grad_(False)
    before = deepcopy(m.state_dict())
    learn, _ = svrg_fit(SVRG(start=0), 2, model=m, opt_func=SGD)
    assert torch.equal(m.a.weight, before['a.weight']) and torch.equal(m.c.weight, before['c.weight']) and not torch.equal(m.b.weight, before['b.weight'])

# Variance
def test_variance_against_the_definition():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=g)
    want = np.var((a-b).numpy(), axis=0).sum()/np.var(a.numpy(), axis=0).sum()
    assert abs(svrg_variance(a, b).item()-want) < 1e-5
    assert svrg_variance(a, a) == 0

def test_variance_during_a_fit_is_zero_at_the_anchor_and_leaves_no_trace():
    seen = []
    class Look(Callback):
        run_valid = False
        def before_batch(self): seen.append(cb.variance(4))
    cb = SVRG()
    looked, w0 = svrg_fit(cb, 3, cbs=[Look()])
    assert seen[:10] == [None]*10 and seen[10] == 0 and seen[20] == 0 and min(seen[11:20]+seen[21:]) > 1e-4 and seen[19] > 2*seen[11]
    assert cb.variance() is None and cb.mu is None, 'the fit is over'
    counts = dict(cb.counts)
    other = SVRG()
    plain, w1 = svrg_fit(other, 3)
    assert same(weights(looked), weights(plain)) and w0.ids == w1.ids and counts == other.counts

# Counts, reproducibility, learning
@pytest.mark.parametrize('anchor,drop_last', ((1., False), (.2, False), (.001, False), (1., True)))
def test_counts_are_exact(anchor, drop_last):
    rows = []
    class Count(nn.Linear):
        def forward(self, x):
            if self.training: rows.append(len(x))
            return super().forward(x)
    cb = SVRG(anchor, every=2)
    svrg_fit(cb, 4, model=Count(20, 5), drop_last=drop_last)
    n = 576 if drop_last else 600
    m = {1.: n, .2: 128, .001: 64}[anchor]
    assert cb.counts == dict(forwarded=n+3*2*n+2*m, backpropagated=n+3*2*n+2*m) and sum(rows) == cb.counts['forwarded']

def test_reproducible():
    a, b = [svrg_fit(SVRG(.3), 4)[0] for _ in range(2)]
    assert same(weights(a), weights(b)) and not same(weights(a), weights(svrg_fit(SVRG(.3), 4, seed=1)[0]))

def test_an_unshuffled_loader_still_has_random_anchors():
    mus = []
    class Note(Callback):
        order, run_valid = SVRG.order+1, False
        def before_train(self): mus.append(cb.mu[0].clone())
    cb = SVRG(.2, start=0)
    svrg_fit(cb, 2, cbs=[Note()], shuffle=False, lr=0., fit='fit', model=nn.Linear(20, 5))
    assert not torch.equal(*mus)

def test_learns_mnist():
    "1,500 digits, five epochs of softmax regression: 0.905, where plain training has 0.9005 after the same steps and 0.836 after the first epoch, which is plain (chance 0.1)"
    set_seed(0)
    learn = Learner(mnist(n=1500, bs=64), nn.Sequential(Flatten(), nn.Linear(784, 10)), metrics=accuracy)
    quiet_fit(learn, 5, SVRG(), lr=5e-3)
    assert learn.recorder.values[-1][2] > .88

# Faults
class Raise(Callback):
    run_valid = False
    def __init__(self, ex, event): self.ex = ex; setattr(self, event, self._go)
    def _go(self):
        if self.epoch == 1 and self.iter == 2: raise self.ex('planted')

@pytest.mark.parametrize('event', ('before_batch', 'after_pred', 'after_backward'))
@pytest.mark.parametrize('ex', (CancelBatchException, CancelTrainException, CancelFitException, RuntimeError))
def test_the_learner_is_as_before(ex, event):
    learn, cb = make_learner(), SVRG(start=0)
    def snapshot():
        dl = learn.dls.train
        return dl.bs, dl.n, len(dl), vars(dl).get('get_idxs'), len(learn.cbs), learn.loss_func
    before = snapshot()
    try: quiet_fit(learn, 3, [cb, Raise(ex, event)])
    except RuntimeError: assert ex is RuntimeError
    assert snapshot() == before
    quiet_fit(learn, 1, cb)
    assert snapshot() == before and cb.mu is None

def test_an_error_in_the_anchor_pass_is_undone():
    class Breaks(nn.Linear):
        n = 0
        def forward(self, x):
            self.n += self.training
            if self.n == 14: raise KeyboardInterrupt()
            return super().forward(x)
    set_seed(0)
    learn = make_learner(model=Breaks(20, 5))
    states = []
    class Note(Callback):
        order = SVRG.order-1
        def before_train(self): states.append(random_states())
    with pytest.raises(KeyboardInterrupt) as e: quiet_fit(learn, 3, [Note(), SVRG()])
    assert random_states() == states[1] and 'get_idxs' not in vars(learn.dls.train) and all(p.grad is None or (p.grad == 0).all() for p in learn.model.parameters())

def test_validation_and_lr_find_do_not_notice():
    learn, cb = make_learner(), SVRG(start=0)
    mus = []
    class Validate(Callback):
        run_valid = False
        def after_batch(self):
            if self.iter == 3:
                mu = cb.mu
                with self.learn.lock: cb.before_fit(); cb.after_fit() # what a validation in the middle of a fit calls
                mus.append(cb.mu is mu)
    learn.add_cb(cb)
    quiet_fit(learn, 2, Validate())
    assert mus == [True, True]
    w = weights(learn)
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds(); learn.lr_find(show_plot=False, num_it=15)
    assert same(weights(learn), w)
    assert cb.counts['forwarded'] == 14*64+24, 'fifteen steps of plain training'

@pytest.mark.parametrize('make,words', ((lambda: SVRG(0), 'anchor=0'), (lambda: SVRG(1.5), 'anchor=1.5'), (lambda: SVRG(True), 'anchor=True'), (lambda: SVRG('all'), "anchor='all'"),
    (lambda: SVRG(float('nan')), 'anchor=nan'), (lambda: SVRG(every=0), 'every=0'), (lambda: SVRG(every=.5), 'every=0.5'), (lambda: SVRG(start=-1), 'start=-1'), (lambda: SVRG(start=True), 'start=True')))
def test_bad_values(make, words):
    with pytest.raises(ValueError) as e: make()
    assert words in str(e.value) and 'expected' in str(e.value)

@pytest.mark.parametrize('other', (lambda: MixUp(), lambda: CutMix(), lambda: GradientAccumulation(8), lambda: MixedPrecision(), lambda: ImportanceCB(), lambda: ModelResetter()))
def test_what_it_cannot_be_combined_with_is_named_before_training(other):
    if isinstance(cb := other(), ModelResetter): cb = RNNCallback()
    learn, w = make_learner(), Watch()
    before = weights(learn)
    with pytest.raises(ValueError, match='expected SVRG without it'): quiet_fit(learn, 1, [w, cb, SVRG()])
    assert not getattr(w, 'lrs', None) and same(before, weights(learn))

def test_a_stream_and_a_sum_are_refused():
    train, valid = make_data()
    class Stream(IterableDataset):
        def __iter__(self): return iter(train)
    with pytest.raises(ValueError, match='no ids'): quiet_fit(make_learner(DataLoaders(DataLoader(Stream(), bs=64, n=600), DataLoader(valid, bs=64))), 1, SVRG())
    for loss in (CrossEntropyLossFlat(reduction='sum'), partial(F.cross_entropy, reduction='sum')):
        with pytest.raises(ValueError, match='mean'): quiet_fit(make_learner(loss=loss), 1, SVRG())

def test_with_clipping_and_weight_decay_which_come_later():
    class Norm(Callback):
        order, run_valid = SVRG.order+2, False
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
    norms = []
    svrg_fit(SVRG(start=0), 3, cbs=[GradientClip(.01), Norm()])
    assert max(norms) < .0101

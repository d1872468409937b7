"The engine and its two first callbacks: what is trained on, with which weights, and that nothing else changes."
import warnings

import pytest, torch
from helpers import *
from fastai_is.callback import core
from fastai_is.callback.core import PlannedLoader

PLAIN_SETTINGS = dict(
    keep_all=lambda: ImportanceCB(keep=1), keep_all_batch=lambda: ImportanceCB(keep=1, seat='batch'), keep_all_loss=lambda: ImportanceCB(keep=1, seat='loss'),
    gate_shut=lambda: ImportanceCB(gate=1e9), gate_shut_keep=lambda: ImportanceCB(keep=.3, gate=1e9), gate_shut_batch=lambda: ImportanceCB(keep=.3, seat='batch', gate=1e9),
    gate_shut_loss=lambda: ImportanceCB(keep=.3, seat='loss', gate=1e9), loss_score=lambda: ImportanceCB(score='loss', gate=1e9),
    filter_all=lambda: BatchLossFilter(1.), filter_min=lambda: BatchLossFilter(.5, min_sample_perc=1.), filter_guarded=lambda: BatchLossFilter(.999999, 2/3),
    filter_scheduled=lambda: BatchLossFilter(.5, schedule_func=lambda pct: 0., gate=None))

@pytest.mark.parametrize('setting', PLAIN_SETTINGS)
def test_keeping_everything_is_plain_training_bit_for_bit(setting):
    plain, ours = quiet_fit(make_learner(), 5), quiet_fit(make_learner(), 5, PLAIN_SETTINGS[setting]())
    assert same(weights(plain), weights(ours))
    n = len(plain.recorder.metric_names)-2
    assert [v[:n] for v in plain.recorder.values] == [v[:n] for v in ours.recorder.values], 'nor do the losses in the table change'

def test_one_epoch_is_plain():
    assert same(weights(quiet_fit(make_learner(), 1)), weights(quiet_fit(make_learner(), 1, ImportanceCB())))

@pytest.mark.parametrize('cb', (lambda: ImportanceCB(keep=.3, gate=None), lambda: ImportanceCB(keep=.3, gate=None, seat='batch'), lambda: ImportanceCB(),
    lambda: ImportanceCB(seat='loss', keep=.3, gate=None), lambda: BatchLossFilter(gate=None)))
def test_reproducible_and_learns(cb):
    a, b = [quiet_fit(make_learner(), 5, cb()) for _ in range(2)]
    assert same(weights(a), weights(b))
    assert a.recorder.values[-1][2] > .8

def run_epochs(cb=None, epochs=3, **kw):
    w = Watch()
    set_seed(0) # the loader draws its seed when it is made
    learn = quiet_fit(make_learner(make_dls(**kw)), epochs, [w]+([cb] if cb else []))
    return learn, w

@pytest.mark.parametrize('kw', (dict(), dict(workers=2), dict(drop_last=True), dict(cls=TfmdDL), dict(cls=TfmdDL, workers=2, drop_last=True), dict(shuffle=False), dict(n=580)))
def test_epoch_seat_thins_the_loaders_own_windows(kw):
    "Every step trains on part of what plain fastai would have put into that step; steps and learning rates do not change"
    (plain, w0), (ours, w1) = run_epochs(**kw), run_epochs(ImportanceCB(keep=1/3, gate=None), **kw)
    assert [len(e) for e in w0.ids] == [len(e) for e in w1.ids] and w0.lrs == w1.lrs
    for e0, e1 in zip(w0.ids, w1.ids):
        for b0, b1 in zip(e0, e1):
            assert set(b1) <= set(b0) and len(set(b1)) == len(b1)
            assert len(b1) == (21 if len(b0) == 64 else max(2, round(21*len(b0)/64)))
    dl = ours.dls.train
    assert (dl.bs, dl.n, 'get_idxs' in vars(dl), len(dl)) == (64, kw.get('n', 600), False, len(w0.ids[0]))

def test_remembered_scores_belong_to_their_ids():
    "A model that never changes (learning rate 0, no dropout) has the same score for a sample whenever it is seen"
    learn, cb = make_learner(model=nn.Linear(20, 5)), ImportanceCB(keep=.3, gate=None, smooth=.5)
    quiet_fit(learn, 12, cb, lr=0., fit='fit')
    train, _ = make_data()
    x, y = torch.stack([a for a, _ in train]), torch.stack([b for _, b in train])
    want = upper_bound(learn.model(x), y, loss_func=learn.loss_func).detach()
    seen = ~cb.store.values.isnan()
    assert seen.sum() > 500
    torch.testing.assert_close(cb.store.values[seen], want[seen.nonzero()[:, 0]])

def test_every_sample_comes_back():
    "Half kept, smooth 0.4: a chance of at least 0.2 an epoch, so that forty epochs miss any of 600 with a probability below 0.1"
    learn, cb, w = make_learner(), ImportanceCB(keep=.5, gate=None, smooth=.4), Watch()
    quiet_fit(learn, 50, [cb, w], fit='fit', lr=1e-2)
    assert len({i for e in w.ids[10:] for b in e for i in b}) == 600

def test_repeated_ids():
    wgts = np.r_[np.full(30, 20.), np.ones(570)]
    train, valid = make_data()
    from fastai.callback.data import WeightedDL
    dls = DataLoaders(WeightedDL(train, bs=64, wgts=wgts, shuffle=True), DataLoader(valid, bs=64))
    w = Watch()
    quiet_fit(make_learner(dls), 3, [w, ImportanceCB(keep=.5, gate=None)])
    counts = Counter(i for e in w.ids for b in e for i in b)
    assert max(counts.values()) > 3 and sum(v for k, v in counts.items() if k < 30) > .25*sum(counts.values()), 'the loader\'s own weights still act'

@pytest.mark.parametrize('bias', (1., .5, 0.))
@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
def test_the_step_is_the_weighted_mean(seat, bias):
    "What is back-propagated, and what is logged, against the definition"
    seen = []
    class Check(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def after_loss(self):
            s = cb.fit_state
            if seat == 'loss':
                torch.testing.assert_close(self.learn.loss.detach(), F.cross_entropy(self.pred, self.y).detach()) # logged: the whole batch
                l, sel = F.cross_entropy(self.pred, self.y, reduction='none'), chosen[-1]
                w = sel.weights if bias == 1 else sel.weights**bias/(sel.weights**bias).mean()
                torch.testing.assert_close(self.learn.loss_grad, (w*l[sel.idxs]).mean())
                return seen.append(1)
            if s.w is None: return
            l = F.cross_entropy(self.pred, self.y, reduction='none')
            w = s.w if bias == 1 else s.w**bias/(s.w**bias).mean()
            torch.testing.assert_close(self.learn.loss_grad, (w*l).mean())
            torch.testing.assert_close(self.learn.loss, (s.w*l).mean().detach())
            assert len(s.w) == len(l) < 64
            seen.append(1)
    cb, chosen = ImportanceCB(keep=.3, gate=None, seat=seat, bias=bias), []
    choose = cb.choose
    cb.choose = lambda scores: chosen.append(sel := choose(scores)) or sel
    quiet_fit(make_learner(loss=nn.CrossEntropyLoss()), 3, [cb, Check()])
    assert len(seen) == 30

def full_gradient(model, x, y, lf):
    gs = torch.autograd.grad(lf(model(x), y), list(model.parameters()))
    return torch.cat([g.flatten() for g in gs])

@pytest.mark.parametrize('loss', (CrossEntropyLossFlat(), CrossEntropyLossFlat(weight=torch.tensor([1., 2, 8, 1, 4])), CrossEntropyLossFlat(reduction='sum')))
@pytest.mark.parametrize('seat', ('batch', 'loss', 'epoch', 'joined', 'fixed', 'part', 'refined', 'early'))
def test_bias_1_is_unbiased_through_the_callback(seat, loss):
    "The mean step over many choices, in one or two stages, from one and the same window, or two that are joined, or one and a part of the next, or from a plain batch by a fresh score, is the plain step; with bias=0 it is not"
    train, valid = make_data(32)
    x, y = torch.stack([a for a, _ in train]), torch.stack([b for _, b in train])
    bs = 16 if seat in ('joined', 'fixed', 'refined', 'early') else 24 if seat == 'part' else 32
    def steps(bias, n=1000):
        set_seed(1) # of a model and choices by which the twin is 10 standard errors off or more
        dls = DataLoaders(DataLoader(train, bs=bs), DataLoader(valid, bs=32))
        learn, grads = make_learner(dls, model=nn.Linear(20, 5), loss=deepcopy(loss)), []
        class Grab(Callback):
            run_valid = False
            def before_step(self): grads.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        if seat == 'joined': cb = ImportanceCB(limit=100., floor=.3, bias=bias, smooth=.1, least=10, prefilter=1)
        elif seat == 'fixed': cb = ImportanceCB(keep=.3, gate=None, bias=bias, smooth=.1, least=10)
        elif seat == 'part': cb = ImportanceCB(limit=100., floor=3/8, bias=bias, smooth=.1, least=12, prefilter=1)
        elif seat == 'refined': cb = ImportanceCB(limit=100., floor=.2, bias=bias, smooth=.1, least=6, prefilter=3)
        elif seat == 'early': cb = ImportanceCB(bias=bias, smooth=.1, early=True)
        else: cb = ImportanceCB(keep=.3, gate=None, seat=seat, bias=bias, smooth=.1)
        if seat == 'early': # always as in a first epoch that has found out that .4 will do
            cb.plan, cb.before_batch, before = (lambda ids, bs: None), (lambda: (vars(cb.fit_state).update(refine=True, share=.4), before())), cb.before_batch
        if seat in ('epoch', 'joined', 'fixed', 'part', 'refined'): # a fit whose first epoch is whole, so that the normaliser is that of the whole window
            cb.plan, plan = (lambda ids, bs: None if not len(cb.store) else plan(ids, bs)), cb.plan
        if seat == 'part': # batches of 24 and 8 would count alike in it
            w = getattr(loss.func, 'weight', None)
            cb.before_batch, before = (lambda: (setattr(cb, 'normaliser', (1. if w is None else w[y].mean(), 1)), before())), cb.before_batch
        learn.validate = noop
        with learn.no_bar(), learn.no_logging(), replacing(learn, '_do_epoch_validate', noop): learn.fit(n, 0., cbs=[cb, Grab()])
        full = full_gradient(learn.model, x, y, loss)
        return torch.stack(grads[-(-32//bs):]), full*bs/32 if getattr(loss, 'reduction', '') == 'sum' else full # a sum over as many as a batch
    got, want = steps(1.)
    z = (got.mean(0)-want).abs()/(got.std(0)/len(got)**.5+1e-6)
    assert z.max() < 3.67 # what 4.5 is to 1,500 draws
    got, want = steps(0.)
    z = (got.mean(0)-want).abs()/(got.std(0)/len(got)**.5+1e-6)
    assert z.max() > 8, 'the test would notice'

@contextmanager
def replacing(o, attr, val):
    setattr(o, attr, val)
    try: yield
    finally: delattr(o, attr)

def test_inflation_predicts_the_variance_of_real_gradients():
    "Digits, an MLP after some training, exact gradient norms as scores; windows of 64, a third kept"
    dls = mnist(n=2000, bs=64)
    torch.manual_seed(0)
    model = nn.Sequential(Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))
    learn = quiet_fit(Learner(dls, model), 4, lr=5e-3)
    x, y = learn.dls.train.new(bs=1500, shuffle=False, drop_last=False).one_batch()
    x, y = x.as_subclass(Tensor), y.as_subclass(Tensor)
    ps = {k: v.detach() for k, v in model.named_parameters()}
    def loss(ps, x, y): return F.cross_entropy(torch.func.functional_call(model, ps, (x[None],)), y[None])
    gs = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(ps, x, y)
    G = torch.cat([g.flatten(1) for g in gs.values()], 1).detach()
    s, g, mean = G.norm(dim=1), torch.Generator().manual_seed(0), G.mean(0)
    whole, part, pred = 0., 0., []
    for _ in range(2500):
        ids = torch.randperm(len(G), generator=g)[:64]
        sel = systematic(s[ids], 21, .2, g)
        whole += (G[ids].mean(0)-mean).square().sum()
        part += ((sel.weights[:, None]*G[ids[sel.idxs]]).mean(0)-mean).square().sum()
        pred.append(s[ids])
    measured, predicted = float(part/whole), float(inflation(torch.stack(pred), 21, .2))
    assert measured > 1.02 and abs((predicted-1)/(measured-1)-1) < .35, (measured, predicted)
    assert abs(predicted/measured-1) < .1, (measured, predicted)

# Columns and counts
def test_columns_and_counts():
    learn, w, cb = make_learner(), Watch(), ImportanceCB(keep=.25, gate=None, seat='batch')
    quiet_fit(learn, 2, [w, cb])
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'kept', 'tau', 'time']
    trained = sum(len(b) for e in w.ids for b in e)
    assert cb.counts == dict(forwarded=2*600+trained, backpropagated=trained)
    assert abs(learn.recorder.values[-1][3]-trained/2/600) < .01
    assert learn.recorder.values[-1][4] >= 1

def test_train_loss_compares_with_plain():
    "At a learning rate of 0 the losses logged estimate the same number; a mean over the chosen would be far above"
    learn = quiet_fit(make_learner(model=nn.Linear(20, 5)), 5)
    def logged(cb=None):
        w = Watch()
        quiet_fit(learn, 30, [w]+([cb] if cb else []), lr=0., fit='fit')
        return np.mean(w.train_losses), np.mean(w.grad_losses)
    plain, _ = logged()
    for cb in (ImportanceCB(keep=.3, gate=None, bias=0.), ImportanceCB(keep=.3, gate=None, seat='batch', bias=0.), BatchLossFilter(.6, gate=None)):
        loss, chosen = logged(cb)
        assert abs(loss/plain-1) < .04 and chosen/plain > 1.15, cb

# The gates
def kept_by_epoch(cb, epochs=6, **kw):
    set_seed(0)
    learn = quiet_fit(make_learner(make_dls(**kw)), epochs, cb)
    i = learn.recorder.metric_names.index('kept')-1
    return [v[i] for v in learn.recorder.values]

def test_auto_keeps_all_at_first_and_less_later():
    k = kept_by_epoch(ImportanceCB())
    assert k[0] == 1 and .1 <= k[-1] < .7 and all(a >= b-.05 for a, b in zip(k, k[1:]))
    assert kept_by_epoch(ImportanceCB(limit=1.05))[-1] > k[-1] > kept_by_epoch(ImportanceCB(limit=3.))[-1]
    assert min(kept_by_epoch(ImportanceCB(limit=50., floor=.5))) >= .49

@pytest.mark.parametrize('bs,floor,least,drop_last,k,window', ((64, .05, 1, False, 3, 64), (64, .05, 32, False, 33, 704), (64, .05, 32, True, 33, 704), (64, .05, 10**6, False, 64, 1365),
    (64, .05, 10**6, True, 64, 1365), (32, .6, 32, False, 32, 54), (32, .6, 32, True, 32, 54), (16, .4, 32, True, 16, 43), (64, .6, 32, False, 38, 64)))
@pytest.mark.parametrize('fixed', (False, True))
def test_what_is_kept_of_several_batches_makes_a_step(bs, floor, least, drop_last, k, window, fixed):
    "Steps have `least` samples or as many as a batch, all but the last one; none comes twice, weights add up, and every sample is in reach of the plan"
    plans = []
    share = dict(keep=floor, gate=None) if fixed else dict(limit=50., floor=floor, prefilter=1)
    learn, w = run_epochs(ImportanceCB(least=least, on_select=lambda l, i, w, s: plans.append((i, w)), **share), 4, n=2000, bs=bs, drop_last=drop_last)
    n = len(learn.dls.train_ds)//bs*bs if drop_last else len(learn.dls.train_ds)
    for (ids, weights), batches in zip(plans, w.ids if fixed else w.ids[1:], strict=True): # what is to be found out of scores begins with a whole epoch
        sizes = [len(b) for b in batches]
        assert set(sizes[:-1]) == {k} and sizes[-1] <= k and len(sizes) in ({n//window, -(-n//window)} if drop_last else {-(-n//window)})
        assert sum(batches, []) == ids.tolist() and len(ids.unique()) == len(ids)
        if sizes[-1] == k or not drop_last: assert abs(weights.mean()-1) < .1
    assert learn.pct_train == pytest.approx(1.)

@pytest.mark.parametrize('kw,k,load', ((dict(), 33, 99), (dict(drop_last=True), 33, 99), (dict(bs=16, drop_last=True), 16, 48), (dict(n=768, drop_last=True), 33, 99), (dict(n=700, drop_last=True), 30, 90), (dict(n=1500, drop_last=True), 33, 99),
    (dict(workers=2), 33, 99), (dict(n=2005), 33, 99)))
def test_two_stages(kw, k, load):
    "Three times as many are loaded as are trained on, a fresh score of all of these chooses, and is remembered; columns and counts are true"
    looks, calls, w = [], [], Watch()
    class Look(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def before_batch(self):
            s = cb.fit_state
            if s.scored is not None: looks.append((self.epoch, s.rows, s.idxs, s.w, s.scored.scores))
        def after_epoch(self):
            for e, rows, _, _, scores in looks:
                if e == self.epoch: torch.testing.assert_close(cb.store.values[rows], scores)
    cb = ImportanceCB(limit=50., floor=.05, on_select=lambda learn, *o: calls.append(o))
    learn = quiet_fit(make_learner(make_dls(**{'n':2000, **kw})), 4, [w, cb, Look()])
    bs, n = kw.get('bs', 64), kw.get('n', 2000)
    if kw.get('drop_last'): n = n//bs*bs
    for e in (1, 2, 3):
        look, (ids, wgts, _), batches = [o for o in looks if o[0] == e], calls.pop(0), w.ids[e]
        assert ids.tolist() == torch.cat([o[1] for o in look]).tolist() and len(ids.unique()) == len(ids), 'what is loaded is what was planned, once'
        assert {len(o[1]) for o in look[:-1]} <= {load} and {len(b) for b in batches[:-1]} <= {k} and len(look) >= n//bs//12
        if kw.get('drop_last'): assert len(look[-1][1]) == load and len(batches[-1]) == k
        for (_, rows, idxs, weights, scores), batch in zip(look, batches, strict=True):
            assert rows[idxs].tolist() == batch, 'what is trained on was loaded'
            i, wg, s = calls.pop(0)
            assert torch.equal(i, idxs) and torch.equal(wg, weights) and torch.equal(s, scores)
        if not kw.get('drop_last'): assert abs(torch.cat([o[3] for o in look]).mean()-1) < .1
        assert learn.recorder.values[e][3] == pytest.approx(sum(map(len, batches))/n, rel=1e-6)
    trained = sum(len(b) for e in w.ids for b in e)
    assert not calls and cb.counts == dict(backpropagated=trained, forwarded=trained+sum(len(o[1]) for o in looks))
    assert learn.pct_train == pytest.approx(1.)

@pytest.mark.parametrize('bs,floor,k', ((16, .3, 15), (64, .25, 32), (32, .25, 32)))
@pytest.mark.parametrize('windows', (31, 32, 33))
def test_an_awkward_number_of_batches_does_not_make_small_steps(bs, floor, k, windows):
    "Where short batches are dropped, all steps have `least` samples, whatever is left over; and each sample is in reach"
    seen = set()
    cb, w = ImportanceCB(limit=50., floor=floor, least=k), Watch()
    plan = cb.plan
    cb.plan = lambda ids, bs: seen.update(map(int, ids)) or plan(ids, bs)
    quiet_fit(make_learner(make_dls(bs=bs, n=bs*windows+5, drop_last=True)), 3, [w, cb])
    joined = k//round(floor*bs)
    for e in w.ids[1:]: assert {len(b) for b in e} == {k} and len(e) in (windows//joined, -(-windows//joined))

class Logits(nn.Module):
    "Returns a dictionary, as language models do"
    def __init__(self): super().__init__(); self.net = make_net()
    def forward(self, x): return dict(logits=self.net(x))

def test_a_model_that_cannot_be_scored_alone():
    "Then remembered scores choose, with one warning; what was loaded for the second stage is trained on"
    class Unpack(Callback):
        def after_pred(self): self.learn.pred = self.pred['logits']
    cb, w = ImportanceCB(limit=50., floor=.1, least=1), Watch()
    learn = make_learner(model=Logits(), cbs=Unpack())
    with pytest.warns(UserWarning, match='No fresh scores could be had .AttributeError') as ws: quiet_fit(learn, 4, [w, cb])
    assert len([o for o in ws if 'fresh scores' in str(o.message)]) == 1
    assert [len(e[0]) for e in w.ids] == [64, 18, 6, 6] and cb.counts['forwarded'] == cb.counts['backpropagated'] == sum(len(b) for e in w.ids for b in e)

def early_runs(epochs=3, bs=32, n=2000, **kw):
    "A callback that chooses in the first epoch, and what it did in each step of it: epoch, offered, chosen, fresh scores"
    calls, w = [], Watch()
    cb = ImportanceCB(**{**dict(early=True, limit=100., least=12, on_select=lambda learn, idxs, weights, scores: calls.append((learn.epoch, idxs, weights, scores))), **kw})
    learn = quiet_fit(make_learner(make_dls(n=n, bs=bs)), epochs, [w, cb])
    return cb, learn, w, calls

def test_a_choice_in_the_first_epoch():
    "Ten whole batches tell, and from then on 12 of each 32 are trained on; of the last batch, of 16, as large a part. All of them are remembered"
    cb, learn, w, calls = early_runs()
    first = [o for o in calls if o[0] == 0]
    assert [len(b) for b in w.ids[0]] == [32]*10+[12]*52+[6] and len(first) == 53
    for (_, idxs, wgts, scores), batch in zip(first, w.ids[0][10:], strict=True):
        assert len(idxs) == len(wgts) == len(batch) and len(scores) in (32, 16) and len(idxs.unique()) == len(idxs)
    assert abs(torch.cat([o[2] for o in first]).mean()-1) < .02, 'weights add up to as many as were offered'
    assert learn.recorder.values[0][3] == pytest.approx((320+52*12+6)/2000) and len(cb.store) == 2000
    one, w1 = ImportanceCB(early=True, limit=100., least=12), Watch()
    plain, now = quiet_fit(make_learner(make_dls(n=2000, bs=32)), 1, w1), quiet_fit(make_learner(make_dls(n=2000, bs=32)), 1, one)
    assert same(weights(plain), weights(now)) and one.counts == dict(forwarded=2000, backpropagated=2000), 'for later epochs only: a fit of one is plain training'

def test_a_choice_in_the_first_epoch_counts():
    "What is scored and what is trained on, and a choice that by fresh scores takes important samples more often"
    cb, _, w, calls = early_runs(2)
    trained, offered = sum(len(b) for e in w.ids for b in e), sum(len(o[3]) for o in calls if o[0] == 0)
    second = cb.counts['forwarded']-trained-offered
    assert cb.counts['backpropagated'] == trained and offered == 1680 and 0 < second < 2000
    chosen, all_ = torch.cat([o[3][o[1]] for o in calls if o[0] == 0]), torch.cat([o[3] for o in calls if o[0] == 0])
    assert chosen.mean() > 1.15*all_.mean()

@pytest.mark.parametrize('kw', (dict(limit=1.0001), dict(least=20), dict(least=32), dict(gate=1e3)))
def test_no_choice_in_the_first_epoch_is_no_difference(kw):
    "Where more than 0.6 of a batch would be needed, or the gate is shut, training is as without `early`, bit for bit"
    (a, la, wa, _), (b, lb, wb, _) = early_runs(**kw), early_runs(**kw, early=False)
    assert {len(o) for o in wa.ids[0]} == {32, 16} and wa.ids == wb.ids and same(weights(la), weights(lb)) and a.counts == b.counts

def test_a_choice_in_the_first_epoch_of_what_cannot_be_scored_alone():
    class Unpack(Callback):
        def after_pred(self): self.learn.pred = self.pred['logits']
    cb, w, learn = ImportanceCB(early=True, limit=100., least=12), Watch(), make_learner(make_dls(n=2000, bs=32), model=Logits(), cbs=Unpack())
    with pytest.warns(UserWarning, match='No fresh scores could be had .AttributeError') as ws: quiet_fit(learn, 2, [w, cb])
    assert len([o for o in ws if 'fresh scores' in str(o.message)]) == 1 and {len(b) for b in w.ids[0]} == {32, 16} and len(w.ids[1][0]) < 32

def test_an_epoch_that_none_follows_is_whole():
    "The last of a fit that is gone on with"
    cb, w = ImportanceCB(early=True, limit=100., least=12), Watch()
    learn = make_learner(make_dls(n=2000, bs=32))
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=[w, cb], start_epoch=2)
    assert [len(b) for e in w.ids for b in e] == [32]*62+[16]

@pytest.mark.parametrize('early', (False, True))
def test_the_normaliser_is_that_of_all_whole_batches(early):
    "With a rare class of a large weight: also of those that are cut, for later epochs go by it"
    weight = torch.tensor([1., 1, 1, 1, 50])
    cb = ImportanceCB(early=early, limit=100., least=12)
    learn = quiet_fit(make_learner(make_dls(n=2000, bs=32), loss=CrossEntropyLossFlat(weight=weight)), 2, cb)
    true = 1/np.mean([weight[y].item() for _, y in learn.dls.train_ds])
    assert cb.normaliser[1] == (63 if early else 32+3), 'without, the first 32 and every eighth'
    assert abs(float(cb.normaliser[1]/cb.normaliser[0])/true-1) < .06

@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_broken_scores_in_the_first_epoch(bad):
    "Batches with a broken score are chosen from uniformly, and the normaliser of a sum stays the size of the batch"
    class Breaks(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(20, 5)
        def forward(self, x): return torch.where((x[:, :1]*1e6).round() % 50 == 5, torch.tensor(bad), self.lin(x))
    seen = []
    class Look(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def after_loss(self):
            s = cb.fit_state
            if s.scored is None or self.epoch: return
            ok = bool(s.scored.scores.isfinite().all())
            assert ok != bool((s.w == s.w[0]).all())
            seen.append((ok, bool(self.loss_grad.isfinite()), len(s.scored.scores), float(s.scale)))
    cb = ImportanceCB(early=True, limit=100., least=12)
    learn = make_learner(make_dls(n=2000, bs=32), model=Breaks(), loss=CrossEntropyLossFlat(reduction='sum'))
    with pytest.warns(UserWarning, match='NaN'): quiet_fit(learn, 2, [cb, Look()], lr=0., fit='fit')
    assert len(seen) == 53 and .3 < np.mean([not ok for ok, *_ in seen]) < .7
    spared = [(n, scale) for ok, finite, n, scale in seen if finite and not ok]
    assert spared and all(scale == pytest.approx(n) for ok, finite, n, scale in seen if finite)

def test_a_sum_of_mixed_samples():
    "MixUp's loss is a sum too: a step counts for as many as were offered, also the last one"
    cb, seen = ImportanceCB(early=True, limit=100., least=12), []
    class Look(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def after_loss(self): cb.fit_state.w is None or seen.append((self.epoch, cb.fit_state.stands_for, float(cb.fit_state.scale)))
    learn = make_learner(make_dls(n=2000, bs=32), loss=CrossEntropyLossFlat(reduction='sum'), cbs=MixUp())
    quiet_fit(learn, 2, [cb, Look()], lr=1e-4)
    assert [n for e, n, _ in seen if e == 0] == [32]*52+[16] and all(scale == pytest.approx(n, rel=1e-4) for _, n, scale in seen)

def test_auto_gate_of_a_fixed_share_waits_until_the_prediction_allows_it():
    k = kept_by_epoch(ImportanceCB(keep=.4), 8)
    assert k[0] == 1 and set(round(v, 1) for v in k) == {1., .4}
    assert kept_by_epoch(ImportanceCB(keep=.4, gate=None), 2) == [pytest.approx(.4, abs=.01)]*2, 'no gate: from the first step'

def test_tau_threshold():
    assert min(kept_by_epoch(ImportanceCB(keep=.4, gate=1.3), 6)) < .5
    assert kept_by_epoch(ImportanceCB(keep=.4, gate=1e3), 6) == [1.]*6
    assert min(kept_by_epoch(ImportanceCB(keep=.4, gate=1.3, seat='batch'), 6)) < .5

def test_batch_gate_opens_at_break_even_and_never_for_two_thirds():
    assert kept_by_epoch(ImportanceCB(keep=.7, seat='batch'), 6) == [1.]*6
    cb = ImportanceCB(keep=.4, seat='batch', smooth=0.)
    k = kept_by_epoch(cb, 40)
    assert k[0] == 1 and k[-1] < .5

def test_measured_costs_move_the_gate():
    "Where forward passes cost nothing the gate opens early; where they are all the cost, never"
    cheap, dear = [kept_by_epoch(ImportanceCB(keep=.4, seat='batch', costs=c), 8) for c in ((1e-6, 3.), (3., 1e-6))]
    assert min(cheap) < .5 and dear == [1.]*8

def test_no_scoring_pass_while_shut():
    cb = ImportanceCB(keep=.3, seat='batch', gate=1e9)
    quiet_fit(make_learner(), 2, cb)
    assert cb.counts['forwarded'] == cb.counts['backpropagated']
    cb = BatchLossFilter(.99)
    quiet_fit(make_learner(), 1, cb)
    assert cb.counts['forwarded'] == cb.counts['backpropagated']

# BatchLossFilter
def test_filter_keeps_the_samples_with_most_of_the_loss():
    seen = []
    class Check(Callback):
        order, run_valid = BatchLossFilter.order-1, False
        def before_batch(self): self.whole = self.xb, self.yb
    class After(Callback):
        order, run_valid = BatchLossFilter.order+1, False
        def before_batch(self):
            (x,), (y,) = self.learn.check.whole
            self.model.eval()
            with torch.no_grad(): l = F.cross_entropy(self.model(x), y, reduction='none')
            self.model.train()
            assert ids_of(self.xb) == [ids_of((x,))[i] for i in top_loss(l, .7).idxs]
            seen.append(len(self.y)/len(y))
        def after_loss(self): torch.testing.assert_close(self.learn.loss_grad, F.cross_entropy(self.pred, self.y).as_subclass(TensorBase))
    quiet_fit(make_learner(), 3, [BatchLossFilter(.7, gate=None), Check(), After()])
    assert min(seen) < .5

def test_filter_guard():
    k = kept_by_epoch(BatchLossFilter(.9), 12)
    assert k[0] == 1 and k[-1] < 2/3
    assert kept_by_epoch(BatchLossFilter(.9, min_sample_perc=.7), 12) == [1.]*12

def test_filter_schedule_scales_what_is_left_out():
    w = Watch()
    quiet_fit(make_learner(), 4, [w, BatchLossFilter(0., min_sample_perc=.25, schedule_func=SchedLin(0., 1.), gate=None)])
    sizes = [len(b) for e in w.ids for b in e]
    for i, n in enumerate(sizes):
        bs = 64 if (i+1)%10 else 24
        assert n == bs-int(i/40*(bs-math.ceil(bs*.25)))
    with pytest.raises(ValueError, match='schedule_func'): quiet_fit(make_learner(), 1, BatchLossFilter(.5, schedule_func=lambda p: 2., gate=None))

# Memory
def test_scores_are_remembered_across_fits():
    learn, cb = make_learner(), ImportanceCB()
    quiet_fit(learn, 4, cb)
    n = len(cb.store)
    assert n == 600
    quiet_fit(learn, 2, cb)
    assert learn.recorder.values[0][3] < 1, 'the second fit selects from its first epoch on'
    cb.store.clear()
    quiet_fit(learn, 1, cb)
    assert learn.recorder.values[0][3] == 1

@pytest.mark.parametrize('a,b,same', ((CrossEntropyLossFlat(), CrossEntropyLossFlat(), True), (F.cross_entropy, F.cross_entropy, True), (F.cross_entropy, F.nll_loss, False),
    (CrossEntropyLossFlat(), CrossEntropyLossFlat(weight=torch.ones(5)), False), (CrossEntropyLossFlat(), CrossEntropyLossFlat(label_smoothing=.1), False),
    (lambda p, y, reduction='mean': 0, lambda p, y, reduction='mean': 0, False)))
def test_what_counts_as_another_loss(a, b, same): assert core._same_loss(a, b) is same

def test_another_loss_begins_anew():
    "Neither the scores nor the normaliser of the former one are used; the same loss goes on with them"
    learn, cb = make_learner(loss=CrossEntropyLossFlat(weight=torch.tensor([1., 2, 8, 1, 4]))), ImportanceCB(keep=.3, gate=None)
    quiet_fit(learn, 1, cb)
    assert abs(cb.normaliser[0]/cb.normaliser[1]-1) > .5 and cb.normaliser[1] == 10
    quiet_fit(learn, 1, cb)
    assert learn.recorder.values[0][3] < 1 and cb.normaliser[1] == 10, 'the second fit selects from its first epoch on'
    learn.loss_func, plans = CrossEntropyLossFlat(), []
    cb.on_select = lambda learn, idxs, weights, scores: plans.append((scores, weights))
    quiet_fit(learn, 1, cb)
    (scores, weights), = plans
    assert (scores == 1).all() and (weights == 1).all() and cb.normaliser[0] == pytest.approx(cb.normaliser[1]), 'nothing is remembered, so the choice is by chance'

def test_unseen_ids_come_first():
    cb = ImportanceCB(keep=.2, gate=None)
    cb.store.put(torch.arange(590), torch.cat([torch.ones(1), torch.full((589,), .01)]))
    w = Watch()
    quiet_fit(make_learner(), 1, [w, cb])
    got = {i for b in w.ids[0] for i in b}
    assert set(range(590, 600)) <= got

# Loaders without ids
def no_ids(kind):
    train, valid = make_data()
    if kind == 'pytorch': return DataLoaders(torch.utils.data.DataLoader(train, batch_size=64, shuffle=True), torch.utils.data.DataLoader(valid, batch_size=64))
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(train)
    return DataLoaders(DataLoader(Stream(), bs=64, n=600), DataLoader(valid, bs=64))

@pytest.mark.parametrize('kind', ('pytorch', 'iterable'))
def test_without_ids_the_batch_seat_is_used(kind):
    w = Watch()
    with pytest.warns(UserWarning, match="Using seat='batch'") as ws:
        quiet_fit(make_learner(no_ids(kind)), 2, [w, ImportanceCB(keep=.25, gate=None)])
    assert len([o for o in ws if 'seat' in str(o.message)]) == 1
    assert [len(b) for b in w.ids[1]] == [16]*9+[6]

def test_skipped_items_are_noticed():
    train, valid = make_data()
    class Skips(DataLoader):
        def create_item(self, s):
            if s%50 == 7: raise SkipItemException()
            return super().create_item(s)
    dls = DataLoaders(Skips(train, bs=64, shuffle=True), DataLoader(valid, bs=64))
    with pytest.warns(UserWarning, match='skipped'): quiet_fit(make_learner(dls), 3, ImportanceCB(keep=.3, gate=None))

def test_language_model_keeps_its_rows():
    class Rows(DataLoader): seq_len = 5
    train, valid = make_data()
    dls = DataLoaders(Rows(train, bs=64), DataLoader(valid, bs=64))
    w = Watch()
    with pytest.warns(UserWarning, match="Using seat='loss'"): quiet_fit(make_learner(dls), 1, [w, ImportanceCB(keep=.3, gate=None)])
    assert [len(b) for b in w.ids[0]] == [64]*9+[24]

@pytest.mark.parametrize('kw', ({}, dict(seat='batch', hold='variance')))
def test_in_the_loss_the_gate_is_open_also_where_it_is_not_the_seat_asked_for(kw):
    "A language model's loader allows no other seat; its first epoch is whole, and from then on part of each batch is given weight"
    dls = make_dls()
    dls.train.seq_len = 5
    learn, cb = make_learner(dls, model=nn.Linear(20, 5)), ImportanceCB(limit=3., **kw)
    if kw: cb.tau = lambda: 1. if learn.epoch == 0 else 4.
    with pytest.warns(UserWarning, match="Using seat='loss'"): quiet_fit(learn, 5, cb, lr=3e-2)
    kept = [v[3] for v in learn.recorder.values]
    assert kept[0] == 1 > .6 > max(kept[1:])

@pytest.mark.parametrize('name', ('seq_len', 'world_size'))
def test_attributes_of_the_data_set_are_not_the_loaders(name):
    "fastai's loaders answer for their dataset, and windows of time series have a length too"
    class Windows(list): pass
    train, valid = make_data()
    data = Windows(train)
    setattr(data, name, 5)
    dl = DataLoader(data, bs=64)
    assert hasattr(dl, name) and core.no_ids(dl) is None and core.find_seat(dl, 'epoch') == 'epoch' and not core.loader_has(dl, name)
    quiet_fit(make_learner(DataLoaders(dl, DataLoader(valid, bs=64))), 1, SelectiveBackprop(every=2))
    setattr(dl, name, 5)
    assert core.no_ids(dl) is not None
    class Wraps:
        def __init__(self, dl): self.dl = dl
    assert core.loader_has(Wraps(dl), name) and not core.loader_has([], name)

# Short batches
@pytest.mark.parametrize('n,k', ((1021, 20), (1023, 7), (1000, 28), (1021, 10), (157, 20)))
def test_no_window_of_one_sample(n, k):
    "Windows are as long as it takes to keep 32 of them; where one sample would be left over, it belongs to the last one"
    cb, w, plans = ImportanceCB(limit=100., floor=k/32, prefilter=1), Watch(), []
    plan = cb.plan
    cb.plan = lambda ids, bs: plans.append((len(ids), plan(ids, bs))) or plans[-1][1]
    quiet_fit(make_learner(make_dls(bs=32, n=n)), 3, [w, cb])
    for (m, p), ids in zip(plans[1:], w.ids[1:]):
        assert m == n and min(map(len, ids)) > 1 and sum(map(len, ids)) == len(p.ids) and p.weights.mean() == pytest.approx(1, abs=.15)

@pytest.mark.parametrize('n,drop_last', ((157, False), (157, True), (105, False), (53, False)))
def test_no_pool_of_one_sample(n, drop_last):
    "Pools of 52, or of some more where one sample would be left over"
    cb, w, sizes = ImportanceCB(seat='batch', hold='time', gate=None), Watch(), []
    cb.tau = lambda: 4.
    score = cb._score_and_cut
    cb._score_and_cut = lambda bs: sizes.append(bs) or score(bs)
    quiet_fit(make_learner(make_dls(bs=32, n=n, drop_last=drop_last)), 2, [w, cb])
    assert sizes and min(sizes) > 1 and (drop_last or sum(sizes) == 2*n)

@pytest.mark.parametrize('bs,n', ((64, 65), (64, 66), (1, 5), (2, 7), (700, 600)))
@pytest.mark.parametrize('cb', (lambda: ImportanceCB(keep=.1, gate=None), lambda: ImportanceCB(keep=.1, gate=None, seat='batch'),
    lambda: ImportanceCB(keep=.1, gate=None, seat='loss'), lambda: BatchLossFilter(gate=None), lambda: ImportanceCB()))
def test_short_batches(bs, n, cb):
    net = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5)) # without BatchNorm, which cannot take one sample in plain fastai either
    w = Watch()
    quiet_fit(make_learner(make_dls(bs=bs, n=n), model=net), 3, [w, cb()])
    assert all(len(e) == -(-n//bs) and min(map(len, e)) >= 1 for e in w.ids)

def test_at_least_two_samples_where_there_are_two():
    w = Watch()
    quiet_fit(make_learner(make_dls(bs=64, n=66)), 3, [w, ImportanceCB(keep=.02, gate=None)])
    assert {len(b) for e in w.ids for b in e} == {2}

# Found in review
def test_lazily_shuffled_loader():
    from fastai.text.data import SortedDL
    train, valid = make_data()
    for shuffle in (False, True):
        dls = DataLoaders(SortedDL(train, bs=64, shuffle=shuffle, sort_func=lambda o: float(o[0][1])), DataLoader(valid, bs=64))
        w = Watch()
        quiet_fit(make_learner(dls), 2, [w, ImportanceCB(keep=.25, gate=None)])
        assert {len(b) for e in w.ids for b in e[:-1]} == {16}

def test_distributed_loaders_keep_one_step_a_batch():
    "`DistributedTrainer` puts its loaders, which know their world size, in place in its own `before_fit`"
    class Split(DataLoader): world_size = 2
    train, valid = make_data()
    class Distribute(Callback):
        order = 11
        def before_fit(self):
            self.old = self.dls.loaders
            self.learn.dls.loaders = [Split(train, bs=64, shuffle=True), self.dls.valid]
        def after_fit(self): self.learn.dls.loaders = self.old
    w = Watch()
    with pytest.warns(UserWarning, match='split over several processes'): quiet_fit(make_learner(), 3, [w, Distribute(), ImportanceCB(keep=.25, gate=None)])
    assert [[len(b) for b in e] for e in w.ids] == [[16]*9+[6]]*3

@pytest.mark.parametrize('loss', (CrossEntropyLossFlat(weight=torch.tensor([1., 2, 20, 1, 4])), CrossEntropyLossFlat(reduction='sum')))
@pytest.mark.parametrize('seat', ('epoch', 'batch'))
def test_train_loss_of_weighted_and_summed_losses(loss, seat):
    "From the first step on, in a second fit, and in the short last batch"
    learn = quiet_fit(make_learner(model=nn.Linear(20, 5), loss=loss), 5, lr=1e-3)
    def logged(cb=None, epochs=40):
        w = Watch()
        quiet_fit(learn, epochs, [w]+([cb] if cb else []), lr=0., fit='fit')
        steps = np.array(w.train_losses).reshape(epochs, 10)
        return steps[:, :9].mean(), steps[:, 9].mean()
    whole, tail = logged()
    cb = ImportanceCB(keep=.3, gate=None, seat=seat)
    for _ in range(2):
        a, b = logged(cb)
        assert abs(a/whole-1) < .1 and abs(b/tail-1) < .25, (a/whole, b/tail)

def test_each_fit_draws_anew():
    w, cb, learn = Watch(), ImportanceCB(keep=.3, gate=None, smooth=1.), make_learner(make_dls(shuffle=False), model=nn.Linear(20, 5))
    seen = set()
    for _ in range(25):
        quiet_fit(learn, 1, [w, cb], lr=0., fit='fit')
        seen |= {i for b in w.ids[0] for i in b}
    assert len(seen) > 590

def test_filter_keeps_two():
    w = Watch()
    quiet_fit(make_learner(), 2, [w, BatchLossFilter(0., gate=None)])
    assert {len(b) for e in w.ids for b in e} == {2}

def test_skipped_items_are_noticed_whatever_the_sizes():
    train, valid = make_data()
    for skip, drop_last in ((lambda s: s < 24, False), (lambda s: s < 5, True)):
        class Skips(DataLoader):
            def create_item(self, s):
                if skip(s): raise SkipItemException()
                return super().create_item(s)
        dls, cb = DataLoaders(Skips(train, bs=64, shuffle=True, drop_last=drop_last), DataLoader(valid, bs=64)), ImportanceCB()
        with pytest.warns(UserWarning, match='skipped'): quiet_fit(make_learner(dls), 1, cb)
        assert not len(cb.store)

def test_somebody_looks_at_a_batch_first():
    class Look(Callback):
        order, run_valid = 20, False
        def before_train(self): self.dls.one_batch()
    cb = ImportanceCB()
    with pytest.warns(UserWarning, match='not those that were planned'): quiet_fit(make_learner(), 2, [cb, Look()])
    assert not len(cb.store)

"ProxyScore: what it chooses, what it trains, what it costs, and that nobody else notices."
import random, warnings

import pytest, torch
from torch.utils.data import IterableDataset
from helpers import *
from fastai_is.callback.proxy import *
from fastai_is.data import mnist
from fastai_is.scores import score_batch

def noisy_proxy(): return nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 5))
def proxy_fit(cb=None, epochs=3, seed=0, cbs=(), model=None, loss=None, fit='fit_one_cycle', lr=1e-2, **kw):
    set_seed(seed)
    learn, w = make_learner(make_dls(**kw), model=model, loss=loss), Watch()
    return quiet_fit(learn, epochs, [w, *cbs]+([cb] if cb else []), fit=fit, lr=lr), w
def random_states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.initial_seed()

# Plain training
@pytest.mark.parametrize('kw', (dict(), dict(workers=1), dict(cls=TfmdDL, drop_last=True), dict(shuffle=False)))
@pytest.mark.parametrize('make', (lambda: ProxyScore(pool=1), lambda: ProxyScore(warmup=9), lambda: ProxyScore(noisy_proxy(), warmup=9)))
def test_keeping_everything_is_plain_training_bit_for_bit(make, kw):
    "pool=1 does nothing; in the warm-up a proxy with dropout of its own is made and trained, and nobody notices"
    with torch.random.fork_rng(): cb = make()
    (plain, w0), (ours, w1) = proxy_fit(**kw), proxy_fit(cb, **kw)
    assert same(weights(plain), weights(ours)) and w0.ids == w1.ids and w0.lrs == w1.lrs
    assert [v[:3] for v in plain.recorder.values] == [v[:3] for v in ours.recorder.values]
    assert all(v[3] == 1 for v in ours.recorder.values)
    n = sum(len(b) for e in w1.ids for b in e)
    assert cb.counts == dict(forwarded=n, backpropagated=n)
    assert cb.proxy_counts == dict(forwarded=0, backpropagated=0) and cb.cost() == n if cb.off else cb.proxy_counts == cb.counts

def test_the_proxy_learns_in_the_warmup_and_the_dropout_masks_differ():
    masks = []
    class Mask(nn.Dropout):
        def forward(self, x):
            y = super().forward(x)
            if self.training: masks.append((y == 0).tolist())
            return y
    proxy = nn.Sequential(nn.Linear(20, 16), Mask(.5), nn.Linear(16, 5))
    learn, _ = proxy_fit(ProxyScore(proxy, warmup=9, lr=1e-2), 6, model=nn.Linear(20, 5))
    x, y = (torch.stack(o) if i == 0 else torch.tensor(o) for i, o in enumerate(zip(*make_data()[1])))
    assert (proxy.eval()(x).argmax(1) == y).float().mean() > .8
    assert len(masks) == 60 and len({str(m) for m in masks}) == 60, 'the model has no dropout, so nobody else draws'

def test_aside_leaves_no_trace():
    for dl in (make_dls().train, make_dls(cls=TfmdDL).train, mnist(n=200, bs=16).train):
        set_seed(3); dl.rng = random.Random(5)
        before = random_states()
        a = [b[1].tolist() for b in dl]
        set_seed(3); dl.rng = random.Random(5)
        with aside(dl, 11):
            dl.one_batch(); list(dl); torch.rand(3); np.random.rand(); random.random()
        assert random_states() == before
        assert [b[1].tolist() for b in dl] == a
        with pytest.raises(RuntimeError), aside(dl): raise RuntimeError

def test_a_fit_leaves_the_random_state_where_plain_training_does():
    proxy_fit(); before = random_states()
    proxy_fit(ProxyScore(warmup=9)); assert random_states() == before

# What is chosen and trained
def test_pools_choice_and_weights_against_the_definition():
    "Each pool is three batches of the loader's own order; one batch of it is chosen as `systematic` would from the proxy's scores"
    seen = []
    class Check(Callback):
        order, run_valid = ProxyScore.order-1, False
        def before_batch(self): self.pool = ids_of(self.xb), self.xb[0], self.yb[0]
        def after_pred(self):
            s = cb.fit_state
            if self.epoch == 0: return
            k = max(2, round(len(self.pool[0])/3))
            cb.proxy.eval()
            with torch.no_grad(): p = cb.proxy(self.pool[1])
            cb.proxy.train()
            scores = (p.softmax(1)-F.one_hot(self.pool[2], 5)).norm(dim=1)
            pi = torch.zeros(len(scores), dtype=torch.float64)
            q = .8*scores.double()/scores.sum()+.2/len(scores)
            top = torch.zeros(len(q), dtype=torch.bool) # cap at 1 until none is above
            while True:
                pi = torch.where(top, 1., q*(k-top.sum())/q[~top].sum())
                if not (pi > 1).any(): break
                top |= pi > 1
            idxs = ids_of(self.xb)
            assert len(idxs) == len(set(idxs)) == k and set(idxs) <= set(self.pool[0])
            at = torch.tensor([self.pool[0].index(i) for i in idxs])
            torch.testing.assert_close(s.w, (k/(len(q)*pi[at])).float())
            l = F.cross_entropy(self.pred, self.yb[0], reduction='none')
            seen.append((idxs, len(self.pool[0]), (s.w**.5/(s.w**.5).mean()*l).mean().item(), (s.w*l).mean().item()))
    cb = ProxyScore()
    learn, w = proxy_fit(cb, 3, cbs=[Check()], loss=nn.CrossEntropyLoss())
    assert [p[1] for p in seen] == [192, 192, 192, 24]*2 and [len(e) for e in w.ids] == [10, 4, 4]
    np.testing.assert_allclose(w.grad_losses[10:], [p[2] for p in seen], rtol=1e-5)
    np.testing.assert_allclose(w.train_losses[10:], [p[3] for p in seen], rtol=1e-5)
    plain = proxy_fit(None, 1)[1]
    assert plain.ids[0] == w.ids[0]

@pytest.mark.parametrize('bias', (1., .5))
def test_the_proxy_trains_on_the_chosen_weighted_batch(bias):
    "Against a twin that is trained by hand on what the callback was seen to train on"
    torch.manual_seed(1)
    proxy = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5))
    twin, batches = deepcopy(proxy), []
    class Note(Callback):
        run_valid = False
        def after_backward(self): batches.append((self.xb[0].clone(), self.yb[0].clone(), cb.fit_state.w))
    cb = ProxyScore(proxy, bias=bias, lr=1e-2)
    proxy_fit(cb, 3, cbs=[Note()], loss=nn.CrossEntropyLoss())
    opt = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for x, y, w in batches:
        l = F.cross_entropy(twin(x), y, reduction='none')
        if w is not None: l = l*(w if bias == 1 else w**bias/(w**bias).mean())
        opt.zero_grad(); l.mean().backward(); opt.step()
    assert [w is None for *_, w in batches] == [True]*10+[False]*8
    for a, b in zip(proxy.parameters(), twin.parameters()): torch.testing.assert_close(a, b)

def test_the_models_gradients_are_its_own():
    grads = []
    class Grab(Callback):
        run_valid = False
        def before_step(self):
            l = (cb.fit_state.w*F.cross_entropy(self.model(self.xb[0]), self.yb[0], reduction='none')).mean()
            grads.append((torch.autograd.grad(l, list(self.model.parameters())), [p.grad.clone() for p in self.model.parameters()]))
    cb = ProxyScore(bias=1., warmup=0)
    proxy_fit(cb, 2, cbs=[Grab()], model=nn.Linear(20, 5), loss=nn.CrossEntropyLoss())
    assert len(grads) == 8
    for want, got in grads:
        for a, b in zip(want, got): torch.testing.assert_close(a, b)

PLAIN_LOSS = CrossEntropyLossFlat()
@pytest.mark.parametrize('loss', (PLAIN_LOSS, CrossEntropyLossFlat(weight=torch.tensor([1., 2, 8, 1, 4])), CrossEntropyLossFlat(reduction='sum'),
    CrossEntropyLossFlat(ignore_index=2)))
def test_bias_1_is_unbiased_though_the_proxy_is_another_network(loss):
    "The mean step over many choices from one and the same pool is the step on the whole pool, normaliser included; with bias=0 it is not"
    (train, valid), n = make_data(48), 400
    x, y = torch.stack([a for a, _ in train]), torch.stack([b for _, b in train])
    torch.manual_seed(1)
    proxy = nn.Linear(20, 5)
    def z(bias):
        dls, grads = DataLoaders(DataLoader(train*n, bs=16), DataLoader(valid, bs=16)), [] # an epoch of pools that are all the same
        class Grab(Callback):
            run_valid = False
            def before_step(self): grads.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        learn = make_learner(dls, model=nn.Linear(20, 5), loss=deepcopy(loss))
        quiet_fit(learn, 1, [ProxyScore(deepcopy(proxy), bias=bias, smooth=.1, warmup=0, lr=1e-12), Grab()], lr=0., fit='fit')
        want = torch.cat([g.flatten() for g in torch.autograd.grad(loss(learn.model(x), y), list(learn.model.parameters()))])
        got = torch.stack(grads)
        assert len(got) == n
        return ((got.mean(0)-want).abs()/(got.std(0)/n**.5+1e-6)).max()
    assert z(1.) < 4.5
    if loss is PLAIN_LOSS: assert z(0.) > 8, 'the test would notice'

# Counts and costs
@pytest.mark.parametrize('warmup,drop_last', ((0, False), (1, False), (1, True)))
def test_counts_are_exact(warmup, drop_last):
    class Count(nn.Module):
        def __init__(self, m): super().__init__(); self.m, self.train_rows, self.eval_rows = m, 0, 0
        def forward(self, x):
            if self.training: self.train_rows += len(x)
            else: self.eval_rows += len(x)
            return self.m(x)
    model, proxy = Count(make_net()), Count(nn.Linear(20, 5))
    cb = ProxyScore(proxy, warmup=warmup)
    learn, w = proxy_fit(cb, 3, model=model, drop_last=drop_last)
    trained, pools = sum(len(b) for e in w.ids for b in e), 3-warmup
    assert trained == warmup*(576 if drop_last else 600) + pools*(3*64 + (0 if drop_last else 8))
    assert cb.counts == dict(forwarded=trained, backpropagated=trained) and model.train_rows == trained
    scored = pools*(576 if drop_last else 600)
    assert cb.proxy_counts == dict(forwarded=scored+trained, backpropagated=trained) and proxy.train_rows == trained
    assert proxy.eval_rows == scored+4, 'and two rows, twice, before training'
    assert model.eval_rows == 3*100+2
    assert abs(learn.recorder.values[-1][3]-200/600) < .005
    assert cb.proxy_cost == (20*5)/(20*32+32*5)
    assert cb.cost() == pytest.approx(trained + cb.proxy_cost*((scored+trained)+2*trained)/3)

def test_forward_cost_counts_convolutions_and_leaves_no_trace():
    m = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*36, 5)).train()
    before, state = {k: v.clone() for k, v in m.state_dict().items()}, random_states()
    ops, out = forward_cost(m, (torch.randn(2, 3, 6, 6),))
    assert ops == 2*2*(36*4*3*9+4*36*5) and out.shape == (2, 5) and not out.requires_grad
    assert random_states() != state # randn above
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and m.training

# Reproducible, remembered
def test_reproducible_and_learns():
    (a, _), (b, _) = [proxy_fit(ProxyScore(), 12) for _ in range(2)]
    assert same(weights(a), weights(b)) and a.recorder.values[-1][2] > .85
    assert not same(weights(a), weights(proxy_fit(ProxyScore(), 12, seed=1)[0]))

def test_another_fit_goes_on_with_the_proxy():
    cb = ProxyScore()
    learn, _ = proxy_fit(cb, 2)
    proxy, w = cb.proxy, Watch()
    quiet_fit(learn, 1, [cb, w])
    assert [len(e) for e in w.ids] == [4], 'no second warm-up'
    assert cb.proxy is proxy and cb.proxy_opt.state[next(cb.proxy.parameters())]['step'] == 10+4+4

def weights_of(m): return {k: v.clone() for k, v in m.state_dict().items()}

@pytest.mark.parametrize('given', (False, True))
def test_state_dict_continues_bit_for_bit(given, tmp_path):
    def make():
        torch.manual_seed(2)
        return ProxyScore(noisy_proxy() if given else None)
    cb = make()
    learn, _ = proxy_fit(cb, 2)
    learn.save(tmp_path/'m')
    torch.save(cb.state_dict(), tmp_path/'cb.pth')
    def go_on(cb, l=None):
        l = l or make_learner()
        l.load(tmp_path/'m')
        set_seed(7); l.dls = make_dls()
        quiet_fit(l, 2, cb)
        return weights(l), weights_of(cb.proxy)
    new = make()
    new.load_state_dict(torch.load(tmp_path/'cb.pth'))
    assert new.state_dict()['epochs'] == 2
    a, b, fresh = go_on(cb, learn), go_on(new), go_on(make())
    assert same(a[0], b[0]) and same(a[1], b[1]) and not same(a[0], fresh[0])
    state = new.state_dict()
    with pytest.raises(ValueError, match='The state of ProxyScore'): ImportanceCB().load_state_dict(state)
    new.load_state_dict(torch.load(tmp_path/'cb.pth')) # into one that has been in use
    assert same(new.proxy.state_dict(), torch.load(tmp_path/'cb.pth')['proxy_state']['proxy'])

# Faults
class Raise(Callback):
    run_valid = False
    def __init__(self, ex, event): self.ex = ex; setattr(self, event, self._go)
    def _go(self):
        if self.epoch == 1 and self.iter == 2: raise self.ex('planted')

@pytest.mark.parametrize('event', ('before_batch', 'after_pred', 'after_backward'))
@pytest.mark.parametrize('ex', (CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException, RuntimeError, KeyboardInterrupt))
def test_the_learner_is_as_before(ex, event):
    learn, cb = make_learner(), ProxyScore()
    def snapshot():
        dl = learn.dls.train
        return dl.bs, dl.n, len(dl), vars(dl).get('get_idxs'), len(learn.metrics), len(learn.cbs), learn.loss_func, learn.loss_func.reduction, [len(m._forward_hooks) for m in learn.model.modules()]
    before = snapshot()
    try: quiet_fit(learn, 3, [cb, Raise(ex, event)])
    except (RuntimeError, KeyboardInterrupt) as e: assert type(e) is ex
    else: assert ex not in (RuntimeError, KeyboardInterrupt)
    assert snapshot() == before and cb.fit_state is None
    quiet_fit(learn, 1, cb)
    assert snapshot() == before

def test_validation_and_lr_find_do_not_notice(monkeypatch):
    learn, cb = make_learner(), ProxyScore()
    learn.add_cb(cb)
    quiet_fit(learn, 2)
    proxy, w = weights_of(cb.proxy), weights(learn)
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds(); learn.lr_find(show_plot=False, num_it=20)
    assert same(weights(learn), w) and same(weights_of(cb.proxy), proxy) and cb.epochs == 2

@pytest.mark.parametrize('make,words', ((lambda: ProxyScore(pool=0), 'pool=0'), (lambda: ProxyScore(pool=2.5), 'pool=2.5'), (lambda: ProxyScore(pool=True), 'pool=True'),
    (lambda: ProxyScore(bias=-1), 'bias=-1'), (lambda: ProxyScore(smooth=2), 'smooth=2'), (lambda: ProxyScore(lr=0), 'lr=0'), (lambda: ProxyScore(warmup=.5), 'warmup=0.5'),
    (lambda: ProxyScore(warmup=-1), 'warmup=-1'), (lambda: ProxyScore(pool=float('nan')), 'pool=nan'), (lambda: ProxyScore(pool=float('inf')), 'pool=inf'),
    (lambda: ProxyScore(nn.Flatten()), 'parameters'), (lambda: ProxyScore(score='size'), "score='size'")))
def test_bad_values(make, words):
    with pytest.raises(ValueError) as e: make()
    assert words in str(e.value) and ('expected' in str(e.value) or 'use one of' in str(e.value))

@pytest.mark.parametrize('make,words', ((lambda: ProxyScore('resnet'), "proxy='resnet'"), (lambda: ProxyScore(layer=3), 'layer=3'), (lambda: ProxyScore(on_select=3), 'on_select=3')))
def test_bad_types(make, words):
    with pytest.raises(TypeError, match=words): make()

@pytest.mark.parametrize('proxy,words', ((nn.Linear(20, 4), 'outputs'), (nn.Linear(19, 5), None)))
@pytest.mark.parametrize('stream', (False, True))
def test_an_unusable_proxy_is_named_before_training(proxy, words, stream):
    kw = {}
    if stream:
        train, valid = make_data()
        class Stream(IterableDataset):
            def __iter__(self): return iter(train)
        dls = DataLoaders(DataLoader(Stream(), bs=64, n=600), DataLoader(valid, bs=64))
    learn, w = make_learner(dls if stream else None), Watch()
    before = weights(learn)
    with pytest.raises((ValueError, RuntimeError), match=words), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet_fit(learn, 1, [w, ProxyScore(proxy)])
    assert not getattr(w, 'loss', None) and same(weights(learn), before) and learn.dls.train.bs == 64 and len(learn.metrics) == 1

def test_a_model_that_the_tiny_net_cannot_follow():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(20, 5)
        def forward(self, x): return self.l(x), x
    with pytest.raises(ValueError, match='expected a `proxy`'): quiet_fit(make_learner(model=Two()), 1, ProxyScore())
    with pytest.raises(ValueError, match='images'): tiny_net(torch.Size((2, 3, 4)), 5)

@pytest.mark.parametrize('n_inp', (1, 2))
def test_inputs_that_the_tiny_net_cannot_take(n_inp):
    "Such as those of tables: categories, and then numbers"
    class Table(nn.Module):
        def __init__(self): super().__init__(); self.emb, self.l = nn.Embedding(5, 5), nn.Linear(20, 5)
        def forward(self, c, x=None): return self.emb(c)+(0 if x is None else self.l(x))
    items = [(torch.tensor(i%5), *[torch.randn(20)]*(n_inp-1), torch.tensor(i%5)) for i in range(80)]
    learn = make_learner(DataLoaders(DataLoader(items, bs=16), DataLoader(items, bs=16)), model=Table())
    with pytest.raises(ValueError, match='single one of floats: expected a `proxy`'): quiet_fit(learn, 1, ProxyScore())

def test_a_stream_is_thinned_batch_by_batch():
    "No ids, no pools: a third of each batch, said once, and no sample of the stream is lost"
    train, valid = make_data()
    got = []
    class Stream(IterableDataset):
        def __iter__(self):
            for o in train: got.append(1); yield o
    cb, w = ProxyScore(), Watch()
    learn = make_learner(DataLoaders(DataLoader(Stream(), bs=64, n=600), DataLoader(valid, bs=64)))
    with pytest.warns(UserWarning) as ws: quiet_fit(learn, 3, [cb, w])
    assert len([o for o in ws if 'cannot be known' in str(o.message)]) == 1
    assert len(got) == 1800 and [[len(b) for b in e] for e in w.ids] == [[64]*9+[24]]+[[21]*9+[8]]*2

def test_a_loader_whose_rows_continue_each_other():
    learn = make_learner()
    learn.dls.train.seq_len = 5
    with pytest.raises(ValueError, match='continue each other'): quiet_fit(learn, 1, ProxyScore())

@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_broken_samples_break_neither_the_fit_nor_the_proxy(bad):
    train, valid = make_data()
    for i in range(0, 600, 100): train[i][0][3] = bad
    class Guard(nn.Module): # the model looks away, the proxy does not
        def __init__(self): super().__init__(); self.l = nn.Linear(20, 5)
        def forward(self, x): return self.l(x.nan_to_num(0, 0, 0))
    cb, w = ProxyScore(nn.Linear(20, 5)), Watch()
    learn = make_learner(DataLoaders(DataLoader(train, bs=64, shuffle=True), DataLoader(valid, bs=64)), model=Guard())
    with pytest.warns(UserWarning) as ws: quiet_fit(learn, 8, [cb, w])
    assert len([o for o in ws if 'NaN' in str(o.message)]) == 1
    assert all(len(b) >= 2 for e in w.ids for b in e) and sum(map(len, w.ids)) == 10+7*4
    assert all(p.isfinite().all() for p in cb.proxy.parameters()) and learn.recorder.values[-1][2] > .6, 'chance: 0.2'

@pytest.mark.parametrize('n,bs,sizes', ((65, 64, [[64, 1], [22]]), (193, 64, [[64]*3+[1], [64, 1]]), (3, 64, [[3], [2]]), (1, 64, [[1], [1]])))
def test_short_and_one_sample_batches(n, bs, sizes):
    w = Watch()
    learn = make_learner(make_dls(bs=bs, n=n), model=nn.Linear(20, 5))
    quiet_fit(learn, 2, [w, ProxyScore()])
    assert [[len(b) for b in e] for e in w.ids] == sizes

@pytest.mark.parametrize('pool,bs,sizes', ((4, 64, [64, 64]), (3, 64, [64]*3), (20, 64, [29]), (2, 256, [256]))) # 600 samples; 9 batches of 64, or 2 of 256
def test_drop_last_drops_a_pool_that_is_not_full(pool, bs, sizes):
    cb, w = ProxyScore(pool=pool, warmup=0), Watch()
    learn = make_learner(make_dls(bs=bs, drop_last=True))
    quiet_fit(learn, 2, [cb, w])
    assert [[len(b) for b in e] for e in w.ids] == [sizes]*2 and len(learn.dls.train) == 600//bs

# With others
def test_with_mixup_and_gradient_accumulation():
    for cbs in ([MixUp()], [GradientAccumulation(128)], [MixUp(), GradientAccumulation(128), GradientClip(1.)]):
        learn, w = proxy_fit(ProxyScore(bias=1.), 10, cbs=cbs)
        assert learn.recorder.values[-1][2] > .75 and [len(e) for e in w.ids] == [10]+[4]*9
        assert type(learn.loss_func) is CrossEntropyLossFlat

def test_on_select_hears_of_each_choice():
    heard = []
    proxy_fit(ProxyScore(on_select=lambda learn, idxs, weights, scores: heard.append((len(idxs), len(weights), len(scores)))), 2)
    assert heard == [(64, 64, 192)]*3+[(8, 8, 24)]

# Real digits
def test_learns_mnist_and_the_proxy_knows_what_is_hard():
    """3,000 digits, one plain epoch and seven of a third, 158 steps: 0.925 (chance 0.1).
    Among digits never trained on, mistakes of the model are 6.3 times as frequent in the tenth that the proxy scores highest (blind scores: once)"""
    set_seed(0)
    model = nn.Sequential(Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    learn, cb = Learner(mnist(n=3000, bs=64), model, metrics=accuracy), ProxyScore()
    quiet_fit(learn, 8, cb, lr=1e-2)
    x, y = learn.dls.valid.new(bs=2000, shuffle=False).one_batch()
    scores = score_batch(cb.proxy, upper_bound, learn.loss_func, (x,), (y,)).scores
    with torch.no_grad(): wrong = learn.model.eval()(x).argmax(1).as_subclass(Tensor) != y.as_subclass(Tensor)
    top = wrong[scores.topk(len(y)//10).indices].float().mean()/wrong.float().mean()
    assert learn.recorder.values[-1][2] > .9
    assert top > 3
    assert cb.proxy_cost == (64*32+32*10)/(784*64+64*10)

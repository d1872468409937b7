"`BatchLossFilter`: what it keeps, when, and what it records."
import math, warnings

import matplotlib.pyplot as plt
import pytest, torch
from helpers import *
from fastai_is.callback.filter import BatchLossFilter
from fastai_is.scores import score_funcs

class Offered(Callback):
    "Notes each batch before selection"
    order, run_valid = BatchLossFilter.order-1, False
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append((self.x, self.y))

def sizes_of(cb, epochs=5, **kw):
    "Sizes of all training steps"
    set_seed(0)
    w = Watch()
    learn = quiet_fit(make_learner(make_dls(**kw)), epochs, [w]+list(L(cb)))
    return [len(b) for e in w.ids for b in e], w, learn

def slow_count(scores, perc, least, factor):
    "Take the largest one by one until their share is reached, then give back a part of the others; never fewer than two"
    order, total, k = sorted(scores, reverse=True), sum(scores), 0
    while k == 0 or sum(order[:k]) < perc*total*(1-1e-9): k += 1
    k = max(k, math.ceil(least*len(scores)))
    return max(min(2, len(scores)), len(scores)-int(factor*(len(scores)-k)))

# What is kept
def peak(pred, y, loss_func): return pred.exp().max(1).values

@pytest.mark.parametrize('score', ('loss', 'upper_bound', 'last_layer', peak))
@pytest.mark.parametrize('seat', ('batch', 'loss'))
def test_the_largest_scores_are_kept_and_recorded(score, seat):
    "Against the definition, for any score; the shares recorded are those of the samples and of the loss, whatever the score"
    want, checked = [], []
    class Check(Callback):
        order, run_valid = BatchLossFilter.order+1, False
        def after_loss(self):
            x, y = self.learn.offered.batches[-1]
            f = score if callable(score) else score_funcs[score]
            s = score_batch(self.model, f, F.cross_entropy, (x,), (y,))
            k = slow_count(s.scores.tolist(), .6, .1, .5)
            idxs = s.scores.topk(k).indices.sort().values
            want.append((self.train_iter, k/len(y), float(s.losses[idxs].sum()/s.losses.sum())))
            if seat == 'batch': assert ids_of(self.xb) == [ids_of((x,))[i] for i in idxs]
            l = F.cross_entropy(self.pred, self.y, reduction='none')
            torch.testing.assert_close(self.learn.loss_grad, (l if seat == 'batch' else l[idxs]).mean())
            checked.append(k < len(y))
    cb = BatchLossFilter(.6, .1, schedule_func=lambda pct: .5, gate=None, seat=seat, score=score)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)) # the same in training as in evaluation
    quiet_fit(make_learner(model=net), 2, [cb, Offered(), Check()])
    assert len(checked) == 20 and all(checked)
    torch.testing.assert_close(torch.stack(cb.kept_shares(), 1), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)

def test_grad_norm_as_score_and_layer_and_on_select():
    seen = []
    cb = BatchLossFilter(.5, gate=None, score='grad_norm', on_select=lambda learn, idxs, w, s: seen.append((len(idxs), len(s), bool((w == 1).all()))))
    n, _, _ = sizes_of(cb, 2)
    assert [k for k, *_ in seen] == n and {(m, even) for _, m, even in seen} == {(64, True), (24, True)}
    net = make_net()
    assert BatchLossFilter(layer=net[-1]).layer is net[-1]

# Schedules
@pytest.mark.parametrize('f,start,end', ((SchedLin(0, 1), 0., 1.), (SchedCos(1, 0), 0., 1.), (SchedLin(1, 0), .2, .8), (SchedCos(0, 1), .5, 1.), (None, .3, .6)))
def test_annealed_sizes(f, start, end):
    "A fixed 25 % of the samples: all but what the schedule leaves out, at each of the fifty steps, and everything before `start` and from `end` on"
    cb = BatchLossFilter(0., min_sample_perc=.25, schedule_func=f, start=start, end=end, gate=None)
    got, _, _ = sizes_of(cb)
    pcts = [i/50 for i in range(50)]
    inside = [start-1e-9 <= p < end-1e-9 for p in pcts]
    for i, (n, p) in enumerate(zip(got, pcts)):
        bs = 24 if i%10 == 9 else 64
        factor = 1. if f is None else f((p-start)/(end-start))
        assert abs(n-(bs-factor*.75*bs if inside[i] else bs)) <= 1+1e-6, (i, n)
    assert cb.kept_shares()[0].tolist() == [i for i in range(50) if inside[i]]
    offered = sum(24 if i%10 == 9 else 64 for i in range(50) if inside[i])
    assert cb.counts == dict(forwarded=sum(got)+offered, backpropagated=sum(got)), 'no scoring pass outside'

def test_set_points_of_both_directions():
    for f, want in ((SchedLin(0, 1), [64, 52, 40, 28]), (SchedLin(1, 0), [16, 28, 40, 52])):
        got, _, _ = sizes_of(BatchLossFilter(0., min_sample_perc=.25, schedule_func=f, gate=None), 4)
        assert all(abs(a-b) <= 1 for a, b in zip(got[::10], want)), got

def test_plain_bit_for_bit_where_everything_is_kept():
    plain = sizes_of([])
    for cb in (BatchLossFilter(1.), BatchLossFilter(.5, min_sample_perc=1.), BatchLossFilter(.5, gate=None, schedule_func=lambda pct: 0.), BatchLossFilter(.5, gate=None, start=.999)):
        ours = sizes_of(cb)
        assert ours[0] == plain[0] and same(weights(ours[2]), weights(plain[2]))
    late, early = sizes_of(BatchLossFilter(.3, gate=None, start=.5)), sizes_of(BatchLossFilter(.3, gate=None, end=.5))
    assert late[1].train_losses[:25] == plain[1].train_losses[:25] and late[1].ids[:2] == plain[1].ids[:2]
    assert max(late[0][25:]) < 64 and early[0][25:] == plain[0][25:] and early[1].train_losses[1:25] != plain[1].train_losses[1:25]

def test_the_guard_within_a_span():
    "It learns what is kept from the first batches of the span, and opens ten steps later at the latest"
    cb = BatchLossFilter(0., min_sample_perc=.4, start=.5)
    got, _, _ = sizes_of(cb)
    assert got[:30] == ([64]*9+[24])*3 and set(got[31:39]) == {26}
    assert cb.kept_shares()[0][0] == 30

def test_reproducible():
    (_, a, la), (_, b, lb) = [sizes_of(BatchLossFilter(.6, gate=None, schedule_func=SchedCos(1, 0), start=.1, end=.9)) for _ in range(2)]
    assert a.ids == b.ids and same(weights(la), weights(lb))

# The record
def test_the_record_is_of_the_latest_fit():
    cb, learn = BatchLossFilter(.5, gate=None), make_learner()
    assert [len(o) for o in cb.kept_shares()] == [0, 0, 0]
    quiet_fit(learn, 3, cb)
    steps, samples, losses = cb.kept_shares()
    assert steps.tolist() == list(range(30)) and (losses >= .5-1e-6).all() and (samples < losses).all()
    assert abs(samples.mean()-learn.recorder.values[-1][3]) < .15
    quiet_fit(learn, 1, cb)
    assert cb.kept_shares()[0].tolist() == list(range(10))
    assert cb.kept_shares()[1].tolist() == cb.kept_shares()[1].tolist(), 'reading twice'

def test_it_is_drawn():
    cb = BatchLossFilter(.5, gate=None)
    assert [len(line.get_xdata()) for line in cb.plot_kept().lines] == [0, 0]
    quiet_fit(make_learner(), 2, cb)
    _, ax = plt.subplots()
    assert cb.plot_kept(ax) is ax
    losses, samples = ax.lines
    assert list(losses.get_xdata()) == list(range(20)) and np.allclose(samples.get_ydata(), 100*cb.kept_shares()[1]) and np.allclose(losses.get_ydata(), 100*cb.kept_shares()[2])
    assert ax.get_xlabel() and ax.get_ylabel() and [o.get_text() for o in ax.get_legend().get_texts()] == ['of the loss', 'of the samples']
    plt.close('all')

def test_a_fit_that_ends_early_leaves_its_record():
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if self.train_iter == 13: raise KeyboardInterrupt
    cb = BatchLossFilter(.5, gate=None)
    with pytest.raises(KeyboardInterrupt): quiet_fit(make_learner(), 3, [cb, Stop()])
    assert len(cb.kept_shares()[0]) >= 13

# Faults
@pytest.mark.parametrize('seat', ('batch', 'loss'))
@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_broken_losses(seat, bad):
    class Breaks(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(20, 5)
        def forward(self, x): return torch.where((x[:, :1]*1e6).round() == 5, torch.tensor(bad), self.lin(x))
    cb = BatchLossFilter(.5, gate=None, seat=seat)
    with pytest.warns(UserWarning, match='NaN'): quiet_fit(make_learner(model=Breaks()), 3, cb, lr=0., fit='fit')
    _, samples, losses = cb.kept_shares()
    assert len(samples) == 30 and (samples == 1).sum() == 3 and torch.equal(samples == 1, losses.isnan())

@pytest.mark.parametrize('bs,n', ((64, 65), (1, 3), (2, 5), (700, 600)))
def test_short_batches(bs, n):
    net = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5))
    cb, w = BatchLossFilter(.1, gate=None), Watch()
    quiet_fit(make_learner(make_dls(bs=bs, n=n), model=net), 2, [w, cb])
    assert all(len(e) == -(-n//bs) and min(map(len, e)) >= min(2, n%bs or bs) for e in w.ids)

@pytest.mark.parametrize('kw,words', ((dict(start=-.1), 'start=-0.1'), (dict(end=1.5), 'end=1.5'), (dict(start=.6, end=.4), 'start=0.6: expected less than end=0.4'), (dict(start=1.), 'start=1.0'),
    (dict(end=True), 'end=True'), (dict(loss_perc='most'), "loss_perc='most'"), (dict(score='norm'), "score='norm'"), (dict(schedule_func=lambda p: 2*p), 'schedule_func(0.51) returned 1.02'),
    (dict(schedule_func=lambda p: float('nan')), 'returned nan'), (dict(gate=.5), 'gate=0.5'), (dict(seat='epoch'), "seat='epoch'")))
def test_bad_settings(kw, words):
    with pytest.raises(ValueError) as e: BatchLossFilter(**kw)
    assert words in str(e.value) and ('expected' in str(e.value) or 'use one of' in str(e.value))

def test_bad_types():
    for kw in (dict(score=3), dict(layer='head'), dict(on_select=1), dict(schedule_func=.5), dict(loss_share=.5)):
        with pytest.raises(TypeError): BatchLossFilter(**kw)

# Real digits
def test_real_digits():
    """3,000 digits, ten epochs of a small network: plain training reaches 94.1 %; the filter, which trains on less than half of the samples, comes within
    a percentage point and a half; chance is 10 %"""
    def fit(cb=None):
        set_seed(0)
        net = nn.Sequential(Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        return quiet_fit(Learner(mnist(n=3000, bs=64), net, metrics=accuracy), 10, cb).recorder.values[-1][2]
    cb = BatchLossFilter(end=.9)
    plain, ours = fit(), fit(cb)
    assert plain > .93 and ours > .925 and cb.counts['backpropagated'] < .6*10*46*64, (plain, ours, cb.counts)

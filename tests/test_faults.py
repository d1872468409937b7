"Whatever ends a fit, the Learner is afterwards as before; what is wrong is said early and plainly."
import warnings

import pytest, torch
from helpers import *

METHODS = dict(epoch=lambda: ImportanceCB(keep=.3, gate=None), batch=lambda: ImportanceCB(keep=.3, gate=None, seat='batch'),
    two_stages=lambda: ImportanceCB(limit=50., floor=.1, least=1), loss=lambda: ImportanceCB(keep=.3, gate=None, seat='loss'), filter=lambda: BatchLossFilter(.6, gate=None))

class Raise(Callback):
    "Raise `ex` at `event` of the `at`-th batch of the second epoch"
    run_valid = False
    def __init__(self, ex, event='after_pred', at=3): self.ex, self.at = ex, at; setattr(self, event, self._go)
    def _go(self):
        if self.epoch == 1 and getattr(self, 'iter', 0) >= self.at: raise self.ex('planted')

def snapshot(learn):
    dl = learn.dls.train
    return dict(loss=learn.loss_func, reduction=learn.loss_func.reduction, metrics=list(learn.metrics), bs=dl.bs, n=dl.n, length=len(dl),
        get_idxs=vars(dl).get('get_idxs'), cbs=sorted(type(cb).__name__ for cb in learn.cbs), hooks=[len(m._forward_hooks) for m in learn.model.modules()])

ENDS = dict(fit=None, cancel_epoch=CancelEpochException, cancel_fit=CancelFitException, cancel_train=CancelTrainException, cancel_batch=CancelBatchException,
    interrupt=KeyboardInterrupt, error=RuntimeError)

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('end', ENDS)
@pytest.mark.parametrize('added', (False, True))
def test_the_learner_is_as_before(method, end, added):
    learn, ex = make_learner(), ENDS[end]
    def interrupted(cbs):
        plan = [Raise(ex)] if ex else []
        try: quiet_fit(learn, 3, cbs+plan)
        except (KeyboardInterrupt, RuntimeError): assert end in ('interrupt', 'error')
        else: assert end not in ('interrupt', 'error')
    interrupted([])
    modes = [m.training for m in learn.model.modules()]
    cb = METHODS[method]()
    if added: learn.add_cb(cb)
    before = snapshot(learn)
    interrupted([] if added else [cb])
    assert [m.training for m in learn.model.modules()] == modes, 'as plain fastai leaves them'
    if added: # at the next validation
        with learn.no_bar(): learn.validate()
    assert snapshot(learn) == before
    quiet_fit(learn, 1, [] if added else [cb])
    assert cb.fit_state is None
    assert snapshot(learn) == before

@pytest.mark.parametrize('again', ('iterate', 'fit', 'validate'))
def test_interrupted_while_the_first_batch_is_loaded(again):
    "The one moment at which the DataLoader is changed"
    train, valid = make_data()
    class Fails(DataLoader):
        broken = False
        def create_item(self, s):
            if self.broken: raise KeyboardInterrupt()
            return super().create_item(s)
    dls = DataLoaders(Fails(train, bs=64, shuffle=True), DataLoader(valid, bs=64))
    learn = make_learner(dls, cbs=ImportanceCB(keep=.3, gate=None))
    before = snapshot(learn)
    dls.train.broken = True
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 1)
    assert dls.train.bs != 64
    dls.train.broken = False
    if again == 'iterate': assert [len(b[1]) for b in dls.train] == [64]*9+[24]
    elif again == 'fit': quiet_fit(learn, 1)
    else:
        with learn.no_bar(): learn.validate()
    after = snapshot(learn)
    if again == 'iterate': before.pop('metrics'), after.pop('metrics')
    assert before == after

def test_a_loaders_own_get_idxs_stays():
    train, valid = make_data()
    def backwards(): return list(range(600))[::-1]
    dls = DataLoaders(DataLoader(train, bs=64, get_idxs=backwards), DataLoader(valid, bs=64))
    w = Watch()
    quiet_fit(make_learner(dls), 2, [w, ImportanceCB(keep=.5, gate=None)])
    assert vars(dls.train)['get_idxs'] is backwards
    flat = [i for b in w.ids[1] for i in b]
    assert flat == sorted(flat, reverse=True) and len(flat) == 300

# Bad arguments
@pytest.mark.parametrize('make,words', (
    (lambda: ImportanceCB(keep=0), 'keep=0'), (lambda: ImportanceCB(keep=1.5), 'keep=1.5'), (lambda: ImportanceCB(keep='all'), "keep='all'"),
    (lambda: ImportanceCB(keep=True), 'keep=True'), (lambda: ImportanceCB(keep=float('nan')), 'keep=nan'),
    (lambda: ImportanceCB(score='gradient'), "score='gradient'"), (lambda: ImportanceCB(bias=-1), 'bias=-1'), (lambda: ImportanceCB(smooth=2), 'smooth=2'),
    (lambda: ImportanceCB(smooth=0), 'smooth=0'), (lambda: ImportanceCB(gate='on'), "gate='on'"), (lambda: ImportanceCB(gate=0), 'gate=0'),
    (lambda: ImportanceCB(seat='window'), "seat='window'"), (lambda: ImportanceCB(limit=1), 'limit=1'), (lambda: ImportanceCB(floor=0), 'floor=0'), (lambda: ImportanceCB(least=0), 'least=0'), (lambda: ImportanceCB(least=1.5), 'least=1.5'), (lambda: ImportanceCB(prefilter=0), 'prefilter=0'), (lambda: ImportanceCB(costs=(1, 0)), 'costs=(1, 0)'),
    (lambda: BatchLossFilter(-1), 'loss_perc=-1'), (lambda: BatchLossFilter(.5, 1.5), 'min_sample_perc=1.5'), (lambda: BatchLossFilter(gate=.5), 'gate=0.5'),
    (lambda: BatchLossFilter(seat='epoch'), "seat='epoch'")))
def test_bad_values(make, words):
    with pytest.raises(ValueError) as e: make()
    assert words in str(e.value) and ('expected' in str(e.value) or 'use one of' in str(e.value))

@pytest.mark.parametrize('make,words', ((lambda: ImportanceCB(score=3), 'score=3'), (lambda: BatchLossFilter(schedule_func=.5), 'schedule_func=0.5'),
    (lambda: ImportanceCB(layer='head'), "layer='head'")))
def test_bad_types(make, words):
    with pytest.raises(TypeError, match=words): make()

@pytest.mark.parametrize('method', METHODS)
def test_an_unusable_loss_is_named_before_training(method):
    learn, w = make_learner(loss=lambda p, t: F.cross_entropy(p, t).square()), Watch()
    with pytest.raises(TypeError, match='reduction'): quiet_fit(learn, 1, [w, METHODS[method]()])
    assert not getattr(w, 'lrs', None) and learn.dls.train.bs == 64 and len(learn.metrics) == 1

@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
def test_a_score_of_the_wrong_shape(seat):
    learn = make_learner()
    with pytest.raises(ValueError, match=r'expected \(\d+,\)'):
        quiet_fit(learn, 1, ImportanceCB(score=lambda pred, y, loss_func: pred, keep=.5, gate=None, seat=seat))
    assert learn.dls.train.bs == 64 and len(learn.metrics) == 1

# Broken losses
class Breaks(nn.Module):
    "A model whose predictions for sample 5 are broken, without the loss of the others suffering"
    def __init__(self, bad):
        super().__init__()
        self.lin, self.bad = nn.Linear(20, 5), bad
    def forward(self, x): return torch.where((x[:, :1]*1e6).round() == 5, torch.tensor(self.bad), self.lin(x))

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_broken_losses_mean_uniform_with_one_warning(method, bad):
    learn, w = make_learner(model=Breaks(bad)), Watch()
    with pytest.warns(UserWarning) as ws: quiet_fit(learn, 8, [w, METHODS[method]()], lr=0., fit='fit')
    assert len([o for o in ws if 'NaN' in str(o.message)]) == 1
    steps = [b for e in w.ids for b in e]
    assert len(steps) == 80 and all(len(b) >= 2 for b in steps)

@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
def test_the_window_of_a_broken_score_is_selected_from_uniformly(seat):
    "Equal weights in windows with an infinite score, unequal ones elsewhere"
    def score(pred, y, loss_func): return torch.where(pred[:, 0] == pred[:, 0].max(), torch.inf, loss_score(pred, y, loss_func=loss_func)) if broken else \
        loss_score(pred, y, loss_func=loss_func)
    for broken in (True, False):
        learn, cb, seen = make_learner(model=nn.Linear(20, 5)), ImportanceCB(score=score, keep=.3, gate=None, seat=seat), []
        choose = cb.choose
        cb.choose = lambda scores: seen.append(sel := choose(scores)) or sel
        class Weights(Callback):
            order, run_valid = ImportanceCB.order+1, False
            def before_batch(self):
                if seat == 'epoch' and self.epoch == 2: seen.append(Selection(None, cb.fit_state.w))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            quiet_fit(learn, 3, [cb, Weights()], lr=0., fit='fit')
        equal = [bool((sel.weights == 1).all()) for sel in seen]
        assert len(equal) >= 10 and (sum(equal) >= .4*len(equal) if broken else not any(equal))

@pytest.mark.parametrize('method', METHODS)
def test_all_zero_scores(method):
    class Zero(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(()))
        def forward(self, x): return x[:, 1:2]*0+self.w*0
    train, valid = make_data()
    zero = lambda items: [(x, torch.zeros(1)) for x, _ in items]
    learn = Learner(DataLoaders(DataLoader(zero(train), bs=64, shuffle=True), DataLoader(zero(valid), bs=64)), Zero(), loss_func=MSELossFlat())
    w = Watch()
    with pytest.warns(UserWarning) as ws: quiet_fit(learn, 2, [w, METHODS[method]()])
    assert len([o for o in ws if 'all zero' in str(o.message)]) == 1
    assert len([b for e in w.ids for b in e]) == 20

def test_two_selections_at_once_are_refused():
    learn = make_learner(cbs=ImportanceCB())
    with pytest.raises(ValueError, match='would both select samples: expected one of them'): quiet_fit(learn, 1, BatchLossFilter())
    assert len(learn.metrics) == 1
    quiet_fit(learn, 1)

def test_another_data_set_is_not_mistaken_for_the_first():
    learn, cb = make_learner(), ImportanceCB(keep=.3, gate=None)
    quiet_fit(learn, 2, cb)
    learn.dls = make_dls(n=200)
    quiet_fit(learn, 2, cb)
    assert len(cb.store.values) <= 200

def test_a_loader_that_draws_its_own_ids():
    train, valid = make_data()
    class Own(DataLoader):
        def __iter__(self): return (to_device(fa_collate(train[i:i+64]), self.device) for i in range(0, 600, 64))
    w = Watch()
    with pytest.warns(UserWarning, match='in a way of its own'):
        quiet_fit(make_learner(DataLoaders(Own(train, bs=64), DataLoader(valid, bs=64))), 2, [w, ImportanceCB(keep=.25, gate=None)])
    assert [len(b) for b in w.ids[1]] == [16]*9+[6]

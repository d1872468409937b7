"What users do without thinking of us: it works as without us, or is refused at the first batch at the latest, with words that help."
import pickle, warnings

import pytest, torch
from helpers import *
from fastai.callback.rnn import RNNCallback
from fastai.collab import CollabDataLoaders, collab_learner

# A fit that breaks down
@pytest.mark.parametrize('kw', ({}, dict(gate=1.5, keep=.5), dict(seat='batch'), dict(seat='loss')))
def test_a_fit_that_diverges_ends(kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = quiet_fit(make_learner(model=nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))), 3, ImportanceCB(**kw), lr=1e30, fit='fit')
    assert len(learn.recorder.values) == 3 and math.isnan(learn.recorder.values[-1][0])

# Outputs of one number
@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
@pytest.mark.parametrize('loss', (MSELossFlat(), nn.BCEWithLogitsLoss()))
def test_one_dimensional_predictions(seat, loss):
    items = [(x, (y > 2).float()) for x, y in make_data()[0]]
    dls = DataLoaders(DataLoader(items, bs=64, shuffle=True), DataLoader(items[:64], bs=64))
    learn = quiet_fit(Learner(dls, nn.Sequential(nn.Linear(20, 1), nn.Flatten(0)), loss_func=loss), 4, ImportanceCB(seat=seat, keep=.5, gate=None))
    assert learn.recorder.values[-1][2] < .6 and learn.recorder.values[-1][1] < learn.recorder.values[0][1]

def test_collab():
    g = torch.Generator().manual_seed(0)
    df = pd.DataFrame(dict(user=torch.randint(20, (600,), generator=g), item=torch.randint(30, (600,), generator=g)))
    df['rating'] = 1.+(df.user%5+df.item%5)/2
    learn, cb = collab_learner(CollabDataLoaders.from_df(df, bs=64), n_factors=8, y_range=(.5, 5.5)), ImportanceCB()
    quiet_fit(learn, 10, cb, lr=5e-2)
    assert learn.recorder.values[-1][1] < .3 and learn.recorder.values[-1][2] < 1

# Log-probabilities
def test_log_probabilities_are_selected_like_logits():
    "With `nn.NLLLoss` and no `layer`, which made all scores the same"
    def scores(behind, loss):
        set_seed(0)
        cb, learn = ImportanceCB(limit=3.), make_learner(model=nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5), behind), loss=loss)
        quiet_fit(learn, 4, cb)
        return cb.store.values, [v[3] for v in learn.recorder.values]
    (a, kept), (b, same_kept) = scores(nn.Identity(), CrossEntropyLossFlat()), scores(nn.LogSoftmax(1), nn.NLLLoss())
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert kept == same_kept and kept[-1] < .7 and b.std() > .1

# One callback, several models
@pytest.mark.parametrize('method', (ImportanceCB, LossResampler, SoftPrune, ProxyScore, SelectiveBackprop))
def test_another_model_begins_anew(method):
    "As in cross-validation: the scores are not those of a model that was just made"
    cb, first = method(), []
    for fold in range(2):
        w = Watch()
        quiet_fit(make_learner(seed=fold), 4, [w, cb])
        first.append(sorted(i for b in w.ids[0] for i in b))
    assert first[1] == list(range(600)) or method is SoftPrune and first[0] != first[1] and len(first[0]) == len(first[1])

def test_the_same_model_goes_on():
    learn, cb = make_learner(), ImportanceCB(keep=.3, gate=None)
    quiet_fit(learn, 2, cb)
    other, w = Learner(make_dls(), learn.model, loss_func=CrossEntropyLossFlat(), metrics=accuracy), Watch()
    cb = pickle.loads(pickle.dumps(cb)) # of what is remembered, all but which model it was
    quiet_fit(other, 1, [w, cb])
    assert sum(map(len, w.ids[0])) < 250

def test_a_state_goes_to_another_model():
    "Also into a callback that has been in use with one"
    cb, w = ImportanceCB(keep=.3, gate=None), Watch()
    quiet_fit(make_learner(), 2, cb)
    cb.load_state_dict(cb.state_dict())
    quiet_fit(make_learner(), 1, [w, cb])
    assert sum(map(len, w.ids[0])) < 250

def test_a_proxy_of_the_methods_own_fits_the_data_it_meets():
    cb = ProxyScore()
    quiet_fit(make_learner(), 2, cb)
    dls = DataLoaders(*(DataLoader([(x[:12], y%3) for x, y in items], bs=64) for items in make_data()))
    quiet_fit(make_learner(dls, model=nn.Linear(12, 3)), 2, cb)
    assert cb.proxy[-1].out_features == 3
    own = nn.Linear(20, 5)
    cb = ProxyScore(own)
    for _ in range(2): quiet_fit(make_learner(), 2, cb)
    assert cb.proxy is own and not torch.equal(own.weight, nn.Linear(20, 5).weight)

# Refused at once
class Steps(Callback):
    "How many batches were trained on"
    n = 0
    def after_step(self): self.n += 1

def refused(match, learn, *cbs, kind=ValueError, n=3):
    "Before anything is learned"
    seen = Steps()
    with pytest.raises(kind, match=match): quiet_fit(learn, n, [seen, *cbs])
    assert seen.n == 0

class Dice(nn.Module):
    "A loss that is one number for the whole batch"
    reduction = 'mean'
    def forward(self, pred, y): return 1-pred.softmax(1).gather(1, y[:, None]).mean()

@pytest.mark.parametrize('cb', (lambda: BatchLossFilter(start=.5), lambda: ImportanceCB(seat='batch', score=first_output, gate=1.3, keep=.3),
    lambda: ImportanceCB(seat='loss', score=first_output, keep=.5)))
def test_a_loss_without_a_form_for_each_sample_is_refused_in_the_first_batch(cb):
    refused('returns a tensor of shape', make_learner(loss=Dice()), cb(), kind=TypeError, n=6)
def first_output(pred, y, loss_func): return pred[:, 0].abs()

def test_targets_that_come_too_late():
    class SetTarget(Callback):
        def before_batch(self): self.learn.yb = self.xb
    items = [(x,) for x, _ in make_data()[0]]
    def learner(): return Learner(DataLoaders(DataLoader(items, bs=64), DataLoader(items, bs=64)), nn.Linear(20, 20), loss_func=MSELossFlat())
    for cb in (ImportanceCB(), ImportanceCB(seat='batch'), BatchLossFilter()): refused('no targets when .* sees it: .*`order` below -5', learner(), cb, SetTarget())
    refused('no targets when sample_tracker sees it', learner(), SampleTracker(), SetTarget())
    refused('no targets when proxy_score sees it: .*`order` below -5', learner(), ProxyScore(), SetTarget())
    refused('DataLoader have no targets: .*anchor does not see', learner(), SVRG(), SetTarget())
    early = SetTarget()
    early.order = -10
    for cb in (ImportanceCB(), ProxyScore()): assert len(quiet_fit(learner(), 2, [cb, early]).recorder.values) == 2

@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
@pytest.mark.parametrize('score', ('upper_bound', 'last_layer'))
def test_a_layer_in_the_frozen_part(score, seat):
    "As in the first phase of `fine_tune`: what is trained is trained as without us, and scores are as if nothing were frozen"
    def fit(frozen, ours, lr):
        learn = make_learner()
        for p in learn.model[0].parameters(): p.requires_grad_(not frozen)
        cb = ImportanceCB(score, layer=learn.model[0], seat=seat, limit=1.0001) if ours else None
        quiet_fit(learn, 1, cb, lr=lr)
        if frozen: assert all(p.grad is None for p in learn.model[0].parameters())
        return weights(learn), ours and (cb.store.seen() if seat == 'epoch' else cb.recent)
    assert same(fit(True, False, 1e-2)[0], fit(True, True, 1e-2)[0])
    torch.testing.assert_close(fit(True, True, 0.)[1], fit(False, True, 0.)[1])

@pytest.mark.parametrize('cb', (ImportanceCB, BatchLossFilter, CoresetSelection, ProxyScore))
def test_a_layer_of_another_model_is_refused(cb):
    learn = make_learner()
    refused('layer=.*no part of the .*of its own modules', learn, cb(layer=deepcopy(learn.model)[-1]))

def test_a_layer_that_is_not_run_as_one():
    class Apart(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(20, 5)
        def forward(self, x): return F.linear(x, self.l.weight, self.l.bias)
    refused('was not run as a layer.*layer=', make_learner(model=Apart()), CoresetSelection())

def test_gradient_norms_of_models_with_more_than_predictions():
    class Texts(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(20, 5)
        def forward(self, x): o = self.l(x); return o, [o], [o]
    def learner(): return make_learner(model=Texts(), cbs=RNNCallback())
    refused("grad_norm.*'upper_bound'", learner(), ImportanceCB(score='grad_norm'))
    with pytest.raises(ValueError, match='more than predictions'): learner().grad_norms()
    assert len(quiet_fit(learner(), 2, ImportanceCB(score='last_layer')).recorder.values) == 2

@pytest.mark.parametrize('bad', ('a', 1.5, -1, None, float('nan')))
def test_schedules_that_are_no_factor(bad):
    with pytest.raises(ValueError, match=r'schedule_func\(0.0\) returned .*expected a factor'): BatchLossFilter(schedule_func=lambda p: bad)
    BatchLossFilter(schedule_func=lambda p: torch.tensor(p))

# What is said
def test_what_comes_after_ids_were_lost():
    class Skips(DataLoader):
        def create_item(self, s):
            if s%50 == 7: raise SkipItemException()
            return super().create_item(s)
    with pytest.warns(UserWarning, match='Training on everything from here on'): quiet_fit(make_learner(make_dls(cls=Skips)), 2, RandomSubset())
    with pytest.warns(UserWarning, match="Using seat='batch' from here on"): quiet_fit(make_learner(make_dls(cls=Skips)), 2, ImportanceCB(keep=.3, gate=None))

def test_advice_for_a_language_model():
    learn = make_learner()
    learn.dls.train.seq_len = 5
    refused(r"ImportanceCB\(seat='loss'\)", learn, RandomSubset())

@pytest.mark.filterwarnings('error:You are shadowing')
def test_no_name_of_a_models_is_taken():
    class Out(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(20, 5)
        def forward(self, x): return self.out(x)
    quiet_fit(make_learner(model=Out()), 4, LossResampler())

# Between fits
def test_a_batch_to_look_at_after_an_interruption():
    class Stop(Callback):
        def before_train(self):
            if self.epoch == 1: raise KeyboardInterrupt
    learn = make_learner(cbs=ImportanceCB(keep=.3, gate=None))
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 3, Stop())
    learn._end_cleanup()
    assert len(learn.dls.train.one_batch()[1]) == 64
    assert len(quiet_fit(learn, 1).recorder.values) == 1

"Other packages' methods: what we put around their code, with stand-ins that keep to their interfaces; and the packages themselves where they are."
import pickle, sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np, pytest, torch
from helpers import *
from fastai_is import bench
from fastai_is.bench import Problem, count_passes, describe, fit_once
from fastai_is.losses import raw_loss
from fastai_is.rivals import *

class Labelled:
    "Samples that know their classes"
    def __init__(self, items): self.items, self.y = items, torch.stack([y for _, y in items])
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

def labelled(bs=64, n=600, **kw):
    train, valid = make_data(n)
    return DataLoaders(DataLoader(Labelled(train), bs=bs, shuffle=True, num_workers=0, **kw), DataLoader(valid, bs=bs))

# Stand-ins: the slow and plain form of what each package documents

def highest(x, y, model, loss_fun, keep=.5, scale_factor=1.):
    with torch.no_grad(): losses = loss_fun(model(x), y, reduction='none')
    idxs = sorted(range(len(x)), key=lambda i: -losses[i])[:int(keep*len(x))]
    return x[idxs], y[idxs]

class Filter(Callback):
    def __init__(self, loss_perc=1., schedule_func=None): self.loss_perc, self.schedule_func = loss_perc, schedule_func

class DCDataset:
    def __init__(self, custom_dataset): self.dataset = custom_dataset
    def __len__(self): return len(self.dataset)

class Importance:
    def __init__(self, dataset, logger_object, beta): self.n, self.beta, self.epoch, self.asked = len(dataset), beta, -1, []
    def compute_importance(self):
        self.epoch += 1
        if not self.epoch: return np.ones(self.n)
        self.asked.append(self.extract_trajectory_segment(self.epoch-1)[0])
        return np.array([10. if v is None else v for v in self.asked[-1]])

class Loader:
    "Those of highest importance, and one more for each class"
    def __init__(self, dataset, pruning_rate, **kw):
        self.original_dataset, self.classes = dataset, sorted({int(o) for o in dataset.dataset.targets})
        self.required_num_samples = int(np.ceil(pruning_rate*len(dataset)))
    def resample(self, importance): self.subset_indices = np.argsort(-importance, kind='stable')[:self.required_num_samples+len(self.classes)].tolist()

@pytest.fixture
def spy(monkeypatch):
    "Call it to get a list of all that datacull will go by"
    def begin():
        made = []
        class Seen(Importance):
            def __init__(self, *args, **kw): super().__init__(*args, **kw); made.append(self)
        monkeypatch.setattr(sys.modules['datacull'], 'RCAPImportance', Seen)
        return made
    return begin

@pytest.fixture
def stand_ins(monkeypatch):
    def module(name, **kw):
        m = ModuleType(name)
        vars(m).update(kw)
        monkeypatch.setitem(sys.modules, name, m)
    monkeypatch.setattr('fastai_is.rivals.metadata.version', lambda name: {'tsai': '1', 'mosaicml': '2', 'datacull': '3'}[name])
    for name in ('tsai', 'tsai.callback', 'composer', 'composer.algorithms'): module(name)
    module('tsai.callback.experimental', BatchLossFilter=Filter)
    def should(current_duration, batch_idx, start, end, interrupt): return start <= current_duration < end and (not interrupt or bool((batch_idx+1)%interrupt))
    module('composer.algorithms.selective_backprop', select_using_loss=highest, should_selective_backprop=should)
    module('datacull', DCDataset=DCDataset, RCAPImportance=Importance, RCAPDataLoader=Loader)

def test_tsai_is_theirs(stand_ins):
    cb = tsai_filter(.7)
    assert type(cb) is Filter and cb.loss_perc == .7 and tsai_filter().loss_perc == .9

def test_descriptions_have_settings_and_versions(stand_ins):
    "So that a run of another version is not taken for one of this"
    assert describe(tsai_filter(.7)) == 'Filter(loss_perc=0.7, schedule_func=None) of tsai 1'
    assert describe(ComposerSelective(keep=.3)) == 'ComposerSelective(start=0.5, end=0.9, keep=0.3, interrupt=2) of mosaicml 2'
    assert describe(DatacullRCAP(.2)) == 'DatacullRCAP(keep=0.2, beta=1.0) of datacull 3'

@pytest.mark.parametrize('keep', (.5, .25))
def test_composer_trains_on_the_part_it_chose(stand_ins, keep):
    "That share of every second batch from the middle on, the part with the highest losses; whole batches elsewhere, and in validation"
    chosen, valid, k = [], [], int(keep*64)
    class Compare(Callback):
        order = ComposerSelective.order-1
        def before_batch(self): self.whole = self.x, self.y
        def after_pred(self):
            if not self.training: return valid.append(len(self.x))
            if len(self.x) == len(self.whole[0]): return
            losses = raw_loss(self.loss_func, self.model(self.whole[0]).detach(), self.whole[1])
            hardest = [i for i, _ in sorted(zip(ids_of((self.whole[0],)), losses.tolist()), key=lambda o: -o[1])[:k]]
            chosen.append((self.iter, self.pct_train, ids_of(self.xb), hardest))
    w = Watch()
    quiet_fit(make_learner(model=nn.Linear(20, 5)), 4, [w, Compare(), ComposerSelective(keep=keep)])
    sizes = [[len(b) for b in e] for e in w.ids]
    assert sizes[:2] == [[64]*9+[24]]*2 and sizes[2] == [k, 64]*4+[k, 24] and sizes[3] == [k, 64]*3+[64]*3+[24]
    assert len(chosen) == 8 and valid == [64, 36]*4
    assert all(.5 <= pct < .9 and not it%2 and part == hardest for it, pct, part, hardest in chosen)

def test_composer_leaves_alone_what_it_has_no_business_with(stand_ins):
    "`keep=1` is plain training, bit for bit and without a pass; a batch of which one sample would be left is whole; `lr_find` does not notice"
    a, b = (quiet_fit(make_learner(), 3, cbs) for cbs in (None, ComposerSelective(keep=1, start=0.)))
    assert same(weights(a), weights(b))
    w = Watch()
    learn = make_learner(make_dls(bs=199))
    with count_passes(learn.model) as counts: quiet_fit(learn, 1, [w, ComposerSelective(0., 1., .5, 0)])
    assert [len(e) for e in w.ids[0]] == [99]*3+[3] and counts['forwarded'] == 3*199+99*3+3+100
    found = []
    for cbs in ([], [ComposerSelective(0., 1., .5, 0)]):
        learn = make_learner(cbs=cbs)
        with learn.no_bar(), learn.no_logging(): found.append(learn.lr_find(num_it=20, show_plot=False))
    assert found[0] == found[1]

def test_composer_scores_in_the_precision_of_training(stand_ins, monkeypatch):
    seen = []
    def select(x, y, model, loss_fun, keep):
        with torch.no_grad(): seen.append(model(x).dtype)
        return x[:8], y[:8]
    monkeypatch.setattr(sys.modules['composer.algorithms.selective_backprop'], 'select_using_loss', select)
    quiet_fit(make_learner(), 1, [BF16(), ComposerSelective(0., 1., .5, 0)])
    assert set(seen) == {torch.bfloat16}

@pytest.mark.parametrize('n_inp, loss, error, what', ((2, None, ValueError, 'dls.n_inp=2: expected one input'),
    (1, lambda pred, y: F.cross_entropy(pred, y), TypeError, 'has no per-sample form')))
def test_composer_says_before_a_fit_what_it_cannot_do(stand_ins, n_inp, loss, error, what):
    learn = make_learner(loss=loss)
    learn.dls.n_inp = n_inp
    steps = []
    class Steps(Callback):
        def before_batch(self): steps.append(1)
    with pytest.raises(error, match=what): quiet_fit(learn, 1, [Steps(), ComposerSelective()])
    assert not steps

def test_composer_is_given_the_losses_of_samples(stand_ins, monkeypatch):
    seen = []
    def select(x, y, model, loss_fun, keep):
        seen.append((loss_fun(model(x), y), raw_loss(CrossEntropyLossFlat(), model(x), y), loss_fun(model(x), y, reduction='none'), type(x)))
        return x[:8], y[:8]
    monkeypatch.setattr(sys.modules['composer.algorithms.selective_backprop'], 'select_using_loss', select)
    quiet_fit(make_learner(model=nn.Linear(20, 5)), 1, ComposerSelective(start=0., end=1., interrupt=0))
    for a, b, c, t in seen:
        assert len(a) in (64, 24) and torch.equal(a, b) and torch.equal(a, c) and t is Tensor
    assert len(seen) == 10

def test_datacull_trains_on_the_part_it_chose(stand_ins, spy):
    "As many as asked for; by what was remembered of those that were trained on, and nothing of the others"
    made, w, cb = spy(), Watch(), DatacullRCAP(keep=.3)
    quiet_fit(make_learner(labelled()), 3, [w, cb])
    epochs = [[i for b in e for i in b] for e in w.ids]
    assert [len(e) for e in epochs] == [len(set(e)) for e in epochs] == [180]*3 and [len(b) for b in w.ids[0]] == [64, 64, 52]
    asked = made[0].asked
    assert len(asked) == 2 and {i for i, v in enumerate(asked[0]) if v is not None} == set(epochs[0])
    assert set(epochs[1]).isdisjoint(epochs[0]), 'the stand-in prefers the unseen'
    assert {i for i, v in enumerate(asked[1]) if v is not None} == set(epochs[0])|set(epochs[1])
    assert all(np.isfinite(v) and v > 0 for v in asked[1] if v is not None)
    assert cb.counts == dict(forwarded=540, backpropagated=540)

@pytest.mark.parametrize('kw, keep, sizes', ((dict(drop_last=True), .3, [64]*3), (dict(bs=179), .3, [179, 2]),
    (dict(drop_last=True), .97, [64]*9), (dict(), .999, [64]*9+[23]), (dict(), 1, [64]*9+[24])))
def test_datacull_leaves_no_batch_of_one_and_none_to_drop(stand_ins, kw, keep, sizes):
    w = Watch()
    quiet_fit(make_learner(labelled(**kw)), 2, [w, DatacullRCAP(keep=keep)])
    assert [[len(b) for b in e] for e in w.ids] == [sizes]*2

def test_datacull_keeping_everything_is_plain_training(stand_ins):
    a, b = (quiet_fit(make_learner(labelled()), 3, cbs) for cbs in (None, DatacullRCAP(keep=1)))
    assert same(weights(a), weights(b))

def test_datacull_begins_anew_in_each_fit(stand_ins, spy):
    "By chance in the first epoch, as in the first fit; what was remembered is known from the second one on"
    made, learn, cb = spy(), make_learner(labelled()), DatacullRCAP()
    for _ in range(2): quiet_fit(learn, 2, cb)
    assert [o.epoch for o in made] == [1, 1] and [len(o.asked) for o in made] == [1, 1]
    known = [{i for i, v in enumerate(o.asked[0]) if v is not None} for o in made]
    assert len(known[0]) == 180 and known[0] < known[1]
    pickle.dumps(cb)

@pytest.mark.parametrize('targets', (None, torch.zeros(600, 5), torch.zeros(599)))
def test_datacull_asks_for_classes(stand_ins, targets):
    learn = make_learner(labelled())
    learn.dls.train_ds.y = targets
    with pytest.raises(ValueError, match='targets=.*expected a data set whose `targets` or `y` has a class for each of its 600'): quiet_fit(learn, 1, DatacullRCAP())

def test_datacull_takes_any_names_of_classes(stand_ins, monkeypatch):
    seen = []
    class See(Loader):
        def __init__(self, dataset, **kw): super().__init__(dataset, **kw); seen.append(dataset.dataset.targets)
    monkeypatch.setattr(sys.modules['datacull'], 'RCAPDataLoader', See)
    learn = make_learner(labelled())
    y = learn.dls.train_ds.y
    for names in (y, y+1, [('cat', 'dog', 'emu', 'fox', 'gnu')[i] for i in y]):
        learn.dls.train_ds.y = names
        quiet_fit(learn, 1, DatacullRCAP())
    assert len(seen) == 3 and all(o.tolist() == y.tolist() for o in seen)

def test_a_loss_that_is_not_finite_is_not_remembered(stand_ins, spy):
    class Broken(CrossEntropyLossFlat):
        def __call__(self, inp, targ):
            res = super().__call__(inp, targ)
            return torch.where(torch.arange(len(targ)) < 2, torch.inf, res) if res.ndim else res
    made = spy()
    with pytest.warns(UserWarning, match='NaN, infinite'): quiet_fit(make_learner(labelled(), loss=Broken()), 2, DatacullRCAP())
    assert sum(v is not None for v in made[0].asked[0]) == 180-2*3

@pytest.mark.parametrize('make', (tsai_filter, ComposerSelective, DatacullRCAP))
def test_a_package_that_is_missing_or_broken(monkeypatch, make, tmp_path):
    "Told with the reason, and the benchmark goes on"
    names, shown = dict(tsai_filter='tsai', ComposerSelective='composer', DatacullRCAP='datacull'), dict(tsai_filter='tsai', ComposerSelective='mosaicml', DatacullRCAP='datacull')
    for name in (names[make.__name__], *(o for o in sys.modules if o.startswith(names[make.__name__]+'.'))): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f'{shown[make.__name__]} cannot be imported .*25a_rivals'): make()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    def broken():
        torch.rand(3), np.random.rand(3)
        raise AttributeError('no such thing\nat all')
    with pytest.raises(ImportError, match=r'somebody cannot be imported \(AttributeError: no such thing\)\. The notebook 25a'): import_rival('somebody', broken)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1], 'what it drew is put back'
    pytest.importorskip('pyarrow.parquet')
    monkeypatch.setattr(bench, 'plot_frontier', lambda *_: bench.plt.figure())
    problem = Problem('clouds', 'two layers', lambda bs: Learner(make_dls(bs, 300), make_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy), 1e-2, 64)
    bench.bench(problem, dict(rival=make, ours=bench.ImportanceCB), budgets=(1,), seeds=1, batch_sizes=(64,), rates=(1.,), out=tmp_path)
    assert '- rival was not run: ' in (tmp_path/'table.md').read_text() and 'cannot be imported' in (tmp_path/'table.md').read_text()

@pytest.mark.parametrize('make, kw, what', ((tsai_filter, dict(loss_perc=0), 'loss_perc=0'), (ComposerSelective, dict(keep=2), 'keep=2'),
    (ComposerSelective, dict(start=-.1), r'start=-0\.1'), (ComposerSelective, dict(end='a'), "end='a'"), (ComposerSelective, dict(interrupt=.5), r'interrupt=0\.5'),
    (DatacullRCAP, dict(keep=0.), r'keep=0\.0'), (DatacullRCAP, dict(beta=0), 'beta=0')))
def test_settings_out_of_range(stand_ins, make, kw, what):
    with pytest.raises(ValueError, match=what): make(**kw)

# The packages themselves

def here(package): return pytest.mark.skipif(find_spec(package) is None, reason=f'{package} is not installed')

@pytest.mark.parametrize('name, scored, trained', (
    pytest.param('tsai', 4*600, None, marks=here('tsai')),
    pytest.param('composer', 8*64, 4*600-8*32, marks=here('composer')),
    pytest.param('datacull', 0, 4*180, marks=here('datacull'))))
def test_the_real_one(name, scored, trained):
    "Trains, to better than chance, on as many samples as it should"
    cb = bench.METHODS[name]() # an import may draw random numbers
    set_seed(0)
    learn = Learner(labelled(), make_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    res = fit_once(learn, 4, 1e-2, cb)
    assert res['forwarded']-res['backpropagated'] == scored and res['accuracy'] > 40
    assert res['backpropagated'] == trained if trained else 600 < res['backpropagated'] < 2400

@here('datacull')
def test_the_real_rcap_goes_by_the_losses_remembered():
    "Those it has never seen count as a loss of log 5, the others as theirs, and no more than that"
    said = []
    class Noted(DatacullRCAP):
        def plan(self, ids, bs):
            res, imp = super().plan(ids, bs), self.fit_state.importance
            vals = torch.full((600,), torch.nan)
            vals[:len(self.store.values)] = self.store.values
            said.append((imp.epoch, imp.sample_losses.copy(), vals.nan_to_num(nan=np.log(5)).clamp(max=np.log(5)).double().numpy()))
            return res
    quiet_fit(make_learner(labelled()), 4, Noted())
    for epoch, theirs, ours in said: np.testing.assert_allclose(theirs.astype(float), ours, rtol=1e-6)
    assert [o[0] for o in said] == [0, 1, 2, 3] and len(set(said[3][1])) > 300

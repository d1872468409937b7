"Other packages' methods: what we put around their code, with stand-ins that keep to their interfaces; and the packages themselves where they are."
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np, pytest, torch
from helpers import *
from fastai_is import bench
from fastai_is.bench import Problem, fit_once
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
def stand_ins(monkeypatch):
    def module(name, **kw):
        m = ModuleType(name)
        vars(m).update(kw)
        monkeypatch.setitem(sys.modules, name, m)
    for name in ('tsai', 'tsai.callback', 'composer', 'composer.algorithms'): module(name)
    module('tsai.callback.experimental', BatchLossFilter=Filter)
    def should(current_duration, batch_idx, start, end, interrupt): return start <= current_duration < end and (not interrupt or bool((batch_idx+1)%interrupt))
    module('composer.algorithms.selective_backprop', select_using_loss=highest, should_selective_backprop=should)
    module('datacull', DCDataset=DCDataset, RCAPImportance=Importance, RCAPDataLoader=Loader)

def test_tsai_is_theirs(stand_ins):
    cb = tsai_filter(.7)
    assert type(cb) is Filter and cb.loss_perc == .7 and tsai_filter().loss_perc == .9

def test_composer_trains_on_the_part_it_chose(stand_ins):
    "Half of every second batch from the middle on, that with the highest losses; whole batches elsewhere, and in validation"
    chosen = []
    class Compare(Callback):
        order, run_valid = ComposerSelective.order-1, False
        def before_batch(self): self.whole = self.x, self.y
        def after_pred(self):
            if len(self.x) == len(self.whole[0]): return
            losses = raw_loss(self.loss_func, self.model(self.whole[0]).detach(), self.whole[1])
            hardest = [i for i, _ in sorted(zip(ids_of((self.whole[0],)), losses.tolist()), key=lambda o: -o[1])[:32]]
            chosen.append((self.iter, self.pct_train, ids_of(self.xb), hardest))
    w = Watch()
    learn = quiet_fit(make_learner(model=nn.Linear(20, 5)), 4, [w, Compare(), ComposerSelective()])
    sizes = [[len(b) for b in e] for e in w.ids]
    assert sizes[:2] == [[64]*9+[24]]*2 and sizes[2] == [32, 64]*4+[32, 24] and sizes[3][:6] == [32, 64]*3 and sizes[3][-1] == 24
    assert len(chosen) == sum(s == 32 for e in sizes for s in e) == 8
    assert all(.5 <= pct < .9 and not it%2 and part == hardest for it, pct, part, hardest in chosen)
    assert len(learn.dls.valid.dataset) == 100 and learn.validate()[1] > .2

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

def test_datacull_trains_on_the_part_it_chose(stand_ins):
    "As many as asked for, in whole batches and one more; by what was remembered of those that were trained on, and nothing of the others"
    w, cb = Watch(), DatacullRCAP(keep=.3)
    quiet_fit(make_learner(labelled()), 3, [w, cb])
    epochs = [[i for b in e for i in b] for e in w.ids]
    assert [len(e) for e in epochs] == [len(set(e)) for e in epochs] == [180]*3 and [len(b) for b in w.ids[0]] == [64, 64, 52]
    asked = cb._importance.asked
    assert len(asked) == 2 and {i for i, v in enumerate(asked[0]) if v is not None} == set(epochs[0])
    assert set(epochs[1]).isdisjoint(epochs[0]), 'the stand-in prefers the unseen'
    assert {i for i, v in enumerate(asked[1]) if v is not None} == set(epochs[0])|set(epochs[1])
    assert all(np.isfinite(v) and v > 0 for v in asked[1] if v is not None)
    assert cb.counts == dict(forwarded=540, backpropagated=540)

@pytest.mark.parametrize('kw, sizes', ((dict(drop_last=True), [64]*3), (dict(bs=179), [179, 2])))
def test_datacull_leaves_no_batch_of_one_and_none_to_drop(stand_ins, kw, sizes):
    w = Watch()
    quiet_fit(make_learner(labelled(**kw)), 1, [w, DatacullRCAP(keep=.3)])
    assert [len(b) for b in w.ids[0]] == sizes

def test_datacull_begins_anew_in_each_fit(stand_ins):
    "With what it remembers, but with no epochs counted that were of another fit"
    learn, cb = make_learner(labelled()), DatacullRCAP()
    quiet_fit(learn, 2, cb)
    first = cb._importance
    quiet_fit(learn, 2, cb)
    assert cb._importance is not first and cb._importance.epoch == 1

def test_datacull_asks_for_classes(stand_ins):
    with pytest.raises(ValueError, match='dls=.*expected a data set with its classes'): quiet_fit(make_learner(), 1, DatacullRCAP())

def test_a_loss_that_is_not_finite_is_not_remembered(stand_ins):
    class Broken(CrossEntropyLossFlat):
        def __call__(self, inp, targ):
            res = super().__call__(inp, targ)
            return torch.where(torch.arange(len(targ)) < 2, torch.inf, res) if res.ndim else res
    cb = DatacullRCAP()
    quiet_fit(make_learner(labelled(), loss=Broken()), 2, cb)
    assert sum(v is not None for v in cb._importance.asked[0]) == 180-2*3

@pytest.mark.parametrize('make', (tsai_filter, ComposerSelective, DatacullRCAP))
def test_a_package_that_is_missing_or_broken(monkeypatch, make, tmp_path):
    "Told with the reason, and the benchmark goes on"
    names = dict(tsai_filter='tsai', ComposerSelective='composer', DatacullRCAP='datacull')
    monkeypatch.setitem(sys.modules, names[make.__name__], None)
    with pytest.raises(ImportError, match=f'(?i){names[make.__name__]}.* cannot be imported .*27_rivals'): make()
    def broken(): raise AttributeError('no such thing\nat all')
    with pytest.raises(ImportError, match=r'somebody cannot be imported \(AttributeError: no such thing\)\. nbs'): import_rival('somebody', broken)
    pytest.importorskip('pyarrow.parquet')
    monkeypatch.setattr(bench, 'plot_frontier', lambda *_: bench.plt.figure())
    problem = Problem('clouds', 'two layers', lambda bs: Learner(make_dls(bs, 300), make_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy), 1e-2, 64)
    bench.bench(problem, dict(rival=make, ours=bench.ImportanceCB), budgets=(1,), seeds=1, batch_sizes=(64,), rates=(1.,), out=tmp_path)
    assert '- rival was not run: ' in (tmp_path/'table.md').read_text() and 'cannot be imported' in (tmp_path/'table.md').read_text()

@pytest.mark.parametrize('make, kw, what', ((tsai_filter, dict(loss_perc=0), 'loss_perc=0'), (ComposerSelective, dict(keep=2), 'keep=2'),
    (DatacullRCAP, dict(keep=0.), r'keep=0\.0'), (DatacullRCAP, dict(beta=0), 'beta=0')))
def test_settings_out_of_range(stand_ins, make, kw, what):
    with pytest.raises(ValueError, match=what): make(**kw)

# The packages themselves

def here(package): return pytest.mark.skipif(find_spec(package) is None, reason=f'{package} is not installed')

@pytest.mark.parametrize('name, forwarded, backpropagated', (
    pytest.param('tsai', None, None, marks=here('tsai')),
    pytest.param('composer', 4*600-8*32+8*64, 4*600-8*32, marks=here('composer')),
    pytest.param('datacull', 4*180, 4*180, marks=here('datacull'))))
def test_the_real_one(name, forwarded, backpropagated):
    "Trains, to better than chance, on as many samples as it should"
    set_seed(0)
    learn = Learner(labelled(), make_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    res = fit_once(learn, 4, 1e-2, bench.METHODS[name]())
    if forwarded is None: assert 600*4 < res['forwarded']-res['backpropagated']+1 and res['backpropagated'] < 600*4
    else: assert (res['forwarded'], res['backpropagated']) == (forwarded, backpropagated)
    assert res['accuracy'] > 40

"A fit that was interrupted goes on, from `learn.save` and the callback's `state_dict`, with what was remembered."
import pytest, torch
from helpers import *

METHODS = dict(epoch=lambda: ImportanceCB(keep=.3, gate=None), auto=lambda: ImportanceCB(limit=1.5), batch=lambda: ImportanceCB(limit=1.5, seat='batch', gate=None),
    two_stages=lambda: ImportanceCB(limit=50., floor=.1, least=1), loss=lambda: ImportanceCB(limit=1.5, seat='loss'), filter=lambda: BatchLossFilter(.6, gate=None), filter_auto=lambda: BatchLossFilter(.8),
    filter_loss=lambda: BatchLossFilter(.6, seat='loss'))

class Chosen(Callback):
    "Everything that a step was made of: the ids in the model, the weights, and in the loss seat the positions"
    order, run_valid = SelectionCB.order+1, False
    def __init__(self, cb): self.cb, self.steps = cb, []
    def after_loss(self):
        s = self.cb.fit_state
        self.steps.append((ids_of(self.xb), None if s.w is None else s.w.tolist(), None if s.idxs is None else s.idxs.tolist(), self.learn.loss_grad.item()))

def saved(cb, path):
    "The state as it comes back from a file, read without pickle"
    torch.save(cb.state_dict(), path)
    return torch.load(path, weights_only=True)

def equal(a, b):
    if isinstance(a, Tensor): return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    return len(a) == len(b) and all(equal(o, p) for o, p in zip(a, b)) if isinstance(a, (tuple, list)) else a == b

def next_fit(learn, cb, epochs=2):
    "One more fit, with an order of the data that does not depend on what was before"
    set_seed(7)
    learn.dls.train.rng = random.Random(7)
    chosen = Chosen(cb)
    quiet_fit(learn, epochs, [cb, chosen], fit='fit', lr=1e-3)
    return chosen.steps

def interrupt(learn, cb, how, epochs=3, of=6):
    "Fit, and stop after the `epochs`-th epoch"
    class Stop(Callback):
        order = 100
        def after_epoch(self):
            if self.epoch == epochs-1: raise how
    try: quiet_fit(learn, of, [cb, Stop()])
    except KeyboardInterrupt: pass

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('how', (CancelFitException, KeyboardInterrupt))
def test_going_on_is_as_if_nothing_had_been(method, how, tmp_path):
    "Another process (a new Learner, a new callback, other initial weights) chooses the same samples, with the same weights, and comes to the same network"
    cb, learn = METHODS[method](), make_learner(path=tmp_path)
    interrupt(learn, cb, how)
    learn.save('stopped')
    state = saved(cb, tmp_path/'state.pth')
    want = next_fit(learn, cb)
    again, other = METHODS[method](), make_learner(seed=99, path=tmp_path)
    other.load('stopped', with_opt=True)
    again.load_state_dict(state)
    assert next_fit(other, again) == want and same(weights(learn), weights(other))
    assert equal(list(cb.state_dict().values()), list(again.state_dict().values())), 'and remembers the same afterwards'
    fresh, other = METHODS[method](), make_learner(seed=99, path=tmp_path)
    other.load('stopped', with_opt=True)
    assert (next_fit(other, fresh) != want) == isinstance(cb, ImportanceCB), 'which it would not without the state; the filter goes by each batch alone'

@pytest.mark.parametrize('method', METHODS)
def test_a_state_taken_in_the_middle_of_a_fit(method, tmp_path):
    "After an epoch, by a callback: it is what the interrupted fit would have left, and the fit does not notice"
    class Saves(Callback):
        order = 50
        def after_epoch(self):
            if self.epoch == 1: self.state = saved(cb, tmp_path/'state.pth')
    plain, cb, saves = METHODS[method](), METHODS[method](), Saves()
    a, b = quiet_fit(make_learner(), 4, plain), quiet_fit(make_learner(), 4, [cb, saves])
    assert same(weights(a), weights(b)) and equal(list(plain.state_dict().values()), list(cb.state_dict().values()))
    cut = METHODS[method]()
    interrupt(make_learner(), cut, CancelFitException, 2, of=4)
    assert equal(list(cut.state_dict().values()), list(saves.state.values()))

def test_the_state_is_plain(tmp_path):
    cb = METHODS['epoch']()
    quiet_fit(make_learner(), 3, cb)
    state = saved(cb, tmp_path/'state.pth')
    assert {'scores', 'fits', 'n_ids', 'recent', 'normaliser'} <= set(state) and state['n_ids'] == 600 and state['fits'] == 1
    assert equal(state['scores'], cb.store.values) and (~state['scores'].isnan()).sum() > 200
    state['scores'].zero_()
    assert cb.store.values.nansum() > 0
    given = cb.state_dict()
    given['scores'].zero_()
    assert cb.store.values.nansum() > 0, 'a copy'

def test_the_plan_is_drawn_from_the_remembered_scores():
    "One id in eight is given a hundredfold score. In windows with up to eight of them these are chosen for certain, in others nearly so; the rest shares what is left"
    cb, learn = ImportanceCB(keep=.25, gate=None, smooth=.5), make_learner()
    quiet_fit(learn, 1, cb)
    state = cb.state_dict()
    state['scores'] = torch.full((600,), .1)
    state['scores'][::8] = 10.
    again = ImportanceCB(keep=.25, gate=None, smooth=.5)
    again.load_state_dict(state)
    w = Watch()
    quiet_fit(make_learner(), 1, [w, again])
    got = {i for b in w.ids[0] for i in b}
    share = len(got & set(range(0, 600, 8)))/75
    rest = len(got-set(range(0, 600, 8)))/525
    assert share > .85 and rest < .2 # 16 of 64: about 1 and (16-8)/56; drawn uniformly, both would be 0.25 with a standard error of 0.05 and 0.02

def test_a_state_survives_start_epoch(tmp_path):
    "fastai's own way of going on: `start_epoch`, which skips the epochs that were had"
    cb, learn = METHODS['epoch'](), make_learner(path=tmp_path)
    interrupt(learn, cb, KeyboardInterrupt, 2)
    learn.save('stopped')
    again, other, w = METHODS['epoch'](), make_learner(path=tmp_path), Watch()
    again.load_state_dict(saved(cb, tmp_path/'state.pth'))
    other.load('stopped', with_opt=True)
    with other.no_bar(), other.no_logging(): other.fit_one_cycle(4, 1e-2, start_epoch=2, cbs=[again, w])
    assert [len(e) for e in w.ids if e] == [10, 10] and all(len(b) <= 19 for e in w.ids for b in e)
    assert (~again.store.values.isnan()).sum() >= (~cb.store.values.isnan()).sum()

def test_another_methods_state_is_refused():
    "Also where both remember the same things"
    ours, theirs = ImportanceCB(), BatchLossFilter()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match='The state of BatchLossFilter: expected what the `state_dict` of a ImportanceCB gave'): ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match='The state of None'): ours.load_state_dict({})

def test_another_data_set_forgets():
    cb = METHODS['epoch']()
    quiet_fit(make_learner(), 2, cb)
    again = METHODS['epoch']()
    again.load_state_dict(cb.state_dict())
    quiet_fit(make_learner(make_dls(n=300)), 1, again)
    assert len(again.store.values) <= 300

def test_real_digits_go_on(tmp_path):
    "Two epochs, a new process, two more, on 1,000 MNIST digits with a third of them trained on: accuracy as asserted; chance is 0.1"
    from fastai_is.data import mnist
    def digits():
        set_seed(0)
        return Learner(mnist(n=1000, bs=50), nn.Sequential(Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)), metrics=accuracy, path=tmp_path)
    cb, learn = ImportanceCB(keep=1/3, gate=None), digits()
    interrupt(learn, cb, KeyboardInterrupt, 3)
    learn.save('stopped')
    other, again = digits(), ImportanceCB(keep=1/3, gate=None)
    other.load('stopped', with_opt=True)
    again.load_state_dict(saved(cb, tmp_path/'state.pth'))
    with other.no_bar(), other.no_logging(): other.fit_one_cycle(6, 1e-2, start_epoch=3, cbs=again)
    print(learn.recorder.values[-1], other.recorder.values[-1])
    assert other.recorder.values[-1][2] > .8 and other.recorder.values[-1][3] == pytest.approx(.33, abs=.03)

"Plans of any length, the queue, and the hook for users."
import contextlib, io

import pytest
from fastai_is.callback.core import join, no_ids, take
from helpers import *

class Half(SelectionCB):
    "Every other sample of the loader's order, in batches of the loader's size"
    def __init__(self, w=1., **kw):
        super().__init__(seat='epoch', seats=('epoch',), **kw)
        self.w = w
    def plan(self, ids, bs): return Plan(ids[::2], torch.full((len(ids[::2]),), self.w), bs)

class Pool(SelectionCB):
    "Batches of three, of which every third row is trained on"
    follows_ids = True
    def plan(self, ids, bs): return Plan(ids, None, 3*bs)
    def choose(self, scores): return Selection(torch.arange(0, len(scores), 3), torch.ones(-(-len(scores)//3)))

class Some(SelectionCB):
    "Rows with an even id, as many as there happen to be; ids are known in the batch seat too"
    queues, unbiased, follows_ids = True, False, True
    def choose(self, scores):
        self.chosen.append(self.fit_state.rows[self.fit_state.rows%2 == 0].tolist())
        idxs = (self.fit_state.rows%2 == 0).nonzero()[:, 0]
        return Selection(idxs, torch.ones(len(idxs)))
    def start_fit(self): self.chosen = []

def test_shorter_epochs_are_what_schedules_count():
    w, bars = Watch(), []
    class Bars(Callback):
        def after_train(self): bars.append((self.learn.progress.pbar.total, self.n_iter, self.pct_train))
    learn = make_learner()
    with contextlib.redirect_stdout(io.StringIO()): learn.fit_one_cycle(3, 1e-2, cbs=[w, Half(), Bars()])
    assert [[len(b) for b in e] for e in w.ids] == [[64]*4+[44]]*3
    assert bars == [(5, 5, pytest.approx((i+1)/3)) for i in range(3)]
    lrs = learn.recorder.lrs
    quiet_fit(learn, 3)
    assert len(lrs) == 15 and np.allclose(lrs, learn.recorder.lrs[::2]), 'the schedule of 30 steps, every other one of them'
    assert learn.dls.train.bs == 64 and learn.dls.train.n == 600 and 'get_idxs' not in vars(learn.dls.train)

@pytest.mark.parametrize('reduction', ('mean', 'sum'))
def test_reduction_where_the_batch_size_stays(reduction):
    "Weights apply, and a sum is over the rows of the batch: nothing stands in for what was left out of the epoch"
    w, lf = Watch(), CrossEntropyLossFlat(reduction=reduction)
    class Check(Callback):
        order, run_valid = SelectionCB.order+1, False
        def after_loss(self):
            assert torch.allclose(self.learn.loss_grad, 2*lf(self.pred, *self.yb)) and torch.allclose(self.learn.loss, self.learn.loss_grad)
    quiet_fit(make_learner(loss=lf), 2, [w, Half(2.), Check()])

def test_pool():
    w, cb = Watch(), Pool()
    class Rows(Callback):
        order, run_valid, seen = SelectionCB.order+1, False, []
        def before_batch(self): self.seen.append((cb.fit_state.rows.tolist(), cb.fit_state.idxs))
    learn = quiet_fit(make_learner(), 2, [w, cb, Rows()])
    assert [[len(b) for b in e] for e in w.ids] == [[64]*3+[8]]*2 and len(learn.recorder.lrs) == 8
    assert all([rows[i] for i in idxs] == b for (rows, idxs), b in zip(Rows.seen, sum(w.ids, []))), 'the ids are those of the rows'
    for e in range(2): assert sorted(i for rows, _ in Rows.seen[4*e:4*e+4] for i in rows) == list(range(600))
    assert cb.counts == dict(forwarded=1200+400, backpropagated=400)

def test_pool_without_ids_takes_batches_as_they_come():
    train, valid = make_data()
    dls, w = DataLoaders(torch.utils.data.DataLoader(train, batch_size=64), torch.utils.data.DataLoader(valid, batch_size=64)), Watch()
    with pytest.warns(UserWarning, match='Each batch is taken as it comes') as ws: quiet_fit(make_learner(dls), 2, [w, Pool()])
    assert len([o for o in ws if 'taken as it comes' in str(o.message)]) == 1
    assert [[len(b) for b in e] for e in w.ids] == [[22]*9+[8]]*2

@pytest.mark.parametrize('shuffle', (True, False))
def test_queue_trains_each_chosen_row_once(shuffle):
    w, cb = Watch(), Some()
    class Rows(Callback):
        order, run_valid, seen, losses = SelectionCB.order+1, False, [], []
        def before_batch(self): self.seen.append(cb.fit_state.rows.tolist())
        def after_loss(self): self.losses.append((self.learn.loss.item(), self.learn.loss_grad.item()))
    Rows.seen, Rows.losses = [], []
    learn = quiet_fit(make_learner(make_dls(shuffle=shuffle)), 3, [w, cb, Rows()])
    trained = sum(w.ids, [])
    assert sum(cb.chosen, []) == sum(trained, []) == sum(Rows.seen, []), 'in the order in which they were chosen'
    assert {len(b) for b in trained[:-1]} == {64} and 2 <= len(trained[-1]) < 128
    assert len(learn.recorder.lrs) == len(trained), 'batches that only waited are not recorded'
    assert cb.counts == dict(forwarded=1800+900, backpropagated=900)
    assert all(a != b for a, b in Rows.losses), 'train_loss is the mean over the scoring passes'

def test_queue_of_everything_is_plain_but_for_its_scoring():
    class All(Some):
        def choose(self, scores): pass
    def run(cb):
        set_seed(0)
        return weights(quiet_fit(make_learner(make_dls(n=640)), 2, cb, lr=1e-3))
    a, b = run(None), run(All())
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)

def test_join_undoes_take():
    b = (TensorImage(torch.randn(5, 3)), dict(a=torch.arange(5), s=torch.tensor(2.)), [torch.randn(5), torch.randn(5, 2)], list('abcde'), None, 7)
    parts = [torch.tensor([0, 1]), torch.tensor([2, 3, 4])]
    got = join([take(b, o, 5) for o in parts], [2, 3])
    assert isinstance(got[0], TensorImage) and got[0].equal(b[0]) and got[1]['a'].equal(b[1]['a']) and got[1]['s'] == 2.
    assert all(p.equal(q) for p, q in zip(got[2], b[2])) and got[3:] == b[3:]

@pytest.mark.parametrize('n', (2, 4))
def test_a_list_of_inputs_is_not_one_of_samples(n):
    "Also where there are as many of them as samples in the batch; a list of samples with rows of their own stays one"
    inputs, boxes = [torch.randn(n, 3) for _ in range(n)], [torch.randn(i+1, 4) for i in range(n)]
    got = take((inputs, boxes), torch.tensor([1]), n)
    assert len(got[0]) == n and all(a.equal(b[1:2]) for a, b in zip(got[0], inputs)) and len(got[1]) == 1 and got[1][0] is boxes[1]
    rest = take((inputs, boxes), torch.tensor([i for i in range(n) if i != 1]), n)
    whole = join([got, rest], [1, n-1])
    assert all(a.equal(torch.cat([b[1:2], b[:1], b[2:]])) for a, b in zip(whole[0], inputs)) and len(whole[1]) == n and whole[1][1] is boxes[0]

@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
def test_on_select(seat):
    seen = []
    def look(learn, idxs, weights, scores): seen.append((learn, idxs, weights, scores))
    w = Watch()
    cb = ImportanceCB(keep=.25, gate=None, seat=seat, on_select=look)
    learn = quiet_fit(make_learner(), 3, [w, cb])
    assert all(o[0] is learn and len(o[1]) == len(o[2]) and o[3][o[1]].isfinite().all() for o in seen)
    if seat == 'epoch':
        assert len(seen) == 3 and all(len(o[3]) == 600 and len(o[1]) == 150 for o in seen)
        assert [o[1].tolist() for o in seen] == [sum(e, []) for e in w.ids]
        assert (seen[0][3] == 1).all() and len(seen[2][3].unique()) > 100, 'nothing is remembered at first'
    else: assert len(seen) == 30 and [len(o[3]) for o in seen[:10]] == [64]*9+[24] and [len(o[1]) for o in seen[:10]] == [16]*9+[6]

def test_on_select_must_be_callable():
    with pytest.raises(TypeError, match="on_select=3: expected a function"): ImportanceCB(on_select=3)

def test_why_there_are_no_ids():
    train, valid = make_data()
    assert no_ids(DataLoader(train, bs=64)) is None
    assert 'not a fastai DataLoader' in no_ids(torch.utils.data.DataLoader(train))
    assert 'no ids' in no_ids(DataLoader(iter(train), bs=64))
    assert 'no batches' in no_ids(DataLoader(train, bs=None))

# Found in review
@pytest.mark.parametrize('cb', (lambda: Half(), lambda: ImportanceCB(keep=.5, gate=None)))
def test_an_epoch_cancelled_before_its_first_batch(cb):
    "The next one is planned once, from the loader's own order"
    class Cancel(Callback):
        order, run_valid = 20, False
        def before_train(self):
            if self.epoch == 1: raise CancelTrainException
    w, learn = Watch(), make_learner()
    quiet_fit(learn, 4, [cb(), Cancel(), w])
    assert [len(sum(e, [])) for e in w.ids if e] == [300]*3
    assert learn.dls.train.bs == 64 and learn.dls.train.n == 600 and 'get_idxs' not in vars(learn.dls.train)

def test_a_loss_that_does_something_of_its_own_is_scored_as_it_is():
    from fastai_is.scores import _closed_grad, upper_bound
    class Sharp(CrossEntropyLossFlat):
        def __call__(self, o, t, **kw): return super().__call__(o*5, t, **kw)
    z, y = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    g, = torch.autograd.grad(F.cross_entropy(5*z, y, reduction='sum'), z)
    assert torch.allclose(upper_bound(z, y, loss_func=Sharp()), g.norm(dim=1), rtol=1e-4)
    assert _closed_grad(CrossEntropyLossFlat(), z, y) is not None, 'the others keep their closed form'

"`ImportanceCB` with a pool, or holding variance or time: what is scored, drawn and weighted, when it begins, and that an epoch without it is plain."
import itertools, warnings
from contextlib import nullcontext

import pytest, torch
from helpers import *
from fastai_is.callback.importance import ImportanceCB
from fastai_is.scores import score_funcs

def pooled(**kw): return ImportanceCB(**{**dict(seat='batch', pool=3, gate=None), **kw})

def run(cb=None, epochs=3, model=None, lr=1e-2, fit='fit_one_cycle', **kw):
    w = Watch()
    set_seed(0) # the loader draws its seed when it is made
    learn = quiet_fit(make_learner(make_dls(**kw), model=model), epochs, [w]+list(L(cb)), lr=lr, fit=fit)
    return learn, w

# Steps and sizes
@pytest.mark.parametrize('kw', (dict(), dict(workers=2), dict(cls=TfmdDL), dict(shuffle=False), dict(n=576)))
def test_an_epoch_has_a_third_of_the_steps_and_schedules_go_by_them(kw):
    "As many steps, of the same learning rates, as plain training with batches three times as large; each is drawn from one of those"
    (plain, w0), (ours, w1) = run(bs=192, **kw), run(pooled(), **kw)
    assert [len(e) for e in w1.ids] == [-(-kw.get('n', 600)//192)]*3 and w0.lrs == w1.lrs
    assert abs(ours.pct_train-1) < 1e-6
    for e0, e1 in zip(w0.ids, w1.ids):
        for b0, b1 in zip(e0, e1): assert set(b1) <= set(b0) and len(b1) == round(len(b0)/3)
    assert (ours.dls.train.bs, ours.dls.train.n, len(ours.dls.train)) == (64, kw.get('n', 600), -(-kw.get('n', 600)//64))

@pytest.mark.parametrize('workers', (0, 2))
def test_no_batch_is_lost_where_short_ones_are_dropped(workers):
    "Ten batches of 64: three pools of three and one of the last batch, filled up with the first samples"
    seen = []
    class Offered(Callback):
        order, run_valid = ImportanceCB.order-1, False
        def before_batch(self): seen.append(ids_of(self.xb))
    set_seed(0)
    learn, w = make_learner(make_dls(n=650, drop_last=True, workers=workers)), Watch()
    quiet_fit(learn, 1, [pooled(), w, Offered()])
    assert [len(b) for b in seen] == [192]*4 and [len(b) for b in w.ids[0]] == [64]*4
    flat = [i for b in seen for i in b]
    assert len(set(flat)) == 640 and flat[640:] == flat[:128]
    assert learn.dls.train.drop_last and len(learn.dls.train) == 10

@pytest.mark.parametrize('bs,n', ((64, 65), (64, 66), (2, 7), (700, 600)))
@pytest.mark.parametrize('drop_last', (False, True))
def test_short_pools(bs, n, drop_last):
    net = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5)) # without BatchNorm, which cannot take one sample in plain fastai either
    for cb in (pooled(), ImportanceCB(seat='batch', hold='time'), ImportanceCB(seat='batch', hold='variance')):
        _, w = run(cb, model=net, bs=bs, n=n, drop_last=drop_last)
        if not (drop_last and bs > n): assert all(len(e) >= 1 and min(map(len, e)) >= min(2, n%bs or bs if not drop_last else bs) for e in w.ids)

@pytest.mark.parametrize('kind', ('pytorch', 'iterable'))
def test_without_ids_each_batch_is_a_pool(kind):
    train, valid = make_data()
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(train)
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True) if kind == 'pytorch' else DataLoader(Stream(), bs=64, n=600)
    w = Watch()
    with pytest.warns(UserWarning, match='Each batch is taken as it comes'):
        quiet_fit(make_learner(DataLoaders(loader, DataLoader(valid, bs=64))), 2, [w, pooled()])
    assert [[len(b) for b in e] for e in w.ids] == [[21]*9+[8]]*2

def test_ids_followed_for_another_callback_change_nothing():
    class Follows(Callback): follows_ids = True
    (a, w0), (b, w1) = [run([ImportanceCB(seat='batch', keep=.3, gate=None), *more]) for more in ([], [Follows()])]
    assert w0.ids == w1.ids and same(weights(a), weights(b))

# The draw, the weights and the step
@pytest.mark.parametrize('bias', (1., .5))
@pytest.mark.parametrize('score', ('upper_bound', 'loss'))
@pytest.mark.parametrize('bf16', (False, True))
def test_the_step_is_the_weighted_mean_over_draws_from_the_pool(bias, score, bf16):
    chosen, pools, seen = [], [], []
    class Before(Callback):
        order, run_valid = ImportanceCB.order-1, False
        def before_batch(self): pools.append((self.x, self.y))
    class Check(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def after_loss(self):
            (x, y), (idxs, w, scores) = pools[-1], chosen[-1]
            self.model.eval()
            with torch.no_grad():
                with torch.autocast('cpu', torch.bfloat16, enabled=bf16): pred = self.model(x)
                want = score_funcs[score](pred.float(), y, loss_func=F.cross_entropy)
            self.model.train()
            torch.testing.assert_close(scores, want)
            p = .9*want.double()/want.double().sum()+.1/len(y)
            torch.testing.assert_close(w.double(), 1/(len(y)*p[idxs]), rtol=1e-4, atol=0)
            assert len(idxs) == round(len(y)/3) and torch.equal(self.x, x[idxs]) and torch.equal(self.y, y[idxs])
            l = F.cross_entropy(self.pred, self.y, reduction='none')
            v = w if bias == 1 else w**bias/(w**bias).mean()
            torch.testing.assert_close(self.learn.loss_grad, (v*l).mean())
            torch.testing.assert_close(self.learn.loss, (w*l).mean().detach())
            seen.append(len(idxs) > len(idxs.unique()))
    cb = pooled(bias=bias, score=score, smooth=.1, bf16=bf16, on_select=lambda learn, idxs, w, scores: chosen.append((idxs, w, scores)))
    run([cb, Before(), Check()], model=nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)))
    assert len(seen) == 12 and any(seen), 'drawn with replacement'
    assert cb.counts == dict(forwarded=3*(600+200), backpropagated=3*200)

def test_the_pooled_gradient_is_unbiased():
    "One and the same pool of twelve, 400 times, four of which are drawn; a self-normalised mean of the same draws is off"
    items, valid = make_data(12)
    x, y = torch.stack([a for a, _ in items]), torch.stack([b for _, b in items])
    torch.manual_seed(0)
    model = nn.Linear(20, 5)
    with torch.no_grad(): model.weight.copy_(F.one_hot(y, 5).float().T@x*.1)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))])
    def z(bias):
        grads = []
        class Grab(Callback):
            run_valid = False
            def before_step(self): grads.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        dls = DataLoaders(DataLoader(items*100, bs=4), DataLoader(valid, bs=64))
        quiet_fit(make_learner(dls, model=deepcopy(model)), 4, [pooled(bias=bias, smooth=.05), Grab()], lr=0., fit='fit')
        got = torch.stack(grads)
        assert len(got) == 400
        return ((got.mean(0)-want).abs()/(got.std(0)/len(got)**.5+1e-7)).max()
    assert z(1.) < 4.5
    assert z(1-1e-9) > 8, 'this exponent leaves the weights as they are, but rescales them to a mean of 1: the test would notice'

# The gate
def test_tau_is_that_of_a_pool():
    "A model that stays as it is, batches in order: nine whole ones make three pools, the short one is left out"
    torch.manual_seed(0)
    model = nn.Linear(20, 5)
    for epochs in (1, 2):
        learn, _ = run(ImportanceCB(seat='batch', pool=3, gate=1e9), epochs, model=deepcopy(model), lr=0., fit='fit', shuffle=False)
        train, _ = make_data()
        s = upper_bound(model(torch.stack([a for a, _ in train])), torch.stack([b for _, b in train]), loss_func=F.cross_entropy).detach()
        ema, steps = 0., 0
        for _ in range(epochs):
            for i in range(3): ema, steps = .9*ema+.1*float(tau(s[i*192:(i+1)*192])), steps+1
        assert abs(learn.recorder.values[-1][-1]-ema/(1-.9**steps)) < 1e-5

def test_tau_is_known_where_an_epoch_has_fewer_batches_than_a_pool():
    learn, _ = run(ImportanceCB(seat='batch', pool=3, gate=1e9), 3, n=150)
    assert [v[-1] is None for v in learn.recorder.values] == [True, False, False]

def test_the_gate_is_decided_at_the_start_of_an_epoch():
    for gate, th in (('auto', 2.), (1.3, 1.3)):
        learn, _ = run(ImportanceCB(seat='batch', pool=3, gate=gate, smooth=0., bias=1.), 14, lr=2e-2)
        kept, taus = [[v[i] for v in learn.recorder.values] for i in (3, 4)]
        assert kept[0] == 1 and all((k < 1) == (t > th) for k, t in zip(kept[1:], taus)), (kept, taus)
        assert set(kept) == {1., 200/600}, 'it did open'

@pytest.mark.parametrize('make', (lambda: ImportanceCB(seat='batch', pool=3, gate=1e9), lambda: ImportanceCB(seat='batch', pool=5, gate=1e9, keep='auto'),
    lambda: ImportanceCB(seat='batch', hold='time', gate=1e9), lambda: ImportanceCB(seat='batch', hold='variance', gate=1e9),
    lambda: ImportanceCB(seat='batch', pool=1, keep=1), lambda: ImportanceCB(seat='batch', pool=3, gate=1e9, costs='measured', score='last_layer')))
def test_plain_bit_for_bit_while_shut(make):
    cb = make()
    (plain, w0), (ours, w1) = run(None, 4), run(cb, 4)
    assert same(weights(plain), weights(ours)) and w0.ids == w1.ids and w0.lrs == w1.lrs
    assert [v[:3] for v in plain.recorder.values] == [v[:3] for v in ours.recorder.values]
    assert cb.counts['forwarded'] == cb.counts['backpropagated'] == 2400, 'no scoring pass'

@pytest.mark.parametrize('make', (pooled, lambda: ImportanceCB(seat='batch', hold='time', gate=1.2), lambda: ImportanceCB(seat='batch', hold='variance', gate=1.2)))
def test_reproducible(make):
    (a, w0), (b, w1), (plain, _) = [run(cb, 8, lr=2e-2) for cb in (make(), make(), None)]
    assert same(weights(a), weights(b)) and w0.ids == w1.ids and not same(weights(a), weights(plain))

# Constant variance and constant time
def sizes(tau, **kw):
    "Scored and trained sizes of the steps of an epoch, at a given tau"
    cb, scored = ImportanceCB(seat='batch', **kw), []
    cb.tau = lambda: tau
    class Offered(Callback):
        order, run_valid = ImportanceCB.order-1, False
        def before_batch(self): scored.append(len(self.y))
    w = Watch()
    quiet_fit(make_learner(), 1, [cb, w, Offered()])
    return scored, [len(b) for b in w.ids[0]]

def test_constant_variance_sizes():
    assert sizes(2.1, hold='variance')[1] == [64]*9+[24]
    assert sizes(4., hold='variance') == ([64]*9+[24], [29]*9+[11]) # 1/4+.2 = .45
    assert sizes(2.5, hold='variance')[1] == [38]*9+[14]            # .6
    assert sizes(4., hold='variance', gate=5.)[1] == [64]*9+[24]
    assert sizes(2.5, hold='variance', costs=(1., 1.))[1] == [64]*9+[24], 'dear forward passes leave nothing to gain'

def test_constant_time_sizes():
    assert sizes(1.9, hold='time')[1] == [64]*9+[24]
    assert sizes(3., hold='time') == ([96]*6+[24], [32]*6+[8])      # B = 1+(3-1-1)/2 = 1.5, a = (3-1.5)/3 = .5
    assert sizes(10., hold='time')[0] == [109]*5+[55]               # 1+(3-.6-1)/2 = 1.7
    scored, trained = sizes(10., hold='time')
    assert trained == [28]*5+[14] and abs(scored[0]+3*trained[0]-3*64) <= 2, 'the cost of a plain step'

def test_it_holds_by_itself():
    learn, w = run(ImportanceCB(seat='batch', hold='variance'), 14, lr=2e-2)
    kept, taus = [[v[i] for v in learn.recorder.values] for i in (3, 4)]
    assert kept[0] == 1 and kept[-1] < .67 and len({len(b) for e in w.ids for b in e[:-1]}) > 3, 'the size follows tau'

# Measured costs
class FakeClock:
    "A forward pass takes `forward` seconds, a backward pass `backward`, and everything between them a year"
    def __init__(self, forward, backward): self.now, self.steps = 0., itertools.cycle((3e7, forward, 3e7, backward))
    def __call__(self): self.now += next(self.steps); return self.now

@pytest.mark.parametrize('costs,opens', (((1., 2.), True), ((1., 100.), True), ((30., 1.), False)))
def test_the_gate_goes_by_measured_costs(costs, opens):
    cb = ImportanceCB(seat='batch', pool=3, costs='measured', smooth=0., bias=1.)
    cb.clock = FakeClock(64*costs[0], 64*costs[1])
    learn, _ = run(cb, 14, n=640, lr=2e-2)
    torch.testing.assert_close(torch.tensor(cb.pass_costs), torch.tensor(costs), rtol=1e-4, atol=0) # up to the rounding of a clock that shows years
    th = break_even(3, 1, *costs)
    kept, taus = [[v[i] for v in learn.recorder.values] for i in (3, 4)]
    saves = sum(costs) < 3*costs[1]
    assert all((k < 1) == (saves and t > th) for k, t in zip(kept[1:], taus)) and (min(kept) < 1) == opens, (kept, taus)

def test_measured_costs_are_sane_and_only_measured_on_request():
    cb = ImportanceCB(seat='batch', pool=3, costs='measured')
    assert cb.pass_costs == (1., 2.), 'until there are any'
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 5))
    run(cb, 2, model=net)
    forward, backward = cb.pass_costs
    assert 1e-8 < forward < .1 and .2 < backward/forward < 20, cb.timer.laps
    assert [len(o) for o in cb.timer.laps.values()] == [10, 10], 'ten steps, then the clock is left alone'
    cb = pooled(gate='auto')
    def never(): raise AssertionError('the clock was asked')
    cb.clock = never
    run(cb, 2)

# Scores
@pytest.mark.parametrize('score', [*score_funcs, lambda pred, y, loss_func: pred.exp().max(1).values])
@pytest.mark.parametrize('kw', (dict(pool=3), dict(hold='time')))
def test_any_score(score, kw):
    learn, w = run(ImportanceCB(score=score, seat='batch', gate=None, **kw), 2)
    assert len(w.ids[1]) in (4, 7, 10) and all(np.isfinite(v[4]) for v in learn.recorder.values)

def test_layer_and_on_select_are_passed_on():
    body = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    a, b = [], []
    for layer, seen, model, loss in ((None, a, body, CrossEntropyLossFlat()), (body[2], b, nn.Sequential(body, nn.LogSoftmax(1)), nn.NLLLoss())):
        state = deepcopy(body.state_dict())
        quiet_fit(make_learner(model=model, loss=loss), 1, pooled(layer=layer, on_select=lambda learn, i, w, s: seen.append(s)), lr=0., fit='fit')
        body.load_state_dict(state)
    assert len(a) == len(b) == 4
    torch.testing.assert_close(a, b)

# What the choice was worth
def table(learn, col): return [v[learn.recorder.metric_names.index(col)-1] for v in learn.recorder.values]

@pytest.mark.parametrize('kw', (dict(keep=.4, gate=None), dict(prefilter=1, limit=1.5, floor=.05), dict(limit=1.5, floor=.05)))
def test_gain_is_the_variance_by_chance_over_that_of_the_choice(kw):
    "Against sums over single samples, by the scores of the training pass, in two stages of one step in four"
    epochs, stages = [], set()
    class See(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def before_train(self): epochs.append([])
        def after_loss(self):
            s = cb.fit_state
            if s.w is None: return
            stages.add(1 if s.scored is None else 2)
            scores = score_funcs['upper_bound'](self.pred.detach(), *self.yb, loss_func=self.loss_func)
            if s.scored is None or self.iter%4 == 0: epochs[-1] += zip(scores.tolist(), s.w.tolist())
    cb = ImportanceCB(bf16=False, **kw)
    learn, _ = run([cb, See()], 8, lr=3e-2)
    assert stages == ({1, 2} if kw.get('prefilter', 3) > 1 and 'keep' not in kw else {1})
    want = [sum(w*s*s for s, w in e)/sum(w*w*s*s for s, w in e) if e else 1. for e in epochs]
    torch.testing.assert_close(torch.tensor(table(learn, 'gain')), torch.tensor(want), rtol=1e-5, atol=0)
    assert want[0] == 1 and max(want) > 1.1 and table(learn, 'kept')[-1] < .6

def test_gain_by_chance_is_one():
    learn, _ = run(ImportanceCB(keep=.4, gate=None, smooth=1.), 3)
    assert table(learn, 'kept')[-1] < .5 and all(abs(g-1) < 1e-6 for g in table(learn, 'gain'))

def told(capsys, cb, epochs=8, n=600, noise=0., logging=True, before=None, **kw):
    "What a fit of two clouds, nearly all of which is soon learned, with a share of wrong labels, has to say besides its table"
    set_seed(0)
    x, y = torch.randn(n+100, 20), torch.randint(2, (n+100,))
    x += 2.*y[:, None]
    y = torch.where(torch.rand(len(y)) < noise, torch.randint(2, (len(y),)), y)
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items[:n], bs=64, shuffle=True), DataLoader(items[n:], bs=64))
    learn = Learner(dls, nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    if before: before(learn, cb)
    capsys.readouterr()
    with learn.no_bar(), nullcontext() if logging else learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=cb, **kw)
    return [o for o in capsys.readouterr().out.splitlines() if o[:1] != '[']

def test_it_tells_where_it_did_not_pay(capsys):
    assert told(capsys, ImportanceCB()) == [], 'where it paid, nothing is said'
    said = told(capsys, ImportanceCB(smooth=1., keep=.4, gate=None))
    assert len(said) == 1 and said[0].startswith('ImportanceCB: its choice of samples was worth 1.00 times one by chance') and 'fewer epochs' in said[0]
    said = told(capsys, ImportanceCB(limit=1.001), 4, noise=1.)
    assert len(said) == 1 and said[0].startswith('ImportanceCB skipped nothing in these 4 epochs')

@pytest.mark.parametrize('gains,said', (([1., 3., 1.1, 1.1], '1.10 times'), ([1., 1.1, 3., 3.], None), ([1., float('nan'), 1.2, 1.2], '1.20 times'), ([float('nan')]*4, None),
    ([1., 1.24, 1.24, 1.24], '1.24 times'), ([1., 1.26, 1.26, 1.26], None)))
def test_the_median_of_the_epochs_with_a_choice_counts(capsys, monkeypatch, gains, said):
    it = iter(gains)
    class Made(Callback):
        order, run_valid = ImportanceCB.order-1, False
        def before_train(self): monkeypatch.setattr(ImportanceCB, 'gain', lambda cb, g=next(it): g)
    res = told(capsys, [ImportanceCB(keep=.5, gate=None), Made()], len(gains))
    assert len(res) == (said is not None) and (said is None or said in res[0])

def test_gain_goes_by_the_training_pass():
    "In evaluation mode all is learned; with half of the units dropped it is not, and those that were chosen by are not the ones that matter"
    set_seed(0)
    x, y = torch.randn(600, 20), torch.arange(600)%2
    x += 2.*y[:, None]
    dls = DataLoaders(DataLoader(list(zip(x, y)), bs=64, shuffle=True), DataLoader(list(zip(x, y)), bs=64))
    fresh, told = [], []
    class See(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def after_loss(self):
            s = cb.fit_state
            if s.scored is not None: fresh.append((s.scored.scores[s.idxs], s.w))
        def after_epoch(self):
            if cb.fit_state.refine: told.append(cb.gain())
    cb = ImportanceCB(bf16=False, limit=1.5, floor=.05)
    learn = Learner(dls, nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(.8), nn.Linear(64, 2)), loss_func=CrossEntropyLossFlat())
    quiet_fit(learn, 10, [cb, See()])
    scores, w = map(torch.cat, zip(*fresh))
    by_fresh = (w*scores**2).sum()/(w**2*scores**2).sum()
    assert len(told) > 2 and np.mean(told) < .6*by_fresh, (told, by_fresh)

def test_ids_lost_on_the_way_are_no_verdict(capsys):
    class Loses(Callback):
        order, run_valid = ImportanceCB.order-1, False
        def before_train(self):
            if self.epoch == 2: cb._lose_ids()
    cb = ImportanceCB(limit=1.001)
    with pytest.warns(UserWarning, match='ids cannot be followed'): assert told(capsys, [cb, Loses()], 6, noise=1.) == []

def test_a_validation_within_a_fit_is_not_its_end(capsys):
    class Validates(Callback):
        run_valid = False
        def after_train(self):
            if self.epoch == 2 and not done: done.append(self.learn.validate())
    done = []
    assert len(told(capsys, [ImportanceCB(limit=1.001), Validates()], 4, noise=1.)) == 1 and done

def test_no_logging_also_where_another_callback_logs(capsys, tmp_path):
    assert told(capsys, [ImportanceCB(limit=1.001), CSVLogger(tmp_path/'log.csv')], 4, noise=1., logging=False) == []
    assert len(told(capsys, [ImportanceCB(limit=1.001), CSVLogger(tmp_path/'log.csv')], 4, noise=1.)) == 1

@pytest.mark.parametrize('ex', (CancelTrainException, CancelEpochException, CancelFitException, KeyboardInterrupt))
def test_what_is_told_of_a_fit_that_was_cut_short(capsys, ex):
    class Raise(Callback):
        run_valid = False
        def before_batch(self):
            if self.epoch == 1 and self.iter == 0: raise ex
    cb = ImportanceCB(limit=1.001)
    try: said = told(capsys, [Raise(), cb], 4, noise=1.)
    except KeyboardInterrupt: said = [o for o in capsys.readouterr().out.splitlines() if o[:1] != '[']
    n = {CancelTrainException: 4, CancelEpochException: 3}.get(ex) # after one, or a part of one, nothing is told
    assert n is None and not len(said) or f'skipped nothing in these {n} epochs' in ''.join(said), said

@pytest.mark.parametrize('cb,epochs,kw', ((dict(), 1, {}), (dict(keep=1), 3, {}), (dict(seat='batch', keep=.5, gate=None), 3, {}), (dict(seat='loss'), 3, {}), (dict(), 3, dict(logging=False))))
def test_it_says_nothing_where_there_is_nothing_to_tell(capsys, cb, epochs, kw):
    assert told(capsys, ImportanceCB(**cb), epochs, noise=1., **kw) == []

def test_a_search_for_a_learning_rate_is_told_nothing(capsys):
    def search(learn, cb):
        learn.add_cb(cb)
        with learn.no_bar(): learn.lr_find(num_it=25, show_plot=False)
        assert 'ImportanceCB' not in capsys.readouterr().out
        learn.remove_cb(cb)
    assert len(told(capsys, ImportanceCB(), 3, noise=1., before=search)) == 1

@pytest.mark.parametrize('value', (0., float('nan')))
def test_gain_of_scores_that_say_nothing(capsys, value):
    cb, seen = ImportanceCB(score=lambda pred, y, loss_func: torch.full((len(y),), value), keep=.5, gate=None), []
    class See(Callback):
        order = Recorder.order+1
        def after_epoch(self): seen.append(self.recorder.log[self.recorder.metric_names.index('gain')])
    with pytest.warns(UserWarning, match='selected uniformly'): assert told(capsys, [cb, See()], 3) == []
    assert len(seen) == 3 and all(g != g for g in seen)

# Faults
@pytest.mark.parametrize('ex', (None, CancelEpochException, CancelFitException, CancelBatchException, KeyboardInterrupt, RuntimeError))
def test_the_learner_is_as_before(ex):
    class Raise(Callback):
        run_valid = False
        def after_pred(self):
            if ex and self.epoch == 1 and self.iter == 1: raise ex('planted')
    learn, cb = make_learner(make_dls(drop_last=True)), pooled(score='last_layer')
    dl, loss, metrics = learn.dls.train, learn.loss_func, list(learn.metrics)
    try: quiet_fit(learn, 2, [cb, Raise()])
    except (KeyboardInterrupt, RuntimeError): assert ex in (KeyboardInterrupt, RuntimeError)
    assert learn.loss_func is loss and list(learn.metrics) == metrics and 'get_idxs' not in vars(dl)
    assert (dl.bs, dl.n, len(dl), cb.fit_state) == (64, 600, 9, None) and not any(m._forward_hooks for m in learn.model.modules())
    quiet_fit(learn, 1, cb)

@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_broken_losses_mean_uniform_weights(bad):
    class Breaks(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(20, 5)
        def forward(self, x): return torch.where((x[:, :1]*1e6).round() == 5, torch.tensor(bad), self.lin(x))
    ws = []
    cb = pooled(on_select=lambda learn, i, w, s: ws.append((bool((w == 1).all()), bool(s.isfinite().all()))))
    with pytest.warns(UserWarning, match='NaN'): _, w = run(cb, 4, model=Breaks(), lr=0., fit='fit')
    assert len(ws) == 16 and sum(not ok for _, ok in ws) == 4 and all(even != ok for even, ok in ws)
    assert [len(b) for e in w.ids for b in e] == [64, 64, 64, 8]*4

@pytest.mark.parametrize('kw,words', ((dict(pool=0), 'pool=0: expected a whole number'), (dict(pool=2.5), 'pool=2.5'), (dict(pool=True), 'pool=True'), (dict(pool='3'), "pool='3'"),
    (dict(pool=3, seat='epoch'), "seat='epoch': expected 'batch' with pool=3"), (dict(pool=3, seat='loss'), "seat='loss'"), (dict(pool=3, keep=.5), 'leave `keep` out'),
    (dict(pool=3, keep=1), 'keep=1'), (dict(hold='size'), "hold='size'"), (dict(hold='time', pool=3), 'leave out one of the two'), (dict(hold='time', keep=.5), 'keep=0.5'),
    (dict(hold='variance', seat='epoch'), "seat='epoch'"), (dict(costs='clock'), "costs='clock'"), (dict(costs=None), 'costs=None'), (dict(early=1.5), 'early=1.5'), (dict(early=True), "with keep='auto' and seat='batch'"), (dict(early=True, seat='epoch', keep=.5), 'with keep=0.5'), (dict(early=True, seat='epoch', prefilter=1), 'prefilter=1'), (dict(costs=(1., -1.)), 'costs=(1.0, -1.0)')))
def test_bad_settings(kw, words):
    with pytest.raises(ValueError) as e: ImportanceCB(**{**dict(seat='batch'), **kw})
    assert words in str(e.value) and 'expected' in str(e.value)

def test_misspelled_settings():
    with pytest.raises(TypeError, match='presample'): ImportanceCB(presample=3)

# Real digits
def test_real_digits():
    "3,000 digits, ten epochs of a small network: plain training reaches 94.1 %, and so does drawing from pools as soon as it pays, up to a percentage point; chance is 10 %"
    def fit(cb=None):
        set_seed(0)
        net = nn.Sequential(Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        return quiet_fit(Learner(mnist(n=3000, bs=64), net, metrics=accuracy), 10, cb).recorder.values
    cb = pooled(gate='auto', bias=1., smooth=0.)
    plain, ours = fit(), fit(cb)
    assert ours[0][:3] == plain[0] and plain[-1][2] > .93
    assert ours[-1][2] > .92 and cb.counts['backpropagated'] < .7*10*46*64

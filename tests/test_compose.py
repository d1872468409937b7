"Together with fastai's own callbacks and commands; scoring passes in bfloat16."
import warnings

import pytest, torch
from helpers import *

METHODS = dict(epoch=lambda: ImportanceCB(keep=.3, gate=None), batch=lambda: ImportanceCB(keep=.3, gate=None, seat='batch'),
    two_stages=lambda: ImportanceCB(limit=50., floor=.1, least=1), loss=lambda: ImportanceCB(keep=.3, gate=None, seat='loss'), filter=lambda: BatchLossFilter(.6, gate=None))

def digits(**kw): return Learner(mnist(n=300), nn.Sequential(Flatten(), nn.Linear(784, 10)), metrics=accuracy, **kw)

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('mix', (MixUp, CutMix))
def test_mixup(method, mix):
    dls = make_dls()
    if mix is CutMix: # which wants images
        class Image(nn.Module):
            def forward(self, x): return x.flatten(1)
        train, valid = make_data()
        img = lambda items: [(x.view(1, 4, 5), y) for x, y in items]
        dls, model = DataLoaders(DataLoader(img(train), bs=64, shuffle=True), DataLoader(img(valid), bs=64)), nn.Sequential(Image(), make_net())
    else: model = make_net()
    learn = make_learner(dls, model=model)
    lf = learn.loss_func
    quiet_fit(learn, 6, [mix(), METHODS[method]()])
    assert learn.loss_func is lf and learn.recorder.values[-1][2] > .7

def test_mixup_scores_use_the_users_loss():
    seen = []
    def score(pred, y, loss_func):
        seen.append(loss_func)
        return loss_score(pred, y, loss_func=loss_func)
    for seat in ('epoch', 'batch', 'loss'):
        learn = make_learner()
        seen.clear()
        quiet_fit(learn, 1, [MixUp(), ImportanceCB(score=score, keep=.5, gate=None, seat=seat)])
        assert seen and all(lf is learn.loss_func for lf in seen)

def test_keeping_everything_under_mixup_is_plain_mixup():
    a, b = quiet_fit(make_learner(), 3, MixUp()), quiet_fit(make_learner(), 3, [MixUp(), ImportanceCB(gate=1e9)])
    assert same(weights(a), weights(b))

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('loss', (LabelSmoothingCrossEntropyFlat(), CrossEntropyLossFlat(weight=torch.tensor([1., 2, 4, 1, 1])), nn.CrossEntropyLoss(label_smoothing=.1)))
def test_losses(method, loss):
    learn = quiet_fit(make_learner(loss=loss), 6, METHODS[method]())
    assert learn.recorder.values[-1][2] > .8

@pytest.mark.parametrize('method', METHODS)
def test_gradient_accumulation(method):
    "It counts samples: the number of optimiser steps is what the trained samples allow"
    steps, w = [], Watch()
    class Steps(Callback):
        run_valid = False
        def after_step(self): steps.append(1)
    quiet_fit(make_learner(), 4, [w, GradientAccumulation(n_acc=128), Steps(), METHODS[method]()])
    count, want = 0, 0
    for b in [b for e in w.ids for b in e]:
        count += len(b)
        if count >= 128: count, want = 0, want+1
    assert len(steps) == want > 0

@pytest.mark.parametrize('method', METHODS)
def test_mixed_precision(method):
    dtypes, ran = set(), set()
    def score(pred, y, loss_func):
        dtypes.add(pred.dtype)
        return loss_score(pred, y, loss_func=loss_func)
    cb = METHODS[method]()
    if method != 'filter': cb.score = score
    learn = make_learner()
    learn.model[-1].register_forward_hook(lambda m, i, o: ran.add((o.dtype, torch.is_grad_enabled())))
    learn.validate = noop
    learn._do_epoch_validate = noop
    quiet_fit(learn, 2, [BF16(), cb])
    learn = quiet_fit(make_learner(), 6, [BF16(), METHODS[method]()])
    assert learn.recorder.values[-1][2] > .75 and not torch.is_autocast_enabled('cpu')
    assert {d for d, _ in ran} == {torch.bfloat16}, 'the scoring pass runs as training does'
    assert len(ran) == (2 if method in ('batch', 'two_stages', 'filter') else 1)
    if method != 'filter': assert dtypes == {torch.float32}, 'predictions arrive as training hands them to the loss'

def test_gate_shut_under_mixed_precision_is_plain():
    a, b = quiet_fit(make_learner(), 3, BF16()), quiet_fit(make_learner(), 3, [BF16(), ImportanceCB(gate=1e9)])
    assert same(weights(a), weights(b))

@pytest.mark.parametrize('method', METHODS)
def test_lr_find_does_not_notice(method):
    def find(cbs):
        learn = make_learner(cbs=cbs)
        with learn.no_bar(), learn.no_logging(): lr = learn.lr_find(num_it=20, show_plot=False)
        return lr.valley, learn.recorder.losses, learn.recorder.metric_names
    plain, ours = find([]), find([METHODS[method]()])
    assert plain == ours

@pytest.mark.parametrize('method', METHODS)
def test_validation_and_predictions_do_not_notice(method):
    learn = quiet_fit(digits(), 1)
    with learn.no_bar():
        plain = learn.validate(), learn.get_preds(ds_idx=0, with_loss=True)
        learn.add_cb(METHODS[method]())
        ours = learn.validate(), learn.get_preds(ds_idx=0, with_loss=True)
    assert list(plain[0]) == list(ours[0])
    for a, b in zip(plain[1], ours[1]): assert torch.equal(a, b)
    assert len(learn.metrics) == 1

@pytest.mark.parametrize('method', METHODS)
def test_export(method, tmp_path):
    learn = quiet_fit(digits(path=tmp_path, cbs=METHODS[method]()), 2)
    learn.export()
    with pytest.warns(UserWarning): again = load_learner(tmp_path/'export.pkl')
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(again.model.eval()(x), learn.model.eval()(x))
    with learn.no_bar(): learn.show_results(max_n=4)

@pytest.mark.parametrize('method', METHODS)
def test_save_model(method, tmp_path):
    learn = make_learner(path=tmp_path)
    quiet_fit(learn, 4, [SaveModelCallback(monitor='accuracy'), METHODS[method]()])
    best = max(v[2] for v in learn.recorder.values)
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(best)

def test_csv_logger_and_train_metrics(tmp_path):
    learn = make_learner(path=tmp_path)
    log = CSVLogger()
    quiet_fit(learn, 2, [log, ImportanceCB(keep=.3, gate=None)])
    assert pd.read_csv(tmp_path/log.fname).columns.tolist() == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'kept', 'tau', 'gain', 'time']
    learn = make_learner()
    learn.recorder.train_metrics = True
    quiet_fit(learn, 2, BatchLossFilter(.6, gate=None))
    assert 'train_accuracy' in learn.recorder.metric_names

def test_fine_tune_remembers():
    learn, cb = make_learner(splitter=lambda m: [params(m[:3]), params(m[3:])]), ImportanceCB()
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=3, base_lr=1e-2, cbs=cb)
    assert len(cb.store) == 600 and learn.recorder.values[0][3] < 1, 'the second phase selects from its first epoch on'

def test_two_inputs_and_a_dictionary():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(20, 5)
        def forward(self, x, extra): return self.lin(x)*extra['scale']
    train, valid = make_data()
    wide = lambda items: [(x, dict(scale=torch.ones(1)), y) for x, y in items]
    def collate(b): return torch.stack([o[0] for o in b]), dict(scale=torch.stack([o[1]['scale'] for o in b])), torch.stack([o[2] for o in b])
    for seat in ('epoch', 'batch', 'loss'):
        dls = DataLoaders(DataLoader(wide(train), bs=64, shuffle=True, create_batch=collate), DataLoader(wide(valid), bs=64, create_batch=collate))
        dls.n_inp = 2
        learn = quiet_fit(make_learner(dls, model=Net()), 5, ImportanceCB(keep=.3, gate=None, seat=seat))
        assert learn.recorder.values[-1][2] > .8

@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
def test_named_layer(seat):
    "Log-probabilities and NLLLoss score, and therefore train, like logits and cross-entropy"
    def run(model, loss, **kw): return quiet_fit(make_learner(model=model, loss=loss), 3, ImportanceCB(keep=.3, gate=None, seat=seat, **kw))
    set_seed(0); net = make_net()
    logits = run(deepcopy(net), nn.CrossEntropyLoss())
    other = deepcopy(net)
    logp = run(nn.Sequential(other, nn.LogSoftmax(1)), nn.NLLLoss(), layer=other[-1])
    for a, b in zip(logits.model.parameters(), logp.model.parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('seat', ('epoch', 'batch', 'loss'))
def test_no_global_randomness(seat):
    "With dropout off and no shuffling, a fit leaves the global random state where plain fastai leaves it, at every step"
    def states(cb):
        seen = []
        class Note(Callback):
            order, run_valid = 70, False
            def after_batch(self): seen.append(torch.get_rng_state())
        quiet_fit(make_learner(make_dls(shuffle=False), model=nn.Linear(20, 5)), 3, [Note()]+cb)
        return seen
    plain, ours = states([]), states([ImportanceCB(keep=.3, gate=None, seat=seat)])
    assert len(plain) == len(ours) and all(torch.equal(a, b) for a, b in zip(plain, ours))

@pytest.mark.parametrize('what', ('validate', 'get_preds'))
def test_a_validation_in_the_middle_of_a_fit(what):
    sizes, cb = [], ImportanceCB(keep=.3, gate=None)
    class Middle(Callback):
        run_valid = False
        def before_batch(self): sizes.append(len(self.y))
        def after_train(self):
            if what == 'validate': self.learn.validate()
            else: self.learn.get_preds()
    learn = make_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=[cb, Middle()])
    assert set(sizes) == {19, 7} and len(sizes) == 30, 'selection goes on'
    assert cb.fit_state is None and len(learn.metrics) == 1

def test_a_list_with_an_entry_for_each_sample():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(20, 5)
        def forward(self, xs): return self.lin(torch.stack(xs))
    train, valid = make_data()
    def collate(b): return [o[0] for o in b], torch.stack([o[1] for o in b])
    dls = DataLoaders(DataLoader(train, bs=64, shuffle=True, create_batch=collate), DataLoader(valid, bs=64, create_batch=collate))
    for seat in ('epoch', 'batch', 'loss'):
        learn = quiet_fit(make_learner(dls, model=Net()), 6, ImportanceCB(keep=.3, gate=None, seat=seat))
        assert learn.recorder.values[-1][2] > .7

# Scoring in bfloat16
SCORED = dict(batch=METHODS['batch'], two_stages=METHODS['two_stages'], filter=METHODS['filter'],
    selective=lambda: SelectiveBackprop(2, start=0.), pool=lambda: ImportanceCB(pool=3, gate=None, seat='batch'))

@pytest.fixture
def fast(monkeypatch): monkeypatch.setattr('fastai_is.callback.core.fast_bf16', lambda device: True)

def passes(learn):
    "Types of the predictions of scoring passes, and of training passes, from here on"
    seen = {False:[], True:[]}
    learn._do_epoch_validate = noop
    learn.model[-1].register_forward_hook(lambda m, i, o: seen[m.training].append(o.dtype))
    return seen

def scored_in(bf16, method='batch', n=4, cbs=(), **kw):
    set_seed(0)
    learn, cb = make_learner(**{k: v() if k == 'model' else v for k, v in kw.items()}), SCORED[method]()
    cb.bf16, seen = bf16, passes(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        quiet_fit(learn, n, [cb, *cbs])
    return learn, seen

@pytest.mark.parametrize('method', SCORED)
@pytest.mark.parametrize('can', (False, True))
@pytest.mark.parametrize('bf16', (None, False, True))
def test_scoring_passes_run_in_bfloat16_where_that_is_faster_or_asked_for(method, can, bf16, monkeypatch):
    "And training never does. Where nobody asked, the first of each epoch is made in both"
    monkeypatch.setattr('fastai_is.callback.core.fast_bf16', lambda device: can)
    learn, seen = scored_in(bf16, method)
    n32 = seen[False].count(torch.float32)
    assert len(seen[False]) > 10 and set(seen[False]) <= {torch.bfloat16, torch.float32}
    assert n32 in (3, 4) if bf16 is None and can else n32 == (0 if bf16 else len(seen[False])), 'the first epoch of two stages has none'
    assert seen[True] and set(seen[True]) == {torch.float32} and {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled('cpu')

def test_what_is_forwarded_is_counted(fast):
    learn, n = make_learner(), [0]
    def add(m, i, o): n[0] += len(o)
    learn._do_epoch_validate = noop
    learn.model.register_forward_hook(add)
    cb = METHODS['batch']()
    quiet_fit(learn, 3, cb)
    assert cb.counts['forwarded'] == n[0] == cb.counts['backpropagated']+3*(600+64)

class NotInBF16(nn.Module):
    "As an operation that there is in 32 bits only"
    refused = 0
    def forward(self, x):
        if not torch.is_autocast_enabled('cpu'): return x
        type(self).refused += 1
        raise NotImplementedError("not for BFloat16")

class Stateful(nn.Module):
    "Each batch begins where the last one ended, with a table that is made once"
    def __init__(self):
        super().__init__()
        self.rnn, self.out, self.h, self.table = nn.LSTM(20, 16, batch_first=True), nn.Linear(16, 5), None, None
    def forward(self, x):
        if self.h is not None and self.h[0].shape[1] != len(x): self.h = None
        o, h = self.rnn(x[:, None], self.h)
        if self.table is None: self.table = torch.ones_like(o[0]).detach()
        self.h = tuple(t.detach() for t in h)
        return self.out((o*self.table)[:, 0])

@pytest.mark.parametrize('method', SCORED)
@pytest.mark.parametrize('model', (lambda: nn.Sequential(NotInBF16(), *make_net()), lambda: nn.Sequential(Stateful(), nn.Identity()),
    lambda: nn.Sequential(Stateful(), NotInBF16())), ids=('operation', 'state', 'both'))
def test_a_model_that_cannot_do_it_is_scored_in_32_bits(method, model, fast):
    "It is tried once; the training is that of `bf16=False`, bit for bit"
    NotInBF16.refused = 0
    (a, seen), (b, _) = scored_in(None, method, model=model), scored_in(False, method, model=model)
    assert same(weights(a), weights(b)) and NotInBF16.refused <= 1 and seen[False].count(torch.bfloat16) <= 1
    if isinstance(a.model[0], Stateful): assert {t.dtype for t in (*a.model[0].h, a.model[0].table)} == {torch.float32}

def test_where_bfloat16_was_asked_for_the_error_is_shown():
    with pytest.raises(NotImplementedError, match='not for BFloat16'):
        quiet_fit(make_learner(model=nn.Sequential(NotInBF16(), *make_net())), 2, ImportanceCB(keep=.3, gate=None, seat='batch', bf16=True))

def test_errors_of_a_scoring_pass_are_the_models_own(fast):
    tried = []
    class Broken(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled(): return x
            tried.append(1)
            raise RuntimeError("of the model")
    with pytest.raises(RuntimeError, match='of the model'): quiet_fit(make_learner(model=nn.Sequential(Broken(), *make_net())), 2, METHODS['batch']())
    assert len(tried) == 1

def test_inputs_that_need_more_digits_are_scored_in_32_bits(fast):
    "Such as years: in bfloat16, neighbours are eight apart"
    class Years(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(20, 5)
        def forward(self, x): return self.lin(2000+8*x)-self.lin(2000+0*x)
    def model(): return nn.Sequential(Years(), nn.Identity())
    (a, seen), (b, _) = scored_in(None, model=model), scored_in(False, model=model)
    assert same(weights(a), weights(b)) and seen[False].count(torch.bfloat16) <= 1

@pytest.mark.parametrize('loss,want', ((CrossEntropyLossFlat(), True), (nn.CrossEntropyLoss(label_smoothing=.1), True), (F.cross_entropy, True),
    (LabelSmoothingCrossEntropyFlat(), True), (BCEWithLogitsLossFlat(), True), (nn.NLLLoss(), False), (MSELossFlat(), False), (BCELossFlat(), False), (F.l1_loss, False)))
def test_only_where_small_errors_of_predictions_are_small_errors_of_the_loss(loss, want, fast):
    learn = Learner(make_dls(), make_net(), loss_func=loss)
    cb = METHODS['batch']()
    cb.learn = learn
    assert cb._wants_bf16() is want

@pytest.mark.parametrize('make', (lambda: make_net().double(), lambda: make_net().half(), lambda: make_net().bfloat16()))
def test_only_where_the_model_is_in_32_bits(make, fast):
    cb = METHODS['batch']()
    cb.learn = Learner(make_dls(), make(), loss_func=CrossEntropyLossFlat())
    assert cb._wants_bf16() is False

@pytest.mark.parametrize('apart', (False, True))
def test_only_where_the_model_is_in_one_place(apart, fast):
    "`ParallelTrainer` puts it into several after the engine's `before_fit`, and the copies would not know the type"
    seen = []
    class Parallel(Callback):
        def before_fit(self):
            if apart: self.learn.model = nn.DataParallel(self.model)
        def after_fit(self): self.learn.model = getattr(self.model, 'module', self.model)
    net = make_net()
    net.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled('cpu')))
    quiet_fit(make_learner(model=net), 2, [METHODS['batch'](), Parallel()])
    assert any(seen) is not apart

class TwoDevices(Callback):
    "What `ParallelTrainer` does, as far as it goes without two devices"
    def before_fit(self): self.learn.model = nn.DataParallel(self.model); self.learn.model.device_ids = [0,1]
    def after_fit(self): self.learn.model = getattr(self.model, 'module', self.model)

def test_a_layer_of_which_there_are_copies_is_refused_before_training():
    learn, steps = make_learner(), []
    class Steps(Callback):
        def before_batch(self): steps.append(1)
    with pytest.raises(ValueError, match="looks into a layer.*each of 2 devices.*'upper_bound' without `layer`"): quiet_fit(learn, 1, [ImportanceCB(score='last_layer'), TwoDevices(), Steps()])
    assert not steps

def test_options_that_would_do_nothing_are_refused():
    "`bf16` is about scoring passes by the model"
    for m in (RandomSubset, SoftPrune, LossResampler, PrioritizedSampling, ProxyScore):
        with pytest.raises(TypeError, match='bf16'): m(bf16=True)
        assert 'bf16' not in inspect.signature(m).parameters
    for m in (ImportanceCB, BatchLossFilter, SelectiveBackprop, OnlineBatchSelection, CoresetSelection):
        assert m(bf16=True).bf16 and 'bf16' in inspect.signature(m).parameters

def test_within_an_autocast_of_the_users(fast):
    "Casts of weights do not outlive the step they were made in"
    worst = []
    class Check(Callback):
        order, run_valid = ImportanceCB.order+1, False
        def before_batch(self):
            x, y = before.whole
            with torch.no_grad(), torch.autocast('cpu', enabled=False): want = loss_score(deepcopy(self.model).eval()(x), y, loss_func=F.cross_entropy)
            worst.append(((got[-1]-want).abs().mean()/want.mean()).item())
    class Before(Callback):
        order, run_valid = ImportanceCB.order-1, False
        def before_batch(self): self.whole = self.x, self.y
    before, got = Before(), []
    learn, cb = make_learner(), ImportanceCB(keep=.3, gate=None, seat='batch', score='loss', on_select=lambda learn, i, w, s: got.append(s))
    with torch.autocast('cpu', enabled=False): quiet_fit(learn, 6, [before, cb, Check()])
    assert len(worst) == 60 and max(worst) < .03 and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('bad', ('bf16', torch.bfloat16, 2, .5))
def test_bf16_is_checked(bad):
    with pytest.raises(ValueError, match='bf16=.*expected True, False, or None'): ImportanceCB(bf16=bad)

def graphs_of(cb):
    "How many graphs `torch.compile` makes of a network in six epochs, and the batch sizes it is trained on"
    torch._dynamo.reset()
    graphs, sizes, net = [], set(), make_net()
    net.compile(backend=lambda graph, _: graphs.append(1) or graph.forward)
    class Sizes(Callback):
        run_valid = False
        def after_pred(self): sizes.add(len(self.pred))
    set_seed(0)
    quiet_fit(make_learner(make_dls(n=1200), model=net), 6, [Sizes()]+([cb] if cb else []), lr=3e-2)
    return len(graphs), sizes

def test_a_compiled_network_is_compiled_for_one_pass_more():
    "Not anew for each size: PyTorch takes the batch's size as variable once it has seen two"
    plain, (n, sizes), (in_batch, _) = graphs_of(None)[0], graphs_of(ImportanceCB()), graphs_of(ImportanceCB(keep=1/3, seat='batch', gate=None))
    assert len(sizes) > 6 and n <= plain+1 and in_batch <= plain+1

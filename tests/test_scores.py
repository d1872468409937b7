"Scores against autograd; a scoring pass leaves no trace."
from copy import deepcopy
from functools import partial

import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.losses import *
from fastai_is.losses import raw_loss
from fastai_is.scores import *
from test_losses import CASES, rand, ints, two_targets, w3

def slow_bound(lf, pred, *yb):
    "One sample at a time, by autograd on its own prediction; for log-probabilities, on what they are the log-softmax of"
    many, res = isinstance(pred, tuple), []
    behind = (lambda z: z.log_softmax(1)) if isinstance(lf, nn.NLLLoss) else lambda z: z
    for i in range(len(yb[0])):
        leaves = [o[i:i+1].clone().requires_grad_() for o in (pred if many else (pred,))]
        loss = raw_loss(lf, tuple(leaves) if many else behind(leaves[0]), *(y[i:i+1] for y in yb)).sum()
        res.append(torch.cat([o.flatten() for o in torch.autograd.grad(loss, leaves)]).norm())
    return torch.stack(res)

@pytest.mark.parametrize('case', [c for c in CASES if c != 'sum'])
def test_upper_bound(case):
    lf, pred, yb = CASES[case]
    torch.testing.assert_close(upper_bound(pred, *yb, loss_func=lf), slow_bound(lf, pred, *yb), rtol=1e-4, atol=1e-7)

def test_published_form_for_class_weights_and_soft_targets():
    z, y = rand(8, 3), rand(8, 3).softmax(1)
    want = ((w3*y).sum(1, keepdim=True)*z.softmax(1)-w3*y).norm(dim=1)
    torch.testing.assert_close(upper_bound(z, y, loss_func=nn.CrossEntropyLoss(weight=w3)), want)

def test_half_precision_predictions():
    z, y = rand(8, 3), ints(3, 8)
    s = upper_bound(z.bfloat16(), y, loss_func=CrossEntropyLossFlat())
    assert s.dtype == torch.float32
    torch.testing.assert_close(s, upper_bound(z.bfloat16().float(), y, loss_func=CrossEntropyLossFlat()))

def test_it_bounds_the_gradient_up_to_a_constant():
    "For the last layer's own weights the constant is the norm of its input: exact"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = rand(6, 5), ints(3, 6)
    h = model[:2](x)
    s = upper_bound(model(x), y, loss_func=F.cross_entropy)
    for i in range(6):
        gw, gb = torch.autograd.grad(F.cross_entropy(model(x[i:i+1]), y[i:i+1]), model[2].parameters())
        torch.testing.assert_close((gw.square().sum()+gb.square().sum()).sqrt(), s[i]*(h[i].square().sum()+1).sqrt())

def test_named_layer():
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    model, x, y = nn.Sequential(*logits, nn.Sigmoid()), rand(6, 5), ints(2, 18).view(6, 3).float()
    want = upper_bound(logits(x), y, loss_func=nn.BCEWithLogitsLoss())
    res = score_batch(model, upper_bound, nn.BCELoss(), (x,), (y,), layer=model[2])
    torch.testing.assert_close(res.scores, want)
    assert torch.is_grad_enabled() and not model[2]._forward_hooks
    wrong = score_batch(model, upper_bound, nn.BCELoss(), (x,), (y,)).scores
    assert (wrong-want).abs().max() > .01, 'without `layer` the probabilities would be taken for the pre-activations'

@pytest.mark.parametrize('lf,want', ((nn.NLLLoss(weight=w3, ignore_index=1), nn.CrossEntropyLoss(weight=w3, ignore_index=1)), (F.nll_loss, F.cross_entropy)))
def test_log_probabilities_need_no_layer(lf, want):
    z, y = rand(8, 3), ints(3, 8)
    torch.testing.assert_close(upper_bound(z.log_softmax(1), y, loss_func=lf), upper_bound(z, y, loss_func=want))
    z, y = rand(4, 3, 5, 6), ints(3, 120).view(4, 5, 6)
    torch.testing.assert_close(upper_bound(z.log_softmax(1), y, loss_func=lf), upper_bound(z, y, loss_func=want))

@pytest.mark.parametrize('lf', (nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.L1Loss()))
def test_one_number_for_each_sample(lf):
    pred, y = rand(6), ints(2, 6).float()
    torch.testing.assert_close(upper_bound(pred, y, loss_func=lf), slow_bound(lf, pred, y))

def test_a_score_without_loss_func_is_refused():
    with pytest.raises(TypeError, match='takes no `loss_func`'): get_score(lambda pred, y: pred.sum(1))
    for f in (lambda pred, y, loss_func: 0, lambda pred, y, **kw: 0): assert get_score(f) is f

def test_context_is_given_to_those_who_declare_it():
    seen = {}
    def mine(pred, y, loss_func, xb, model, hidden):
        seen.update(xb=xb, model=model, hidden=hidden)
        return hidden.norm(dim=1)
    model, x, y = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), rand(6, 5), ints(3, 6)
    res = score_batch(model, mine, F.cross_entropy, (x,), (y,))
    torch.testing.assert_close(res.scores, model[:2](x).norm(dim=1).detach())
    assert seen['model'] is model and seen['xb'][0] is x and not seen['hidden'].requires_grad

class Noisy(nn.Module):
    "Everything that could leave a trace: BatchNorm, dropout, two inputs, a dictionary, random numbers even in evaluation, a frozen part"
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop, self.b = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(.5), nn.Linear(7, 3)
        self.frozen = nn.BatchNorm1d(7).eval()
    def forward(self, x, extra): return self.b(self.drop(self.frozen(self.bn(self.a(x+extra['shift'])))) + torch.randn(1))

@pytest.mark.parametrize('training', (False, True))
@pytest.mark.parametrize('fail', (False, True))
def test_no_trace(training, fail):
    torch.manual_seed(0)
    model, xb, yb = Noisy(), (rand(6, 5), dict(shift=rand(6, 5))), (ints(3, 6),)
    before, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    def score(pred, y, loss_func):
        if fail: raise RuntimeError('planted')
        return loss_score(pred, y, loss_func=loss_func)
    if fail:
        with pytest.raises(RuntimeError, match='planted'): score_batch(model, score, F.cross_entropy, xb, yb, training=training)
    else: score_batch(model, score, F.cross_entropy, xb, yb, training=training)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())

def test_wrong_scores():
    y = (ints(3, 6),)
    with pytest.raises(ValueError, match=r'expected \(6,\)'): apply_score(lambda p, y, loss_func: p, rand(6, 3), y, F.cross_entropy)
    with pytest.raises(TypeError, match='expected a tensor'): apply_score(lambda p, y, loss_func: 3, rand(6, 3), y, F.cross_entropy)
    with pytest.raises(ValueError, match='no linear or convolutional layer'): last_layer(nn.ReLU())

# The last layer
def net(tail, *more): return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), tail, *more)
def convnet(tail): return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), tail)

LAST = dict(
    classification=(CrossEntropyLossFlat(), net(nn.Linear(7, 3)), rand(6, 5), ints(3, 6)), # fastai's losses work in float32 whatever they are given
    no_bias=(CrossEntropyLossFlat(), net(nn.Linear(7, 3, bias=False)), rand(6, 5), ints(3, 6)),
    class_weights=(nn.CrossEntropyLoss(weight=w3), net(nn.Linear(7, 3)), rand(6, 5), ints(3, 6)),
    smoothing=(LabelSmoothingCrossEntropyFlat(), net(nn.Linear(7, 3)), rand(6, 5), ints(3, 6)),
    smoothing_weights=(nn.CrossEntropyLoss(weight=w3, label_smoothing=.1), net(nn.Linear(7, 3)), rand(6, 5), ints(3, 6)),
    multilabel=(BCEWithLogitsLossFlat(), net(nn.Linear(7, 4)), rand(6, 5), ints(2, 6, 4).float()),
    regression=(MSELossFlat(), net(nn.Linear(7, 1)), rand(6, 5), rand(6)),
    focal=(FocalLossFlat(), net(nn.Linear(7, 3)), rand(6, 5), ints(3, 6)),
    softmax_behind=(nn.NLLLoss(), net(nn.Linear(7, 3), nn.LogSoftmax(-1)), rand(6, 5), ints(3, 6)),
    in_place_behind=(CrossEntropyLossFlat(), net(nn.Linear(7, 3), nn.ReLU(inplace=True)), rand(6, 5), ints(3, 6)),
    few_positions=(CrossEntropyLossFlat(), net(nn.Linear(7, 30)), rand(6, 3, 5), ints(30, 6, 3)),
    many_positions=(CrossEntropyLossFlat(), net(nn.Linear(7, 3, bias=False)), rand(6, 20, 5), ints(3, 6, 20)),
    segmentation=(nn.CrossEntropyLoss(weight=w3), convnet(nn.Conv2d(4, 3, 1)), rand(4, 2, 5, 6), ints(3, 4, 5, 6)),
    wide_no_bias=(CrossEntropyLossFlat(axis=1), convnet(nn.Conv2d(4, 3, 3, padding=1, padding_mode='reflect', bias=False)), rand(4, 2, 5, 6), ints(3, 4, 5, 6)),
    groups=(nn.MSELoss(), convnet(nn.Conv2d(4, 6, 3, stride=2, groups=2)), rand(4, 2, 7, 7), rand(4, 6, 3, 3)),
    transposed=(nn.MSELoss(), convnet(nn.ConvTranspose2d(4, 3, 2, stride=2)), rand(4, 2, 3, 3), rand(4, 3, 6, 6)),
    one_dimension=(nn.MSELoss(), nn.Sequential(nn.Conv1d(2, 3, 3)), rand(4, 2, 8), rand(4, 3, 6)),
    one_sample=(CrossEntropyLossFlat(), net(nn.Linear(7, 3)), rand(1, 5), ints(3, 1)))

def slow_last(lf, model, x, y, layer):
    "One sample at a time, by autograd on the layer's parameters"
    res = []
    for i in range(len(x)):
        gs = torch.autograd.grad(raw_loss(lf, model(x[i:i+1]), y[i:i+1]).sum(), list(layer.parameters()))
        res.append(torch.cat([g.flatten() for g in gs]).norm())
    return torch.stack(res)

def cast(lf, dtype):
    "Class weights of another precision"
    lf = deepcopy(lf)
    (lf if isinstance(lf, nn.Module) else lf.func).to(dtype)
    return lf

@pytest.mark.parametrize('dtype,eps', ((torch.float64, 1e-6), (torch.float32, 1e-4)))
@pytest.mark.parametrize('case', LAST)
def test_last_layer(case, dtype, eps):
    lf, model, x, y = LAST[case]
    lf, model, x, y = cast(lf, dtype), deepcopy(model).to(dtype), x.to(dtype), y.to(dtype) if y.is_floating_point() else y
    with LayerTap(last_layer(model)) as tap: pred = model(x)
    got = last_layer_norm(pred, y, loss_func=lf, layer=tap.layer, hidden=tap.hidden, preact=tap.preact)
    assert got.dtype == dtype
    want = slow_last(lf, model, x, y, tap.layer)
    torch.testing.assert_close(got, want, rtol=eps, atol=eps*want.max().item())
    if dtype == torch.float32: # predictions are scored as such
        scored = score_batch(model, get_score('last_layer'), lf, (x,), (y,)).scores
        torch.testing.assert_close(scored, want, rtol=1e-4, atol=1e-4*want.max().item())
    assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())

def test_closed_form_only_where_the_prediction_is_the_layers_output(monkeypatch):
    import fastai_is.scores as mod
    calls, real = [], mod._closed_grad
    monkeypatch.setattr(mod, '_closed_grad', lambda *args: calls.append(1) or real(*args))
    for case, n in dict(classification=1, segmentation=1, softmax_behind=0, in_place_behind=0).items():
        lf, model, x, y = LAST[case]
        calls.clear()
        score_batch(model, last_layer_norm, lf, (x,), (y,))
        assert len(calls) == n, case

def test_last_layer_that_is_named():
    lf, model, x, y = LAST['classification']
    torch.testing.assert_close(score_batch(model, last_layer_norm, lf, (x,), (y,), layer=model[0]).scores, slow_last(lf, model, x, y, model[0]))

def test_last_layer_leaves_other_hooks_alone():
    lf, model, x, y = LAST['segmentation']
    model, calls = deepcopy(model), []
    model[2].register_forward_hook(lambda *args: calls.append(1))
    score_batch(model, last_layer_norm, lf, (x,), (y,))
    assert len(calls) == 1, 'the one forward pass'

def test_last_layer_in_mixed_precision():
    lf, model, x, y = LAST['classification']
    got = score_batch(model, last_layer_norm, lf, (x,), (y,), autocast=torch.autocast('cpu', torch.bfloat16)).scores
    torch.testing.assert_close(got, slow_last(lf, model, x, y, model[2]), rtol=.03, atol=0)

def test_last_layer_without_a_part_in_the_loss():
    class Skips(nn.Module):
        def __init__(self, use): super().__init__(); self.a, self.b, self.use = nn.Linear(5, 3), nn.Linear(5, 3), use
        def forward(self, x): return self.a(x)+(self.b(x).detach() if self.use else 0)
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(5, 3)
        def forward(self, x): return self.a(x.flatten(0, 1)).view(6, 4, 3)
    for model, x, y in ((Skips(True), rand(6, 5), ints(3, 6)), (Skips(False), rand(6, 5), ints(3, 6)), (Flat(), rand(6, 4, 5), ints(3, 6, 4))):
        with pytest.raises(ValueError, match='name the layer to look at with `layer=`'): score_batch(model, last_layer_norm, CrossEntropyLossFlat(), (x,), (y,))

# In 16 bits
@pytest.mark.parametrize('can,want', ((dict(avx512_bf16=True), True), (dict(avx512_bf16=False, amx_bf16=True), True), (dict(avx512_bf16=False, amx_bf16=False), False), ({}, False)))
def test_bfloat16_is_fast_where_the_processor_has_it(can, want, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: can, raising=False)
    assert fast_bf16('cpu') is want and fast_bf16(torch.device('cpu')) is want
    assert not fast_bf16('mps') and not fast_bf16('meta')

def test_bfloat16_is_not_assumed_where_the_processor_cannot_be_asked(monkeypatch):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    assert not fast_bf16('cpu')

@pytest.mark.parametrize('major,hip,want', ((7, None, False), (8, None, True), (9, None, True), (9, '6.0', False)))
def test_bfloat16_is_fast_on_gpus_that_have_it(major, hip, want, monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (major, 0))
    assert fast_bf16('cuda') is want and fast_bf16('cuda:1') is want

def test_what_a_model_keeps_of_a_scoring_pass_can_be_trained_with():
    class Keeps(nn.Module):
        "Makes a tensor in its first pass, whichever that is"
        def __init__(self): super().__init__(); self.net,self.mask = nn.Linear(4, 3),None
        def forward(self, x):
            z = self.net(x)
            if self.mask is None: self.mask = torch.full_like(z, 2.)
            return z*self.mask
    x, y, lf = torch.randn(5, 4), torch.randint(3, (5,)), nn.CrossEntropyLoss()
    model = Keeps()
    score_batch(model, upper_bound, lf, (x,), (y,))
    lf(model(x), y).backward()
    assert model.net.weight.grad.abs().sum()>0
    model = Keeps()
    with torch.inference_mode(): score_batch(model, upper_bound, lf, (x,), (y,))
    with pytest.raises(RuntimeError, match='[Ii]nference'): lf(model(x), y).backward() # the test would notice

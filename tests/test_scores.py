"Scores against autograd; a scoring pass leaves no trace."
from functools import partial

import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.losses import *
from fastai_is.losses import raw_loss
from fastai_is.scores import *
from test_losses import CASES, rand, ints, two_targets, w3

def slow_bound(lf, pred, *yb):
    "One sample at a time, by autograd on its own prediction"
    many, res = isinstance(pred, tuple), []
    for i in range(len(yb[0])):
        leaves = [o[i:i+1].clone().requires_grad_() for o in (pred if many else (pred,))]
        loss = raw_loss(lf, tuple(leaves) if many else leaves[0], *(y[i:i+1] for y in yb)).sum()
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
    model, x, y = nn.Sequential(*logits, nn.LogSoftmax(1)), rand(6, 5), ints(3, 6)
    want = upper_bound(logits(x), y, loss_func=F.cross_entropy)
    res = score_batch(model, upper_bound, nn.NLLLoss(), (x,), (y,), layer=model[2])
    torch.testing.assert_close(res.scores, want)
    assert torch.is_grad_enabled() and not model[2]._forward_hooks
    wrong = score_batch(model, upper_bound, nn.NLLLoss(), (x,), (y,)).scores
    assert (wrong-want).abs().max() > .01, 'without `layer` the log-probabilities would be taken for the pre-activations'

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

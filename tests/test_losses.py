"Per-sample losses against a plain loop over batches of one, and against what the loss function itself returns."
from functools import partial

import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.losses import *
from fastai.callback.mixup import CutMix, MixUp
from fastai_is.losses import *

g = torch.Generator().manual_seed(0)
def rand(*shape): return torch.randn(*shape, generator=g)
def ints(n, *shape): return torch.randint(n, shape, generator=g)
w3 = torch.tensor([1., 2., 7.])
seg = ints(3, 4, 5, 6)
seg_ignored = seg.clone(); seg_ignored[0, :3] = -100; seg_ignored[2] = -100
tok = ints(3, 4, 9); tok[1, 4:] = -100

def two_targets(pred, a, b, reduction='mean'):
    return F.mse_loss(pred[0], a, reduction=reduction) + F.cross_entropy(pred[1], b, reduction=reduction) if reduction != 'none' else \
        F.mse_loss(pred[0], a, reduction='none').mean(1) + F.cross_entropy(pred[1], b, reduction='none')

# loss, prediction, targets
CASES = dict(
    classification=(CrossEntropyLossFlat(), rand(8, 3), (ints(3, 8),)),
    class_weights=(CrossEntropyLossFlat(weight=w3), rand(8, 3), (ints(3, 8),)),
    module_weights=(nn.CrossEntropyLoss(weight=w3), rand(8, 3), (ints(3, 8),)),
    soft_targets=(nn.CrossEntropyLoss(weight=w3), rand(8, 3), (rand(8, 3).softmax(1),)),
    smoothing=(LabelSmoothingCrossEntropyFlat(), rand(8, 3), (ints(3, 8),)),
    smoothing_weights=(LabelSmoothingCrossEntropyFlat(weight=w3), rand(8, 3), (ints(3, 8),)),
    smoothing_torch=(nn.CrossEntropyLoss(weight=w3, label_smoothing=.1), rand(8, 3), (ints(3, 8),)),
    focal=(FocalLossFlat(weight=w3), rand(8, 3), (ints(3, 8),)),
    nll=(nn.NLLLoss(weight=w3), rand(8, 3).log_softmax(1), (ints(3, 8),)),
    function=(F.cross_entropy, rand(8, 3), (ints(3, 8),)),
    partial=(partial(F.cross_entropy, weight=w3, label_smoothing=.2), rand(8, 3), (ints(3, 8),)),
    sum=(nn.CrossEntropyLoss(reduction='sum'), rand(8, 3), (ints(3, 8),)),
    segmentation=(CrossEntropyLossFlat(axis=1), rand(4, 3, 5, 6), (seg,)),
    segmentation_ignored=(CrossEntropyLossFlat(axis=1, weight=w3), rand(4, 3, 5, 6), (seg_ignored,)),
    sequence=(CrossEntropyLossFlat(), rand(4, 9, 3), (tok,)),
    dice=(DiceLoss(), rand(4, 3, 5, 6), (seg,)),
    multilabel=(BCEWithLogitsLossFlat(), rand(8, 4), (ints(2, 8, 4).float(),)),
    multilabel_pos=(BCEWithLogitsLossFlat(pos_weight=torch.tensor([1., 2, 3, 4])), rand(8, 4), (ints(2, 8, 4).float(),)),
    mse=(MSELossFlat(), rand(8, 1), (rand(8),)),
    l1=(L1LossFlat(), rand(8, 2), (rand(8, 2),)),
    huber=(nn.HuberLoss(), rand(8, 2), (rand(8, 2),)),
    smooth_l1=(F.smooth_l1_loss, rand(8, 2), (rand(8, 2),)),
    several=(two_targets, (rand(8, 2), rand(8, 3)), (rand(8, 2), ints(3, 8))),
    one_sample=(CrossEntropyLossFlat(weight=w3), rand(1, 3), (ints(3, 1),)),
    one_sample_segmentation=(CrossEntropyLossFlat(axis=1), rand(1, 3, 5, 6), (seg[:1],)),
)

def leaf(pred): return tuple(o.clone().requires_grad_() for o in pred) if isinstance(pred, tuple) else pred.clone().requires_grad_()
def grads(loss, pred): return torch.autograd.grad(loss, pred if isinstance(pred, tuple) else (pred,))

@pytest.mark.parametrize('case', CASES)
def test_mean_and_its_gradient(case):
    lf, pred, yb = CASES[case]
    a, b = leaf(pred), leaf(pred)
    mine, theirs = per_sample_loss(lf, a, *yb), lf(b, *yb)
    assert mine.shape == (len(yb[0]),)
    torch.testing.assert_close(mine.mean(), torch.as_tensor(theirs).as_subclass(torch.Tensor))
    for x, y in zip(grads(mine.mean(), a), grads(theirs, b)): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('case', CASES)
def test_raw_loss_depends_on_its_own_sample_only(case):
    lf, pred, yb = CASES[case]
    whole = raw_loss(lf, pred, *yb)
    row = lambda o, i: tuple(t[i:i+1] for t in o) if isinstance(o, tuple) else o[i:i+1]
    alone = torch.cat([raw_loss(lf, row(pred, i), *(y[i:i+1] for y in yb)) for i in range(len(yb[0]))])
    torch.testing.assert_close(whole, alone)
    if hasattr(lf, 'reduction'): assert lf.reduction in ('mean', 'sum')

def test_naive_mean_differs_where_the_normaliser_matters():
    for case in ('class_weights', 'segmentation_ignored', 'sequence'):
        lf, pred, yb = CASES[case]
        assert abs(raw_loss(lf, pred, *yb).mean()-lf(pred, *yb)) > .05, case

def test_parts_of_a_batch_add_up():
    "With the whole batch's normaliser, the mean over all possible choices of 3 of 8 samples is the whole batch's loss"
    lf, pred, yb = CASES['class_weights']
    raw, whole = raw_loss(lf, pred, *yb), lf(pred, *yb)
    choices = torch.combinations(torch.arange(8), 3)
    torch.testing.assert_close((raw*loss_scale(whole, raw))[choices].mean(), whole.as_subclass(torch.Tensor))
    naive = torch.stack([lf(pred[c], yb[0][c]) for c in choices]).mean()
    assert abs(naive-whole) > 1e-3, 'a case where the subset\'s own normaliser would do as well shows nothing'

@pytest.mark.parametrize('mix', (MixUp, CutMix))
@pytest.mark.parametrize('case', ('classification', 'class_weights', 'smoothing', 'function'))
def test_through_mixup(mix, case):
    lf, pred, yb = CASES[case]
    cb = mix()
    cb.learn, cb.old_lf = type('Stub', (), dict(training=True))(), lf
    cb.lam, cb.yb1 = torch.rand(8, generator=g), (yb[0].flip(0),)
    wrapped = cb.lf
    loss = per_sample_loss(wrapped, pred, *yb)
    torch.testing.assert_close(loss.mean(), wrapped(pred, *yb).as_subclass(torch.Tensor))
    lerped = torch.lerp(raw_loss(lf, pred, *cb.yb1), raw_loss(lf, pred, *yb), cb.lam)
    torch.testing.assert_close(raw_loss(wrapped, pred, *yb), lerped)
    assert cb.old_lf is lf and user_loss(wrapped) is lf

def test_no_per_sample_form():
    with pytest.raises(TypeError, match='reduction'): check_loss(lambda p, t: (p-t).mean())
    with pytest.raises(TypeError, match='reduction'): per_sample_loss(lambda p, t: (p-t).mean(), rand(3), rand(3))
    class Reduced(nn.Module):
        reduction = 'mean'
        def forward(self, p, t): return (p-t).abs().mean()
    with pytest.raises(TypeError, match='expected a multiple of 3'): raw_loss(Reduced(), rand(3), rand(3))
    class Bare(nn.Module):
        def forward(self, p, t): return (p-t).abs().mean()
    with pytest.raises(TypeError, match='reduction'): check_loss(Bare())
    with pytest.raises(TypeError, match='reduction'): check_loss(BaseLoss(Bare))

def test_reduction_is_put_back_after_an_error():
    lf = CrossEntropyLossFlat()
    with pytest.raises(Exception): raw_loss(lf, rand(3, 2), torch.tensor([0, 1, 5]))
    assert lf.reduction == 'mean'

def test_broken_and_zero_losses():
    lf = MSELossFlat()
    x = rand(4, 1)
    assert (per_sample_loss(lf, x, x[:, 0].clone()) == 0).all()
    bad = x.clone(); bad[1] = float('nan')
    loss = per_sample_loss(lf, bad, rand(4))
    assert loss[1].isnan() and loss[[0, 2, 3]].isfinite().all()

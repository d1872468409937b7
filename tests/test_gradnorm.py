"Gradient norms against a plain loop over batches of one; nothing is left behind."
import warnings
from functools import partial

import pytest, torch, torch.nn.functional as F
from torch import nn
import fastai.callback.progress
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.layers import ConvLayer, Embedding
from fastai.learner import Learner
from fastai.losses import *
from fastai_is.gradnorm import *
from fastai_is.scores import apply_score, get_score, score_batch, score_context
from torchvision.models import resnet18

def tup(o): return o if isinstance(o, tuple) else (o,)
def row(o, i): return tuple(t[i:i+1] for t in tup(o))

def loop(model, lf, xb, yb):
    "The whole truth: one sample at a time, as `lf` has it"
    res, ps = [], [p for p in model.parameters() if p.requires_grad]
    for i in range(len(tup(yb)[0])):
        gs = torch.autograd.grad(lf(model(*row(xb, i)), *row(yb, i)), ps, allow_unused=True)
        res.append(torch.cat([g.flatten() for g in gs if g is not None]).norm())
    return torch.stack(res)

def same(model, lf, xb, yb, quiet=True, dtypes=(torch.float64, torch.float32)):
    "Within 1e-6 in float64 and 1e-4 in float32; `quiet` if no fallback for the whole model is expected"
    for dtype, tol in zip(dtypes, (1e-6, 1e-4)):
        cast = lambda o: tuple(t.to(dtype) if t.is_floating_point() else t for t in tup(o))
        model.to(dtype)
        want = loop(model, lf, cast(xb), cast(yb))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            got = grad_norms(model, lf, cast(xb), cast(yb))
        torch.testing.assert_close(got, want, rtol=tol, atol=0)
        assert got.dtype == dtype and not got.requires_grad
        assert all(isinstance(p, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(p) for p in model.parameters())
        said = [str(w.message) for w in seen if 'gradient norms' in str(w.message)]
        assert bool(said) != quiet, said
    return said

def convnet():
    return nn.Sequential(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 10))

def stats(model):
    "Running statistics and affine parameters that are not the trivial ones"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            for t in (m.running_mean, m.weight, m.bias):
                if t is not None: t.data.uniform_(.5, 1.5)
            if m.running_var is not None: m.running_var.uniform_(.5, 1.5)
    return model.eval()

class RNNClassifier(nn.Module):
    def __init__(self, rnn=nn.LSTM, state=False, batch_first=True, **kw):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(11, 5, padding_idx=0), rnn(5, 6, batch_first=batch_first, **kw)
        self.state, self.axis = state, int(batch_first)
        self.head = nn.Linear(6*(1+bool(kw.get('bidirectional'))), 3)
    def forward(self, x):
        out, h = self.rnn(self.emb(x if self.axis else x.t()))
        if self.state: return self.head((h[0] if isinstance(h, tuple) else h)[-1])
        return self.head(out.select(self.axis, -1))

class Seg(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.mid, self.up, self.out = ConvLayer(3, 6, stride=2), ConvLayer(6, 6), nn.ConvTranspose2d(6, 6, 2, stride=2), nn.Conv2d(9, 4, 1)
    def forward(self, x): return self.out(torch.cat([F.relu(self.up(self.mid(self.down(x)))), x], 1))

class EmbClassifier(nn.Module):
    def __init__(self, emb=nn.Embedding):
        super().__init__()
        self.emb, self.head = emb(13, 6), nn.Linear(6, 3)
    def forward(self, x): return self.head(self.emb(x).mean(1).tanh())

def xf(*shape): return torch.randn(*shape)
def ints(n, *shape): return torch.randint(n, shape)
def ce(red): return CrossEntropyLossFlat(reduction=red)

torch.manual_seed(0)
MODELS = dict(
    convnet=(convnet(), xf(6, 1, 28, 28), ints(10, 6), ce),
    mlp=(nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4, bias=False)), xf(6, 7), ints(4, 6), ce),
    resnet=(stats(resnet18(num_classes=5)), xf(3, 3, 32, 32), ints(5, 3), ce),
    lstm=(RNNClassifier(), ints(11, 5, 7), ints(3, 5), ce),
    lstm_deep=(RNNClassifier(bidirectional=True, num_layers=2), ints(11, 5, 7), ints(3, 5), ce),
    lstm_state=(RNNClassifier(state=True, num_layers=2), ints(11, 5, 7), ints(3, 5), ce),
    lstm_time_first=(RNNClassifier(batch_first=False), ints(11, 5, 5), ints(3, 5), ce),
    rnn=(RNNClassifier(nn.RNN, state=True), ints(11, 5, 7), ints(3, 5), ce),
    gru=(RNNClassifier(nn.GRU, state=True), ints(11, 5, 7), ints(3, 5), ce),
    embedding=(EmbClassifier(), ints(4, 6, 9), ints(3, 6), ce),
    embedding_fastai=(EmbClassifier(Embedding), ints(13, 6, 9), ints(3, 6), ce),
    embedding_freq=(EmbClassifier(partial(nn.Embedding, scale_grad_by_freq=True)), ints(4, 6, 9), ints(3, 6), ce),
    segmentation=(stats(Seg()), xf(4, 3, 8, 8), ints(4, 4, 8, 8), lambda red: CrossEntropyLossFlat(axis=1, reduction=red)),
    regression=(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), xf(6, 4), xf(6, 3), lambda red: MSELossFlat(reduction=red)),
    function=(nn.Linear(4, 3), xf(6, 4), xf(6, 3), lambda red: partial(F.mse_loss, reduction=red)),
    module=(nn.Linear(4, 3), xf(6, 4), ints(3, 6), lambda red: nn.CrossEntropyLoss(reduction=red)),
)

@pytest.mark.parametrize('red', ['mean', 'sum'])
@pytest.mark.parametrize('case', MODELS)
def test_agrees_with_the_loop(case, red):
    model, x, y, lf = MODELS[case]
    same(model, lf(red), x, y)

@pytest.mark.parametrize('case', MODELS)
def test_one_sample(case):
    model, x, y, lf = MODELS[case]
    for n in (1, 2): same(model, lf('mean'), x[:n], y[:n])

@pytest.mark.parametrize('case', ['convnet', 'resnet', 'lstm', 'segmentation', 'mlp', 'embedding'])
def test_frozen(case):
    model, x, y, lf = MODELS[case]
    ps = list(model.parameters())
    try:
        for start in (0, 1):
            for i, p in enumerate(ps): p.requires_grad_(i % 2 == start)
            same(model, lf('mean'), x, y, dtypes=[torch.float64])
        for p in ps[:-1]: p.requires_grad_(False)
        ps[-1].requires_grad_(True)
        same(model, lf('mean'), x, y, dtypes=[torch.float64])
        ps[-1].requires_grad_(False)
        assert (grad_norms(model.float(), lf('mean'), x, y) == 0).all()
    finally:
        for p in ps: p.requires_grad_(True)

# Convolutions
CONVS = dict(
    grouped=(nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 7, 9)), depthwise=(nn.Conv2d(4, 8, 3, groups=4), (4, 7, 9)),
    strided=(nn.Conv2d(2, 3, 3, stride=2), (2, 8, 9)), wide_stride=(nn.Conv2d(2, 3, 1, stride=3), (2, 8, 9)),
    dilated=(nn.Conv2d(2, 3, 3, dilation=2, padding=(2, 1)), (2, 8, 9)), all=(nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 2), (2, 1), 2, False), (4, 9, 11)),
    same=(nn.Conv2d(2, 3, 4, padding='same', dilation=(1, 3)), (2, 8, 9)), valid=(nn.Conv2d(2, 3, 3, padding='valid'), (2, 8, 9)),
    circular=(nn.Conv2d(2, 3, 3, padding=1, padding_mode='circular'), (2, 6, 5)),
    reflect=(nn.Conv2d(2, 3, 3, padding=1, padding_mode='reflect'), (2, 6, 5)),
    one=(nn.Conv1d(4, 6, 5, stride=2, padding=2, groups=2), (4, 17)),
    three=(nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=1, groups=2), (2, 4, 5, 6)),
    gram=(nn.Conv2d(40, 50, 3), (40, 4, 4)), direct=(nn.Conv2d(1, 2, 3), (1, 12, 12)),
    transposed=(nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (2, 4, 5)), transposed_1d=(nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 7)),
)
@pytest.mark.parametrize('budget', [1, 2**22])
@pytest.mark.parametrize('case', CONVS)
def test_convolutions(case, budget, monkeypatch):
    monkeypatch.setattr('fastai_is.gradnorm._budget', budget)
    conv, shape = CONVS[case]
    x = xf(5, *shape)
    same(nn.Sequential(conv, nn.Tanh()), MSELossFlat(), x, torch.randn_like(conv.float()(x)))

# Normalisation
NORMS = dict(batch1=nn.BatchNorm1d(4), batch2=nn.BatchNorm2d(4), batch3=nn.BatchNorm3d(4), instance=nn.InstanceNorm2d(4, affine=True),
    instance_stats=nn.InstanceNorm2d(4, affine=True, track_running_stats=True), group=nn.GroupNorm(2, 4), layer=nn.LayerNorm((6, 5)),
    layer_no_bias=nn.LayerNorm(5, bias=False), rms=nn.RMSNorm(5), plain=nn.LayerNorm(5, elementwise_affine=False))
@pytest.mark.parametrize('case', NORMS)
def test_normalisation(case):
    shape = {'batch1': (4, 6), 'batch3': (4, 2, 3, 4)}.get(case, (4, 6, 5))
    conv = {'batch1': nn.Conv1d, 'batch3': nn.Conv3d}.get(case, nn.Conv2d)(4, 4, 1)
    same(stats(nn.Sequential(conv, NORMS[case])), MSELossFlat(), xf(5, *shape), xf(5, *shape))

def test_instance_norm_in_training_mode():
    m = nn.Sequential(nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)).double()
    x, y = xf(5, 2, 4, 4).double(), xf(5, 4, 4, 4).double()
    old = [b.clone() for b in m.buffers()]
    got = grad_norms(m, MSELossFlat(), x, y)
    for b, o in zip(m.buffers(), old): assert torch.equal(b, o)
    torch.testing.assert_close(got, loop(m, MSELossFlat(), x, y), rtol=1e-6, atol=0)

# Other layers
class Attention(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.att, self.head, self.axis = nn.MultiheadAttention(6, 2, **kw), nn.Linear(6, 3), int(kw.get('batch_first', False))
    def forward(self, x):
        x = x if self.axis else x.transpose(0, 1)
        return self.head(self.att(x, x, x)[0].mean(self.axis))

def encoder(**kw): return nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **kw), nn.Flatten(), nn.Linear(30, 3))

class Scale(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.rand(6))
    def forward(self, x): return x*self.w

class SharedInside(nn.Module):
    "A layer with parameters of its own, in which one module has two names and a parameter two owners"
    def __init__(self):
        super().__init__()
        self.w, self.a, self.c = nn.Parameter(torch.rand(6)), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b, self.c.weight = self.a, self.a.weight
    def forward(self, x): return self.c(self.b(self.a(x*self.w).tanh()).tanh())

OTHERS = dict(prelu=nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 3)), scale=nn.Sequential(nn.Linear(6, 6), Scale(), nn.Linear(6, 3)),
    first=nn.Sequential(Scale(), nn.Linear(6, 3)), shared_inside=nn.Sequential(nn.Linear(6, 6), SharedInside()),
    weight_norm=nn.Sequential(nn.Linear(6, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))))
@pytest.mark.parametrize('case', OTHERS)
def test_layers_without_a_rule(case): same(OTHERS[case], ce('mean'), xf(5, 6), ints(3, 5))

def test_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = nn.Sequential(nn.Linear(6, 4), nn.utils.weight_norm(nn.Linear(4, 3)))
    same(m, ce('mean'), xf(5, 6), ints(3, 5), dtypes=[torch.float64])

@pytest.mark.parametrize('model', [Attention(batch_first=True), Attention(), encoder().eval(), encoder(dropout=0.)], ids=range(4))
def test_attention(model): same(model, ce('mean'), xf(5, 5, 6), ints(3, 5))

def test_a_subclass_is_not_taken_for_its_parent():
    class Doubled(nn.Linear):
        def forward(self, x): return 2*super().forward(x)
    same(nn.Sequential(Doubled(4, 5), nn.Linear(5, 3)), ce('mean'), xf(5, 4), ints(3, 5))

def test_linear_over_positions():
    for t in (2, 40): same(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Flatten()), MSELossFlat(), xf(5, t, 2, 4), xf(5, t*6))

def test_inplace():
    class Res(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        def forward(self, x): return self.b(F.relu_(self.a(x))).add_(x).mul_(2)
    same(nn.Sequential(nn.Linear(6, 6), nn.ReLU(True), Res(), nn.ReLU(True), nn.Linear(6, 3)), ce('mean'), xf(5, 6), ints(3, 5))
    same(stats(nn.Sequential(ConvLayer(1, 4), ConvLayer(4, 4), nn.Flatten(), nn.Linear(100, 3))), ce('mean'), xf(5, 1, 5, 5), ints(3, 5))

# Weights used in several ways
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.dec = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.dec.weight = self.emb.weight
    def forward(self, x): return self.dec(self.lin(self.lin(self.emb(x)).tanh())).mean(1)

class Functional(nn.Module):
    def __init__(self): super().__init__(); self.emb, self.lin = nn.Embedding(9, 6), nn.Linear(6, 6)
    def forward(self, x): return F.linear(self.lin(self.emb(x)), self.emb.weight).mean(1)

class Positions(nn.Module):
    def __init__(self, n): super().__init__(); self.pos, self.lin, self.n = nn.Embedding(n, 6), nn.Linear(6, 3), n
    def forward(self, x): return self.lin((x+self.pos(torch.arange(self.n))).tanh()).mean(1)

class Merged(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
    def forward(self, x): return self.b(self.a(x.reshape(-1, 6)).tanh()).view(x.shape[0], -1, 3).mean(1)

class ClassToken(nn.Module):
    def __init__(self): super().__init__(); self.cls, self.body = nn.Parameter(torch.rand(1, 1, 6)), Attention(batch_first=True)
    def forward(self, x): return self.body(torch.cat([self.cls.expand(len(x), -1, -1), x], 1))

class TwoOutputs(nn.Module):
    "Both outputs matter, and one is made from the other"
    class Part(nn.Module):
        def __init__(self): super().__init__(); self.w, self.lin = nn.Parameter(torch.rand(6)), nn.Linear(6, 3)
        def forward(self, x):
            h = x*self.w
            return h, self.lin(h)
    def __init__(self): super().__init__(); self.part, self.a = self.Part(), nn.Linear(6, 3)
    def forward(self, x):
        h, o = self.part(x)
        return o+self.a(h)

class Inside(nn.Module):
    "Part of a module with parameters of its own, and called directly too"
    def __init__(self): super().__init__(); self.part = TwoOutputs.Part(); self.lin = self.part.lin
    def forward(self, x): return self.part(x)[1]+self.lin(x)

class Looks(nn.Module):
    "Control flow on the data: beyond `torch.func`"
    def __init__(self): super().__init__(); self.w, self.lin = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)
    def forward(self, x): return self.lin(x*self.w if len(x) > 1 or x.sum().item() > 0 else self.w*x)

def test_tied_and_shared(): same(Tied(), ce('mean'), ints(9, 5, 4), ints(9, 5))

def test_tied_in_parts(monkeypatch):
    monkeypatch.setattr('fastai_is.gradnorm._func_budget', 300)
    same(Tied(), ce('mean'), ints(9, 5, 4), ints(9, 5))

@pytest.mark.parametrize('model,x,why', [(Functional(), ints(9, 5, 4), 'outside'),
    (Positions(5), xf(5, 5, 6), 'common'), (Positions(4), xf(5, 4, 6), 'common'),
    (Merged(), xf(5, 4, 6), 'merged'), (ClassToken(), xf(5, 4, 6), 'of its own'), (TwoOutputs(), xf(5, 6), 'several'),
    (Inside(), xf(5, 6), 'inside and'),
    (Looks(), xf(5, 6), 'sample by sample')], ids=lambda o: type(o).__name__ if isinstance(o, nn.Module) else '')
def test_falls_back_and_says_so(model, x, why):
    said, = same(model, ce('mean'), x, ints(3, 5), quiet=False)
    assert why in said

def test_packed_sequences():
    class Packed(RNNClassifier):
        def forward(self, x):
            n = (x != 0).sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(self.emb(x), n, batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][0][-1])
    x = ints(10, 5, 7)+1
    x[0, 3:], x[2, 5:] = 0, 0
    same(Packed(), ce('mean'), x, ints(3, 5), quiet=False)

# Inputs, targets, losses
def test_several_inputs_and_targets():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Embedding(5, 4), nn.Linear(3, 4), nn.Linear(8, 3)
        def forward(self, cat, cont): return self.c(torch.cat([self.a(cat), self.b(cont)], 1)), self.b(cont)
    def lf(pred, a, b, reduction='mean'):
        x, y = F.cross_entropy(pred[0], a, reduction='none'), F.mse_loss(pred[1], b, reduction='none').mean(1)
        return x+y if reduction == 'none' else (x+y).mean()
    same(Two(), lf, (ints(5, 6), xf(6, 3)), (ints(3, 6), xf(6, 4)))

def test_class_weights_are_not_normalised_away():
    m, x, y = nn.Linear(4, 3).double(), xf(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    w = torch.tensor([1., 2., 7.]).double()
    want = loop(m, lambda p, y: F.cross_entropy(p, y, weight=w, reduction='none').mean(), x, y)
    torch.testing.assert_close(grad_norms(m, nn.CrossEntropyLoss(weight=w), x, y), want, rtol=1e-6, atol=0)

def test_ignored_targets():
    m, x, y = stats(Seg()).double(), xf(4, 3, 8, 8).double(), ints(4, 4, 8, 8)
    y[0, :5], y[1] = -100, -100
    def none(p, y): return F.cross_entropy(p, y, reduction='none').mean()
    got = grad_norms(m, CrossEntropyLossFlat(axis=1), x, y)
    torch.testing.assert_close(got, loop(m, none, x, y), rtol=1e-6, atol=0)
    assert got[1] == 0

def test_a_loss_without_a_per_sample_form():
    with pytest.raises(TypeError, match='reduction'): grad_norms(nn.Linear(4, 3), lambda p, y: p.sum(), xf(5, 4), ints(3, 5))

def test_tensors_of_fastai():
    from fastai.torch_core import TensorCategory, TensorImage
    m, x, y = convnet(), xf(4, 1, 28, 28), ints(10, 4)
    for n in (1, 4):
        got = grad_norms(m, ce('mean'), TensorImage(x[:n]), TensorCategory(y[:n]))
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, loop(m, ce('mean'), x[:n], y[:n]), rtol=1e-4, atol=0)

def test_half_precision():
    m, x, y = convnet(), xf(4, 1, 28, 28), ints(10, 4)
    with torch.autocast('cpu', torch.bfloat16): got = grad_norms(m, ce('mean'), x, y)
    torch.testing.assert_close(got, loop(m, ce('mean'), x, y), rtol=.1, atol=0)

# BatchNorm
def test_batchnorm_in_training_mode_raises():
    m = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"whole batch.*model\.eval\(\)"): grad_norms(m, ce('mean'), xf(5, 4), ints(3, 5))
    m[1].requires_grad_(False)
    with pytest.raises(ValueError, match='batch'): grad_norms(m, ce('mean'), xf(5, 4), ints(3, 5))
    m = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match='running statistics'): grad_norms(m, ce('mean'), xf(5, 4), ints(3, 5))

# No trace
def state(m):
    return ({k: v.clone() for k, v in m.state_dict().items()}, [x.training for x in m.modules()], [p.grad for p in m.parameters()],
        [len(x._forward_hooks)+len(x._forward_pre_hooks)+len(x._backward_hooks) for x in m.modules()], torch.get_rng_state())
def check_same(a, b):
    for k in a[0]: assert torch.equal(a[0][k], b[0][k]), k
    assert a[1:4] == b[1:4] and torch.equal(a[4], b[4])

class Broken(nn.Module):
    def forward(self, x): raise RuntimeError('broken')

def test_no_trace():
    m = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(6))
    m[2].eval()
    net = nn.Sequential(*m[:3], nn.Linear(6, 3))
    before = state(net)
    grad_norms(net, ce('mean'), torch.ones(5, 6), torch.zeros(5).long())
    check_same(before, state(net))
    for bad in (Broken(), nn.Linear(7, 3)):
        net = nn.Sequential(*m[:3], bad)
        before = state(net)
        with pytest.raises(RuntimeError): grad_norms(net, ce('mean'), torch.ones(5, 6), torch.zeros(5).long())
        check_same(before, state(net))

def test_keeps_grads_and_works_without_grad_mode():
    m, x, y = convnet(), xf(4, 1, 28, 28), ints(10, 4)
    ce('mean')(m(x), y).backward()
    old = [p.grad.clone() for p in m.parameters()]
    with torch.no_grad(): got = grad_norms(m, ce('mean'), x, y)
    torch.testing.assert_close(got, loop(m, ce('mean'), x, y), rtol=1e-4, atol=0)
    for p, o in zip(m.parameters(), old): assert torch.equal(p.grad, o)

def test_dropout_is_that_of_one_mask():
    "In training mode: the very mask that the model would have drawn"
    m, x, y = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)).double(), xf(5, 6).double(), ints(3, 5)
    torch.manual_seed(3)
    got = grad_norms(m, ce('mean'), x, y)
    losses = ce('none')(m(x), y)
    want = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(l, list(m.parameters()), retain_graph=True)]).norm() for l in losses])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)

def test_dropout_inside_a_layer_without_a_rule():
    m, x, y = encoder(dropout=.5), xf(5, 5, 6), ints(3, 5)
    before = state(m)
    with pytest.warns(UserWarning, match='gradient norms'): assert grad_norms(m, ce('mean'), x, y).isfinite().all()
    check_same(before, state(m))

# As a score
def test_score():
    m, x, y = stats(nn.Sequential(ConvLayer(1, 4), nn.Flatten(), nn.Dropout(), nn.Linear(100, 3))), xf(5, 1, 5, 5), ints(3, 5)
    want, score = loop(m, ce('mean'), x, y), get_score('grad_norm')
    assert score is grad_norm_score and score_context(score) == {'xb', 'model'}
    m.train()
    before = state(m)
    got = score_batch(m, score, ce('mean'), (x,), (y,)).scores
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    check_same(before, state(m))
    pred = m(x)
    want = loop(m.eval(), ce('mean'), x, y)
    m.train()
    torch.testing.assert_close(apply_score(score, pred, (y,), ce('mean'), xb=(x,), model=m), want, rtol=1e-4, atol=0)
    ce('mean')(pred, y).backward()

# Over a DataLoader
def learner(n=21):
    x, y = xf(n, 6), ints(3, n)
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items, bs=4, shuffle=True, drop_last=True), DataLoader(items[:7], bs=4))
    m = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(True), nn.Dropout(), nn.Linear(5, 3))
    return Learner(dls, m, loss_func=CrossEntropyLossFlat()), x, y

def test_learner():
    import random
    learn, x, y = learner()
    before, py = state(learn.model), random.getstate()
    with learn.no_bar(): got, valid = learn.grad_norms(), learn.grad_norms(learn.dls.valid)
    check_same(before, state(learn.model))
    assert random.getstate() == py
    want = loop(learn.model.eval(), ce('mean'), x, y)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    torch.testing.assert_close(valid, want[:7], rtol=1e-4, atol=0)

def test_learner_shows_a_bar(capsys):
    learn, *_ = learner()
    learn.grad_norms()
    assert '%' in capsys.readouterr().out
    with learn.no_bar(): learn.grad_norms()
    assert capsys.readouterr().out == ''

def test_learner_with_two_inputs_in_a_plain_loader():
    "Split as `Learner` splits a batch: all but the last are inputs"
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(20, 5)
        def forward(self, a, b): return self.l(a*b)
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(20, generator=g), torch.randn(20, generator=g), torch.tensor(i%5)) for i in range(30)]
    learn = Learner(DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)), Two(), loss_func=CrossEntropyLossFlat())
    a, b, y = map(torch.stack, zip(*items))
    torch.testing.assert_close(learn.grad_norms(), grad_norms(learn.model, learn.loss_func, (a, b), (y,)).cpu())

def test_under_data_parallel_it_is_one_model():
    "Copies on several devices would share the hooks that the norms are taken by"
    class Copies(nn.DataParallel):
        def forward(self, *x): raise AssertionError('replicated')
    torch.manual_seed(0)
    model, xb, yb = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    torch.testing.assert_close(grad_norms(Copies(model), F.cross_entropy, xb, yb), loop(model, F.cross_entropy, xb, yb), rtol=1e-4, atol=0)

"""Is a scoring pass in bfloat16 faster, and does it rank samples as one in 32 bits does?

    OMP_NUM_THREADS=1 python benchmarks/bf16.py --out benchmarks/results

1. Seconds of a scoring pass of `score_batch` in bfloat16 over one in 32 bits, alternately, for networks of several kinds, with weights drawn at random.
2. A network is trained on MNIST and one on CIFAR-10. After each epoch, `n` training samples are scored by the upper bound in both, and for comparison in 32
   bits by the model of an epoch earlier: what is remembered of an epoch ago is what choices over the epoch go by anyway. How alike are they? By the
   correlation of ranks; by how many of the third with the highest scores are the same; and by what the choice of a third is worth: the variance that the
   choice adds to the gradient's estimate when it is made by these scores, over that when it is made by those in 32 bits, if the latter are the norms of
   the gradients.
"""
import argparse, time
from pathlib import Path

import torch
from torch import nn
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from fastai.torch_core import no_random, set_seed
from torchvision.models import resnet18

from fastai_is.analysis import machine
from fastai_is.bench import PROBLEMS, small_resnet
from fastai_is.demo import small_convnet
from fastai_is.scores import fast_bf16, score_batch, upper_bound
from fastai_is.selection import inclusion

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--rounds', type=int, default=31, help='of each pass')
ap.add_argument('--epochs', type=int, default=4, help='of training')
ap.add_argument('--n', type=int, default=10_000, help='samples to train on and to score')
ap.add_argument('--out', type=Path, default=None, help='folder')
args = ap.parse_args()
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')

def clock():
    if device.type=='cuda': torch.cuda.synchronize()
    return time.process_time() if device.type=='cpu' else time.perf_counter()

def score(model, xb, yb, bf16):
    return score_batch(model, upper_bound, nn.CrossEntropyLoss(), xb, yb, autocast=torch.autocast(device.type, torch.bfloat16, enabled=bf16)).scores

# What a pass takes

class Columns(TabularModel):
    "Eight columns of categories and six of numbers, as one tensor"
    def __init__(self): super().__init__([(10,6)]*8, 6, 10, [200,100])
    def forward(self, x): return super().forward(x[:,:8].long(), x[:,8:])
class Encoder(nn.Sequential):
    "Two layers of a transformer, and a classifier of the first position"
    def __init__(self): super().__init__(nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), 2, enable_nested_tensor=False), nn.Linear(128, 10))
    def forward(self, x): return super().forward(x)[:,0]
class Text(nn.Module):
    "AWD-LSTM of 400 units"
    def __init__(self):
        super().__init__()
        self.model = get_text_classifier(AWD_LSTM, 1000, 10, config=awd_lstm_clas_config|dict(n_hid=400, emb_sz=100, n_layers=2))
    def forward(self, x): return self.model(x)[0]
def last(model): return model.to(memory_format=torch.channels_last)

NETS = {
    'small_convnet': (lambda: last(small_convnet()), lambda n: torch.randn(n,1,28,28), 128),
    'small_convnet, batches of 32': (lambda: last(small_convnet()), lambda n: torch.randn(n,1,28,28), 32),
    'small_resnet': (lambda: last(small_resnet()), lambda n: torch.randn(n,3,32,32), 128),
    'ResNet-18, 64 pixels': (lambda: last(resnet18(num_classes=10)), lambda n: torch.randn(n,3,64,64), 32),
    'two layers of 100': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784,100), nn.ReLU(), nn.Linear(100,10)), lambda n: torch.randn(n,784), 128),
    'three layers of 1,000': (lambda: nn.Sequential(nn.Linear(784,1000), nn.ReLU(), nn.Linear(1000,1000), nn.ReLU(), nn.Linear(1000,10)), lambda n: torch.randn(n,784), 128),
    'tabular, 200 and 100': (Columns, lambda n: torch.cat([torch.randint(0,10,(n,8)).float(), torch.randn(n,6)], 1), 64),
    'transformer, 64 positions': (Encoder, lambda n: torch.randn(n,64,128), 16),
    'AWD-LSTM, 70 words': (Text, lambda n: torch.randint(2,1000,(n,70)), 32),
}
lines = []
def say(s=''): lines.append(s); print(s, flush=True)
say(f"# Scoring passes in bfloat16\n\n{machine().rpartition(';')[0]}{' (processor time)'*(device.type=='cpu')}. `fast_bf16` says {fast_bf16(device)}.\n")
say(f'Medians over {args.rounds} rounds, both in turn; the ratio is the median of the ratios, with quartiles.\n')
say('| network | samples | in 32 bits, ms | in bfloat16, ms | ratio |\n|---|---|---|---|---|')
for name,(make,draw,n) in NETS.items():
    set_seed(0)
    model,xb,yb = make().to(device),(draw(n).to(device),),(torch.randint(10,(n,), device=device),)
    ts = {False:[], True:[]}
    for r in range(-3, args.rounds):
        for bf16 in (False,True):
            start = clock()
            score(model, xb, yb, bf16)
            if r>=0: ts[bf16].append(clock()-start)
    a,b = (torch.tensor(ts[o], dtype=torch.float64) for o in (False,True))
    q = (b/a).quantile(torch.tensor([.25,.5,.75], dtype=torch.float64)).tolist()
    say(f'| {name} | {n} | {1e3*a.median():.2f} | {1e3*b.median():.2f} | {q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f}) |')

# What becomes of the ranking

def ranks(o): return o.argsort().argsort().double()
def noise(norms, by):
    "What the choice adds to the variance of the gradient's estimate: each window of 128 keeps a third by the scores `by`, a fifth of the probability uniform"
    norms,by = (o[:len(o)//128*128].view(-1,128).double() for o in (norms,by))
    return (norms.square()*(1/inclusion(by, 43, .2)-1)).sum() # as if each sample were drawn by itself
def alike(a, b):
    k = len(a)//3
    same = len(set(a.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist()))/k
    return f'{torch.corrcoef(torch.stack([ranks(a),ranks(b)]))[0,1]:.4f} | {same:.1%} | {noise(a, b)/noise(a, a):.4f}'

say(f'\n{args.n:,} samples. Above 1 in the last column: by how much the choice is worse.')
for data,bs,lr in (('mnist',128,6.4e-2),('cifar10',32,2e-2)):
    set_seed(0)
    problem = PROBLEMS[data](args.n, 1000)
    learn,before = problem.make(bs),None
    say(f'\n| {problem.name}, {problem.model}: after epoch | scores | correlation of ranks | the same third | variance |\n|---|---|---|---|---|')
    def scores():
        "In 32 bits and in bfloat16, of the same images: all random changes to them are those of all other epochs"
        with no_random(): bs = [[score(learn.model, (x,), (y,), o).cpu() for o in (False,True)] for x,y in learn.dls.train.new(shuffle=False, drop_last=False)]
        return (torch.cat(o) for o in zip(*bs))
    with learn.no_bar(), learn.no_logging():
        for epoch in range(1, args.epochs+1):
            learn.fit(1, lr/4)
            a,b = scores()
            say(f'| {epoch} | in bfloat16 | {alike(a, b)} |')
            if before is not None: say(f'| {epoch} | of an epoch ago | {alike(a, before)} |')
            before = a
if args.out: (args.out/'bf16.md').write_text('\n'.join(lines)+f'\n\n    OMP_NUM_THREADS=1 python benchmarks/bf16.py\n', encoding='utf-8')

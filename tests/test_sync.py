"A step waits for the device no more often than once in ten: reading a value on the host makes a GPU's queue run dry."
import traceback, warnings
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastai_is
from fastai_is.callback.coreset import CoresetSelection
from fastai_is.callback.epoch import LossResampler, SoftPrune
from fastai_is.callback.importance import ImportanceCB
from fastai_is.callback.ranked import OnlineBatchSelection, PrioritizedSampling
from fastai_is.callback.selective import SelectiveBackprop
from fastai_is.data import mnist_sample

HERE = str(Path(fastai_is.__file__).parent)
METHODS = {
    "batch": lambda: ImportanceCB(keep=1/3, seat="batch", gate=None), "batch, gate": lambda: ImportanceCB(keep=1/3, seat="batch"),
    "batch, loss": lambda: ImportanceCB("loss", keep=1/3, seat="batch", gate=None), "last layer": lambda: ImportanceCB("last_layer", keep=1/3, seat="batch", gate=None),
    "loss seat": lambda: ImportanceCB(keep=1/3, seat="loss", gate=None), "epoch": lambda: ImportanceCB(keep=1/3, gate=None), "auto": ImportanceCB,
    "two stages": lambda: ImportanceCB(limit=50., floor=.1, least=1), "whole batches": lambda: ImportanceCB(keep=1/3, least=50, gate=None),
    "pool": lambda: ImportanceCB(seat="batch", pool=3, gate=None), "gradient norms": lambda: ImportanceCB("grad_norm", keep=1/3, seat="batch", gate=None),
    "coreset": CoresetSelection, "soft pruning": lambda: SoftPrune(delta=1.), "loss resampling": LossResampler, "online batch": OnlineBatchSelection, "prioritized": PrioritizedSampling}
FEWER = {"whole batches": 8, "pool": 8, "soft pruning": 17} # steps in the second epoch; the others make 24

def ours(): return [f"{f.filename[len(HERE)+1:]}:{f.lineno} {f.line}" for f in traceback.extract_stack() if f.filename.startswith(HERE)]

class Reads(TorchDispatchMode):
    "Notes what of ours reads a tensor's value, or makes a tensor whose size depends on values"
    ops = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default}
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.ops and (where := ours()): self.seen.append(where[-1])
        return func(*args, **(kwargs or {}))

class Steps(Callback):
    "How many reads there were in each step of the second epoch"
    order, run_valid = -50, False
    def __init__(self, reads): self.reads, self.steps = reads, {}
    def before_batch(self): self.reads.seen.clear()
    def after_batch(self):
        if self.epoch == 1: self.steps[self.train_iter] = list(self.reads.seen)

def fit(cb, steps, device):
    dls = mnist_sample(n=1200, bs=50, device=device)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)).to(device), cbs=[steps, cb])
    learn._do_epoch_validate = lambda *a, **k: None
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)

@pytest.mark.parametrize("method", METHODS)
def test_reads(method):
    reads = Reads()
    steps = Steps(reads)
    with reads: fit(METHODS[method](), steps, "cpu")
    often = {i: o for i, o in steps.steps.items() if o and i%10}
    assert len(steps.steps) == FEWER.get(method, 24) and not often

def test_reads_are_seen():
    "The check would notice: how many samples Selective-Backprop takes depends on the data."
    reads = Reads()
    steps = Steps(reads)
    with reads: fit(SelectiveBackprop(), steps, "cpu")
    assert sum(bool(o) for o in steps.steps.values()) > 20

@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself, and there is none here")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_does_not_wait(method):
    "The same as PyTorch sees it: its warnings of synchronisation, as far as they come from us."
    steps = Steps(reads := Reads())
    def note(message, *args, **kwargs):
        if "synchroniz" in str(message) and (where := ours()): reads.seen.append(where[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try: fit(METHODS[method](), steps, "cuda")
        finally: torch.cuda.set_sync_debug_mode("default")
    assert len(steps.steps) == FEWER.get(method, 24) and not {i: o for i, o in steps.steps.items() if o and i%10}

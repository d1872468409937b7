"What the analysis notebooks share: budgets by the clock."
import pytest
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

from fastai_is.analysis import TimeBudget, fit_for, spread, sweep
from fastai_is.callback.epoch import RandomSubset
from fastai_is.data import mnist_sample


class Clock:
    "Every look at it takes a second."
    def __init__(self): self.now = 0.
    def __call__(self):
        self.now += 1
        return self.now

class Look(Callback):
    "What a method sees when it plans an epoch"
    order, run_valid = TimeBudget.order+1, False
    def __init__(self): self.seen, self.valid = [], 0
    def before_train(self): self.seen.append((self.epoch, self.pct_train, self.n_epoch))

def budget(seconds, *cbs, **kwargs):
    learn = Learner(mnist_sample(n=40, bs=20, val_bs=2000), nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    return learn, fit_for(learn, seconds, 1e-2, cbs, clock=Clock(), **kwargs)

def test_epochs_hear_of_the_budget():
    "The share that is over and the number of epochs to come, by the clock: each epoch takes 5 looks at it."
    look = Look()
    learn, rows = budget(50., look, evals=2)
    assert [r["seconds"] for r in rows] == [25., 50.] and len(rows) == 2
    epochs, pcts, totals = zip(*look.seen)
    assert list(pcts) == sorted(pcts) and pcts[0] == 0 and pcts[-1] > .8
    assert totals[0] == 100_000 and all(abs(t-len(epochs)) <= 2 for t in totals[1:])
    assert learn.opt.hypers[0]["lr"] < 1e-3

def test_counts():
    "Without a method each step is forward and backward; a method counts itself."
    learn, rows = budget(30.)
    assert all(r["forwarded"] == r["backpropagated"] == 20*r["steps"] for r in rows)
    cb = RandomSubset(.5)
    learn, rows = budget(30., cb)
    assert {k: rows[-1][k] for k in cb.counts} == cb.counts and rows[-1]["epochs"] > 1

@pytest.mark.parametrize("kwargs, words", ((dict(seconds=0), "seconds=0"), (dict(seconds=float("nan")), "seconds=nan"), (dict(seconds=1, evals=0), "evals=0")))
def test_bad_budget(kwargs, words):
    with pytest.raises(ValueError, match=words): TimeBudget(lr=1., **kwargs)

def test_one_seed_has_no_spread():
    res = sweep(lambda m, s: dict(x=m+s), [1., 2.], seeds=1)
    assert spread(res).x.tolist() == ["1.00", "2.00"]
    assert spread(sweep(lambda m, s: dict(x=m+s), [1.], seeds=3)).x.tolist() == ["2.00 ± 1.00"]

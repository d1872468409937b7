"Selections against their definitions; the estimates they make are unbiased, and the tests would notice if they were not."
import math

import pytest, torch
from fastai_is.selection import *
from fastai_is.variance import *

def gen(seed=0): return torch.Generator().manual_seed(seed)

def slow_inclusion(scores, k, smooth=0.):
    "Cap one sample at a time, the largest first, and share what is left in proportion"
    n = len(scores)
    p = [(1-smooth)*s/sum(scores)+smooth/n for s in scores]
    certain = []
    while True:
        rest = [i for i in range(n) if i not in certain]
        left, total = k-len(certain), sum(p[i] for i in rest)
        over = [i for i in rest if left*p[i] > total*(1+1e-12)]
        if not over: return [1. if i in certain else left*p[i]/total for i in range(n)]
        certain.append(max(over, key=lambda i: p[i]))

@pytest.mark.parametrize('smooth', (0., .2, 1.))
@pytest.mark.parametrize('k', (1, 2, 3, 5, 8))
def test_inclusion(k, smooth):
    for seed in range(20):
        s = torch.rand(8, generator=gen(seed), dtype=torch.float64)**4
        pi = inclusion(s, k, smooth)
        torch.testing.assert_close(pi, torch.tensor(slow_inclusion(s.tolist(), k, smooth), dtype=torch.float64))
        torch.testing.assert_close(pi.sum(), torch.tensor(float(k), dtype=torch.float64))
        if smooth: assert (k/(8*pi)).max() <= 1/smooth+1e-9, 'smooth bounds the weights'

def test_inclusion_with_too_few_positive_scores():
    torch.testing.assert_close(inclusion(torch.tensor([0., 5, 0, 0]), 2), torch.tensor([1/3, 1, 1/3, 1/3], dtype=torch.float64))
    torch.testing.assert_close(inclusion(torch.tensor([0., 5, 3, 0]), 2), torch.tensor([0., 1, 1, 0], dtype=torch.float64))

def test_rows_are_independent():
    s = torch.rand(5, 9, generator=gen())
    torch.testing.assert_close(inclusion(s, 4, .1), torch.stack([inclusion(r, 4, .1) for r in s]))

def expected_under_systematic(pi, k, value):
    "The expectation over the starting point, exactly: between the fractional parts of the cumulative sums the sample does not change"
    cuts = torch.cat([torch.zeros(1), (pi.cumsum(0)%1).float(), torch.ones(1)]).double().sort().values
    total = 0.
    for a, b in zip(cuts[:-1], cuts[1:]):
        if b-a > 1e-6: total += (b-a)*value(systematic_at(pi, k, ((a+b)/2)[None]))
    return total

def test_systematic_is_unbiased_by_enumeration():
    s = torch.tensor([7., 1, .5, 2, 3, .1])
    grads = torch.randn(6, 3, generator=gen(), dtype=torch.float64)
    for k in (1, 2, 3, 4):
        pi = inclusion(s, k, .1)
        weighted = expected_under_systematic(pi, k, lambda i: ((k/(6*pi[i]))[:, None]*grads[i]).mean(0))
        torch.testing.assert_close(weighted, grads.mean(0), rtol=1e-5, atol=1e-5)
        counts = expected_under_systematic(pi, k, lambda i: torch.zeros(6).double().index_add(0, i, torch.ones(len(i)).double()))
        torch.testing.assert_close(counts, pi, rtol=1e-5, atol=1e-5)
    def self_normalised(i):
        w = 1/pi[i]
        return (w[:, None]*grads[i]).sum(0)/w.sum()
    assert (expected_under_systematic(pi, k, self_normalised)-grads.mean(0)).abs().max() > 1e-3

def test_resample_is_unbiased_by_enumeration():
    "All ordered pairs of 4 samples, each with its probability"
    s, grads, k = torch.tensor([4., 1, .5, 2]), torch.randn(4, 3, generator=gen(), dtype=torch.float64), 2
    p = probabilities(s, .1)
    total = sum(p[i]*p[j]*(grads[i]/(4*p[i])+grads[j]/(4*p[j]))/k for i in range(4) for j in range(4))
    torch.testing.assert_close(total, grads.mean(0))
    sel = resample(s, 1000, .1, gen())
    torch.testing.assert_close(sel.weights, (1/(4*p[sel.idxs])).float())

def z_scores(draw, want, n=4000):
    "How many standard errors the mean of `n` draws is away from `want`, in each coordinate"
    x = torch.stack([draw() for _ in range(n)])
    return (x.mean(0)-want).abs()/(x.std(0)/math.sqrt(n))

@pytest.mark.parametrize('select', (resample, systematic))
def test_unbiased_by_monte_carlo(select):
    "B=12 as in the classical illustration; the bound of 4 standard errors fails for an estimate that divides by the sum of the weights"
    g = gen(1)
    grads = torch.randn(12, 5, generator=g)*torch.rand(12, 1, generator=g)*3+.5
    s = grads.norm(dim=1)**2 # not the norms, so that the weights vary much
    gs = gen(2)
    def unbiased():
        sel = select(s, 4, .05, gs)
        return (sel.weights[:, None]*grads[sel.idxs]).mean(0)
    def self_normalised():
        sel = select(s, 4, .05, gs)
        return (sel.weights[:, None]*grads[sel.idxs]).sum(0)/sel.weights.sum()
    assert z_scores(unbiased, grads.mean(0)).max() < 4
    assert z_scores(self_normalised, grads.mean(0)).max() > 8

def test_systematic_frequencies():
    s = torch.tensor([7., 1, .5, 2, 3, .1]).expand(20000, -1)
    pi = inclusion(s[:1], 3, .1)[0]
    sel = systematic(s, 3, .1, gen())
    assert (sel.idxs[:, 1:] > sel.idxs[:, :-1]).all(), 'exactly k different samples, ascending'
    freq = torch.zeros(6).index_add(0, sel.idxs.flatten(), torch.ones(60000))/20000
    assert ((freq-pi).abs() <= 4*(pi*(1-pi)/20000).sqrt()+1e-9).all()
    torch.testing.assert_close(sel.weights, (3/(6*pi[sel.idxs])).float())

def test_systematic_chooses_k_different_whatever_the_rounding():
    for seed in range(50):
        g = gen(seed)
        s = torch.rand(257, generator=g)**(1+seed)
        k = 1+seed*5
        sel = systematic(s, k, 0., g)
        assert len(sel.idxs.unique()) == k and 0 <= sel.idxs.min() and sel.idxs.max() < 257

def test_everything_is_kept():
    sel = systematic(torch.rand(7, generator=gen()), 7)
    assert sel.idxs.tolist() == list(range(7)) and (sel.weights == 1).all()

@pytest.mark.parametrize('bad', ([1., float('nan'), 2], [1., float('inf'), 2], [0., 0, 0], [1., -1, 2]))
def test_unusable_scores_mean_uniform(bad):
    s = torch.tensor(bad)
    assert not usable(s)
    torch.testing.assert_close(probabilities(s), torch.full((3,), 1/3, dtype=torch.float64))
    assert (systematic(s, 2, 0., gen()).weights == 1).all() and torch.allclose(resample(s, 5, 0., gen()).weights, torch.ones(5))
    assert top_loss(s, .5).idxs.tolist() == [0, 1, 2]

@pytest.mark.parametrize('losses,perc,n,share', (([4, 3, 2, 1], .5, 2, .7), ([4, 3, 2, 1], .8, 3, .9), ([4, 3, 2, 1], .9, 3, .9), ([1, 1, 1, 1], .6, 3, .75),
    ([10, 1, 1, 1], .5, 1, 10/13), ([4, 3, 2, 1], 0, 1, .4), ([4, 3, 2, 1], 1, 4, 1.)))
def test_top_loss(losses, perc, n, share):
    x = torch.tensor(losses).float()[torch.randperm(len(losses), generator=gen())]
    sel = top_loss(x, perc)
    assert len(sel.idxs) == n and top_count(x, perc) == n
    assert abs(x[sel.idxs].sum()/x.sum()-share) < 1e-6
    assert (sel.idxs[1:] > sel.idxs[:-1]).all() and (sel.weights == 1).all()

def test_top_loss_slow_twin():
    for seed in range(30):
        x, perc, floor = torch.rand(50, generator=gen(seed))**3, .1*(seed%10), .01*seed
        order, total, n = sorted(range(50), key=lambda i: -x[i]), 0., 0
        while n == 0 or total < perc*float(x.double().sum())-1e-6:
            total += float(x[order[n]]); n += 1
        n = max(n, math.ceil(50*floor-1e-9))
        assert top_loss(x, perc, floor).idxs.tolist() == sorted(order[:n])

def test_top_share_of_samples(): assert top_loss(torch.arange(10.), 0, .4).idxs.tolist() == [6, 7, 8, 9]

def test_uniform():
    g = gen()
    freq = torch.zeros(10)
    for _ in range(3000): freq[uniform(10, 3, g).idxs] += 1
    assert ((freq/3000-.3).abs() < 4*math.sqrt(.3*.7/3000)).all()

def test_flatten_weights():
    w = torch.tensor([.5, 1, 4])
    assert flatten_weights(w, 1) is w
    torch.testing.assert_close(flatten_weights(w, .5), w.sqrt()/w.sqrt().mean())
    assert (flatten_weights(w, 0) == 1).all()

@pytest.mark.parametrize('call', (lambda s: systematic(s, 0), lambda s: systematic(s, 5), lambda s: systematic(s, 2.5), lambda s: systematic(s, 2, smooth=1.5),
    lambda s: resample(s, 0), lambda s: resample(s, 2, smooth=-.1), lambda s: uniform(4, 5), lambda s: top_loss(s, -1), lambda s: top_loss(s, .5, 2)))
def test_out_of_range(call):
    with pytest.raises(ValueError, match=r'=.*: expected'): call(torch.ones(4))

def test_global_randomness_is_not_used():
    state = torch.get_rng_state()
    systematic(torch.rand(9, generator=gen()), 3, .1, gen()); resample(torch.ones(9), 3, .1, gen()); uniform(9, 3, gen())
    assert torch.equal(torch.get_rng_state(), state)


# Variance
@pytest.mark.parametrize('scores,t,e', (([1, 1, 1, 1], 1., 4), ([4, 1, 1, 1, 1], 1.25, 3.2), ([9, 3, 2, 1, 1], 1.3693, 2.6667),
    ([10, 5, 1, 1, 1, 1, 1, 1], 1.5416, 3.3664), ([1]+[0]*15, 4., 1)))
def test_tau_vectors(scores, t, e):
    s = torch.tensor(scores).float()
    assert abs(tau(s)-t) < 1e-4 and abs(variance_ratio(s)-t**2) < 3e-4 and abs(ess(s)-e) < 1e-4
    assert abs(ess(s)-len(s)/tau(s)**2) < 1e-5

def test_unusable_scores_have_tau_one():
    for bad in ([0., 0, 0], [1., float('nan'), 2]): assert tau(torch.tensor(bad)) == 1

def test_break_even_vectors():
    for pool, th in ((3, 2.), (5, 8/3), (8, 11/3)): assert abs(break_even(pool*128, 128)-th) < 1e-9
    assert abs(break_even(300, 100, 2., 1.)-(300*2+100*3)/(100*3)) < 1e-9

def test_inflation_of_equal_scores():
    for k in (10, 40, 90): assert abs(inflation(torch.ones(120), k)-120/k) < 1e-6
    assert inflation(torch.ones(120), 120) == 1
    assert abs(inflation(torch.zeros(120), 40)-3) < 1e-6, 'all zero counts as equal'

def test_inflation_of_rows_is_that_of_their_sum():
    s = torch.stack([torch.rand(30, generator=gen())**4, torch.ones(30)*.1])
    pi = inclusion(s, 10, .2)
    sq = s.double().square()
    assert abs(inflation(s, 10, .2)-(1+((1/pi-1)*sq).sum()/sq.sum())) < 1e-9

def test_keep_within():
    s = torch.rand(20, 64, generator=gen())**6
    for limit in (1.1, 1.3, 2.):
        k = keep_within(s, limit, .2)
        assert inflation(s, k, .2) <= limit and (k == 2 or inflation(s, k-1, .2) > limit)
    assert keep_within(s, 100., .2, floor=.5) == 32

def test_constant_variance_at_set_points():
    "1/tau + 0.2; nothing below the authors' threshold 1/(2/3 - 0.2) = 2.143"
    for t, share in ((1., 1.), (2.14, 1.), (2.15, 1/2.15+.2), (2.5, .6), (4., .45), (10., .3)): assert abs(constant_variance(t)-share) < 1e-9
    assert constant_variance(2.5, 1., 1.) == 1 and abs(constant_variance(4., 1., 1.)-.45) < 1e-9
    assert abs(constant_variance(4., extra=.1)-.35) < 1e-9

def slow_constant_time(t, bt, b):
    "In samples, step by step: the time of a plain step, the smallest batch, the pool, what is left for training"
    time = (1+bt)*b
    a = max(.2*b, b/t)
    B = b+.5*(time-(1+bt)*a-b)
    return B/b, (time-B)/(1+bt)/b

def test_constant_time_at_set_points():
    assert constant_time(1.) == constant_time(2.) == (1., 1.)
    for t, pool, share in ((2.0001, 1.25, 1.75/3), (3., 1.5, .5), (5., 1.7, 1.3/3), (50., 1.7, 1.3/3)):
        for got, want in zip(constant_time(t), (pool, share)): assert abs(got-want) < 1e-3
    for t, f, b in ((2.5, 1., 2.), (3.7, 2., 5.), (6., .01, .03)):
        got = constant_time(t, f, b)
        assert all(abs(x-y) < 1e-9 for x, y in zip(got, slow_constant_time(t, b/f, 128))) and abs(got[0]*f+got[1]*(f+b)-(f+b)) < 1e-9, 'the cost of a plain step'
    assert constant_time(3., 1., .5) == (1., 1.), 'backward passes so cheap that there is nothing to trade'

def test_pass_timer():
    "Three steps of 32 samples: medians, what is not named is not counted, what comes later neither"
    now, waits = [0.], []
    timer = PassTimer(steps=3, clock=lambda: now[0], sync=lambda: waits.append(1))
    def step(forward, backward, between=100.):
        for name, s in ((None, between), ('forward', forward), (None, between), ('backward', backward)):
            now[0] += s
            timer.lap(name, 32)
    step(50., 90.)
    step(.32, .96)
    assert timer.costs is None
    step(.64, .64)
    assert all(abs(a-b) < 1e-9 for a, b in zip(timer.costs, (.02, .03))) and len(waits) == 12
    costs = timer.costs
    step(1., 1.)
    assert timer.costs == costs and len(waits) == 12

# What it did cost
def test_realised_inflation_tells_the_variance_of_a_choice_by_old_scores():
    "The scores chosen by are old; the variance is that of many choices of the same windows"
    now, old = (torch.rand(50, 64, generator=gen(i), dtype=torch.float64)**3 for i in (1, 2))
    old, sign = (3*old+now)/4, torch.randint(2, (50, 64), generator=gen(3))*2.-1 # gradients in one dimension: unrelated but for their size
    est, told, g = [], [], gen(4)
    for _ in range(3000):
        sel = systematic(old, 16, .2, g)
        chosen = now.gather(1, sel.idxs)
        est.append((sel.weights*(now*sign).gather(1, sel.idxs)).mean(1)-(now*sign).mean(1))
        told.append(float(realised_inflation(chosen.flatten(), sel.weights.flatten(), 16/64)))
    pi = inclusion(old, 16, .2)
    exact = float((now.square()/pi).sum()/now.square().sum())
    se = torch.tensor(told).std()/3000**.5
    assert abs(sum(told)/3000-exact) < max(.002*exact, 4*se), 'what is told is what the probabilities say'
    assert exact > 1.3*inflation(old, 16, .2), 'and not what was predicted'
    measured = 1+float(torch.stack(est).square().mean(0).sum()/(now.square().sum(1)/64**2).sum())
    assert abs(measured/exact-1) < .05, 'which is the variance that many choices have'

def test_realised_inflation_by_hand():
    s, w = torch.tensor([3., 1.]), torch.tensor([.5, 2.])
    assert realised_inflation(s, w, .5) == (9*.25+1*4)/(.5*(9*.5+1*2))
    assert abs(realised_inflation(torch.ones(8), torch.ones(8), .25)-4) < 1e-12, 'by chance'
    assert realised_inflation(s, torch.ones(2), 1.) == 1, 'everything'
    assert realised_inflation(torch.zeros(8), torch.ones(8), .25).isnan()

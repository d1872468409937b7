"The benchmark: its statistics against slow twins, what it measures, and that it goes on where it was interrupted."
import itertools, math, os, subprocess, sys, time
from statistics import NormalDist

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from helpers import *
import fastai_is.bench as bench
from fastai_is.bench import METHODS, Problem, count_passes, describe, fit_once, tune
from fastai_is.bench import markdown, plain_cost, plot_frontier, speed_up, speed_up_interval, summarise
from fastai_is.callback.epoch import RandomSubset
from fastai_is.callback.filter import BatchLossFilter
from fastai_is.callback.importance import ImportanceCB
from fastai_is.callback.proxy import ProxyScore
from fastai_is.cli import main
from fastai_is.data import has_cifar10

pytest.importorskip('pyarrow.parquet')

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Garbage and pictures take several times as long as such small fits, and bars would fill the report of a failure"
    monkeypatch.setattr(bench.gc, 'collect', noop)
    monkeypatch.setattr(bench, 'progress_bar', lambda o, **_: o)
    monkeypatch.setattr(bench, 'plot_frontier', lambda *_: plt.figure())

def make(bs=64, n=300): return Learner(make_dls(bs, n), make_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
def problem(name='clouds', make=make): return Problem(name, 'two layers', make, lr=1e-2, bs=64)
def fixed(keep=.5): return ImportanceCB(keep=keep, gate=None)

class Ticks:
    "A clock that goes by one second each time it is read, so that each fit takes one"
    def __init__(self): self.now = 0.
    def __call__(self): self.now += 1; return self.now

def run(out, methods=dict(ours=fixed), problem=problem(), **kw):
    return bench.bench(problem, methods, **{**dict(budgets=(1, 2), seeds=2, batch_sizes=(32, 64), rates=(1.,), out=out, clock=Ticks()), **kw})

def rows(out, stage=None):
    res = pd.read_parquet(out/'runs.parquet')
    return res if stage is None else res[res.stage == stage]

# The yardstick
def slow_cost(costs, accs, accuracy):
    "Walk along the curve of what was best so far, in small steps of the logarithm of the cost, until it is high enough"
    pts, best = [], -math.inf
    for c, a in sorted(zip(costs, accs)):
        if a > best: pts.append((math.log(c), a)); best = a
    for (c0, a0), (c1, a1) in zip(pts, pts[1:]):
        for i in range(2001):
            if a0+(a1-a0)*i/2000 >= accuracy-1e-9: return math.exp(c0+(c1-c0)*i/2000)

def slow_bounds(curves, accuracy):
    "What each setting may cost, and the cheapest of them at the least and at the most"
    least, most = [], []
    for c, a in curves:
        exact = slow_cost(c, a, accuracy)
        if accuracy < a[c.argmin()]: lo, hi = 0, c.min()
        elif exact is None: lo, hi = c.max(), math.inf
        else: lo = hi = exact
        least.append(lo); most.append(hi)
    return min(least), min(most)

def test_plain_cost_against_a_walk():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        curves = [(rng.permutation(np.exp(rng.uniform(0, 3, 5))), rng.uniform(80, 99, 5)) for _ in range(2)]
        accuracy = rng.uniform(85, 99)
        least, most = slow_bounds(curves, accuracy)
        cost, sign = plain_cost(curves, accuracy)
        assert sign == ('>' if most == math.inf else '<' if least < most else '')
        assert cost == pytest.approx(least if most == math.inf else most, rel=1e-2)
        seen.add(sign)
    assert seen == {'', '<', '>'}

def test_speed_up_by_hand():
    curve = [1, 10, 100], [90, 92, 96]
    assert speed_up([curve], 2, 91) == (pytest.approx(10**.5/2), '')
    assert speed_up([curve], 5, 94) == (pytest.approx(10**1.5/5), '')
    assert speed_up([curve], 25, 96) == (pytest.approx(4), '')
    assert speed_up([curve], 2, 89) == (.5, '<') and speed_up([curve], 200, 97) == (.5, '>')

def test_of_several_settings_the_cheapest_counts_at_each_accuracy():
    early, late = ([1, 2, 4], [90, 91, 91.5]), ([2, 4, 8], [88, 93, 95])
    assert plain_cost([early, late], 90.5)[0] == plain_cost([early], 90.5)[0] == pytest.approx(2**.5)
    assert plain_cost([late], 94) == (pytest.approx(4*2**.5), '')
    assert plain_cost([early, late], 94) == (pytest.approx(4*2**.5), '<'), 'who knows whether the one that stopped at 4 would have come there sooner'
    assert plain_cost([early, late], 96) == (4, '>'), 'or how far it would have come'
    assert plain_cost([([4, 8], [95, 96]), early], 91) == (2, '<'), 'two epochs of the former might have done'

t_quantile = {2:12.706, 4:3.182, 8:2.365} # from a printed table: 97.5 %, one degree of freedom less than there are seeds

def slow_interval(curves, costs, accs, draws=4000):
    "Every draw by itself, with the seeds that were drawn repeated in a list; then Hesterberg's expanded percentiles"
    s, low, high = len(costs), [], []
    for counts in np.random.default_rng(0).multinomial(s, [1/s]*s, draws):
        drawn = [i for i, k in enumerate(counts) for _ in range(k)]
        def mean(row): return sum(row[i] for i in drawn)/s
        least, most = slow_bounds([(np.array([mean(o) for o in c]), np.array([mean(o) for o in a])) for c, a in curves], mean(accs))
        low.append(least/mean(costs)); high.append(most/mean(costs))
    out = int(draws*NormalDist().cdf(-t_quantile[s]*(s/(s-1))**.5))
    return sorted(low)[out], sorted(high)[draws-1-out]

def noisy_runs(seeds, level=94., sd=.3, seed=0):
    rng = np.random.default_rng(seed)
    budgets = np.array([1., 2, 4, 8])[:, None]
    def curve(shift): return budgets*rng.uniform(.9, 1.1, (4, seeds)), 90+2*np.log2(budgets)+shift+sd*rng.standard_normal((4, seeds))
    return [curve(0), curve(-.5)], rng.uniform(1.9, 2.1, seeds), level+sd*rng.standard_normal(seeds)

@pytest.mark.parametrize('level', (89.7, 94., 96.1))
@pytest.mark.parametrize('seeds,draws', ((2, 100), (4, 4000), (8, 600)))
def test_interval_against_single_draws(seeds, draws, level):
    curves, costs, accs = noisy_runs(seeds, level)
    assert speed_up_interval(curves, costs, accs, draws) == pytest.approx(slow_interval(curves, costs, accs, draws), rel=2e-3)

def test_interval_against_all_draws_there_are():
    "Three seeds can be drawn in 27 ways, and the ends are the extremes of these"
    curves, costs, accs = noisy_runs(3)
    values = sorted(speed_up([(c[:, d].mean(1), a[:, d].mean(1)) for c, a in curves], costs[d].mean(), accs[d].mean())[0]
        for d in map(list, itertools.product(range(3), repeat=3)))
    low, high = speed_up_interval(curves, costs, accs)
    assert low == pytest.approx(values[0]) and high == pytest.approx(values[-1])

def test_interval_covers_what_is_true():
    "In 200 worlds with five seeds each. Percentiles that are not expanded cover it in 83 %, and one draw in 126 is the same seed five times"
    hits = [low <= 2 <= high for low, high in (speed_up_interval(*noisy_runs(5, seed=i), draws=2000) for i in range(200))]
    assert .88 < np.mean(hits) < .99

def test_interval_says_what_is_not_known():
    curve = np.array([[1, 1, 1], [2, 2, 2.]]), np.array([[90, 90, 90], [92, 92, 92.]])
    assert speed_up_interval([curve], [1, 1, 1], [91, 91, 91]) == pytest.approx((2**.5, 2**.5))
    assert speed_up_interval([curve], [1, 1, 1], [93, 93, 93]) == (2, math.inf)
    assert speed_up_interval([curve], [2, 2, 2], [89, 89, 89]) == (0, .5)
    assert all(map(math.isnan, speed_up_interval([(np.ones((2, 1)), np.ones((2, 1)))], [1], [1])))

# Tuning
def test_tuning_gives_all_batch_sizes_the_same_time():
    asked = []
    def fit(bs, lr, epochs):
        asked.append((bs, lr, epochs))
        return dict(seconds=epochs*32/bs, accuracy={32:95, 64:94.5, 256:94}[bs]+epochs/8-10*abs(lr-.02))
    settings = [(bs, lr) for bs in (32, 64, 256) for lr in (.01, .02)]
    assert tune(fit, settings, 2) == [(256, .02), (32, .02)]
    assert asked == [(*o, 2) for o in settings]+[(64, .02, 4), (256, .02, 16)]

def test_tuning_with_few_settings():
    assert tune(None, [(64, .1)], 2) == [(64, .1)]
    def fit(bs, lr, epochs): return dict(seconds=1., accuracy=lr)
    assert tune(fit, [(64, .1), (64, .3), (64, .2)], 2) == [(64, .3), (64, .2)]

# One fit
RIVALS = 'tsai', 'composer', 'datacull' # other packages' methods, which test_rivals.py tries
always = dict(importance=dict(keep=.5), blf={}, kath18_3={}) # those with a gate that would otherwise be shut

@pytest.mark.parametrize('name', [o for o in METHODS if o not in ('plain', 'kath18_5', *RIVALS)])
def test_hooks_count_what_callbacks_count(name):
    cb = METHODS[name](**dict(gate=None, **always[name]) if name in always else {})
    set_seed(0)
    res = fit_once(make(), 3, 1e-2, cb)
    assert {k:res[k] for k in cb.counts} == cb.counts
    assert res['cost'] == pytest.approx((res['forwarded']+2*res['backpropagated'])/3)

def test_a_callback_that_knows_nothing_of_us_is_counted():
    class Halve(Callback):
        "In the manner of a rival: a pass in training mode, and half of the batch"
        run_valid = False
        def before_batch(self):
            with torch.no_grad(): self.learn.model(*self.xb)
            self.learn.xb, self.learn.yb = tuple(o[:32] for o in self.xb), tuple(o[:32] for o in self.yb)
    res = fit_once(make(n=256), 2, 1e-2, Halve())
    assert (res['forwarded'], res['backpropagated'], res['cost']) == (2*256*3/2, 2*256/2, 2*256*(3/2+1)/3)

def test_hooks_go():
    learn = make()
    with pytest.raises(KeyError), count_passes(learn.model): raise KeyError
    assert not learn.model._forward_hooks

def test_plain_fit_is_fastais_and_is_counted():
    set_seed(0)
    learn = make()
    res = fit_once(learn, 3, 1e-2)
    set_seed(0)
    want = quiet_fit(make(), cbs=bench._NoValid())
    train_loss = float(want.recorder.losses[-1])
    assert same(weights(learn), weights(want))
    assert res['forwarded'] == res['backpropagated'] == res['cost'] == 900
    loss, acc = want.validate()
    assert (res['valid_loss'], res['accuracy']) == (pytest.approx(loss), pytest.approx(100*acc))
    assert res['train_loss'] == train_loss
    assert learn.opt.hypers[-1]['lr'] < 1e-2/25, 'the last of 15 steps of a decay to zero'

def test_seconds_are_those_of_training_and_of_what_the_method_does_besides():
    now = [0.]
    class Passes(Callback):
        def before_batch(self): now[0] += 1 if self.training else 1000
    class Plans(Callback):
        def before_fit(self): now[0] += 50
    learn = make()
    learn.add_cb(Passes())
    assert fit_once(learn, 2, 1e-2, Plans(), clock=lambda: now[0])['seconds'] == 50+2*5

def test_description_tells_settings():
    assert describe(None) == ''
    assert 'keep=0.3' in describe(RandomSubset(.3)) and 'score=loss_score' in describe(RandomSubset())
    ours = {k: v for k, v in METHODS.items() if v and k not in RIVALS}
    assert len({describe(make()) for make in ours.values()}) == len(ours) == len(METHODS)-1-len(RIVALS)

def test_description_of_callbacks_that_are_not_ours():
    "Of settings that are kept by other names, and of functions without one"
    class Half(Callback):
        def __init__(self, frac, how=None): self.k,self.how = frac,how
    assert describe(Half(.5)) == 'Half(how=None, k=0.5)' != describe(Half(.25))
    def scored(f): return describe(ImportanceCB(score=f))
    assert scored(lambda pred, y, loss_func: pred.sum(1)) != scored(lambda pred, y, loss_func: pred.sum(1)*2)
    f, g = (lambda pred, y, loss_func: pred.sum(1) for _ in range(2))
    assert scored(f) == scored(g) and 'lambda' in scored(f)
    def power(pred, y, loss_func, p): return pred.sum(1)**p
    assert 'score=partial(power, p=2)' in scored(partial(power, p=2)) != scored(partial(power, p=3))
    def closed(p): return lambda pred, y, loss_func: pred.sum(1)**p
    assert scored(closed(2)) == scored(closed(2)) != scored(closed(3)), 'a function is also what it has taken along'
    def taken(p): return lambda pred, y, loss_func: partial(power, p=p)(pred, y, loss_func)
    assert scored(taken(2)) == scored(taken(2)) != scored(taken(3))
    assert scored((lambda f: lambda pred, y, loss_func: f(pred))(partial(power, p=2))) != scored((lambda f: lambda pred, y, loss_func: f(pred))(partial(power, p=3)))
    assert bench._text([object()]) == '[object]'
    def nested(): return lambda pred, y, loss_func: torch.stack([o.sum() for o in pred])
    assert scored(nested()) == scored(nested()) and '0x' not in bench._text(nested())

def test_description_of_schedules_and_layers():
    def filters(f): return describe(BatchLossFilter(schedule_func=f))
    schedules = SchedNo(0, 0), SchedNo(1, 1), SchedLin(0, 1), SchedCos(0, 1), combine_scheds([.5, .5], [SchedLin(0, 1), SchedNo(1, 1)]), combine_scheds([.4, .6], [SchedLin(0, 1), SchedNo(1, 1)])
    assert len(set(map(filters, schedules))) == len(schedules)
    assert filters(SchedLin(0, 1)) == filters(SchedLin(0, 1))
    def layered(m): return describe(ImportanceCB(layer=m))
    assert layered(nn.Linear(2, 3)) == layered(nn.Linear(2, 3)) != layered(nn.Linear(3, 3))
    knot = []
    knot.append(knot)
    assert bench._text(knot) == '[list]'

def test_the_same_description_in_each_process():
    "Addresses and the order of sets differ from one to the next"
    code = '''if True:
        from fastai.callback.schedule import SchedCos
        from fastai_is.bench import describe, BatchLossFilter
        print(describe(BatchLossFilter(schedule_func=SchedCos(0, 1), score=lambda pred, y, loss_func: [(lambda: o)() in {'a', 'b', 'c', 'd'} for o in pred])))'''
    said = {subprocess.run([sys.executable, '-c', code], env=dict(os.environ, PYTHONHASHSEED=str(i)), capture_output=True, text=True, check=True).stdout for i in (1, 2)}
    assert len(said) == 1 and 'lambda' in said.pop()

# All of it
def test_what_is_run_and_in_which_order(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'plot_frontier', plot_frontier)
    tbl = run(tmp_path, dict(ours=fixed, blf=BatchLossFilter))
    res = rows(tmp_path, 'compare')
    bs, lr = tbl.bs[0], tbl.lr[0]
    plain = res[res.method == 'plain']
    kept = rows(tmp_path, 'tune').query("bs == @bs").groupby('method').backpropagated.first()
    assert set(plain.bs) == {32, 64, round(bs*kept['ours']/kept['plain'])}, 'the best two, and the batch size that the first method leaves'
    turns = [list(g.method) for _, g in res.groupby(['seed', 'epochs'])]
    assert turns == [['plain', 'ours', 'random', 'plain', 'plain', 'blf']]*4, 'they take turns'
    assert (res.seed.diff().dropna() >= 0).all()
    assert set(map(tuple, res[res.method != 'plain'][['bs', 'lr']].values)) == {(bs, lr)}
    assert set(rows(tmp_path, 'tune').seed) == {0} and set(rows(tmp_path, 'tune').epochs) == {2}
    small = plain[~plain.bs.isin((32, 64))]
    assert small.lr.iloc[0] == pytest.approx(lr*(small.bs.iloc[0]/bs)**.5)
    assert (res.seconds == 1).all() and res.machine.str.contains(torch.__version__, regex=False).all()
    for f in ('table.md', 'frontier.png', 'runs.parquet'): assert (tmp_path/f).stat().st_size > 1000*(1+9*(f == 'frontier.png'))
    assert sorted(o.name for o in tmp_path.iterdir()) == ['frontier.png', 'runs.parquet', 'table.md']

def test_random_keeps_as_much_as_the_first_method(tmp_path):
    run(tmp_path, dict(ours=partial(fixed, .3)), budgets=(3,))
    res = rows(tmp_path, 'compare')
    for seed, g in res.groupby('seed'):
        kept = g.set_index('method').backpropagated
        assert g.settings[g.method == 'random'].str.contains(f"keep={float(kept['ours']/kept['plain'].iloc[0])!r},", regex=False).all()
        assert kept['random'] == pytest.approx(kept['ours'], abs=3*64), 'a batch more or less in each epoch, none of which may be too short'

def test_summary_by_hand(tmp_path):
    tbl = run(tmp_path, seeds=3)
    res = rows(tmp_path, 'compare')
    mean = res.groupby(['method', 'bs', 'lr', 'epochs'])[['accuracy', 'cost', 'seconds', 'valid_loss']].mean()
    curves = [(g.cost.values, g.accuracy.values) for _, g in mean.loc['plain'].groupby(['bs', 'lr'])]
    assert len(tbl) == len(mean) and (tbl.seeds == 3).all()
    for _, o in tbl.iterrows():
        m = mean.loc[o.method, o.bs, o.lr, o.epochs]
        assert all(o[k] == pytest.approx(m[k]) for k in m.index)
        if o.method == 'plain': assert math.isnan(o.cost_speed_up)
        else:
            v, sign = speed_up(curves, m.cost, m.accuracy)
            assert (o.cost_speed_up, o.cost_bound) == (pytest.approx(v), sign)
            assert o.cost_low <= v <= o.cost_high

def stopping(every):
    "A problem whose every so many-th training step, of all its Learners together, stops the whole program"
    steps = itertools.count(1)
    class Stop(Callback):
        run_valid = False
        def before_batch(self):
            if next(steps)%every == 0: raise KeyboardInterrupt
    def stopped(bs):
        learn = make(bs)
        learn.add_cb(Stop())
        return learn
    return problem(make=stopped)

def test_goes_on_after_interruptions_in_the_middle_of_fits(tmp_path):
    whole, before, stops = run(tmp_path/'whole'), pd.DataFrame(), 0
    fragile, parts = stopping(every=90), tmp_path/'parts'
    while True:
        try: tbl = run(parts, problem=fragile); break
        except KeyboardInterrupt: stops += 1
        now = rows(parts)
        if len(before): pd.testing.assert_frame_equal(now[:len(before)], before)
        assert len(now) > len(before), 'what was done is kept'
        before = now
    assert stops >= 3
    pd.testing.assert_frame_equal(rows(parts), rows(tmp_path/'whole'))
    pd.testing.assert_frame_equal(tbl, whole)
    assert not rows(parts).duplicated(list(bench._key)).any()

def test_an_interruption_while_writing_loses_nothing(tmp_path, monkeypatch):
    real, writes = bench.os.replace, itertools.count(1)
    def replace(*args):
        if next(writes) == 5: raise KeyboardInterrupt
        real(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(bench.os, 'replace', replace)
        run(tmp_path)
    assert len(rows(tmp_path)) == 4
    (tmp_path/'runs.tmp').write_bytes(b'half of a file')
    run(tmp_path)
    assert not rows(tmp_path).duplicated(list(bench._key)).any() and not (tmp_path/'runs.tmp').exists()

def never(bs): raise AssertionError('a Learner was made')
def done(): raise AssertionError('something was trained')
def untrainable(bs):
    learn = make(bs)
    learn.fit_one_cycle = lambda *a, **k: done()
    return learn

def test_the_same_again_trains_nothing(tmp_path):
    pd.testing.assert_frame_equal(run(tmp_path), run(tmp_path, problem=problem(make=untrainable), clock=Ticks()))

def test_more_of_it_trains_only_what_is_new(tmp_path):
    run(tmp_path, budgets=(2,), seeds=1)
    before = rows(tmp_path)
    run(tmp_path, budgets=(2,), seeds=2)
    after = rows(tmp_path)
    pd.testing.assert_frame_equal(after[:len(before)], before)
    assert set(after[len(before):].seed) == {1} and set(after[len(before):].stage) == {'compare'}

@pytest.mark.parametrize('other', ('samples', 'data', 'settings', 'machine', 'version', 'clock'))
def test_runs_of_other_settings_are_not_mixed_up(tmp_path, monkeypatch, other):
    kw = dict(budgets=(1,), seeds=1, batch_sizes=(64,))
    first = run(tmp_path, **kw)
    before = rows(tmp_path)
    if other == 'machine': monkeypatch.setattr(bench, 'machine', lambda: 'another one; small run')
    if other == 'version': monkeypatch.setattr(bench.fastai_is, '__version__', 'another')
    if other == 'clock': kw['clock'] = time.process_time
    if other == 'samples': kw['problem'] = problem(make=partial(make, n=200))
    if other == 'data': kw['problem'] = problem('other clouds')
    second = run(tmp_path, dict(ours=partial(fixed, .25)) if other == 'settings' else dict(ours=fixed), **kw)
    now = rows(tmp_path)
    pd.testing.assert_frame_equal(now[:len(before)], before)
    new = now[len(before):]
    assert len(second) == len(first), 'the table is about its own runs alone'
    assert set(new.method) == {'ours', 'random', 'plain'}
    if other == 'settings': assert set(new.bs[new.method == 'plain']) == {16}, 'only plain training with the smaller batch is new'
    if other == 'samples': assert second.forwarded[0] == 200 and first.forwarded[0] == 300

def missing(): raise ImportError('No module named another_library')

def test_a_rival_that_is_not_installed_is_listed(tmp_path):
    tbl = run(tmp_path, dict(rival=missing, ours=fixed), budgets=(1,), seeds=1, command='what was typed')
    assert set(tbl.method) == {'plain', 'ours', 'random'}
    text = (tmp_path/'table.md').read_text(encoding='utf-8')
    for o in ('- rival was not run: No module named another_library', '300 training and 100 validation samples', 'clouds, two layers',
        'means over 1 seed,', 'ImportanceCB(score=', torch.__version__, '\n    what was typed\n'): assert o in text, o

def test_plain_alone(tmp_path):
    tbl = run(tmp_path, ['plain'])
    assert set(tbl.method) == {'plain'} and len(tbl) == 4

def test_a_method_that_keeps_everything_has_no_smaller_batch(tmp_path):
    tbl = run(tmp_path, dict(ours=lambda: ImportanceCB(keep=1)), budgets=(1,), batch_sizes=(64,))
    assert tbl.method.tolist() == ['plain', 'ours', 'random'] and tbl.backpropagated.nunique() == 1

@pytest.mark.parametrize('seeds', (2, 3, 4, 5, 6))
def test_up_to_four_seeds_the_interval_is_the_range_of_all_draws(seeds):
    "Below 95 %, as the table says"
    accuracy = np.arange(seeds)+3.
    line = np.array([1., 100.])
    low, high = speed_up_interval([(np.tile(line[:, None], seeds),)*2], np.ones(seeds), accuracy)
    lowest, highest = (speed_up([(line, line)], 1., a)[0] for a in accuracy[[0, -1]])
    assert ((low, high) == pytest.approx((lowest, highest))) == (seeds <= 4) and lowest <= low < high <= highest+1e-9

@pytest.mark.parametrize('size,want', ((32, 'the smallest batches'), (64, None), (128, 'the largest batches')))
@pytest.mark.parametrize('rate,wanted', ((.01, 'the lowest rate for them'), (.02, None), (.04, 'the highest rate for them')))
def test_the_best_at_an_edge_is_told(size, want, rate, wanted):
    got = bench._edges((size, rate), [(b, r) for b in (32, 64, 128) for r in (.01, .02, .04)])
    assert got == (f" (with {' and '.join(filter(None, (want, wanted)))} of those tried: there may be better ones beyond)" if want or wanted else '')
    assert bench._edges((size, rate), [(size, rate)]) == ''

def test_a_network_of_the_methods_own_is_paid_for():
    "A proxy as large as the model sees all samples forwards and the chosen ones both ways"
    cb = ProxyScore(proxy=make_net(), warmup=0)
    res = fit_once(make(n=600), 3, 1e-2, cb)
    assert res['backpropagated'] == 600 and res['cost'] == pytest.approx(600+(1800+600+2*600)/3, rel=.01)

class Broken(Callback):
    def after_fit(self):
        if not self.learn.lock.locked(): nn.init.constant_(self.model[0].weight, math.nan)

def finite_accuracy(pred, y): return accuracy(pred, y) if pred.isfinite().all() else torch.tensor(math.nan)

def test_a_run_that_broke_down_is_the_worst(tmp_path):
    "Not the best, as all comparisons with NaN have it"
    def watched(bs): return Learner(make_dls(bs, 300), make_net(), loss_func=CrossEntropyLossFlat(), metrics=finite_accuracy)
    tbl = run(tmp_path, dict(ours=Broken), problem=problem(make=watched)).set_index(['method', 'epochs'])
    assert (tbl.loc['ours'].accuracy == 0).all() and (tbl.loc['ours'].cost_bound == '<').all() and (tbl.loc['plain'].accuracy > 50).all()

def test_without_ids_there_is_no_random_share(tmp_path):
    def torchs(bs):
        x = torch.randn(300, 20)
        ds = torch.utils.data.TensorDataset(x, x[:, :5].argmax(1))
        return Learner(DataLoaders(torch.utils.data.DataLoader(ds, bs), torch.utils.data.DataLoader(ds, bs)), make_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    tbl = run(tmp_path, dict(blf=lambda: BatchLossFilter(gate=None)), problem=problem(make=torchs))
    assert set(tbl.method) == {'plain', 'blf'}
    assert '- random was not run: the ids in the batches of this DataLoader cannot be known' in (tmp_path/'table.md').read_text()

# The table and the picture
def fake_runs():
    """Plain training whose accuracy rises by two points with each doubling; a method that gets as far in half the seconds and
    three quarters of the cost; and one that gets three points further in half the seconds"""
    methods = dict(plain=(1, 1, 0), ours=(.5, .75, 0), best=(.5, 1, 3))
    return pd.DataFrame([dict(method=m, bs=64, lr=.01, epochs=e, seed=s, seconds=sec*e, cost=cost*900*e, forwarded=900, backpropagated=900,
        accuracy=90+2*math.log2(e)+gain, valid_loss=.5, train_loss=.4)
        for s in (0, 1) for e in (1, 2, 4) for m, (sec, cost, gain) in methods.items()])

def test_table():
    tbl = summarise(fake_runs())
    head, _, *lines = [[c.strip() for c in o.strip('|').split('|')] for o in markdown(tbl, 900).splitlines()]
    cells = {(o[0], o[3]):o for o in lines}
    assert {len(o) for o in lines} == {len(head)}
    assert cells['ours', '2'] == ['ours', '64', '0.01', '2', '92.00 ± 0.00', '0.5000', '0.4000', '1.0', '1.00', '1.00', '1.50',
        '2.00 (2.00 to 2.00)', '1.33 (1.33 to 1.33)']
    assert cells['best', '4'][-2:] == ['>2.00 (2.00 to ∞)', '>1.00 (1.00 to ∞)']
    assert cells['plain', '4'][-2:] == ['', '']

def test_one_seed_has_no_interval():
    res = fake_runs()
    text = markdown(summarise(res[res.seed == 0]), 900)
    assert '| 2.00 | 1.33 |' in text and '±' not in text and 'nan' not in text

def test_summary_is_of_the_seeds_that_all_have():
    res = fake_runs()
    cut = res[(res.method != 'ours') | (res.epochs != 4) | (res.seed == 0)]
    pd.testing.assert_frame_equal(summarise(cut), summarise(res[res.seed == 0]))
    with pytest.raises(ValueError, match='No seed was run'): summarise(res[(res.method == 'plain') == (res.seed == 0)])
    with pytest.raises(ValueError, match='several runs'): summarise(pd.concat([res, res]))

def test_picture_has_everything():
    fig = plot_frontier(summarise(fake_runs()), 'A title')
    labels = [t.get_text() for t in fig.axes[1].get_legend().get_texts()]
    assert labels == ["plain training's frontier", 'plain, batches of 64, rate 0.01', 'ours', 'best'] and fig.get_suptitle() == 'A title'
    assert [ax.get_xlabel() for ax in fig.axes] == ['seconds of training', 'cost: (forwarded + 2 backpropagated)/3, in thousands of samples']
    tbl = summarise(fake_runs())
    many = pd.concat([tbl]+[tbl[tbl.method == 'ours'].assign(method=f'ours {i}') for i in range(11)])
    looks = {(c.lines[0].get_marker(), c.lines[0].get_color()) for c in plot_frontier(many).axes[1].containers}
    assert len(looks) == 14 and plot_frontier(tbl, seconds='hours').axes[0].get_xlabel() == 'hours'
    front = fig.axes[0].lines[0]
    assert np.allclose(front.get_xdata(), 2**((front.get_ydata()-90)/2)), 'the curve that the accuracies were made from'

# Mistakes
@pytest.mark.parametrize('kw, said', (
    (dict(methods=['plain', 'sgd']), "methods='sgd': expected names out of plain, random, importance"),
    (dict(methods='plain'), "methods='plain': expected a list"), (dict(methods=['random']), 'one more method'),
    (dict(methods=dict(plain=ImportanceCB)), 'another name'), (dict(methods=dict(random=ImportanceCB)), 'another name'),
    (dict(methods=dict(ours=None)), "methods['ours']=None"), (dict(methods=dict(ours=3)), "methods['ours']=3"),
    (dict(problem='imagenet'), "problem='imagenet': expected one of mnist, fashion_mnist, cifar10"), (dict(problem=None), 'problem=None'),
    (dict(n=100), 'n=100: expected None'), (dict(seeds=0), 'seeds=0'), (dict(batch_sizes=(0,)), 'batch_sizes=(0,)'),
    (dict(budgets=()), 'budgets=()'), (dict(budgets=(0, 1)), 'budgets=(0, 1)'), (dict(budgets=(1, 1)), 'budgets=(1, 1)'),
    (dict(budgets=4), 'budgets=4: expected a list'), (dict(batch_sizes=64), 'batch_sizes=64: expected a list'), (dict(rates=1.), 'rates=1.0: expected a list'),
    (dict(methods=dict(ours=ImportanceCB())), 'such as its class'), (dict(methods=dict(ours=lambda: None)), 'but it made None'),
    (dict(budgets=(1.5,)), 'budgets=(1.5,)'), (dict(rates=(0,)), 'rates=(0,)'), (dict(rates=()), 'rates=()')))
def test_mistakes_are_told_before_anything_is_made(tmp_path, kw, said):
    with pytest.raises(ValueError, match=re.escape(said)): run(tmp_path/'new', **{**dict(problem=problem(make=never)), **kw})
    assert not (tmp_path/'new').exists()

def test_mistakes_that_a_learner_shows(tmp_path):
    with pytest.raises(ValueError, match='batch_sizes=.*at most 300'): run(tmp_path, batch_sizes=(512,), clock=done)
    def blind(bs): return Learner(make_dls(bs), make_net(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='metrics=None.*accuracy'): run(tmp_path, problem=problem(make=blind), clock=done)
    for metric in (error_rate, mse, rmse, HammingLossMulti()):
        def backwards(bs): return Learner(make_dls(bs), make_net(), loss_func=CrossEntropyLossFlat(), metrics=metric)
        with pytest.raises(ValueError, match='metrics=.*the higher the better'): run(tmp_path, problem=problem(make=backwards), clock=done)
    def large(bs): return Learner(make_dls(bs), make_net(), loss_func=CrossEntropyLossFlat(), metrics=lambda p, y: 1.5)
    with pytest.raises(ValueError, match='1.5.*of which 1 is the best'): run(tmp_path/'new', problem=problem(make=large), clock=done)
    assert not (tmp_path/'new'/'runs.parquet').exists()
    for cb in (SaveModelCallback(), ShowGraphCallback(), EarlyStoppingCallback()):
        def tracked(bs): return make(bs).add_cb(cb)
        with pytest.raises(ValueError, match=f'cbs={cb.name}|cbs=.*without it'): run(tmp_path, problem=problem(make=tracked), clock=done)

def test_folders_that_will_not_do(tmp_path):
    (tmp_path/'runs.tmp').mkdir()
    with pytest.raises(OSError): run(tmp_path, clock=done)
    (tmp_path/'runs.tmp').rmdir()
    pd.DataFrame(dict(a=[1])).to_parquet(tmp_path/'runs.parquet')
    with pytest.raises(ValueError, match='runs.parquet.*stage, data.*another folder'): run(tmp_path, clock=done)

@pytest.mark.skipif(sys.platform == 'win32', reason='no such locks there')
def test_two_benchmarks_do_not_write_to_one_folder(tmp_path):
    with bench._alone(tmp_path/'new'), pytest.raises(OSError, match='Another benchmark writes'): run(tmp_path/'new', clock=done)
    run(tmp_path/'new', budgets=(1,), seeds=1)
    with pytest.raises(ValueError, match='n=3: expected a whole number from 10'): run(tmp_path, problem='mnist', n=3, clock=done)

def test_without_pyarrow(tmp_path, monkeypatch):
    for o in [o for o in sys.modules if o.split('.')[0] == 'pyarrow']: monkeypatch.setitem(sys.modules, o, None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'fastai_is\[bench\]'"): run(tmp_path, clock=done)

# Built-in problems and the command
def test_mnist_problem():
    p = bench.mnist_problem(n=200, n_valid=50)
    learn = p.make(32)
    assert (p.name[:5], p.model) == ('MNIST', 'small_convnet')
    assert (len(learn.dls.train_ds), len(learn.dls.valid_ds), learn.dls.train.bs) == (200, 50, 32)
    res = fit_once(learn, 1, p.lr)
    assert res['forwarded'] == 192 and 0 <= res['accuracy'] <= 100

def test_fashion_mnist_problem(monkeypatch, tmp_path):
    monkeypatch.setenv('FASTAI_IS_DATA', str(tmp_path))
    monkeypatch.setattr(bench, 'fashion_mnist', partial(bench.fashion_mnist, download=False))
    with pytest.raises(FileNotFoundError, match='FashionMNIST/raw'): bench.PROBLEMS['fashion_mnist']()
    raw = tmp_path/'FashionMNIST'/'raw'
    raw.mkdir(parents=True)
    for part,n in dict(train=100, t10k=20).items():
        for o,t in {'images-idx3':torch.randint(256, (n,28,28)), 'labels-idx1':torch.arange(n)%10}.items():
            head = bytes([0,0,8,t.ndim])+b''.join(d.to_bytes(4, 'big') for d in t.shape)
            (raw/f'{part}-{o}-ubyte').write_bytes(head+t.byte().numpy().tobytes())
    p = bench.PROBLEMS['fashion_mnist'](n=50, n_valid=20)
    assert (p.name, p.model) == ('Fashion-MNIST', 'small_convnet')
    assert fit_once(p.make(10), 1, p.lr)['forwarded'] == 50

@pytest.mark.skipif(not has_cifar10(), reason='CIFAR-10 is not on this machine')
def test_cifar10_problem():
    p = bench.cifar10_problem(n=100, n_valid=20)
    learn = p.make(32)
    assert (p.name[:8], p.model) == ('CIFAR-10', 'small_resnet')
    assert (len(learn.dls.train_ds), len(learn.dls.valid_ds)) == (100, 20)
    assert fit_once(learn, 1, p.lr)['forwarded'] == 96
    def first(dl): return next(iter(dl.new(shuffle=False)))[0]
    assert not torch.equal(first(learn.dls.train), first(learn.dls.train)), 'flipped and zoomed at random'
    assert torch.equal(first(learn.dls.valid), first(learn.dls.valid))

def test_resnet_takes_any_image(): assert bench.small_resnet(1, 7)(torch.randn(3, 1, 28, 28)).shape == (3, 7)

def test_command(tmp_path, monkeypatch, capsys):
    asked = []
    def named(n=None, n_valid=None): asked.append((n, n_valid)); return problem()
    monkeypatch.setitem(bench.PROBLEMS, 'mnist', named)
    assert main(['bench', '--data', 'mnist', '--methods', 'plain, blf', '--quick', '--out', str(tmp_path/'new')]) == 0
    out = capsys.readouterr().out
    assert asked == [(500, 500)] and '| blf |' in out
    assert f"fastai-is bench --data mnist --methods 'plain, blf' --quick --out {tmp_path/'new'}" in out
    assert len(rows(tmp_path/'new', 'compare').groupby(['seed', 'epochs'])) == 4
    assert 'Seconds are of training' in out
    assert main(['bench', '--methods', 'blf', '--budgets', '1', '--seeds', '1', '--n', '300', '--processor-time', '--out', str(tmp_path/'new')]) == 0
    assert 'Seconds (processor time) are of training' in capsys.readouterr().out
    assert asked[1:] == [(300, None)]

def test_command_mistakes(tmp_path, capsys):
    assert 'out of plain, random' in main(['bench', '--methods', 'sgd', '--out', str(tmp_path)])
    assert "problem='imagenet'" in main(['bench', '--data', 'imagenet', '--out', str(tmp_path)])
    with pytest.raises(SystemExit): main(['bench', '--budgets', '1,x'])
    assert "'1,x': expected whole numbers" in capsys.readouterr().err

def test_help_names_all_methods_and_data(capsys):
    with pytest.raises(SystemExit): main(['bench', '--help'])
    out = ' '.join(capsys.readouterr().out.split())
    assert ', '.join(METHODS) in out and all(o in out for o in bench.PROBLEMS)

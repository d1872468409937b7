"The worked example of a new method in CONTRIBUTING.md: it is as short as it says, and it works."
import importlib.util, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest, torch
from helpers import *
from fastai_is.callback.tracker import SampleTracker
from fastai_is.data import mnist

ROOT = Path(__file__).resolve().parent.parent

def example():
    "The notebook's cells, as (kind, source), and the test"
    _, notebook, test, _ = re.split(r"^### (?:Its notebook|Its test|The rest)$", (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M)
    cells, (test,) = [re.findall(r"^```(python|markdown)\n(.*?)\n```$", o, re.M | re.S) for o in (notebook, test)]
    return cells, test[1]

def exported(cells): return [l for _, src in cells if src.startswith("#| export\n") for l in src.splitlines()[1:] if l.strip()]

def python(code, cwd):
    "Run `code` in a new Python in the folder `cwd`, whose `fastai_is` it finds first"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with it set, nbdev-export does nothing
    r = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout

@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the library with the example added, exported as CONTRIBUTING.md says"
    root, (cells, test) = tmp_path_factory.mktemp("project"), example()
    shutil.copytree(ROOT/"fastai_is", root/"fastai_is", ignore=shutil.ignore_patterns("__pycache__"))
    for d in ("nbs", "tests"): (root/d).mkdir()
    for f in ("pyproject.toml", "tests/helpers.py", "tests/conftest.py"): shutil.copy(ROOT/f, root/f)
    cells = [dict(cell_type=dict(python="code", markdown="markdown")[kind], id=f"{i:08x}", metadata={}, source=src,
                  **dict(execution_count=None, outputs=[]) if kind == "python" else {}) for i, (kind, src) in enumerate(cells)]
    (root/"nbs/19a_callback.small_loss.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding="utf-8")
    (root/"tests/test_small_loss.py").write_text(test, encoding="utf-8")
    python("import nbdev; nbdev.nbdev_export()", root)
    return root

@pytest.fixture(scope="module")
def SmallLoss(project):
    "The class out of the exported module, beside the library of this process"
    spec = importlib.util.spec_from_file_location("fastai_is.callback.small_loss", project/"fastai_is/callback/small_loss.py")
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    assert mod.__all__ == ["small_loss", "SmallLoss"]
    return mod.SmallLoss

def test_it_is_short():
    lines = exported(example()[0])
    assert any("class SmallLoss(SelectionCB)" in l for l in lines) and len(lines) < 40

def test_its_notebook_runs(project):
    python("from nbdev.test import nbdev_test; nbdev_test('nbs/19a_callback.small_loss.ipynb', n_workers=0)", project)

def test_its_test_passes(project):
    out = python("import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/test_small_loss.py']))", project)
    assert "7 passed" in out

def test_its_test_notices(project, tmp_path):
    "With the highest losses kept instead of the lowest, it fails"
    shutil.copytree(project, tmp_path/"p")
    f = tmp_path/"p/fastai_is/callback/small_loss.py"
    f.write_text(f.read_text(encoding="utf-8").replace("argsort()[:k]", "argsort()[-k:]"), encoding="utf-8")
    with pytest.raises(AssertionError, match="2 failed, 5 passed"): test_its_test_passes(tmp_path/"p")

@pytest.mark.parametrize('seat', ('batch', 'loss'))
def test_on_real_digits(SmallLoss, seat):
    """Four labels in ten are wrong. Each step trains on the samples that the definition says; few of them have a wrong label in the
    end; and the accuracy is above plain training's on the same data by more than three standard errors of a difference (0.014 for 2,000 digits)"""
    wrong, steps, tracker = 800, [], SampleTracker()
    def fit(*cbs):
        set_seed(0)
        dls = mnist(n=2000, bs=50)
        y = dls.train_ds.y
        y[:wrong] = (y[:wrong]+torch.randint(1, 10, (wrong,)))%10
        return quiet_fit(Learner(dls, nn.Sequential(Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)), metrics=accuracy), 10, [*cbs])
    class Check(Callback):
        order, run_valid = SelectionCB.order+1, False
        def after_loss(self):
            k = round(50*(1-.4*min(1, self.epoch/3)))
            l = F.cross_entropy(self.pred, self.y, reduction='none').as_subclass(Tensor)
            if seat == 'loss': l = torch.stack(sorted(l)[:k])
            assert len(l) == k
            torch.testing.assert_close(self.learn.loss_grad.as_subclass(Tensor), l.mean())
            steps.append(k)
    def check(learn, idxs, weights, losses): # chosen by the definition: none that is left out has a lower loss than one that is kept
        out = torch.ones(len(losses)).bool()
        out[idxs] = False
        assert losses[idxs].max() <= losses[out].min()
    plain, ours = fit(), fit(SmallLoss(.4, warmup=3, seat=seat, on_select=check), Check(), tracker)
    a, b = [learn.recorder.values[-1][2] for learn in (plain, ours)]
    assert steps == [50]*40+[43]*40+[37]*40+[30]*280
    trained = tracker.table['backpropagated'][-1]
    print(a, b, trained[:wrong].sum()/trained.sum())
    assert trained.sum() == 1200 and trained[:wrong].sum() < .2*trained.sum(), 'by chance it would be 0.4, with a standard error of 0.009'
    assert b > a+3*.014 and b > .8

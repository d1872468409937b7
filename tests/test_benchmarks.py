"The scripts in `benchmarks` still run, in small or on what was run already, and the committed tables are those of the committed runs."
import ast, os, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd, pytest
from fastai_is.bench import markdown, summarise
from fastai_is.data import has_cifar10

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/"benchmarks"/"results"

def run(script, *args):
    "A script in `benchmarks`, as from a shell"
    env = os.environ|{"OMP_NUM_THREADS": "1"}
    r = subprocess.run([sys.executable, "-W", "ignore", f"benchmarks/{script}.py", *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, r.stderr
    return r.stdout

def rows(text): return [l for l in text.splitlines() if l.startswith("|")]

def one_of_each():
    "Numbers of ideas that have each setting at least once: every one of them takes four seconds on a slow machine"
    code = ast.parse((ROOT/"benchmarks"/"ideas.py").read_text(encoding="utf-8"))
    ideas = next(o.value for o in code.body if isinstance(o, ast.Assign) and o.targets[0].id == "IDEAS").values
    keys, chosen = set(), []
    for i, o in enumerate(ideas):
        new = {k.arg for k in o.keywords} if isinstance(o, ast.Call) else {o.id} if isinstance(o, ast.Name) else set()
        if new-keys or not i: chosen.append(i)
        keys |= new
    return chosen

# A quick look: the arguments, the file that comes of it, and how many lines of figures it has at least
SMALL = dict(
    bf16=("--rounds 1 --epochs 2 --n 200", "bf16.md", 15),
    gain=("--data mnist --n 500 --seeds 1", "gain.md", 3),
    gradnorm=("--bs 16 --rounds 1 --loop-rounds 1", "gradnorm.md", 7),
    harmless=("--n 300 --epochs 2 --seeds 2 --bs 32", "harmless.md", 3),
    ideas=(f"--n 300 --epochs 4 --seeds 1 --only {','.join(map(str, one_of_each()))}", "ideas_mnist_300.md", 20),
    planning=("--kinds RandomSubset --epochs 2", "planning.md", 1),
    realised=("--n 500 --seeds 1 --cases 1", "realised.md", 3),
    rivals=("--rounds 1 --steps 4 --widths 2 4 --processor-time", "rivals.md", 100),
    selective=("--rounds 1 --steps 4", "selective.md", 6),
    step_cost=("--rounds 1 --steps 4", "step_cost.md", 11))

@pytest.mark.parametrize("script", SMALL)
def test_a_quick_look(script, tmp_path):
    if script in ("bf16", "rivals") and not has_cifar10(): pytest.skip("there is no CIFAR-10 here")
    if script == "planning" and not Path("/proc/self/clear_refs").exists(): pytest.skip("what a process takes of memory is read from Linux's /proc")
    args, name, least = SMALL[script]
    run(script, *args.split(), "--out", tmp_path)
    figures = [l for l in (tmp_path/name).read_text(encoding="utf-8").splitlines() if re.search(r"\d\.\d|\d{2,}", l)]
    assert len(figures) >= least, figures
    assert not re.search(r"\bnan\b", "\n".join(figures)), figures

def test_every_script_is_tried(): assert {f.stem for f in (ROOT/"benchmarks").glob("*.py")} == {*SMALL, "methods"}

@pytest.mark.parametrize("folder", sorted(f.parent.name for f in RESULTS.glob("*/runs.parquet") if not f.parent.name.endswith("cifar10_methods")))
def test_tables_of_the_benchmark(folder):
    d = pd.read_parquet(RESULTS/folder/"runs.parquet")
    table, n = rows((RESULTS/folder/"table.md").read_text(encoding="utf-8")), int(d.n.iloc[0])
    assert sorted(table) == sorted(rows(markdown(summarise(d), n)))

@pytest.mark.parametrize("path", sorted(f.relative_to(RESULTS).as_posix() for f in RESULTS.rglob("ideas_*.csv")))
def test_tables_of_ideas(path):
    d, text = pd.read_csv(RESULTS/path), (RESULTS/path).with_suffix(".md").read_text(encoding="utf-8")
    n, seeds = (int(re.search(rf"([\d,]+) {o}", text)[1].replace(",", "")) for o in ("training samples", "seeds"))
    first = int(m[1]) if (m := re.search(r"seeds from (\d+) on", text)) else 0
    assert sorted(rows(text)) == sorted(rows(markdown(summarise(d[d.seed.between(first, first+seeds-1)]), n)))

@pytest.mark.parametrize("script,kept,table", (("methods", "cifar10_methods/runs.parquet", "cifar10_methods/table.md"), ("gain", "gain.csv", "gain.md"), ("realised", "realised.csv", "realised.md")))
def test_tables_are_made_anew_without_training(script, kept, table, tmp_path):
    "What was run is not run again: this takes seconds, where training takes hours"
    if script == "methods" and not has_cifar10(): pytest.skip("there is no CIFAR-10 here")
    shutil.copy(RESULTS/kept, tmp_path)
    run(script, "--out", tmp_path)
    assert rows((tmp_path/Path(table).name).read_text(encoding="utf-8")) == rows((RESULTS/table).read_text(encoding="utf-8"))

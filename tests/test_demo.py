"The demo and the command line, on few digits."
import subprocess, sys

import pandas as pd, pytest
import fastai_is.demo as demo
from fastai_is.cli import main
from fastai_is.data import mnist

@pytest.fixture
def few(monkeypatch): monkeypatch.setattr(demo, 'mnist', lambda n=None, data=None: mnist(n=640, data=data))

def test_demo(few, tmp_path, capsys):
    assert main(['demo', '--epochs', '3', '--seed', '1', '--out', str(tmp_path/'new')]) == 0
    out, rows = capsys.readouterr().out, pd.read_csv(tmp_path/'new'/'demo.csv')
    assert (tmp_path/'new'/'demo.png').stat().st_size > 10_000
    for word in ('plain', 'ImportanceCB', 'BatchLossFilter', 'accuracy', 'forwarded / plain', '640 training digits'): assert word in out
    assert rows.groupby('method', sort=False).size().to_dict() == dict(plain=3, ImportanceCB=3, BatchLossFilter=3)
    last = rows.groupby('method').last()
    assert (last.loc['plain', ['forwarded', 'backpropagated']] == 3*640).all()
    assert last.loc['ImportanceCB'].forwarded == last.loc['ImportanceCB'].backpropagated <= 3*640, 'remembered scores cost no forward pass'
    assert last.loc['BatchLossFilter'].forwarded >= last.loc['BatchLossFilter'].backpropagated
    assert (rows.groupby('method').seconds.diff().dropna() > 0).all()

def test_counts_are_the_callbacks_own(few):
    cb = demo.ImportanceCB(keep=1/4, gate=None, seat='batch')
    rows = demo.compare(lambda: demo.mnist(), {'batch':lambda: cb}, epochs=2, quiet=True)
    assert rows.forwarded.iloc[-1] == cb.counts['forwarded'] == 2*640+rows.backpropagated.iloc[-1]
    assert rows.backpropagated.iloc[-1] == cb.counts['backpropagated'] == 2*640/4

def test_summary_is_relative_to_the_first():
    rows = pd.DataFrame(dict(method=['a', 'b'], epoch=1, seconds=[10., 5.], forwarded=[100, 150], backpropagated=[100, 25], accuracy=[.9, .8], valid_loss=[.1, .2]))
    tbl = demo.summarise(rows)
    assert tbl.loc['b'][['seconds / a', 'forwarded / a', 'backpropagated / a']].tolist() == [.5, 1.5, .25]

def test_wrong_arguments(tmp_path):
    assert 'epochs=0' in main(['demo', '--epochs', '0'])
    assert 'MNIST' in main(['demo', '--data', str(tmp_path), '--out', str(tmp_path)])

def test_help_is_quick_and_complete():
    out = subprocess.run([sys.executable, '-X', 'importtime', '-c', 'import fastai_is.cli as c; c.main(["demo", "--help"])'], capture_output=True, text=True)
    for o in ('--data', '--epochs', '--seed', '--out', '--help'): assert o in out.stdout
    assert ' torch\n' not in out.stderr, 'help does not wait for torch'

"MNIST, Fashion-MNIST and CIFAR-10: where they come from, what a batch is, and what happens when data or network are broken."
import functools, gzip, hashlib, http.server, io, os, pickle, random, re, shutil, socket, tarfile, tempfile, threading, time, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

os.environ.setdefault("MPLBACKEND", "agg")
import fastai.callback.progress  # `no_bar`
from fastai.data.external import fastai_cfg
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, TensorImage, TensorImageBW, set_seed
from fasttransform import Transform
import matplotlib.pyplot as plt

from fastai_is import data
from fastai_is.data import ImageTensors, TensorDL, balanced_ids, cifar10, fashion_mnist, has_cifar10, mnist, tensor_dls

ASSETS = Path(data.__file__).parent/"assets"
NOWHERE = "http://127.0.0.1:9/"  # a port that refuses


def use_home(mp, folder):
    "fastai's folders and the temporary one below `folder`, no `FASTAI_IS_DATA`, and no network but this machine."
    (folder/"tmp").mkdir(parents=True)
    mp.setenv("FASTAI_HOME", str(folder/"home"))
    mp.delenv("FASTAI_IS_DATA", raising=False)
    mp.setenv("no_proxy", "*")
    mp.setattr(tempfile, "tempdir", str(folder/"tmp"))
    mp.setattr(data, "_failed", {})
    for o in (data.MNIST, data.FashionMNIST): mp.setattr(o, "mirrors", [NOWHERE])
    mp.setattr(data, "download_url", functools.partial(pytest.fail, "a download of CIFAR-10"))
    fastai_cfg.cache_clear()

@pytest.fixture
def home(tmp_path, monkeypatch):
    use_home(monkeypatch, tmp_path)
    data._say_once.cache_clear()
    yield tmp_path/"home"
    fastai_cfg.cache_clear()

@pytest.fixture(scope="module")
def sample(): return data._mnist_sample()

@pytest.fixture
def dls(sample): return tensor_dls(*sample, data.mnist_stats, n=300, device="cpu")

def toy(n=23, c=3):
    "Images of 2 by 2 pixels that all have the image's id as their value."
    i = torch.arange(n)
    return ImageTensors(i.byte().view(n,1,1,1).repeat(1,1,2,2), i%c, list("abcdefghij"[:c]))

def idx_bytes(t): return bytes([0,0,8,t.ndim]) + b"".join(s.to_bytes(4, "big") for s in t.shape) + t.byte().numpy().tobytes()

def mnist_files(n_train=40, n_valid=20):
    "The content of MNIST's files, had it fewer digits."
    g = torch.Generator().manual_seed(0)
    for part,n in dict(train=n_train, t10k=n_valid).items():
        yield f"{part}-images-idx3-ubyte", idx_bytes(torch.randint(0, 256, (n,28,28), generator=g))
        yield f"{part}-labels-idx1-ubyte", idx_bytes(torch.arange(n)%10)

def write_mnist(root, name="MNIST", **kwargs):
    raw = root/name/"raw"
    raw.mkdir(parents=True)
    for name,content in mnist_files(**kwargs): (raw/name).write_bytes(content)
    return raw

def tiny_learner(dls): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(dls.train_ds.x[0].numel(), dls.c)), metrics=accuracy)


# Tensors, ids and batches

def ids_of(batches): return [xb[:,0,0,0].long().tolist() for xb,_ in batches]

@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_follow_get_idxs(num_workers, drop_last, shuffle):
    dl = TensorDL(toy(), bs=5, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers)
    drawn, get_idxs = [], dl.get_idxs
    dl.get_idxs = lambda: drawn.append(get_idxs()) or drawn[-1]
    for _ in range(2):
        got = ids_of(dl)
        whole = [drawn[-1][i:i+5] for i in range(0, 23, 5)]
        assert got == (whole[:-1] if drop_last else whole)
        assert len(got) == len(dl)
    assert sorted(drawn[0]) == sorted(drawn[1]) == list(range(23))
    assert (drawn[0] != drawn[1]) == shuffle

@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda o: [torch.tensor(i) for i in o], lambda o: iter(o)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_kind_of_ids(kind, num_workers):
    dl = TensorDL(toy(), bs=2, num_workers=num_workers)
    dl.get_idxs = lambda: kind([7,7,1,22,0])
    assert ids_of(dl) == [[7,7],[1,22],[0]]

def test_bs_is_read_when_an_epoch_starts():
    dl = TensorDL(toy(), bs=5, num_workers=0)
    it = iter(dl)
    first = next(it)
    dl.bs = 2
    assert [len(y) for _,y in [first, *it]] == [5,5,5,5,3]
    assert [len(y) for _,y in dl] == [2]*11 + [1]

def test_threads():
    "A batch is made by one thread; ids are drawn, and the rest of the program runs, with as many as before."
    seen,n = [],torch.get_num_threads()
    def look(x:TensorImage):
        seen.append(torch.get_num_threads())
        if len(seen) == 8: raise RuntimeError("planted")
        return x
    dl = TensorDL(toy(), bs=5, num_workers=0, after_batch=[Transform(look)])
    get_idxs = dl.get_idxs
    try:
        torch.set_num_threads(3)
        def drawn():
            assert torch.get_num_threads() == 3
            return get_idxs()
        dl.get_idxs = drawn
        for _ in dl: assert torch.get_num_threads() == 3
        assert seen[1:] == [1]*4
        with pytest.raises(RuntimeError, match="planted"): list(dl)
        assert len(seen) == 8 and torch.get_num_threads() == 3
    finally: torch.set_num_threads(n)

def test_n_and_new():
    dl = TensorDL(toy(), bs=5, n=7, num_workers=0)
    assert ids_of(dl) == [[0,1,2,3,4],[5,6]] and len(dl) == 2
    other = dl.new(bs=20, shuffle=True)
    assert isinstance(other, TensorDL) and [len(y) for _,y in other] == [20,3]

def test_sample_whatever_else_there_is(sample, monkeypatch, tmp_path):
    "`mnist_sample` asks neither the environment nor the network."
    monkeypatch.setenv("FASTAI_IS_DATA", str(tmp_path/"nowhere"))
    monkeypatch.setattr(data, "_find_mnist", None)
    dls = data.mnist_sample(n=300, bs=10, device="cpu")
    ours = sample[0].subset(data.balanced_ids(sample[0].y, 300))
    assert torch.equal(dls.train_ds.ids, ours.ids) and len(dls.valid_ds) == 2000 and dls.bs == 10

def test_same_as_one_by_one(sample):
    "The slow way, which an item transform asks for, gives the very same batches."
    seen = []
    def look(x:TensorImage): return seen.append(1) or x
    fast = tensor_dls(*sample, data.mnist_stats, n=50, bs=16, shuffle=False, device="cpu")
    slow = fast.train.new(after_item=[Transform(look)])
    for (xf,yf),(xs,ys) in zip(fast.train, slow, strict=True):
        assert torch.equal(xf, xs) and torch.equal(yf, ys) and type(xf) is type(xs) and type(yf) is type(ys)
    assert len(seen) >= 50

def test_shuffle_and_drop_last_defaults():
    def dls(**kwargs): return tensor_dls(toy(), toy(), ([0.5],[0.5]), device="cpu", **kwargs)
    assert dls(bs=5).train.drop_last and not dls(bs=5).valid.drop_last
    assert not dls(bs=5, shuffle=False).train.drop_last
    assert [len(y) for _,y in dls(bs=50).train] == [23], "the only batch is not dropped"
    assert [len(y) for _,y in dls(bs=5, drop_last=False).train] == [5,5,5,5,3]
    assert dls(bs=5, val_bs=10).valid.bs == 10 and dls(bs=5).valid.bs == 5

def test_bad_tensors():
    x,y = torch.zeros(4,1,2,2, dtype=torch.uint8),torch.zeros(4, dtype=torch.long)
    for a in [(x.float(),y), (x[:,0],y), (x,y[:3]), (x,y,["a"],torch.arange(3))]:
        with pytest.raises(ValueError, match="expected"): ImageTensors(*a, *[["a"]][:len(a)==2])


# Balanced sets

def test_balanced():
    y = torch.randint(0, 10, (2000,), generator=torch.Generator().manual_seed(0))
    for n in (10, 25, 500):
        ids = balanced_ids(y, n)
        assert len(ids.unique()) == len(ids) == n and torch.equal(ids, ids.sort().values)
        counts = y[ids].bincount(minlength=10)
        assert counts.max()-counts.min() == (n%10>0)
    assert torch.equal(balanced_ids(y, 2000), torch.arange(2000)), "all of them, though the classes differ in size"
    assert len(balanced_ids(y, 1990)) == 1990

def test_balanced_is_seeded():
    y = torch.arange(1000)%10
    torch.manual_seed(0); a = balanced_ids(y, 100)
    torch.manual_seed(1); b = balanced_ids(y, 100)
    assert torch.equal(a, b)
    assert not torch.equal(a, balanced_ids(y, 100, seed=1))
    assert set(a.tolist()) < set(balanced_ids(y, 137).tolist())

def test_balanced_leaves_global_randomness_alone():
    before = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    balanced_ids(torch.arange(1000)%10, 105)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1]==np.random.get_state()[1]).all() and before[2]==random.getstate()

@pytest.mark.parametrize("kwargs", [
    dict(n=9), dict(n=0), dict(n=-1), dict(n=10_001), dict(n=2.5), dict(n=100.), dict(n=True), dict(n="100"),
    dict(bs=0), dict(bs=None), dict(bs=1.5), dict(val_bs=0), dict(num_workers=-1), dict(n=100, seed=-1), dict(n=100, seed=0.5)])
def test_bad_arguments(home, kwargs):
    name = list(kwargs)[-1]
    with pytest.raises(ValueError, match=re.escape(f"{name}={kwargs[name]!r}: expected a whole number")): mnist(download=False, **kwargs)

def test_unknown_argument(home):
    with pytest.raises(TypeError, match="batch_size"): mnist(download=False, batch_size=3)

def test_numpy_integers(home): assert len(mnist(bs=np.int64(8), n=np.int64(20), download=False).train_ds) == 20


# What fastai makes of them

def test_types_and_normalisation(dls, sample):
    assert list(dls.vocab) == list("0123456789") and dls.c == 10 and dls.n_inp == 1
    for dl in dls:
        xb,yb = dl.one_batch()
        assert type(xb) is TensorImageBW and type(yb) is TensorCategory and xb.dtype == torch.float32 and yb.dtype == torch.long
        assert xb.shape == (128,1,28,28) and yb.shape == (128,)
    x,y = dls.valid.one_batch()
    assert torch.allclose(x.as_subclass(torch.Tensor), (sample[1].x[:128]/255-0.1307)/0.3081, atol=1e-5)
    assert torch.equal(y.as_subclass(torch.Tensor), sample[1].y[:128])
    back = dls.valid.decode((x,y))[0]
    assert (back.as_subclass(torch.Tensor)-sample[1].x[:128].long()).abs().max() <= 1

def test_mean_and_std(sample):
    x = sample[0].x.float()/255
    assert abs(x.mean()-0.1307) < 0.002 and abs(x.std()-0.3081) < 0.002

def test_batch_tfms(sample):
    seen = []
    class Shift(Transform):
        order,split_idx = 20,0
        def encodes(self, x:TensorImage):
            seen.append((x.dtype, float(x.max())))
            return x.roll(1, -1)
    def dls(tfms): return tensor_dls(*sample, data.mnist_stats, n=50, bs=50, shuffle=False, batch_tfms=tfms, device="cpu")
    plain,shifted = dls(None),dls([Shift()])
    assert torch.equal(shifted.train.one_batch()[0], plain.train.one_batch()[0].roll(1, -1))
    assert torch.equal(shifted.valid.one_batch()[0], plain.valid.one_batch()[0])
    assert all(d == torch.float32 and 0 < m <= 1 for d,m in seen)

def test_device(sample):
    "Bytes, and what normalises them, go to the device: `meta` stands in for a GPU."
    dls = tensor_dls(*sample, data.mnist_stats, n=50, bs=50, device="meta")
    assert all(o.device.type == "meta" for dl in dls for o in dl.one_batch())

def test_same_data_set_twice():
    "Training and validation images may be one object, each with its own split."
    ds = toy()
    dls = tensor_dls(ds, ds, ([0.5],[0.5]), device="cpu")
    assert (dls.train_ds.split_idx, dls.valid_ds.split_idx, ds.split_idx) == (0,1,None)

def test_learner(dls, tmp_path):
    set_seed(0)
    learn = tiny_learner(dls)
    learn.path = tmp_path
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 0.1)
    assert learn.recorder.values[-1][-1] > 0.4
    dls.show_batch(max_n=4); dls.train.show_batch(unique=True, max_n=4); dls.valid.show_batch(max_n=4)
    with learn.no_bar():
        learn.show_results(max_n=4)
        preds,targs = learn.get_preds()
        assert preds.shape == (2000,10) and torch.equal(targs.as_subclass(torch.Tensor), dls.valid_ds.y)
        interp = ClassificationInterpretation.from_learner(learn)
        interp.plot_top_losses(4)
        assert interp.confusion_matrix().sum() == 2000
        img = dls.valid_ds.x[5]
        want = dls.vocab[preds[5].argmax()]
        for o in (img, img[0], img[0].numpy(), Image.fromarray(img[0].numpy()), dls.valid_ds[5][0]): assert learn.predict(o)[0] == want
        labelled = learn.get_preds(dl=dls.test_dl([dls.valid_ds[i] for i in range(7)]))
        assert torch.equal(labelled[1].as_subclass(torch.Tensor), dls.valid_ds.y[:7]) and torch.allclose(labelled[0], preds[:7], atol=1e-5)
        with pytest.raises(ValueError, match="expected whole numbers"): learn.predict(torch.rand(1,28,28))
        learn.export("small.pkl")
        assert len(dls.train_ds) == 300 and (tmp_path/"small.pkl").stat().st_size < 200_000, "the images are not exported"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = load_learner(tmp_path/"small.pkl")
        with again.no_bar(): assert again.predict(img)[0] == want
    plt.close("all")

def test_show_batch_shows_labels(dls):
    plt.close("all")
    set_seed(1)
    b = dls.valid.one_batch()
    dls.valid.show_batch(b, max_n=4)
    assert [a.get_title() for a in plt.gcf().axes] == [dls.vocab[i] for i in b[1][:4]]
    plt.close("all")

def test_pickle(dls):
    again = pickle.loads(pickle.dumps(dls))
    assert torch.equal(again.valid.one_batch()[0], dls.valid.one_batch()[0]) and list(again.vocab) == list(dls.vocab)


# The sample

def test_sample(sample):
    for ds,n in zip(sample, (10_000,2_000), strict=True):
        assert ds.x.shape == (n,1,28,28) and ds.x.dtype == torch.uint8 and ds.x.max() == 255 and ds.name == "MNIST sample"
        assert ds.y.bincount().tolist() == [n//10]*10
        assert len(ds.ids.unique()) == n and torch.equal(ds.ids, ds.ids.sort().values)

def test_sample_file():
    f,text = ASSETS/"mnist_sample.npz",(ASSETS/"mnist_sample.md").read_text(encoding="utf-8")
    assert f.stat().st_size < 3e6 and f"{f.stat().st_size:,} bytes" in text
    assert hashlib.sha256(f.read_bytes()).hexdigest() in text
    for k,v in np.load(f).items(): assert f"`{k}` | `{hashlib.sha256(v.tobytes()).hexdigest()}`" in text
    assert "LeCun" in text and "CC BY-SA" in text

def test_sample_is_mnist(sample):
    root = os.environ.get("FASTAI_IS_DATA")
    if not root or not (Path(root)/"MNIST"/"raw").is_dir(): pytest.skip("needs the full MNIST in FASTAI_IS_DATA")
    for part,full in zip(sample, data._read_mnist(root), strict=True):
        assert torch.equal(part.x, full.x[part.ids]) and torch.equal(part.y, full.y[part.ids])
        assert torch.equal(part.ids, balanced_ids(full.y, len(part)))

def test_full_mnist():
    root = os.environ.get("FASTAI_IS_DATA")
    if not root or not (Path(root)/"MNIST"/"raw").is_dir(): pytest.skip("needs the full MNIST in FASTAI_IS_DATA")
    dls = mnist(n=1005)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.name) == (1005, 10_000, "MNIST")
    full = mnist().train_ds
    assert len(full) == 60_000 and torch.equal(full.x[dls.train_ds.ids], dls.train_ds.x)


# Where the digits come from

def test_order_of_places(home, monkeypatch, tmp_path, capsys):
    write_mnist(home/"data", n_train=30)
    assert len(mnist(download=False).train_ds) == 30
    write_mnist(tmp_path/"env", n_train=50)
    monkeypatch.setenv("FASTAI_IS_DATA", str(tmp_path/"env"))
    assert len(mnist(download=False).train_ds) == 50
    write_mnist(tmp_path/"arg", n_train=70)
    assert len(mnist(data=tmp_path/"arg").train_ds) == len(mnist(data=str(tmp_path/"arg")).train_ds) == 70
    monkeypatch.setenv("FASTAI_IS_DATA", str(tmp_path/"nothing here"))
    assert len(mnist(download=False).train_ds) == 30
    assert capsys.readouterr().out == ""

def test_sample_comes_last_with_a_notice(home, capsys):
    dls = mnist()
    out = capsys.readouterr().out
    assert len(dls.train_ds) == 10_000 and len(dls.valid_ds) == 2_000 and dls.name == "MNIST sample"
    assert out.count("\n") == 1 and "sample of 10,000 training and 2,000 validation" in out and "refused" in out
    assert not list(home.rglob("fastai_is_*")), "nothing stays behind"

def test_data_without_mnist(home, tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST/raw"): mnist(data=tmp_path)

def cut(raw, name): (raw/name).write_bytes((raw/name).read_bytes()[:-1])
def lengthen(raw, name): (raw/name).write_bytes((raw/name).read_bytes()+b"0")
def empty(raw, name): (raw/name).write_bytes(b"")
def remove(raw, name): (raw/name).unlink()
def page(raw, name): (raw/name).write_bytes(b"<html>404</html>")

@pytest.mark.parametrize("harm", [cut, lengthen, empty, remove, page])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_broken_files_are_passed_over(home, monkeypatch, tmp_path, harm, name):
    monkeypatch.setenv("FASTAI_IS_DATA", str(tmp_path/"env"))
    harm(write_mnist(tmp_path/"env"), name)
    write_mnist(home/"data", n_train=30)
    with pytest.warns(UserWarning, match="not whole"): dls = mnist(download=False)
    assert len(dls.train_ds) == 30

def test_images_and_labels_of_another_number(home, tmp_path):
    raw = write_mnist(tmp_path/"a", n_train=40)
    (raw/"train-labels-idx1-ubyte").write_bytes(idx_bytes(torch.arange(39)%10))
    with pytest.warns(UserWarning, match="not whole"), pytest.raises(FileNotFoundError): mnist(data=tmp_path/"a")


# The network

class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture
def server(tmp_path):
    "A mirror on this machine: its folder and its address."
    folder = tmp_path/"mirror"
    folder.mkdir()
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{s.server_port}/"
    s.shutdown(); s.server_close()

@pytest.fixture
def silent():
    "The address of a server that accepts, and never says a word; with a `start` it says that, and no more."
    socks = []
    def make(start=b""):
        s = socket.create_server(("127.0.0.1", 0))
        socks.append(s)
        def answer():
            while True:
                try: c,_ = s.accept()
                except OSError: return
                socks.append(c)
                if start: c.recv(9999); c.sendall(start)
        threading.Thread(target=answer, daemon=True).start()
        return f"http://127.0.0.1:{s.getsockname()[1]}/"
    yield make
    for s in socks: s.close()

def fill_mirror(monkeypatch, folder, name="MNIST", **kwargs):
    "The archives of `name` in `folder`, and torchvision's checksums made to match."
    res = []
    for f,content in mnist_files(**kwargs):
        b = gzip.compress(content)
        (folder/f"{f}.gz").write_bytes(b)
        res.append((f"{f}.gz", hashlib.md5(b).hexdigest()))
    monkeypatch.setattr(getattr(data, name), "resources", res)

def test_download(home, monkeypatch, server, capsys):
    folder,url = server
    fill_mirror(monkeypatch, folder)
    monkeypatch.setattr(data.MNIST, "mirrors", [NOWHERE, url])
    assert len(mnist().train_ds) == 40
    assert "sample" not in capsys.readouterr().out
    shutil.rmtree(folder)
    assert len(mnist(download=False).train_ds) == 40, "kept for the next time"
    assert {f.name for f in (home/"data"/"MNIST"/"raw").iterdir()} == {n for n,_ in mnist_files()}
    assert not list(home.rglob("fastai_is_*"))

def test_download_replaces_broken_files(home, monkeypatch, server):
    cut(write_mnist(home/"data"), "train-images-idx3-ubyte")
    fill_mirror(monkeypatch, server[0], n_train=60)
    monkeypatch.setattr(data.MNIST, "mirrors", [server[1]])
    with pytest.warns(UserWarning, match="not whole"): assert len(mnist().train_ds) == 60
    assert len(mnist(download=False).train_ds) == 60

def test_download_with_a_wrong_checksum(home, monkeypatch, server, capsys):
    fill_mirror(monkeypatch, server[0])
    f = server[0]/"t10k-labels-idx1-ubyte.gz"
    f.write_bytes(f.read_bytes()[:-1])
    monkeypatch.setattr(data.MNIST, "mirrors", [server[1]])
    assert mnist().name == "MNIST sample"
    assert "corrupted" in capsys.readouterr().out
    assert not (home/"data"/"MNIST").exists()

@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc"], ids=["silent", "stalls"])
def test_silent_network_is_given_up(home, monkeypatch, silent, capsys, start):
    monkeypatch.setattr(data, "_silence", 1)
    monkeypatch.setattr(data.MNIST, "mirrors", [silent(start)]*2)
    timeout,began = socket.getdefaulttimeout(),time.monotonic()
    assert mnist().name == "MNIST sample"
    assert 0.9 < time.monotonic()-began < 8
    assert "nothing arrived for 1 s" in capsys.readouterr().out
    began = time.monotonic()
    assert mnist().name == "MNIST sample"
    assert time.monotonic()-began < 0.9, "not tried twice"
    assert socket.getdefaulttimeout() == timeout
    assert not (home/"data"/"MNIST").exists()

def test_silent_name_server_is_given_up(home, monkeypatch, capsys):
    "Which no time limit of sockets covers."
    stop = threading.Event()
    monkeypatch.setattr(data, "_silence", 1)
    monkeypatch.setattr(data.MNIST, "mirrors", ["http://mirror.invalid/"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: stop.wait(30) and [])
    began = time.monotonic()
    assert mnist().name == "MNIST sample"
    assert time.monotonic()-began < 8
    stop.set()
    assert "nothing arrived" in capsys.readouterr().out

def test_slow_is_not_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_silence", 1)
    def drip():
        for i in range(6):
            time.sleep(0.4)
            (tmp_path/f"{i}").write_bytes(b"a")
        return "all"
    assert data._patiently(drip, tmp_path) == "all"

def test_ten_seconds(): assert data._silence == 10

def test_no_place_to_write(home, monkeypatch, tmp_path, capsys):
    "A home that is a file: what is written goes to a temporary folder, and if there is none, the sample is used."
    home.write_text("not a folder")
    own = data._own_folders()
    assert own == [Path(tempfile.gettempdir())/own[0].name] and data._writable() == own[0]
    monkeypatch.setattr(data, "_own_folders", lambda: [home/"data"])
    assert mnist().name == "MNIST sample"
    assert "Not" in capsys.readouterr().out


# Fashion-MNIST

def test_fashion_mnist(home, monkeypatch, tmp_path):
    "Read where torchvision keeps it, never MNIST in its place, with the names of clothes"
    write_mnist(home/"data", n_train=30)
    write_mnist(home/"data", name="FashionMNIST", n_train=50)
    dls = fashion_mnist(download=False)
    assert len(dls.train_ds) == 50 and len(mnist(download=False).train_ds) == 30 and dls.name == "Fashion-MNIST"
    assert dls.vocab[9] == "Ankle boot" and dls.c == 10
    raw = write_mnist(tmp_path/"arg", name="FashionMNIST", n_train=70)
    assert len(fashion_mnist(data=tmp_path/"arg").train_ds) == 70
    cut(raw, "train-images-idx3-ubyte")
    with pytest.warns(UserWarning, match="FashionMNIST in .* is not whole"), pytest.raises(FileNotFoundError, match="FashionMNIST/raw"): fashion_mnist(data=tmp_path/"arg")

def test_fashion_mnist_download(home, monkeypatch, server):
    folder,url = server
    fill_mirror(monkeypatch, folder, "FashionMNIST")
    monkeypatch.setattr(data.FashionMNIST, "mirrors", [url])
    assert len(fashion_mnist().train_ds) == 40
    shutil.rmtree(folder)
    assert len(fashion_mnist(download=False).train_ds) == 40, "kept for the next time"

def test_no_fashion_mnist(home, tmp_path):
    "No digits in the place of clothes: an error that says why, and what to do"
    write_mnist(home/"data")
    with pytest.raises(FileNotFoundError, match="refused.*FashionMNIST/raw.*FASTAI_IS_DATA"): fashion_mnist()
    with pytest.raises(FileNotFoundError, match="download=False"): fashion_mnist(download=False)
    with pytest.raises(FileNotFoundError, match="FashionMNIST/raw"): fashion_mnist(data=tmp_path)


# CIFAR-10

def cifar_files(n, kind="png"):
    rng = np.random.default_rng(0)
    for split,k in n.items():
        for i in range(k):
            c,b = "zebra ant bee cat dog eel fox gnu hen owl".split()[i%10],io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32,32,3), dtype=np.uint8)).save(b, "jpeg" if kind=="jpg" else kind)
            yield f"cifar10/{split}/{c}/{i//10:04d}.{kind}",b.getvalue()

@pytest.fixture
def small(home, monkeypatch):
    "As if CIFAR-10 had 40 training and 20 test images."
    n = dict(train=40, test=20)
    monkeypatch.setattr(data, "_cifar_n", n)
    return n

def write_tgz(f, files):
    f.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(f, "w:gz") as tar:
        for name,b in files:
            m = tarfile.TarInfo(name)
            m.size = len(b)
            tar.addfile(m, io.BytesIO(b))
    return f

def write_folder(root, files):
    for name,b in files:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(b)

def test_cifar_archive(small, home, tmp_path, monkeypatch):
    files = list(cifar_files(small))
    extra = [("cifar10/labels.txt",b"ant"), ("cifar10/train/ant/._0000.png",b"junk"),
             ("../../escaped.txt",b"no"), (f"{tmp_path}/absolute.txt",b"no")]
    src = write_tgz(tmp_path/"env"/"cifar10.tgz", files+extra)
    monkeypatch.setenv("FASTAI_IS_DATA", str(src.parent))
    dls = cifar10(bs=8)
    assert len(dls.train_ds) == 40 and len(dls.valid_ds) == 20 and dls.name == "CIFAR-10"
    assert list(dls.vocab) == sorted("zebra ant bee cat dog eel fox gnu hen owl".split())
    assert dls.train_ds.y[:10].tolist() == list(range(10)), "classes take turns"
    want = dict(files)
    for i in (0, 13, 39):
        img,y = dls.train_ds[i]
        b = want[f"cifar10/train/{dls.vocab[y]}/{i//10:04d}.png"]
        assert (img.permute(1,2,0).numpy() == np.asarray(Image.open(io.BytesIO(b)))).all()
    xb,yb = dls.one_batch()
    assert type(xb) is TensorImage and xb.shape == (8,3,32,32)
    assert {f.name for f in tmp_path.rglob("*.txt")} == set(), "nothing is written where an archive says"
    assert [f.name for f in src.parent.iterdir()] == ["cifar10.tgz"], "nor beside it"
    monkeypatch.setattr(data, "_decode", functools.partial(pytest.fail, "decoded twice"))
    assert torch.equal(cifar10().train_ds.x, dls.train_ds.x)
    kept, = (home/"data").iterdir()
    assert kept.name.startswith("fastai_is_cifar10_")

def test_cifar_broken_cache_is_made_again(small, home, tmp_path):
    write_tgz(tmp_path/"a"/"cifar10.tgz", cifar_files(small))
    x = cifar10(data=tmp_path/"a").train_ds.x
    kept, = (home/"data").iterdir()
    for content in (b"", b"broken", kept.read_bytes()[:-100]):
        kept.write_bytes(content)
        assert torch.equal(cifar10(data=tmp_path/"a").train_ds.x, x)

def test_cifar_folder_and_order(small, home, tmp_path, monkeypatch):
    assert not has_cifar10()
    write_tgz(home/"archive"/"cifar10.tgz", cifar_files(small, "jpg"))
    assert has_cifar10() and cifar10(download=False).name == "CIFAR-10 (JPEG)"
    write_folder(home/"data", cifar_files(small))
    assert cifar10(download=False).name == "CIFAR-10"
    write_folder(tmp_path/"env", cifar_files(small, "jpg"))
    monkeypatch.setenv("FASTAI_IS_DATA", str(tmp_path/"env"))
    assert has_cifar10(tmp_path/"env") and cifar10(download=False).name == "CIFAR-10 (JPEG)"

def test_cifar_another_archive_is_another(small, tmp_path):
    for k in ("png", "jpg"): write_tgz(tmp_path/k/"cifar10.tgz", cifar_files(small, k))
    assert [cifar10(data=tmp_path/k).name for k in ("png","jpg","png")] == ["CIFAR-10","CIFAR-10 (JPEG)","CIFAR-10"]

def break_end(f): f.write_bytes(f.read_bytes()[:-2000])
def break_start(f): f.write_bytes(b"<html>404</html>")
def break_middle(f):
    b = bytearray(f.read_bytes())
    b[len(b)//2:len(b)//2+500] = bytes(500)
    f.write_bytes(b)

@pytest.mark.parametrize("harm", [break_end, break_start, break_middle])
def test_cifar_broken_archive(small, home, tmp_path, harm):
    harm(write_tgz(tmp_path/"a"/"cifar10.tgz", cifar_files(small)))
    with pytest.warns(UserWarning, match="not whole"), pytest.raises(FileNotFoundError, match="not whole"): cifar10(data=tmp_path/"a")
    assert not (home/"data").exists() or not list((home/"data").iterdir())

def test_cifar_partial_folder(small, tmp_path):
    write_folder(tmp_path/"a", list(cifar_files(small))[:-1])
    with pytest.warns(UserWarning, match="not whole.*59 images"), pytest.raises(FileNotFoundError): cifar10(data=tmp_path/"a")

def test_cifar_without_a_place_to_write(small, tmp_path, monkeypatch):
    write_tgz(tmp_path/"a"/"cifar10.tgz", cifar_files(small))
    (tmp_path/"file").write_text("")
    monkeypatch.setattr(data, "_own_folders", lambda: [tmp_path/"file"/"data"])
    with pytest.warns(UserWarning, match="could not keep"): assert len(cifar10(data=tmp_path/"a").train_ds) == 40

def test_cifar_missing(home, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_IS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as e: cifar10(download=False)
    for o in (tmp_path/"cifar10.tgz", home/"data"/"cifar10", home/"archive"/"cifar10.tgz", "not tried", "FASTAI_IS_DATA"):
        assert str(o) in str(e.value)

def test_cifar_download(small, home, tmp_path, monkeypatch):
    src = write_tgz(tmp_path/"mirror"/"cifar10.tgz", cifar_files(small))
    monkeypatch.setattr(data, "download_url", lambda url, dest, timeout: Path(shutil.copy(src, dest)))
    with pytest.raises(FileNotFoundError, match="checksum"): cifar10()
    monkeypatch.setattr(data, "_failed", {})
    monkeypatch.setattr(data, "check", lambda *args: True)
    assert len(cifar10().train_ds) == 40
    monkeypatch.setattr(data, "download_url", functools.partial(pytest.fail, "downloaded twice"))
    assert len(cifar10(download=False).train_ds) == 40 and has_cifar10()
    kept, = (home/"data").iterdir()
    assert kept.name == data._kept_name(data._official())

def test_cifar_silent_network(home, tmp_path, monkeypatch, silent):
    from fastdownload.core import download_url
    url = silent()
    monkeypatch.setattr(data, "_silence", 1)
    monkeypatch.setattr(data, "download_url", lambda _, *args, **kwargs: download_url(f"{url}cifar10.tgz", *args, **kwargs))
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="a download \\(.*(nothing arrived|timed out)"): cifar10()
    assert time.monotonic()-began < 8

@pytest.fixture(scope="module")
def real_cifar(tmp_path_factory):
    root = os.environ.get("FASTAI_IS_DATA")
    if not root or not has_cifar10(root): pytest.skip("needs CIFAR-10 in FASTAI_IS_DATA")
    folder = tmp_path_factory.mktemp("cifar")
    with pytest.MonkeyPatch.context() as mp:
        use_home(mp, folder/"own")
        yield root
    fastai_cfg.cache_clear()
    shutil.rmtree(folder)

def test_real_cifar(real_cifar):
    dls = cifar10(data=real_cifar, bs=64, device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (50_000, 10_000, 10)
    assert list(dls.vocab) == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert dls.train_ds.y.bincount().tolist() == [5000]*10 and dls.valid_ds.y.bincount().tolist() == [1000]*10
    x = dls.train_ds.x.float()/255
    for got,want in zip((x.mean((0,2,3)), x.std((0,2,3))), data.cifar_stats): assert torch.allclose(got, torch.tensor(want), atol=0.01)
    xb,yb = dls.one_batch()
    assert type(xb) is TensorImage and xb.shape == (64,3,32,32) and type(yb) is TensorCategory

def test_real_cifar_n(real_cifar):
    dls = cifar10(data=real_cifar, n=200, device="cpu")
    assert dls.train_ds.y.bincount().tolist() == [20]*10
    learn = tiny_learner(dls)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
        learn.show_results(max_n=4)
        assert learn.predict(Image.new("RGB", (32,32)))[0] in dls.vocab
    plt.close("all")
    with pytest.raises(ValueError, match="n=50001"): cifar10(data=real_cifar, n=50_001)

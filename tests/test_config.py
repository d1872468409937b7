"settings.ini and pyproject.toml say the same, and a built wheel holds the whole package."
import configparser, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest
from nbdev.config import get_config, nbdev_defaults, read_version
from packaging.requirements import Requirement

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10, where pytest brings it

ROOT = Path(__file__).resolve().parent.parent
INI_LICENSE = {"Apache-2.0": "apache2"}


def read_toml(): return tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))

def read_ini():
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])

def toml_as_ini():
    "What pyproject.toml says, in settings.ini's words."
    p, c = read_toml()["project"], get_config(ROOT)
    def classifier(start): return " ".join(o.removeprefix(start) for o in p["classifiers"] if o.startswith(start))
    return dict(
        repo=c.repo or p["name"], lib_name=p["name"], title=c.title, version=read_version(ROOT/p["name"]), description=p["description"],
        min_python=p["requires-python"].removeprefix(">="), license=INI_LICENSE[p["license"]], keywords=" ".join(p["keywords"]),
        author=", ".join(a["name"] for a in p["authors"]), author_email=", ".join(a.get("email", "") for a in p["authors"]),
        user=c.user, git_url=c.git_url, doc_host=c.doc_host, doc_baseurl=c.doc_baseurl if c.doc_host else "",
        status=classifier("Development Status :: ").split(" - ")[0], audience=classifier("Intended Audience :: "),
        language=classifier("Natural Language :: "), requirements=" ".join(p["dependencies"]),
        **{f"{extra}_requirements": " ".join(rs) for extra, rs in p["optional-dependencies"].items()},
        console_scripts="\n".join(f"{k}={v}" for k, v in p["scripts"].items()),
        # nbdev's own settings, read as nbdev reads them. What neither file states has nbdev's default.
        **{k: str(c.d[k]) for k in [*nbdev_defaults, "lib_path"] if k in {*read_toml()["tool"]["nbdev"], *read_ini()}})

def comparable(key, text):
    return {str(Requirement(r)) for r in text.split()} if key.endswith("requirements") else " ".join(text.split())


@pytest.mark.parametrize("key", sorted({*toml_as_ini(), *read_ini()}))
def test_settings_agree(key):
    toml, ini = toml_as_ini(), read_ini()
    assert key in toml, f"settings.ini states {key!r}, which is compared with nothing: add it to toml_as_ini"
    assert comparable(key, ini.get(key, "")) == comparable(key, toml[key])


def test_readme_line_is_what_ci_runs():
    line = "pip install -e '.[dev]' && pytest"
    for f in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        assert line in (ROOT/f).read_text(encoding="utf-8").splitlines(), f"{f} lacks the line: {line}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy, since a build leaves build/ and *.egg-info where it runs."
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("dist")
    for f in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT/f, src)
    shutil.copytree(ROOT/"fastai_is", src/"fastai_is", ignore=shutil.ignore_patterns("__pycache__"))
    r = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, src], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    with zipfile.ZipFile(*out.glob("*.whl")) as z: yield z

def test_wheel_holds_every_file(wheel):
    pkg = ROOT/"fastai_is"
    files = [*pkg.rglob("*.py"), *(f for f in (pkg/"assets").rglob("*") if f.is_file())]
    want = {f.relative_to(ROOT).as_posix() for f in files}
    have = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert have == want, f"missing: {sorted(want - have)}, not in the tree: {sorted(have - want)}"

def read_meta(wheel, name):
    path, = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()

def test_wheel_metadata(wheel):
    entry_points = configparser.ConfigParser()
    entry_points.read_string(read_meta(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"fastai-is": "fastai_is.cli:main"}
    assert dict(entry_points["nbdev"]) == {"fastai_is": "fastai_is._modidx:d"}
    meta = read_meta(wheel, "METADATA").splitlines()
    for line in (f"Version: {read_ini()['version']}", "License-Expression: Apache-2.0", "License-File: LICENSE"): assert line in meta

"""Files of somebody else: nothing in them runs, and what is not what the library wrote is refused by its own errors."""

import ast
import errno
import grp
import io
import json
import os
import pickle
import pwd
import random
import subprocess
from pathlib import Path

import arviz
import numpy as np
import pyro
import pytest
import torch
import xarray
from torch import nn

import pyro_elbo as pe
from pyro_elbo.compile import store
from pyro_elbo.errors import CheckpointError, PyroElboError
from pyro_elbo.files import read_file
from tests.support.made import exact, exported, fitted, terms
from tests.support.small_programs import Guide, model, shared
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

X = torch.linspace(-2.0, 2.0, 24)
QUIET = {"progress": False}


class Bomb:
    """What makes a folder when a pickle is read with trust."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def fit(**options):
    pyro.clear_param_store()
    return pe.fit(model, Guide(), X, **{"max_epochs": 1, "batch_size": 12, **QUIET} | options)


def sweep(folder):
    return pe.sweep(lambda beta: terms(), [1.0], num_samples=1, dir=folder, **QUIET)


def calibrate(folder):
    sizes = {"num_simulations": 20, "num_draws": 19, **QUIET}
    return pe.simulation_based_calibration(shared, exact, torch.zeros(4), dir=folder, **sizes)


def saved(folder):
    fit().save(folder / "fit")
    return folder / "fit"


def checkpoint(folder):
    fit(dir=folder)
    return folder / "last.ckpt"


def point(folder):
    sweep(folder)
    return folder / "beta-1.0.pt"


def simulation(folder):
    calibrate(folder)
    return folder / "simulation-000003.pt"


READERS = {  # what writes a file, and what reads it again
    "load": (saved, lambda folder: pe.load(folder / "fit", model, Guide())),
    "resume": (checkpoint, lambda folder: fit(dir=folder, resume=True, max_epochs=2)),
    "sweep": (point, sweep),
    "calibration": (simulation, calibrate),
}


def as_pickle(bomb, content):
    return pickle.dumps(bomb)


def as_torch_file(bomb, content):
    return written(bomb)


def as_old_torch_file(bomb, content):
    return written(bomb, _use_new_zipfile_serialization=False)


def inside_of_what_was_written(bomb, content):
    return written(content | {next(iter(content)): [bomb]})


def as_another_key(bomb, content):
    return written(content | {"more": {"deep": (bomb,)}})


def as_numpy_file(bomb, content):
    path = bomb.marker + ".npz"
    np.savez(path, x=np.array([bomb], dtype=object))
    with open(path, "rb") as file:
        return file.read()


def as_script(bomb, content):
    path = bomb.marker + ".script"
    torch.jit.save(torch.jit.trace(nn.Identity(), torch.zeros(1)), path)
    with open(path, "rb") as file:
        return file.read()


def written(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


DISGUISES = [
    as_pickle,
    as_torch_file,
    as_old_torch_file,
    inside_of_what_was_written,
    as_another_key,
    as_numpy_file,
    as_script,
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("reader", READERS)
def test_a_file_with_code_is_refused_and_the_code_does_not_run(reader, tmp_path):
    write, read = READERS[reader]
    path = write(tmp_path / "folder" if reader != "load" else tmp_path)
    read(path.parent)
    content, marker = torch.load(path, weights_only=True), tmp_path / "marker"
    for disguise in DISGUISES:
        path.write_bytes(disguise(Bomb(marker), content))
        with pytest.raises(CheckpointError, match=path.name):
            read(path.parent)
        assert not marker.exists(), disguise.__name__


def test_the_code_would_run_if_the_file_were_trusted(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def flipped(content, copies=200):
    """Copies of a file, one to eight of whose bits have changed."""
    draw = random.Random(0)
    for _ in range(copies):
        copy = bytearray(content)
        for _ in range(draw.choice((1, 1, 8))):
            copy[draw.randrange(len(copy))] ^= 1 << draw.randrange(8)
        yield bytes(copy)


def same(found, expected):
    """Return whether tensors and plain values are equal, NaN too."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], x) for name, x in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if torch.is_tensor(expected):
        equal = (found == expected) | ((found != found) & (expected != expected))
        return (found.dtype, found.shape) == (expected.dtype, expected.shape) and bool(equal.all())
    return found == expected or found != found


@pytest.mark.parametrize("reader", READERS)
def test_a_file_with_flipped_bits_is_refused_by_name_or_read_as_it_was(reader, tmp_path):
    write, read = READERS[reader]
    path = write(tmp_path / "folder" if reader != "load" else tmp_path)
    whole = path.read_bytes()
    expected, refusals = read_file(path, (), "file"), []
    for copy in flipped(whole):
        path.write_bytes(copy)
        try:
            assert same(read_file(path, (), "file"), expected)
        except CheckpointError as error:
            refusals.append(str(error))
            if len(refusals) < 8:
                with pytest.raises(CheckpointError, match=path.name):
                    read(path.parent)
    assert len(refusals) > 100
    assert all(str(path) in refusal for refusal in refusals)


FOREIGN = (None, "x", -1, [None], {"a": 1}, torch.zeros(2))


@pytest.mark.parametrize("reader", READERS)
def test_plain_values_of_another_kind_are_refused_or_read(reader, tmp_path, untyped):
    """Every part of a file is replaced in turn; what is read all the same is a result like the first."""
    write, read = READERS[reader]
    path = write(tmp_path / "folder" if reader != "load" else tmp_path)
    read(path.parent)
    content = torch.load(path, weights_only=True)
    taken = []
    for name in content:
        for value in FOREIGN:
            torch.save(content | {name: value}, path)
            try:
                read(path.parent)
            except PyroElboError:
                continue
            taken.append((name, value))
    assert len(taken) < len(content) * len(FOREIGN) / 4, taken


WRITERS = {
    "file": lambda path: pe.to_arviz(model, Guide(), X, num_samples=40, file=path),
    "save": lambda path: fitted().save(path),
    "dir": lambda path: fit(dir=path),
    "sweep": sweep,
    "calibration": calibrate,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_target_that_cannot_be_written_is_named_and_no_other_file(writer, tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    targets = {
        "/proc/x.nc": "cannot be written: .*(No such file|denied|permitted)",
        tmp_path / "file" / "x.nc": r"is no folder|holds .* expected|is a file",
        "a" * 300: "cannot be written: File name too long",
        tmp_path / "fifo": "fifo is (no regular file|no folder|a file)",
    }
    for target, words in targets.items():
        with pytest.raises(CheckpointError, match=words) as error:
            WRITERS[writer](target)
        assert str(target) in str(error.value)
        assert "/.x.nc" not in str(error.value), "the name that a file has until it is whole"
    assert (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize("writer", ["sweep", "calibration"])
def test_a_folder_whose_disk_was_full_is_taken_again(writer, tmp_path, monkeypatch):
    """What was left is no result of other settings."""

    def full(handle):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left"):
            WRITERS[writer](tmp_path)
    assert not os.listdir(tmp_path)
    (tmp_path / ".settings.json.x1").write_text("{")  # of a process that was killed
    WRITERS[writer](tmp_path)


def test_attributes_of_a_netcdf_file_are_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = fitted().history.copy(deep=True)
    exported().to_netcdf("data.nc")
    for attribute in ("__import__('os').mkdir('marker')", np.arange(4.0), 3):
        history.attrs["point_estimates"] = history.attrs["units"] = attribute
        history.beta.attrs["targets"] = attribute
        history.to_netcdf("history.nc", engine="h5netcdf")
        with xarray.open_dataset("history.nc", engine="h5netcdf") as file:
            assert isinstance(pe.diagnose(file.load()).summary, str)
        data = arviz.from_netcdf("data.nc")
        for name in ("weights_skipped", "point_estimate", "pareto_k"):
            data["sample_stats"].attrs[name] = attribute
        with pytest.raises(PyroElboError):
            pe.loo(data)
    assert not os.path.exists("marker")


# --- machine code on disk -----------------------------------------------------------------------------------------

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A cache whose entry for SOURCE makes a folder when it is loaded; returns the cache and that folder."""
    cache, marker = tmp_path / "open" / "cache", tmp_path / "marker"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    folder = store._folder()
    code = f'#include <sys/stat.h>\n__attribute__((constructor)) static void run() {{ mkdir("{marker}", 0700); }}'
    key = store._digest([SOURCE, *store._surroundings()])
    library = folder / f"{key}.so"
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=code, text=True, check=True)
    library.with_suffix(".json").write_text(json.dumps({"sha256": store._checksum(library.read_bytes(), {})}))
    return folder, marker


def open_folder(folder, monkeypatch):
    folder.chmod(0o777)


def open_to_the_group(folder, monkeypatch):
    folder.chmod(0o770)


def open_parent(folder, monkeypatch):
    folder.parent.parent.chmod(0o777)


def of_another_user(folder, monkeypatch):
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)


def by_a_link(folder, monkeypatch):
    """The folder's name leads to a place that others can write to."""
    place = folder.parent.parent / "place"
    folder.rename(place)
    place.chmod(0o777)
    folder.symlink_to(place)


def with_another_library(folder, monkeypatch):
    facts = next(folder.glob("*.json"))
    facts.write_text(json.dumps({"sha256": "0" * 64}))


def with_facts_of_another_kind(folder, monkeypatch):
    next(folder.glob("*.json")).write_text('["sha256", {"__reduce__": "os.mkdir"}]')


@pytest.mark.parametrize(
    "distrust",
    [
        open_folder,
        open_to_the_group,
        open_parent,
        of_another_user,
        by_a_link,
        with_another_library,
        with_facts_of_another_kind,
    ],
)
def test_machine_code_that_others_could_have_written_is_not_found(planted, monkeypatch, distrust, caplog):
    folder, marker = planted
    distrust(folder, monkeypatch)
    assert store._find(store._digest([SOURCE, *store._surroundings()])) is None
    assert "others than you" in caplog.text or "damaged" in caplog.text
    assert not marker.exists()


def test_machine_code_with_flipped_bits_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "library").write_bytes(bytes(range(256)))
    facts = {"noise": [["normal", "float32", 12]], "packs": [], "stream": [[3, 0, 4]], "written": [1, 2]}
    store._keep("key", str(tmp_path / "library"), facts)
    assert store._find("key")[1] == facts
    for path in (tmp_path / "pyro_elbo").iterdir():
        whole = path.read_bytes()
        for copy in flipped(whole):
            path.write_bytes(copy)
            found = store._find("key")
            assert found is None or found[1] == facts
        path.write_bytes(whole)


def test_machine_code_is_kept_whatever_the_umask(tmp_path, monkeypatch, caplog):
    """Systems that make a group for each user set it to 002."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new" / "cache"))
    usual = os.umask(0o002)
    try:
        folder = store._folder()
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(usual)
    assert folder is not None
    assert not caplog.text
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.parents[:2])} == {0o700}


def test_only_a_group_of_ones_own_may_write_above_machine_code(planted, monkeypatch, caplog):
    folder, _ = planted
    folder.parent.parent.chmod(0o775)
    user = pwd.getpwuid(os.getuid())
    for name, others, trusted in ((user.pw_name, [], True), (user.pw_name, ["eve"], False), ("staff", [], False)):
        own = grp.struct_group((name, "x", user.pw_gid, others))
        monkeypatch.setattr(grp, "getgrgid", lambda gid, own=own: own)
        assert (store._folder() is not None) == trusted, (name, others)
    assert "chmod go-w" in caplog.text


def test_machine_code_in_a_folder_of_ones_own_is_loaded(planted):
    """Trust is in the folder: whoever can write to it can do what the user can."""
    folder, marker = planted
    folder.parent.parent.chmod(0o1777)  # like /tmp: others make files beside, and cannot rename it
    store.load_library(SOURCE)()
    assert marker.exists()


@pytest.mark.thorough
def test_code_of_others_is_compiled_anew(planted, monkeypatch):
    folder, marker = planted
    open_parent(folder, monkeypatch)
    assert store.load_library(SOURCE)().answer() == 42
    assert not marker.exists()


def test_pickles_are_read_in_one_place():
    """And there without trust; errors of other processes are pickled and read by the same process."""
    readers = {"torch.load", "pickle.load", "pickle.loads", "np.load", "joblib.load", "eval", "exec", "__import__"}
    root = Path(pe.__file__).parent
    calls = {
        (path.name, ast.unparse(node.func))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    assert {call for call in calls if call[1] in readers} == {
        ("files.py", "torch.load"),
        ("parallel.py", "pickle.loads"),
    }

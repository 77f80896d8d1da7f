"""Prepare what all tests share: one thread, a fixed seed, a temporary cache, and fixtures.

The files in this folder test the promises of superclip.py, train.py, data.py and eval.py. They can
be read in this order:

    test_loss, test_model, test_authors                     the method
    test_step                                               one step
    test_tokenizer, test_index, test_images, test_data      the data
    test_scenes                                             the drawn scenes
    test_checkpoint, test_eval                              a model and its scores
    test_defaults, test_run, test_finetune                  whole runs
    test_resume, test_processes                             runs that end early, processes

commands/ tests scripts/, study/ and mistakes of users. pages/ tests the README and docs/. A fork
may delete both, as test_border makes sure.
"""

import gc
import multiprocessing.forkserver
import os
import signal

import pytest
import torch
from children import PRELOAD, ROOT, Children
from material import TINY, png, short_run, small_model, write_checkpoint, write_shards

import data
import train
from common import devices, scenes
from superclip import PRESETS

torch.set_num_threads(1)  # the models are too small for more, and a busy machine makes threads wait
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
gc.freeze()  # garbage collection then skips the half a million objects that were imported


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Put the index cache of shards into a temporary folder, never into the user's home."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seed():
    """Set the seed. Forget the cached order of samples, because a resumed run must compute it by
    itself, as in a new process."""
    torch.manual_seed(0)
    data.epoch_order.cache_clear()


@pytest.fixture(autouse=True)
def smallest(monkeypatch):
    """Make the tiny model smaller in all tests: one block in each tower, and 16 patches."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    """Return each device of this machine, with the settings of a run. `pytest -k cuda` runs only
    the tests on a GPU. Without one it says how many tests there are."""
    devices.prepare_device(request.param)
    return request.param


@pytest.fixture(scope="session")
def device_of_two(device):
    """Return each device that two processes can use. NCCL wants a GPU for each."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return device


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Return a folder with training, validation and bad shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(shards, tmp_path_factory):
    """Return the folder of a short run that nothing has interrupted. No test may write into it."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        train.main(short_run(shards, out))
    return out


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """Return a folder with built-in scenes, a few of each kind. No test may write into it."""
    folder = tmp_path_factory.mktemp("world") / "scenes"
    scenes.make_scenes(folder, train=40, val=12, pictures=4)
    return folder


@pytest.fixture(scope="session")
def server(cache):
    """Start the server from which processes are forked. It imports torch and the project once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()


@pytest.fixture
def children(server, tmp_path):
    """Return an object that starts processes (children.py). End them after the test."""
    children = Children(tmp_path)
    yield children
    children.end()


@pytest.fixture
def checkpoint(tmp_path):
    """Return a checkpoint of a small model with random weights."""
    return write_checkpoint(tmp_path / "model.pt", small_model())


@pytest.fixture
def folders(tmp_path):
    """Return a folder that holds a folder for each of three colours, with four pictures in each."""
    for c, name in enumerate(("red", "green", "blue")):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for i in range(4):
            (folder / f"{i}.png").write_bytes(png(name, [c, i]))
    return tmp_path / "classes"

"""What all tests share: one thread, a fixed seed, a cache of their own.

This folder proves what superclip.py, train.py, data.py and eval.py promise. Read it in the order of
the method: test_loss, test_model, test_authors; one step, test_step; the data, test_tokenizer,
test_index, test_images, test_data; a model and its scores, test_checkpoint and test_eval; then
whole runs, from test_run to test_processes, and test_gpu. commands/ and pages/ hold the tests of
scripts/, study/, the README and docs/.
"""

import gc
import multiprocessing.forkserver
import os
import shutil
import signal

import pytest
import torch
from children import PRELOAD, ROOT, Children
from material import TINY, png, short_run, small_model, write_checkpoint, write_shards

import data
import scenes
import train
from superclip import PRESETS

torch.set_num_threads(1)  # the models are too small for more, and a busy machine makes threads wait
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that a test starts
gc.freeze()  # a search for garbage skips the half a million objects that were imported


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The index cache of shards goes to a temporary folder, never into the user's home. At the end,
    loading processes of runs that have failed are killed, because they ignore other signals."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(autouse=True)
def seed_and_signals():
    """A command leaves its signal handlers behind. And a resumed run must find the order of samples
    by itself, as in a new process."""
    torch.manual_seed(0)
    data.epoch_order.cache_clear()
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def smallest(monkeypatch):
    """In all tests the tiny model is smaller still: one block in each tower, 16 patches."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with training, validation and bad shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(shards, tmp_path_factory):
    """The folder of a short run that nothing has interrupted. No test may write into it."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        train.main(short_run(shards, out))
    return out


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """Built-in scenes, but few of each kind. No test may write into it."""
    folder = tmp_path_factory.mktemp("world") / "scenes"
    scenes.make_scenes(folder, train=40, val=12, pictures=4)
    return folder


@pytest.fixture(scope="session")
def server(cache):
    """The server from which processes are forked. It imports torch and the project once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def early_server(request):
    """If any test needs the server, it imports torch while the first tests run."""
    if any("server" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("server")


@pytest.fixture
def children(server, tmp_path):
    """Starts processes (children.py), and ends them after the test."""
    children = Children(tmp_path)
    yield children
    children.end()


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a small model with random weights."""
    return write_checkpoint(tmp_path / "model.pt", small_model())


@pytest.fixture
def folders(tmp_path):
    """A folder for each of three colours, with four pictures in each."""
    for c, name in enumerate(("red", "green", "blue")):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for i in range(4):
            (folder / f"{i}.png").write_bytes(png(name, [c, i]))
    return tmp_path / "classes"


@pytest.fixture(scope="session")  # it takes two seconds to start
def chromium():
    """A headless Chromium. Without it, its driver or the package selenium the test is skipped."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.fixture(scope="module")
def browser(chromium):
    """Chromium without what other tests have left."""
    chromium.get("about:blank")
    chromium.implicitly_wait(0)
    chromium.get_log("browser")
    return chromium

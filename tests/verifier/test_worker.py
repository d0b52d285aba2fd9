from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from converters.errors import ReferenceFailed
from converters.verifier.worker import Workers, run_reference, run_task

PROBE = {"normal": np.zeros((2, 3, 32, 32), np.float32)}


def interpreter(folder: Path, code: str) -> str:
    """An interpreter that does `code` before anything else."""
    path = folder / "python"
    path.write_text(
        f"#!{sys.executable}\nimport os, runpy, subprocess, sys, time\n{code}\nsys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    path.chmod(0o755)
    return str(path)


def absent(module: str) -> str:
    """Code that makes a module one that is not installed."""
    return f"""
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
"""


def run(folder: Path, **how) -> str:
    """The line in which the worker's failure is told."""
    source = folder / "a.pth"
    source.write_bytes(b"weights")
    job = {"runner": "mmdet", "model": {"type": "ResNet", "depth": 18}, "outputs": {"features.1": "0"}}
    job |= {"source": {"file": str(source)}, **how.pop("job", {})}
    with pytest.raises(ReferenceFailed) as caught:
        run_reference(job, PROBE, **how)
    line = str(caught.value)
    assert "\n" not in line and "\x1b" not in line
    return line


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.stderr.write('Option registered more than once!\\n'); sys.stderr.flush(); os.abort()",
         "a.pth: the mmdet reference was ended by SIGABRT: Option registered more than once!"),
        ("os.write(1, b'no \\x1b[31mgood\\n\\n'); os._exit(3)", "exited with code 3 and no result: no \\x1b[31mgood"),
        ("os._exit(0)", "exited with code 0 and no result: it printed nothing"),
        ("sys.exit('not today')", "exited with code 1 and no result: not today"),
        (absent("numpy"), "has no module 'numpy'; name an interpreter that has it with --python"),
        (absent("mmdet"), "has no module 'mmdet'; name an interpreter that has it with --python"),
    ],
)  # fmt: skip
def test_a_worker_that_fails_is_one_line(tmp_path, code, words):
    assert words in run(tmp_path, python=interpreter(tmp_path, code))


def test_jobs_that_cannot_be_done(tmp_path):
    assert "no runner is called 'caffe'; there are mmdet," in run(tmp_path, job={"runner": "caffe"})
    assert run(tmp_path, python="pyhton") == "pyhton: is no interpreter; give --python the path of one"
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "notes.txt").chmod(0o755)
    assert "notes.txt: does not start: exec format error" in run(tmp_path, python=str(tmp_path / "notes.txt"))


def test_memory_is_bounded(tmp_path):
    line = run(tmp_path, memory=300 << 20)
    assert "the mmdet reference" in line and line.endswith("; it may take 300 MiB of memory")


HANG = """
child = subprocess.Popen(["sleep", "60"])
open({path!r}, "w").write(str(child.pid))
time.sleep(60)
"""


def gone(file: Path) -> bool:
    """Whether the process whose id stands in the file has ended (a zombie has)."""
    status = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(50):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_a_worker_that_hangs_is_killed_with_its_children(tmp_path):
    python = interpreter(tmp_path, HANG.format(path=str(tmp_path / "child")))
    start = time.monotonic()
    assert "the mmdet reference took longer than 2 s" in run(tmp_path, python=python, timeout=2)
    assert time.monotonic() - start < 30
    assert gone(tmp_path / "child")


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt, also where these tests are a job in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_kills_the_worker(tmp_path):
    python = interpreter(tmp_path, HANG.format(path=str(tmp_path / "child")))

    def interrupt():
        while not (tmp_path / "child").exists():
            time.sleep(0.05)
        while not arrived.is_set():  # one that falls into a destructor is lost
            _thread.interrupt_main()
            arrived.wait(5)

    arrived = threading.Event()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_reference({"runner": "python", "source": {"file": "a.pth"}}, PROBE, python=python)
    arrived.set()
    assert gone(tmp_path / "child")


def test_the_worker_opens_no_connection(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("model = __import__('urllib.request').request.urlopen('http://127.0.0.1:9/')")
    line = run(tmp_path, job={"model": None, "config": str(config)})
    assert "the reference asked for the network" in line


def list_nothing(runner: str, **how) -> dict:
    return run_task({"task": "list_tensors", "runner": runner, "models": [], "folder": "."}, **how)


def test_workers_are_kept_and_ended():
    with Workers() as workers:
        for runner in ("mmdet", "mmpretrain"):
            assert list_nothing(runner, workers=workers) == {"models": []}
        (mm,) = workers.kept.values()  # one framework
        for runner in ("keras", "timm"):
            list_nothing(runner, workers=workers)
        assert len(workers.kept) == 2 and mm.process.poll() is not None
        processes = [kept.process for kept in workers.kept.values()]
    assert all(process.poll() is not None for process in processes)


def test_what_lists_keras_models_computes_with_none():
    with Workers() as workers:
        list_nothing("keras", workers=workers)
        (listing,) = workers.kept.values()
        assert workers.hire(sys.executable, {"runner": "keras"}, None) is not listing
        assert list_nothing("keras", workers=workers) == {"models": []} and len(workers.kept) == 2


def test_a_kept_worker_that_fails_is_one_line_and_is_replaced(tmp_path):
    once = str(tmp_path / "once")
    code = f"if not os.path.exists({once!r}): open({once!r}, 'w'); print('oh', flush=True); os._exit(3)"
    python = interpreter(tmp_path, code)
    with Workers() as workers:
        with pytest.raises(ReferenceFailed, match="the timm reference exited with code 3 and no result: oh"):
            list_nothing("timm", python=python, workers=workers)
        assert list_nothing("timm", python=python, workers=workers) == {"models": []}


def test_a_kept_worker_has_its_time(tmp_path):
    python = interpreter(tmp_path, HANG.format(path=str(tmp_path / "child")))
    with Workers() as workers, pytest.raises(ReferenceFailed, match="the timm reference took longer than 2 s"):
        list_nothing("timm", python=python, timeout=2, workers=workers)
    assert gone(tmp_path / "child")

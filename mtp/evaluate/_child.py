"""The other half of `sandbox.py`: a fresh interpreter runs this file, shuts itself in, layer by
layer, and then runs one program.

Three processes stand in a row. The first enters the user and pid namespaces. The second is process
1 of the pid namespace: when it ends, the kernel ends all others. The third runs the program, since
signals that process 1 sends to itself are lost. Standard library only, and little of it: every
import is paid by every program.
"""

import ctypes
import marshal
import os
import resource
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SIGKILL = 9
NAMESPACES = {
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "mount": 0x00020000,
}
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
MOUNT_READ_ONLY, MOUNT_NO_SUID = 1, 2
# System calls without a function in libc; numbers above 423 are the same on every architecture.
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8  # Landlock's rights on files
FILE_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many there are; later: 16
TCP = 0b11  # bind, connect
SCOPES = 0b11  # abstract sockets, signals
CAPABILITY_VERSION = 0x20080522
PID_MAX = 512  # the kernel refuses less than 301

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """A function of libc; OSError where it reports one."""
    result = getattr(libc, name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def die_with_parent():
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def user_namespace(setup):
    """Nobody inside, the same user as before outside, so that the interpreter stays readable."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NAMESPACES["user"])
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {user} 1"),
        ("gid_map", f"65534 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def mount(source, target, kind=None, flags=0, options=None):
    encoded = (x and x.encode() for x in (source, target, kind))
    call("mount", *encoded, ctypes.c_ulong(flags), options and options.encode())


def mount_point(path, like):
    """An empty file or directory to mount `like` on."""
    if os.path.isdir(like):
        os.makedirs(path, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "x").close()


def mount_namespace(setup):
    """A root that holds the readable paths, read-only, and the working directory, in memory.

    Nothing is mounted over the host's temporary directory, where an interpreter may live.
    """
    work = root = setup["directory"]
    call("unshare", NAMESPACES["mount"])
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", options="size=1m,mode=755")
    for path in setup["readable"]:
        mount_point(root + path, like=path)
        mount(path, root + path, flags=MS_BIND | MS_REC)
    os.makedirs(root + work, exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_READ_ONLY | MOUNT_NO_SUID)
    at = (AT_FDCWD, root.encode(), AT_RECURSIVE)
    call("syscall", MOUNT_SETATTR, *at, attributes, ctypes.c_size_t(32))
    options = f"size={setup['disk_bytes']},nr_inodes=1024,mode=700"
    mount("tmpfs", root + work, "tmpfs", options=options)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir(work)


def pid_max(setup):
    """A bound for root too, for whom the limit on processes does not hold. From Linux 6.14."""
    if "pid" not in setup["layers"]:
        raise OSError("the host's own limit")
    with open("/proc/sys/kernel/pid_max", "w") as file:
        file.write(str(PID_MAX))


def no_new_privileges(setup):
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def no_capabilities(setup):
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION), (ctypes.c_uint32 * 6)())


def landlock(files=0, network=0, scopes=0, rules=()):
    """Forbids what the three masks name, except what the rules (path, rights) allow."""
    masks = (ctypes.c_uint64 * 3)(files, network, scopes)
    ruleset = call("syscall", LANDLOCK_CREATE, masks, ctypes.c_size_t(24), 0)
    for path, rights in rules:
        fd = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        call("syscall", LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(fd)
    call("syscall", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def landlock_files(setup):
    abi = call("syscall", LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    every = (1 << FILE_RIGHTS_BY_ABI.get(abi, 16)) - 1
    rules = [(setup["directory"], every), (os.devnull, READ_FILE | WRITE_FILE)]
    for path in setup["readable"]:
        rights = EXECUTE | READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        rules.append((path, rights))
    landlock(files=every, rules=rules)


def limits(setup):
    bounds = {
        resource.RLIMIT_AS: setup["memory_bytes"],
        resource.RLIMIT_CPU: int(setup["seconds"]) + 2,
        resource.RLIMIT_FSIZE: setup["file_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if "user" in setup["layers"]:  # elsewhere it counts all processes of this user on the host
        bounds[resource.RLIMIT_NPROC] = setup["processes"]
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            bound = min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def unsharing(name):
    return lambda setup: call("unshare", NAMESPACES[name])


# In the order in which they are entered: the first before the forks, the rest by the last process.
OUTER = {"user": user_namespace, "pid": unsharing("pid")}
INNER = {
    **{name: unsharing(name) for name in ("net", "ipc", "uts")},
    "pid_max": pid_max,
    "mount": mount_namespace,
    "no_new_privs": no_new_privileges,
    "capabilities": no_capabilities,
    "landlock_files": landlock_files,
    "landlock_tcp": lambda setup: landlock(network=TCP),
    "landlock_scopes": lambda setup: landlock(scopes=SCOPES),
    "limits": limits,
}


def enter(layers, setup):
    """Enters those of the layers that are wanted; the names of those that the host granted."""
    granted = []
    for name, layer in layers.items():
        if name in setup["layers"]:
            try:
                layer(setup)
            except (OSError, AttributeError, ValueError):  # refused, or unknown to this libc
                continue
            granted.append(name)
    return granted


def fork_and_relay(highest):
    """Returns in the child. The parent ends as it does: 2 for a signal, else its exit code."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        os._exit(2 if os.WIFSIGNALED(status) else min(os.WEXITSTATUS(status), highest))
    die_with_parent()


def run(program, channel, nonce):
    """Only the program's end reaches the nonce. No atexit, no waiting for threads.

    The name is not `__main__`, as in the established harnesses: what a model writes below such a
    guard is no part of its function.
    """
    write, leave, pid = os.write, os._exit, os.getpid  # the program may replace them
    own = pid()
    module = sys.modules["program"] = type(sys)("program")
    sys.argv = ["program.py"]
    status = 1
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
        if pid() == own:  # and not a fork of it
            write(channel, nonce)
        status = 0
    except SystemExit as early:
        status = 0 if early.code in (None, 0) else 1
    except BaseException as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without us
        sys.__excepthook__(type(error), error, error.__traceback__)
    finally:
        leave(status)


def main():
    setup = marshal.load(sys.stdin.buffer)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)  # or the program could read the nonce there
    os.close(empty)
    die_with_parent()
    granted = enter(OUTER, setup)
    fork_and_relay(highest=2)
    fork_and_relay(highest=1)  # the program's own 2 is no signal
    granted += enter(INNER, setup)
    os.write(setup["channel"], (" ".join(granted) + "\n").encode())
    run(setup["program"], setup["channel"], setup["nonce"])


if __name__ == "__main__":
    main()

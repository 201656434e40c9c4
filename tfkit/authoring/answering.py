"""One student's notebook, run cell by cell for the grader, in a process that holds no reference and no right value.

The grader (grading.py) sends cells and inputs through a pipe, and gets back what the student's functions return:
numbers, words and tensors. It compares them where no student's code runs, so nothing that is done to this process can
change a verdict; all that a student can do here is compute.
"""

from __future__ import annotations

import io
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

PLAIN = (int, float, str, bool, type(None))
ALONE = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "pty.", "socket.")
FILES = ("open", "os.rename", "os.link", "os.symlink", "os.listdir", "os.scandir", "sqlite3.connect", "shutil.")
REFUSED = "an answer reads no notebook, starts no program and uses no network"


def plain(value):
    """What can be sent back: a tensor, a number, words, or lists of them; of anything else its type and its words."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value.detach().clone()
    if type(value) in PLAIN:
        return value
    if type(value) in (tuple, list, torch.Size):
        return (list if type(value) is list else tuple)(plain(part) for part in value)
    if isinstance(value, complex) or type(value).__module__ == "numpy" and hasattr(value, "item") and not value.shape:
        return torch.tensor(value)
    if type(value) is dict:
        return {"dict": [(plain(key), plain(part)) for key, part in value.items()]}
    try:
        return {"other": type(value).__name__, "words": repr(value)[:200]}
    except Exception:
        return {"other": type(value).__name__, "words": ""}


def packed(reply) -> bytes:
    file = io.BytesIO()
    torch.save(reply, file)
    return file.getvalue()


def guard(folders: list[str]):
    """Deny the files of the course to the code that runs once the returned function has been called."""
    secret, own, on = tuple(os.path.realpath(folder) + os.sep for folder in folders), os.getpid(), []

    def private(given) -> bool:
        if not isinstance(given, (str, bytes, os.PathLike)):
            return False
        path = os.path.realpath(os.fsdecode(given))
        other = path.startswith("/proc/") and path.split("/")[2].isdigit() and path.split("/")[2] != str(own)
        return other or path.endswith(".ipynb") or (path + os.sep).startswith(secret)

    def hook(event: str, given: tuple) -> None:
        if on and (event.startswith(ALONE) or event.startswith(FILES) and any(private(part) for part in given)):
            raise PermissionError(REFUSED)

    sys.addaudithook(hook)
    return lambda: on.append(True)


class Answers:
    """A notebook that is being run."""

    def __init__(self, names: list[str], folders: list[str]):
        from IPython.core.interactiveshell import InteractiveShell

        self.names, self.shell, self.watch = names, InteractiveShell.instance(), guard(folders)
        self.shell.history_manager.enabled = False
        sys.modules["__main__"] = self.shell.user_module

    def run(self, source: str, own: bool) -> dict:
        """Run one cell; which of the asked names it binds anew, and how it failed. `own`: the student wrote it."""
        if own:
            self.watch()
        before = {name: id(self.shell.user_ns.get(name)) for name in self.names}
        result = self.shell.run_cell(source, store_history=True)
        error = result.error_before_exec or result.error_in_exec
        bound = [name for name in self.names if id(self.shell.user_ns.get(name)) != before[name]]
        return {"bound": bound, "error": f"{type(error).__name__}: {error}"[:500] if error else ""}

    def ask(self, name: str, given: tuple) -> dict:
        """What the student's function returns, and its inputs as it left them; or how it failed."""
        self.watch()
        torch.manual_seed(0)
        try:
            result = plain(self.shell.user_ns[name](*given))
        except BaseException as error:
            return {"error": [type(error).__name__, str(error)[:2000], isinstance(error, NotImplementedError)]}
        return {"result": result, "given": [plain(part) for part in given]}


def main() -> None:
    """Answer the grader until it hangs up; the pipe's number is the only argument."""
    import cloudpickle

    pipe = Connection(int(sys.argv[1]))
    answers = Answers(**cloudpickle.loads(pipe.recv_bytes()))
    pipe.send_bytes(packed({"ready": True}))
    while True:
        try:
            what, *given = cloudpickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(packed(getattr(answers, what)(*given)))


if __name__ == "__main__":
    sys.path.append(str(Path.cwd()))  # modules that were handed in with the notebook; they take the place of no other
    main()

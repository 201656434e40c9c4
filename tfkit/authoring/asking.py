"""A student's process, seen from the grader: cells and inputs go there, numbers, words and tensors come back."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

from tfkit.authoring import answering

START = 600  # seconds in which a process is there, however busy the machine
LARGEST, GRACE = 2**28, 30  # bytes of an answer, and seconds in which one that has begun must have come
HERE = Path(__file__).resolve().parents[2]  # what a student's process imports tfkit from


class Gone(BaseException):
    """The student's process ended, or took too long. No answer's `except` and no check's may swallow it."""


class Session:
    """A student's process: runs cells, and answers with values."""

    def __init__(self, folder: Path, limit: float, **about):
        import cloudpickle

        self.dumps, self.limit = cloudpickle.dumps, START
        self.pipe, there = multiprocessing.Pipe()
        environment = {**os.environ, "TFKIT_STATIC": "1", "MPLBACKEND": "agg", "TRITON_INTERPRET": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        environment |= {"IPYTHONDIR": str(folder / ".ipython")}
        command = [sys.executable, "-P", "-m", answering.__name__, str(there.fileno())]
        nothing = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=nothing, stdout=nothing, stderr=nothing,
            pass_fds=[there.fileno()], start_new_session=True,
        )  # fmt: skip
        there.close()
        self.ask(about)
        self.limit = limit

    def __enter__(self) -> Session:
        return self

    def end(self) -> None:
        """Kill the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __exit__(self, *_) -> None:
        self.pipe.close()
        self.end()
        self.process.wait()

    def ask(self, message) -> dict:
        """Send a message and wait for the answer, at most `limit` seconds. Raises Gone."""
        watch = threading.Timer(self.limit + GRACE, self.end)  # an answer that begins and never ends
        watch.start()
        try:
            self.pipe.send_bytes(self.dumps(message))
            if not self.pipe.poll(self.limit):
                raise Gone(f"takes longer than {self.limit:.0f} seconds")
            reply = torch.load(io.BytesIO(self.pipe.recv_bytes(LARGEST)), weights_only=True)
        except (EOFError, OSError):
            raise Gone("ends Python") from None
        except Gone:
            raise
        except Exception:
            raise Gone("garbles its answer") from None
        finally:
            watch.cancel()
        if not isinstance(reply, dict):
            raise Gone("garbles its answer")
        return reply

    def function(self, name: str):
        """The student's function of that name, as one that the check can call."""

        def answer(*given):
            reply = self.ask(("ask", name, given))
            if "error" in reply:
                kind, words, is_open = (*reply["error"], "", "", False)[:3]
                raise NotImplementedError if is_open is True else type(str(kind), (Exception,), {})(str(words))
            if not isinstance(reply.get("given"), list) or len(reply["given"]) != len(given):
                raise Gone("garbles its answer")
            for before, after in zip(given, reply["given"], strict=True):
                if isinstance(before, Tensor):  # as the answer left it
                    same = isinstance(after, Tensor) and after.dtype == before.dtype
                    before.data = after.data if same else before.data[..., None]
            return unfolded(reply.get("result"))

        return answer


def unfolded(value):
    """What `answering.plain` folded."""
    if isinstance(value, (tuple, list)):
        return type(value)(unfolded(part) for part in value)
    if isinstance(value, dict) and "dict" in value:
        return {_key(key): unfolded(part) for key, part in value["dict"]}
    if isinstance(value, dict):
        words = str(value.get("words", ""))
        return type(str(value.get("other", "object")), (), {"__repr__": lambda self: words})()
    return value


def _key(value):
    value = unfolded(value)
    return value if isinstance(value, (*answering.PLAIN, tuple)) else repr(value)

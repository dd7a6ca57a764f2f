"""A program of the system as the function of a box: one run for each row, in a folder of its own."""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewriter.runtime.errors import BoxError

Written = str | bytes | Mapping[str, str | bytes]

_LINES_OF_ERROR = 5
_RUNNING: set[subprocess.Popen[bytes]] = set()


class ExternalProgram:
    """A callable that runs `command` for one row: `CallableBox(ExternalProgram(...), per_row=True)`.

    command: the program, found as a shell would find it, and its arguments; no shell is involved. It runs in a fresh
             folder, which is removed afterwards: paths in arguments are absolute, or name files of that folder
    write:   from the row, one argument for each input of the box (and its seed, where the box has one, by keyword), to
             what the program reads: text or bytes for its standard input, or a mapping of file names to their contents
    read:    from what it wrote to one row of outputs; text of its standard output, or of the file `output`
    files:   copied into the folder for each run: name in the folder -> path
    timeout: seconds of one run; then the program and all it started are killed, and `TimeoutError` is raised

    Picklable where `write` and `read` are. Raises `RuntimeError` with the last lines of its standard error if the
    program ends with another status than 0, and whatever `read` raises; the box masks such a row. Raises `BoxError` at
    construction if the program or a file does not exist. Runs spend no time in Python, so threads are enough:
    `executor="threads:8"`; the limit is better given here than to the box, which cannot end a program from outside.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        write: Callable[..., Written],
        read: Callable[[str], Any],
        output: str | None = None,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        timeout: float | None = None,
    ) -> None:
        if isinstance(command, str) or not command:
            raise BoxError(
                f"command={command!r} is no sequence of arguments",
                remedy='["solver", "--quiet"], as no shell takes it apart',
            )
        first, *arguments = [os.fspath(part) for part in command]
        program = shutil.which(first)
        if program is None:
            raise BoxError(f"there is no program {first}", remedy="install it, or give its path")
        self.command = [os.path.abspath(program), *arguments]
        self.write, self.read, self.output, self.timeout = write, read, output, timeout
        self.files = {name: os.path.abspath(path) for name, path in (files or {}).items()}
        for path in self.files.values():
            if not os.path.isfile(path):
                raise BoxError(f"there is no file {path}", where=first)
        self.__name__ = Path(program).name

    def __call__(self, *row: Any, **seed: Any) -> Any:
        """One run."""
        written = self.write(*row, **seed)
        with tempfile.TemporaryDirectory(prefix="rewriter-", ignore_cleanup_errors=True) as folder:
            for name, path in self.files.items():
                shutil.copy(path, _inside(folder, name))
            if isinstance(written, Mapping):
                for name, content in written.items():
                    _inside(folder, name).write_bytes(_encoded(content))
                written = b""
            text = self._run(folder, _encoded(written))
            return self.read(text if self.output is None else _inside(folder, self.output).read_text("utf-8"))

    def _run(self, folder: str, given: bytes) -> str:
        with subprocess.Popen(
            self.command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            _RUNNING.add(process)
            try:
                output, errors = process.communicate(given, self.timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"{self.__name__} ran longer than {self.timeout:g} s") from None
            finally:
                _kill(process)
                _RUNNING.discard(process)
        if process.returncode:
            last = "\n".join(errors.decode(errors="replace").strip().splitlines()[-_LINES_OF_ERROR:])
            raise RuntimeError(f"{self.__name__} ended with status {process.returncode}: {last}")
        return output.decode()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """All that still runs of it and of what it started: its group of processes has its number."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()


def _kill_all() -> None:
    """At exit: Python does not wait for the threads of a box, nor would the system end what they run."""
    for process in list(_RUNNING):
        _kill(process)


atexit.register(_kill_all)


def _inside(folder: str, name: str) -> Path:
    path = (Path(folder) / name).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise ValueError(f"the file {name} would lie outside of the folder of the run")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content

"""Programs of the system as boxes: files or pipes, errors, limits, and nothing left behind."""

import os
import pickle
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rewriter import CallableBox, ExternalProgram
from rewriter.runtime.errors import BoxError

SQUARES = """
import pathlib, sys
numbers = [float(text) for text in pathlib.Path("in.txt").read_text().split()]
factor = float(pathlib.Path("settings/factor.txt").read_text())
if numbers[0] < 0:
    print("starting\\nthe matrix is singular", file=sys.stderr)
    raise SystemExit(2)
pathlib.Path("out.txt").write_text(" ".join(str(factor * number**2) for number in numbers))
print("this is the log")
"""


def to_file(x):
    return {"in.txt": " ".join(map(str, x))}


def to_text(*row, **seed):
    return "\n".join(map(str, [*np.concatenate([np.atleast_1d(value) for value in row]), *seed.values()]))


def numbers(text):
    return np.array(text.split(), float)


def first_number(text):
    return float(text.split()[0])


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Where the runs get their folders: empty again after every test."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def squares(tmp_path):
    (tmp_path / "squares.py").write_text(SQUARES)
    (tmp_path / "factor.txt").write_text("3")
    return ExternalProgram(
        [sys.executable, "-S", "squares.py"],
        write=to_file,
        read=numbers,
        output="out.txt",
        files={"squares.py": tmp_path / "squares.py", "settings/factor.txt": tmp_path / "factor.txt"},
    )


def test_files_in_and_out(squares):
    box = CallableBox(squares, per_row=True, executor="threads:2", nonfinite="keep")
    assert box.label == Path(sys.executable).name
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [0.5, 4.0]])
    y = box(x)
    assert torch.equal(y[[0, 2]], 3 * x[[0, 2]] ** 2)
    assert y[1].isnan().all()
    assert "row 1 raised RuntimeError" in box.last_failure
    assert "ended with status 2: starting\nthe matrix is singular" in box.last_failure


def test_pipes_and_no_shell():
    """`sort` is no Python, and what a shell would expand reaches it as it is."""
    program = ExternalProgram(["sort", "-g"], write=to_text, read=numbers)
    box = CallableBox(program, per_row=True, executor="threads:2")
    assert box(torch.tensor([[3.0, 1.0, 2.0]])).tolist() == [[1, 2, 3]]
    assert ExternalProgram(["printf", "%s", "$(id) *"], write=lambda x: "", read=str)(0) == "$(id) *"


def test_the_seed_of_a_row_is_written_too():
    box = CallableBox(ExternalProgram(["cat"], write=to_text, read=numbers), per_row=True, seed="seed")
    x, seeds = torch.rand(3, 2, dtype=torch.float64), torch.tensor([5, 6, 7])
    assert torch.equal(box.evaluate(x, seeds)[0], torch.cat([x, seeds[:, None].double()], 1))


def test_a_run_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    """The child of the program would hold its output open, and go on."""
    script = tmp_path / "endless.py"
    script.write_text(
        "import subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '60'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    program = ExternalProgram([sys.executable, "-S", script], write=to_text, read=numbers, timeout=1.0)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="ran longer than 1 s"):
        program(np.zeros(1))
    assert time.monotonic() - began < 30
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_what_a_program_leaves_running_ends_with_its_run(tmp_path):
    script = tmp_path / "leaves.py"
    script.write_text(
        "import subprocess\nprint(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL).pid)\n"
    )
    assert not is_running(int(ExternalProgram([sys.executable, "-S", script], write=to_text, read=first_number)(0.0)))


def is_running(process):
    """A killed process may stand in the table until somebody asks for its status."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_pickles(squares):
    twin = pickle.loads(pickle.dumps(squares))
    assert twin(np.array([2.0])).tolist() == [12]


@pytest.mark.parametrize(
    ("command", "files", "message"),
    [
        ("sort -g", {}, "no sequence of arguments"),
        ([], {}, "no sequence of arguments"),
        (["no-such-solver"], {}, "no program no-such-solver"),
        (["sort"], {"mesh.dat": "no-such-mesh.dat"}, "no file .*no-such-mesh.dat"),
    ],
)
def test_what_does_not_exist_is_told_at_once(command, files, message):
    with pytest.raises(BoxError, match=message):
        ExternalProgram(command, write=to_text, read=numbers, files=files)


@pytest.mark.parametrize("name", ["../escaped.txt", "/tmp/escaped.txt"])
def test_no_file_is_written_outside_of_the_folder(name, folders):
    with pytest.raises(ValueError, match="outside of the folder"):
        ExternalProgram(["cat"], write=lambda x: {name: "text"}, read=numbers)(0.0)
    assert not (folders / "escaped.txt").exists()


def test_an_output_that_does_not_parse_masks_its_row():
    program = ExternalProgram(["cat"], write=lambda x: "nothing" if x[0] < 0 else str(x[0]), read=numbers)
    box = CallableBox(program, per_row=True, nonfinite="keep")
    assert box(torch.tensor([[1.0], [-1.0]])).isnan()[:, 0].tolist() == [False, True]
    assert "could not convert string to float" in box.last_failure


def test_the_program_is_found_where_the_caller_stood(tmp_path, monkeypatch):
    shutil.copy(shutil.which("sort"), tmp_path / "solver")
    monkeypatch.chdir(tmp_path)
    program = ExternalProgram([os.path.join(".", "solver"), "-g"], write=to_text, read=numbers)
    monkeypatch.chdir("/")
    assert program(np.array([2.0, 1.0])).tolist() == [1, 2]

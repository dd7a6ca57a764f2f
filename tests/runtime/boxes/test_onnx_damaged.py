"""ONNX files that are cut, damaged or something else: a `BoxError` that names them, or a box that works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import Save, branching, refused, scaling, snapshot, works


def test_a_file_cut_anywhere(save: Save) -> None:
    path = save(scaling())
    content = path.read_bytes()
    works(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path, "hostile.onnx")


@pytest.mark.parametrize("content", [b"", b"model", b"#!/bin/sh\ntouch executed\n", bytes(4096), b"ORTM" * 100])
@pytest.mark.parametrize("name", ["hostile.onnx", "hostile.ort", "hostile.json", "hostile.textproto"])
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name)


def test_the_ending_of_a_name_does_not_choose_the_parser(save: Save) -> None:
    path = save(scaling())
    for ending in (".json", ".ort", ".textproto"):
        works(path.rename(path.with_suffix(ending)))
        path.with_suffix(ending).rename(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", "there is no file folder.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")  # opening it would wait for ever
    refused(tmp_path / "pipe.onnx", "there is no file pipe.onnx")
    (tmp_path / "link.onnx").symlink_to("link.onnx")
    refused(tmp_path / "link.onnx", "there is no file link.onnx")


_FLIPS = """
import collections, json, random, sys
from pathlib import Path

import torch
from rewriter import BoxError, OnnxBox

torch.set_num_threads(1)
written = []
sys.addaudithook(lambda event, given: written.append((event, str(given))) if event in {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen"
} or (event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")) else None)
for source in map(Path, sys.argv[1:]):
    target = source.with_name(f"flipped_{source.name}")
    content, counts = source.read_bytes(), collections.Counter()
    for seed in range(200):
        draw, damaged = random.Random(seed), bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        target.write_bytes(damaged)
        written.clear()
        print(source.name, seed, file=sys.stderr, flush=True)  # the last one, should the process die
        try:
            box = OnnxBox(target)
        except BoxError as error:
            assert target.name in error.what, error
            counts["refused"] += 1
        else:
            x = [torch.ones(2, *(size if isinstance(size, int) else 2 for size in each.shape[1:])).to(each.dtype)
                 for each in box.inputs]
            try:
                box(*x)
                counts["worked"] += 1
            except BoxError as error:
                assert target.name in str(error), error
                counts["failed"] += 1
        assert not written, (seed, written)
    target.unlink()
    print(json.dumps(counts))
"""


def test_flipped_bits(save: Save, tmp_path: Path) -> None:
    """In a process of its own: a crash of onnxruntime would be one of the test run."""
    names = ["scaling.onnx", "branching.onnx"]
    sources = [
        save(each).rename(tmp_path / "models" / name)
        for each, name in zip((scaling(), branching()), names, strict=True)
    ]
    if (trees := forest(tmp_path / "models" / "forest.onnx")) is not None:
        sources.append(trees)
    before = snapshot(tmp_path / "models")
    command = [sys.executable, "-c", _FLIPS, *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert snapshot(tmp_path / "models") == before
    for line in done.stdout.splitlines():
        counts = json.loads(line)
        assert sum(counts.values()) == 200
        assert counts["refused"] >= 10
        assert counts["worked"] >= 5  # not every file is refused
    assert done.stdout.count("\n") == len(sources)


def forest(path: Path) -> Path | None:
    try:
        from skl2onnx import to_onnx
        from sklearn.ensemble import RandomForestRegressor
    except ImportError:
        return None
    draw = np.random.default_rng(0)
    x = draw.standard_normal((200, 4)).astype(np.float32)
    trees = RandomForestRegressor(3, max_depth=4, random_state=0).fit(x, np.tanh(x @ draw.standard_normal((4, 3))))
    path.write_bytes(to_onnx(trees, x[:1]).SerializeToString())
    return path


def test_names_that_are_no_text(save: Save) -> None:
    path = save(scaling())
    content = path.read_bytes()
    assert content.count(b"\x0a\x01n") == 0
    spoiled = content.replace(b"\x12\x01n", b"\x12\x01\xff")  # the name of the free dimension
    assert spoiled != content
    path.write_bytes(spoiled)
    refused(path, "hostile.onnx")

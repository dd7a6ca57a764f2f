"""Weights that an ONNX file keeps beside itself stay in its folder, and hold what the file says."""

import copy
import os
from pathlib import Path

import pytest
import torch
from hostile import Save, external, refused, save_weights, scaling, works

from rewriter import BoxError, OnnxBox


def test_weights_beside_the_file(save: Save, tmp_path: Path) -> None:
    path = save(external("weights.bin"))
    save_weights(tmp_path / "models" / "weights.bin", 20)
    works(path)
    works(save(external("weights.bin", offset=8, length=12)))
    save_weights(tmp_path / "models" / "inner" / "weights.bin")
    works(save(external("inner/weights.bin")))
    (tmp_path / "models" / "link.bin").symlink_to("weights.bin")  # stays in the folder
    works(save(external("link.bin")))


def test_a_download_cache_keeps_contents_elsewhere(save: Save, tmp_path: Path) -> None:
    """Both files are links to their contents, which lie in one folder."""
    blobs, shown = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    shown.mkdir()
    save(external("weights.bin")).rename(blobs / "aaaa")
    save_weights(blobs / "bbbb")
    (shown / "hostile.onnx").symlink_to("../blobs/aaaa")
    (shown / "weights.bin").symlink_to("../blobs/bbbb")
    works(shown / "hostile.onnx")


def test_weights_outside_the_folder(save: Save, tmp_path: Path) -> None:
    outside, folder = tmp_path / "secret" / "weights.bin", tmp_path / "models"
    save_weights(outside)
    save(scaling())
    (folder / "link.bin").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "*").mkdir()
    for location in (str(outside), "../secret/weights.bin", "linked/../../secret/weights.bin", "a/../../weights.bin"):
        refused(save(external(location)), "not a path inside the file's own folder")
    for location in ("..\\secret\\weights.bin", "C:\\weights.bin", "\\\\host\\weights.bin", "", "*/_ORT_MEM_ADDR_/*"):
        refused(save(external(location)), "not a path inside the file's own folder")
    for location in ("link.bin", "linked/weights.bin"):
        refused(save(external(location)), "a link that leads out")
    refused(save(external("absent.bin")), "weights of hostile.onnx are missing: absent.bin")
    refused(save(external(".")), "weights of hostile.onnx are missing")
    refused(save(external("w\0.bin")), "hostile.onnx")
    os.mkfifo(folder / "pipe.bin")
    refused(save(external("pipe.bin")), "weights of hostile.onnx are missing")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"offset": 9}, "lies outside its file: bytes 9 to 21 of weights.bin, which has 20"),
        ({"offset": 2**62}, "lies outside its file"),
        ({"offset": -4}, "has the offset '-4'"),
        ({"length": 13}, "claims 12 bytes where 13 are stored"),
        ({"length": 2**70}, "claims 12 bytes"),
        ({"length": -1}, "has the length '-1'"),
    ],
)
def test_places_that_are_not_in_the_weights(save: Save, tmp_path: Path, entries: dict[str, int], match: str) -> None:
    save_weights(tmp_path / "models" / "weights.bin", 20)
    refused(save(external("weights.bin", **entries)), match)


def test_a_file_that_became_hostile_is_not_reopened(save: Save, tmp_path: Path) -> None:
    path = save(scaling())
    twin = copy.deepcopy(OnnxBox(path))
    save(external("../secret/weights.bin"))
    with pytest.raises(BoxError, match="not a path inside"):
        twin(torch.ones(1, 3))

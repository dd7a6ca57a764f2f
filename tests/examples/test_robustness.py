"""The robustness example: its table, its controls, and an attack that is one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from rewriter.examples import robustness  # after the check for the extras
from rewriter.examples.random_forest import Digits, one_thread


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[robustness.Tested] = []
    of_seed = robustness.of_seed

    def kept(*given: Any) -> list[robustness.Tested]:
        results.extend(of_seed(*given))
        return results[-len(robustness.METHODS) :]

    monkeypatch.setattr(robustness, "of_seed", kept)
    assert robustness.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    assert [each.method for each in results] == [*robustness.METHODS] * 2
    for each in results:
        assert each.noise[0] == each.attack[0] > 0.5
        assert each.noise[-1] < each.noise[0]
        assert each.attack[-1] < 0.5 * each.attack[0]
    first = {each.method: each for each in results[:5]}
    # Stopped where it fits as well as the likelihood ratio, or a step after.
    assert first["BP, stopped early"].fit == pytest.approx(first["ULR, auto noise"].fit, rel=0.1)
    assert first["BP"].fit < first["BP, stopped early"].fit
    assert "paired differences" in capsys.readouterr().out
    assert (tmp_path / "out" / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_the_attack_is_worse_than_noise_of_its_size() -> None:
    digits = Digits.load(0)
    with one_thread():
        found = robustness.train("BP", digits, 0, 5)
    assert found.attack[2] < found.noise[1] - 0.2  # steps of .1 against deviations of .1


def test_paired_differences_are_paired() -> None:
    def results(method: str, accuracies: tuple[float, ...]) -> list[robustness.Tested]:
        return [robustness.Tested(method, n, 0.0, (each,) * 6, (each,) * 5) for n, each in enumerate(accuracies)]

    line = robustness.differences(results("a", (0.5, 0.9)) + results("b", (0.4, 0.8)), "a", "b")
    assert line.split() == ["+10.0", "+-", "0.0"] * 5
    mean, error = robustness.mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(3**-0.5))
    assert math.isnan(robustness.mean_and_error([1.0])[1])


def test_noise_is_for_training_alone() -> None:
    network = robustness.Network(0, noise=0.5)
    images = torch.rand((4, 64), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))

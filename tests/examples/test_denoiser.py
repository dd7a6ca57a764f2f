"""The denoiser example: what it learns from a file's answers, and that wrong answers teach it nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("skl2onnx")
pytest.importorskip("matplotlib")

from rewriter.examples import denoiser  # after the check for the extra
from rewriter.examples.random_forest import Digits, one_thread


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with one_thread():
        return denoiser.fit_classifier(Digits.load(0), 0, tmp_path_factory.mktemp("classifier") / "classifier.onnx")


@pytest.fixture(autouse=True)
def _fitted_once(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "fit_classifier", lambda digits, seed, path: shutil.copy(classifier, path))


def test_it_learns_without_a_clean_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[denoiser.Result] = []
    run = denoiser.run

    def kept(*given: Any) -> denoiser.Result:
        results.append(run(*given))
        return results[-1]

    monkeypatch.setattr(denoiser, "run", kept)
    assert denoiser.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    accuracy, error, quality = results[0].accuracy, results[0].error, results[0].quality
    assert accuracy["clean"] > 0.95
    assert accuracy["striped"] < 0.45
    assert accuracy["denoised"] > 0.6
    assert error["denoised"] < error["striped"] / 2  # nearer to images it has never seen
    # A forward and four probes; set-up beside them; none where the right probability is below 1e-6: no cotangent.
    assert results[0].rows == pytest.approx(100 * 128 * 5, rel=0.1)
    assert quality is not None
    assert quality == pytest.approx(0.25, abs=0.12)  # sqrt(4 probes / 64 pixels)
    assert f"{accuracy['denoised']:.3f}" in capsys.readouterr().out
    assert (tmp_path / "out" / "denoiser.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_labels_teach_it_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = denoiser.task_loss

    def wrong(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        return right(output, ((target[0] + 1) % 10, target[1]))

    monkeypatch.setattr(denoiser, "task_loss", wrong)
    with one_thread():
        assert denoiser.run(tmp_path, 0, 50).accuracy["denoised"] < 0.35


def test_stripes_are_rows_of_pixels() -> None:
    images = denoiser.striped(torch.zeros(4000, 64), torch.Generator().manual_seed(0)).reshape(-1, 8, 8)
    assert float(images.std()) == pytest.approx((denoiser.STRIPES**2 + denoiser.NOISE**2) ** 0.5, rel=0.02)
    assert float((images - images.mean(2, keepdim=True)).std()) == pytest.approx(
        denoiser.NOISE * (7 / 8) ** 0.5, rel=0.02
    )


def test_an_untrained_denoiser_changes_nothing() -> None:
    images = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser.Denoiser()(images), images)


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.examples.command.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        denoiser.main([])
    assert ended.value.code == 1
    assert "needs sklearn, skl2onnx, matplotlib: pip install 'rewriter[demo]'" in capsys.readouterr().err

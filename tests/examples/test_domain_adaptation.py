"""The domain adaptation example: adapters learn from losses of a file, and not from wrong labels."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("skl2onnx")
pytest.importorskip("matplotlib")

from rewriter.examples import domain_adaptation  # after the check for the extras
from rewriter.examples.random_forest import Digits, one_thread

Fitted = tuple[dict[str, Path], nn.Module]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    with one_thread():
        return domain_adaptation.fit_classifiers(Digits.load(0), 0, tmp_path_factory.mktemp("classifiers"))


def trained(way: str, fitted: Fitted, steps: int) -> domain_adaptation.Curve:
    _, labels_only = domain_adaptation.WAYS[way]
    box = domain_adaptation.answers(fitted[0]["network"], labels_only)
    model = domain_adaptation.Adapted(box)
    with one_thread():
        return domain_adaptation.train("network", way, model, Digits.load(0), 0, steps)


def test_a_quick_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fitted: Fitted
) -> None:
    monkeypatch.setattr(domain_adaptation, "fit_classifiers", lambda *given: fitted)
    assert domain_adaptation.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("UlrCut, labels only") == printed.count("BlackBox, labels only") == 2
    assert (tmp_path / "out" / "domain_adaptation.png").read_bytes().startswith(b"\x89PNG")


def test_losses_alone_fit_the_adapter(fitted: Fitted) -> None:
    curve = trained("UlrCut", fitted, 80)
    assert curve.accuracy[0] < 0.5
    assert curve.accuracy[-1] > 0.75
    # The forward and 16 copies of 64 rows, and now and then as many again to measure the noise.
    assert curve.evaluations == pytest.approx(81 * 64 * 17, rel=0.1)


def test_labels_alone_fit_the_adapter(fitted: Fitted) -> None:
    curve = trained("UlrCut, labels only", fitted, 80)
    assert curve.accuracy[-1] > curve.accuracy[0] + 0.15


def test_wrong_labels_do_not(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    right = domain_adaptation.surprise

    def shifted(probabilities: Tensor, labels: Tensor) -> Tensor:
        return right(probabilities, (labels + 1) % 10)

    monkeypatch.setattr(domain_adaptation, "surprise", shifted)
    assert trained("UlrCut", fitted, 80).accuracy[-1] < 0.2


def test_the_known_weights_are_the_file(fitted: Fitted) -> None:
    images = torch.rand((50, 64), generator=torch.Generator().manual_seed(0))
    files, known = fitted
    torch.testing.assert_close(
        domain_adaptation.answers(files["network"], False)(images), known(images), rtol=0, atol=1e-5
    )
    labels = domain_adaptation.answers(files["network"], True)(images)
    assert torch.equal(labels.argmax(1), known(images).argmax(1))
    assert torch.equal(labels.sum(1), torch.ones(50))

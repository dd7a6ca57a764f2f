"""Lightning's and Hugging Face's trainers: parameters after an epoch equal a hand-written loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exact_entry import Exact
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rewriter import Plan, rewrite

pytestmark = pytest.mark.interop

PLAN = Plan([Exact("1")])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 3))


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)


def by_hand(network, forward):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for x, y in DataLoader(TensorDataset(*data()), batch_size=8):
        optimizer.zero_grad()
        forward(x, y).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in network.parameters()]


def expected():
    eager = model()
    return by_hand(eager, lambda x, y: F.cross_entropy(eager(x), y))


def test_the_epoch_changes_the_parameters():
    assert not torch.equal(expected()[0], next(model().parameters()))


def test_lightning():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.step = rewrite(model(), PLAN, loss=F.cross_entropy)

        def training_step(self, batch, index):
            x, y = batch
            return self.step(x, target=y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=8))
    assert module.step.ledger["1"].vjps == 5
    for mine, theirs in zip(module.step.parameters(), expected(), strict=True):
        assert torch.equal(mine, theirs)


def test_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model()

        def forward(self, x, labels):
            logits = self.layers(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    step = rewrite(Classifier(), Plan([Exact("layers.1")]))
    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        report_to=[],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="epoch",
        disable_tqdm=True,
    )
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(model=step, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    assert step.ledger["layers.1"].vjps == 5
    for mine, theirs in zip(step.parameters(), expected(), strict=True):
        assert torch.equal(mine, theirs)
    saved = list(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert len(saved) == 1
    from safetensors.torch import load_file

    fresh = copy.deepcopy(step)
    fresh.load_state_dict(load_file(saved[0]))
    assert fresh._clock.forward == 4

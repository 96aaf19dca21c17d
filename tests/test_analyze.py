"""`nf.analyze` from what a training script has at hand: a loader, an optimiser, a criterion, batches with labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import noetherflow as nf
from noetherflow.core.losses import averaged, labelled_loss
from noetherflow.errors import DataError


def setting(samples=128):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(samples, 6), torch.randint(3, (samples,))
    return model, x, y, DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


class TestPerSample:
    @pytest.mark.parametrize(
        ("criterion", "targets"),
        [
            (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.randint(3, (16,))),
            (nn.MSELoss(), lambda: torch.randn(16, 3)),
            (F.smooth_l1_loss, lambda: torch.randn(16, 3)),
            (nn.BCEWithLogitsLoss(), lambda: torch.rand(16, 3)),
        ],
    )
    def test_the_mean_over_samples_is_the_criterion(self, criterion, targets):
        model, x, _, _ = setting()
        batch = x[:16], targets()
        losses = nf.per_sample(criterion)(model, batch)
        assert losses.shape == (16,)
        assert losses.mean().item() == pytest.approx(criterion(model(batch[0]), batch[1]).item(), rel=1e-5)
        alone = nf.per_sample(criterion)(model, (batch[0][3:4], batch[1][3:4]))
        assert losses[3].item() == pytest.approx(alone.item(), rel=1e-5)

    def test_ignored_targets_do_not_count(self):
        losses = averaged(torch.tensor([[1.0, 3.0], [5.0, 0.0], [0.0, 0.0]]), torch.tensor([[2, 2], [2, 9], [9, 9]]), 9)
        assert losses.tolist() == [2.0, 5.0, 0.0]

    def test_what_has_no_loss_of_a_sample_is_refused(self):
        model, x, y, _ = setting()
        with pytest.raises(DataError, match="class weights"):
            nf.per_sample(nn.CrossEntropyLoss(weight=torch.ones(3)))
        with pytest.raises(DataError, match="takes no reduction"):
            nf.per_sample(lambda a, b: (a - b).square())
        with pytest.raises(DataError, match="no reduction"):
            nf.per_sample(nn.ReLU())
        with pytest.raises(DataError, match=r"batches \(inputs, targets\)"):
            nf.per_sample(nn.MSELoss())(model, {"x": x, "y": y})


def test_loader_criterion_and_optimiser_are_read():
    model, x, y, loader = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    analysis = nf.analyze(model, nn.CrossEntropyLoss(), loader, optimizer, curvature=False)
    assert analysis.sgd == nf.SGDConfig(0.05, 16, 1e-3, 0.9, dataset_size=128, sampling="epoch")
    assert analysis.moments.samples == 128
    assert set(analysis.moments.mean) == {n for n, _ in model.named_parameters()}
    single = lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    by_hand = nf.analyze(model, single, [(x, y)], analysis.sgd, x[:2], curvature=False)
    for ours, theirs in zip(analysis.equilibrium, by_hand.equilibrium, strict=True):
        assert torch.allclose(ours.element, theirs.element, rtol=1e-3)


def test_the_peak_of_a_schedule_counts():
    """At the first step of a warmup the optimiser's own learning rate is nearly 0."""
    model, _, _, loader = setting()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    assert nf.analyze(model, nn.CrossEntropyLoss(), loader, optimizer, curvature=False).sgd.lr == 3e-3
    assert optimizer.param_groups[0]["lr"] == 0


def test_a_loader_in_order_counts_as_fresh_data_and_is_not_read_to_its_end():
    model, x, y, _ = setting(4096)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    analysis = nf.analyze(model, nn.CrossEntropyLoss(), loader, sgd, samples=256, curvature=False)
    assert analysis.moments.samples == 256
    assert analysis.sgd.dataset_size is None


def test_batch_statistics_are_measured_by_minibatches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    _, _, _, loader = setting()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    analysis = nf.analyze(model, nn.CrossEntropyLoss(), loader, sgd, curvature=False)
    assert analysis.moments.replicates.batch_size == 16
    assert analysis.moments.samples == 120


def test_under_adam_matrices_count_by_the_scale_of_each_head():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False))
    _, _, _, loader = setting()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    analysis = nf.analyze(model, nn.CrossEntropyLoss(), loader, adam, curvature=False)
    assert [s.kind for s in analysis.symmetries] == ["diagonal"]
    sgd = torch.optim.SGD(model.parameters(), lr=1e-2)
    analysis = nf.analyze(model, nn.CrossEntropyLoss(), loader, sgd, curvature=False)
    assert [s.kind for s in analysis.symmetries] == ["general_linear"]


def test_curvature_and_diagnosis_are_part_of_it():
    model, _, _, loader = setting()
    sgd = nf.analyze(model, nn.CrossEntropyLoss(), loader, torch.optim.SGD(model.parameters(), lr=0.01))
    assert sgd.curvature.top_now > 0
    adam = nf.analyze(model, nn.CrossEntropyLoss(), loader, torch.optim.Adam(model.parameters(), lr=0.01))
    assert adam.curvature.top > 0
    for analysis in (sgd, adam):
        assert "What should I change?" in str(analysis)
        assert analysis.to_dict()["diagnosis"]["findings"]


class TestLabels:
    @pytest.fixture
    def llama(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 17}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))

    @pytest.fixture
    def batches(self):
        ids = [torch.randint(17, (8, 6)) for _ in range(4)]
        return [{"input_ids": i, "labels": i} for i in ids]

    def test_the_losses_are_the_model_s_own(self, llama, batches):
        losses = labelled_loss(llama, batches[0])
        assert losses.shape == (8,)
        assert losses.mean().item() == pytest.approx(llama(**batches[0]).loss.item(), rel=1e-5)

    def test_the_five_questions_are_answered(self, llama, batches):
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3, weight_decay=0.1)
        diagnosis = nf.diagnose(llama, None, batches, optimizer, steps=2000, warmup=100)
        text = str(diagnosis)
        for topic in ("norms", "warmup", "balance", "decay"):
            assert diagnosis.about(topic)
            assert diagnosis.about(topic)[0].question in text
        assert "What should I change?" in text
        assert "head" in diagnosis["frozen-heads"].title

    def test_without_labels_or_a_loss_it_says_so(self, llama, batches):
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
        with pytest.raises(DataError, match="batches with labels"):
            nf.diagnose(llama, None, [{"input_ids": batches[0]["input_ids"]}], optimizer)

    def test_unequal_labels_are_refused(self, llama, batches):
        labels = batches[0]["labels"].clone()
        labels[0, 1:5] = -100
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
        with pytest.raises(DataError, match="unequal numbers of labels"):
            nf.diagnose(llama, None, [{**batches[0], "labels": labels}], optimizer)

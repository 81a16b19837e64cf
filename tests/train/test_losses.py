"""Losses, mixing and teachers at literal values."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import crossvit
from crossvit.errors import UsageError, WeightsError
from crossvit.results import TrainingResult
from crossvit.run import Run
from crossvit.train.loop import fit
from crossvit.train.losses import Criterion, Mixing, NormalisedAnew, class_weights
from crossvit.train.recipe import DistillationRecipe, MixingRecipe
from support.loopback import Hub, serve_hub
from support.runs import Heard, recipe, same_bits, weights_of

TWO = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # logits of two images
LABELS = torch.tensor([0, 0])


def nats(chance: float) -> float:
    return -math.log(chance)


def softmax(a: float, b: float) -> tuple[float, float]:
    return math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(b) / (math.exp(a) + math.exp(b))


def test_the_loss_is_the_mean_of_the_branches_logits_in_nats() -> None:
    branches = torch.stack((TWO + 1.0, TWO - 1.0))
    loss = Criterion(label_smoothing=0.0)(branches, LABELS, TWO)
    assert loss.item() == pytest.approx((nats(softmax(2, 0)[0]) + nats(softmax(0, 1)[0])) / 2)


def test_smoothed_labels_are_a_mixture_with_all_classes() -> None:
    first, second = softmax(2, 0)
    loss = Criterion(label_smoothing=0.1)(TWO[None, :1], LABELS[:1], TWO)
    assert loss.item() == pytest.approx(0.95 * nats(first) + 0.05 * nats(second))


def test_class_weights_are_the_inverse_of_how_often_a_class_comes() -> None:
    assert class_weights([1, 3]).tolist() == pytest.approx([2.0, 2 / 3])
    assert class_weights([2, 0, 2]).tolist() == pytest.approx([2 / 3, 0.0, 2 / 3])
    weights = torch.tensor([3.0, 1.0])
    labels = torch.tensor([0, 1])
    loss = Criterion(label_smoothing=0.0, weights=weights)(TWO[None], labels, TWO)
    expected = (3 * nats(softmax(2, 0)[0]) + 1 * nats(softmax(0, 1)[1])) / 2
    assert loss.item() == pytest.approx(expected)


def test_weighted_parts_of_a_batch_add_up_to_the_whole() -> None:
    criterion = Criterion(label_smoothing=0.1, weights=torch.tensor([0.3, 2.0]))
    logits, labels = torch.randn(1, 6, 2), torch.tensor([0, 1, 1, 0, 1, 1])
    parts = [
        criterion(part, label, part) * 2 / 6
        for part, label in zip(logits.split(2, dim=1), labels.split(2), strict=True)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(
        criterion(logits, labels, logits).item(), rel=1e-6
    )


def test_mixup_mixes_images_and_targets_alike() -> None:
    """The images hold their own labels, so the share that was taken can be read off them."""
    labels = torch.arange(4)
    images = F.one_hot(labels, 4).float()[:, :, None, None].expand(4, 4, 2, 2)
    mixing = Mixing(MixingRecipe(mixup=1.0), classes=4, label_smoothing=0.0, seed=0)
    mixed, targets = mixing(images, labels, step=3)
    torch.testing.assert_close(mixed[:, :, 0, 0], targets)
    assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert 0 < targets[0, 0] < 1
    assert targets[0, 0] + targets[0, 3] == pytest.approx(
        1.0
    )  # with the image at the other end of the batch


def test_cutmix_pastes_a_rectangle_and_weighs_by_its_area() -> None:
    labels = torch.arange(4)
    images = labels.float()[:, None, None, None].expand(4, 1, 16, 16)
    mixed, targets = Mixing(MixingRecipe(cutmix=1.0), classes=4, label_smoothing=0.0, seed=1)(
        images, labels, step=0
    )
    for index in range(4):
        share = (mixed[index] == labels[index]).float().mean().item()
        assert targets[index, index].item() == pytest.approx(share)
        assert targets[index, 3 - index].item() == pytest.approx(1 - share)


def test_mixing_follows_from_the_seed_and_the_step_alone() -> None:
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    settings = MixingRecipe(mixup=0.8, cutmix=1.0)
    one, other = (Mixing(settings, classes=6, label_smoothing=0.1, seed=seed) for seed in (0, 1))
    first = one(images, labels, step=5)
    torch.manual_seed(99)  # what else is drawn changes nothing
    one(images, labels, step=6)
    again = one(images, labels, step=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], one(images, labels, step=6)[1])
    assert not torch.equal(first[1], other(images, labels, step=5)[1])


@pytest.mark.parametrize("count", [1, 5])
def test_the_last_image_of_an_odd_batch_stays_as_it_is(count: int) -> None:
    images, labels = torch.randn(count, 3, 8, 8), torch.arange(count) % 3
    before = images.clone()
    mixed, targets = Mixing(MixingRecipe(mixup=1.0), classes=3, label_smoothing=0.3, seed=0)(
        images, labels, step=0
    )
    assert torch.equal(mixed[-1], before[-1])
    assert torch.equal(images, before)  # the loader's own images are left alone
    smooth = F.one_hot(labels[-1], 3) * 0.7 + 0.1
    torch.testing.assert_close(targets[-1], smooth)


def test_mixing_that_is_off_changes_nothing() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    assert Mixing(MixingRecipe(), classes=4, label_smoothing=0.1, seed=0)(
        images, labels, step=0
    ) == (images, labels)


def teach(answers: Tensor, **settings: object) -> Criterion:
    return Criterion(
        label_smoothing=0.0,
        teacher=lambda images: answers,
        recipe=DistillationRecipe(teacher="x", **settings),
    )  # type: ignore[arg-type]


def test_a_soft_teacher_at_its_literal_value() -> None:
    answers = torch.tensor([[0.0, 4.0]])
    loss = teach(answers, distil_weight=1.0, temperature=2.0)(TWO[None, :1], LABELS[:1], TWO[:1])
    teacher, pupil = softmax(0, 2), softmax(1, 0)
    divergence = sum(p * math.log(p / q) for p, q in zip(teacher, pupil, strict=True))
    assert loss.item() == pytest.approx(4 * divergence)
    assert teach(TWO, distil_weight=1.0)(TWO[None], LABELS, TWO).item() == pytest.approx(
        0.0, abs=1e-6
    )


def test_a_hard_teacher_is_a_second_label() -> None:
    answers = torch.tensor([[0.0, 4.0]])
    loss = teach(answers, distil="hard", distil_weight=0.25)(TWO[None, :1], LABELS[:1], TWO[:1])
    assert loss.item() == pytest.approx(
        0.75 * nats(softmax(2, 0)[0]) + 0.25 * nats(softmax(2, 0)[1])
    )


def test_a_teacher_of_the_branches_teaches_each() -> None:
    branches = torch.stack((TWO, -TWO))
    answers = TWO
    loss = teach(answers, distil_weight=1.0, temperature=1.0, distil_branches=True)(
        branches, LABELS, TWO
    )
    alone = teach(answers, distil_weight=1.0, temperature=1.0)(-TWO[None], LABELS, TWO)
    assert loss.item() == pytest.approx(alone.item() / 2)  # the first branch agrees already


def test_a_teacher_gets_images_in_its_own_normalisation_and_size() -> None:
    seen: list[Tensor] = []

    class Look(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean(dim=(2, 3))

    picture = torch.rand(1, 3, 8, 8)
    student = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    own = ((0.0, 0.1, 0.2), (1.0, 0.5, 0.25))
    mean, std, own_mean, own_std = (
        torch.tensor(values)[:, None, None] for values in (*student, *own)
    )
    teacher = NormalisedAnew(Look(), student=student, own=own, image_size=(8, 8))
    teacher((picture - mean) / std)
    torch.testing.assert_close(seen[0], (picture - own_mean) / own_std)
    NormalisedAnew(Look(), student=student, own=own, image_size=(4, 6))(picture)
    assert seen[1].shape == (1, 3, 4, 6)


def test_a_run_teaches_a_run_and_resume_is_exact(
    tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    plan = {"teacher": tiny_run.run, "distil": "hard", "epochs": 2}
    taught = fit(recipe(scans, tmp_path / "taught", **plan))
    alone = fit(recipe(scans, tmp_path / "alone", epochs=2))
    assert not same_bits(weights_of(taught.run), weights_of(alone.run))
    assert fit(recipe(scans, tmp_path / "again", **plan)).epochs[-1].loss == taught.epochs[-1].loss
    assert Run(taught.run).record().recipe["distillation"]["teacher"] == tiny_run.run


def test_a_callable_teaches_and_must_be_given_again(scans: Path, tmp_path: Path) -> None:
    def always_first(images: Tensor) -> Tensor:
        return torch.tensor([9.0, 0.0, 0.0]).expand(len(images), 3)

    settings = {"distil": "hard", "distil_weight": 1.0, "epochs": 3, "label_smoothing": 0.0}
    result = fit(recipe(scans, tmp_path / "run", **settings), teacher=always_first)
    assert result.record.recipe["distillation"]["teacher"] == "a callable"
    assert all(
        found.label == "0"
        for found in crossvit.Predictor(result.run)(list(scans.glob("*/*.png"))[:9])
    )
    Run(result.run).amend(result=None)
    with pytest.raises(
        UsageError, match=r"this run's teacher was given in Python: go on with crossvit\.fit\("
    ):
        fit(crossvit.load_recipe(result.run), resume=True)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("resnet18", "give timm:NAME, timm:local-dir:FOLDER or a run folder"),
        ("timm:no_such_model", "unknown teacher 'timm:no_such_model'"),
        ("timm:resnet81", "unknown teacher 'timm:resnet81': did you mean timm:resnet18"),
        ("timm:local-dir:no/such", "teacher timm:local-dir:no/such: no folder no/such"),
    ],
)
def test_a_teacher_that_is_not_there_is_a_wrong_call(
    teacher: str, says: str, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        fit(recipe(scans, tmp_path / "run", teacher=teacher))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that timm asks too, and no cache."""
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "".join(template[1:])
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "shared"))
        yield hub


def test_a_teacher_that_cannot_be_fetched_is_work_that_failed_in_one_line(
    hub: Hub,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The hub's own tries are stood in for: each of them warns, and the last raises."""

    def fetch(name: str, *, pretrained: bool) -> nn.Module:
        assert pretrained
        for logger in ("huggingface_hub.utils._http", "urllib3.connectionpool", "timm.models._hub"):
            logging.getLogger(logger).warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no such host\nand more")

    monkeypatch.setattr("timm.create_model", fetch)
    says = r"^the weights of the teacher timm:resnet18 cannot be had \(no such host\): timm:local-dir:FOLDER takes some that"
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    with pytest.raises(WeightsError, match=says) as caught:
        fit(recipe(scans, tmp_path / "run", teacher="timm:resnet18"))
    assert caught.value.exit_status == 1
    assert "Retrying" not in capfd.readouterr().err
    assert logger.level == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("server", ["silent", "closed"])
def test_a_hub_that_does_not_answer_is_named_and_given_up_soon(
    server: str, hub: Hub, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own client would ask it ten times, for 46 seconds in all."""
    monkeypatch.setattr("crossvit.weights.hub.TIMEOUT", 0.3)
    callback = Heard()
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        if server == "silent":
            place.listen()
        address = f"http://127.0.0.1:{place.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        started = time.monotonic()
        with pytest.raises(
            WeightsError, match=r"timm:resnet18 cannot be had \(.*(timed out|refused)"
        ):
            fit(recipe(scans, tmp_path / "run", teacher="timm:resnet18"), callback=callback)
    assert time.monotonic() - started < 20
    assert (
        callback.lines[-1]
        == f"fetch  the weights of timm:resnet18 from {address}/timm/resnet18.a1_in1k"
    )


def test_a_teacher_is_fetched_once_and_that_is_said(hub: Hub, scans: Path, tmp_path: Path) -> None:
    import timm

    hub.put(
        "timm/test_vit.r160_in1k",
        "model.safetensors",
        save(timm.create_model("test_vit").state_dict()),
    )
    said = []
    for name in ("one", "two"):
        callback = Heard()
        with pytest.raises(UsageError, match=r"answers for other classes \(1000 classes\)"):
            fit(recipe(scans, tmp_path / name, teacher="timm:test_vit"), callback=callback)
        said.append([line for line in callback.lines if line.startswith("fetch")])
    assert said == [
        [f"fetch  the weights of timm:test_vit from {hub.address}/timm/test_vit.r160_in1k"],
        [],
    ]
    assert [path for path, _ in hub.fetched() if path.endswith(".safetensors")] == [*hub.files]


def test_a_timm_model_teaches_and_must_know_the_classes(scans: Path, tmp_path: Path) -> None:
    import timm

    for classes in (3, 5):
        timm.models.save_for_hf(
            timm.create_model("test_vit", num_classes=classes),
            tmp_path / str(classes),
            safe_serialization=True,
        )
    fit(recipe(scans, tmp_path / "run", teacher=f"timm:local-dir:{tmp_path / '3'}"))
    with pytest.raises(UsageError, match=r"answers for other classes \(5 classes\)"):
        fit(recipe(scans, tmp_path / "other", teacher=f"timm:local-dir:{tmp_path / '5'}"))

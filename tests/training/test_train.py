"""Training: what changes and what does not, resume, the recipe, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from arrag_runtime.faid.adapter import read_adapter
from arrag_runtime.faid.attach import attach_faid
from arrag_runtime.format.errors import ArragError, BadInputError, IncompatibleError
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.training_set import TrainingSet
from arrag_runtime.training import run as training_run
from arrag_runtime.training.settings import TrainSettings
from arrag_runtime.training.train import learning_rate, make_training_model, step_examples, train
from tests.worlds import command_line
from tests.worlds.servers.s3_server import free_port
from tests.worlds.training_world import EXAMPLES, K, quick, write_model, write_set

ROOT = Path(__file__).parents[2]
Curve = list[tuple[int, float, float, float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set.arrow")


def curve(out: Path) -> Curve:
    """The steps, losses, learning rates and gradient norms that a run has written."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(d["step"], d["loss"], d["learning_rate"], d["gradient_norm"]) for d in lines]


def test_only_adapter_lora_norms_and_head_change(model: Path, data: Path, tmp_path: Path) -> None:
    settings = quick(model, data, tmp_path / "run")
    fresh = make_training_model(settings, TrainingSet.open(data), "cpu")
    trained_names = {id(parameter) for parameter in fresh.trained().values()}
    frozen = {n: p.clone() for n, p in fresh.named_parameters() if id(p) not in trained_names}
    buffers = {n: b.clone() for n, b in fresh.named_buffers()}
    before = {name: p.detach().clone() for name, p in fresh.trained().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arrag_runtime.training.train.make_training_model", lambda *_: fresh)
        assert train(settings).steps == 6
    after = dict(fresh.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(torch.equal(b, buffers[n]) for n, b in fresh.named_buffers())
    assert not any(after[name].requires_grad for name in frozen)
    changed = {n for n, p in fresh.trained().items() if not torch.equal(p, before[n])}
    assert changed == fresh.trained().keys()
    parts = {".".join(name.split(".")[:2]) for name in changed}
    assert parts == {"faid.layers", "lora.model", "model.generation_head"}
    lora = {name.split("self_attn.")[1] for name in changed if name.startswith("lora.")}
    assert lora == {f"{p}.{side}" for p in ("q_proj", "v_proj") for side in "AB"}
    assert len([name for name in changed if name.startswith("lora.")]) == 4 * 2 * 2


def test_the_loss_falls_and_the_adapter_generates_what_was_trained(
    model: Path, data: Path, tmp_path: Path
) -> None:
    from arrag_runtime.backends import load_backend

    settings = quick(model, data, tmp_path / "run", steps=40, global_batch=4, lora_dropout=0.0)
    report = train(settings)
    losses = [loss for _, loss, _, _ in curve(tmp_path / "run")]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert report.loss == losses[-1]
    opened = TrainingSet.open(data)
    examples = step_examples(opened, settings, [0, 1, 2])
    trained = make_training_model(settings, opened, "cpu").eval()
    trained.load(read_adapter(report.adapter), "adapter")
    with torch.no_grad():
        expected = trained(*trained.inputs(examples))
    backend: Any = load_backend("janus", str(model))
    faid = attach_faid(backend.model, report.adapter, k=K)
    ids, mask = backend.prompt_ids(examples.captions)
    tokens = torch.from_numpy(examples.tokens.astype(np.int64))
    images = backend.model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    inputs = torch.cat([backend.model.get_input_embeddings()(ids), images], 1)
    seen = torch.nn.functional.pad(mask, (0, images.shape[1]), value=1)
    retrieved = torch.from_numpy(examples.neighbors.astype(np.int64))
    with faid.whole(retrieved, 7, 7, start=ids.shape[1]):
        states = backend.model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        ).last_hidden_state
    logits = backend.model.model.generation_head(states[:, ids.shape[1] - 1 :])
    found = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_run_that_was_interrupted_ends_the_same(model: Path, data: Path, tmp_path: Path) -> None:
    whole = train(quick(model, data, tmp_path / "whole"))
    broken = quick(model, data, tmp_path / "broken")

    def stop(done: int, _total: int, _loss: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, stop)
    assert len(curve(broken.out)) == 5
    assert not (broken.out / "adapter.safetensors").exists()
    kept = sorted(p.name for p in (broken.out / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000004"]
    # A checkpoint that was being written is none.
    draft = broken.out / "checkpoints" / ".step-000006"
    draft.mkdir()
    (draft / "adapter.safetensors").write_text("half")
    again = train(broken)
    assert (again.resumed_at, again.steps, again.loss) == (4, 6, whole.loss)
    assert curve(broken.out) == curve(tmp_path / "whole")
    one, other = read_adapter(whole.adapter), read_adapter(again.adapter)
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
    done = train(broken)
    assert (done.resumed_at, done.loss) == (6, whole.loss)
    assert curve(broken.out) == curve(tmp_path / "whole")


def test_accumulating_gives_the_gradients_of_the_whole_batch(
    model: Path, data: Path, tmp_path: Path
) -> None:
    one = quick(model, data, tmp_path / "one", batch_size=4, lora_dropout=0.0, steps=3)
    train(one)
    train(replace(one, out=tmp_path / "four", batch_size=1))
    np.testing.assert_allclose(curve(tmp_path / "one"), curve(tmp_path / "four"), rtol=1e-4)


def test_the_recipe_is_the_papers() -> None:
    paper = TrainSettings(model="m", data=Path("d"), out=Path("o"))
    assert (paper.hops, paper.blenders, paper.k) == ((1, 2), 2, 10)
    assert (paper.lora_rank, paper.lora_alpha, paper.lora_dropout) == (128, 256, 0.05)
    assert (paper.learning_rate, paper.warmup, paper.clip) == (2e-4, 0.1, 1.0)
    assert (paper.global_batch, paper.epochs, paper.caption_tokens) == (256, 1.0, 512)
    assert paper.precision == "bfloat16"
    rates = [learning_rate(paper, step, 20) for step in range(20)]
    assert rates[:3] == [1e-4, 2e-4, 2e-4]
    assert set(rates[1:]) == {2e-4}


def test_candidates_are_shuffled_and_epochs_go_through_everything(
    data: Path, tmp_path: Path
) -> None:
    opened = TrainingSet.open(data)
    settings = quick(tmp_path, data, tmp_path, k=2)
    stored = opened.rows(range(EXAMPLES))
    places = list(range(EXAMPLES))
    first, second = (
        step_examples(opened, settings, [p + e for p in places]) for e in (0, EXAMPLES)
    )
    assert sorted(first.captions) == sorted(second.captions) == sorted(stored.captions)
    assert first.captions != second.captions
    nearest = {c: n[:, :2] for c, n in zip(stored.captions, stored.neighbors, strict=True)}
    moved = 0
    for caption, shown in zip(first.captions, first.neighbors, strict=True):
        assert np.array_equal(np.sort(shown, axis=1), np.sort(nearest[caption], axis=1))
        moved += int((shown != nearest[caption]).any(axis=1).sum())
    assert 0.3 < moved / (EXAMPLES * 25) < 0.6
    again = step_examples(opened, settings, places)
    assert np.array_equal(again.neighbors, first.neighbors)
    assert (first.neighbors == MISSING).any()


def test_bfloat16_trains_float32_weights(model: Path, data: Path, tmp_path: Path) -> None:
    settings = quick(model, data, tmp_path / "run", precision="bfloat16", steps=2)
    trained = make_training_model(settings, TrainingSet.open(data), "cpu")
    assert {p.dtype for p in trained.trained().values()} == {torch.float32}
    report = train(settings)
    stored = read_adapter(report.adapter)
    assert {tensor.dtype for tensor in stored.tensors.values()} == {torch.bfloat16}
    checkpoint = read_adapter(
        tmp_path / "run" / "checkpoints" / "step-000002" / "adapter.safetensors"
    )
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    exact = train(replace(settings, precision="float32", out=tmp_path / "exact"))
    assert report.loss == pytest.approx(exact.loss, rel=0.02)


def test_tensorboard_gets_what_the_lines_say(model: Path, data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(quick(model, data, tmp_path / "run", steps=3))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for column, name in enumerate(("loss", "learning_rate", "gradient_norm")):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        written = [(line[0], line[column + 1]) for line in curve(tmp_path / "run")]
        np.testing.assert_allclose(shown, written, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 4}, "has 3 retrieved tokens a position, and --k is 4; make one with"),
        ({"global_batch": 5}, "--global-batch 5 is no multiple of --batch-size 2 times 1"),
        ({"hops": (5,)}, "hops 5; give one or more of"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; give more than 0"),
        ({"steps": 0}, "--steps is 0; give 1 or more"),
        ({"data": Path("gone")}, "no training set at 'gone'; make one"),
        ({"model": "gone/away"}, "gone/away"),
        ({"learning_rate": 1e30, "steps": 3}, "lower --learning-rate"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArragError, match=message) as caught:
        train(
            quick(model, data, tmp_path / "run")
            if not changes
            else replace(quick(model, data, tmp_path / "run"), **changes)
        )
    assert "\n" not in str(caught.value)


def test_a_set_or_run_that_does_not_fit_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    codes = "model.vqmodel.quantize.embedding.weight"
    weights[codes] = weights[codes].flip(0)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"training set .* does not fit generator"):
        train(quick(other, data, tmp_path / "run"))
    train(quick(model, data, tmp_path / "run", steps=2))
    with pytest.raises(IncompatibleError, match=r"holds a run with another seed 0, not 1; name"):
        train(quick(model, data, tmp_path / "run", steps=2, seed=1))
    bigger = write_set(tmp_path / "bigger.arrow", examples=12)
    with pytest.raises(IncompatibleError, match="holds a run with another"):
        train(quick(model, bigger, tmp_path / "run", steps=2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BadInputError, match=r"is not empty \(it holds letter\.txt\)"):
        train(quick(model, data, tmp_path / "mine"))


def test_old_checkpoints_go(model: Path, data: Path, tmp_path: Path) -> None:
    train(quick(model, data, tmp_path / "run", checkpoint_every=1))
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:06}" for step in (5, 6)]
    assert training_run._KEEP == 2


def test_the_command_trains_and_says_so(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--model", model, "--data", data, "--out", out, "--k", K, "--lora-rank", 0]
    words += ["--global-batch", 2, "--batch-size", 2, "--steps", 2, "--hops", "2"]
    assert run(words, capsys) == (0, f"adapter {out / 'adapter.safetensors'}: 2 steps, ", "")
    made = read_adapter(out / "adapter.safetensors")
    assert (made.spec.hops, made.spec.lora_rank, made.lora_pairs()) == ((2,), 0, {})
    for changed, error in (
        (["--hops", "1,b"], "error: --hops '1,b' is no list of numbers; write them like '1,2'\n"),
        (["--seed", 3], f"error: --out {out} holds a run with another seed 0, not 3; name another"),
    ):
        code, text, err = run([*words, *changed], capsys)
        assert (code, text, err[: len(error)]) == (1, "", error)
        assert err.count("\n") == 1


def run(words: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout up to the loss, and stderr of `arrag train`."""
    capsys.readouterr()
    code, out, err = command_line.run(capsys, "train", *words, program="arrag")
    return code, out.split("last loss")[0], err


@pytest.mark.slow
def test_two_processes_train_what_one_does(model: Path, data: Path, tmp_path: Path) -> None:
    """`accelerate launch`, each process with half of the batch and gradients exchanged."""
    script = tmp_path / "arrag.py"
    script.write_text("from cli import main_runtime\n\nmain_runtime()\n")
    words = ["--model", str(model), "--data", str(data), "--k", str(K), "--lora-rank", "4"]
    words += ["--lora-alpha", "8", "--lora-dropout", "0", "--global-batch", "4", "--steps", "3"]
    words += ["--batch-size", "1", "--precision", "float32", "--checkpoint-every", "2", "--quiet"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    for out, several in ((one, ["--num_processes", "1"]), (two, ["--num_processes", "2"])):
        command = [*launch, *several, "--main_process_port", str(free_port()), str(script)]
        done = subprocess.run(
            [*command, "train", *words, "--out", str(out)],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("adapter ") == 1
    np.testing.assert_allclose(curve(one), curve(two), rtol=1e-4)
    first, second = (read_adapter(out / "adapter.safetensors") for out in (one, two))
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[name], atol=1e-3, rtol=0)

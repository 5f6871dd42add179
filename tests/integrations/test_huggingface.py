"""`huggingface.ThermoCallback` on the real `transformers.Trainer`."""

import pytest
import torch
from transformers import TrainerCallback

import thermo_opt as to
from tests.integrations.small_worlds import (
    TOKENS,
    classifier,
    gpt2,
    masked,
    rows,
    t5,
    trainer,
    weights,
)
from thermo_opt.errors import InputError
from thermo_opt.integrations.huggingface import ThermoCallback
from thermo_opt.runs.replicas import read_replicas


class Listener(TrainerCallback):
    """What a W&B or TensorBoard callback is told."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **_):
        self.heard.append((state.global_step, dict(logs)))


def recorded(folder, model, callback=None, **options):
    training = trainer(folder / "trainer", model, **options)
    training.add_callback(ThermoCallback(training, folder / "run", **(callback or {})))
    return training


def test_training_is_bit_for_bit_what_it_is_without_the_callback(tmp_path):
    plain, watched = gpt2(), gpt2()
    trainer(tmp_path / "plain", plain).train()
    recorded(tmp_path, watched, gradient_accumulation_steps=1).train()
    assert torch.equal(weights(plain), weights(watched))


def test_the_live_scalars_are_those_of_the_audit_of_the_recorded_run(tmp_path):
    training = recorded(tmp_path, gpt2())
    listener = Listener()
    training.add_callback(listener)
    training.train()
    told = [logs for step, logs in listener.heard if "thermo/dissipation" in logs]
    assert [logs["thermo/dissipation"] for logs in told] == sorted(
        logs["thermo/dissipation"] for logs in told
    )
    summary = to.audit(to.load_run(tmp_path / "run"), lens="outputs").summary
    assert told[-1]["thermo/dissipation"] == pytest.approx(summary["dissipation"])
    assert told[-1]["thermo/efficiency"] == pytest.approx(summary["efficiency"])
    assert told[-1]["thermo/loss"] == pytest.approx(summary["loss_end"])


def test_the_trainers_own_numbers_are_still_logged(tmp_path):
    training = recorded(tmp_path, gpt2())
    training.train()
    history = training.state.log_history
    assert [h["step"] for h in history if "loss" in h] == [2, 4, 6]
    assert [h["step"] for h in history if "thermo/loss" in h] == [2, 4, 6]


def test_a_steps_loss_is_the_mean_over_its_accumulated_parts(tmp_path):
    training = recorded(tmp_path, gpt2(), gradient_accumulation_steps=2, logging_steps=1)
    training.train()
    logged = [h["loss"] for h in training.state.log_history if "loss" in h]
    assert list(to.load_run(tmp_path / "run").steps["loss"]) == pytest.approx(logged, abs=1e-4)


def test_replicas_in_a_trainer_agree_with_what_the_path_alone_says(tmp_path):
    """The trainer calls its scheduler after the callback; training stays what it is."""
    runs = {}
    for name in ("alone", "replicas"):
        model, draws = gpt2(), torch.Generator().manual_seed(5)

        def other(model=model, draws=draws):
            batch = TOKENS[torch.randint(len(TOKENS), (4,), generator=draws)]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        given = {"replica": other, "replica_every": 3} if name == "replicas" else {}
        options = {"optim": "sgd", "learning_rate": 0.5, "warmup_steps": 6}
        recorded(tmp_path / name, model, given, steps=24, **options).train()
        run = to.load_run(tmp_path / name / "run")
        runs[name] = weights(model), to.audit(run, lens="outputs"), run
    (plain, alone, _), (watched, split, run) = runs["alone"], runs["replicas"]
    assert torch.equal(plain, watched)
    ratios = [replica.lr_ratio for replica in read_replicas(run.path)]
    rates = run.steps["lr"].to_numpy()
    # replica k is taken at the rate of step k, the one before its own; the first two at none
    assert ratios == pytest.approx([1, *(rates[k] / rates[k - 1] for k in range(3, 24, 3))])
    told, other = split.summary["split"], alone.summary["split"]
    assert told["replicas"] == 8
    assert told["noise"] > 2 * told["noise_error"]
    whole = split.summary["dissipation"]
    assert told["noise"] + told["drift"] == pytest.approx(whole, abs=2 * told["drift_error"])
    assert other["noise"] is None
    assert "without replicas" in other["reason"]
    gap = (other["transport"] or 0) - (told["transport"] or 0)  # null: no more than its error
    assert abs(gap) < 3 * (other["transport_error"] + told["transport_error"])
    assert (other["transport"] or 0) < told["drift"]


def test_nothing_of_the_callback_stays_on_the_trainer(tmp_path):
    training = recorded(tmp_path, gpt2(), steps=1)
    training.train()
    assert "training_step" not in vars(training)


@pytest.mark.parametrize(
    ("model", "labels", "likelihood"),
    [
        (gpt2, TOKENS, "categorical"),
        (masked, TOKENS, "categorical"),
        (t5, TOKENS, "categorical"),
        (classifier, TOKENS[:, 0] % 2, "categorical"),
        (lambda: classifier(num_labels=1), TOKENS[:, 0].float(), "gaussian"),
        (lambda: classifier(num_labels=3), (TOKENS[:, :3] > 5).float(), "bernoulli"),
    ],
    ids=["causal", "masked", "encoder-decoder", "classes", "regression", "labels"],
)
def test_the_probes_loss_is_the_models_own(tmp_path, model, labels, likelihood):
    data, made = rows(labels), model()
    with torch.no_grad():
        before = float(made.eval()(input_ids=TOKENS, labels=labels).loss)
    recorded(tmp_path, made, steps=1, data=data, eval_dataset=data).train()
    run = to.load_run(tmp_path / "run")
    assert run.info.likelihood == likelihood
    if likelihood == "categorical":
        assert to.audit(run, lens="outputs").summary["loss_start"] == pytest.approx(before, 1e-4)


def test_a_run_is_continued_at_the_checkpoint_that_training_resumes_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    model = gpt2()
    recorded(tmp_path, model, **options).train()
    whole = to.audit(to.load_run(tmp_path / "run"), lens="outputs").summary
    resumed = recorded(tmp_path, gpt2(seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3"))
    again = to.audit(to.load_run(tmp_path / "run"), lens="outputs").summary
    assert again["steps"] == whole["steps"] == 6
    assert again["dissipation"] == pytest.approx(whole["dissipation"], rel=1e-4)
    live = [h for h in resumed.state.log_history if "thermo/dissipation" in h][-1]
    assert live["thermo/dissipation"] == pytest.approx(again["dissipation"])


def test_ngdt_shows_its_alignment_realised_kl_and_kappa(tmp_path):
    model = gpt2()
    training = recorded(tmp_path, model, optimizers=(to.NGDT(model), None))
    training.train()
    shown = [h for h in training.state.log_history if "thermo/kappa" in h][-1]
    assert shown["thermo/kappa"] > 0
    assert shown["thermo/realised"] > 0
    assert abs(shown["thermo/alignment"]) <= 1
    assert to.load_run(tmp_path / "run").info.optimizer == "NGDT"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eval_dataset": None}, "no eval_dataset"),
        ({"eval_dataset": [{"input_ids": x} for x in TOKENS]}, "no 'labels'"),
    ],
)
def test_no_probe_is_refused_before_a_weight_moves(tmp_path, options, says):
    model = gpt2()
    before = weights(model)
    training = recorded(tmp_path, model, **options)
    with pytest.raises(InputError, match=says):
        training.train()
    assert torch.equal(weights(model), before)
    assert not (tmp_path / "run").exists()

"""The loop: what it writes, how it resumes, how it ends."""

import concurrent.futures
import copy
import dataclasses
import gc
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import doors
import jax
import numpy as np
import pytest

from lm import checkpoint, files, schema, validation
from lm import config as config_lib
from lm.data import objectives, pipeline, prefetch, store
from lm.evaluate import perplexity
from lm.train import evaluation, ledger, loop, optimizer, plot, programs, resume
from lm.train import metrics as metrics_lib
from lm.train import profile as profile_lib
from lm.train import report as report_lib
from lm.train import stop as stop_lib

ROOT = pathlib.Path(__file__).parent.parent
# What must not depend on when a run was stopped, or on the clock.
EXACT = (
  "step tokens train/loss train/perplexity grad_norm lr eval/loss"
  " eval/perplexity eval/bits_per_byte batch_hash"
).split()


@pytest.fixture(scope="module")
def unbroken(make, tmp_path_factory):
  """A finished run of 12 steps: its config and directory."""
  workdir = tmp_path_factory.mktemp("runs") / "unbroken"
  config = make()
  assert loop.train(config, str(workdir)) == 0
  return config, workdir


def _exact(workdir):
  reports = metrics_lib.read(str(workdir))
  return [{k: r[k] for k in EXACT if k in r} for r in reports]


def assert_close(got, want, rtol):
  """Two runs' reports: the same batches, numbers within `rtol`."""
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for name, value in b.items():
      if isinstance(value, str):
        assert a[name] == value, name
      else:
        np.testing.assert_allclose(a[name], value, rtol=rtol, err_msg=name)


def _params(workdir, config):
  return jax.tree.map(
    np.asarray, checkpoint.load_params(str(workdir), config.model)
  )


def _cut(workdir, copy, step):
  """The run as a kill just after the checkpoint of `step` would leave it."""
  shutil.copytree(workdir, copy)
  for path in (copy / "checkpoints").iterdir():
    if path.name.isdigit() and int(path.name) > step:
      shutil.rmtree(path)


def test_a_run_leaves_what_it_promises(unbroken):
  config, workdir = unbroken
  reports = metrics_lib.read(str(workdir))
  assert [r["step"] for r in reports] == [2, 4, 6, 8, 10, 12]
  for report in reports:
    assert report["tokens"] == report["step"] * 8 * 32
    np.testing.assert_allclose(
      report["train/perplexity"], np.exp(report["train/loss"])
    )
    assert report["tokens_per_second"] > 0
    assert 0 <= report["data_wait_fraction"] <= 1
    assert report["mfu"] is None  # a CPU's peak is not known
    assert ("eval/loss" in report) == (report["step"] in (6, 12))
  last = reports[-1]
  np.testing.assert_allclose(last["eval/perplexity"], np.exp(last["eval/loss"]))
  assert last["train/loss"] < reports[0]["train/loss"]
  saved = json.loads((workdir / "config.json").read_text())
  assert validation.from_json(json.dumps(saved)) == config
  assert list((workdir / "tensorboard").iterdir())
  meta = checkpoint.load_meta(str(workdir))
  assert meta.step == 12 and meta.config == config


def test_reports_are_means_over_tokens(make, tmp_path, monkeypatch):
  """Two runs of unequal batches: with every step reported, layer by layer at
  some, and with every fourth; two validation sources.
  """
  causal = objectives.causal

  def unequal(*window):
    row = causal(*window)
    return dataclasses.replace(row, weights=row.weights * (row.targets % 3 > 0))

  monkeypatch.setattr(objectives, "causal", unequal)
  runs = []
  for every in (1, 4):
    config = make(train__steps=6, train__log_every=every)
    config.train.statistics_every = 5 if every == 1 else None
    first = config.data.validation[0]
    config.data.validation = (first, first.replace("cli", "locks"))
    config.train.profile = (3, 2) if every == 1 else None
    workdir = tmp_path / str(every)
    assert loop.train(config, str(workdir)) == 0
    runs.append(metrics_lib.read(str(workdir)))
  single, few = runs
  prepared = store.prepare(config)
  batches = pipeline.train_batches(config, prepared)
  weights = [next(batches).weights.sum() for _ in single]
  losses = [r["train/last_loss"] for r in single]
  assert len(set(weights)) > 1 and len(losses) == 6
  np.testing.assert_allclose([r["train/loss"] for r in single], losses)
  assert [r["step"] for r in few] == [4, 6]
  for report, steps in zip(few, (slice(4), slice(4, 6)), strict=True):
    assert report["train/last_loss"] == losses[steps][-1]
    mean = np.average(losses[steps], weights=weights[steps])
    np.testing.assert_allclose(report["train/loss"], mean, rtol=1e-12)
  n_scored = [0.0, 0.0]
  for s, batch in pipeline.validation_batches(config, prepared):
    n_scored[s] += batch.weights.sum()
  parts = [single[-1][f"eval/{spec}/loss"] for spec in config.data.validation]
  mean = np.average(parts, weights=n_scored)
  np.testing.assert_allclose(single[-1]["eval/loss"], mean, rtol=1e-12)
  for report in single:
    layers = {k: v for k, v in report.items() if k.startswith("layers/")}
    assert len(layers) == (5 if report["step"] == 5 else 0)
    assert all(len(v) == 2 and min(v) > 0 for v in layers.values())
  (events,) = (tmp_path / "1" / "tensorboard").iterdir()
  assert b"layers/residual_rms/1" in events.read_bytes()
  (trace,) = (tmp_path / "1" / "profile").rglob("*.xplane.pb")
  for scope in "embed attention mlp final_norm loss optimizer".split():
    assert re.search(
      rb"jit\(step\)/[^\n]*\b%b\b" % scope.encode(), trace.read_bytes()
    )


def test_a_batch_without_targets_counts_in_no_loss(make, tmp_path, monkeypatch):
  """Such as some of chats that are cut before the answer. It has no loss."""
  causal = objectives.causal

  def rare(*window):
    row = causal(*window)
    weights = row.weights * (row.targets.sum() % 8 == 0)
    return dataclasses.replace(row, weights=weights)

  monkeypatch.setattr(objectives, "causal", rare)
  runs = []
  for every in (1, 4):
    config = make(train__steps=8, train__log_every=every, data__validation=())
    assert loop.train(config, str(tmp_path / str(every))) == 0
    runs.append(metrics_lib.read(str(tmp_path / str(every))))
  batches = pipeline.train_batches(config, store.prepare(config))
  weights = np.array([next(batches).weights.sum() for _ in range(8)])
  assert 0 < (weights == 0).sum() < 8
  losses = [r["train/loss"] for r in runs[0]]
  assert [x is None for x in losses] == (weights == 0).tolist()
  known = np.array([x or 0.0 for x in losses])
  for report, steps in zip(runs[1], (slice(4), slice(4, 8)), strict=True):
    mean = np.average(known[steps], weights=weights[steps])
    np.testing.assert_allclose(report["train/loss"], mean, rtol=1e-12)


def test_messages_are_no_markup(capsys):
  """A glob and a path are said as they are."""
  progress = metrics_lib.Progress(1, 0)
  said = "text:[a-z]*.txt and /x/[/y]/:cat: are said as they are"
  progress.say(said)
  progress.close()
  assert capsys.readouterr().err == f"{said}\n"


def test_a_layer_that_is_not_finite_is_null(tmp_path):
  writer = metrics_lib.Writer(str(tmp_path), 0)
  writer.write({"step": 1, "layers/mlp_rms": [1.0, math.nan, math.inf]})
  writer.close()
  (report,) = metrics_lib.read(str(tmp_path))
  assert report["layers/mlp_rms"] == [1.0, None, None]
  assert report["nonfinite"] == ["layers/mlp_rms"]


def test_what_was_not_finite_stays_named_after_a_restart(tmp_path):
  first = metrics_lib.Writer(str(tmp_path), 0)
  first.write({"step": 1, "train/loss": math.nan})
  first.close()
  again = metrics_lib.Writer(str(tmp_path), 1)
  again.amend({"eval/loss": math.inf})
  again.close()
  (report,) = metrics_lib.read(str(tmp_path))
  assert report["nonfinite"] == ["train/loss", "eval/loss"]
  assert report["train/loss"] is None and report["eval/loss"] is None


def test_a_trace_that_cannot_be_written_is_a_line(tmp_path):
  """JAX's error of a full disk reads as one of device memory."""
  (tmp_path / "profile").touch()
  profile = profile_lib.Profile(str(tmp_path), (1, 1))
  with profile.step(1):
    pass
  with pytest.raises(schema.RunError, match="profile: .* not be written"):
    profile.dispatched(1, ())


def test_a_full_disk_is_said_of_the_reports(tmp_path):
  writer = metrics_lib.Writer(str(tmp_path), 0)
  writer.write({"step": 1})
  path = tmp_path / "metrics.jsonl"
  path.unlink()
  path.symlink_to("/dev/full")
  with pytest.raises(OSError, match="No space left") as error:
    writer.write({"step": 2})
  assert error.value.filename == str(path)
  writer.close()


def test_event_files_need_no_torch(tmp_path):
  """tensorboardX would import it, for a second, where it is installed; later
  imports find it.
  """
  (tmp_path / "torch.py").write_text("print('torch is imported')")
  program = (
    "import sys; from lm.train import metrics; metrics.Writer(sys.argv[1], 0); "
    "print('written'); import torch"
  )
  child = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert child.stdout == "written\ntorch is imported\n", child.stderr
  assert [*(tmp_path / "tensorboard").iterdir()]


def test_a_finished_run_is_left_alone(unbroken):
  config, workdir = unbroken
  before = (workdir / "metrics.jsonl").read_text()
  assert loop.train(config, str(workdir)) == 0
  assert (workdir / "metrics.jsonl").read_text() == before


def test_a_finished_run_without_its_reports_is_complete(unbroken, tmp_path):
  config, workdir = unbroken
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / "metrics.jsonl").unlink()
  (tmp_path / "run" / "curves.png").touch()
  assert loop.train(config, str(tmp_path / "run")) == 0


def test_a_report_without_numbers_is_no_point_of_the_picture(tmp_path, curves):
  lines = '{"step": 1}\n{"step": 2, "tokens": "x", "lr": "y"}\n'
  lines += '{"step": 3, "train/loss": 1.5}\n'
  (tmp_path / "metrics.jsonl").write_text(lines)
  plot.draw(str(tmp_path))
  assert (tmp_path / "curves.png").exists()


def test_resumed_run_is_bit_equal(unbroken, tmp_path):
  """Also dropout and the average; reports after the checkpoint are redone."""
  config, workdir = unbroken
  _cut(workdir, tmp_path / "run", step=9)
  assert loop.train(config, str(tmp_path / "run")) == 0
  assert _exact(tmp_path / "run") == _exact(workdir)
  for a, b in zip(
    jax.tree.leaves(_params(tmp_path / "run", config)),
    jax.tree.leaves(_params(workdir, config)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


# Orbax leaves coroutines behind where a restore fails.
leaves_coroutines = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def _tear(item):
  """Cuts the data files of a checkpoint's item in half. All of them: some hold
  nothing that is still referred to.
  """
  for path in item.rglob("d/*"):
    os.truncate(path, path.stat().st_size // 2)


@leaves_coroutines
@pytest.mark.parametrize(
  ("damage", "cause"), [("torn", "Error"), ("altered", "the digest of `rest`")]
)
def test_a_damaged_checkpoint_is_set_aside(
  damage, cause, unbroken, tmp_path, capsys
):
  """Torn, or of other numbers than were saved; the run goes back to step 6."""
  config, workdir = unbroken
  _cut(workdir, tmp_path / "run", step=9)
  step = tmp_path / "run" / "checkpoints" / "9"
  if damage == "torn":
    _tear(step / "rest")
  else:
    meta = json.loads((step / "meta" / "metadata").read_text())
    meta["digests"]["rest"] = meta["digests"]["params"]
    del meta["digest"]
    meta["digest"] = files.json_digest(meta)
    (step / "meta" / "metadata").write_text(json.dumps(meta))
  assert loop.train(config, str(tmp_path / "run")) == 0
  said = capsys.readouterr().err.replace("\n", "")
  assert "checkpoints/9/rest is damaged" in said and cause in said
  assert "going back to step 6" in said
  assert (tmp_path / "run" / "damaged" / "9").is_dir()
  assert _exact(tmp_path / "run") == _exact(workdir)
  last = [checkpoint.load_meta(str(d)) for d in (workdir, tmp_path / "run")]
  assert last[0].digests == last[1].digests
  gc.collect()  # those coroutines, while this test is under way


@leaves_coroutines
def test_damaged_parameters_are_not_sampled_from(unbroken, tmp_path):
  config, workdir = unbroken
  shutil.copytree(workdir, tmp_path / "run")
  _tear(tmp_path / "run" / "checkpoints" / "12" / "ema")
  with pytest.raises(files.Damaged, match="12/ema is damaged"):
    checkpoint.load_params(str(tmp_path / "run"), config.model)
  gc.collect()


@pytest.mark.parametrize(
  ("at", "step"),
  [
    pytest.param("step", 6, marks=pytest.mark.slow),
    ("evaluation", 6),
    pytest.param("step", 12, marks=pytest.mark.slow),
  ],
)
def test_a_stop_where_an_evaluation_is_due_loses_nothing(
  at, step, unbroken, tmp_path, monkeypatch
):
  """Stopped after a step, before its evaluation or within it, and stopped again
  within the evaluation that the next start makes up for; also the last step,
  which is evaluated whatever eval_every is.
  """
  config, workdir = unbroken
  if step == 12:
    config = copy.deepcopy(config)
    config.train.eval_every = 8

  def ask(original):
    def wrapped(*args, **kwargs):
      result = original(*args, **kwargs)
      calls.append(None)
      stop.asked |= len(calls) == {"step": step, "evaluation": 1}[at]
      return result

    return wrapped

  for again in (False, True):
    calls, stop = [], stop_lib.Stop()
    at = "evaluation" if again else at
    with monkeypatch.context() as patch:
      if at == "step":
        patch.setattr(
          prefetch.DevicePrefetch,
          "__next__",
          ask(prefetch.DevicePrefetch.__next__),
        )
      else:
        patch.setattr(perplexity, "totals", ask(perplexity.totals))
      assert loop.train(config, str(tmp_path / "run"), stop) == 0
    reports = metrics_lib.read(str(tmp_path / "run"))
    assert reports[-1]["step"] == step and "eval/loss" not in reports[-1]
  assert loop.train(config, str(tmp_path / "run")) == 0
  got, want = _exact(tmp_path / "run"), _exact(workdir)
  assert got[-1] == want[-1] if step == 12 else got == want


def test_a_stop_gives_a_checkpoint_no_loss_of_the_step_before(
  make, tmp_path, monkeypatch
):
  """Step 6 is evaluated, and the stop comes in step 7."""
  stop, taken = stop_lib.Stop(), []
  take = prefetch.DevicePrefetch.__next__

  def ask(batches):
    taken.append(None)
    stop.asked |= len(taken) == 7
    return take(batches)

  monkeypatch.setattr(prefetch.DevicePrefetch, "__next__", ask)
  workdir = str(tmp_path / "run")
  assert loop.train(make(train__eval_every=6), workdir, stop) == 0
  losses = {r["step"]: r.get("eval/loss") for r in metrics_lib.read(workdir)}
  assert losses[6] is not None
  meta = checkpoint.load_meta(workdir)
  assert (meta.step, meta.loss) == (7, None)


def test_a_longer_run_reports_no_step_twice(make, tmp_path):
  """The last step is reported, though neither log_every nor an evaluation asks
  for it, and the first report of the longer run is of its own steps.
  """
  first, longer = tmp_path / "first", tmp_path / "longer"
  config = make(train__steps=6, train__log_every=4)
  config.data.validation = ()
  assert loop.train(config, str(first)) == 0
  shutil.copytree(first, longer)
  config.train.steps = 8
  reports = []
  for workdir, every in ((longer, 4), (first, 1)):
    config.train.log_every = every
    assert loop.train(config, str(workdir)) == 0
    reports.append({r["step"]: r for r in metrics_lib.read(str(workdir))})
  few, single = reports
  assert [*few] == [4, 6, 8] and [*single] == [4, 6, 7, 8]
  batches = pipeline.train_batches(config, store.prepare(config), start_step=6)
  weights = [next(batches).weights.sum() for _ in range(2)]
  losses = [single[step]["train/last_loss"] for step in (7, 8)]
  mean = np.average(losses, weights=weights)
  np.testing.assert_allclose(few[8]["train/loss"], mean, rtol=1e-12)
  assert math.isclose(single[7]["train/loss"], losses[0])


@pytest.mark.parametrize(
  ("mode", "fsdp", "tensor", "parts"),
  [
    ("jit", 2, 2, 2),
    pytest.param("pmap", 1, 1, 1, marks=pytest.mark.slow),
  ],
)
def test_resumed_on_another_mesh(
  mode, fsdp, tensor, parts, unbroken, tmp_path, make
):
  _, workdir = unbroken
  _cut(workdir, tmp_path / "run", step=9)
  config = make(
    mesh__mode=mode,
    mesh__fsdp=fsdp,
    mesh__tensor=tensor,
    train__microbatches=parts if mode == "jit" else 1,
  )
  if mode == "jit":
    config.mesh.data = 2
  assert loop.train(config, str(tmp_path / "run")) == 0
  assert_close(_exact(tmp_path / "run"), _exact(workdir), rtol=1e-4)


def test_retention(make, tmp_path):
  """Last 1, every 8th, and the best, which a rising rate puts early."""
  config = make(
    checkpoint__save_every=2,
    checkpoint__keep_last=1,
    checkpoint__keep_every=8,
    train__eval_every=2,
    optimizer__peak_lr=3.0,
    optimizer__warmup_steps=8,
    optimizer__schedule="constant",
    optimizer__ema_decay=None,
  )
  assert loop.train(config, str(tmp_path)) == 0
  evals = {
    r["step"]: r["eval/loss"]
    for r in metrics_lib.read(str(tmp_path))
    if "eval/loss" in r
  }
  best = min(evals, key=lambda step: evals[step])
  assert best not in (8, 12)  # else this test would show nothing
  kept = checkpoint.Checkpoints(str(tmp_path), config.checkpoint)
  assert kept.steps() == sorted({best, 8, 12})
  kept.close()


def test_a_loss_that_is_not_finite_is_never_the_best(
  make, tmp_path, monkeypatch
):
  losses = {3: 5.0, 6: math.nan, 9: 6.0, 12: 7.0}
  given = iter(losses.values())
  monkeypatch.setattr(
    evaluation, "summary", lambda parts: {"eval/loss": next(given)}
  )
  config = make(train__eval_every=3, checkpoint__keep_last=1)
  assert loop.train(config, str(tmp_path / "run")) == 0
  assert checkpoint.steps(str(tmp_path / "run")) == [3, 12]
  reports = metrics_lib.read(str(tmp_path / "run"))
  found = {r["step"]: r["eval/loss"] for r in reports if "eval/loss" in r}
  assert found == losses | {6: None}


def test_epochs_end_the_run_and_its_schedule(make, tmp_path, capsys, curves):
  config = make(
    data__epochs=1,
    train__steps=100_000,
    train__log_every=50,
    train__eval_every=100,
    checkpoint__save_every=100,
  )
  small = config.data.validation[0].replace("cli", "digest")
  config.data.train = (small,)
  assert loop.train(config, str(tmp_path)) == 0
  last = metrics_lib.read(str(tmp_path))[-1]
  step = last["step"]
  assert step < 100_000 and "eval/loss" in last
  assert checkpoint.load_meta(str(tmp_path)).step == step
  said = capsys.readouterr().err
  assert f"the data end at step {step}, and the schedule with them" in said
  # The last step has the learning rate of a run of so many steps.
  o = config.optimizer
  rate = optimizer.rate_at(o, step, step - 1)
  assert last["lr"] == pytest.approx(rate)
  assert rate < o.peak_lr / 4
  (tmp_path / "curves.png").unlink()  # as if killed just before it was drawn
  assert loop.train(config, str(tmp_path)) == 0
  assert f"is at step {step}: complete" in capsys.readouterr().err
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_validation_sources_nothing_is_evaluated(make, tmp_path):
  config = make(data__validation=(), train__steps=6)
  assert loop.train(config, str(tmp_path)) == 0
  reports = metrics_lib.read(str(tmp_path))
  assert reports[-1]["step"] == 6
  assert not any(name.startswith("eval/") for r in reports for name in r)
  assert checkpoint.load_meta(str(tmp_path)).loss is None


@pytest.fixture(scope="module")
def diverging(make, tmp_path_factory):
  """A run whose loss is not finite after 3 good steps, and its error."""
  workdir = tmp_path_factory.mktemp("diverging")
  config = make(
    optimizer__clip_norm=None,
    optimizer__warmup_steps=0,
    optimizer__ema_decay=None,
    checkpoint__save_every=1,
    checkpoint__on_mismatch="fresh_optimizer",
    train__log_every=1,
    train__steps=3,
  )
  assert loop.train(config, str(workdir)) == 0
  config.optimizer.peak_lr, config.train.steps = 1e30, 12
  with pytest.raises(report_lib.Diverged) as error:
    loop.train(config, str(workdir))
  return config, workdir, str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run(diverging):
  """With the exit code that launchers do not try again."""
  config, workdir, said = diverging
  assert report_lib.Diverged.exit_code == 2
  step = int(said.split("step ")[1].split(":")[0])
  assert f"last checkpoint: step {step - 1}" in said
  params = _params(workdir, config)
  assert checkpoint.load_meta(str(workdir)).step == step - 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_diverged_run_tells_how_to_go_on_and_can(diverging, make, tmp_path):
  """The last checkpoint is the exploded one; that of step 3 is not, and a new
  config is compared with its own.
  """
  config, workdir, _ = diverging
  workdir = shutil.copytree(workdir, tmp_path / "run")
  with pytest.raises(report_lib.Diverged, match="--from_step=STEP") as error:
    loop.train(config, str(workdir))
  losses = {r["step"]: r["train/loss"] for r in metrics_lib.read(str(workdir))}
  assert checkpoint.steps(str(workdir))[:4] == [1, 2, 3, 4]
  for step in checkpoint.steps(str(workdir)):
    assert f"{step} (training loss {losses[step]:.4g})" in str(error.value)
  better = copy.deepcopy(config)
  better.optimizer.peak_lr, better.train.steps = 1e-3, 5
  better.checkpoint.on_mismatch = "refuse"
  with pytest.raises(schema.ConfigError, match="peak_lr was 0.01"):
    loop.train(better, str(workdir), from_step=3)
  better.checkpoint.on_mismatch = "fresh_optimizer"
  assert loop.train(better, str(workdir), from_step=3) == 0
  assert metrics_lib.read(str(workdir))[-1]["step"] == 5
  assert (workdir / "abandoned" / "4").exists()


def test_a_run_that_leaves_out_every_step_stops(make, tmp_path):
  """And its reports are JSON, which knows no NaN."""
  config = make(
    optimizer__peak_lr=1e30,
    optimizer__clip_norm=None,
    optimizer__warmup_steps=0,
    optimizer__ema_decay=None,
    optimizer__skip=config_lib.SkipConfig(window=5),
    train__steps=40,
    train__log_every=1,
  )
  with pytest.raises(
    report_lib.Diverged, match="last 5 steps .* left out"
  ) as error:
    loop.train(config, str(tmp_path))
  assert str(error.value).endswith(" optimizer.peak_lr")

  def no_constant(name):
    raise AssertionError(f"{name} is not JSON")

  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  reports = [json.loads(line, parse_constant=no_constant) for line in lines]
  last = reports[-1]
  assert last["grad_norm"] is None and "grad_norm" in last["nonfinite"]
  assert len(reports) < 40
  plot.draw(str(tmp_path))


def test_a_longer_run_says_what_becomes_of_the_learning_rate(
  unbroken, tmp_path, capsys
):
  config, workdir = unbroken
  shutil.copytree(workdir, tmp_path / "run")
  longer = copy.deepcopy(config)
  longer.train.steps, longer.data.validation = 14, config.data.train
  longer.train.eval_batches = 2
  assert loop.train(longer, str(tmp_path / "run")) == 0
  said = capsys.readouterr().err.replace("\n", "")
  old, new = (
    optimizer.rate_at(config.optimizer, steps, 12) for steps in (12, 14)
  )
  assert f"the learning rate goes from {old:.3g} to {new:.3g}" in said
  assert "from step 12 on the validation set is another one" in said
  assert "from step 12 on config.train.eval_batches is 2; was 3" in said
  saved = (tmp_path / "run" / "config.json").read_text()
  assert validation.from_json(saved) == longer
  history = (tmp_path / "run" / "config_history.jsonl").read_text()
  assert json.loads(history)["config"]["train"]["steps"] == 12


def test_a_run_with_damaged_reports_goes_on(unbroken, tmp_path, capsys):
  """What can be read is kept, the rest set aside, and said."""
  config, workdir = unbroken
  _cut(workdir, tmp_path / "run", step=9)
  path = tmp_path / "run" / "metrics.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  bad = [b"{\n", b"\xff\x00\n", b"null\n", b'{"step": "1"}\n', b"\n"]
  path.write_bytes(b"".join([lines[0], *bad, *lines[1:], b'{"step": 7']))
  (tmp_path / "run" / "goodput.json").write_text("")
  left = tmp_path / "run" / "goodput.json.0123abcd.partial"  # of a kill
  left.write_text("[")
  (tmp_path / "run" / "film.partial").touch()  # the user's own
  assert loop.train(config, str(tmp_path / "run")) == 0
  assert _exact(tmp_path / "run") == _exact(workdir)
  said = capsys.readouterr().err.replace("\n", "")
  assert "metrics.jsonl: 5 damaged lines moved to" in said
  assert "goodput.json is damaged: moved to" in said
  partials = [p.name for p in (tmp_path / "run").glob("*.partial")]
  assert partials == ["film.partial"]
  (aside,) = (tmp_path / "run").glob("metrics.jsonl.damaged-*")
  assert aside.read_bytes() == b"".join(bad)
  assert len(ledger.read(str(tmp_path / "run"))) == 1


def test_a_run_of_another_config_is_refused(unbroken, make):
  _, workdir = unbroken
  before = sorted(workdir.rglob("*"))
  config = make(optimizer__peak_lr=0.5, train__batch_size=16)
  with pytest.raises(schema.ConfigError) as error:
    loop.train(config, str(workdir))
  assert "config.optimizer.peak_lr was 0.01 and is 0.5" in str(error.value)
  assert "config.train.batch_size was 8 and is 16" in str(error.value)
  assert sorted(workdir.rglob("*")) == before


def test_other_data_is_refused(unbroken, make, tmp_path):
  """And nothing is written or moved."""
  config, workdir = unbroken
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  folder = pathlib.Path(config.data.cache_dir).parent
  path = folder / "config.py"
  text = path.read_text()
  path.write_text(text + "\n# changed\n")
  before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
  try:
    with pytest.raises(schema.ConfigError, match="other data"):
      loop.train(make(train__steps=20), str(copy))
    with pytest.raises(schema.ConfigError, match="other data"):
      loop.train(make(train__steps=20), str(copy), from_step=9)
  finally:
    path.write_text(text)
  assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mesh__tensor": 3}, "does not multiply to the 8 devices"),
    ({"train__batch_size": 6}, "config.train.batch_size"),
    ({"model__n_kv_heads": 1, "mesh__tensor": 2}, "config.model.n_kv_heads=1"),
    ({"data__train": ("text:/no/such/*",)}, "/no/such/"),
    ({"model__vocab_size": 300}, "vocab"),
  ],
)
def test_bad_input_writes_nothing(fields, message, make, tmp_path):
  config = make(**fields)
  with pytest.raises(schema.ConfigError, match=message):
    loop.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def _start(config, workdir, tmp_path):
  """`python -m lm.train` in a child, its config as a file."""
  path = tmp_path / "config.py"
  path.write_text(
    "from lm import validation\n\n\ndef get_config():\n"
    f"  return validation.from_json({config_lib.to_json(config)!r})\n"
  )
  flags = f"--config={path}", f"--workdir={workdir}"
  return doors.Popen("lm.train", flags, JAX_NUM_CPU_DEVICES="2")


def _wait_for(child, condition):
  """Until the condition holds; fails, with what the child said, if it ends."""
  deadline = time.monotonic() + 240
  while not condition():
    assert child.poll() is None, child.stderr.read()
    assert time.monotonic() < deadline, "the child took too long"
    time.sleep(0.02)


@pytest.mark.parametrize(
  ("which", "code"),
  [
    (signal.SIGTERM, 0),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
  ],
)
def test_a_signal_saves_and_the_run_goes_on(which, code, make, tmp_path):
  workdir = tmp_path / "run"
  config = make(
    train__steps=100_000,
    train__eval_every=50_000,
    train__log_every=1,
    checkpoint__save_every=50_000,
    mesh__fsdp=1,
  )
  child = _start(config, workdir, tmp_path)
  _wait_for(child, lambda: len(metrics_lib.read(str(workdir))) >= 3)
  child.send_signal(which)
  _, said = child.communicate(timeout=120)
  assert child.returncode == code, said
  assert "Traceback" not in said
  step = checkpoint.load_meta(str(workdir)).step
  assert f"step {step} is saved" in said
  reports = metrics_lib.read(str(workdir))
  assert [r["step"] for r in reports] == list(range(1, step + 1))
  assert reports[-1]["step"] == step


def test_stop_hears_each_signal_and_gives_the_handlers_back():
  before = {which: signal.getsignal(which) for which in stop_lib.EXIT_CODES}
  for which, code in stop_lib.EXIT_CODES.items():
    with stop_lib.Stop() as stop:
      signal.raise_signal(which)
      assert stop.asked and stop.agreed() and stop.exit_code == code
      assert stop.reason == ("Ctrl-C" if code else which.name)
    assert {w: signal.getsignal(w) for w in before} == before


def test_stop_leaves_ignored_signals_alone():
  """As under nohup, or in the background of a script."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop_lib.Stop() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert not stop.asked
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
  ended, now = [], [0.0]
  monkeypatch.setattr(stop_lib.os, "_exit", ended.append)
  monkeypatch.setattr(stop_lib.time, "monotonic", lambda: now[0])
  with stop_lib.Stop():
    for seconds in (0.0, 0.1, 2.0):  # the first one comes twice
      now[0] += seconds
      signal.raise_signal(signal.SIGINT)
      assert ended == ([130] if seconds == 2 else [])


def test_training_in_a_thread_takes_no_handler(unbroken, tmp_path):
  config, workdir = unbroken
  shutil.copytree(workdir, tmp_path / "run")
  before = signal.getsignal(signal.SIGTERM)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    done = pool.submit(loop.train, config, str(tmp_path / "run"))
    assert done.result() == 0
  assert signal.getsignal(signal.SIGTERM) is before


def test_the_step_compiles_while_the_state_is_made(make, tmp_path, monkeypatch):
  """One after the other, each would wait for the other to begin. An error of
  one leaves no thread behind.
  """
  both, compiled = threading.Barrier(2, timeout=60), []

  def compile_step(*_):
    both.wait()
    time.sleep(0.2)
    compiled.append(True)

  def first_state(*_):
    both.wait()
    raise schema.RunError("no state")

  monkeypatch.setattr(programs, "compile_step", compile_step)
  monkeypatch.setattr(resume, "first_state", first_state)
  with pytest.raises(schema.RunError, match="no state"):
    loop.train(make(), str(tmp_path / "run"))
  assert compiled


def test_sigterm_while_compiling_exits_0(make, tmp_path):
  """The signal comes as soon as the run directory is there; the compilation,
  made long by many unrolled layers, is under way or next.
  """
  workdir = tmp_path / "run"
  config = make(model__scan_layers=False, model__n_layers=40, mesh__fsdp=1)
  child = _start(config, workdir, tmp_path)
  _wait_for(child, (workdir / "goodput.json").exists)
  time.sleep(0.5)
  started = time.monotonic()
  child.send_signal(signal.SIGTERM)
  _, said = child.communicate(timeout=60)
  assert child.returncode == 0, said
  assert "stopped by SIGTERM while" in said
  assert time.monotonic() - started < 30


def test_sigterm_while_python_ends_exits_0():
  """A second one, or one that comes after the last step."""
  program = """
import os, signal, sys
from lm import config
from lm.train import __main__, loop

class Last:
  def __del__(self, kill=os.kill, me=os.getpid()):
    kill(me, signal.SIGTERM)

loop.train = lambda *_, **__: 0
sys.modules["last"] = Last()
__main__._WORKDIR = type("Flag", (), {"value": "run"})
__main__._FROM_STEP = type("Flag", (), {"value": None})
sys.exit(__main__.main(config.Config()))
"""
  environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  child = subprocess.run([sys.executable, "-c", program], env=environment)
  assert child.returncode == 0

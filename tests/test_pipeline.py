"""Batches: order, packing, and every token once."""

import itertools
import multiprocessing
import pathlib
import threading
import time

import jax
import numpy as np
import pytest
import tensorstore

from lm import batch as batch_lib
from lm import config as config_lib
from lm import schema
from lm.data import arrays, objectives, pipeline, prefetch
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib

FIELDS = {
  "inputs": np.int32,
  "targets": np.int32,
  "weights": np.float32,
  "segments": np.int32,
  "positions": np.int32,
}
LENGTH = 13


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  """Config and stores of sources given as lists of documents, in bytes."""

  def build(*sources, validation=(), **data):
    folder = tmp_path_factory.mktemp("corpus")
    config = config_lib.Config()
    config.model.vocab_size = tokenizer_lib.BYTES_SIZE
    config.tokenizer.kind = "bytes"
    config.data.text_unit = "line"
    config.data.cache_dir = str(folder / "cache")
    specs = []
    for i, documents in enumerate([*sources, *validation]):
      path = folder / f"{i}.txt"
      path.write_text("\n".join(documents))
      specs.append(f"text:{path}")
    config.data.train = tuple(specs[: len(sources)])
    config.data.validation = tuple(specs[len(sources) :])
    config.train.batch_size = 8
    config.train.sequence_length = LENGTH
    config.data.prefetch_rows = 24
    for name, value in data.items():
      setattr(config.data, name, value)
    return config, store_lib.prepare(config)

  return build


def documents(n: int, seed: int) -> list[str]:
  """Lines of very unequal length, all letters."""
  rng = np.random.default_rng(seed)
  lengths = rng.choice([1, 2, 5, 11, 12, 13, 40], n)
  return [
    "".join(map(chr, rng.integers(ord("a"), ord("z"), k))) for k in lengths
  ]


def take(batches, n: int) -> list[batch_lib.Batch]:
  return list(itertools.islice(batches, n))


def assert_same(a: batch_lib.Batch, b: batch_lib.Batch) -> None:
  assert a.present().keys() == b.present().keys() == FIELDS.keys()
  for key, value in a.present().items():
    np.testing.assert_array_equal(value, getattr(b, key), err_msg=key)


# --- packing -----------------------------------------------------------------


def slow_row(store, tokenizer, window: int) -> dict[str, list]:
  """One row by the words of the batch table, token by token."""
  flat = [
    (token, d)
    for d in range(store.n_documents)
    for token in store.document(d).tolist()
  ]
  row: dict[str, list] = {key: [] for key in FIELDS}
  seen: list[int] = []
  for i in range(window * LENGTH, (window + 1) * LENGTH):
    token, document = flat[i] if i < len(flat) else (tokenizer.pad, None)
    target, owner = flat[i + 1] if i + 1 < len(flat) else (tokenizer.pad, None)
    if document is not None and document not in seen:
      seen.append(document)
    row["inputs"].append(token)
    row["targets"].append(target)
    row["weights"].append(
      1.0 if document is not None and owner == document else 0
    )
    row["segments"].append(0 if document is None else seen.index(document) + 1)
    same = row["segments"].count(row["segments"][-1])
    row["positions"].append(0 if document is None else same - 1)
  return row


def test_rows_are_as_the_batch_table_says(make):
  config, prepared = make(["x"], validation=[documents(47, 3)])
  (store,) = prepared.validation
  (windows,) = pipeline.validation_windows(config, prepared)
  n = len(windows)
  assert n == -(-(store.n_tokens - 1) // LENGTH)
  rows = 0
  for _, batch in pipeline.validation_batches(config, prepared):
    fields = batch.present()
    assert {k: a.dtype for k, a in fields.items()} == FIELDS
    for r in range(8):
      expected = slow_row(store, prepared.tokenizer, rows)
      for key, a in fields.items():
        assert a.shape == (8, LENGTH)
        assert a[r].tolist() == expected[key], (rows, key)
      rows += 1
  assert rows == -(-n // 8) * 8


def test_causal_keeps_documents_apart():
  tokens = np.array([5, 7, 2, 1, 11, 13, 2, 1, 17, 0, 0])
  owners = np.array([1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0])
  row = objectives.causal(tokens, owners)
  assert row.inputs.tolist() == [5, 7, 2, 1, 11, 13, 2, 1, 17, 0]
  assert row.targets.tolist() == [7, 2, 1, 11, 13, 2, 1, 17, 0, 0]
  assert row.weights.tolist() == [1, 1, 0, 1, 1, 1, 0, 1, 0, 0]
  assert row.segments.tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 0]
  assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 0]


# --- order -------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_any_number_of_processes_and_any_restart(make, weights, n_processes):
  config, prepared = make(
    documents(31, 1), documents(67, 2), train_weights=weights
  )
  whole = take(pipeline.train_batches(config, prepared), 40)  # Some epochs.
  assert len({batch.inputs.tobytes() for batch in whole}) == 40
  for start in (0, 1, 17, 38):
    share = 8 // n_processes
    parts = [
      take(
        pipeline.train_batches(
          config,
          prepared,
          start_step=start,
          rows=(p * share, (p + 1) * share),
        ),
        2,
      )
      for p in range(n_processes)
    ]
    for step in range(2):
      pieces = [part[step] for part in parts]
      joined = jax.tree.map(lambda *rows: np.concatenate(rows), *pieces)
      assert_same(joined, whole[start + step])


def test_a_far_step_is_reached_at_once(make):
  config, prepared = make(documents(31, 1))
  started = time.perf_counter()
  batches = pipeline.train_batches(config, prepared, start_step=10**12)
  assert next(batches).weights.any()
  assert time.perf_counter() - started < 60  # else for ever


@pytest.mark.parametrize("seed", [0, 1])
def test_each_epoch_is_every_window_once_in_another_order(make, seed):
  config, prepared = make(documents(31, 1), documents(67, 2))
  config.seed = seed
  order = pipeline.training_order(config, prepared)
  windows = [
    (s, i)
    for s, some in enumerate(pipeline.training_windows(config, prepared))
    for i in range(len(some))
  ]
  n = len(windows)
  epochs = [[order[e * n + i] for i in range(n)] for e in range(5)]
  for epoch in epochs:
    assert sorted(epoch) == windows and epoch != windows
  assert len(set(map(tuple, epochs))) == 5
  config.seed = seed + 1
  other = pipeline.training_order(config, prepared)
  starts = [tuple(other[e * n + i] for i in range(n)) for e in range(5)]
  # grain adds the epoch to the seed: neighbouring seeds must not collide.
  assert not set(starts) & set(map(tuple, epochs))


def excess(observed: np.ndarray, expected: np.ndarray, freedom: int) -> float:
  """Chi-square of counts, in standard deviations above its mean."""
  chi = ((observed - expected) ** 2 / expected).sum()
  return float((chi - freedom) / np.sqrt(2 * freedom))


def test_the_shuffle_is_flat(make):
  """Where a window comes, what follows it, and where it comes next epoch."""
  n, n_epochs, bins = 4099, 29, 16
  config, prepared = make(["a" * (n * LENGTH - 3)])
  assert len(pipeline.training_windows(config, prepared)[0]) == n
  order = pipeline.training_order(config, prepared)
  windows = np.array([order[i][1] for i in range(n * n_epochs)])
  windows = windows.reshape(n_epochs, n)

  def dependence(a: np.ndarray, b: np.ndarray) -> float:
    table = np.histogram2d(a.ravel() * bins // n, b.ravel() * bins // n, bins)
    observed = table[0]
    expected = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    return excess(observed, expected, (bins - 1) ** 2)

  places = np.broadcast_to(np.arange(n), windows.shape)
  assert abs(dependence(places, windows)) < 5
  assert abs(dependence(windows[:, :-1], windows[:, 1:])) < 5
  when = np.argsort(windows, axis=1)
  assert abs(dependence(when[:-1], when[1:])) < 5
  steps = np.bincount((np.diff(windows) % n).ravel(), minlength=n)[1:]
  assert abs(excess(steps, steps.mean(), n - 2)) < 5


def test_weights_set_the_shares_and_sources_repeat(make):
  config, prepared = make(
    documents(97, 1), documents(397, 2), train_weights=(3.0, 1.0)
  )
  n = len(pipeline.training_windows(config, prepared)[0])
  order = pipeline.training_order(config, prepared)
  rows = [order[i] for i in range(3 * n)]
  sources = np.array([s for s, _ in rows])
  # Shares hold over every stretch, not only on average.
  for i in range(0, 2 * n, 20):
    assert abs((sources[i : i + 20] == 0).sum() - 15) <= 1
  first = [window for s, window in rows if s == 0]
  assert sorted(first[:n]) == sorted(first[n : 2 * n]) == list(range(n))
  assert first[:n] != first[n : 2 * n]


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_epochs_end_with_a_batch_filled_up(make, weights):
  config, prepared = make(
    documents(31, 1), documents(67, 2), epochs=2, train_weights=weights
  )
  n = sum(map(len, pipeline.training_windows(config, prepared)))
  assert 2 * n % 8  # Else nothing is to be filled up.
  batches = list(pipeline.train_batches(config, prepared))
  assert len(batches) == -(-2 * n // 8)
  rows = np.concatenate([batch.segments for batch in batches])
  assert rows[: 2 * n, 0].all() and not rows[2 * n :].any()
  if not weights:
    targets = sum(s.n_tokens - s.n_documents for s in prepared.train)
    weight = sum(batch.weights.sum() for batch in batches)
    # A bos is no target, nor is what would follow the last token.
    assert weight == 2 * targets
  assert not list(
    pipeline.train_batches(config, prepared, start_step=len(batches))
  )


# --- validation --------------------------------------------------------------


@pytest.mark.parametrize("n_processes", [1, 2])
def test_validation_scores_every_token_once(make, n_processes):
  texts = [documents(23, 5), documents(41, 6)]
  config, prepared = make(["x"], validation=texts)
  tokenizer = prepared.tokenizer
  share = 8 // n_processes
  parts = [
    list(
      pipeline.validation_batches(
        config, prepared, rows=(p * share, (p + 1) * share)
      )
    )
    for p in range(n_processes)
  ]
  scored: list[list[int]] = [[], []]
  for batches in zip(*parts, strict=True):
    for s, batch in batches:
      scored[s] += batch.targets[batch.weights > 0].tolist()
  for s, lines in enumerate(texts):
    expected = [[*tokenizer.encode(t), tokenizer.eos] for t in lines]
    assert scored[s] == sum(expected, [])
    n_bytes = tokenizer.byte_lengths[scored[s]].sum()
    assert n_bytes == prepared.validation[s].n_bytes


def test_eval_batches_limits_each_source(make):
  config, prepared = make(["x"], validation=[documents(53, 5), ["short"]])
  everything = list(pipeline.validation_batches(config, prepared))
  config.train.eval_batches = 3
  some = list(pipeline.validation_batches(config, prepared))
  assert [s for s, _ in some] == [0, 0, 0, 1]
  for (_, a), (_, b) in zip(some[:3], everything[:3], strict=True):
    assert_same(a, b)


# --- to the device -----------------------------------------------------------


def test_batches_are_placed_ahead_and_in_order():
  placed = []

  def place(batch):
    placed.append(int(batch["i"]))
    return placed[-1]

  source = iter([{"i": np.array(i)} for i in range(5)])
  batches = prefetch.DevicePrefetch(source, place)
  seen = []
  for i, batch in enumerate(batches):
    seen.append(batch)
    # Two are on their way while the caller has this one.
    ahead = list(range(min(i + 3, 5)))
    deadline = time.monotonic() + 10
    while placed != ahead and time.monotonic() < deadline:
      time.sleep(0.001)
    assert placed == ahead
  assert seen == list(range(5))


def test_what_is_made_while_the_caller_is_busy_is_not_waited_for():
  placed, go_on = [], threading.Event()

  def source():
    for i in range(4):
      # Without the fourth, the caller has three.
      assert i < 3 or go_on.wait(20)
      yield {"i": np.array(i)}

  def place(batch):
    placed.append(batch)
    return int(batch["i"])

  batches = prefetch.DevicePrefetch(source(), place)
  seen = [next(batches)]
  deadline = time.monotonic() + 60
  while len(placed) < 3:
    assert time.monotonic() < deadline
    time.sleep(0.001)
  seen += [next(batches), next(batches)]
  go_on.set()
  assert [*seen, *batches] == [0, 1, 2, 3]


def test_an_error_of_the_source_reaches_the_caller():
  def broken():
    yield {"i": np.zeros(1)}
    raise OSError("unreadable chunk")

  batches = prefetch.DevicePrefetch(broken(), lambda batch: batch)
  next(batches)
  with pytest.raises(OSError, match="unreadable chunk"):
    next(batches)


def test_no_validation_has_no_batches(make):
  config, prepared = make(documents(17, 0))
  assert prepared.validation == []
  assert list(pipeline.validation_batches(config, prepared)) == []


@pytest.mark.parametrize(
  "harm, kind, message",
  [
    (lambda chunk: chunk.write_bytes(chunk.read_bytes()[:9]), None, "damaged"),
    (
      lambda chunk: (chunk.unlink(), chunk.symlink_to(chunk)),
      OSError,
      "Too many levels",
    ),
  ],
)
def test_damage_to_a_store_reaches_the_caller(
  make, monkeypatch, harm, kind, message
):
  """In one line, out of the threads that read."""
  fresh = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
  monkeypatch.setattr(arrays, "_CONTEXT", fresh)
  config, prepared = make(documents(97, 0))
  harm(pathlib.Path(prepared.train[0].path, "tokens", "c", "0"))
  with pytest.raises(kind or schema.RunError, match=message):
    take(pipeline.train_batches(config, prepared), 1)


def test_threads_stop_with_the_consumer(make):
  config, prepared = make(documents(31, 1))

  # Threads of earlier tests may still be ending: only new ones count.
  before = set(threading.enumerate())

  def new() -> list[threading.Thread]:
    now = threading.enumerate()
    return [t for t in now if "grain" in t.name and t not in before]

  batches = pipeline.train_batches(config, prepared)
  device = prefetch.DevicePrefetch(batches, lambda batch: batch)
  next(device)
  assert new()
  del device, batches
  deadline = time.monotonic() + 10
  while new() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not new()


@pytest.mark.slow
def test_processes_make_the_same_batches_and_end(make):
  """From any step, to the end of the data, and with an error of the store."""
  config, prepared = make(documents(61, 2), epochs=2)
  want = list(pipeline.train_batches(config, prepared, start_step=3))
  config.data.processes = 2
  batches = pipeline.train_batches(config, prepared, start_step=3)
  first = next(batches)
  children = multiprocessing.active_children()
  assert len(children) == 2
  for a, b in zip([first, *batches], want, strict=True):
    assert_same(a, b)
  assert not any(child.is_alive() for child in children)

  config.data.epochs = None
  batches = pipeline.train_batches(config, prepared)
  next(batches)
  multiprocessing.active_children()[0].kill()
  with pytest.raises(schema.RunError, match="processes=2: .* was killed"):
    take(batches, 100)
  assert not multiprocessing.active_children()

  pathlib.Path(prepared.train[0].path, "tokens", "c", "0").write_bytes(b"")
  with pytest.raises(schema.RunError, match="damaged"):
    next(pipeline.train_batches(config, prepared))

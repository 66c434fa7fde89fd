"""Objectives and packing: rows written out by hand, documents that can be
recovered from rows, and numbers that do not depend on the packing.
"""

import copy
import dataclasses
import io
import itertools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from hypothesis import strategies as st
from matplotlib import figure as figure_lib

from lm import config as config_lib
from lm import objective as objective_lib
from lm import schema
from lm.data import fim, objectives, packing, pipeline, show, tokenizer_training
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import corpora
from lm.evaluate import output as output_lib
from lm.model import attention, decoder, scoring
from lm.train import loop, metrics

BYTES = tokenizer_lib.Tokenizer()
PAD, BOS, EOS, MASK = BYTES.pad, BYTES.bos, BYTES.eos, BYTES.mask
PRE, MID, SUF = BYTES.fim_prefix, BYTES.fim_middle, BYTES.fim_suffix
S0, S1 = BYTES.sentinels[:2]
ALL = (
  "causal",
  "prefix",
  "span_corruption",
  "span_corruption(rate=0.5, mean_span=8)",
  "fim",
  "fim(rate=1, cut='token')",
  "fim(rate=1, spm=1, cut='line')",
  "masked",
  "masked(rate=None)",
)


def draws(*numbers):
  """Stands in for a random generator: hands out the given numbers."""
  left = list(numbers)

  def random(n=None):
    found = [left.pop(0) for _ in range(1 if n is None else n)]
    return found[0] if n is None else np.array(found)

  return mock.Mock(spec=np.random.Generator, random=random)


def ids(text: str) -> list[int]:
  """One id a letter; digits are sentinels, and signs the other marks."""
  marks = {"<": BOS, ">": EOS, "_": PAD, "?": MASK, "0": S0, "1": S1}
  marks |= {"(": PRE, ")": SUF, "|": MID}
  return [marks[c] if c in marks else BYTES.encode(c)[0] for c in text]


def window(*documents: str, length: int):
  tokens, numbers = np.full(length + 1, PAD), np.zeros(length + 1, np.int32)
  n = 0
  for number, document in enumerate(documents, 1):
    tokens[n : n + len(document)] = ids(document)
    numbers[n : n + len(document)] = number
    n += len(document)
  return objectives.Window(tokens.astype(np.int32), numbers)


def row_of(name: str, documents, length: int, *numbers):
  _, objective = objective_lib.split_source(f"text:a|{name}")
  some = window(*documents, length=length)
  return objectives.row(objective, BYTES, some, draws(*numbers))


def digits(array) -> str:
  return "".join(str(int(x)) for x in array)


# --- each objective, written out ----------------------------------------------


def test_causal():
  row = row_of("causal", ["<abc>", "<d>"], 8)
  assert row.inputs.tolist() == ids("<abc><d>")
  assert row.targets.tolist() == ids("abc><d>_")
  assert digits(row.weights) == "11110110"
  assert digits(row.segments) == "11111222"
  assert digits(row.positions) == "01234012"
  assert row.prefix is None


def test_prefix():
  """Of four targets, the draw 0.6 leaves the last two behind the prefix."""
  row = row_of("prefix", ["<abc>", "<d>"], 8, 0.6, 0.0)
  assert row.inputs.tolist() == ids("<abc><d>")
  assert row.targets.tolist() == ids("abc><d>_")
  assert digits(row.prefix) == "11100100"
  assert digits(row.weights) == "00110110"
  assert digits(row.positions) == "01234012"


def test_span_corruption():
  """Three of ten tokens in two spans, of 2 and 1, after 4 and 3 others."""
  numbers = [0.9, 0.1, *(0.5, 0.6, 0.7, 0.1, 0.8, 0.9)]
  name = "span_corruption(rate=0.3, mean_span=1.5)"
  row = row_of(name, ["<abcdefghij>"], 18, *numbers)
  assert row.inputs.tolist() == ids("<abcd0ghi10ef1j>__")
  assert row.targets.tolist() == ids("abcd0ghi10ef1j>___")
  assert digits(row.prefix) == "111111111100000000"
  assert digits(row.weights) == "000000000111111000"
  assert digits(row.segments) == "111111111111111100"


def test_fill_in_the_middle_prefix_first():
  row = row_of("fim", ["<abcdef>"], 12, 0.1, 0.9, 0.6, 0.3)
  assert row.inputs.tolist() == ids("<(ab)ef|cd>_")
  assert row.targets.tolist() == ids("(ab)ef|cd>__")
  assert digits(row.weights) == "011011011100"
  assert row.prefix is None
  assert row.inputs[:8].tolist() == fim.fim_ids(BYTES, "ab", "ef")


def test_fill_in_the_middle_suffix_first():
  row = row_of("fim", ["<abcdef>", "<g>"], 15, 0.1, 0.2, 0.3, 0.6, 0.5, 0, 0, 0)
  assert row.inputs.tolist() == ids("<()ef|abcd><g>_")
  assert digits(row.weights) == "001101111101100"
  assert row.inputs[:8].tolist() == fim.fim_ids(BYTES, "ab", "ef", "spm")


def test_masked():
  """Half of four: the second and fourth, masked and replaced."""
  numbers = [0.5, 0.1, 0.9, 0.2, *(0.79, 0.89), *(0.0, 97 / 256)]
  row = row_of("masked(rate=0.5)", ["<wxyz>"], 7, *numbers)
  assert row.inputs.tolist() == ids("<w?ya>_")[:2] + ids("?ya>_")
  assert row.targets.tolist() == ids("<wxyz>_")
  assert digits(row.weights) == "0010100"
  assert digits(row.prefix) == "1111110"
  kept = row_of(
    "masked(rate=0.5)", ["<wxyz>"], 7, *numbers[:4], 0.9, 0.95, 0, 0
  )
  assert kept.inputs.tolist() == ids("<wxyz>_")
  assert digits(kept.weights) == "0010100"


def test_masked_diffusion():
  """Each document has its rate: 0.25, of which the weight is 4, and 0.5."""
  rate = (0.25 - 1e-3) / (1 - 1e-3), (0.5 - 1e-3) / (1 - 1e-3)
  numbers = [0, 0, 0, 0, rate[0], 0.3, 0.2, 0.1, 0.26, 0, rate[1], 0.4]
  row = row_of("masked(rate=None)", ["<wxyz>", "<a>"], 10, *numbers)
  assert row.inputs.tolist() == ids("<w??z><?>_")
  assert row.targets.tolist() == ids("<wxyz><a>_")
  np.testing.assert_allclose(row.weights, [0, 0, 4, 4, 0, 0, 0, 2, 0, 0])
  assert digits(row.prefix) == "1111111110"


# --- what holds for every draw ------------------------------------------------

TEXTS = st.text(st.sampled_from("ab \nä漢"), min_size=0, max_size=9)


@hypothesis.given(
  texts=st.lists(TEXTS, min_size=1, max_size=3),
  name=st.sampled_from(ALL),
  seed=st.integers(0, 2**16),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_documents_can_be_recovered_from_a_row(texts, name, seed):
  _, objective = objective_lib.split_source(f"text:a|{name}")
  shape = packing.shape_of(objective, 199)
  documents = [[BOS, *BYTES.encode(text), EOS] for text in texts]
  sizes = shape.size(np.array([len(d) for d in documents]))
  assert sizes.sum() <= shape.room
  tokens = np.array(list(itertools.chain(*documents)))
  numbers = np.repeat(np.arange(1, len(texts) + 1), list(map(len, documents)))
  some = packing.padded(PAD, 199, tokens, numbers)
  rng = np.random.Generator(np.random.Philox(key=seed))
  row = objectives.row(objective, BYTES, some, rng)
  again = np.random.Generator(np.random.Philox(key=seed))
  jax.tree.map(
    np.testing.assert_array_equal,
    row,
    objectives.row(objective, BYTES, some, again),
  )
  assert all(leaf.shape == (199,) for leaf in jax.tree.leaves(row))
  assert (row.prefix is not None) == objective.looks_ahead
  found = []
  for s in range(1, row.segments.max() + 1):
    at = np.flatnonzero(row.segments == s)
    assert row.positions[at].tolist() == list(range(len(at)))
    piece = np.append(row.inputs[at], EOS)  # the last token is no input
    if isinstance(objective, objective_lib.Masked):
      piece = row.targets[at]
      shown = row.inputs[at] != piece
      assert not (shown & (row.weights[at] == 0)).any()
      assert row.prefix[at].all()
    else:
      inside = at[:-1]
      assert (row.targets[inside] == row.inputs[inside + 1]).all()
    if isinstance(objective, objective_lib.SpanCorruption):
      piece = _without_spans(piece, row.prefix[at])
    elif isinstance(objective, objective_lib.Fim):
      piece = _in_order(piece)
    found.append(BYTES.decode(np.array(piece).tolist()))
    if row.prefix is not None and not isinstance(
      objective, objective_lib.Masked
    ):
      seen = int(row.prefix[at].sum())
      assert row.prefix[at][:seen].all()  # a prefix is one piece
      # No scored position sees its own target.
      assert not row.weights[at][: seen - 1].any()
  if isinstance(objective, objective_lib.SpanCorruption):
    texts = [text for text in texts if text]  # an empty text has no spans
  assert found == texts


def _in_order(piece):
  """Prefix, middle and suffix of a FIM row, back in order."""
  piece = piece.tolist()
  if PRE not in piece:
    return piece
  suffix, middle = piece.index(SUF), piece.index(MID)
  before, after = piece[2:suffix], piece[suffix + 1 : middle]
  return before + piece[middle + 1 :] + after


def _without_spans(piece, prefix):
  """The text of a span corruption row, its spans put back."""
  n = int(prefix.sum())
  spans: dict[int, list[int]] = {}
  for token in piece[n:].tolist():
    if token in BYTES.sentinels:
      last = spans.setdefault(token, [])
    elif token != EOS:
      last.append(token)
  put = [spans.get(token, [token]) for token in piece[:n].tolist()]
  return list(itertools.chain(*put))


def test_shares_are_those_of_the_objective():
  """Over many draws: how many tokens are in spans, masked, in a middle."""
  document = ["<" + "abcdefgh" * 8 + ">"]
  rows = {name: [] for name in ALL}
  for name, seed in itertools.product(ALL, range(200)):
    _, objective = objective_lib.split_source(f"text:a|{name}")
    rng = np.random.Generator(np.random.Philox(key=seed))
    some = window(*document, length=140)
    rows[name].append(objectives.row(objective, BYTES, some, rng))

  def mean(name, count):
    return np.mean([count(row) for row in rows[name]])

  for name, n_noise, n_spans in (ALL[2], 10, 3), (ALL[3], 32, 4):
    scored = {int(row.weights.sum()) for row in rows[name]}
    assert scored == {n_noise + n_spans + 1}
  assert {int(row.weights.sum()) for row in rows["masked"]} == {10}
  masks = mean("masked", lambda row: (row.inputs == MASK).sum())
  assert masks == pytest.approx(8, abs=0.3)
  kept = mean(
    "masked", lambda row: (row.weights * (row.inputs == row.targets)).sum()
  )
  assert kept == pytest.approx(1, abs=0.25)
  # E[sum of 1 / t over a share t of the tokens] is their number.
  total = mean("masked(rate=None)", lambda row: row.weights.sum())
  assert total == pytest.approx(64, rel=0.1)
  middles = mean("fim", lambda row: MID in row.inputs)
  assert middles == pytest.approx(0.5, abs=0.1)
  suffix_first = mean("fim", lambda row: (row.inputs[1:3] == [PRE, SUF]).all())
  assert suffix_first == pytest.approx(0.25, abs=0.1)
  prefix = mean("prefix", lambda row: row.prefix.sum())
  assert prefix == pytest.approx(33, rel=0.1)


@pytest.mark.parametrize("order", fim.ORDERS)
def test_a_middle_starts_inside_a_token(order):
  """With a trained vocabulary, cut on characters: a row opens with the prompt
  of its prefix and suffix, and no encoding of the whole text has its pieces.
  """
  config = config_lib.Config()
  config.model.vocab_size = 400
  text = "the model reads the tokens of the text and then the next one. " * 40
  tokenizer = tokenizer_training.train(config, [text])
  text = text[:60]
  tokens = np.array([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos])
  whole = {
    tokenizer.decode(tokens[:n].tolist()) for n in range(len(tokens) + 1)
  }
  objective = objective_lib.Fim(1.0, float(order == "spm"))
  inside = 0
  for seed in range(20):
    rng, again = (np.random.Generator(np.random.Philox(seed)) for _ in "ab")
    found = fim.reorder(objective, tokenizer, tokens, rng).tolist()
    assert len(found) <= len(tokens) + fim.EXTRA
    first, last = (int(c * 61) for c in np.sort(again.random(4)[2:]))
    prompt = fim.fim_ids(tokenizer, text[:first], text[last:], order)
    assert found[: len(prompt)] == prompt
    assert tokenizer.decode(found[len(prompt) :], True) == text[first:last]
    inside += text[:first] not in whole
  assert inside >= 5


@pytest.mark.parametrize("name", ALL)
def test_what_is_shown_is_what_the_model_sees(name):
  """The drawn mask is attention's, and the text tells what is scored."""
  _, objective = objective_lib.split_source(f"text:a|{name}")
  store = mock.Mock(spec=store_lib.TokenStore, objective=objective)
  rng = np.random.Generator(np.random.Philox(key=3))
  some = window("<abcd>", "<efghij>", length=49)
  row = objectives.row(objective, BYTES, some, rng)
  tokens = attention.Tokens(
    *(jnp.asarray(x)[None] for x in (row.positions, row.segments)),
    None if row.prefix is None else jnp.asarray(row.prefix)[None],
  )
  seen = np.asarray(attention.visible(tokens, tokens, None))[0]
  np.testing.assert_array_equal(show.visible(row), seen)
  text = show.text(row, store, BYTES)
  shown = [
    text.plain[span.start : span.end]
    for span in text.spans
    if "green" in str(span.style)
  ]
  at = row.targets[row.weights > 0]
  assert [part.rpartition("\u2192")[2] for part in shown] == [
    BYTES.piece(int(i)) for i in at
  ]


@pytest.mark.parametrize("n", [1, 2])
def test_a_picture_holds_its_caption_and_any_token(n, tmp_path, monkeypatch):
  """Matplotlib takes what stands between two $ for a formula."""
  tokenizer = mock.Mock(spec=tokenizer_lib.Tokenizer, piece=lambda i: "$^$")
  store = mock.Mock(spec=store_lib.TokenStore)
  store.spec = "text:a"
  rng = np.random.Generator(np.random.Philox(key=3))
  row = objectives.row(
    objective_lib.Causal(), BYTES, window("<abc>", length=4), rng
  )
  drawn, save = [], figure_lib.Figure.savefig
  monkeypatch.setattr(
    figure_lib.Figure,
    "savefig",
    lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)),
  )
  show.draw(str(tmp_path / "a.png"), [(store, row)] * n, tokenizer)
  (caption,) = drawn[0].texts
  extent, bounds = caption.get_window_extent(), drawn[0].bbox
  assert bounds.x0 <= extent.x0 and extent.x1 <= bounds.x1
  assert drawn[0].axes[0].get_yticklabels()[0].get_text() == r"\$^\$"


# --- packing ------------------------------------------------------------------


@hypothesis.given(
  sizes=st.lists(st.integers(1, 12), max_size=60), seed=st.integers(0, 99)
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_best_fit_is_best_fit(sizes, seed):
  """Loads as of the textbook's loop, an item at a time."""
  sizes = np.array(sizes, np.int64)
  rng = np.random.Generator(np.random.Philox(key=seed))
  bins = packing.best_fit(sizes, 12, rng)
  loads = np.bincount(bins, weights=sizes) if len(sizes) else np.zeros(0)
  slow: list[int] = []
  for size in sorted(sizes.tolist(), reverse=True):
    left = [(12 - load, b) for b, load in enumerate(slow) if load + size <= 12]
    if left:
      slow[min(left)[1]] += size
    else:
      slow.append(size)
  assert sorted(loads.tolist()) == sorted(slow)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """Stores of one corpus, of lines of 0 to 60 letters, in each objective."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(3)
  lines = ["a" * n for n in (1, 22, 23, 24, 25, 26, 60)] + [
    "".join(map(chr, rng.integers(ord("a"), ord("z"), n)))
    for n in rng.integers(1, 40, 50)
  ]
  (folder / "a.txt").write_text("\n".join(lines))
  config = config_lib.Config()
  config.model.vocab_size, config.tokenizer.kind = BYTES.size, "bytes"
  config.data = config_lib.DataConfig(
    train=tuple(f"text:{folder}/a.txt|{name}" for name in ALL),
    validation=(),
    text_unit="line",
    packing="best_fit",
    cache_dir=str(folder / "cache"),
  )
  config.train.batch_size, config.train.sequence_length = 8, 24
  return config, store_lib.prepare(config), lines


def test_best_fit_cuts_no_document_that_fits(stores):
  config, prepared, lines = stores
  wanted = sorted([BOS, *BYTES.encode(line), EOS] for line in lines)
  for store in prepared.train:
    shape = packing.shape_of(store.objective, 24)
    found, windows = [], packing.windows(store, config, seed=0)
    for tokens, documents, _ in (windows[i] for i in range(len(windows))):
      assert len(tokens) == 25 and (documents >= 0).all()
      for d in range(1, documents.max() + 1):
        piece = tokens[documents == d].tolist()
        found.append(piece)
    whole = [piece for piece in found if piece[0] == BOS and piece[-1] == EOS]
    fitting = [w for w in wanted if len(w) <= shape.longest]
    assert sorted(whole) == fitting
    n_cut = len(wanted) - len(fitting)
    assert windows.cut_share == pytest.approx(n_cut / len(wanted))
    # Each target once: every token but bos, or every token where none repeats.
    n = sum(len(piece) - shape.overlap for piece in found)
    assert n == sum(len(w) - shape.overlap for w in wanted)
  assert (
    len({len(packing.windows(s, config, seed=0)) for s in prepared.train}) > 2
  )


def test_a_mixture_is_the_same_for_any_number_of_processes(stores):
  config, prepared, _ = stores
  whole = list(itertools.islice(pipeline.train_batches(config, prepared), 30))
  assert all(batch.prefix is not None for batch in whole)
  seen = {store.objective for store in prepared.train}
  assert len(seen) == len(ALL)
  for start in (0, 7, 29):
    parts = [
      next(
        pipeline.train_batches(
          config, prepared, start_step=start, rows=(first, first + 4)
        )
      )
      for first in (0, 4)
    ]
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole[start])
  other = dataclasses.replace(config, seed=1)
  first = next(pipeline.train_batches(other, prepared))
  assert (first.inputs != whole[0].inputs).any()


def test_chopped_rows_know_what_they_cut(stores):
  config, prepared, lines = stores
  chopped = dataclasses.replace(
    config, data=dataclasses.replace(config.data, packing="chop")
  )
  store = prepared.train[0]
  windows = packing.windows(store, chopped, seed=0)
  ends = np.cumsum([len(line) + 2 for line in lines])
  starts = ends - np.array([len(line) + 2 for line in lines])
  cut = sum(
    not any(24 * i <= a and b <= 24 * i + 25 for i in range(len(windows)))
    for a, b in zip(starts, ends, strict=True)
  )
  assert windows.cut_share == pytest.approx(cut / len(lines))
  # Objectives that change the length are packed best-fit all the same.
  for store in prepared.train:
    kind = type(packing.windows(store, chopped, seed=0))
    assert (kind is packing.Chopped) == store.objective.choppable


def test_rows_too_short_for_an_objective_are_refused(stores):
  config, prepared, _ = stores
  short = dataclasses.replace(
    config, train=dataclasses.replace(config.train, sequence_length=12)
  )
  with pytest.raises(schema.ConfigError, match="sequence_length=12: too short"):
    list(pipeline.training_windows(short, prepared))


@pytest.mark.parametrize("name", ALL)
def test_packed_and_unpacked_give_the_same_losses(stores, name):
  """Each token's loss in a packed row, and its document alone in a row."""
  config, prepared, _ = stores
  model = config_lib.ModelConfig(
    vocab_size=384, n_layers=2, d_model=12, n_heads=3, n_kv_heads=3, d_head=4,
    d_mlp=20, context_length=24, init_scale=0.3,
  )  # fmt: skip
  params = decoder.init_params(model, jax.random.key(0))
  s = ALL.index(name)
  packed = jax.tree.map(
    lambda *rows: np.stack(rows), *pipeline.sample(config, prepared, s, 8)
  )
  alone = []
  for r, d in zip(
    *np.nonzero(np.diff(packed.segments, prepend=0)), strict=True
  ):
    if packed.segments[r, d]:
      at = packed.segments[r] == packed.segments[r, d]
      n = at.sum()
      alone.append(
        jax.tree.map(
          lambda a, r=r, at=at, n=n: np.pad(a[r][at], (0, 24 - n)), packed
        )
      )
      alone[-1] = dataclasses.replace(
        alone[-1], segments=(np.arange(24) < n).astype(np.int32)
      )
  single = jax.tree.map(lambda *rows: np.stack(rows), *alone)
  assert len(alone) >= 8

  @jax.jit
  def losses(batch):
    hidden, _ = decoder.forward(model, params, batch)
    head = decoder.bind(model, params).head_weight()
    return scoring.token_nll(hidden, head, batch.targets, chunk=1000)

  def scored(batch):
    found = np.asarray(losses(jax.tree.map(jnp.asarray, batch)))
    return found[batch.weights > 0]

  a, b = scored(packed), scored(single)
  assert len(a) and np.ptp(a) > 0.5
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_source_without_targets_is_refused(stores, monkeypatch):
  config, prepared, _ = stores
  causal = objectives.causal

  def unscored(*some):
    row = causal(*some)
    return dataclasses.replace(row, weights=0 * row.weights)

  scored, padding = pipeline.shares(config, prepared, 0)
  assert 0.7 < scored < 1 and 0 < padding < 1 - scored
  monkeypatch.setattr(objectives, "causal", unscored)
  with pytest.raises(schema.ConfigError, match="nothing to learn"):
    pipeline.shares(config, prepared, 0)


@pytest.mark.slow
def test_a_mixture_trains_and_each_objective_has_its_loss(make, tmp_path):
  """All objectives in one run, on a mesh; `lm.evaluate` finds for each what the
  run reports, and the run's own loss is that of the causal source.
  """
  config = make(train__steps=4, train__eval_every=4, train__eval_batches=None)
  text = config.data.validation[0].replace("cli", "digest")
  config.data.train = tuple(f"{text}|{name}" for name in ALL)
  config.data.validation = (text, *config.data.train[1:])
  workdir = str(tmp_path)
  assert loop.train(config, workdir) == 0
  last = metrics.read(workdir)[-1]
  assert last["eval/loss"] == last[f"eval/{text}/loss"]
  n_tokens = {s: last[f"eval/{s}/tokens"] for s in config.data.validation}
  assert len(set(n_tokens.values())) >= 6
  evaluation = corpora.evaluate(
    workdir,
    specs=[],
    step=None,
    stride=None,
    batch_size=16,  # other than in training
    data={},
    output=None,
  )
  assert [r.source for r in evaluation.results] == [*config.data.validation]
  for result in evaluation.results[1:]:
    wanted = last[f"eval/{result.source}/loss"]
    assert result.totals.loss == pytest.approx(wanted, rel=1e-5)
    assert result.totals.n_tokens == pytest.approx(n_tokens[result.source])
  console = rich.console.Console(file=io.StringIO(), width=200)
  output_lib.show(evaluation, console, documents=False)
  output_lib.write(evaluation, str(tmp_path / "e.json"), documents=True)
  for other in ("fim(rate=1)", "masked(rate=0.3)"):
    changed = copy.deepcopy(config)
    changed.data.train = (*config.data.train[:-1], f"{text}|{other}")
    changed.train.steps = 6
    with pytest.raises(schema.ConfigError, match="other data"):
      loop.train(changed, workdir)

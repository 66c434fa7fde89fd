"""Text that comes in tokens: whole characters, and stop texts."""

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import tokenizer as tokenizer_lib
from lm.sample import stream as stream_lib

TOKENIZER = tokenizer_lib.Tokenizer()


def stream(ids, stop=()):
  """What was given out token by token, the whole text, tokens that counted."""
  stream, given, n = stream_lib.Stream(TOKENIZER, stop), [], 0
  for i in ids:
    n += 1
    stopped = stream.add(i)
    given.append(stream.take())
    if stopped:
      break
  stream.end()
  given.append(stream.take())
  return given, stream.text, n


@given(st.text(alphabet="aé😀\n", max_size=30))
def test_a_character_is_given_out_whole(content):
  given, whole, _ = stream(TOKENIZER.encode(content))
  assert whole == content == "".join(given)
  assert "\ufffd" not in whole


@given(st.lists(st.integers(100, TOKENIZER.size - 1), max_size=30))
def test_any_tokens_give_what_decode_says(ids):
  """Also half characters and reserved ids."""
  given, whole, _ = stream(ids)
  assert whole == "".join(given) == TOKENIZER.decode(ids)


def first_stop(content, stop):
  """(where the text is cut, characters read): the stop that is complete
  first, among equals the first of the list.
  """
  for end in range(len(content) + 1):
    for s in stop:
      if content[:end].endswith(s):
        return end - len(s), end
  return None


@settings(max_examples=300)
@given(
  st.text(alphabet="abé", max_size=20),
  st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_the_stop_text_that_is_complete_first_cuts(content, stop):
  given, whole, n = stream(TOKENIZER.encode(content), stop)
  found = first_stop(content, stop)
  if found is None:
    assert whole == content
  else:
    assert whole == content[: found[0]]
    assert (
      TOKENIZER.decode(TOKENIZER.encode(content)[:n]) == content[: found[1]]
    )
  assert "".join(given) == whole


@pytest.mark.parametrize(
  "pieces, stop, expected, lag",
  [
    # Over three tokens; inside one; two in one token; overlapping itself.
    (["x<", "/", "s>y"], ["</s>"], "x", ["x", "", ""]),
    (["one STOP two"], ["STOP"], "one ", ["one "]),
    (["a BB AA"], ["AA", "BB"], "a ", ["a "]),
    (["aa", "ab"], ["aab"], "a", ["", "a"]),
    (["abc"], ["bc", "abc"], "a", ["a"]),
  ],
)
def test_tokens_of_several_characters(pieces, stop, expected, lag):
  tokenizer = tokenizer_lib.Tokenizer()
  tokenizer._pieces = [piece.encode() for piece in pieces]
  found, given = stream_lib.Stream(tokenizer, stop), []
  for i in range(len(pieces)):
    stopped = found.add(i)
    given.append(found.take())
  assert stopped and found.text == expected and given == lag


def test_a_dummy_prefix_is_no_text(tmp_path):
  """As in Llama 2's vocabulary: a space before a text, not behind a prompt."""
  t = tokenizer_lib.from_files(str(vocabularies.folder(tmp_path, "llama_2")))
  assert t.prefix == b" "
  for text in ("def f", " def", "\u4f60", ""):
    ids = t.encode(text)
    for n in range(len(ids) + 1):
      before = [t.bos, *ids[:n]]
      found = stream_lib.Stream(t, (), before)
      for i in [*ids[n:], t.eos]:
        found.add(i)
      found.end()
      raw = t.decode_bytes(ids[n:]) if n else text.encode()
      assert found.text == raw.decode(errors="replace")

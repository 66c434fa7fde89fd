"""Formats of chat data sets."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from lm import schema
from lm.data import chat, conversations


def m(role, content):
  return {"role": role, "content": content}


USER, ANSWER, SYSTEM = m("user", "u"), m("assistant", "a"), m("system", "s")
TURN = [USER, ANSWER]
GPT = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
  "row, expected",
  [
    ({"messages": TURN}, TURN),
    ({"messages": TURN, "tools": None, "id": 3, "score": [1]}, TURN),
    ({"messages": [{**USER, "name": "x", "tool_calls": None}, ANSWER]}, TURN),
    ({"messages": [USER, {**ANSWER, "weight": 1, "tool_calls": []}]}, TURN),
    ({"messages": [m("developer", "s"), *TURN]}, [SYSTEM, *TURN]),
    (
      {
        "messages": [
          m("user", [{"type": "text", "text": "u"}, {"text": ""}]),
          ANSWER,
        ]
      },
      TURN,
    ),
    ({"conversations": GPT}, TURN),
    ({"conversations": GPT, "system": "s"}, [SYSTEM, *TURN]),
    ({"conversations": GPT, "system": ""}, TURN),
    (
      {
        "conversations": [{"from": "system", "value": "s"}, *GPT],
        "system": "other",
      },
      [SYSTEM, *TURN],
    ),
    (
      {"conversations": [*GPT, {"from": "function", "value": "t"}]},
      [*TURN, m("tool", "t")],
    ),
    ({"conversations": TURN}, TURN),
    ({"instruction": "u", "output": "a"}, TURN),
    ({"instruction": "u", "input": "", "output": "a"}, TURN),
    (
      {"instruction": "u", "input": "i", "output": "a", "history": []},
      [m("user", "u\n\ni"), ANSWER],
    ),
    ({"instruction": "u", "output": "a", "system": "s"}, [SYSTEM, *TURN]),
    ({"prompt": "u", "completion": "a"}, TURN),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, *TURN]),
    ({"prompt": [USER], "completion": "a"}, TURN),
    ({"prompt": "u", "chosen": "a", "rejected": "b"}, TURN),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, TURN),
    ({"chosen": TURN, "rejected": TURN}, TURN),
    ({"prompt": "u", "chosen": TURN, "rejected": TURN}, TURN),
    # The first of several formats.
    ({"messages": TURN, "prompt": "p", "completion": "c"}, TURN),
    ({"messages": None, "prompt": "u", "completion": "a"}, TURN),
    ({"prompt": "u", "chosen": "a", "rejected": "b", "completion": "c"}, TURN),
  ],
)
def test_rows_become_messages(row, expected):
  assert conversations.parse(row) == expected
  assert all(message["role"] in chat.ROLES for message in expected)


@pytest.mark.parametrize(
  "row, message",
  [
    ([], "is not an object"),
    ("text", "is not an object"),
    ({}, "is in no format of chats .*its fields: none"),
    ({"text": "a", "id": 1}, "its fields: 'text', 'id'"),
    ({"prompt": "u"}, "is in no format"),
    ({"instruction": "u", "output": None}, "is in no format"),
    ({"messages": []}, "field 'messages' holds no message"),
    ({"messages": "u"}, "field 'messages' is not a list of messages"),
    ({"messages": ["u"]}, r"messages\[0\] is not an object"),
    ({"messages": [{}]}, r"messages\[0\] has neither role nor from"),
    ({"messages": [USER, m("owl", "")]}, r"messages\[1\].role='owl': is none"),
    ({"messages": [m(["user"], "")]}, r"messages\[0\].role=\['user'\]"),
    ({"messages": [m("user", None)]}, r"messages\[0\].content=None: is not"),
    ({"messages": [{"role": "user"}]}, r"content=None: is not text"),
    ({"messages": [m("user", 3)]}, r"content=3: is not text"),
    ({"messages": [m("user", [{"type": "image"}])]}, "a part that is not text"),
    (
      {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]},
      r"messages\[1\] has tool_calls, which would be lost",
    ),
    ({"messages": [USER, {**ANSWER, "thinking": "x"}]}, "has thinking"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "not to be trained"),
    ({"conversations": [{**GPT[1], "train": False}]}, "not to be trained"),
    ({"messages": TURN, "tools": [{}]}, "has tools, which"),
    ({"chosen": "a", "rejected": "b"}, "and there is no 'prompt'"),
    ({"chosen": [ANSWER], "rejected": []}, "and there is no 'prompt'"),
    ({"prompt": 1, "completion": "a"}, "field 'prompt' is not a list"),
    (
      {"instruction": "u", "output": "a", "history": [["q", "b"]]},
      "has a history",
    ),
    ({"instruction": 1, "output": "a"}, "instruction=1: is not text"),
  ],
)
def test_rows_that_are_refused_say_why(row, message):
  with pytest.raises(schema.ConfigError, match=message) as error:
    conversations.parse(row)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=3),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        "messages conversations prompt completion chosen rejected instruction "
        "output input role content from value system text".split()
      ),
      inner,
      max_size=4,
    )
  ),
  max_leaves=12,
)


@hypothesis.given(row=JSON)
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_json_is_messages_or_a_reason(row):
  row = json.loads(json.dumps(row))
  try:
    messages = conversations.parse(row)
  except schema.ConfigError:
    return
  assert messages
  for message in messages:
    assert set(message) == {"role", "content"}
    assert message["role"] in chat.ROLES
    assert isinstance(message["content"], str)

"""Texts of lm-evaluation-harness tasks, as sources to search for overlaps."""

import hashlib
from collections.abc import Iterator
from typing import Any

from lm.data import overlap_report, sources


class TaskTexts:
  """A source (sources.Source) of the documents that a task is scored on, the
  first `limit` ones unless None. Document i is named `NAME:i`, from 0.
  """

  chat = False

  def __init__(self, name: str, task: Any, limit: int | None = None):
    self.spec = f"task:{name}"
    self._documents = [
      sources.Document(f"{name}:{i}", text_of(task, document))
      for i, document in task.doc_iterator(limit=limit)
    ]

  def __len__(self) -> int:
    return len(self._documents)

  def __getitem__(self, i: int) -> sources.Document:
    return self._documents[i]

  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for document in self._documents:
      text = document.text.encode("utf-8", "surrogatepass")
      digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()

  def changed(self) -> str | None:
    return None


def text_of(task: Any, document: Any) -> str:
  """Returns a document's question and the right answer, joined as the model
  reads them, and every further answer or choice on lines of its own. Examples,
  the task's description and `gen_prefix` are left out.
  """
  choices = []
  if task.config.doc_to_choice is not None:
    choices = list(map(str, task.doc_to_choice(document)))
  questions = [*_chosen(task.doc_to_text(document), choices)]
  answers = [*_chosen(task.doc_to_target(document), choices)]
  delimiter = task.config.target_delimiter
  first = delimiter.join(filter(None, [*questions[:1], *answers[:1]]))
  rest = [*questions[1:], *answers[1:], *choices]
  used = {*questions[:1], *answers[:1]}
  return "\n".join([first, *(x for x in dict.fromkeys(rest) if x not in used)])


def _chosen(given: Any, choices: list[str]) -> Iterator[str]:
  """Yields the texts of a question or a target: a text, the index of a choice
  (if out of range, as of a test set without labels, nothing), or several.
  """
  if isinstance(given, list | tuple):
    for one in given:
      yield from _chosen(one, choices)
  elif choices and isinstance(given, int):
    yield from choices[given : given + 1] if given >= 0 else ()
  elif given is not None:
    yield str(given)


def add_groups(
  shares: dict[str, overlap_report.Shares], loaded: Any
) -> dict[str, overlap_report.Shares]:
  """Returns `shares` of tasks with those of lm-eval's groups of them added;
  `loaded` is lm-eval's TaskDict.
  """
  groups = {}
  for name, group in loaded["groups"].items():
    tasks = dict.fromkeys(task.task_name for task in group.get_all_tasks())
    groups[name] = overlap_report.joined([shares[task] for task in tasks])
  return shares | groups

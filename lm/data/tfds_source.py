"""Corpora of TensorFlow Datasets (TFDS), array_record files, no TensorFlow."""

import contextlib
import functools
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from lm import config as config_lib
from lm import files, locks, schema
from lm.data import contents, python_stdlib, sources


class TfdsSource:
  """A split of a TFDS dataset.

  Datasets are stored in TFDS_DATA_DIR if set, else in `data.cache_dir`/tfds. A
  missing dataset is built, by one process while other processes wait.
  """

  chat = False

  def __init__(
    self,
    spec: str,
    name: str,
    split: str,
    feature: str,
    data: config_lib.DataConfig,
  ):
    self.spec, self._feature, self._data = spec, feature, data
    with _without_info_logs():
      builder = _builder(spec, name, data)
      info = builder.info
      if feature not in info.features:
        raise schema.ConfigError(
          f"source {spec!r}: no feature {feature!r}; the dataset has "
          f"{', '.join(info.features)}"
        )
      self._named = "name" in info.features
      try:
        instructions = info.splits[split].file_instructions
      except (KeyError, ValueError) as error:
        raise schema.ConfigError(
          f"source {spec!r}: no split {split!r}; the dataset has "
          f"{', '.join(info.splits)}"
        ) from error
      self._directory = str(builder.data_path)
      with self._reading():
        self._source = builder.as_data_source(split=split)
        self._n = len(self._source)  # len() opens the files.
    self._contents = contents.Contents(
      spec,
      sorted({str(i.filename) for i in instructions}),
      f"{split} {feature} {data.invalid_utf8}",
      sources.cache_directory(data),
    )

  def fingerprint(self) -> str:
    return self._contents.fingerprint

  def changed(self) -> str | None:
    return self._contents.changed()

  def __len__(self) -> int:
    return self._n

  def __getitem__(self, i: int) -> sources.Document | None:
    with self._reading():
      example = self._source[i]
    where = f"{self.spec}[{i}]"
    raw = example[self._feature]
    if raw is None:  # TFDS returns None for an unreadable record.
      raise self._damaged(f"record {i} is missing")
    if not isinstance(raw, bytes):
      raise schema.ConfigError(
        f"{where}: feature {self._feature!r} is not text but "
        f"{type(raw).__name__}"
      )
    text = sources.decode(raw, where, 0, self._data)
    name = os.fsdecode(example["name"]) if self._named else where
    return None if text is None else sources.Document(name, text)

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    try:
      yield
    except (RuntimeError, ValueError) as error:  # Raised by array_record.
      raise self._damaged(files.first_line(error)) from error

  def _damaged(self, cause: str) -> schema.RunError:
    return schema.RunError(
      f"source {self.spec!r}: {self._directory} is damaged: {cause}. Remove "
      "that folder, or copy it again"
    )


@contextlib.contextmanager
def _without_info_logs() -> Iterator[None]:
  """Silences TFDS, which logs a line for each file inspected."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(min(verbosity, logging.WARNING))
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _builder(spec: str, name: str, data: config_lib.DataConfig) -> Any:
  """TFDS builder of dataset `name`; downloads and builds a missing dataset."""
  if given := os.environ.get("TFDS_DATA_DIR"):
    directory = files.local_path(given, "TFDS_DATA_DIR")
  else:
    directory = os.path.join(sources.cache_directory(data), "tfds")
  make = functools.partial(
    tfds.builder, name, data_dir=directory, file_format="array_record"
  )
  try:
    builder = make()
  except tfds.core.DatasetNotFoundError as error:
    raise schema.ConfigError(
      f"source {spec!r}: unknown dataset {name!r}: it is not in {directory}, "
      "and TFDS without TensorFlow cannot build it. Build it where TensorFlow "
      f"is (tfds build {name} --file_format=array_record) and copy its folder "
      "there; or download its text as JSON lines and write jsonl:GLOB#FIELD "
      "(C4 as allenai/c4 has it: jsonl:c4/en/*.json.gz#text)"
    ) from error
  except Exception as error:  # Builders are third-party code.
    raise schema.ConfigError(
      f"source {spec!r}: unknown dataset, or not one of array_record files in "
      f"{directory}: {files.first_line(error)}"
    ) from error
  if builder.data_path.exists():
    return builder
  files.check_directory(directory, "config.data.cache_dir")
  said = sys.stderr
  if builder.name == python_stdlib.PythonStdlib.name:
    tfds.disable_progress_bar()  # The build takes a second or two.
    said = io.StringIO()
  with locks.exclusive(directory), contextlib.redirect_stdout(said):
    _remove_leftovers(directory, builder)  # Of a killed process.
    try:
      make().download_and_prepare()
    except Exception as error:
      _remove_leftovers(directory, builder)
      raise schema.RunError(
        f"source {spec!r}: {name!r} could not be downloaded and built in "
        f"{directory}: {files.first_line(error)}"
      ) from error
  return make()


def _remove_leftovers(directory: str, builder: Any) -> None:
  """Removes partial builds and downloads, never resumed; caller holds lock."""
  path = builder.data_path
  for left in (
    *path.parent.glob(f"incomplete.*_{path.name}"),
    *pathlib.Path(directory, "downloads").rglob("*.tmp.*"),
  ):
    if left.is_dir():
      shutil.rmtree(left)
    else:
      left.unlink(missing_ok=True)  # Its parent folder may be gone already.

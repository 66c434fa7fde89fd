"""TFDS dataset `python_stdlib`: the running interpreter's standard library.

The dataset has about 600 documents and 10 MB of real code and prose, on every
machine with Python and without a download. Python versions differ in content:
the TFDS config is named after implementation and version.
"""

import hashlib
import pathlib
import platform
import sysconfig
import tokenize

import tensorflow_datasets as tfds

# Folders that are not the library itself, or are tests.
_LEFT_OUT = frozenset(
  "site-packages dist-packages test tests idle_test idlelib lib2to3"
  " __pycache__".split()
)


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """One document per `.py` file; 5 % of the paths are for validation."""

  VERSION = tfds.core.Version("1.0.0")
  # TFDS would search beside this file for checksums of downloads. There are
  # none, and the search needs a package that TFDS does not install.
  code_path = None
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(
      name=f"{platform.python_implementation()}-{platform.python_version()}"
    )
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {"name": tfds.features.Text(), "text": tfds.features.Text()}
      )
    )

  def _split_generators(self, dl_manager):
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths: dict[str, list[pathlib.Path]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
      name = path.relative_to(root)
      if not _LEFT_OUT.intersection(name.parts[:-1]):
        digest = hashlib.md5(name.as_posix().encode()).hexdigest()
        held_out = int(digest, 16) % 20 == 0
        paths["validation" if held_out else "train"].append(path)
    return {
      split: self._generate_examples(root, chosen)
      for split, chosen in paths.items()
    }

  def _generate_examples(self, root, paths):
    for path in paths:
      name = path.relative_to(root).as_posix()
      with tokenize.open(path) as file:  # Decodes as the file declares.
        yield name, {"name": name, "text": file.read()}

"""Items of a checkpoint: trees of arrays, their names, digests and reading."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm import digest, files

Trees = dict[str, Any]
# Sizes of what Orbax compresses at a time, and of the files that it writes.
_CHUNK_BYTES, _FILE_BYTES = 1 << 26, 1 << 28
# A replica of an array saves a part of it if the part has as many bytes; else
# one replica saves the array. To cut out a part is a program for XLA, of each
# shape and each replica.
_PART_BYTES = 1 << 20


def names(tree: Any) -> dict[str, str]:
  """Path in the tree -> `dtype[shape]` of each array."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{x.dtype}[{','.join(map(str, x.shape))}]"
    )
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def digest_of(tree: Any) -> str:
  return "".join(f"{word:08x}" for word in np.asarray(digest.of_tree(tree)))


def compare(
  path: epath.Path,
  trees: Mapping[str, Mapping[str, str]],
  digests: Collection[str],
  like: Trees,
) -> dict[str, list[str]]:
  """Differences between the arrays of a checkpoint and those of `like`: item ->
  messages; {} if all match. `trees` and `digests` are those of its `Meta`.
  """
  found = {}
  for name, tree in like.items():
    want, have = names(tree), trees.get(name)
    if have is None and name in digests:  # format 1
      have = _stored_names(path / name)
    have = have or {}
    lines = [
      f"{array}: stored {have.get(array, 'not')}, wanted "
      f"{want.get(array, 'not')}"
      for array in sorted(want.keys() | have.keys())
      if want.get(array) != have.get(array)
    ]
    if lines:
      found[name] = lines
  return found


def describe(different: Mapping[str, list[str]], most: int = 5) -> str:
  """Formats `compare`'s result as a line: the first `most` of each item."""
  parts = []
  for name, lines in different.items():
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    parts.append(f"in `{name}` {', '.join(lines[:most])}{more}")
  return "; ".join(parts)


def read(path: epath.Path, like: Trees) -> Trees:
  """Reads only the arrays in `like` from a checkpoint's items, without checking
  any digest. Raises Damaged or, after retries, RunError.
  """
  handler = ocp.PyTreeCheckpointHandler()
  found = {}
  with ocp.Checkpointer(handler) as checkpointer:
    for name, tree in like.items():
      found[name] = files.attempt(
        path / name,
        lambda name=name, tree=tree: checkpointer.restore(
          path / name,
          args=ocp.args.PyTreeRestore(
            item=tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
          ),
        ),
        # `compare` has matched the arrays: errors of these types mean that
        # Orbax's own metadata is corrupt.
        corrupt=(ValueError, AttributeError),
      )
  return found


def read_parts(
  path: epath.Path, name: str, like: tuple[Any, ...]
) -> tuple[Any, ...]:
  """`read` of the item `name`, which is a tuple, without the parts that are
  None in `like`, whatever was stored there.
  """
  # Orbax takes a None for an array or a dict, and refuses a stored tuple.
  stored = _stored_tree(path / name)
  nothing = jax.tree.map(lambda _: None, stored)
  template = tuple(
    empty if part is None else part
    for part, empty in zip(like, nothing, strict=True)
  )
  found = read(path, {name: template})[name]
  return tuple(
    None if part is None else x for part, x in zip(like, found, strict=True)
  )


def saving(tree: Any) -> ocp.args.PyTreeSave:
  """Saves in pieces: Orbax's own sizes hold a copy of nearly all arrays while
  it writes (benchmarks/convert.py --run).
  """
  piece = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
  return ocp.args.PyTreeSave(
    tree,
    save_args=jax.tree.map(lambda _: piece, tree),
    ocdbt_target_data_file_size=_FILE_BYTES,
  )


def handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
  """How Orbax writes the items: trees of arrays, and `meta` as JSON."""
  array = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_PART_BYTES
  )
  types = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, array), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  found = ocp.handlers.DefaultCheckpointHandlerRegistry()
  trees = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
  found.add(None, ocp.args.PyTreeSave, trees)
  found.add(None, ocp.args.JsonSave)
  return found


def _stored_names(path: epath.Path) -> dict[str, str]:
  return names(_stored_tree(path))


def _stored_tree(path: epath.Path) -> Any:
  """An item as it is stored, with metadata in place of its arrays."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    stored = files.attempt(path, lambda: checkpointer.metadata(path))
  return stored.item_metadata.tree

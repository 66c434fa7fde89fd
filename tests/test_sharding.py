"""Digests, slices, and how processes find one another."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm import cli, digest, processes, schema, sharding
from lm import config as config_lib
from lm import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parent.parent


def _tree():
  rng = np.random.default_rng(0)
  return {
    "a": rng.standard_normal((8, 6, 4), np.float32),
    "b": rng.standard_normal((8, 6, 4), np.float32),
    "half": rng.standard_normal((4, 8)).astype(jnp.bfloat16),
    "ids": rng.integers(0, 99, (8, 16), np.int32),
    "flags": rng.integers(0, 2, (8, 16)).astype(bool),
    "step": np.int32(7),
  }


def _digest(tree):
  return np.asarray(digest.of_tree(jax.tree.map(jnp.asarray, tree))).tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_digest_is_the_same_on_any_mesh(shape):
  config = config_lib.Config()
  config.mesh = config_lib.MeshConfig(
    **dict(zip(sharding.MESH_AXES, shape, strict=True))
  )
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = mesh_lib.make(config, devices)
  spec = {
    "a": P(("data", "fsdp")),
    "b": P(("data", "fsdp"), "tensor"),
    "half": P(None, "fsdp"),
    "ids": P("data", "tensor"),
    "flags": P(),
    "step": P(),
  }
  placed = {
    name: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec[name]))
    for name, x in _tree().items()
  }
  assert np.asarray(digest.of_tree(placed)).tolist() == _digest(_tree())
  with jax.set_mesh(mesh):
    inside = jax.jit(digest.of_tree)(placed)
  assert np.asarray(inside).tolist() == _digest(_tree())


def test_digest_is_the_same_in_blocks(monkeypatch):
  whole, part = _digest(_tree()), np.asarray(digest.of_tree(_tree(), 5))
  for n_words in (1, 7, 40):
    jax.clear_caches()
    monkeypatch.setattr(digest, "_BLOCK", n_words)
    assert _digest(_tree()) == whole
    np.testing.assert_array_equal(digest.of_tree(_tree(), 5), part)
  jax.clear_caches()


def test_digest_sees_every_bit_and_its_place():
  whole = _digest(_tree())

  def differs(change):
    tree = _tree()
    change(tree)
    return _digest(tree) != whole

  def flip(tree):
    tree["a"].view(np.uint32)[3, 2, 1] ^= 1

  def swap_rows(tree):
    tree["ids"][[1, 2]] = tree["ids"][[2, 1]]

  def swap_arrays(tree):
    tree["a"], tree["b"] = tree["b"], tree["a"]

  def shift(tree):
    tree["a"] = np.roll(tree["a"], 1, axis=2)

  def negate_zero(tree):
    tree["flags"][5, 5] ^= True

  for change in (flip, swap_rows, swap_arrays, shift, negate_zero):
    assert differs(change), change
  assert not differs(lambda tree: None)


def test_digests_of_parts_add_up():
  tree = {name: x for name, x in _tree().items() if name in ("a", "ids")}
  cut = [
    {name: jnp.asarray(x[start:stop]) for name, x in tree.items()}
    for start, stop in ((0, 3), (3, 8))
  ]
  parts = digest.of_tree(cut[0], 0) + digest.of_tree(cut[1], 3)
  assert np.asarray(parts).tolist() == _digest(tree)


# --- slices -------------------------------------------------------------------


def _in_slices(n, count=8, platform="tpu"):
  """Stand-ins for devices, the i-th of n slices by turns."""
  return [
    types.SimpleNamespace(
      id=i,
      slice_index=i % n,
      process_index=i,
      platform=platform,
      device_kind=platform,
      local_hardware_id=0,
      coords=(i // n % 2, i // n // 2, 0),
      core_on_chip=0,
    )
    for i in range(count)
  ]


@pytest.mark.parametrize("n", [2, 4])
def test_only_data_crosses_slices(n, monkeypatch):
  made, real = [], jax.sharding.Mesh

  def mesh(grid, names, axis_types):
    made.append((grid, names))
    return real(np.array(jax.devices()).reshape(grid.shape), names)

  monkeypatch.setattr(jax.sharding, "Mesh", mesh)
  config = config_lib.Config()
  config.model.n_heads = config.model.n_kv_heads = 8
  config.mesh = config_lib.MeshConfig(data=4, fsdp=2, tensor=1)
  mesh_lib.make(config, _in_slices(n))
  grid, names = made[0]
  assert grid.shape == (4, 2, 1) and names == sharding.MESH_AXES
  assert sorted(device.id for device in grid.flat) == list(range(8))
  for row in grid:  # each step along data stays within one slice
    assert len({device.slice_index for device in row.flat}) == 1
  order = [row.flat[0].slice_index for row in grid]
  assert order == sorted(order)


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_hosts_that_jax_calls_slices_are_not_slices(platform, monkeypatch):
  """8 hosts of 8 GPUs: all 64 may stand along any axis, in their order."""
  made, real = [], jax.sharding.Mesh

  def mesh(grid, names, axis_types):
    made.append(grid)
    return real(np.array(jax.devices()), "data")

  monkeypatch.setattr(jax.sharding, "Mesh", mesh)
  config = cli.load(str(ROOT / "configs/llama3_8b.py"))
  mesh_lib.make(config, _in_slices(8, 64, platform))
  assert made[0].shape == (1, 64, 1)
  assert [device.id for device in made[0].flat] == list(range(64))


def test_an_axis_may_take_a_part_of_the_torus(monkeypatch):
  """8 and 2 ways over 4x4 chips."""
  made, real = [], jax.sharding.Mesh

  def mesh(grid, names, axis_types):
    made.append(grid.shape)
    return real(np.array(jax.devices()), "data")

  monkeypatch.setattr(jax.sharding, "Mesh", mesh)
  devices = _in_slices(1, 16)
  for i, device in enumerate(devices):
    device.coords = (i % 4, i // 4, 0)
  config = config_lib.Config()
  config.train.batch_size = 16
  config.mesh = config_lib.MeshConfig(data=8, fsdp=2, tensor=1)
  mesh_lib.make(config, devices)
  assert made == [(8, 2, 1)]


def test_a_mesh_that_does_not_fit_the_slices_is_refused():
  config = config_lib.Config()
  config.mesh = config_lib.MeshConfig(data=1, fsdp=8, tensor=1)
  with pytest.raises(schema.ConfigError, match="multiple of the 2 slices"):
    mesh_lib.make(config, _in_slices(2))


# --- processes ----------------------------------------------------------------

NAMES = (
  "COORDINATOR_ADDRESS PROCESS_COUNT PROCESS_INDEX SLURM_NTASKS SLURM_PROCID"
  " SLURM_STEP_NODELIST OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK"
  " TPU_WORKER_HOSTNAMES MEGASCALE_NUM_SLICES TPU_SKIP_MDS_QUERY"
  " JAX_PLATFORMS"
).split()
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
  ("environment", "called"),
  [
    ({}, None),
    (
      {
        "COORDINATOR_ADDRESS": "h:1",
        "PROCESS_COUNT": "2",
        "PROCESS_INDEX": "1",
      },
      ("h:1", 2, 1),
    ),
    ({"COORDINATOR_ADDRESS": "h:1", **SLURM}, ("h:1", 4, 3)),
    (
      {
        "COORDINATOR_ADDRESS": "h:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "0",
      },
      ("h:1", 2, 0),
    ),
    # JAX finds the rest.
    ({**SLURM, "SLURM_STEP_NODELIST": "n[1-4]"}, (None, None, None)),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
    (
      {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
      (None, None, None),
    ),
    # Alone, though a scheduler is there.
    (SLURM, None),  # an allocation, but no step that srun started
    ({**SLURM, "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
  ],
)
def test_processes_are_found_in_the_environment(
  environment, called, monkeypatch
):
  for name in NAMES:
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **given: calls.append(given)
  )
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  processes.join(heartbeat_seconds=7)
  keys = ("coordinator_address", "num_processes", "process_id")
  found = [tuple(call[key] for key in keys) for call in calls]
  assert found == ([] if called is None else [called])
  assert all(call["heartbeat_timeout_seconds"] == 7 for call in calls)


@pytest.mark.parametrize(
  ("environment", "said"),
  [
    ({"COORDINATOR_ADDRESS": "h:1"}, "COORDINATOR_ADDRESS=h:1: needs PROCESS"),
    (
      {"COORDINATOR_ADDRESS": "h", "PROCESS_COUNT": "2", "PROCESS_INDEX": "0"},
      "COORDINATOR_ADDRESS=h: needs host:port",
    ),
    # Each process would train by itself.
    (
      {"PROCESS_COUNT": "2", "PROCESS_INDEX": "0"},
      "PROCESS_COUNT=2: needs COORDINATOR_ADDRESS",
    ),
  ],
)
def test_half_an_address_is_refused(environment, said, monkeypatch):
  for name in NAMES:
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  with pytest.raises(schema.ConfigError, match=said):
    processes.join(heartbeat_seconds=7)


def test_offloading_needs_a_part_of_the_hosts_memory():
  c = config_lib.Config()
  c.model.remat, c.model.remat_offload = "save_context", True
  memory = types.SimpleNamespace(kind="device")
  device = types.SimpleNamespace(
    device_kind="a chip", addressable_memories=lambda: [memory]
  )
  with pytest.raises(schema.ConfigError, match="pinned_host; a chip has"):
    mesh_lib.make(c, [device])

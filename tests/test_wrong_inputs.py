"""Wrong inputs, over every program: one line, the promised exit code, nothing
written.

Most are made by walking what there is to set: each field of the config and of
launch's spec, and each flag, by what it takes. The others are paths, texts and
files that are not what they should be.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import gzip
import itertools
import json
import os
import pathlib
import shutil
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import doors
import numpy as np
import pytest
import reference
from backports import zstd

from launch import specs
from lm import checkpoint, cli, schema
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib

TAKES_CONFIG = ("lm.data", "lm.train", "lm.verify")
SAMPLES = ("lm.sample", "lm.explain", "lm.chat", "lm.serve")
READS_RUN = ("lm.evaluate", "lm.convert", *SAMPLES)
DOORS = (*TAKES_CONFIG, *READS_RUN, "launch")
# Below, GIVEN stands for the directory with what is right.
RUN, CONFIG = "--workdir=GIVEN/run", "--config=GIVEN/config.py"
SPEC = f"--spec={doors.ROOT}/launch/pod.yaml"
RIGHT = {
  "lm.data": [CONFIG],
  "lm.train": [CONFIG, "--workdir=new"],
  "lm.verify": [CONFIG, "--only=parameters"],
  "lm.evaluate": [RUN],
  "lm.convert": [RUN, "--to=peft", "--output=new"],
  "lm.sample": [RUN],
  "lm.explain": [RUN],
  "lm.chat": [RUN],
  "lm.serve": [RUN, "--port=0"],
  "launch": [SPEC, "--to=slurm", "--dry_run"],
}


class Case(NamedTuple):
  """A command line that must fail. `says` stands in the one line; `files` lie
  in the working directory, and `code` is 1 where the world is to blame.
  """

  door: str
  arguments: list[str]
  says: str
  files: Mapping[str, bytes] = types.MappingProxyType({})
  code: int = 2


def right_but(door: str, *arguments: str) -> list[str]:
  """A flag that is given twice has its last value."""
  return [*RIGHT[door], *arguments]


# --- by walking --------------------------------------------------------------

HUGE = "1" + 30 * "0"
# No number at all, and numbers that cannot be.
NO_INT = ("x", "", "1.5", "True", "(1,)", "1e3", "\udce9")
NO_FLOAT = ("x", "", "True", "nan", "inf", "1e400", "(1.0,)", "1" + 400 * "0")
DEEP = 100_000 * "("


def leaves(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
  """(path, annotation) of each field, also of what is None by default."""
  for name, hint in typing.get_type_hints(kind).items():
    inner = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
    if dataclasses.is_dataclass(hint):
      inner = [hint]
    if inner:
      yield from leaves(inner[0], f"{path}.{name}")
    else:
      yield f"{path}.{name}", hint


def wrong_texts(hint: Any) -> list[str]:
  """What no field with this annotation can be, as a command line says it."""
  hint, optional = schema.bare(hint)
  if optional:
    if hint is str:
      return []
    return [text for text in wrong_texts(hint) if text != "None"]
  origin = typing.get_origin(hint)
  if origin is Literal:
    return ["nonesuch", "", "None", "\udce9"]
  if origin is tuple:
    wrong = ["(1j,)", "[[]]", "({},)"]
    return [*wrong, "7"] if hint == tuple[str, ...] else [*wrong, "x", DEEP]
  return {
    int: [*NO_INT, "None", "-1", HUGE, DEEP],
    float: [*NO_FLOAT, "None", "-1.0", DEEP],
    bool: ["maybe", "", "1", "None"],
    str: [],
  }[hint]


# Whole numbers to which no machine sets an end: a run may be as long as it
# likes, a text as rare, and more threads than there is work are none.
UNBOUNDED = set(
  "steps warmup_steps log_every eval_every eval_batches save_every keep_every"
  " keep_last keep_best epochs minutes retries".split()
)


def fields(door: str) -> Iterator[Case]:
  """Each field with a type that is wrong, a range that is, or no end. Of the
  config's, some for each door: all read it by `cli.load`, which is tested with
  every one.
  """
  if door == "launch":
    yield from _fields(door, specs.Spec, "spec")
  elif door in TAKES_CONFIG:
    first = TAKES_CONFIG.index(door)
    every = _fields(door, config_lib.Config, "config")
    yield from itertools.islice(every, first, None, 20 * len(TAKES_CONFIG))


def _fields(door: str, kind: type, root: str) -> Iterator[Case]:
  for path, hint in leaves(kind, root):
    name = path.rsplit(".", 1)[-1]
    for text in wrong_texts(hint):
      if text == HUGE and name in UNBOUNDED:
        continue
      yield Case(door, right_but(door, f"--{path}={text}"), name)
    yield Case(door, right_but(door, f"--{path}"), "no value")
    yield Case(door, right_but(door, f"--{path}s=1"), "unknown")


BAD_PATHS = {
  "path": {
    "": "empty",
    "~nouser/x": "no such user",
    "gs://bucket/x": "on a disk of this machine",
  },
  "path or URL": {
    "": "empty",
    "~nouser/x": "no such user",
    "gs://bucket/x": "gcsfs",
    "s3://bucket/x": "s3fs",
    "s4://bucket/x": "object stores are",
  },
}
# Flags that mean something only beside others.
BESIDE = {
  "alternatives": ["--json"],
  "draft": ["--ahead=1"],
  "fim_order": ["--suffix=x"],
  "html": ["--score=GIVEN/text.txt"],
  "system": ["--chat"],
}
# The vocabulary is their end: all numbers beyond it mean the same.
CLAMPED = {"top_k"}


def wrong_flags(door: str) -> Iterator[Case]:
  """Each flag with what it cannot take."""
  for name, kind in doors.flags_of(door).items():
    kind, values = kind.removeprefix("multi "), []
    if kind == "int":
      values = ["x", "", "1.5", "nan", "\udce9", "-1", HUGE]
    elif kind == "float":
      values = ["x", "", "nan", "inf", "-inf", "1e400"]
    elif kind == "bool":
      values = ["maybe", ""]
    elif kind == "string enum":
      values = ["nonesuch", "", "\udce9"]
    elif kind in BAD_PATHS:
      values = list(BAD_PATHS[kind])
    for value in values:
      if value == HUGE and name in CLAMPED:
        continue
      says = BAD_PATHS.get(kind, {}).get(value, name)
      beside = [] if kind in BAD_PATHS else BESIDE.get(name, [])
      flag = f"--{name}={value}"
      yield Case(door, right_but(door, *beside, flag), says)
  yield Case(door, right_but(door, "--nonesuch=1"), "nonesuch")
  yield Case(door, right_but(door, "stray"), "stray")
  if door in ("lm.train", "lm.evaluate"):  # those that join others
    flag = "--coordinator_address=localhost:1"
    yield Case(door, right_but(door, flag), "PROCESS_COUNT")


# --- paths -------------------------------------------------------------------

FILE = {"file": b"text"}
LONG = 5000 * "x"


def paths(door: str) -> Iterator[Case]:
  """Directories and files that cannot be had, or are of another kind."""
  case = functools.partial(_case, door)
  if door in TAKES_CONFIG:
    for value in ("", "absent.py", ".", "file/below.py", LONG, "~nouser/x.py"):
      yield case(f"--config={value}", says="config")
  if door in ("lm.data", "lm.train"):
    for value in (
      *("", "file", "file/below", "readonly", "readonly/x", LONG, "\udce9"),
    ):
      yield case(f"--config.data.cache_dir={value}", says="cache_dir")
    for value in ("gs://bucket/x", "s4://bucket/x"):
      yield case(f"--config.data.cache_dir={value}", says="cache_dir")
    for field in ("path", "chat_template"):
      for value in ("", "absent", ".", "file/below", "\udce9", LONG):
        yield case(
          "--config.tokenizer.kind=sentencepiece",
          f"--config.tokenizer.{field}={value}",
          says=field,
        )
    for value in (
      *("", "absent", "text", "text:", "text:absent*", "text:.", "jsonl:x"),
      *("tfds:nonesuch:train", "tfds:", "jsonl:#", "text:file/below"),
      *("text:\udce9", "http://x/y"),
    ):
      yield case(f"--config.data.train={value}", says="source")
      yield case(f"--config.data.validation={value}", says="source")
  if door == "lm.train":
    for value in (
      *("file", "file/below", "readonly", "readonly/x", LONG, "\udce9"),
      *("[x]/run", "a*", "d\\e"),
    ):
      yield case(f"--workdir={value}", says="workdir")
    for value in (
      *("", "absent", "file", "empty", LONG, "~nouser/run", "GIVEN/run@8"),
      *("@7", "absent@", "GIVEN/run@" + HUGE, "s4://bucket/x", "\udce9"),
    ):
      yield case(f"--config.init_from={value}", says="init_from")
  if door in READS_RUN:
    for value in (
      *("absent", "file", "file/below", "empty", LONG, "~nouser/run"),
      *("GIVEN", "GIVEN/run/checkpoints", "\udce9"),
    ):
      yield case(f"--workdir={value}", says="workdir")
    for step in ("8", "-7", HUGE):
      yield case(f"--step={step}", says="step")
  if door in SAMPLES:
    for value in ("absent", "file", "empty"):
      yield case("--ahead=1", f"--draft={value}", says=value)
  if door in SAMPLES or door == "lm.evaluate":
    for value in ("absent", "file", "empty", "GIVEN/run"):
      yield case(f"--adapter={value}", says="adapter")
  if door == "lm.convert":
    for value in ("file", "file/below", "readonly/x", "empty", LONG):
      yield case(f"--output={value}", says="output")
    yield case(says="no adapters")
    for value in (
      *("absent", "file", "file/below", "empty", LONG, "~nouser/x", "GIVEN"),
      *("GIVEN/run/checkpoints", "\udce9", "http://x/y", "s4://bucket/x"),
    ):
      yield Case(door, [f"--from={value}", "--to=new"], "--from", FILE)
    for value in ("file", "file/below", "readonly/x", "empty", LONG):
      yield Case(door, ["--from=GIVEN/run", f"--to={value}"], "--to", FILE)
    for value in ("", "s4://bucket/x"):
      yield Case(door, ["--from=GIVEN/run", f"--to={value}"], "--to", FILE)
    yield Case(door, ["--from=GIVEN/run", "--to=new", RUN], "--workdir", FILE)
    yield case("--dtype=float16", says="--dtype")
    yield case("--family=llama", says="--family")
    yield case("--nocheck", says="--check")
  if door in ("lm.evaluate", "lm.verify"):
    yield from outputs(case, "--output")
  if door == "lm.evaluate":
    for value in ("", "text:absent*", "text:.", "nonesuch", "text:\udce9"):
      yield case(f"--source={value}", says="source")
    for value in ("absent", "empty", "file", LONG, "GIVEN/run@8"):
      yield Case(door, ["--compare", "GIVEN/run", value], "--compare", FILE)
    yield Case(door, ["--compare", "GIVEN/run"], "two or more", FILE)
    for flag in ("--draw=absent/x", "--draw=.", "--step=7", "--documents"):
      compared = ["--compare", "GIVEN/run", "other", flag]
      yield Case(door, compared, flag.partition("=")[0], FILE)
    for value in ("absent", "file", ".", "empty", LONG):
      yield case(f"--overlap={value}", says="--overlap")
    yield case("--draw=new.png", says="--compare")
    for value in ("absent", "file", "file/below", LONG):
      tasks = ("--tasks=nonesuch", f"--include_path={value}")
      yield case(*tasks, says="--include_path")
    yield case("--tasks=nonesuch", says="--tasks")
    yield case("--tasks=", says="--tasks")
    yield case("--limit=3", says="--tasks")
    yield case("--tasks=docstring_bodies", "--stride=3", says="--stride")
    yield case("--tasks=docstring_bodies", "--overlap=x", says="--overlap")
    yield case("--tasks=,", says="--tasks")
  if door == "lm.data":
    yield from outputs(functools.partial(case, "--overlap"), "--output")
    yield case("--output=new", says="--overlap")
    yield case("--overlap", "--show=3", says="--show")
    none = "--config.data.validation=()"
    yield case("--overlap", none, says="--overlap_source=SPEC")
    yield case("--overlap", "--draw=new.png", says="--draw")
    for value in ("", "text:absent*", "nonesuch"):
      yield case("--overlap", f"--overlap_source={value}", says="source")
  if door == "lm.explain":
    score = "--score=GIVEN/text.txt"
    yield from outputs(functools.partial(case, score), "--html")
  for where, flag in (
    ("lm.explain", "--score"),
    ("lm.sample", "--prompt_file"),
    ("lm.sample", "--prefix_file"),
    ("lm.sample", "--suffix_file"),
  ):
    if door == where:
      for value in ("absent", ".", "file/below", LONG, "~nouser/x"):
        yield case(f"{flag}={value}", says=flag)
  if door == "launch":
    for value in ("", "absent", ".", "file/below", LONG, "\udce9"):
      yield case(f"--spec={value}", says="spec")


def outputs(case, flag: str) -> Iterator[Case]:
  for value in ("absent/x", ".", "file/below", "readonly/x", LONG):
    yield case(f"{flag}={value}", says=flag)


def _case(door: str, *arguments: str, says: str) -> Case:
  return Case(door, right_but(door, *arguments), says, FILE)


# --- texts -------------------------------------------------------------------

LATIN = "caf\udce9 "  # As the shell's $'caf\xe9 ' arrives.


def texts(door: str) -> Iterator[Case]:
  """Text that is not UTF-8, and flags that do not go together."""
  if door == "lm.sample":
    for arguments, says in (
      ([f"--prompt={LATIN}"], "prompt"),
      (["--prompt=fine", f"--prompt={LATIN}"], "prompt"),
      ([f"--stop={LATIN}"], "stop"),
      ([f"--suffix={LATIN}"], "suffix"),
      ([f"--logit_bias={LATIN}:1"], "logit_bias"),
      (["--stop="], "stop"),
      (["--logit_bias=3:nan"], "logit_bias"),
      (["--logit_bias=3:1e39"], "logit_bias"),
      (["--logit_bias=-1:1"], "logit_bias"),
      (["--logit_bias=3:1", "--logit_bias=3:2"], "stands twice"),
      ([f"--logit_bias={HUGE}:1"], "logit_bias"),
      (["--forbidden=384"], "forbidden"),
      ([f"--stop_ids={i}" for i in range(8, 16)], "stop_ids"),
      (["--temperature=1e39"], "temperature"),
      (["--top_p=0"], "top_p"),
      (["--min_p=1.5"], "min_p"),
      (["--typical_p=0"], "typical_p"),
      (["--repetition_penalty=0"], "repetition_penalty"),
      (["--n_samples=0"], "n_samples"),
      (["--n_samples=1000000000"], "n_samples"),
      (["--seed=4294967296"], "seed"),
      (["--max_new_tokens=64"], "max_new_tokens"),
      (["--min_tokens=9", "--max_new_tokens=8"], "min_tokens"),
      ([f"--prompt={99 * 'a'}"], "prompt"),
      (["--beams=0"], "beams"),
      (["--beams=100000"], "beams"),
      (["--beams=2", "--temperature=2"], "temperature"),
      (["--beams=2", "--stop=x"], "stop"),
      (["--ahead=17"], "ahead"),
      (["--draft=GIVEN/run"], "draft"),
      (["--stream", "--json"], "stream"),
      (["--prompt=a", "--prompt=b", "--suffix=c"], "suffix"),
      (["--suffix=a", "--suffix_file=GIVEN/text.txt"], "suffix_file"),
      (["--prefix_file=GIVEN/text.txt"], "prefix_file"),
      (["--fill=no sentinel"], "fill"),
      ([f"--fill={LATIN}<sentinel_0>"], "fill"),
      (["--fill=<sentinel_0>", "--prompt=a"], "prompt"),
    ):
      yield Case(door, right_but(door, *arguments), says)
  if door == "lm.explain":
    for arguments, says in (
      ([f"--prompt={LATIN}"], "prompt"),
      (["--candidates=385"], "candidates"),
      (["--trace", "--candidates=21"], "candidates"),
      (["--score=GIVEN/text.txt", "--candidates=21"], "candidates"),
      (["--score=GIVEN/text.txt", "--top_k=3"], "top_k"),
      (["--max_new_tokens=3"], "max_new_tokens"),
      (["--html=x"], "html"),
      (["--fill=no mask"], "fill"),
      ([f"--fill={LATIN}<mask>"], "fill"),
      ([f"--fill={99 * '<mask>'}"], "tokens"),
      (["--fill=<mask>", "--top_k=3"], "top_k"),
    ):
      yield Case(door, right_but(door, *arguments), says)
  if door == "lm.chat":
    for arguments, says in (
      ([f"--system={LATIN}"], "system"),
      (["--min_p=1.5"], "min_p"),
    ):
      yield Case(door, right_but(door, *arguments), says)
  if door in SAMPLES:
    for mesh in (
      *("", "x", "1", "1,1", "1,1,1,1", "0,1,1", "-1,1,-1", "1,1,2", "1,7,1"),
      *("1000000000,1,1", f"{HUGE},1,1", "1,1,3", "1.0,1,1", "1,1,"),
      "9" * 5000 + ",1,1",
    ):
      yield Case(door, right_but(door, f"--mesh={mesh}"), "mesh")
    yield Case(door, [], "workdir")
  if door == "lm.evaluate":
    for arguments, says in (
      (["--stride=0"], "stride"),
      (["--stride=33"], "stride"),
      (["--batch_size=0"], "batch_size"),
      (["--batch_size=1000000000"], "batch_size"),
      (["--source=text:GIVEN/empty.txt"], "empty.txt"),
      (["--source=text:GIVEN/text.txt", "--source=jsonl:GIVEN/text.txt#a"], ""),
    ):
      yield Case(door, right_but(door, *arguments), says)
    yield Case(door, [], "workdir")
  if door == "lm.serve":
    for arguments, says in (
      (["--port=65536"], "port"),
      (["--slots=0"], "slots"),
      (["--slots=1000000000"], "slots"),
      (["--timeout_seconds=0"], "timeout_seconds"),
      (["--host=0.0.0.0"], "host"),
      (["--host="], "host"),
      (["--api_key_env=NO_SUCH_VARIABLE"], "api_key_env"),
      (["--api_key_env="], "api_key_env"),
    ):
      yield Case(door, right_but(door, *arguments), says)
  if door == "lm.verify":
    for value in ("", "nonesuch", "parameters,nonesuch", ","):
      yield Case(door, right_but(door, f"--only={value}"), "only")
    for value in ("0", "1000000000"):
      yield Case(door, right_but(door, f"--devices={value}"), "devices")
    yield Case(door, right_but(door, "--faults"), "only")
  if door in TAKES_CONFIG:
    yield Case(door, [], "config")
  if door == "lm.train":
    yield Case(door, [CONFIG], "workdir")
  if door == "launch":
    for arguments, says in (
      (["--to="], "to"),
      (["--to=nonesuch"], "to"),
      (["--delete"], "delete"),
      (["stray"], "stray"),
      (["--nonesuch"], "nonesuch"),
      (["--spec.name=UPPER"], "name"),
      (["--spec.accelerator=H100:3"], "accelerator"),
      (["--spec.accelerator=v9-8"], "accelerator"),
      (["--to=gke"], ""),
      (["--to=tpu_vm"], ""),
      (["--to=sky"], ""),
    ):
      yield Case(door, right_but(door, *arguments), says)
    yield Case(door, [SPEC], "to")


# --- files -------------------------------------------------------------------

TEXT = b"a line of text\n" * 200
PACKED = {"gz": gzip.compress, "zst": zstd.compress}
GET_CONFIG = b"from lm import config\ndef get_config():\n  "


def files(door: str) -> Iterator[Case]:
  """Files that are not what they should be."""
  if door in ("lm.data", "lm.train", "lm.evaluate"):
    flag = "--source" if door == "lm.evaluate" else "--config.data.train"
    some = ("latin.txt", "deep.jsonl", "cut.txt.gz", "bad.txt.zst")
    for name, content in corpora().items():
      if door != "lm.data" and name not in some:
        continue  # one mechanism reads them all
      kind = "jsonl:{}#text" if ".jsonl" in name else "text:{}"
      spec = f"{flag}={kind.format(name)}"
      yield Case(door, right_but(door, spec), name, {name: content})
  if door in READS_RUN:
    for name, content in (
      ("other", b""),
      ("metadata", b"\x00\xff" * 50),
      ("metadata", b"null"),
      ("metadata", b'{"config": "{}"}'),
      ("metadata", b"[" * 100_000),
    ):
      bad = {f"bad/checkpoints/7/meta/{name}": content}
      yield Case(door, right_but(door, "--workdir=bad"), "bad", bad, 1)
  if door in ("lm.data", "lm.train"):
    for name, content in {
      "garbage.model": b"\x00\xff" * 50,
      "empty.model": b"",
      "text.model": TEXT,
    }.items():
      arguments = right_but(
        door,
        "--config.tokenizer.kind=sentencepiece",
        f"--config.tokenizer.path={name}",
      )
      yield Case(door, arguments, name, {name: content})
    for name, content in {
      "open.jinja": b"{% for m in messages %}",
      "latin.jinja": b"caf\xe9",
      "unknown.jinja": b"{{ messages | nonesuch }}",
      "binary.jinja": b"\x00\xff" * 50,
    }.items():
      template = f"--config.tokenizer.chat_template={name}"
      yield Case(door, right_but(door, template), name, {name: content})
  if door in TAKES_CONFIG:
    for name, content in {
      "empty.py": b"",
      "binary.py": b"\x00\xff" * 50,
      "latin.py": b"# caf\xe9\n",
      "nul.py": b"x = 1\x00",
      "syntax.py": b"def get_config(:\n",
      "raises.py": b"1 / 0\n",
      "exits.py": b"import sys\nsys.exit(0)\n",
      "endless.py": b"def get_config():\n  return get_config()\n",
      "number.py": b"def get_config():\n  return 3\n",
      "value.py": b"get_config = 3\n",
      "wants.py": b"def get_config(x):\n  return x\n",
      "tree.py": GET_CONFIG + b"return config.Config(model=None)\n",
      "class.py": GET_CONFIG + b"return config.Config\n",
      "interrupted.py": b"raise KeyError\n",
      "typo.py": GET_CONFIG + b"c = config.Config(); c.sed = 1; return c\n",
      "field.py": GET_CONFIG + b"c = config.Config(); c.seed = 1.5; return c\n",
    }.items():
      arguments = right_but(door, f"--config={name}")
      says = "config." if b"config.Config(" in content else name
      yield Case(door, arguments, says, {name: content})
  if door == "launch":
    for name, content in {
      "binary.yaml": b"\x00\xff" * 50,
      "latin.yaml": b"name: caf\xe9\n",
      "list.yaml": b"- 1\n",
      "text.yaml": b"text",
      "open.yaml": b"name: [1,\n",
      "twice.yaml": b"name: a\nname: b\n",
      "unknown.yaml": b"nam: a\n",
      "type.yaml": b"slices: two\n",
      "tag.yaml": b"name: !!python/object/apply:os.getcwd []\n",
      "deep.yaml": b"[" * 5000,
      "tree.yaml": b"local: 3\n",
      "key.yaml": b"? [1]\n: 2\n",
      "map.yaml": b"? {a: b}\n: 2\n",
    }.items():
      arguments = right_but(door, f"--spec={name}")
      yield Case(door, arguments, "spec", {name: content})


def corpora() -> dict[str, bytes]:
  """Source files by name: what no text can be read from."""
  named = {
    "latin.txt": b"caf\xe9 " * 9,
    "utf16.txt": "text".encode("utf-16"),
    "deep.jsonl": b"[" * 100_000,
    "deep2.jsonl": b'{"text":' * 100_000,
    "null.jsonl": b'{"text": null}\n',
    "list.jsonl": b'{"text": ["a"]}\n',
    "number.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n",
    "other.jsonl": b'{"txt": "a"}\n',
    "array.jsonl": b'["text"]\n',
    "open.jsonl": b'{"text": "a\n',
    "binary.jsonl": b"\x00\xff\n",
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "plain.xz": TEXT,
    "plain.bz2": TEXT,
  }
  for end, pack in PACKED.items():
    packed = pack(TEXT)
    named[f"plain.txt.{end}"] = TEXT
    named[f"cut.txt.{end}"] = packed[: len(packed) // 2]
    named[f"short.txt.{end}"] = packed[:3]
    middle = len(packed) // 2
    named[f"bad.txt.{end}"] = (
      packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :]
    )
    named[f"latin.txt.{end}"] = pack(b"caf\xe9")
  return named


# --- running them ------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory, make) -> pathlib.Path:
  """What is right: a config, its corpus, and a run of one checkpoint."""
  path = tmp_path_factory.mktemp("given")
  config = make(data__cache_dir="cache", data__train=(f"text:{path}/text.txt",))
  config.data.validation = config.data.train
  config.mesh.fsdp = 1
  text = json.dumps(config_lib.to_json(config))
  (path / "config.py").write_text(
    "from lm import validation\n"
    f"def get_config():\n  return validation.from_json({text})\n"
  )
  (path / "text.txt").write_text("some text\n" * 99)
  (path / "empty.txt").touch()
  template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
  tokenizer = tokenizer_lib.Tokenizer(None, template)
  checkpoints = checkpoint.Checkpoints(str(path / "run"), config.checkpoint)
  meta = checkpoint.Meta(7, config, tokenizer.to_json(), "none")
  params = reference.random_params(config.model)
  checkpoints.save({"params": params, "rest": {"step": np.zeros(())}}, meta)
  checkpoints.close()
  return path


def listing(directory: str | pathlib.Path) -> dict[str, tuple[int, int]]:
  """Every file and directory below: its size and when it was changed."""
  found = {}
  for root, names, files_ in os.walk(directory):
    for name in [*names, *files_]:
      path = os.path.join(root, name)
      stat = os.lstat(path)
      size = 0 if name in names else stat.st_size
      found[os.path.relpath(path, directory)] = size, stat.st_mtime_ns
  return found


def fault(case: Case, given: pathlib.Path, directory: pathlib.Path) -> str:
  """What is not as promised; '' where all is."""
  directory.mkdir()
  for name in ("empty", "readonly"):
    (directory / name).mkdir()
  (directory / "readonly").chmod(0o555)
  for name, content in case.files.items():
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
  before = listing(directory)
  arguments = [a.replace("GIVEN", str(given)) for a in case.arguments]
  ended = doors.run(case.door, arguments, str(directory), timeout=60)
  after = listing(directory)
  shutil.rmtree(directory)
  lines = ended.err.splitlines()
  last = lines[-1] if lines else ""
  if "Traceback" in ended.err:
    return f"traceback: {last}"
  if ended.code != case.code:
    return f"exit code {ended.code}, not {case.code}: {last}"
  if len(lines) != 1 or not last.startswith("error: "):
    return f"not one line: {ended.err!r}"
  if case.says not in last:
    return f"does not say {case.says!r}: {last}"
  if ended.out:
    return f"stdout: {ended.out!r}"
  if before != after:
    return f"wrote {sorted(before.items() ^ after.items())}"
  return ""


def cases(door: str) -> list[Case]:
  found = [*texts(door), *paths(door), *files(door)]
  found += fields(door)
  if door != "launch":
    found += wrong_flags(door)
  return found


# What these refuse is said by modules that refuse it in lm.sample, or that have
# tests of their own (lm.evaluate: test_harness.py, test_compare.py).
SLOW = (*SAMPLES[1:], "lm.evaluate")


@pytest.mark.parametrize(
  "door",
  [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in DOORS],
)
def test_wrong_input_is_one_line_and_writes_nothing(door, given, tmp_path):
  before, todo = listing(given), cases(door)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = pool.map(
      lambda i: fault(todo[i], given, tmp_path / str(i)), range(len(todo))
    )
    faults = [
      f"{' '.join(a[:80] for a in case.arguments)}\n    {wrong[:300]}"
      for case, wrong in zip(todo, found, strict=True)
      if wrong
    ]
  assert not faults, f"{len(faults)} of {len(todo)}:\n" + "\n".join(faults)
  assert listing(given) == before


@pytest.mark.parametrize(
  ("door", "arguments", "says"),
  [
    ("lm.evaluate", "--source=text:a* --output=./a", "a file of the source"),
    ("lm.evaluate", "--source=jsonl:*#f|fim --output=a", "a file of the sou"),
    ("lm.evaluate", "--overlap --overlap_output=o --output=o", "of --output"),
    ("lm.evaluate", "--overlap=a --output=a", "the file of --overlap"),
    ("lm.evaluate", "--chat_template=a --output=a", "of --chat_template"),
    ("lm.evaluate", "--compare a b --output=a", "the file of --compare"),
    ("lm.evaluate", "--compare a b --output=o --draw=o", "file of --output"),
    ("lm.data", "--config=a.py --draw=a.py", "the file of --config"),
    ("lm.data", "--overlap --overlap_source=text:a --output=a", "of the sour"),
    ("lm.data", "--draw=GIVEN/text.txt", "is a file of the source"),
    ("lm.verify", "--config=a.py --output=a.py", "the file of --config"),
  ],
)
def test_no_output_is_an_input(door, arguments, says, given, tmp_path):
  content = {"a": b"{}", "a.py": (given / "config.py").read_bytes()}
  case = Case(door, right_but(door, *arguments.split()), says, content)
  assert not fault(case, given, tmp_path / "case")


def test_no_field_of_the_config_takes_a_wrong_text(given):
  """As every program reads them before it does anything."""
  before, n = listing(given), 0
  for case in _fields("lm.train", config_lib.Config, "config"):
    arguments = [a.replace("GIVEN", str(given)) for a in case.arguments]
    with pytest.raises(schema.ConfigError) as refused:
      overrides, _ = schema.split_arguments(arguments, "config")
      cli.load(str(given / "config.py"), overrides)
    assert case.says in str(refused.value), case.arguments
    n += 1
  assert n > 1000 and listing(given) == before


def test_the_cases_are_many_and_of_every_door():
  counts = collections.Counter(c.door for d in DOORS for c in cases(d))
  assert set(counts) == set(DOORS) and sum(counts.values()) >= 200


# --- a terminal of another encoding ------------------------------------------

SHOWN = [
  ("lm.data", ["--config.data.train=text:é.txt"], "\\xe9.txt"),
  ("lm.evaluate", ["--source=text:é.txt", "--output=é.json"], "\\xe9.txt"),
  ("lm.sample", ["--prompt=é", "--max_new_tokens=2"], "\\xe9"),
  ("lm.explain", ["--prompt=é", "--candidates=2"], "after <bos>"),
  ("lm.explain", ["--prompt=é", "--max_new_tokens=2", "--trace"], "draws"),
  ("lm.explain", ["--score=\udce9.txt", "--html=\udce9.html"], "log P(text)"),
  ("lm.verify", [], "pass"),
  ("launch", ["--", "echo", "é"], "é"),  # a script: bytes, not for the eye
]


@pytest.mark.slow
def test_output_that_a_stream_cannot_show_is_escaped(given, tmp_path):
  """Nothing that was computed is lost on a stdout that knows only ASCII, nor
  where the name of a file is not UTF-8.
  """
  for name in ("é.txt", "\udce9.txt"):
    (tmp_path / name).write_text("é", encoding="utf-8")
  for door, arguments, says in SHOWN:
    whole = [
      a.replace("GIVEN", str(given)) for a in right_but(door, *arguments)
    ]
    ended = doors.run(door, whole, str(tmp_path), encoding="ascii")
    assert ended.code == 0, (door, arguments, ended)
    assert says in ended.out, (door, arguments, ended)
  page = (tmp_path / "\udce9.html").read_text(encoding="utf-8")
  assert "\\udce9.txt" in page and "é" in page
  (document,) = json.loads((tmp_path / "é.json").read_text())["sources"][0][
    "best"
  ]
  assert document["name"] == "é.txt"

"""Small vocabularies in the manner of public models, and hostile texts.

Each is trained here, on files of this repository: nothing is downloaded.
"""

import functools
import importlib.util
import io
import json
import pathlib
import random

import pytest
import sentencepiece
import tokenizers
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from lm.data import vocabulary

ROOT = pathlib.Path(__file__).parent.parent
CORPUS = [
  (ROOT / name).read_text()
  for name in ("README.md", "lm/cli.py", "lm/files.py", "docs/promises.md")
]
# That of Llama 3, tokenizer.json of meta-llama/Meta-Llama-3-8B.
LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_TOKENS = [f"<0x{i:02X}>" for i in range(256)]
LLAMA_3_TEMPLATE = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}
{%- else %}
{{- m.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML_TEMPLATE = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- m.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def special(names):
  return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level(pattern, names, normalizer=None, size=600):
  t = tokenizers.Tokenizer(models.BPE())
  t.normalizer = normalizer
  t.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(pattern), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  t.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  t.train_from_iterator(CORPUS, trainer)
  t.add_special_tokens(special(names))
  return t


def llama_3():
  names = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
  ]
  names += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
  names += [f"<|reserved_special_token_{i}|>" for i in range(1, 130)]
  t = byte_level(LLAMA_3, names)
  t.post_processor = processors.TemplateProcessing(
    single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 600)]
  )
  return t, {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "chat_template": LLAMA_3_TEMPLATE,
  }


def gpt_2():
  t = byte_level(LLAMA_3, ["<|endoftext|>"])
  t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return t, {}


def qwen():
  names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  names += ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
  t = byte_level(LLAMA_3, names, normalizers.NFC())
  t.add_tokens([AddedToken("<think>", special=False, normalized=False)])
  return t, {
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "chat_template": CHATML_TEMPLATE,
  }


def byte_fallback(names, prefix, size=900):
  """A BPE over characters whose spaces are U+2581, as converted ones are."""
  start = tokenizers.Tokenizer(models.BPE())
  start.normalizer = normalizers.Sequence(
    [*([normalizers.Prepend("\u2581")] if prefix else [])]
    + [normalizers.Replace(" ", "\u2581")]
  )
  start.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
  trainer = trainers.BpeTrainer(
    vocab_size=size - 256 - len(names), show_progress=False
  )
  start.train_from_iterator(CORPUS, trainer)
  learnt = json.loads(start.to_str())["model"]
  vocab = {name: i for i, name in enumerate([*names, *BYTE_TOKENS])}
  for token in sorted(learnt["vocab"], key=learnt["vocab"].get):
    vocab.setdefault(token, len(vocab))
  t = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[tuple(pair) for pair in learnt["merges"]],
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  t.normalizer = start.normalizer
  steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback()]
  steps += [decoders.Fuse()]
  steps += [decoders.Strip(" ", 1, 0)] if prefix else []
  t.decoder = decoders.Sequence(steps)
  t.add_special_tokens(special(name for name in names if "unused" not in name))
  return t


def llama_2():
  t = byte_fallback(["<unk>", "<s>", "</s>"], prefix=True)
  return t, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def code_llama():
  names = ["<unk>", "<s>", "</s>", "\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"]
  t = byte_fallback(names, prefix=True)
  return t, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma():
  names = ["<pad>", "<eos>", "<bos>", "<unk>"]
  names += [f"<unused{i}>" for i in range(99)]
  names += ["<start_of_turn>", "<end_of_turn>"]
  t = byte_fallback(names, prefix=False)
  return t, {
    "bos_token": "<bos>",
    "eos_token": {"content": "<eos>", "__type": "AddedToken"},
    "pad_token": "<pad>",
    "unk_token": "<unk>",
  }


def bert():
  t = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  t.normalizer = normalizers.BertNormalizer(lowercase=True)
  t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  t.decoder = decoders.WordPiece(cleanup=False)
  names = ["[PAD]", *(f"[unused{i}]" for i in range(120)), "[UNK]", "[CLS]"]
  names += ["[SEP]", "[MASK]"]
  trainer = trainers.WordPieceTrainer(
    vocab_size=800, special_tokens=names, show_progress=False
  )
  t.train_from_iterator(CORPUS, trainer)
  tree = json.loads(t.to_str())
  tree["added_tokens"] = [
    x for x in tree["added_tokens"] if "unused" not in x["content"]
  ]
  return tokenizers.Tokenizer.from_str(json.dumps(tree)), {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
  }


def unigram():
  """With byte fallback; its control tokens are in the model, as T5's are."""
  t = tokenizers.Tokenizer(models.Unigram())
  t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  trainer = trainers.UnigramTrainer(
    vocab_size=400, unk_token="<unk>", show_progress=False
  )
  t.train_from_iterator(CORPUS, trainer)
  learnt = json.loads(t.to_str())["model"]["vocab"]
  names = ["<pad>", "<unk>", "<s>", "</s>", *BYTE_TOKENS]
  vocab = [(name, 0.0 if i < 4 else -20.0) for i, name in enumerate(names)]
  vocab += [(token, score) for token, score in learnt if token not in names]
  t = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=1, byte_fallback=True))
  t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  t.decoder = decoders.Sequence(
    [
      decoders.ByteFallback(),
      decoders.Metaspace(prepend_scheme="first"),
      decoders.Fuse(),
    ]
  )
  t.add_special_tokens(special(["<pad>", "<unk>", "<s>", "</s>"]))
  return t, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def sentencepiece_model(**options) -> bytes:
  """A model as Llama 2's (`add_dummy_prefix`) or Gemma's."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(" ".join(CORPUS).splitlines()),
    model_writer=model,
    minloglevel=2,
    **{
      "vocab_size": 800,
      "model_type": "bpe",
      "byte_fallback": True,
      "normalization_rule_name": "identity",
      "remove_extra_whitespaces": False,
      **options,
    },
  )
  return model.getvalue()


MAKERS = {
  f.__name__: f
  for f in (llama_3, gpt_2, qwen, llama_2, code_llama, gemma, bert, unigram)
}


@functools.cache
def files(name: str) -> dict[str, str]:
  """Contents of the files of a vocabulary's folder."""
  t, config = MAKERS[name]()
  found = {"tokenizer.json": t.to_str()}
  if config:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    found["tokenizer_config.json"] = json.dumps(config)
  else:  # As of GPT-2.
    found["tokenizer_config.json"] = '{"model_max_length": 1024}'
    i = t.token_to_id("<|endoftext|>")
    found["generation_config.json"] = json.dumps(
      {"bos_token_id": i, "eos_token_id": i}
    )
  return found


def folder(path: pathlib.Path, name: str) -> pathlib.Path:
  """Writes the folder of a vocabulary below `path`."""
  where = path / name
  where.mkdir(exist_ok=True, parents=True)
  for file, content in files(name).items():
    (where / file).write_text(content)
  return where


def auto_tokenizer(path):
  """transformers' tokenizer of a folder."""
  if importlib.util.find_spec("transformers") is None:
    pytest.fail("needs the extra `test`")
  import transformers

  return transformers.AutoTokenizer.from_pretrained(path)


# --- hostile texts -----------------------------------------------------------

_PARTS = [
  *("\0", "\u2581", "\u2581\u2581", " ", "  ", " " * 7, "\t", "\n", "\r\n"),
  *("\r", "\n\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028", "\x1f"),
  *("e\u0301", "\u00e9", "\u1e9b\u0323", "n\u0303\u0332", "\ufb01", "\u0130"),
  *("\u4e2d\u6587", "\u0e44\u0e17\u0e22", "\ud55c\uae00", "\u1100\u1161"),
  "\U0001f468\u200d\U0001f469\u200d\U0001f467",
  *("\U0001f642", "\U0001f1e9\U0001f1ea", "\U0010ffff", "\ufffd", "\uffff"),
  *("\u05e9\u05dc\u05d5\u05dd", "\u202eabc\u202c", "\u0645\u0631\u062d"),
  *("def f(x):\n    return x", "the", "The", " and", "ing", "don't", "I'LL"),
  *("0", "12", "1234567", "3.14", "...", "!?", "<", "|", ">", "<|", "\\", '"'),
  *("<0x41>", "\u0120", "\u010a", "##ing", "</w>", "a", "A", "aaaa", "abab"),
]


def names_of_tokens() -> list[str]:
  found = [*vocabulary.RESERVED[:9], "<user>", "<s>", "</s>", "<unk>", "[MASK]"]
  return [*found, "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "<|im_end|>"]


def hostile(n: int, names: bool = True) -> list[str]:
  """`n` texts; with `names`, some spell special tokens."""
  draw = random.Random(0)
  words = "".join(CORPUS).split()
  parts = _PARTS + (names_of_tokens() if names else [])
  found = ["", " ", "\u2581", "\0", "\n" * 99, " " * 999, "x" * 5000]
  found += parts
  while len(found) < n:
    some = []
    for _ in range(draw.randint(1, 12)):
      kind = draw.random()
      if kind < 0.55:
        some.append(draw.choice(parts) * draw.choice((1, 1, 1, 2, 5)))
      elif kind < 0.8:
        some.append(draw.choice(("", " ")) + draw.choice(words))
      else:
        code = draw.randrange(0x110000 if kind < 0.9 else 0x300)
        some.append("" if 0xD800 <= code < 0xE000 else chr(code))
    text = "".join(some)
    if names or "<" not in text and "[" not in text:
      found.append(text)
  return found[:n]

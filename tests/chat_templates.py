"""Chat templates in the manner of public models, and what they must give.

The templates are written anew here. A golden is the rendered text: [[ and ]]
surround the training targets, and a name of a token stands for its id.
"""

import dataclasses
import re

FIRST, SECOND = "Gr\u00fc\u00df dich \U0001f642!", "and\n\nnow?"
ONE, TWO = "Hi.", "  caf\u00e9 \U0001f600"
TURNS = (FIRST, ONE, SECOND, TWO)


@dataclasses.dataclass(frozen=True)
class Style:
  """`golden` is of user, assistant, user, assistant and, where `last_user` is
  true, user.
  """

  template: str
  golden: str
  special_tokens: tuple[str, ...] = ()
  last_user: bool = True

  @property
  def without_blocks(self) -> str:
    """The template with other blocks in place of {% generation %}."""
    text = re.sub(r"{%(-?) generation", r"{%\1 if true", self.template)
    return re.sub(r"{%(-?) endgeneration", r"{%\1 endif", text)

  @property
  def messages(self) -> list[dict[str, str]]:
    contents = [*TURNS, "bye"] if self.last_user else TURNS
    return [
      {"role": ("user", "assistant")[i % 2], "content": content}
      for i, content in enumerate(contents)
    ]


CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if m.role == 'assistant' -%}
{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ m.content ~ '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
QWEN = (
  """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
{%- endif -%}
"""
  + CHATML
)
LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\\n\\n' }}
{%- if m['role'] == 'assistant' -%}
{% generation %}{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endgeneration %}
{%- else -%}
{{ m['content'] | trim ~ '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""
MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant must alternate') }}
{%- endif -%}
{%- if m.role == 'user' -%}
{{ '[INST] ' ~ m.content ~ ' [/INST]' }}
{%- else -%}
{% generation %}{{ ' ' ~ m.content ~ eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
{{ raise_exception('no system role here') }}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<start_of_turn>model\\n' }}
{%- generation -%}
{{ m.content | trim ~ '<end_of_turn>' }}
{%- endgeneration -%}
{{ '\\n' }}
{%- else -%}
{{ '<start_of_turn>user\\n' ~ m.content | trim ~ '<end_of_turn>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
ZEPHYR = """\
{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|assistant|>' }}
{% generation %}
{{ m.content + eos_token }}
{% endgeneration %}
{% else %}
{{ '<|' }}{{ m.role }}{{ '|>' }}
{{ m.content + eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
"""
PHI = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '<|user|>\\n' ~ m.content ~ '<|end|>\\n' }}
{%- else -%}
{{ '<|assistant|>\\n' }}
{%- generation -%}
{{ m.content ~ '<|end|>\\n' }}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}
{%- else -%}{{ eos_token }}{%- endif -%}
"""
ALPACA = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '### Instruction:\\n' ~ m.content ~ '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' }}
{%- generation -%}{{ m.content }}{%- endgeneration -%}
{{ '' if loop.last else '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
# What follows is written by hand; nothing computes it.
IM = ("<|im_start|>", "<|im_end|>")
CHATML_GOLDEN = """\
<|im_start|>user
Gr\u00fc\u00df dich \U0001f642!<|im_end|>
<|im_start|>assistant
[[Hi.<|im_end|>]]
<|im_start|>user
and

now?<|im_end|>
<|im_start|>assistant
[[  caf\u00e9 \U0001f600<|im_end|>]]
<|im_start|>user
bye<|im_end|>
"""
STYLES = {
  "chatml": Style(CHATML, CHATML_GOLDEN, IM),
  "qwen": Style(
    QWEN,
    "<|im_start|>system\nBe helpful.<|im_end|>\n" + CHATML_GOLDEN,
    IM,
  ),
  "llama3": Style(
    LLAMA3,
    """\
<bos><|start_header_id|>user<|end_header_id|>

Gr\u00fc\u00df dich \U0001f642!<|eot_id|>\
<|start_header_id|>assistant<|end_header_id|>

[[Hi.<|eot_id|>]]<|start_header_id|>user<|end_header_id|>

and

now?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[[caf\u00e9 \U0001f600<|eot_id|>]]<|start_header_id|>user<|end_header_id|>

bye<|eot_id|>""",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  ),
  "mistral": Style(
    MISTRAL,
    "<bos>[INST] Gr\u00fc\u00df dich \U0001f642! [/INST][[ Hi.<eos>]]"
    "[INST] and\n\nnow? [/INST][[   caf\u00e9 \U0001f600<eos>]]"
    "[INST] bye [/INST]",
  ),
  "gemma": Style(
    GEMMA,
    """\
<bos><start_of_turn>user
Gr\u00fc\u00df dich \U0001f642!<end_of_turn>
<start_of_turn>model
[[Hi.<end_of_turn>]]
<start_of_turn>user
and

now?<end_of_turn>
<start_of_turn>model
[[caf\u00e9 \U0001f600<end_of_turn>]]
<start_of_turn>user
bye<end_of_turn>
""",
    ("<start_of_turn>",),
  ),
  "zephyr": Style(
    ZEPHYR,
    """\
<|user|>
Gr\u00fc\u00df dich \U0001f642!<eos>
<|assistant|>
[[Hi.<eos>
]]<|user|>
and

now?<eos>
<|assistant|>
[[  caf\u00e9 \U0001f600<eos>
]]<|user|>
bye<eos>
""",
  ),
  "phi": Style(
    PHI,
    """\
<|user|>
Gr\u00fc\u00df dich \U0001f642!<|end|>
<|assistant|>
[[Hi.<|end|>
]]<|user|>
and

now?<|end|>
<|assistant|>
[[  caf\u00e9 \U0001f600<|end|>
]]<|user|>
bye<|end|>
<eos>""",
    ("<|user|>", "<|assistant|>", "<|end|>"),
  ),
  "alpaca": Style(
    ALPACA,
    """\
### Instruction:
Gr\u00fc\u00df dich \U0001f642!

### Response:
[[Hi.]]

### Instruction:
and

now?

### Response:
[[  caf\u00e9 \U0001f600<eos>]]""",
    last_user=False,
  ),
}

"""Writes hf_tiny.npz: what Hugging Face transformers computes on tiny models.

  python tests/goldens/make_reference.py        (from the root of the checkout)

It needs torch and transformers, which the tests do not. Remake the file only
when a family is added or its tiny config in tests/families.py changes; never
because a test disagrees with it. Last made with transformers 5.24.0.

The modelling code casts to float32 within norms, rotary angles and softmax.
Here `torch.float32` itself is replaced by float64 before the models are
imported, so the stored logits are float64 throughout.
"""

import pathlib
import sys

import numpy as np
import torch

torch.set_default_dtype(torch.float64)
torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double

import transformers  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import families  # noqa: E402
import reference  # noqa: E402

from lm import config as config_lib  # noqa: E402

B, T = 2, 19


def gpt2(cfg: config_lib.ModelConfig):
  return transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=cfg.vocab_size,
      n_positions=cfg.context_length,
      n_embd=cfg.d_model,
      n_layer=cfg.n_layers,
      n_head=cfg.n_heads,
      n_inner=cfg.d_mlp,
      layer_norm_epsilon=cfg.norm_epsilon,
      activation_function="gelu_new",
      resid_pdrop=0.0,
      embd_pdrop=0.0,
      attn_pdrop=0.0,
      **SPECIAL_TOKENS,
      attn_implementation="eager",
    )
  )


def _common(cfg: config_lib.ModelConfig) -> dict:
  return SPECIAL_TOKENS | {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.d_model,
    "intermediate_size": cfg.d_mlp,
    "num_hidden_layers": cfg.n_layers,
    "num_attention_heads": cfg.n_heads,
    "num_key_value_heads": cfg.n_kv_heads,
    "head_dim": cfg.d_head,
    "max_position_embeddings": cfg.context_length,
    "rms_norm_eps": cfg.norm_epsilon,
    "tie_word_embeddings": cfg.tied_embedding,
    "attn_implementation": "eager",
  }


def _rope(theta: float, scaling: config_lib.RopeScaling | None) -> dict:
  if scaling is None:
    return {"rope_type": "default", "rope_theta": theta}
  common = {
    "rope_type": scaling.kind,
    "rope_theta": theta,
    "factor": scaling.factor,
    "original_max_position_embeddings": scaling.original_length,
  }
  return (
    common
    | {
      "llama3": {
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
      },
      "yarn": {
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
      },
      "longrope": {
        "short_factor": [*scaling.short_factors],
        "long_factor": [*scaling.long_factors],
      },
    }[scaling.kind]
  )


def llama3(cfg: config_lib.ModelConfig):
  return transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **_common(cfg),
      rope_parameters=_rope(cfg.rope_theta, cfg.rope_scaling),
    )
  )


def qwen2(cfg: config_lib.ModelConfig):
  return transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      **_common(cfg),
      rope_parameters=_rope(cfg.rope_theta, cfg.rope_scaling),
    )
  )


def starcoder2(cfg: config_lib.ModelConfig):
  return transformers.Starcoder2ForCausalLM(
    transformers.Starcoder2Config(
      **_common(cfg),
      norm_epsilon=cfg.norm_epsilon,
      sliding_window=cfg.windows[0],
      rope_parameters=_rope(cfg.rope_theta, cfg.rope_scaling),
    )
  )


def olmo3(cfg: config_lib.ModelConfig):
  return transformers.Olmo3ForCausalLM(
    transformers.Olmo3Config(
      **_common(cfg),
      rope_parameters={
        "full_attention": _rope(cfg.rope_theta, cfg.rope_scaling),
        "sliding_attention": _rope(cfg.rope_theta_windowed, None),
      },
      sliding_window=cfg.windows[0],
      layer_types=_layer_types(cfg),
    )
  )


def phi3(cfg: config_lib.ModelConfig):
  return transformers.Phi3ForCausalLM(
    transformers.Phi3Config(
      **_common(cfg),
      original_max_position_embeddings=cfg.rope_scaling.original_length,
      rope_parameters=_rope(cfg.rope_theta, cfg.rope_scaling)
      | {"partial_rotary_factor": cfg.rotary_fraction},
      sliding_window=cfg.windows[0],
    )
  )


def smollm3(cfg: config_lib.ModelConfig):
  period = len(cfg.rope_layers)
  return transformers.SmolLM3ForCausalLM(
    transformers.SmolLM3Config(
      **_common(cfg),
      no_rope_layers=[
        int(cfg.rope_layers[i % period]) for i in range(cfg.n_layers)
      ],
      rope_parameters=_rope(cfg.rope_theta, cfg.rope_scaling),
    )
  )


def qwen3(cfg: config_lib.ModelConfig):
  return transformers.Qwen3ForCausalLM(
    transformers.Qwen3Config(
      **_common(cfg),
      rope_parameters=_rope(cfg.rope_theta, cfg.rope_scaling),
    )
  )


def _layer_types(cfg: config_lib.ModelConfig) -> list[str]:
  windows = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.n_layers)]
  return [
    "full_attention" if w is None else "sliding_attention" for w in windows
  ]


def gemma2(cfg: config_lib.ModelConfig):
  return transformers.Gemma2ForCausalLM(
    transformers.Gemma2Config(
      **_common(cfg),
      rope_parameters=_rope(cfg.rope_theta, cfg.rope_scaling),
      query_pre_attn_scalar=cfg.query_scale_dim,
      attn_logit_softcapping=cfg.attention_softcap,
      final_logit_softcapping=cfg.logit_softcap,
      sliding_window=cfg.windows[0],
      layer_types=_layer_types(cfg),
    )
  )


def gemma3(cfg: config_lib.ModelConfig):
  return transformers.Gemma3ForCausalLM(
    transformers.Gemma3TextConfig(
      **_common(cfg),
      rope_parameters={
        "full_attention": _rope(cfg.rope_theta, cfg.rope_scaling),
        "sliding_attention": _rope(cfg.rope_theta_windowed, None),
      },
      query_pre_attn_scalar=cfg.query_scale_dim,
      sliding_window=cfg.windows[0],
      layer_types=_layer_types(cfg),
    )
  )


def bert(cfg: config_lib.ModelConfig):
  return transformers.BertForMaskedLM(
    transformers.BertConfig(
      **_common(cfg),
      hidden_act="gelu",
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      layer_norm_eps=cfg.norm_epsilon,
    )
  )


def modernbert(cfg: config_lib.ModelConfig):
  return transformers.ModernBertForMaskedLM(
    transformers.ModernBertConfig(
      **_common(cfg),
      norm_eps=cfg.norm_epsilon,
      layer_types=_layer_types(cfg),
      # They allow this distance; our windows count the query itself.
      local_attention=2 * (cfg.windows[1] - 1),
      rope_parameters={
        "full_attention": _rope(cfg.rope_theta, cfg.rope_scaling),
        "sliding_attention": _rope(cfg.rope_theta_windowed, None),
      },
    )
  )


SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


# --- our weights under their names -------------------------------------------


def gpt2_state(params: dict, cfg: config_lib.ModelConfig) -> dict:
  """GPT-2 keeps [in, out] matrices, and q, k and v in one."""
  D, L = cfg.d_model, params["layers"]
  state = {
    "transformer.wte.weight": params["embed"],
    "transformer.wpe.weight": params["position_embed"],
    "transformer.ln_f.weight": params["final_norm"]["scale"],
    "transformer.ln_f.bias": params["final_norm"]["bias"],
    "lm_head.weight": params["embed"],
  }
  for i in range(cfg.n_layers):
    a, m = (
      {k: v[i] for k, v in L[part].items()} for part in ("attention", "mlp")
    )
    qkv = [a[n].reshape(D, -1) for n in "qkv"]
    qkv_bias = [a[f"{n}_bias"].reshape(-1) for n in "qkv"]
    layer = {
      "ln_1.weight": L["attention_norm"]["scale"][i],
      "ln_1.bias": L["attention_norm"]["bias"][i],
      "ln_2.weight": L["mlp_norm"]["scale"][i],
      "ln_2.bias": L["mlp_norm"]["bias"][i],
      "attn.c_attn.weight": np.concatenate(qkv, axis=1),
      "attn.c_attn.bias": np.concatenate(qkv_bias),
      "attn.c_proj.weight": a["o"].reshape(-1, D),
      "attn.c_proj.bias": a["o_bias"],
      "mlp.c_fc.weight": m["up"],
      "mlp.c_fc.bias": m["up_bias"],
      "mlp.c_proj.weight": m["down"],
      "mlp.c_proj.bias": m["down_bias"],
    }
    state |= {f"transformer.h.{i}.{k}": v for k, v in layer.items()}
  return state


def llama_state(params: dict, cfg: config_lib.ModelConfig) -> dict:
  """Llama and its heirs keep [out, in] matrices, each projection its own."""
  D, L = cfg.d_model, params["layers"]
  tied = cfg.tied_embedding
  state = {
    "model.embed_tokens.weight": params["embed"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": params["embed"] if tied else params["head"].T,
  }
  # Gemma's post_attention_layernorm is what its name says; Llama's stands
  # before the MLP.
  norms = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
  }
  if cfg.norm_placement in ("post", "both"):
    norms = {
      "input_layernorm": "attention_norm",
      "post_attention_layernorm": "attention_post_norm",
      "pre_feedforward_layernorm": "mlp_norm",
      "post_feedforward_layernorm": "mlp_post_norm",
    }
  for i in range(cfg.n_layers):
    a, m = L["attention"], L["mlp"]
    layer = {k: L[v]["scale"][i] for k, v in norms.items() if v in L}
    for n in "qkv":
      layer[f"self_attn.{n}_proj"] = a[n][i].reshape(D, -1).T
    layer["self_attn.o_proj"] = a["o"][i].reshape(-1, D).T
    for n in ("q_norm", "k_norm") if cfg.qk_norm else ():
      layer[f"self_attn.{n}"] = a[n]["scale"][i].reshape(-1)
    for n in ("gate", "up", "down") if cfg.gated else ("up", "down"):
      layer[f"mlp.{n}_proj"] = m[n][i].T
    biases = {
      f"self_attn.{n}_proj": a[f"{n}_bias"][i].reshape(-1)
      for n in "qkvo"
      if f"{n}_bias" in a
    }
    state |= {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()}
    state |= {f"model.layers.{i}.{k}.bias": v for k, v in biases.items()}
  return state


def starcoder2_state(params: dict, cfg: config_lib.ModelConfig) -> dict:
  """Llama's names, but for the MLP; and biases everywhere."""
  state, L = llama_state(params, cfg), params["layers"]
  state["model.norm.bias"] = params["final_norm"]["bias"]
  for i in range(cfg.n_layers):
    layer = f"model.layers.{i}"
    for theirs, ours in (("c_fc", "up"), ("c_proj", "down")):
      weight = state.pop(f"{layer}.mlp.{ours}_proj.weight")
      state[f"{layer}.mlp.{theirs}.weight"] = weight
      state[f"{layer}.mlp.{theirs}.bias"] = L["mlp"][f"{ours}_bias"][i]
    for theirs, ours in (
      ("input_layernorm", "attention_norm"),
      ("post_attention_layernorm", "mlp_norm"),
    ):
      state[f"{layer}.{theirs}.bias"] = L[ours]["bias"][i]
  return state


def phi3_state(params: dict, cfg: config_lib.ModelConfig) -> dict:
  """Llama's, with q, k and v in one, and gate and up."""
  state = llama_state(params, cfg)
  for i in range(cfg.n_layers):
    for part, fused, names in (
      ("self_attn", "qkv_proj", "qkv"),
      ("mlp", "gate_up_proj", ("gate", "up")),
    ):
      layer = f"model.layers.{i}.{part}"
      whole = [state.pop(f"{layer}.{n}_proj.weight") for n in names]
      state[f"{layer}.{fused}.weight"] = np.concatenate(whole)
  return state


def bert_state(params: dict, cfg: config_lib.ModelConfig) -> dict:
  """Tokens have one of two types, of which the first adds 0."""
  D, L, head = cfg.d_model, params["layers"], params["head_transform"]

  def norm(name, p):
    return {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}

  embeddings = "bert.embeddings"
  state = {
    f"{embeddings}.word_embeddings.weight": params["embed"],
    f"{embeddings}.position_embeddings.weight": params["position_embed"],
    f"{embeddings}.token_type_embeddings.weight": np.zeros((2, D)),
    **norm(f"{embeddings}.LayerNorm", params["embedding_norm"]),
    "cls.predictions.transform.dense.weight": head["dense"].T,
    "cls.predictions.transform.dense.bias": head["dense_bias"],
    **norm("cls.predictions.transform.LayerNorm", head["norm"]),
    "cls.predictions.decoder.weight": params["embed"],
    "cls.predictions.decoder.bias": params["head_bias"],
    "cls.predictions.bias": params["head_bias"],
  }
  for i in range(cfg.n_layers):
    p = reference.map_tree(lambda _, x, i=i: x[i], L)
    a, m, layer = p["attention"], p["mlp"], f"bert.encoder.layer.{i}"
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
      name = f"{layer}.attention.self.{theirs}"
      state[f"{name}.weight"] = a[ours].reshape(D, -1).T
      state[f"{name}.bias"] = a[f"{ours}_bias"].reshape(-1)
    state |= {
      f"{layer}.attention.output.dense.weight": a["o"].reshape(-1, D).T,
      f"{layer}.attention.output.dense.bias": a["o_bias"],
      f"{layer}.intermediate.dense.weight": m["up"].T,
      f"{layer}.intermediate.dense.bias": m["up_bias"],
      f"{layer}.output.dense.weight": m["down"].T,
      f"{layer}.output.dense.bias": m["down_bias"],
      **norm(f"{layer}.attention.output.LayerNorm", p["attention_post_norm"]),
      **norm(f"{layer}.output.LayerNorm", p["mlp_post_norm"]),
    }
  return state


def modernbert_state(params: dict, cfg: config_lib.ModelConfig) -> dict:
  """q, k and v are in one, and gate and up; the first layer lacks a norm."""
  D, L, head = cfg.d_model, params["layers"], params["head_transform"]
  state = {
    "model.embeddings.tok_embeddings.weight": params["embed"],
    "model.embeddings.norm.weight": params["embedding_norm"]["scale"],
    "model.final_norm.weight": params["final_norm"]["scale"],
    "head.dense.weight": head["dense"].T,
    "head.norm.weight": head["norm"]["scale"],
    "decoder.weight": params["embed"],
    "decoder.bias": params["head_bias"],
  }
  for i in range(cfg.n_layers):
    p = reference.map_tree(lambda _, x, i=i: x[i], L)
    a, m, layer = p["attention"], p["mlp"], f"model.layers.{i}"
    if i > 0:
      state[f"{layer}.attn_norm.weight"] = p["attention_norm"]["scale"]
    qkv = [a[n].reshape(D, -1).T for n in "qkv"]
    state |= {
      f"{layer}.attn.Wqkv.weight": np.concatenate(qkv),
      f"{layer}.attn.Wo.weight": a["o"].reshape(-1, D).T,
      f"{layer}.mlp_norm.weight": p["mlp_norm"]["scale"],
      f"{layer}.mlp.Wi.weight": np.concatenate([m["gate"].T, m["up"].T]),
      f"{layer}.mlp.Wo.weight": m["down"].T,
    }
  return state


MODELS = {
  model.__name__: model
  for model in (
    gpt2, llama3, qwen3, gemma2, gemma3, qwen2, starcoder2, olmo3, phi3,
    smollm3, bert, modernbert
  )
}  # fmt: skip
STATES = {
  "gpt2": gpt2_state, "starcoder2": starcoder2_state, "phi3": phi3_state,
  "bert": bert_state, "modernbert": modernbert_state
}  # fmt: skip


def main() -> None:
  arrays = {}
  for seed, (name, cfg) in enumerate(families.PUBLISHED.items()):
    params = reference.random_params(cfg, seed)
    model = MODELS[name](cfg).eval()
    state = STATES.get(name, llama_state)(params, cfg)
    state = {
      k: torch.tensor(np.ascontiguousarray(v), dtype=torch.float64)
      for k, v in state.items()
    }
    model.load_state_dict(state, strict=True)
    inputs = np.random.default_rng(100 + seed).integers(
      cfg.vocab_size, size=(B, T), dtype=np.int32
    )
    with torch.no_grad():
      logits = model(torch.tensor(inputs, dtype=torch.int64)).logits
    assert logits.dtype == torch.float64
    arrays[f"{name}/inputs"] = inputs
    arrays[f"{name}/logits"] = logits.numpy()
    reference.map_tree(
      lambda path, x, name=name: arrays.__setitem__(
        "/".join((name, "params", *path)), x
      ),
      params,
    )
  np.savez_compressed(pathlib.Path(__file__).with_name("hf_tiny.npz"), **arrays)


if __name__ == "__main__":
  main()

"""A tiny model of every architecture that transformers calls a causal language model, and which of them are refused."""

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 270
WINDOW = 8  # of models that see only so many tokens back: shorter than the rows of the tests
# whatever a config calls its sizes; each takes those that it has
SIZES = dict.fromkeys(
    "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width attention_hidden_size".split(), 32
)
SIZES |= dict.fromkeys(
    "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim mlp_intermediate_size "
    "shared_intermediate_size intermediate_size_mlp".split(), 48,
)  # fmt: skip
SIZES |= dict.fromkeys("num_hidden_layers n_layer n_layers num_layers num_moe_layers".split(), 4)
SIZES |= dict.fromkeys(
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads".split(),
    4,
)  # fmt: skip
SIZES |= dict.fromkeys(
    "num_key_value_heads num_kv_heads num_global_key_value_heads linear_num_key_heads index_n_heads decoder_layers "
    "encoder_layers num_experts_per_tok moe_k".split(), 2,
)  # fmt: skip
SIZES |= dict.fromkeys("n_group topk_group n_shared_experts n_groups mamba_n_groups".split(), 1)
SIZES |= dict.fromkeys(
    "head_dim global_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim mamba_d_state mamba_ssm_state_size ssm_state_size state_size".split(), 8,
)  # fmt: skip
SIZES |= dict.fromkeys(
    "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim index_head_dim dim_model_base".split(), 16
)
SIZES |= dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 24)
SIZES |= dict.fromkeys("max_position_embeddings n_positions n_ctx".split(), 256)
SIZES |= dict(sliding_window=WINDOW, attention_window_size=WINDOW, index_topk=64, zero_expert_num=0)
SIZES |= dict(vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, initializer_range=0.1, init_std=0.1)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

WINDOWS = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
ZAMBA = dict(attention_hidden_size=64, attention_head_dim=16, layer_types=["mamba", "hybrid"] * 2)
# what some need besides, since their parts have to fit together
FURTHER = dict(
    bamba=dict(attn_layer_indices=[1]),
    falcon_h1=dict(mamba_d_ssm=64),
    gemma3n_text=WINDOWS,
    gemma4=WINDOWS,
    gemma4_text=WINDOWS,
    gemma4_unified=WINDOWS,
    gemma4_unified_text=WINDOWS,
    gpt_neo=dict(attention_types=[[["global", "local"], 2]], window_size=WINDOW),
    granitemoehybrid=dict(layer_types=["mamba", "attention"] * 2),
    jamba=dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    lfm2_moe=dict(layer_types=["conv", "full_attention"] * 2),
    mamba2=dict(num_heads=4, head_dim=16),
    zamba=ZAMBA,
    zamba2=ZAMBA | dict(hybrid_layer_ids=[1, 3]),
    zaya=dict(num_experts_per_tok=1),
)  # fmt: skip

HEAD = "are not those of one linear head"
NO_POSITIONS = "is another model where its past is cached"
NO_CACHE = "cannot be sampled from with torch"
NOT_CAUSAL = "is it causal?"
NO_DECODER = "has no decoder under the name"
# refused, with words of the line that says so
REFUSED = dict.fromkeys(
    "bert big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder prophetnet roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl inkling_text".split(), HEAD,
)  # fmt: skip
REFUSED |= dict.fromkeys(
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart moshi mvp pegasus plbart trocr".split(),
    NO_POSITIONS,
)
REFUSED |= dict.fromkeys(
    "falcon_mamba mamba mamba2 minimax openai-gpt recurrent_gemma rwkv xlm".split(), NO_CACHE
)
REFUSED |= dict.fromkeys(["bert-generation", "cpmant", "xlnet"], NOT_CAUSAL)
REFUSED |= dict.fromkeys(["llama4", "llama4_text", "mllama"], NO_DECODER)
REFUSED |= {"deepseek_v4": "--sampler vllm"}  # raises, or computes otherwise: by which rows end first
REFUSED |= {"rembert": "cannot be trained here", "xmod": "is not a causal language model of the usual make"}

# not tried, and why
NOT_TRIED = dict.fromkeys("blt git got_ocr2 musicgen musicgen_melody phi4_multimodal".split(), "images, sound or bytes")
NOT_TRIED |= dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], "drafts for another model")
NOT_TRIED |= {"gemma3n": "needs a library for images; its text model is tried"}
NOT_TRIED |= dict.fromkeys(
    "cohere_compass_text dbrx kimi_linear longcat_flash qwen4_exp qwen4_exp_text reformer xlstm".split(),
    "no tiny config was found that the library itself computes",
)
KINDS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_TRIED))


def tiny_config(kind: str):
    """A config of this `model_type`; of one with several parts, the text's is small."""
    config_class, config = CONFIG_MAPPING[kind], CONFIG_MAPPING[kind]()
    text_class = type(config.get_text_config())
    if text_class is config_class:
        return config_class(**sizes_of(config_class, kind))
    return config_class(text_config=text_class(**sizes_of(text_class, kind)).to_dict())


def sizes_of(config_class, kind: str) -> dict:
    default, other_names = config_class(), getattr(config_class, "attribute_map", {})

    def has(name: str) -> bool:
        try:
            return hasattr(default, name) and not isinstance(getattr(config_class, name, None), property)
        except RuntimeError:  # it differs by layer
            return True

    sizes = {name: size for name, size in SIZES.items() if has(name) or name in other_names}
    sizes = {name: size for name, size in sizes.items() if other_names.get(name) not in sizes}
    if "qk_rope_head_dim" in sizes:  # latent attention: each head has keys of its own
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if getattr(default, "first_k_dense_replace", None):
        sizes["first_k_dense_replace"] = 1
    return sizes | FURTHER.get(kind, {})


def tiny_model(kind: str):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(kind)).eval()

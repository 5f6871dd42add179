"""Checkpoints of Hugging Face architectures replay to the model's own outputs, whatever the library
renames on saving."""

import pytest
import torch
import transformers

from thermo_opt.runs import install, load_run, predict
from thermo_opt.runs.readers.architecture import model_from_config

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = TEXT | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "num_labels": 3,
}
STAGES = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3}

ARCHITECTURES = {
    **dict.fromkeys(
        [
            "GPT2LMHeadModel",
            "GPTNeoXForCausalLM",
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "PhiForCausalLM",
            "Phi3ForCausalLM",
            "OPTForCausalLM",
            "BloomForCausalLM",
            "FalconForCausalLM",
            "StableLmForCausalLM",
            "OlmoForCausalLM",
            "Olmo2ForCausalLM",
            "CohereForCausalLM",
            "Starcoder2ForCausalLM",
            "MptForCausalLM",
            "XGLMForCausalLM",
            "GraniteForCausalLM",
            "BertForMaskedLM",
            "BertForSequenceClassification",
            "RobertaForSequenceClassification",
            "DistilBertForSequenceClassification",
            "AlbertForMaskedLM",
            "ElectraForSequenceClassification",
            "DebertaV2ForSequenceClassification",
            "XLMRobertaForTokenClassification",
            "MPNetForMaskedLM",
            "ModernBertForMaskedLM",
        ],
        TEXT,
    ),
    **dict.fromkeys(
        [
            "MixtralForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
            "OlmoeForCausalLM",
            "GraniteMoeForCausalLM",
            "PhimoeForCausalLM",
            "JetMoeForCausalLM",
        ],
        EXPERTS,
    ),
    **dict.fromkeys(
        [
            "ViTForImageClassification",
            "DeiTForImageClassification",
            "BeitForImageClassification",
            "Dinov2ForImageClassification",
            "Dinov2WithRegistersForImageClassification",
            "ViTMSNForImageClassification",
            "IJepaForImageClassification",
        ],
        IMAGE,
    ),
    "SwinForImageClassification": WINDOWS,
    "Swinv2ForImageClassification": WINDOWS,
    "ConvNextForImageClassification": STAGES | {"num_stages": 2},
    "ResNetForImageClassification": STAGES | {"embedding_size": 8},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_architecture_replays_to_its_own_outputs(tmp_path, name):
    kind = getattr(transformers, name, None)
    assert kind is not None, f"the installed transformers has no {name}"
    torch.manual_seed(0)
    model = kind(kind.config_class(**ARCHITECTURES[name])).eval()
    inputs = (
        {"pixel_values": torch.randn(2, 3, 32, 32)}
        if "Image" in name
        else {"input_ids": torch.randint(3, 48, (3, 8))}
    )
    model.save_pretrained(tmp_path / "checkpoint-1")
    run = load_run(tmp_path)
    (snapshot,) = run.snapshots
    assert set(snapshot.load_group("params")) == {name for name, _ in model.named_parameters()}
    replayed = model_from_config(run.info.hf_config_path)
    install(replayed, snapshot, run.info.tied)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(predict(replayed, inputs), expected, atol=1e-6)
    assert run.info.likelihood == "categorical"

"""NGD-T on many architectures: four steps lower the loss, and what they cost is measured."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

import thermo_opt as to

TOKENS = (torch.arange(6)[:, None] * 3 + torch.arange(8)) % 11
IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(12, 7, 5, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(12) % 3

TEXT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


def language(name, config, model=None):
    """A language model of transformers from a small configuration."""

    def make():
        kind = getattr(hf, model or f"{name}ForCausalLM")
        return kind(getattr(hf, f"{name}Config")(**config))

    return make, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.bag(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.head = nn.Bilinear(5, 5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.both(x[:, 0], x[:, 1]))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and across."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 2, stride=2)
        self.up, self.last = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a = self.first(x).relu()
        out = self.last(torch.cat([a, self.up(self.down(a).relu())], 1))
        return out.mean((2, 3))


class Places(nn.Module):
    """Classes of each pixel, along axis 1 or the last."""

    def __init__(self, last):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1))
        self.last = last

    def forward(self, x):
        return self.layers(x).movedim(1, -1) if self.last else self.layers(x)


PIXELS = IMAGES.argmax(1)


class Transducer(nn.Module):
    """RNN-T: of every time and every label so far, what comes next (N, T, U, C)."""

    def __init__(self):
        super().__init__()
        self.sound, self.words = nn.GRU(5, 6, batch_first=True), nn.Embedding(4, 6)
        self.joint = nn.Linear(6, 4)

    def forward(self, x, y):
        return self.joint((self.sound(x)[0][:, :, None] + self.words(y)[:, None]).tanh())


LABELS = 1 + (torch.arange(12)[:, None] + torch.arange(2)) % 3


def transduced(m):
    """−log of the sum over all alignments."""
    log_p = m(SERIES, F.pad(LABELS, (1, 0))).log_softmax(-1)
    steps = log_p.shape[1]
    alpha = [torch.zeros(len(log_p))]
    for u in range(1, 3):
        alpha.append(alpha[-1] + log_p[:, 0, u - 1].gather(1, LABELS[:, u - 1 : u])[:, 0])
    for t in range(1, steps):
        alpha = [a + log_p[:, t - 1, u, 0] for u, a in enumerate(alpha)]
        for u in range(1, 3):
            word = log_p[:, t, u - 1].gather(1, LABELS[:, u - 1 : u])[:, 0]
            alpha[u] = torch.logaddexp(alpha[u], alpha[u - 1] + word)
    return -(alpha[-1] + log_p[:, -1, -1, 0]).mean()


def conv(*layers):
    return lambda: nn.Sequential(*(make() for make in layers), nn.Flatten(), nn.LazyLinear(3))


def classify(make, x):
    def made():
        model = make()
        with torch.no_grad():
            model(x)  # lazy layers learn their sizes
        return model

    return made, lambda m: F.cross_entropy(m(x), CLASSES[: len(x)])


def lora():
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    )
    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


C, R = nn.Conv2d, nn.ReLU
MODELS = {
    "MLP": classify(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(35, 8), R(), nn.Linear(8, 3)), SERIES
    ),
    "CNN": classify(conv(lambda: C(3, 6, 3), R), IMAGES),
    "CNN, BatchNorm": classify(conv(lambda: C(3, 6, 3), lambda: nn.BatchNorm2d(6), R), IMAGES),
    "CNN, GroupNorm": classify(conv(lambda: C(3, 6, 3), lambda: nn.GroupNorm(2, 6), R), IMAGES),
    "CNN, depthwise": classify(conv(lambda: C(3, 3, 3, groups=3), lambda: C(3, 6, 1), R), IMAGES),
    "CNN, one dimension": classify(conv(lambda: nn.Conv1d(7, 6, 3), R), SERIES),
    "U-Net": classify(UNet, IMAGES),
    "segmentation, classes on axis 1": (
        lambda: Places(False),
        lambda m: F.cross_entropy(m(IMAGES), PIXELS),
    ),
    "segmentation, classes last": (
        lambda: Places(True),
        lambda m: F.cross_entropy(m(IMAGES).flatten(0, 2), PIXELS.flatten()),
    ),
    "RNN transducer": (Transducer, transduced),
    "LSTM": classify(lambda: Recurrent(nn.LSTM), SERIES),
    "GRU": classify(lambda: Recurrent(nn.GRU), SERIES),
    "Transformer encoder": classify(Attention, SERIES),
    "EmbeddingBag": classify(Bags, TOKENS),
    "Bilinear": classify(Pair, SERIES),
    "GPT-2": language(
        "GPT2",
        {"vocab_size": 11, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2},
        "GPT2LMHeadModel",
    ),
    "GPT-2, LoRA": (lora, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss),
    "LLaMA": language("Llama", GROUPED),
    "Mistral": language("Mistral", GROUPED),
    "Qwen 2": language("Qwen2", GROUPED),
    "Qwen 3": language("Qwen3", GROUPED),
    "Gemma": language("Gemma", GROUPED),
    "Phi": language("Phi", TEXT),
    "GPT-NeoX": language("GPTNeoX", TEXT),
    "OPT": language(
        "OPT",
        {
            "vocab_size": 11,
            "hidden_size": 8,
            "ffn_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 8,
            "pad_token_id": 0,
        },
    ),
    "Bloom": language("Bloom", {"vocab_size": 11, "hidden_size": 8, "n_layer": 1, "n_head": 2}),
    "Mixtral": language("Mixtral", GROUPED | EXPERTS),
    "Mamba": language(
        "Mamba",
        {
            "vocab_size": 11,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "state_size": 4,
            "pad_token_id": 0,
        },
    ),
    "BERT": language("Bert", TEXT, "BertForMaskedLM"),
    "RoBERTa": language("Roberta", TEXT, "RobertaForMaskedLM"),
    "DistilBERT": language(
        "DistilBert",
        {
            "vocab_size": 11,
            "dim": 8,
            "hidden_dim": 16,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": 16,
        },
        "DistilBertForMaskedLM",
    ),
    "ALBERT": language(
        "Albert", {**TEXT, "embedding_size": 8, "num_hidden_layers": 2}, "AlbertForMaskedLM"
    ),
    "T5": language(
        "T5",
        {
            "vocab_size": 11,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "T5ForConditionalGeneration",
    ),
    "BART": language(
        "Bart",
        {
            "vocab_size": 11,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
        "BartForConditionalGeneration",
    ),
    "ViT": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=8,
                patch_size=4,
                num_labels=3,
            )
        ),
        lambda m: m(pixel_values=IMAGES, labels=CLASSES).loss,
    ),
    "ResNet": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(
                embedding_size=4,
                hidden_sizes=[4, 8],
                depths=[1, 1],
                num_labels=3,
                layer_type="basic",
            )
        ),
        lambda m: m(pixel_values=IMAGES, labels=CLASSES).loss,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_four_steps_lower_the_loss_of(name):
    make, loss = MODELS[name]
    torch.manual_seed(0)
    model = make()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = loss(model).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # layers without a rule are named
        optimizer = to.NGDT(model)
        for _ in range(4):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    assert loss(model).item() < before
    assert 0 < optimizer.last_step["realised"] < 2 * 0.03

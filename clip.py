"""CLIP: the tokenizer, the text tower that conditions Stable Diffusion, and the vision tower that evaluates it.

A prompt becomes 77 token ids, and these become the context: one vector of width d per token, read by every
cross-attention layer of the U-Net. Module attribute names are the keys of the official checkpoints, so
`text_encoder/model.safetensors` of Stable Diffusion and `openai/clip-vit-*` load without any renaming.

Shapes: B prompts or images, T tokens, d width of a tower, p width of the shared projection, S image side.
Source: Radford et al. 2021 (arXiv 2103.00020); built on torch and tokenizers.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor, nn

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# CLIP splits a prompt into English contractions, runs of letters, single digits, and runs of anything else.
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""

# Mean and standard deviation of the images CLIP was trained on, per RGB channel in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class Tokenizer:
    """Byte-level BPE of CLIP: prompts to ids, from the official `vocab.json` and `merges.txt`, or `tokenizer.json`."""

    def __init__(self, vocab: str | Path, merges: str | Path | None = None):
        """Read the two files, or the one of transformers 5, which holds the same in other words.

        ValueError, KeyError or TypeError when they are no CLIP vocabulary, OSError when they cannot be read.
        """
        table = json.loads(Path(vocab).read_text(encoding="utf-8"))
        if merges is None:
            merges, table, lines = vocab, table["model"]["vocab"], table["model"]["merges"]
            pairs = [tuple(line.split() if isinstance(line, str) else line) for line in lines]
        else:
            lines = Path(merges).read_text(encoding="utf-8").splitlines()
            pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if not isinstance(table, dict) or BOS not in table or EOS not in table:
            raise ValueError(f"{vocab}: not a CLIP vocabulary (no {BOS} or {EOS} in it)")
        if unknown := [pair for pair in pairs if "".join(pair) not in table]:  # the library panics at some of these
            raise ValueError(f"{merges}: it merges {unknown[0]} into a word that {vocab} does not have")
        bpe = models.BPE(table, pairs, unk_token=EOS, end_of_word_suffix="</w>")
        self.bpe = tokenizers.Tokenizer(bpe)
        space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        self.bpe.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
        words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        self.bpe.add_special_tokens([BOS, EOS])
        self.bos, self.eos = table[BOS], table[EOS]

    def encode(self, text: str) -> tokenizers.Encoding:
        """Ids and their places in a text; ValueError if it holds half a surrogate pair, which no UTF-8 can."""
        try:
            return self.bpe.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise ValueError(f"this prompt is not Unicode text: {text[:80]!r}") from error

    def ids(self, text: str) -> list[int]:
        """Ids of a text alone: no BOS, no EOS, no padding, no limit. ValueError as for `encode`."""
        return self.encode(text).ids

    def tokens(self, text: str) -> list[str]:
        """What each token of a text stands for, in its letters (one may take several). ValueError as for `encode`."""
        return [text[start:end] for start, end in self.encode(text).offsets]

    def __call__(self, prompts: Sequence[str], length: int = 77) -> Tensor:
        """Ids [B, length]: BOS, prompt, EOS up to the end; what is longer is cut, with a warning. Errors: `encode`."""
        rows, room = [], length - 2
        for prompt in prompts:
            encoding = self.encode(prompt)
            ids = encoding.ids[:room]
            if len(encoding) > room:
                cut = prompt[encoding.offsets[room][0] :][:500]
                warnings.warn(f"prompt cut at {room} tokens; what the model will not read: {cut!r}", stacklevel=2)
            rows.append([self.bos, *ids] + [self.eos] * (length - 1 - len(ids)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


class Attention(nn.Module):
    """Multi-head self-attention, x [B, T, d] -> [B, T, d]; causal in the text tower."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        # softmax(q k^T / sqrt(d / heads)) v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation x sigmoid(1.702 x), of any shape: an approximation of GELU (arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two linear layers around CLIP's quick GELU, x [B, T, d] -> [B, T, d]."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class Layer(nn.Module):
    """Attention mixes tokens, then the MLP changes each; both add to x [B, T, d] -> [B, T, d]."""

    def __init__(self, config: dict, causal: bool):
        super().__init__()
        width = config["hidden_size"]
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, config["num_attention_heads"], causal)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, config["intermediate_size"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of layers, x [B, T, d] -> [B, T, d]; no norm at the end: there the towers differ."""

    def __init__(self, config: dict, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config["num_hidden_layers"]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding table that starts at CLIP's scale, 0.02, instead of torch's 1."""
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


class TextEmbeddings(nn.Module):
    """What a token is plus where it stands, ids [B, T] -> [B, T, d], T <= 77."""

    def __init__(self, config: dict):
        super().__init__()
        self.token_embedding = embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = embedding(config.get("max_position_embeddings", 77), config["hidden_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextTransformer(nn.Module):
    """The causal text tower, ids [B, T] -> [B, T, d] after the final LayerNorm."""

    def __init__(self, config: dict):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config["hidden_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


class TextEncoder(nn.Module):
    """Stable Diffusion's `text_encoder`, from its config.json: tokens [B, T] -> context E [B, T, d]."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.text_model(tokens)


class VisionEmbeddings(nn.Module):
    """The class token, then patches row by row, with their positions: [B, 3, S, S] -> [B, 1 + (S/patch)^2, d]."""

    def __init__(self, config: dict):
        super().__init__()
        width, size, patch = config["hidden_size"], config["image_size"], config["patch_size"]
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(config.get("num_channels", 3), width, patch, stride=patch, bias=False)
        self.position_embedding = embedding((size // patch) ** 2 + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """The vision tower, images [B, 3, S, S] -> [B, d]: the class token after the last layer, normalised."""

    def __init__(self, config: dict):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config["hidden_size"])  # spelt so in the checkpoints
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config["hidden_size"])

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Both towers and their projections into one space, from the config.json of an `openai/clip-vit-*` folder."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        text, vision, width = config["text_config"], config["vision_config"], config["projection_dim"]
        self.text_model = TextTransformer(text)
        self.vision_model = VisionTransformer(vision)
        self.text_projection = nn.Linear(text["hidden_size"], width, bias=False)
        self.visual_projection = nn.Linear(vision["hidden_size"], width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.get("logit_scale_init_value", 2.6592))))

    @property
    def image_size(self) -> int:
        """Side S of the images that `encode_image` takes, in pixels."""
        return self.config["vision_config"]["image_size"]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features [B, p] of tokens [B, T], read at the first EOS (the highest id of the vocabulary)."""
        last = self.text_model(tokens)
        eos = tokens.argmax(dim=-1)
        return self.text_projection(last[torch.arange(len(tokens), device=tokens.device), eos])

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [B, p] of images [B, 3, S, S] that `preprocess` prepared."""
        return self.visual_projection(self.vision_model(images))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits [B images, B prompts]: the scaled cosine of every pair."""
        image = F.normalize(self.encode_image(images), dim=-1)
        text = F.normalize(self.encode_text(tokens), dim=-1)
        return self.logit_scale.exp() * image @ text.T


def preprocess(images: Tensor, size: int) -> Tensor:
    """What CLIP wants to see: images [B, 3, H, W] in [-1, 1] -> [B, 3, size, size], resized and normalised."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean = images.new_tensor(IMAGE_MEAN).view(3, 1, 1)
    std = images.new_tensor(IMAGE_STD).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std

"""Models of other packages and kinds, small and random: what of each moves, and that its function stays.

Each is measured against its row in symmetry_models.csv beside this file; a run writes the rows of what it measured.
A model whose package is missing is skipped.
"""

import csv
import gc
import importlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proofs import measure, randomise, write

TABLE = Path(__file__).with_name("symmetry_models.csv")
LIMIT = 100  # seconds of the processor: a model that takes longer hangs
Entry = tuple[Callable[[], nn.Module], Any]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images(size: int, *frames: int) -> Tensor:
    return drawn(2, 3, *frames, size, size)


def tokens(length: int = 7, words: int = 32) -> Tensor:
    return torch.randint(2, words, (2, length), generator=torch.Generator().manual_seed(1))


# timm: by the name of a model, or of a class where the package holds its sizes fixed; the image's size, options


def of_timm(name: str, size: int, **options: Any) -> Entry:
    def build() -> nn.Module:
        part, _, kind = name.rpartition(".")
        module = importlib.import_module(f"timm.models.{part}") if part else importlib.import_module("timm")
        given = {key: getattr(module, value) if isinstance(value, str) else value for key, value in options.items()}
        made = getattr(module, kind) if part else partial(module.create_model, name)
        return made(num_classes=10, **given)

    return build, images(size)


VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 4}
WIDE_HEADS = VIT | {"num_heads": 2}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24}
WINDOWS = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 4, 4)}
SHORT = {"layers": (1, 1, 1, 1)}
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "test_efficientnet_gn": (32, {}),
    "test_mambaout": (32, {}),
    "test_nfnet": (32, {}),
    "test_vit": (32, {"img_size": 32}),
    "test_vit_relpos": (32, {"img_size": 32}),
    "test_coatnet": (64, {"img_size": 64}),
    "test_maxvit": (64, {"img_size": 64}),
    "resnetv2_50d_gn": (32, SHORT),
    "mlp_mixer.MlpMixer": (32, MIXER),
    "mlp_mixer.MlpMixer, gated": (
        32,
        MIXER | {"block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp", "mlp_ratio": 4},
    ),
    "mlp_mixer.MlpMixer, residual": (32, MIXER | {"block_layer": "ResBlock", "mlp_ratio": 4}),
    "sequencer2d_s": (32, SHORT),
    "mobilevitv2_050": (64, {}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "efficientvit_b0": (64, {}),
    "fastvit_t8": (64, {}),
    "levit_128s": (64, {"img_size": 64}),
    "pvt_v2_b2_li": (64, {"depths": (1, 1, 1, 1)}),
    "swinv2_tiny_window8_256": (64, WINDOWS),
    "focalnet.FocalNet": (64, {"depths": (1, 1, 2, 1), "embed_dim": 24}),
    "poolformerv2_s12": (64, {}),
    "ghostnet_050": (64, {}),
    "res2net50_26w_4s": (64, SHORT),
    "resnest14d": (64, {}),
    "skresnet18": (64, {}),
    "hrnet_w18_small": (64, {}),
    "dpn48b": (64, {}),
    "ese_vovnet19b_slim": (64, {}),
    "crossvit_tiny_240": (240, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 2}),
    "beit_base_patch16_224": (32, VIT),
    "deit_tiny_distilled_patch16_224": (32, VIT),
    "cait_xxs24_224": (32, VIT),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "edgenext_xx_small": (64, {}),
    "repvgg_a0": (64, {}),
    "convit_tiny": (32, VIT | {"local_up_to_layer": 1}),
    "eva02_tiny_patch14_224": (28, WIDE_HEADS | {"img_size": 28}),
    "vit_small_patch16_rope_mixed_224": (32, WIDE_HEADS),
    "vit_small_patch14_reg4_dinov2": (28, VIT | {"img_size": 28}),
    "samvit_base_patch16_224": (32, VIT | {"global_attn_indexes": (1,), "window_size": 2}),
    "lambda_resnet26t": (64, {}),
}


# transformers: by the name of a model; its configuration, options, example


class First(nn.Module):
    """A model's first output: many give their hidden states besides, which would then be held fast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        return self.model(*args, **named)[0]


def of_transformers(name: str, config: str, options: dict[str, Any], example: Any) -> Entry:
    def build() -> nn.Module:
        package = importlib.import_module("transformers")
        return First(getattr(package, name)(getattr(package, config)(**options)))

    return build, example


ENDS = {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WORDS = {"vocab_size": 32, "max_position_embeddings": 20}
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = WORDS | LAYERS | {"num_labels": 4}
LLM = WORDS | LAYERS | ENDS
GROUPED = LLM | {"num_key_value_heads": 2, "head_dim": 4}
WINDOW = GROUPED | {"sliding_window": 4}
EXPERTS = GROUPED | {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
SHARED = EXPERTS | {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 12}
LATENT = LLM | {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16} | ENDS
SCAN = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2} | ENDS
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
T5 |= {"use_cache": False, "decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4} | WORDS | ENDS
SPEECH = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "classifier_proj_size": 12}
WAVES = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
WAVES |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12}
SIGHT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIGHT |= {"image_size": 32, "patch_size": 8, "num_labels": 10}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24]}
PAIR = {"input_ids": tokens(), "decoder_input_ids": tokens(5)}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, tokens()),
    "MistralForCausalLM": ("MistralConfig", WINDOW, tokens()),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED, tokens()),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", WINDOW, tokens()),
    "CohereForCausalLM": ("CohereConfig", GROUPED, tokens()),
    "GPTJForCausalLM": ("GPTJConfig", GPT | {"n_head": 2, "rotary_dim": 4}, tokens()),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", LLM, tokens()),
    "GPT2LMHeadModel": ("GPT2Config", GPT, tokens()),
    "FalconForCausalLM": ("FalconConfig", LLM, tokens()),
    "BloomForCausalLM": ("BloomConfig", GPT | {"hidden_size": 16}, tokens()),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED, tokens()),
    "GlmForCausalLM": ("GlmConfig", GROUPED, tokens()),
    "MixtralForCausalLM": ("MixtralConfig", EXPERTS, tokens()),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", SHARED, tokens()),
    "GptOssForCausalLM": ("GptOssConfig", EXPERTS | {"sliding_window": 4}, tokens()),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", LATENT, tokens()),
    "MambaForCausalLM": ("MambaConfig", SCAN | {"time_step_rank": 4}, tokens()),
    "Mamba2ForCausalLM": (
        "Mamba2Config", SCAN | {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}, tokens(),
    ),
    "RecurrentGemmaForCausalLM": (
        "RecurrentGemmaConfig", LLM | {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8}, tokens(),
    ),
    "RwkvForCausalLM": (
        "RwkvConfig", LLM | {"attention_hidden_size": 16, "context_length": 16, "rescale_every": 0}, tokens(5),
    ),
    "BertForSequenceClassification": ("BertConfig", TEXT, tokens()),
    "RobertaForSequenceClassification": ("RobertaConfig", TEXT, tokens()),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig", WORDS | {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}, tokens(),
    ),
    "AlbertForSequenceClassification": ("AlbertConfig", TEXT | {"embedding_size": 8}, tokens()),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, tokens(),
    ),
    "XLNetForSequenceClassification": (
        "XLNetConfig", {"vocab_size": 32, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}, tokens(),
    ),
    "RoFormerForSequenceClassification": ("RoFormerConfig", TEXT | {"embedding_size": 16}, tokens()),
    "T5ForConditionalGeneration": ("T5Config", T5, PAIR),
    "BartForConditionalGeneration": ("BartConfig", BART, PAIR),
    "ViTForImageClassification": ("ViTConfig", SIGHT, images(32)),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", SIGHT, images(32)),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", SIGHT | {"projection_dim": 8}, images(32)),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig", STAGES | {"num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}, images(64),
    ),
    "Swin2SRForImageSuperResolution": (
        "Swin2SRConfig",
        {"image_size": 16, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4},
        images(16),
    ),
    "BitForImageClassification": ("BitConfig", STAGES | {"embedding_size": 8, "num_groups": 4}, images(64)),
    "WhisperForAudioClassification": ("WhisperConfig", BART | SPEECH, drawn(2, 8, 32)),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", LAYERS | WAVES, drawn(2, 400)),
    "VideoMAEForVideoClassification": ("VideoMAEConfig", SIGHT | {"num_frames": 4}, drawn(2, 4, 3, 32, 32)),
}  # fmt: skip


# torchvision's detection, segmentation and video, and segmentation-models-pytorch


class Heads(nn.Module):
    """A detector of one stage without what picks boxes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model.head(list(self.model.backbone(x).values()))


def detector(name: str) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return Heads(getattr(detection, name)(body, 4))


def deeplab() -> nn.Module:
    from torchvision.models import resnet, segmentation
    from torchvision.models._utils import IntermediateLayerGetter

    dilated = [False, True, True]
    body = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=dilated)
    return segmentation.DeepLabV3(
        IntermediateLayerGetter(body, {"layer4": "out"}), segmentation.deeplabv3.DeepLabHead(2048, 4)
    )


def mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 12, 24, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 24, 24, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return MViT((32, 32), 4, blocks, True, False, True, True, dropout=0.0, num_classes=4)


def swin3d() -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 12, [2, 1], [2, 4], [2, 4, 4], num_classes=4)


def of_torchvision(part: str, name: str) -> nn.Module:
    backbone = {} if part == "video" else {"weights_backbone": None}
    made = getattr(importlib.import_module(f"torchvision.models.{part}"), name)
    return made(weights=None, num_classes=4, **backbone)


def of_segmentation(name: str) -> nn.Module:
    package = importlib.import_module("segmentation_models_pytorch")
    return getattr(package, name)("resnet18", encoder_weights=None, classes=4)


TORCHVISION: dict[str, Entry] = {
    "RetinaNet": (partial(detector, "RetinaNet"), images(64)),
    "ssdlite320_mobilenet_v3_large": (
        lambda: Heads(of_torchvision("detection", "ssdlite320_mobilenet_v3_large")), images(64),
    ),
    "DeepLabV3": (deeplab, images(64)),
    "lraspp_mobilenet_v3_large": (partial(of_torchvision, "segmentation", "lraspp_mobilenet_v3_large"), images(64)),
    "r3d_18": (partial(of_torchvision, "video", "r3d_18"), images(16, 4)),
    "s3d": (partial(of_torchvision, "video", "s3d"), images(224, 16)),
    "mvit": (mvit, images(32, 4)),
    "swin3d": (swin3d, images(32, 4)),
}  # fmt: skip
SEGMENTATION = ("Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus", "Segformer")


# torch itself: recurrent networks, reparametrised weights, the blocks of diffusion and super resolution


class Reader(nn.Module):
    """A recurrent network over sequences (N, 6, 5), the mean of its states read out."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0].mean(1))


class Stepped(nn.Module):
    """A cell, step by step, its last state read out."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Block(nn.Module):
    """A residual block with group norm, scaled and shifted by a time embedding."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.time = nn.Linear(32, 2 * outer)
        self.norm, self.second = nn.GroupNorm(4, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[..., None, None].chunk(2, 1)
        return self.skip(x) + self.second(nn.functional.silu(self.norm(self.first(x)) * (1 + scale) + shift))


class Diffusion(nn.Module):
    """A small diffusion network: blocks, attention over positions, a skip across both resolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.time = nn.Conv2d(3, width, 3, padding=1), nn.Sequential(nn.Linear(8, 32), nn.SiLU())
        self.first, self.down = Block(width, width), nn.Conv2d(width, width, 3, 2, 1)
        self.second, self.norm = Block(width, 2 * width), nn.GroupNorm(4, 2 * width)
        self.qkv, self.project = nn.Conv1d(2 * width, 6 * width, 1), nn.Conv1d(2 * width, 2 * width, 1)
        self.up, self.last = nn.Conv2d(2 * width, width, 3, padding=1), Block(2 * width, width)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.first(self.enter(x), time)
        h = self.second(self.down(skip), time)
        q, k, v = self.qkv(self.norm(h).flatten(2)).unflatten(1, (4, -1)).chunk(3, 2)
        attended = (q.mT @ k / q.shape[2] ** 0.5).softmax(-1) @ v.mT
        h = h + self.project(attended.mT.flatten(1, 2)).view_as(h)
        h = self.up(nn.functional.interpolate(h, scale_factor=2.0))
        return self.leave(self.last(torch.cat([h, skip], 1), time))


class Larger(nn.Module):
    """Super resolution, beside a bicubic one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
            nn.PixelShuffle(2), nn.PReLU(8), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + nn.functional.interpolate(x, scale_factor=2.0, mode="bicubic")


def reparametrised(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)), nn.LeakyReLU(), norm(nn.Conv2d(8, 12, 3, groups=4)), nn.LeakyReLU(),
        norm(nn.ConvTranspose2d(12, 8, 2, 2)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(8 * 8 * 8, 10)), nn.ReLU(),
        nn.Linear(10, 3),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))


FIRST = {"batch_first": True}
TORCH: dict[str, Entry] = {
    "LSTM": (lambda: Reader(nn.LSTM(5, 8, **FIRST), 8), drawn(2, 6, 5)),
    "LSTM, both directions": (lambda: Reader(nn.LSTM(5, 8, 2, bidirectional=True, **FIRST), 16), drawn(2, 4, 5)),
    "LSTM, projected": (lambda: Reader(nn.LSTM(5, 8, 2, proj_size=6, **FIRST), 6), drawn(2, 4, 5)),
    "GRU, both directions": (lambda: Reader(nn.GRU(5, 8, 2, bidirectional=True, **FIRST), 16), drawn(2, 4, 5)),
    "RNN": (lambda: Reader(nn.RNN(5, 8, 2, **FIRST), 8), drawn(2, 6, 5)),
    "LSTMCell": (lambda: Stepped(nn.LSTMCell(5, 8)), drawn(2, 4, 5)),
    "GRUCell": (lambda: Stepped(nn.GRUCell(5, 8)), drawn(2, 4, 5)),
    "TransformerEncoder": (encoder, drawn(2, 6, 5)),
    "weight_norm": (partial(reparametrised, nn.utils.parametrizations.weight_norm), images(8)),
    "spectral_norm": (partial(reparametrised, nn.utils.parametrizations.spectral_norm), images(8)),
    "diffusion": (Diffusion, (images(16), torch.tensor([3.0, 40.0]))),
    "super resolution": (Larger, images(8)),
}

MODELS: dict[tuple[str, str], Entry] = {
    **{("timm", name): of_timm(name.partition(",")[0], size, **options) for name, (size, options) in TIMM.items()},
    **{("transformers", name): of_transformers(name, *entry) for name, entry in TRANSFORMERS.items()},
    **{("torchvision", name): entry for name, entry in TORCHVISION.items()},
    **{("segmentation_models_pytorch", name): (partial(of_segmentation, name), images(64)) for name in SEGMENTATION},
    **{("torch", name): entry for name, entry in TORCH.items()},
}


def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """Those of the table, by package and model."""
    with TABLE.open(newline="") as file:
        return {(row["package"], row["model"]): row for row in csv.DictReader(file)}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("key", MODELS, ids=" ".join)
def test_a_model_moves_what_it_did_and_keeps_its_function(key):
    pytest.importorskip(key[0])
    (build, example), known = MODELS[key], rows()
    torch.manual_seed(0)
    with limited(LIMIT):
        row = measure(randomise(build().eval(), gain=1.0), example, "float64")
    gc.collect()
    assert row["change_float64"] < 1e-10
    assert row["share_moved"] >= (float(known[key]["share_moved"]) - 1e-4 if key in known else 0.9)
    known[key] = {"package": key[0], "model": key[1], **row}
    write(TABLE, [known[key] for key in MODELS if key in known])

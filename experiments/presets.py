"""The presets of every task; the first of each is its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.config import (
    CheckpointConfig,
    ImagesConfig,
    LogConfig,
    MqarConfig,
    NeedleConfig,
    OptimizerConfig,
    SeriesConfig,
    TextConfig,
)
from experiments.data.images import ImageDataConfig
from experiments.data.mqar import MqarDataConfig
from experiments.data.needle import NeedleDataConfig
from experiments.data.series import SeriesDataConfig
from experiments.data.text import VOCAB_SIZE
from models.forecasting import ForecasterConfig
from models.language import transformer, transnormer_llm
from models.vision_config import (
    ViTConfig,
    agent_deit,
    biformer,
    nat,
    soft_tiny,
)


def _text_presets() -> dict[str, TextConfig]:
    small = {"num_layers": 4, "num_heads": 4, "features": 128}
    medium = {"num_layers": 12, "num_heads": 12, "features": 768}
    medium |= {"dtype": "bfloat16", "remat": "dots", "scan_layers": True}
    accelerator = TextConfig(
        steps=20_000,
        batch_size=64,
        sequence_length=4096,
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000, beta2=0.95),
        checkpoint=CheckpointConfig(every=1000),
        log=LogConfig(every=50, evaluate_every=1000, evaluate_bytes=2**20),
    )
    return {
        "transnormer_llm": TextConfig(model=transnormer_llm(vocab_size=VOCAB_SIZE, **small)),
        "transformer": TextConfig(model=transformer(vocab_size=VOCAB_SIZE, **small)),
        **_mechanism_presets(small),
        "transnormer_llm_medium": dataclasses.replace(
            accelerator, model=transnormer_llm(vocab_size=VOCAB_SIZE, **medium)
        ),
        "transformer_medium": dataclasses.replace(
            accelerator, model=transformer(vocab_size=VOCAB_SIZE, **medium)
        ),
        "tiny": TextConfig(
            steps=20,
            batch_size=8,
            sequence_length=64,
            model=transnormer_llm(vocab_size=VOCAB_SIZE, num_layers=2, num_heads=2, features=32),
            optimizer=OptimizerConfig(warmup_steps=5),
            checkpoint=CheckpointConfig(every=5),
            log=LogConfig(every=1, evaluate_every=10, evaluate_bytes=4096),
        ),
    }


def _mechanism_presets(small: dict[str, int]) -> dict[str, TextConfig]:
    """A transformer of the same size with another mixer of tokens, by the name of its paper."""
    based, softmax = "based_linear_attention", "softmax_attention"
    heads = small["features"] // small["num_heads"]
    changes: dict[str, dict[str, Any]] = {
        "transnormer": {
            "layers": ("diag_attention",) * 2 + ("norm_attention",) * 2,
            "positions": "lrpe",
            "feed_forward": "sglu",
            "options": {"diag_attention.block_size": 64},
        },
        "based": {
            "layers": ("base_conv", based, softmax, "base_conv"),
            "options": {
                f"{based}.head_dim": 16,
                f"{based}.value_dim": heads,
                f"{based}.positions": None,
                f"{softmax}.local_window_size": 63,
            },
        },
        "rat": {"mechanism": "rat"},
        "aaren": {"mechanism": "aaren_attention", "positions": None},
        "landmark": {"mechanism": "landmark_attention", "landmarks": 15},
        # It knows no documents, as titans_mac.
        "routing": {
            "mechanism": "routing_attention",
            "options": {"shared_qk": True},
            "documents": "together",
        },
        "combiner": {"mechanism": "combiner_attention", "options": {"span_size": 16}},
        "mamba": {"mechanism": "mamba"},
        "titans_mac": {
            "mechanism": "titans_mac",
            "options": {"segment": 64},
            "documents": "together",
        },
        "titans_mag": {"mechanism": "titans_mag", "options": {"window": 64}},
        "titans_mal": {"mechanism": "titans_mal", "options": {"window": 64}},
    }
    return {
        name: TextConfig(model=transformer(vocab_size=VOCAB_SIZE, **small, **own))
        for name, own in changes.items()
    }


def _mqar_presets() -> dict[str, MqarConfig]:
    # A short convolution tells tokens their neighbours, without which a model has to find out first
    # that values stand behind their keys: it takes its place in all that are compared.
    model = transformer(
        vocab_size=64,
        num_layers=3,
        num_heads=2,
        features=64,
        positions=None,
        layers=("base_conv", "softmax_attention", "softmax_attention"),
    )
    data = MqarDataConfig(vocab_size=64, length=48, pairs=8, evaluate_lengths=(96, 192))
    optimizer = OptimizerConfig(learning_rate=3e-3)
    log = LogConfig(every=50, evaluate_every=250)
    mqar = MqarConfig(model=model, data=data, optimizer=optimizer, log=log)
    return {
        "mqar": mqar,
        # That of the paper: a vocabulary of 8192, and as many pairs as fit.
        "mqar_medium": dataclasses.replace(
            mqar,
            steps=20_000,
            batch_size=256,
            model=dataclasses.replace(model, vocab_size=8192, features=128),
            data=MqarDataConfig(vocab_size=8192, length=512, pairs=64),
            checkpoint=CheckpointConfig(every=1000),
        ),
        "tiny": dataclasses.replace(
            mqar,
            steps=20,
            batch_size=8,
            model=dataclasses.replace(model, vocab_size=40, features=16, num_layers=2),
            data=MqarDataConfig(vocab_size=40, length=16, pairs=2, evaluate_examples=32),
            checkpoint=CheckpointConfig(every=5),
            log=LogConfig(every=1, evaluate_every=10),
        ),
    }


def _needle_presets() -> dict[str, NeedleConfig]:
    # Without positions, what was learned holds at any length; the convolutions tell neighbours.
    model = transformer(
        vocab_size=64,
        num_layers=4,
        num_heads=2,
        features=64,
        positions=None,
        layers=("base_conv", "landmark_attention"),
        landmarks=15,
    )
    hip = {"mask_k": 64, "block_q": 16, "block_k": 2, "group": 4, "window": 32, "sinks": 4}
    needle = NeedleConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        log=LogConfig(every=50, evaluate_every=200),
    )
    return {
        "needle": needle,
        "needle_hip": dataclasses.replace(
            needle,
            model=dataclasses.replace(
                model,
                landmarks=None,
                layers=("base_conv", "hip_attention"),
                options={f"hip_attention.{name}": value for name, value in hip.items()},
            ),
        ),
        "tiny": dataclasses.replace(
            needle,
            steps=20,
            batch_size=8,
            model=dataclasses.replace(model, features=16, landmarks=3, num_layers=2),
            data=NeedleDataConfig(
                length=16,
                values=3,
                evaluate_examples=8,
                evaluate_lengths=(16, 32),
                evaluate_depths=(0, 1),
            ),
            checkpoint=CheckpointConfig(every=5),
            log=LogConfig(every=1, evaluate_every=10),
        ),
    }


def _images_presets() -> dict[str, ImagesConfig]:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=50)
    digits = ImagesConfig(optimizer=optimizer, log=LogConfig(every=20, evaluate_every=200))
    imagenet = ImagesConfig(
        steps=300_000,
        batch_size=1024,
        data=ImageDataConfig(
            name="imagenet2012",
            validation_split="train[99%:]",
            train_split="train[:99%]",
            test_split="validation",
            image_size=224,
            mean=(0.485, 0.456, 0.406),
            deviation=(0.229, 0.224, 0.225),
            shift=16,
            flip=True,
            read_threads=32,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10_000, weight_decay=0.05),
        checkpoint=CheckpointConfig(every=5000),
        log=LogConfig(every=100, evaluate_every=10_000),
    )
    bfloat16 = {"dtype": "bfloat16"}
    return {
        "vit": digits,
        "neighborhood": dataclasses.replace(
            digits,
            model=ViTConfig(
                mechanism="neighborhood_attention", options={"window": 3}, pooling="mean"
            ),
        ),
        "nat": dataclasses.replace(imagenet, model=nat(**bfloat16)),
        "biformer": dataclasses.replace(imagenet, model=biformer(**bfloat16)),
        "agent_deit": dataclasses.replace(imagenet, model=agent_deit(**bfloat16)),
        "soft_tiny": dataclasses.replace(imagenet, model=soft_tiny(**bfloat16)),
        "tiny": dataclasses.replace(
            digits,
            steps=20,
            batch_size=16,
            model=ViTConfig(patch_size=4, features=16, num_layers=1, num_heads=2),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
            checkpoint=CheckpointConfig(every=5),
            log=LogConfig(every=1, evaluate_every=10),
        ),
    }


def _series_presets() -> dict[str, SeriesConfig]:
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.0)
    log = LogConfig(every=20, evaluate_every=200)
    series = SeriesConfig(optimizer=optimizer, log=log)
    return {
        "autoformer": series,
        # That of the paper, for a file of seven columns such as ETT.
        "autoformer_medium": dataclasses.replace(
            series,
            steps=10_000,
            model=ForecasterConfig(channels=7, horizon=96, features=512, num_heads=8),
            data=SeriesDataConfig(horizon=96),
            optimizer=dataclasses.replace(optimizer, learning_rate=1e-4),
            checkpoint=CheckpointConfig(every=1000),
            log=LogConfig(every=50, evaluate_every=1000),
        ),
        "tiny": dataclasses.replace(
            series,
            steps=20,
            batch_size=8,
            model=ForecasterConfig(horizon=8, label_length=12, features=8, num_heads=2, window=5),
            data=SeriesDataConfig(input_length=24, horizon=8),
            optimizer=dataclasses.replace(optimizer, warmup_steps=5),
            checkpoint=CheckpointConfig(every=5),
            log=LogConfig(every=1, evaluate_every=10),
        ),
    }


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "text": _text_presets,
    "mqar": _mqar_presets,
    "needle": _needle_presets,
    "images": _images_presets,
    "series": _series_presets,
}

#!/usr/bin/env python3
"""Make a tiny Flux checkpoint with RANDOM weights that loads through the real diffusers pipelines.

    build_tiny_flux.py schnell OUT_DIR    FluxPipeline without guidance embedding (the shape of FLUX.1-schnell)
    build_tiny_flux.py dev     OUT_DIR    FluxPipeline with guidance embedding (the shape of FLUX.1-dev)
    build_tiny_flux.py klein   OUT_DIR    Flux2KleinPipeline (the shape of FLUX.2-klein: Qwen3 text encoder, distilled)

The files are laid out as in the published repositories, 1 MB in all, and nothing is downloaded: even the tokenizers
are made here, one token a character. Every code path is real; the images are noise.
Needs torch, diffusers >= 0.42 and transformers >= 5.
"""

import os
import pathlib
import string
import sys
import time
from typing import Any

CHARACTERS = string.ascii_lowercase + string.digits + ".,!?'-:"
RANDOM_NOTE = "The weights in this folder are random: what comes out is noise. Made by scripts/checkpoints/{script}.\n"


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [(c, -3.0) for c in CHARACTERS + string.ascii_uppercase]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5Tokenizer(vocab=vocab, model_max_length=512)


def qwen_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens = sorted(ByteLevel.alphabet()) + ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def flux1(guidance: bool) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance,
        ),
        # Four blocks, so a scale of 8, and 16 latent channels, as the real one: sizes behave the same.
        vae=AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            sample_size=32,
            layers_per_block=1,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=32,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        ),
        tokenizer=clip,
        tokenizer_2=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
    )


def klein() -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=128,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=32, norm_num_groups=4, sample_size=32
        ),
        # The pipeline reads hidden layers 9, 18 and 27, so it takes 28 (very thin) layers.
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=1024,
            )
        ),
        tokenizer=tokenizer,
        is_distilled=True,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def main(kind: str, out: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    makers = {"schnell": lambda: flux1(False), "dev": lambda: flux1(True), "klein": klein}
    if kind not in makers:
        raise SystemExit(f"unknown kind {kind!r}: one of {', '.join(makers)}")
    began = time.monotonic()
    torch.manual_seed(0)
    pipeline = makers[kind]()
    pipeline.save_pretrained(out, safe_serialization=True)
    (pathlib.Path(out) / "RANDOM_WEIGHTS").write_text(RANDOM_NOTE.format(script=pathlib.Path(__file__).name))
    size = sum(path.stat().st_size for path in pathlib.Path(out).rglob("*") if path.is_file())
    name = type(pipeline).__name__
    print(f"flux-{kind}: {name} with random weights, {size / 1e6:.2f} MB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

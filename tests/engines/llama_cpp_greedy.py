"""Run by the engines' own interpreter: what llama.cpp says to prompts, for one GGUF file after the other.

Reads and writes as ``vllm_greedy.py`` does. A prompt may be text, which llama.cpp's own tokenizer takes apart. Tokens
``banned`` by a job are not chosen; probabilities are those before that.
"""

import json
import sys
from pathlib import Path

import xllamacpp


def serve(path: str) -> xllamacpp.Server:
    """One thread, and everything in float32, as our own logits are."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 64, 1, 64, 64
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup = False
    return xllamacpp.Server(params)


answers: list = []
for job in json.load(sys.stdin):
    try:
        server = serve(job["path"])
        request = {"n_predict": job["num_new"], "temperature": 0, "n_probs": 1}
        request["logit_bias"] = [[token, False] for token in job["banned"]]
        answer = []
        for prompt in job["prompts"]:
            steps = server.handle_completions(request | {"prompt": prompt})["choices"][0]["logprobs"]["content"]
            answer.append({"tokens": [step["id"] for step in steps], "logprobs": [step["logprob"] for step in steps]})
        answers.append(answer)
        del server
    except Exception as error:  # told to the test, which names the file
        answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(sys.argv[1]).write_text(json.dumps(answers))

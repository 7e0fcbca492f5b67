"""Run by an interpreter that has xllamacpp: tokens a second of one GGUF file on one thread, as one line of JSON."""

import json
import sys

import xllamacpp

PROMPT, NEW, ROUNDS = 128, 64, 3

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 256, 1, 128, 128
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = True
server = xllamacpp.Server(params)
fastest = {"prefill_tokens_per_second": 0.0, "decode_tokens_per_second": 0.0}
for each in range(ROUNDS):
    request = {"prompt": [5 + each, *range(100, 99 + PROMPT)], "n_predict": NEW, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(request | {"cache_prompt": False, "timings_per_token": True})
    times = answer["timings"] if "timings" in answer else answer["choices"][0]["timings"]
    fastest["prefill_tokens_per_second"] = max(fastest["prefill_tokens_per_second"], times["prompt_per_second"])
    fastest["decode_tokens_per_second"] = max(fastest["decode_tokens_per_second"], times["predicted_per_second"])
print(json.dumps(fastest))

"""Run by the engines' own interpreter: what vLLM says to prompts, for one checkpoint after the other.

Reads a JSON list of jobs from standard input, ``{"path", "prompts", "num_new", "options"}``, and writes to the file
named as the argument, for each, a list of ``{"tokens", "logprobs"}`` by prompt, or ``{"error"}``.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

if __name__ == "__main__":  # which a process that shares the layers imports as well
    answers = []
    for job in json.load(sys.stdin):
        try:
            llm = LLM(
                model=job["path"],
                trust_remote_code=True,
                skip_tokenizer_init=True,
                max_model_len=64,
                max_num_seqs=8,
                enable_prefix_caching=False,
                **{"dtype": "float32", "enforce_eager": True} | job.get("options", {}),
            )
            sampling = SamplingParams(
                temperature=0, max_tokens=job["num_new"], logprobs=1, ignore_eos=True, detokenize=False
            )
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
            answer = []
            for output in outputs:
                tokens = list(output.outputs[0].token_ids)
                steps = zip(tokens, output.outputs[0].logprobs, strict=True)
                answer.append({"tokens": tokens, "logprobs": [step[token].logprob for token, step in steps]})
            answers.append(answer)
            llm.llm_engine.engine_core.shutdown()
            del llm
        except Exception as error:  # told to the test, which names the checkpoint
            answers.append({"error": f"{type(error).__name__}: {error}"})
        Path(sys.argv[1]).write_text(json.dumps(answers))  # each time: an engine may end the process
        gc.collect()
        cleanup_dist_env_and_memory()  # which an engine that failed has not done

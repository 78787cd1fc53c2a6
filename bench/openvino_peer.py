"""OpenVINO GenAI on one GGUF file, as a program that bench/decode.py asks: run by a Python that has `openvino-genai`.

Usage: python bench/openvino_peer.py FILE.gguf THREADS. Says `ready`, then answers each line `prefill N` or `decode N`,
N tokens, with tokens/s as the library's own clocks have it: to the first token, or between tokens.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import openvino
import openvino_genai

PROMPT = 8  # tokens before the first decode step, as in bench/decode.py
_prompts = itertools.count()


def main() -> None:
    file, threads = sys.argv[1:]
    pipeline = openvino_genai.LLMPipeline(file, "CPU", INFERENCE_NUM_THREADS=int(threads))
    generate(pipeline, PROMPT, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        work, count = line.split()
        if work == "prefill":
            rate = 1000 * int(count) / generate(pipeline, int(count), 2).get_ttft().mean
        else:
            rate = 1000 / generate(pipeline, PROMPT, int(count) + 1).get_tpot().mean
        print(rate, flush=True)


def generate(pipeline: openvino_genai.LLMPipeline, prompt: int, answer: int) -> openvino_genai.PerfMetrics:
    """The clocks of one greedy answer of exactly `answer` tokens to `prompt` tokens."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = answer
    config.ignore_eos, config.do_sample = True, False
    # Each begins with another token: it would find the last one's pages in its cache.
    ids = (np.arange(prompt, dtype=np.int64).reshape(1, -1) * 31 + next(_prompts)) % 30_000
    asked = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    return pipeline.generate(asked, config).perf_metrics


if __name__ == "__main__":
    main()

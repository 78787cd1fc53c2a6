"""Recompute bits.json: SHA-256 of the reference's logits on the tiny models, so that one changed bit is seen.

    python tests/golden/bits.py

Every executor must give these bits on every machine, the native ones too. An entry: shape, type, kv_type; the prompt is
`tokens` tokens, token i being (61 i^2 + 17 i + 7) mod vocabulary, in one step on an empty cache; sha256 is over the
little-endian binary32 logits [rows, vocabulary] of the last `rows` of them. Changed bits need a written reason.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from vai.burn.burn import burn
from vai.burn.synth import synthesize
from vai.kernels.program import PAGE_TOKENS, StepArgs
from vai.kernels.reference import ReferencePlan
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.segment import attach

BITS = Path(__file__).with_name("bits.json")
SHORT = [(shape, type, 40, 40) for shape in ("tiny", "tiny-qwen2") for type in ("Q4_0", "Q8_0", "F16", "BF16", "F32")]
LONG = [("tiny", "Q8_0", 1060, 8)]  # over the edge of an attention chunk
MORE = [("tiny-qwen2", type, 40, 40) for type in ("Q4_1", "Q5_0", "Q5_1", "Q4_K_M")]
QWEN3 = [("tiny-qwen3", type, 40, 40) for type in ("Q4_0", "Q8_0", "F32")]
EXPERTS = [("tiny-qwen3moe", type, 40, 40) for type in ("Q4_0", "Q8_0", "Q4_K_M", "BF16", "F32")]
EXPERTS += [(shape, type, 40, 40) for shape in ("tiny-mixtral", "tiny-qwen2moe") for type in ("Q4_0", "Q8_0", "F32")]
PHI4 = [("tiny-phi4", type, 40, 40) for type in ("Q4_0", "F32")]
WIDE = [("tiny-256", type, 40, 40) for type in ("Q4_K", "Q5_K", "Q6_K", "Q4_K_M", "Q5_K_M", "Q4_0+Q6_K")]


def main() -> None:
    entries = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        for shape, type, tokens, rows in SHORT + LONG + MORE + WIDE + QWEN3 + EXPERTS + PHI4:
            path = Path(directory) / f"{shape}-{type}.gguf"
            synthesize(path, shape=shape, type=type)
            with attach(root, burn(path, root).digest) as image:
                spec = Spec.from_bytes(image.spec)
                program = build(spec)
                plan = ReferencePlan(program, image, kv_type="bf16", max_rows=tokens, max_sequences=rows)
                page, pages = program.groups[0].page_bytes("bf16"), -(-tokens // PAGE_TOKENS)
                step = StepArgs(
                    tokens=np.array([(61 * i * i + 17 * i + 7) % spec.vocabulary for i in range(tokens)], np.int32),
                    positions=np.arange(tokens, dtype=np.int32),
                    seq_start=np.array([0, tokens], np.int32),
                    context=np.array([0], np.int32),
                    block_tables=(np.arange(pages, dtype=np.int64)[None, :] * page,),
                    output_rows=np.arange(tokens - rows, tokens, dtype=np.int32),
                )
                logits = plan.forward(step, np.zeros(pages * page, np.uint8))
                entries.append({
                    "shape": shape,
                    "type": type,
                    "kv_type": "bf16",
                    "tokens": tokens,
                    "rows": rows,
                    "sha256": hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest(),
                })  # fmt: skip
    BITS.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How far the bytes in use after an eviction are from the ideal, which is each head's own tokens and nothing else.

    python benchmarks/page_ends.py --text TEXT --kv "adakv(budget=512)" --kv "kvcompress(budget=512)"

Prints one JSON object per method: `over` is pages in use minus what the tokens would fill, in pages per head; with one
page end per head it lies between 0 and 1.
"""

import argparse
import json
from pathlib import Path

from kvfold import LLM, SamplingParams
from kvfold.kv.staged_tables import StagedTables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", action="append", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=2048)
    options = parser.parse_args()
    for kv in options.kv:
        llm = LLM(options.model, kv=kv, kv_memory="1GiB")
        ids = llm.model.tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        print(json.dumps({"kv": kv} | measured(llm, ids[: options.prompt])), flush=True)


def measured(llm: LLM, prompt: list[int]) -> dict[str, float]:
    engine = llm.engine
    engine.add_request(prompt, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    while not engine.generated_tokens:
        engine.step()
    [sequence] = engine.scheduler.running
    tables = sequence.held
    if not isinstance(tables, StagedTables):
        raise SystemExit("choose policies, which drop tokens")
    layout = tables.layout
    per_head = tables.rows.sum(0)
    return {
        "tokens_per_head": round(float(per_head.mean()), 1),
        "fewest": int(per_head.min()),
        "most": int(per_head.max()),
        "pages": len(tables.pages()),
        "over": round((len(tables.pages()) - float((tables.rows / layout.capacity).sum())) / layout.heads, 3),
    }


if __name__ == "__main__":
    main()

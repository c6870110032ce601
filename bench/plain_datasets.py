"""The same preparation as a short script over datasets and TRL: what bench/preparation.py compares with.

Usage: plain_datasets.py TOKENIZER_FOLDER DATA_JSONL CACHE_FOLDER PROCESSES MAX_LENGTH. Rows have `text`, which is
learned whole, or `messages`, of which the assistant's words are learned, as the tokenizer's template marks them. Prints
a line of JSON with the seconds from reading to packs.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer
from trl import pack_dataset


def texts(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, list[list[int]]]:
    found = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(rows["text"], add_special_tokens=False)["input_ids"]]
    return {"input_ids": found, "labels": [[-100, *ids[1:]] for ids in found]}


def conversations(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, list[list[int]]]:
    found = tokenizer.apply_chat_template(rows["messages"], return_dict=True, return_assistant_tokens_mask=True)
    masked = zip(found["input_ids"], found["assistant_masks"], strict=True)
    labels = [[token if said else -100 for token, said in zip(ids, mask, strict=True)] for ids, mask in masked]
    return {"input_ids": found["input_ids"], "labels": labels}


def main(tokenizer_folder: str, data: str, cache: str, processes: str, max_length: str) -> None:
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    began = time.monotonic()
    rows = load_dataset("json", data_files=data, split="train", cache_dir=cache)
    encode = texts if "text" in rows.column_names else conversations
    encoded = rows.map(
        encode,
        batched=True,
        num_proc=int(processes),
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer},
    )
    packs = pack_dataset(encoded, int(max_length), "bfd")
    print(json.dumps({"seconds": time.monotonic() - began, "packs": len(packs)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

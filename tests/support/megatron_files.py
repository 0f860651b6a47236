"""Reads and writes token shards with Megatron-LM, in a process of its own: importing Megatron-LM changes torch's settings.

python megatron_files.py <prefix to read> <prefix to write>: read documents, write them again, and print them as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


def main(read: str, write: str) -> None:
    shard = IndexedDataset(read)
    documents = [shard[number] for number in range(len(shard))]
    builder = IndexedDatasetBuilder(f"{write}.bin", dtype=shard.index.dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document.astype("int64")), [len(document)])
    builder.finalize(f"{write}.idx")
    print(json.dumps([document.tolist() for document in documents]))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The run's tokenizer: loaded from a folder or trained on the run's text, checked, and saved as a Hugging Face folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longhaul.artifacts.files import content_hash, file_sha256
from longhaul.artifacts.schemas import TokenizerManifest
from longhaul.config.package_data import data_root
from longhaul.data.readers.documents import read_documents, texts
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.tokenizers.chat_template import ChatTemplate
from longhaul.errors import UserError
from longhaul.jobs.specs import TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = data_root() / "templates" / "chat" / "chatml.jinja"
EOS, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
# Words with one leading space or sign, single digits, runs of signs, line breaks, spaces: the split of Qwen2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROBE = [{"role": "user", "content": "How much is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]


def run(job: TokenizerSpec) -> None:
    """Makes results/<run>/tokenizers/<hash>, then the manifest `job.out`.

    Raises UserError for a folder that is no tokenizer, a tokenizer without EOS or larger than the model's vocabulary, and
    a chat template that is missing, broken, or whose assistant turns do not end with EOS.
    """
    tokenizer = _load(job.path) if job.path else _train(job)
    _install_chat_template(tokenizer, job)
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer {job.path} has no EOS token: documents could not be told apart, generation never stops",
            "set eos_token in its tokenizer_config.json",
        )
    ids = tokenizer.get_vocab()
    vocab_size = max(ids.values()) + 1
    if job.model_vocab_size is not None and vocab_size > job.model_vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens; the model's vocab_size is {job.model_vocab_size}",
            "raise the model's vocab_size, or use (train) a smaller tokenizer",
        )
    token_dtype(vocab_size)  # refuses what no shard can hold
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    folder, digest = _save(tokenizer, Path(job.folder), probe=job.needs_chat_template)
    TokenizerManifest(
        path=str(folder),
        hash=digest,
        vocab_size=vocab_size,
        bos_id=ids[str(tokenizer.bos_token)] if tokenizer.bos_token else None,
        eos_id=ids[str(tokenizer.eos_token)],
        pad_id=ids[str(tokenizer.pad_token)],
        has_chat_template=bool(tokenizer.chat_template),
        trained_on=sorted(job.train_files),
    ).write(Path(job.out))


def _load(path: str) -> PreTrainedTokenizerBase:
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(f"tokenizer: {path} holds no tokenizer.json", "name a Hugging Face tokenizer folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # The library raises whatever its Rust half or its JSON parser met, `Exception` itself included.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer: cannot load {path}: {reason}", "name a Hugging Face tokenizer folder") from None
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer: {path} is a slow (pure Python) tokenizer", "convert it to tokenizer.json first")
    return tokenizer


def _train(job: TokenizerSpec) -> PreTrainedTokenizerBase:
    """A byte-level BPE; the same files give the same tokenizer, whatever the number of threads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    by_words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([by_words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=job.train_vocab_size or 0,
        special_tokens=[EOS, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(job), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )


def _corpus(job: TokenizerSpec) -> Iterator[str]:
    for name in sorted(job.train_files):
        for document in read_documents(job.train_files[name], job.train_datasets[name]):
            yield from texts(document)


def _install_chat_template(tokenizer: PreTrainedTokenizerBase, job: TokenizerSpec) -> None:
    """The user's own template, else the tokenizer's own (its default where it has several), else ours if we trained it."""
    if job.chat_template:
        tokenizer.chat_template = _read_template(Path(job.chat_template))
    elif tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.get_chat_template()
    elif not job.path:
        tokenizer.chat_template = _read_template(DEFAULT_CHAT_TEMPLATE)
    elif job.needs_chat_template:
        raise UserError(
            f"the tokenizer {job.path} has no chat template, and a stage trains on chats",
            "set tokenizer.chat_template, for example to templates/chat/chatml.jinja",
        )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template: cannot read {path}: {error}", "name a Jinja file") from None


def _save(tokenizer: PreTrainedTokenizerBase, root: Path, probe: bool) -> tuple[Path, str]:
    """Writes <root>/<hash> whole or not at all; an equal one that is already there is kept."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".saving-") as temporary:
        made = Path(temporary) / "tokenizer"
        tokenizer.save_pretrained(made)
        if probe:
            ChatTemplate.load(made).render(_PROBE, "trying the tokenizer's chat template")
        digest = _hash(tokenizer, made)
        folder = root / digest
        if not folder.exists():
            made.replace(folder)
    return folder, digest


def _hash(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Of what decides the ids: the vocabulary and merges, the special tokens, the chat template."""
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return content_hash([file_sha256(folder / "tokenizer.json"), special, tokenizer.chat_template])

"""Loads the run's tokenizer or trains a byte-level BPE one, sets the chat template, tests it, and saves it by its hash.

The result is a Hugging Face tokenizer folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.artifacts.atomic_files import content_hash, file_sha256
from longhaul.config.shipped_files import CHAT_TEMPLATES
from longhaul.data.readers.read_documents import document_texts, read_documents
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.tokenizers.chat_template import RENDER_LIMIT_S, ChatTemplate
from longhaul.data.tokenizers.tokenizer_keys import check_tokenizer_keys
from longhaul.data.tokenizers.tokenizer_size import require_size
from longhaul.errors import InputError, UserError, first_line
from longhaul.jobs.kinds.tokenizer_job import TokenizerSpec
from longhaul.runtime.cpu_time_limit import ends_its_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = CHAT_TEMPLATES / "chatml.jinja"
EOS, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
# Qwen2's pre-tokenization: words with one leading space or symbol, single digits, runs of symbols, line breaks, spaces.
_PRE_TOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEST_CONVERSATION = [{"role": "user", "content": "How much is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]


def run(job: TokenizerSpec) -> None:
    """Write results/<run>/tokenizers/<hash>, then the manifest `job.out`.

    Raises:
        UserError: the folder holds no fast tokenizer; the tokenizer has no EOS token or exceeds the model's vocabulary;
            the chat template is missing or invalid, or its assistant turns do not end with EOS.
    """
    tokenizer = _load(job.path) if job.path else _train(job)
    _install_chat_template(tokenizer, job)
    if not tokenizer.eos_token:
        raise InputError(
            f"the tokenizer {job.path} has no EOS token: nothing would separate documents, and generation would not stop",
            "set eos_token in its tokenizer_config.json",
        )
    ids = tokenizer.get_vocab()
    vocab_size = max(ids.values()) + 1
    if job.model_vocab_size is not None:
        require_size(vocab_size, job.model_vocab_size)
    token_dtype(vocab_size)  # raises UserError for ids that shards cannot hold
    if not tokenizer.pad_token:
        tokenizer.pad_token = tokenizer.eos_token
    folder, digest = _save(tokenizer, Path(job.folder), test_chat_template=job.needs_chat_template)
    TokenizerManifest(
        path=str(folder),
        hash=digest,
        vocab_size=vocab_size,
        bos_id=ids[str(tokenizer.bos_token)] if tokenizer.bos_token else None,
        eos_id=ids[str(tokenizer.eos_token)],
        pad_id=ids[str(tokenizer.pad_token)],
        has_chat_template=bool(tokenizer.chat_template),
        files=_file_hashes(folder),
        trained_on=sorted(job.train_files),
    ).write(Path(job.out))


def _load(path: str) -> PreTrainedTokenizerBase:
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer: {path} holds no tokenizer.json", "set tokenizer.path to a Hugging Face tokenizer folder"
        )
    check_tokenizer_keys(Path(path))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)  # nosec B615  # a local folder
    # The library passes on any exception of its Rust code or its JSON parser, plain `Exception` included.
    except Exception as error:
        raise UserError(
            f"tokenizer: cannot load {path}: {first_line(error)}",
            "set tokenizer.path to a Hugging Face tokenizer folder",
        ) from None
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer: {path} is a slow (pure Python) tokenizer", "convert it to tokenizer.json first")
    return tokenizer


def _train(job: TokenizerSpec) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer; the same files give the same tokenizer, for any number of threads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    by_words = pre_tokenizers.Split(Regex(_PRE_TOKENIZE), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([by_words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=job.train_vocab_size or 0,
        special_tokens=[EOS, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_texts(job), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )


def _training_texts(job: TokenizerSpec) -> Iterator[str]:
    for name in sorted(job.train_files):
        for document in read_documents(job.train_files[name], job.train_datasets[name]):
            yield from document_texts(document)


def _install_chat_template(tokenizer: PreTrainedTokenizerBase, job: TokenizerSpec) -> None:
    """Set the chat template.

    The config's template comes first, then the tokenizer's (its default template where it has several). A tokenizer that
    longhaul trained gets longhaul's template.
    """
    if job.chat_template:
        tokenizer.chat_template = _read_template(Path(job.chat_template))
    elif tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.get_chat_template()
    elif not job.path:
        tokenizer.chat_template = _read_template(DEFAULT_CHAT_TEMPLATE)
    elif job.needs_chat_template:
        raise InputError(
            f"the tokenizer {job.path} has no chat template, but a stage trains on chats",
            f"set tokenizer.chat_template, for example to {DEFAULT_CHAT_TEMPLATE}",
        )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template: cannot read {path}: {error}", "set it to a Jinja file") from None


def _save(tokenizer: PreTrainedTokenizerBase, root: Path, test_chat_template: bool) -> tuple[Path, str]:
    """Write <root>/<hash> atomically. An existing folder is kept if its files are equal, else it was altered and is replaced.

    Return the folder and the hash.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".saving-") as temporary:
        saved = Path(temporary) / "tokenizer"
        tokenizer.save_pretrained(saved)
        if test_chat_template:
            _test(ChatTemplate.load(saved))
        digest = _hash(tokenizer, saved)
        folder = root / digest
        if folder.exists() and _file_hashes(folder) != _file_hashes(saved):
            folder.rename(Path(temporary) / "altered")
        if not folder.exists():
            saved.replace(folder)
    return folder, digest


def _test(template: ChatTemplate) -> None:
    """Raise UserError if a template refuses a small conversation."""
    where = "test of the tokenizer's chat template"
    if ends_its_process(lambda: template.render(_TEST_CONVERSATION, where)):
        raise UserError(
            f"{where}: one operation of the chat template, such as the comparison of nested lists, has no end within "
            f"{2 * RENDER_LIMIT_S} s of CPU time",
            f"remove the operation, or give another template as tokenizer.chat_template ({CHAT_TEMPLATES} has some)",
        )
    template.render(_TEST_CONVERSATION, where)


def _file_hashes(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in paths}


def _hash(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Return a hash of everything that decides the ids: vocabulary, merges, special tokens and chat template."""
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return content_hash([file_sha256(folder / "tokenizer.json"), special, tokenizer.chat_template])

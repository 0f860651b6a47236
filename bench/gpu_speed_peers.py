"""Trainings by other libraries, for bench/gpu_speed.py: each function returns one optimizer step.

All of them start from longhaul's initial weights and repeat longhaul's first batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.config.model_size import model_size
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import MicroBatch, Prefetcher
from longhaul.train.build_model import build_model
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.open_samples import open_samples

Step = Callable[[], Any]
BATCHES, LOSS_CHUNK = 4, 8192


def fsdp2_sharded(job: TrainSpec, context: DistributedContext, tokenizer: TokenizerManifest) -> Step:
    """FSDP2 that gathers each layer's weights for its passes, like ZeRO 3."""
    return fsdp2(job, context, tokenizer, reshards=True)


def fsdp2(job: TrainSpec, context: DistributedContext, tokenizer: TokenizerManifest, reshards: bool = False) -> Step:
    """FSDP2 in bf16 over fp32 weights, compiled layers, chunked cross entropy: what torchtitan does on one GPU."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = _model(job, context, tokenizer).to(context.device)
    for layer in model.model.layers:
        layer.compile()
    module = _WithChunkedLoss(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(module, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = _batches(job, context)

    def step() -> None:
        module(next(batches).input_ids).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_deepspeed(job: TrainSpec, context: DistributedContext, tokenizer: TokenizerManifest) -> Step:
    """deepspeed.initialize around the Hugging Face model with its own loss, and DeepSpeed's defaults."""
    import deepspeed

    config = {
        **_deepspeed_config(job, 1),
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True},
        },
    }
    engine: Any = deepspeed.initialize(model=_model(job, context, tokenizer), config=config)[0]
    batches = _batches(job, context)

    def step() -> None:
        ids = next(batches).input_ids
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return step


def hf_trainer(job: TrainSpec, context: DistributedContext, tokenizer: TokenizerManifest) -> Step:
    """Hugging Face's Trainer with ZeRO 2 and Liger's kernels: its training step, called batch by batch."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job.stage.micro_batch_size,
        max_steps=10_000,
        learning_rate=3e-4,
        bf16=True,
        deepspeed=_deepspeed_config(job, 2)
        | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "fused": True}}},
        save_strategy="no",
        logging_steps=1_000,
        report_to=[],
        use_liger_kernel=True,
    )
    batches = _batches(job, context)
    trainer = Trainer(
        model=_model(job, context, tokenizer).to(torch.bfloat16), args=arguments, train_dataset=_Endless(batches)
    )
    return _StepsOf(trainer)


class _Endless(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Samples of the batches, again and again."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._batches:
            for ids in batch.input_ids.cpu():
                yield {"input_ids": ids, "labels": ids.clone()}


class _StepsOf:
    """Runs `Trainer.train` in a thread that waits after each step until it is called again."""

    def __init__(self, trainer: Any) -> None:
        import threading

        from transformers import TrainerCallback

        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._failed: BaseException | None = None
        outer = self

        class Wait(TrainerCallback):
            def on_step_begin(self, *_arguments: Any, **_named: Any) -> None:
                outer._go.acquire()

            def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
                outer._done.release()

        def train() -> None:
            try:
                torch.cuda.set_device(0)
                trainer.train()
            except BaseException as error:
                self._failed = error
                self._done.release()

        trainer.add_callback(Wait())
        threading.Thread(target=train, daemon=True).start()

    def __call__(self) -> None:
        self._go.release()
        self._done.acquire()
        if self._failed:
            raise self._failed


def limit(job: TrainSpec) -> float:
    """Return tokens/s of the matrix products and the attention of a dense model's forward and backward pass alone."""
    sizes, keys = model_size(job.model), job.model
    tokens = job.stage.micro_batch_size * job.stage.sequence_length
    hidden, inner, layers = keys["hidden_size"], keys["intermediate_size"], sizes.layers
    heads, key_heads, width = keys["num_attention_heads"], keys["num_key_value_heads"], keys["head_dim"]
    products = [
        (layers, heads * width, hidden),
        (2 * layers, key_heads * width, hidden),
        (layers, hidden, heads * width),
        (2 * layers, inner, hidden),
        (layers, hidden, inner),
        (1, keys["vocab_size"], hidden),
    ]
    seconds = sum(count * _product_s(tokens, out, into) for count, out, into in products)
    seconds += layers * _attention_s(job.stage.micro_batch_size, heads, key_heads, job.stage.sequence_length, width)
    return tokens / seconds


def _product_s(tokens: int, out: int, into: int) -> float:
    """Return the seconds of a linear layer's three products: forward, and the gradients of input and weight."""
    x = torch.randn(tokens, into, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(out, into, device="cuda", dtype=torch.bfloat16)
    slope = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16)
    return sum(map(_seconds, (lambda: x @ weight.T, lambda: slope @ weight, lambda: slope.T @ x)))


def _attention_s(samples: int, heads: int, key_heads: int, length: int, width: int) -> float:
    def random(count: int) -> torch.Tensor:
        return torch.randn(samples, count, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    query, key, value = random(heads), random(key_heads), random(key_heads)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    slope = torch.randn_like(output)

    def both() -> None:
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(result, (query, key, value), slope)

    return _seconds(both)


def _seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        work()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


class _WithChunkedLoss(torch.nn.Module):
    """A causal LM that returns the mean loss of next-token prediction; no more than a chunk of logits exists."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=ids_BS, use_cache=False).last_hidden_state.flatten(0, 1)
        labels = F.pad(ids_BS[:, 1:], (0, 1), value=-100).flatten()
        return _ChunkedLoss.apply(hidden, self.model.lm_head.weight, labels)  # pyright: ignore


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        hidden_slope, weight_slope = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH)
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        count = (labels_N >= 0).sum()
        for start in range(0, len(labels_N), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            loss, slope_nV = _compiled_loss(hidden_NH[rows] @ weight_VH.T, labels_N[rows], count)
            total += loss
            torch.mm(slope_nV, weight_VH, out=hidden_slope[rows])
            weight_slope.addmm_(slope_nV.T, hidden_NH[rows])
        ctx.save_for_backward(hidden_slope, weight_slope)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        hidden_slope, weight_slope = ctx.saved_tensors
        return hidden_slope * slopes[0].to(hidden_slope.dtype), weight_slope * slopes[0].to(weight_slope.dtype), None


@torch.compile
def _compiled_loss(
    logits_nV: torch.Tensor, labels_n: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits_nV.float()
    logsumexp_n = logits.logsumexp(-1)
    is_counted, label = labels_n >= 0, labels_n.clamp(min=0)
    loss = torch.where(is_counted, logsumexp_n - logits.gather(1, label[:, None])[:, 0], 0.0).sum() / count
    is_label = torch.arange(logits.shape[1], device=logits.device) == label[:, None]
    slope = torch.exp(logits - logsumexp_n[:, None]) - is_label.float()
    return loss, (slope * (is_counted[:, None] / count)).to(logits_nV.dtype)


def _deepspeed_config(job: TrainSpec, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": job.stage.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,  # also the default of Hugging Face's Trainer
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},
        "steps_per_print": 10_000_000,
    }


def _model(job: TrainSpec, context: DistributedContext, tokenizer: TokenizerManifest) -> Any:
    """Return longhaul's model with its initial weights in fp32, nothing of it compiled."""
    plain = job.model_copy(update={"stage": job.stage.model_copy(update={"compile": "off"})})
    return build_model(plain, tokenizer, None, context)


def _batches(job: TrainSpec, context: DistributedContext) -> Iterator[MicroBatch]:
    """Yield longhaul's first batches on the GPU, again and again."""
    with tempfile.TemporaryDirectory() as folder:
        samples = open_samples(job, DataManifest.read(Path(job.data)), "train", Path(folder), context)
        state = TrainingState()
        first = []
        for batch in islice(Prefetcher(samples, job, context, state), BATCHES):
            first.append(batch.micro_batches[0].to(context.device))
            state.step += 1
    return cycle(first)

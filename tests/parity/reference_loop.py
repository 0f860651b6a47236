"""Trains a stage in plain PyTorch: one process, no DeepSpeed, the whole global batch in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longhaul.data.sampling.sample_format import is_text
from longhaul.data.sampling.samples import Samples
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import MicroBatch, collate
from longhaul.train.initial_weights import seeded_values
from longhaul.train.lr_schedule import learning_rate
from longhaul.train.random_numbers import seed_random_numbers


@dataclass(frozen=True)
class Trace:
    """Loss and gradient norm (before clipping) of every step; the model and the validation loss after the last step."""

    losses: list[float]
    norms: list[float]
    validation_loss: float
    model: Any


def train(job: TrainSpec, samples: Samples, held_out: Samples, perturb: bool = False) -> Trace:
    """Train as the spec states; the parallel layout, ZeRO and precision of the spec are not used.

    perturb: change every initial weight by one unit in the last place, up or down, to measure the effect of rounding alone
    """
    model = _build_model(job)
    if perturb:
        _perturb(model)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    settings = job.stage.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
    )
    losses, norms = [], []
    routed = _record_routing(model)
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job.stage.schedule, settings.lr, step, job.steps)
        batch = collate(samples, samples.ids(step, job.stage.global_batch_size))
        seed_random_numbers(job.seed, step, rank=0)
        loss = _mean_loss(model, batch)
        optimizer.zero_grad()
        coefficient = job.stage.sequence_aux_loss_coef
        text_BS = is_text(batch.position_ids, job.stage.sequence_length)
        balance = sum(_balance_loss(*routing, text_BS) for routing in routed.values())
        (loss + coefficient * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping or float("inf"))
        optimizer.step()
        _update_router_biases(model, routed, job.stage.router_bias_update_rate, text_BS.flatten())
        losses.append(loss.item())
        norms.append(norm.item())
    model.eval()
    validated = np.arange(min(len(held_out), job.stage.validation.max_samples))
    with torch.no_grad():
        validation_loss = _mean_loss(model, collate(held_out, validated)).item()
    return Trace(losses, norms, validation_loss, model)


def _mean_loss(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Return the mean over the loss tokens."""
    logits_BSV = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch.labels.flatten())


def _build_model(job: TrainSpec) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**job.model, use_cache=False)
    config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    values = seeded_values(config, job.seed, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, parameter.shape))
    return model.train()


def _perturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))


def _record_routing(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return router -> (scores [N, E] of the experts; chosen experts [N, K]) of the last forward pass.

    Hooks update the dict at each forward pass. N tokens, E experts, K experts for each token.
    """
    routed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(name: str, gate: Any) -> None:
        def hook(_gate: Any, _inputs: Any, output: Any) -> None:
            scores = output[0].sigmoid() if hasattr(gate, "e_score_correction_bias") else output[0].softmax(-1)
            routed[name] = (scores, output[2])

        gate.register_forward_hook(hook)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            record(name, module)
    return routed


def _balance_loss(scores: torch.Tensor, chosen: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """Return the mean over sequences of equations 17 to 20 of DeepSeek-V3; is_text [B, S] is false for padding."""
    experts, used, losses = scores.shape[1], chosen.shape[1], []
    for own_scores, own_text in zip(scores.chunk(len(is_text)), is_text, strict=True):
        text_scores = own_scores[own_text]
        visits = torch.bincount(text_scores.topk(used).indices.flatten(), minlength=experts)
        affinities = text_scores / text_scores.sum(-1, keepdim=True)
        losses.append((experts / (used * len(text_scores)) * visits * affinities.mean(0)).sum())
    return torch.stack(losses).mean()


def _update_router_biases(
    model: Any, routed: dict[str, tuple[torch.Tensor, torch.Tensor]], rate: float, is_text: torch.Tensor
) -> None:
    for name, (scores, chosen) in routed.items():
        load = torch.bincount(chosen[is_text].flatten(), minlength=scores.shape[1]).float()
        gate = model.get_submodule(name)
        if hasattr(gate, "e_score_correction_bias"):
            gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)

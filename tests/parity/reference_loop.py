"""The training of a stage in plain PyTorch: one process, no DeepSpeed, the whole global batch in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from longhaul.data.sampling.samples import Samples
from longhaul.train.batches import collate
from longhaul.train.build_model import seeded_values
from longhaul.train.schedule import learning_rate


@dataclass(frozen=True)
class Trace:
    """Of every step the loss and the gradient norm before clipping; the model after the last one."""

    losses: list[float]
    norms: list[float]
    model: Any


def train(job: Any, samples: Samples, nudged: bool = False) -> Trace:
    """`job` is the TrainSpec of any layout of the twin: only what decides the result is read of it.

    nudged: begin with every weight moved by a unit in its last place, up or down: a measure of what rounding alone does.
    """
    model = _model(job)
    if nudged:
        _nudge(model)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    settings = job.stage.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
    )
    losses, norms = [], []
    routed = _watch_routers(model)
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job.stage.schedule, settings.lr, step, job.steps)
        batch = collate(samples, samples.ids(step, job.stage.global_batch_size))
        logits_BSV = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        weight = job.stage.sequence_aux_loss_coef
        (loss + weight * sum(_balance_loss(*found, len(batch.labels)) for found in routed.values())).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        optimizer.step()
        _balance(model, routed, job.stage.router_bias_update_rate)
        losses.append(loss.item())
        norms.append(norm.item())
    return Trace(losses, norms, model.eval())


def _model(job: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**job.model, use_cache=False)
    config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    values = seeded_values(config, job.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, parameter.shape))
    return model.train()


def _nudge(model: Any) -> None:
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=chance) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))


def _watch_routers(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Router -> affinities [N, E] to the experts, which sum to 1, and the chosen ones [N, K], of the last forward pass."""
    routed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str, gate: Any) -> None:
        def keep(_gate: Any, _inputs: Any, output: Any) -> None:
            scores = output[0].sigmoid() if hasattr(gate, "e_score_correction_bias") else output[0].softmax(-1)
            routed[name] = (scores / scores.sum(-1, keepdim=True), output[2])

        gate.register_forward_hook(keep)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            watch(name, module)
    return routed


def _balance_loss(affinities: torch.Tensor, chosen: torch.Tensor, sequences: int) -> torch.Tensor:
    """Mean over sequences, one after the other, of E / (K T) times the visits of each expert times its mean affinity."""
    experts, losses = affinities.shape[1], []
    for own, visited in zip(affinities.chunk(sequences), chosen.chunk(sequences), strict=True):
        visits = torch.bincount(visited.flatten(), minlength=experts)
        losses.append((experts / visited.numel() * visits * own.mean(0)).sum())
    return torch.stack(losses).mean()


def _balance(model: Any, routed: dict[str, tuple[torch.Tensor, torch.Tensor]], rate: float) -> None:
    for name, (affinities, chosen) in routed.items():
        load = torch.bincount(chosen.flatten(), minlength=affinities.shape[1]).float()
        gate = model.get_submodule(name)
        if hasattr(gate, "e_score_correction_bias"):
            gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)

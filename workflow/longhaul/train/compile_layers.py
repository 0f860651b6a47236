"""Compiles each decoder layer on GPUs with torch.compile, and falls back where that fails.

Each layer is compiled for itself. All layers of one kind share one compiled graph, so a deep model compiles as fast as a shallow
one, and embedding, head and the hooks of DeepSpeed stay outside. Only passes that need gradients are compiled. Validation and the
reference logits of an export run the layers as transformers does.

A layer with activation checkpointing is one graph, in which the compiler recomputes. Expert-parallel layers are several graphs,
because their exchange of tokens cannot be captured. torch captures no checkpoint around it. There the checkpoint is outside, and
recomputes the layer through the same graphs. What such layers compute before, between and after their exchanges has graphs of
its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from longhaul.compat.torch import allow_graphs, compile_error_reason
from longhaul.compat.transformers import take_over_activation_checkpointing
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.train.compile_reproducibly import compile_reproducibly
from longhaul.train.parallel.sliced_parameters import decoder_layers

_NOT_COMPILED = "decoder layers run without torch.compile"


def compiles_layers(stage: Stage, model: Any, device: torch.device) -> bool:
    """Return whether the trainer compiles the decoder layers of a stage's Hugging Face causal LM on this device."""
    return device.type == "cuda" and stage.compiles_layers_on_gpus(_has_experts(model))


def not_compiled_line(stage: Stage, model: Any, device: torch.device) -> str | None:
    """Return the line for the log of a stage whose layers run without torch.compile although it asks for it, else None."""
    reason = stage.why_not_compiled(_has_experts(model))
    is_asked = stage.compile == "auto" and device.type == "cuda"
    return f"{_NOT_COMPILED}: {reason}" if is_asked and reason else None


def _has_experts(model: Any) -> bool:
    return any(hasattr(layer.mlp, "experts") for layer in decoder_layers(model))


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile the forward pass of every decoder layer of a Hugging Face causal LM. Call it before deepspeed.initialize.

    backend: of torch.compile; "aot_eager" captures the same graphs and compiles nothing
    """
    layers = decoder_layers(model)
    # A dense layer and a mixture, packed and unpacked samples have graphs of their own.
    allow_graphs(8 + 4 * len(layers))
    fallback = _Fallback()
    for layer in layers:
        layer.forward = CompiledForward(layer, backend, fallback)


class _Fallback:
    """Says once why layers run without torch.compile. One layer that cannot be captured decides for all of them."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def use(self, layer: torch.nn.Module, reason: str) -> None:
        self.reason = reason
        name = f"{type(layer).__name__} {getattr(layer.self_attn, 'layer_idx', '')}".strip()
        print(f"{_NOT_COMPILED}: torch cannot capture {name}: {reason}", flush=True)


def compile_part(backend: str, eager: Callable[..., object], dynamic: bool | None) -> Callable[..., object]:
    """Compile a part of a layer where gradients are needed. What cannot be captured of it runs without torch.compile."""
    compiled = compile_reproducibly(eager, backend=backend, fullgraph=False, dynamic=dynamic)

    def compute(*arguments: object, **named: object) -> object:
        return (compiled if torch.is_grad_enabled() else eager)(*arguments, **named)

    return compute


class CompiledForward:
    """The forward pass of a decoder layer, compiled where gradients are needed."""

    def __init__(self, layer: Any, backend: str, fallback: _Fallback) -> None:
        self._layer, self._fallback = layer, fallback
        self._eager: Callable[..., object] = layer.forward
        breaking = [module for module in layer.modules() if getattr(module, "breaks_graph", False)]
        for module in breaking:
            module.forward = torch.compiler.disable(module.forward)
            module.compile_parts(partial(compile_part, backend))
        self._checkpoint = take_over_activation_checkpointing(layer) if breaking else None
        layer.is_checkpointed_outside_of_graphs = self._checkpoint is not None
        # While a function that was compiled with dynamic=False runs, torch compiles for one size whatever is called in it. So
        # layers with parts of their own find out what differs, too (None).
        self._compiled: Callable[..., object] = compile_reproducibly(
            layer.forward, backend=backend, fullgraph=not breaking, dynamic=None if breaking else False
        )

    def __call__(self, *arguments: object, **named: object) -> object:
        if not torch.is_grad_enabled():
            return self._eager(*arguments, **named)
        # Chosen before the checkpoint, which then recomputes a layer in the way in which it was computed.
        compute = self._eager if self._fallback.reason else self._compute
        return (
            self._checkpoint(partial(compute, **named), *arguments)
            if self._checkpoint
            else compute(*arguments, **named)
        )

    def _compute(self, *arguments: object, **named: object) -> object:
        try:
            return self._compiled(*arguments, **named)
        except Exception as error:
            reason = compile_error_reason(error)
            if reason is None:
                raise
            text = _shortened(reason.text)
            if reason.is_capture:  # raised before the layer computes anything, and on every rank alike
                self._fallback.use(self._layer, text)
                return self._eager(*arguments, **named)
            raise UserError(
                f"torch.compile of {type(self._layer).__name__} failed: {text}",
                "repair what it names, for example a missing C compiler, or set compile: off in the stage",
            ) from error


def _shortened(text: str) -> str:
    """Return the beginning and the end of a long text: torch's own error, and what the C compiler printed last."""
    return text if len(text) <= 1300 else f"{text[:300]} … {text[-1000:]}"

"""Runs a model with one decoder layer in memory at a time, so that verification works for models larger than the memory.

The code of transformers computes everything, in three steps:
1. A forward pass computes embeddings, masks, positions and rotary tables. Its decoder layers only record their arguments.
2. Each decoder layer runs on all sequences, one layer after the other, with the recorded arguments.
3. A forward pass from the last layer's output computes the final norm and the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.errors import UserError
from longhaul.export.exported_tensors import ExportedTensor, target_dtype
from longhaul.export.model_without_memory import meta_model
from longhaul.export.tensor_blocks import COPYING_THREADS, blocks_of

ReadRange = Callable[[ExportedTensor, int, int], torch.Tensor]
"""Return elements [start, stop) of an exported tensor."""


class LayerwiseModel:
    """A causal LM in evaluation mode. Each layer's weights are read before the layer runs, and freed after it.

    config:  content of config.json
    tensors: tensors of the export; each parameter and saved buffer of the model consists of one or more of them
    read:    returns values of one of these tensors
    compute: data type of the weights, except of those that transformers keeps in fp32
    """

    def __init__(
        self,
        config: HuggingFaceConfig,
        tensors: Sequence[ExportedTensor],
        read: ReadRange,
        compute: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self._read, self._compute, self._device = read, compute, device
        self._model: Any = meta_model(config).eval()
        self._model.config.output_router_logits = False  # the recording layers return no router logits
        self._parts: dict[str, list[ExportedTensor]] = {}
        for tensor in tensors:
            if tensor.holds_weights:
                self._parts.setdefault(tensor.model_name, []).append(tensor)
        self._stored_names = self._find_stored_names()
        self._base: Any = self._model.base_model
        self._base.rotary_emb = type(self._base.rotary_emb)(config=self._model.config).to(device)
        self._layers: list[torch.nn.Module] = list(self._base.layers)
        self._recorders = [_CallRecorder() for _ in self._layers]
        self._base.layers = torch.nn.ModuleList(self._recorders)

    @property
    def positions(self) -> int:
        """Return the longest sequence that the model supports, in tokens."""
        return self._model.config.get_text_config().max_position_embeddings

    def _find_stored_names(self) -> dict[tuple[torch.nn.Module, str], str]:
        """Return (module, attribute) of each parameter and buffer -> name of its exported values. Tied ones share a name."""
        stored = {id(tensor): name for name, tensor in self._named_tensors() if name in self._parts}
        return {
            (module, key): stored.get(id(tensor), f"{prefix}.{key}")
            for prefix, module in self._model.named_modules()
            for key, tensor in _direct_tensors(module)
        }

    def _named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters(remove_duplicate=False)
        yield from self._model.named_buffers(remove_duplicate=False)

    @torch.no_grad()
    def logits(self, sequences_T: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return logits [1, T, V] in fp32 on the CPU for each sequence of token ids [T].

        Sequences are computed one by one, without padding or key-value cache.
        """
        with self._in_memory(self._base):
            hidden_1TH = [self._embed(ids_T) for ids_T in sequences_T]
        for layer, recorder in zip(self._layers, self._recorders, strict=True):
            with self._in_memory(layer):
                calls = zip(hidden_1TH, recorder.calls, strict=True)
                hidden_1TH = [layer(hidden, *args, **kwargs) for hidden, (args, kwargs) in calls]
            recorder.calls.clear()
        head = self._model.get_output_embeddings()
        with self._in_memory(self._base.norm), self._in_memory(head):
            return [self._compute_logits(hidden) for hidden in hidden_1TH]

    def _embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return the first layer's input [1, T, H]. Every recorder stores the further arguments of its layer."""
        found = []
        hook = self._base.norm.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
        self._base(input_ids=ids_T[None].to(self._device), use_cache=False)
        hook.remove()
        return found[0]

    def _compute_logits(self, hidden_1TH: torch.Tensor) -> torch.Tensor:
        """Run a forward pass in which the recorders return their input, so that only the final norm and the head compute."""
        found = self._model(inputs_embeds=hidden_1TH, use_cache=False).logits.float().cpu()
        for recorder in self._recorders:
            recorder.calls.clear()
        return found

    @contextmanager
    def _in_memory(self, module: torch.nn.Module) -> Iterator[None]:
        """Give the module's tensors memory and values inside the block. Afterwards they are on the meta device again."""
        before = [(owner, key, tensor) for owner in module.modules() for key, tensor in _direct_tensors(owner)]
        with ThreadPoolExecutor(COPYING_THREADS) as readers:
            for owner, key, tensor in before:
                if tensor.is_meta:
                    setattr(owner, key, self._read_tensor(self._stored_names[owner, key], tensor, readers))
        try:
            yield
        finally:
            for owner, key, tensor in before:
                setattr(owner, key, tensor)

    def _read_tensor(self, name: str, meta: torch.Tensor, readers: Executor) -> torch.Tensor:
        """Return the values of a tensor of the model, with the shape of its meta tensor."""
        if name not in self._parts:
            raise UserError(
                f"no file of the export holds {name}, which is a tensor of the model",
                "its architecture computes a buffer instead of saving it: export a supported architecture",
            )
        dtype = target_dtype(self._model, name, self._parts[name][0].master, self._compute)
        whole = torch.empty(meta.shape, dtype=dtype, device=self._device)
        flat = whole.view(-1)

        def read_block(block: tuple[ExportedTensor, int, int]) -> None:
            tensor, start, stop = block
            flat[tensor.start + start : tensor.start + stop].copy_(self._read(tensor, start, stop))

        all_blocks = ((tensor, *block) for tensor in self._parts[name] for block in blocks_of(tensor))
        for _ in readers.map(read_block, all_blocks):
            pass
        return torch.nn.Parameter(whole, requires_grad=False) if isinstance(meta, torch.nn.Parameter) else whole


class _CallRecorder(torch.nn.Module):
    """Replaces a decoder layer in a forward pass. It records the arguments of each call and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def forward(self, hidden_1TH: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self.calls.append((args, kwargs))
        return hidden_1TH


def _direct_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of the module itself, without those of its submodules."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False)

"""Runs a model of which no more than one decoder layer has memory at a time.

transformers' own code computes everything: masks, positions and rotary tables in a forward pass whose layers only note what
they are called with, then each layer in its turn on all sequences, then the rest of that pass from the last layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from longhaul.errors import UserError
from longhaul.export.safetensors_writer import COPYING_THREADS, chunks
from longhaul.export.tensor_layout import ExportedTensor, meta_model, target_dtype

Read = Callable[[ExportedTensor, int, int], torch.Tensor]


class StreamedModel:
    """A causal LM in evaluation mode whose weights are read when their layer's turn comes, and dropped after it.

    config:  content of config.json
    tensors: of the export; each parameter and saved buffer of the model is made of one or more of them
    read:    the values of elements [start, stop) of one of the tensors
    compute: type of the weights, but for those that transformers keeps in fp32
    """

    def __init__(
        self,
        config: dict[str, Any],
        tensors: Sequence[ExportedTensor],
        read: Read,
        compute: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self._read, self._compute, self._device = read, compute, device
        self._model: Any = meta_model(config).eval()
        self._model.config.output_router_logits = False  # layers that only note their calls have none
        self._parts: dict[str, list[ExportedTensor]] = {}
        for tensor in tensors:
            self._parts.setdefault(tensor.source, []).append(tensor)
        self._names = self._own_names()
        self._base: Any = self._model.base_model
        self._base.rotary_emb = type(self._base.rotary_emb)(config=self._model.config).to(device)
        self._layers: list[torch.nn.Module] = list(self._base.layers)
        self._notes = [_Note() for _ in self._layers]
        self._base.layers = torch.nn.ModuleList(self._notes)

    @property
    def positions(self) -> int:
        """The longest sequence the model is made for."""
        return self._model.config.get_text_config().max_position_embeddings

    def _own_names(self) -> dict[tuple[torch.nn.Module, str], str]:
        """(module, attribute) of each parameter and buffer -> the name its values are exported under; tied ones share it."""
        stored = {id(tensor): name for name, tensor in self._named_tensors() if name in self._parts}
        return {
            (module, key): stored.get(id(tensor), f"{prefix}.{key}")
            for prefix, module in self._model.named_modules()
            for key, tensor in _own_tensors(module)
        }

    def _named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters(remove_duplicate=False)
        yield from self._model.named_buffers(remove_duplicate=False)

    @torch.no_grad()
    def logits(self, sequences_T: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits [1, T, V] in fp32 on the CPU of each sequence of token ids, computed one by one, without padding or cache."""
        with self._resident(self._base):
            hidden_1TH = [self._begin(ids_T) for ids_T in sequences_T]
        for layer, note in zip(self._layers, self._notes, strict=True):
            with self._resident(layer):
                calls = zip(hidden_1TH, note.calls, strict=True)
                hidden_1TH = [layer(hidden, *args, **kwargs) for hidden, (args, kwargs) in calls]
            note.calls.clear()
        head = self._model.get_output_embeddings()
        with self._resident(self._base.norm), self._resident(head):
            return [self._end(hidden) for hidden in hidden_1TH]

    def _begin(self, ids_T: torch.Tensor) -> torch.Tensor:
        """The first layer's input [1, T, H]; every layer notes what else it is called with."""
        found = []
        watch = self._base.norm.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
        self._base(input_ids=ids_T[None].to(self._device), use_cache=False)
        watch.remove()
        return found[0]

    def _end(self, hidden_1TH: torch.Tensor) -> torch.Tensor:
        """The last norm and the head, around layers that change nothing."""
        found = self._model(inputs_embeds=hidden_1TH, use_cache=False).logits.float().cpu()
        for note in self._notes:
            note.calls.clear()
        return found

    @contextmanager
    def _resident(self, module: torch.nn.Module) -> Iterator[None]:
        """Memory and values for the module's tensors; they are without memory again afterwards."""
        before = [(part, key, tensor) for part in module.modules() for key, tensor in _own_tensors(part)]
        with ThreadPoolExecutor(COPYING_THREADS) as readers:
            for part, key, tensor in before:
                if tensor.is_meta:
                    setattr(part, key, self._filled(self._names[part, key], tensor, readers))
        try:
            yield
        finally:
            for part, key, tensor in before:
                setattr(part, key, tensor)

    def _filled(self, name: str, meta: torch.Tensor, readers: Executor) -> torch.Tensor:
        if name not in self._parts:
            raise UserError(
                f"{name} is a tensor of the model that no file of the export holds",
                "its architecture has a buffer that is computed, not saved; only known ones can be exported",
            )
        dtype = target_dtype(self._model, name, self._parts[name][0].master, self._compute)
        whole = torch.empty(meta.shape, dtype=dtype, device=self._device)
        flat = whole.view(-1)

        def fill(work: tuple[ExportedTensor, int, int]) -> None:
            tensor, start, stop = work
            flat[tensor.start + start : tensor.start + stop].copy_(self._read(tensor, start, stop))

        ranges = ((tensor, *part) for tensor in self._parts[name] for part in chunks(tensor.numel))
        for _ in readers.map(fill, ranges):
            pass
        return torch.nn.Parameter(whole, requires_grad=False) if isinstance(meta, torch.nn.Parameter) else whole


class _Note(torch.nn.Module):
    """Takes a decoder layer's place in a forward pass: it notes each call, and gives back what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, hidden_1TH: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((args, kwargs))
        return hidden_1TH


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False)

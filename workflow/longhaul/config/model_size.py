"""Computes a model's total and active parameters, layer sizes and FLOPs per token; sums the counts of parameter_counts.py."""

from __future__ import annotations

from dataclasses import dataclass

from longhaul.config import activation_counts, parameter_counts
from longhaul.config.field_types import HuggingFaceConfig


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a network. A sparse layer is a layer with routed experts.

    Parameters (not bytes):
        total:                    all parameters; a tied embedding counts once
        active:                   parameters that one token passes through
        embedding:                the input embedding
        outside_layers:           everything outside the decoder layers: embedding, untied head, final norm
        routed_experts:           routed experts of all layers, without routers
        routed_experts_per_layer: routed experts of one sparse layer
        dense_layer:              one layer without routed experts
        sparse_layer:             one sparse layer, without its routed experts
        unsplit_per_layer:        the part of a layer that tensor parallelism does not split: norms, router, MLA compressions
        largest_layer:            the largest decoder layer
        largest_tensor:           the largest tensor; the routed experts of a layer are two tensors
    From the config:
        vocab_size, hidden_size, layers, positions, query_heads, attention_dropout
        is_sparse:  for each layer, whether it is sparse
        experts_per_token: routed experts that a token uses in a sparse layer; 0 without such a layer
        head_width: elements of a query and a key of one head
    Elements per token and layer (longhaul.config.activation_counts):
        attention_width:     heads x (key width + value width)
        saved_activations:   saved for the backward pass without recomputation, split by tensor parallelism
        unsplit_activations: the same on every tensor rank, except those inside norms
        repeated_key_values: saved in addition if keys and values are repeated for each query head
        normed_elements:     pass through norms
        matmul_results:      produced by matmuls and attention; unsplit_matmul_results on every tensor rank
        mlp_width:           inner MLP width that a token uses in a layer, summed over its experts
    """

    total: int
    active: int
    embedding: int
    outside_layers: int
    routed_experts: int
    routed_experts_per_layer: int
    dense_layer: int
    sparse_layer: int
    unsplit_per_layer: int
    largest_layer: int
    largest_tensor: int
    vocab_size: int
    hidden_size: int
    layers: int
    positions: int
    query_heads: int
    attention_dropout: float
    is_sparse: tuple[bool, ...]
    experts_per_token: int
    head_width: int
    attention_width: int
    saved_activations: int
    unsplit_activations: int
    repeated_key_values: int
    normed_elements: int
    matmul_results: int
    unsplit_matmul_results: int
    mlp_width: int

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the training FLOPs per token of a full sequence without document borders under a causal mask."""
        return self.training_flops(1, (sequence_length + 1) / 2)

    def training_flops(self, tokens: float, attention_pairs: float) -> float:
        """Return the FLOPs of forward and backward pass, the one definition behind MFU. Recomputation does not count.

        A token takes 6 for each active parameter. A pair of a query and a key that the mask lets it attend to takes 6 for each
        layer and element of the attention width: 2 for the multiplication and addition, and twice as much in the backward pass.
        Source: PaLM (arXiv:2204.02311, appendix B), which counts all pairs.
        """
        return 6.0 * self.active * tokens + 6.0 * self.layers * self.attention_width * attention_pairs


def model_size(c: HuggingFaceConfig) -> ModelSize:
    """Return the sizes of a model from its Hugging Face config, whose values have been checked."""
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    sparse = parameter_counts.sparse_layers(c)
    experts = parameter_counts.expert_parameters(c)
    dense_mlp = parameter_counts.dense_mlp_parameters(c)
    attention = parameter_counts.attention_parameters(c) + 2 * hidden  # with the layer's two norms
    embedding = c["vocab_size"] * hidden
    head = 0 if c.get("tie_word_embeddings") else embedding
    mlps = sum(experts.total if is_sparse else dense_mlp for is_sparse in sparse)
    active_mlps = sum(experts.active if is_sparse else dense_mlp for is_sparse in sparse)
    return ModelSize(
        total=embedding + head + hidden + layers * attention + mlps,
        active=embedding + hidden + layers * attention + active_mlps,
        embedding=embedding,
        outside_layers=embedding + head + hidden,
        routed_experts=sum(sparse) * experts.routed,
        routed_experts_per_layer=experts.routed,
        dense_layer=attention + dense_mlp,
        sparse_layer=attention + experts.total - experts.routed,
        unsplit_per_layer=parameter_counts.latent_compression_parameters(c) + 2 * hidden + experts.router,
        largest_layer=attention + (experts.total if any(sparse) else dense_mlp),
        largest_tensor=max(embedding, *parameter_counts.large_tensors(c)),
        vocab_size=c["vocab_size"],
        hidden_size=hidden,
        layers=layers,
        positions=c["max_position_embeddings"],
        query_heads=c["num_attention_heads"],
        attention_dropout=c.get("attention_dropout") or 0.0,
        is_sparse=sparse,
        experts_per_token=c["num_experts_per_tok"] if any(sparse) else 0,
        head_width=activation_counts.head_width(c),
        attention_width=activation_counts.attention_width(c),
        saved_activations=activation_counts.saved_activations(c, sparse),
        unsplit_activations=activation_counts.unsplit_activations(c, sparse),
        repeated_key_values=activation_counts.repeated_key_values(c),
        normed_elements=activation_counts.normed_elements(c),
        matmul_results=activation_counts.matmul_results(c, sparse),
        unsplit_matmul_results=activation_counts.unsplit_matmul_results(c, sparse),
        mlp_width=activation_counts.widest_mlp(c, sparse),
    )

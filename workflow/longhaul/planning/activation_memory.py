"""Bytes of activations, attention masks and logits on one rank, for each kind of activation checkpointing."""

from __future__ import annotations

from longhaul.config.model_size import ModelSize
from longhaul.config.stage_config import Stage
from longhaul.planning.choose_packed_attention import BLOCK_TOKENS, skips_pairs_on_gpus
from longhaul.planning.constants_shared_with_trainer import COMPUTE_BYTES, FP8_MULTIPLE, LOSS_CHUNK_TOKENS


def activation_bytes(stage: Stage, sizes: ModelSize, on_gpus: bool = True) -> tuple[int, int]:
    """Return the bytes (on the GPU, on the host) that layers save for the backward pass.

    They include all activations of the one layer that is being recomputed.

    on_gpus: False for ranks that compute on CPUs, whose layers are not compiled
    """
    parallel, width = stage.parallel, COMPUTE_BYTES[stage.precision]
    tokens = stage.micro_batch_size * stage.sequence_length // parallel.sequence
    # The first rank of a 1F1B pipeline holds one micro batch per pipeline rank, each for its own layers.
    layers = sizes.layers if parallel.pipeline == 1 else -(-sizes.layers // parallel.pipeline) * parallel.pipeline
    whole_layer = tokens * _saved_bytes_per_token(stage, sizes, on_gpus)
    layer_input = sizes.hidden_size * tokens * width
    under_way = _rows_under_way(stage, sizes) * layer_input
    if stage.activation_checkpointing == "none":
        return layers * whole_layer + under_way, 0
    if stage.activation_checkpointing == "offload":
        # Two inputs are on the GPU: that of the layer being recomputed, and the next one, which is copied back meanwhile.
        return 2 * layer_input + whole_layer + under_way, layers * layer_input
    # The two results that are added to the residual stream. A compiled layer needs the second one only in the forward pass.
    added_results = 1 if _is_compiled(stage, sizes, on_gpus) else 2
    elements = sizes.matmul_results // parallel.tensor + sizes.unsplit_matmul_results
    matmul_results = added_results * layer_input + elements * tokens * width
    kept = layer_input + (matmul_results if stage.activation_checkpointing == "selective" else 0)
    return layers * kept + whole_layer + under_way, 0


def _saved_bytes_per_token(stage: Stage, sizes: ModelSize, on_gpus: bool) -> int:
    """Return the bytes per token that a layer saves for the backward pass without activation checkpointing.

    A compiled layer recomputes what takes little time: the fp32 copies inside norms, and the activation function of the MLP
    (torch's min_cut_rematerialization_partition; a test compares).
    """
    width = COMPUTE_BYTES[stage.precision]
    split = sizes.saved_activations + (sizes.repeated_key_values if _repeats_key_values(stage, sizes, on_gpus) else 0)
    recomputed, norm_copies = (sizes.mlp_width, 0) if _is_compiled(stage, sizes, on_gpus) else (0, 4)
    elements = (split - recomputed) // stage.parallel.tensor + sizes.unsplit_activations
    if stage.parallel.sequence > 1:
        elements += _attention_output(stage, sizes)  # before and after it is exchanged for this rank's tokens
    bytes_per_token = elements * width + sizes.normed_elements * (norm_copies + width)
    is_in_fp8 = stage.precision == "fp8" and _is_compiled(stage, sizes, on_gpus)
    return bytes_per_token - (_bytes_saved_by_fp8(stage, sizes) if is_in_fp8 else 0)


def _bytes_saved_by_fp8(stage: Stage, sizes: ModelSize) -> int:
    """Return the bytes per token by which a compiled layer saves less in FP8 than in bf16.

    A product saves its input in FP8. Compiled code makes that again from what comes before the norm or the MLP's product of two
    matrices, which is saved anyway; only the output of attention is there twice. Experts are computed in bf16, so a mixture
    saves about as much as in bf16.
    """
    ranks = stage.parallel.tensor
    query, attention_output = sizes.query_heads * sizes.head_width // ranks, _attention_output(stage, sizes)
    mlp = sizes.mlp_width // ranks
    # Matrices of other sizes are multiplied in bf16, and so are experts.
    if any(sizes.is_sparse) or any(width % FP8_MULTIPLE for width in (sizes.hidden_size, query, attention_output, mlp)):
        return 0
    exchanged = attention_output if stage.parallel.sequence > 1 else 0
    return 2 * (mlp + 2 * sizes.hidden_size + exchanged) - attention_output


def _attention_output(stage: Stage, sizes: ModelSize) -> int:
    """Return the elements per token of the output of a rank's heads."""
    return (sizes.attention_width - sizes.query_heads * sizes.head_width) // stage.parallel.tensor


def _is_compiled(stage: Stage, sizes: ModelSize, on_gpus: bool) -> bool:
    """Return whether layers are compiled. With expert parallelism one is several graphs, which save as much (a test compares)."""
    return on_gpus and stage.compiles_layers_on_gpus(has_experts=any(sizes.is_sparse))


def _rows_under_way(stage: Stage, sizes: ModelSize) -> int:
    """Return the rows for each token that an exchange of expert parallelism sends and receives, if experts are chosen evenly.

    A token goes once to each rank with experts of it. The rows exist during the exchange; what is saved for each selected expert
    is that of a layer whose experts are not divided.
    """
    experts, ranks = sizes.experts_per_token, stage.parallel.expert
    return 2 * min(experts, ranks) if ranks > 1 else 0


def _repeats_key_values(stage: Stage, sizes: ModelSize, on_gpus: bool) -> bool:
    """Return True if attention repeats shared key and value heads.

    torch's kernel without copies allows neither mask nor fp32. transformers repeats them for FlexAttention if the number of query
    heads of a rank is no power of two.
    """
    heads = sizes.query_heads // stage.parallel.tensor
    has_mask = stage.kind == "sft" and not (on_gpus and skips_pairs_on_gpus(stage, sizes))
    return has_mask or stage.precision == "fp32" or (stage.kind == "sft" and bool(heads & (heads - 1)))


def attention_mask_bytes(stage: Stage, sizes: ModelSize, on_gpus: bool = True) -> int:
    """Return the bytes of the mask that separates packed conversations: a boolean per pair of positions, and the added bias.

    FlexAttention keeps no mask, but numbers of blocks of tokens: of those that are masked in part and of those that are not, by
    queries and by keys. For each row of blocks, these are four lists of int32, and their lengths.
    """
    if stage.kind != "sft":
        return 0
    if on_gpus and skips_pairs_on_gpus(stage, sizes):
        blocks = stage.sequence_length // BLOCK_TOKENS
        return stage.micro_batch_size * 4 * (blocks**2 + blocks) * 4
    return stage.micro_batch_size * stage.sequence_length**2 * (1 + COMPUTE_BYTES[stage.precision])


def logits_bytes(stage: Stage, sizes: ModelSize) -> int:
    """Return the bytes of one chunk's logits and of the output head's two gradients, which the forward pass computes.

    A chunk has its logits in compute precision and in fp32, and their softmax. With several chunks, the gradient of the head's
    weight is summed in fp32. Each chunk's product, and finally the sum, also exist in compute precision; by then the fp32
    logits are freed.
    """
    tokens = stage.micro_batch_size * stage.sequence_length // stage.parallel.sequence
    width = COMPUTE_BYTES[stage.precision]
    vocabulary = sizes.vocab_size // stage.parallel.tensor
    rows = min(tokens, LOSS_CHUNK_TOKENS)
    chunk = rows * vocabulary * (8 if width == 4 else width + 8)
    weight = vocabulary * sizes.hidden_size
    if width == 4 or tokens <= LOSS_CHUNK_TOKENS:
        return chunk + (tokens * sizes.hidden_size + weight) * width
    return max(chunk, rows * vocabulary * width + weight * width) + 4 * weight + tokens * sizes.hidden_size * width

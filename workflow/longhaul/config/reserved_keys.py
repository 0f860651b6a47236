"""Refuses keys of a user's config, generation and tokenizer JSON that have a name which transformers' classes use themselves.

transformers sets each key as an attribute of the object, so such a key replaces a method, or ends the job. Tests compare the
lists, which are names with spaces between them, with transformers.
"""

from __future__ import annotations

from collections.abc import Iterable

from longhaul.config.validation_messages import shortened

CONFIG_CLASSES = """
_auto_class _check_received_keys _decode_special_floats _dict_from_json_file _encode_special_floats _get_config_dict
_get_files_timestamps _get_generation_parameters _getattr_without_heterogeneous_validation
_hasattr_without_heterogeneous_validation _iter_config_keys_with_heterogeneous_adjustment _remove_keys_not_serialized
_update_heterogeneous_to_dict_output _upload_modified_files _validate_axial_rope_parameters
_validate_default_rope_parameters _validate_dynamic_rope_parameters _validate_linear_rope_parameters
_validate_llama3_rope_parameters _validate_longrope_rope_parameters _validate_proportional_rope_parameters
_validate_yarn_rope_parameters allow_global_per_layer_attribute_access attribute_map base_config_key base_model_ep_plan
base_model_fsdp_plan base_model_pp_plan base_model_tp_plan convert_rope_params_to_dict default_config_fields
default_rope_type default_theta dict_dtype_to_str extra_config_files extra_files from_dict from_json_file from_pretrained
get_config_dict get_mtp_config get_text_config ignore_keys_at_rope_validation is_custom_code is_heterogeneous is_remote_code
nested_rope_parameter_keys per_layer_attributes push_to_hub register_for_auto_class save_pretrained
serialize_explicit_per_layer_config standardize_rope_params sub_configs sub_configs_defaults to_dict to_diff_dict
to_json_file to_json_string update update_from_string use_return_dict validate validate_architecture validate_layer_type
validate_output_attentions validate_rope validate_token_ids
"""
GENERATION_CLASSES = """
_dict_from_json_file _get_default_generation_params _get_files_timestamps _upload_modified_files dict_dtype_to_str
extra_output_flags from_dict from_model_config from_pretrained get_generation_mode push_to_hub save_pretrained to_dict
to_diff_dict to_json_file to_json_string update validate
"""
TOKENIZER_CLASSES = """
_add_bos_token _add_eos_token _add_tokens _added_tokens_decoder _added_tokens_encoder _auto_class _convert_encoding
_convert_from_sentencepiece _convert_from_tiktoken _convert_id_to_token _convert_token_to_id_with_added_voc _decode
_encode_plus _encode_without_added_tokens _eventual_warn_about_too_long_sequence _extra_special_tokens _from_pretrained
_get_control_tokens _get_files_timestamps _get_padding_truncation_strategies _in_target_context_manager _mark_chat_inputs _pad
_pad_token_type_id _patch_mistral_regex _post_init _processor_class _save_pretrained _set_model_specific_special_tokens
_set_processor_class _should_update_post_processor _special_tokens_map _tokenizer _tokenizer_json_has_byte_level
_upload_modified_files add_special_tokens add_tokens apply_chat_template backend_tokenizer batch_decode clean_up_tokenization
convert_added_tokens convert_ids_to_tokens convert_to_native_format convert_tokens_to_ids convert_tokens_to_string decode
decoder encode encode_message_with_chat_template from_pretrained get_added_vocab get_chat_template get_response_parser
get_special_tokens_mask get_vocab num_special_tokens_to_add pad parse_response push_to_hub register_for_auto_class
save_chat_templates save_pretrained save_vocabulary set_truncation_and_padding tokenize train_new_from_iterator
update_post_processor
"""


def refuse_own_names(keys: Iterable[str], own_names: str, classes: str) -> None:
    """Raise ValueError if a key has a name that Python or transformers' `classes` (config, generation, tokenizer) use.

    Python uses names such as __dict__. Nothing uses a name such as __comment, and transformers loads a file with it.
    """
    for key in keys:
        is_of_python = key.startswith("__") and key.endswith("__")
        if is_of_python or key in own_names.split():
            users = "Python uses itself" if is_of_python else f"transformers' {classes} classes use themselves"
            raise ValueError(f"{shortened(key)} is a name that {users}; remove this key")

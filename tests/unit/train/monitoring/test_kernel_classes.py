"""Classes of kernels, by names as profiles of training on NVIDIA and AMD GPUs show them."""

from __future__ import annotations

import pytest

from longhaul.train.monitoring.kernel_classes import (
    ATTENTION,
    COMMUNICATION,
    COPY,
    ELEMENTWISE,
    MATRIX,
    OTHER,
    kernel_class,
    operator_class,
)

KERNELS = {
    MATRIX: (
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT",
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNT",
        "nvjet_sm100_tst_64x32_64x16_2x1_2cta_h_bz_splitK_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_nn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_nn_align8>(cutlass_80_tensorop::Params)",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<"
        "cutlass::gemm::GroupProblemShape<cute::tuple<int, int, int> > > > >(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float>(cublasSplitKParams)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4>(cublasGemvParamsEx)",
        "triton_tem_fused_mm_t_3",
        "Cijk_Ailk_Bljk_BBS_BH_Bias_HAS_SAV_UserArgs_MT256x256x64_MI16x16x1_SN_LDSB1",
        "Cijk_Alik_Bljk_HSS_BH_UserArgs_MT16x16x16_MI16x16x1_SN_LDSB0",
        "void ck::kernel_grouped_gemm_xdl_splitk<ck::GridwiseGemm>(void const*, int)",
    ),
    ATTENTION: (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t> >",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8> >",
        "void flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<64, 64, 128, 8, 2, 4, 4, true, cutlass::bfloat16_t> >",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "triton_tem_fused_flex_attention_0",
        "attn_fwd.kd",
        "bwd_kernel_dk_dv.kd",
        "void ck_tile::kentry<256, 1, ck_tile::FmhaFwdKernel<ck_tile::TileFmhaShape> >",
    ),
    ELEMENTWISE: (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()}>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float, float> > >",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata>",
        "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float, float, int>, float, float>(int)",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, true, false>(float*, float const*)",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::OpaqueType<2u>, unsigned int, 3, 64, 64>",
        "void at::native::indexFuncLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_transpose_3",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "triton_per_fused_add_mul_sum_mm_7",
        "_rms_norm_forward_kernel",
        "liger_cross_entropy_kernel",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy900, false, long, at::native::OpaqueType<8> >",
    ),
    COPY: (
        "Memcpy DtoH (Device -> Pinned)",
        "Memset (Device)",
        "__amd_rocclr_copyBuffer.kd",
        "__amd_rocclr_fillBufferAligned.kd",
    ),
    COMMUNICATION: (
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)",
        "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)",
    ),
    OTHER: ("my_kernel", "void spin(int)"),
}
OPERATORS = {
    MATRIX: ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm"),
    ATTENTION: (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    ELEMENTWISE: ("aten::add_", "aten::mul", "aten::sum", "aten::index_select", "aten::_softmax"),
    COPY: ("aten::copy_", "aten::_to_copy"),
    COMMUNICATION: ("c10d::allreduce_", "gloo:all_reduce", "nccl:all_gather"),
    OTHER: ("AddmmBackward0", "my_op"),
}


@pytest.mark.parametrize(("expected", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_class_of_a_kernel(expected: str, name: str):
    assert kernel_class(name) == expected


@pytest.mark.parametrize(("expected", "name"), [(kind, name) for kind, names in OPERATORS.items() for name in names])
def test_class_of_an_operator(expected: str, name: str):
    assert operator_class(name) == expected

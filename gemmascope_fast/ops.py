"""The op table: one row per op, and the registration of its schema, reference, fake and gradient.

The maths of each row is in `reference.py`, its gradient in `autograd.py`, its native implementations
in `csrc/cpu/<op>.cpp`, `csrc/cuda/<op>.cu` and `kernels/<op>.py`. Two namespaces carry the table:
`NAMESPACE`, served by the fastest implementation of each device, and `REFERENCE`, always the
plain-PyTorch one (float64, comparison, last resort).
"""

from __future__ import annotations

NAMESPACE = "gemmascope_fast"
REFERENCE = "gemmascope_fast_reference"

SCHEMAS: dict[str, str] = {
    "jumprelu_encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, float bandwidth, "
        "int? max_nnz, bool by_feature) -> (Tensor offsets, Tensor indices, Tensor values, "
        "Tensor gate, Tensor needed, Tensor feature_offsets, Tensor permutation)"
    ),
    "topk_encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, int k, bool by_feature) -> (Tensor offsets, "
        "Tensor indices, Tensor values, Tensor gate, Tensor feature_offsets, Tensor permutation)"
    ),
    "batchtopk_encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, float k, float? guess, int? max_nnz, "
        "bool by_feature) -> (Tensor offsets, Tensor indices, Tensor values, Tensor gate, "
        "Tensor needed, Tensor threshold, Tensor feature_offsets, Tensor permutation)"
    ),
    "decode": (
        "(Tensor offsets, Tensor indices, Tensor values, Tensor W_dec, Tensor? b_dec, "
        "Tensor? feature_offsets, Tensor? permutation, ScalarType dtype) -> Tensor"
    ),
    "decode_": (
        "(Tensor(a!) recon, Tensor offsets, Tensor indices, Tensor values, Tensor W_dec) -> ()"
    ),
    "encode_backward": (
        "(Tensor? d_values, Tensor? d_gate, Tensor x, Tensor W_enc, Tensor? threshold, "
        "float bandwidth, Tensor offsets, Tensor indices, Tensor values, Tensor gate, "
        "Tensor? feature_offsets, Tensor? permutation, bool need_x, bool need_W_enc, "
        "bool need_b_enc, bool need_threshold) "
        "-> (Tensor d_x, Tensor d_W_enc, Tensor d_b_enc, Tensor d_threshold)"
    ),
    "decode_backward": (
        "(Tensor d_recon, Tensor offsets, Tensor indices, Tensor values, Tensor W_dec, "
        "Tensor? feature_offsets, Tensor? permutation, bool need_values, bool need_W_dec, "
        "bool need_b_dec) -> (Tensor d_values, Tensor d_W_dec, Tensor d_b_dec)"
    ),
    "sae_backward": (
        "(Tensor x, Tensor W_enc, Tensor? threshold, float bandwidth, Tensor W_dec, "
        "Tensor d_recon, int[] group_ends, Tensor offsets, Tensor indices, Tensor values, "
        "Tensor gate, Tensor? d_values, Tensor? d_gate, Tensor feature_offsets, "
        "Tensor permutation, bool need_x) -> (Tensor d_x, Tensor d_W_enc, Tensor d_b_enc, "
        "Tensor d_threshold, Tensor d_W_dec, Tensor d_b_dec)"
    ),
    "pre_at": "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor rows, Tensor latents) -> Tensor",
    "by_feature": (
        "(Tensor offsets, Tensor indices, int d_sae) "
        "-> (Tensor feature_offsets, Tensor permutation)"
    ),
}
